// channels_last: rows of c channels, and their statistics and gradients' sums per channel.
#pragma once
#include <algorithm>

#include "channel_norm.h"
#include "vector.h"

namespace fastnorm::cpu::CPU_CAPABILITY {

// Several rows at once are one wide row of `columns` elements; the last wide row may be shorter.  Where rows do not
// follow each other in memory, each is for itself.
template <class T>
struct Rows {
  int64_t c, total, columns, chunk, chunks;  // elements, but for the count of chunks

  Rows(int64_t rows, int64_t c, bool apart = false) : c(c), total(rows * c) {
    int64_t repeat = 1;
    while (!apart && (repeat * c % kLanes<T> != 0 || repeat * c < 256)) repeat *= 2;
    columns = std::min(repeat, rows) * c;
    const int64_t wide_rows = (total + columns - 1) / columns;
    // At most 256 chunks of at least 64k elements: enough for every thread, few enough to merge.
    const int64_t per_chunk = std::max({int64_t(1), 65536 / columns, (wide_rows + 255) / 256});
    chunk = per_chunk * columns, chunks = (wide_rows + per_chunk - 1) / per_chunk;
  }
  int64_t padded() const { return (columns + kLanes<T> - 1) / kLanes<T> * kLanes<T>; }
  int64_t chunk_end(int64_t i) const { return std::min(total, (i + 1) * chunk); }
  int64_t channel_blocks() const { return (c + 63) / 64; }
  // f(first, last) of a block of channels
  template <class F>
  void visit_channels(int64_t block, F f) const {
    f(block * 64, std::min(c, block * 64 + 64));
  }
  template <class A>
  void set(const PerColumn<A>& coefficients, int64_t channel, const Channel<A>& values) const {
    for (int64_t i = channel; i < columns; i += c) coefficients.set(values, i);
  }
};

constexpr int64_t kBlockRows = 256;  // wide rows whose sums are in the accumulate type
constexpr int64_t kRowsAhead = 1024;

// Mean and m2 of every channel over one chunk.  The shift of a block is its first row.
template <class T>
void chunk_moments(const T* x, const Rows<T>& rows, int64_t begin, int64_t end, double* mean, double* m2,
                   Accumulate<T>* k, Accumulate<T>* s, Accumulate<T>* q) {
  using A = Accumulate<T>;
  constexpr int kUnroll = 4;
  const int64_t columns = rows.columns, c = rows.c;
  std::fill(mean, mean + c, 0.0), std::fill(m2, m2 + c, 0.0);
  double seen = 0;
  for (int64_t block = begin; block < end; block += kBlockRows * columns) {
    const int64_t block_end = std::min(end, block + kBlockRows * columns);
    for (int64_t i = 0; i < c; i++) k[i] = A(x[block + i]);
    for (int64_t i = c; i < columns; i++) k[i] = k[i - c];
    std::fill(s, s + columns, A(0)), std::fill(q, q + columns, A(0));
    int64_t row = block;
    for (; row + kUnroll * columns <= block_end; row += kUnroll * columns) {
      const auto lanes = new_lanes<T>(columns);
      for_packs<T>(columns, [&](int64_t i, auto count, auto again) {
        const auto shift = load(k + i, Full<A>());
        auto sum = load(s + i, Full<A>()), square = load(q + i, Full<A>());
        for (int u = 0; u < kUnroll; u++) {
          const T* const p = x + row + u * columns + i;
          prefetch(p + kRowsAhead * kUnroll);
          const auto d = keep(lanes, load(p, count) - shift, count, again);
          sum = sum + d, square = fmadd(d, d, square);
        }
        store(s + i, sum, Full<A>()), store(q + i, square, Full<A>());
      });
    }
    for (; row < block_end; row += columns) {
      const int64_t len = std::min(columns, block_end - row);
      const auto lanes = new_lanes<T>(len);
      for_packs<T>(len, [&](int64_t i, auto count, auto again) {
        const auto d = keep(lanes, load(x + row + i, count) - load(k + i, Full<A>()), count, again);
        store(s + i, load(s + i, Full<A>()) + d, Full<A>());
        store(q + i, fmadd(d, d, load(q + i, Full<A>())), Full<A>());
      });
    }
    const double n = double(block_end - block) / c, part = n / (seen + n), inv = 1 / n;
    for (int64_t i = 0; i < c; i++) {
      double sum = 0, square = 0;
      for (int64_t j = i; j < columns; j += c) sum += double(s[j]), square += double(q[j]);
      const double d = double(k[i]) + sum * inv - mean[i];
      mean[i] += d * part;
      m2[i] += std::max(square - sum * sum * inv, 0.0) + d * d * seen * part;
    }
    seen += n;
  }
}

// Merges chunk after chunk of the rows, as chunk_moments() left them in sums(chunk, which), into the first one's
// numbers, for the channels [first, last).
template <class T, class F>
void merge_chunk_moments(const Rows<T>& rows, int64_t first, int64_t last, F sums) {
  double *const mean = sums(0, 0), *const m2 = sums(0, 1);
  for (int64_t i = 1; i < rows.chunks; i++) {
    const double n = double(rows.chunk_end(i) - i * rows.chunk), seen = double(i * rows.chunk);
    const double part = n / (seen + n);
    const double *const other = sums(i, 0), *const other_m2 = sums(i, 1);
    for (int64_t c = first; c < last; c++) {
      const double d = other[c] - mean[c];
      mean[c] += d * part, m2[c] += other_m2[c] + d * d * (seen / rows.c) * part;
    }
  }
}

// y of a chunk.  gap: elements of x between a row and the next, where rows are apart.
template <class T, class Args>
[[gnu::noinline]] void normalize_chunk(const Args& a, const Rows<T>& rows, const PerColumn<Accumulate<T>> coefficients,
                                       int64_t chunk, int64_t x_ahead, bool streaming, int64_t gap = 0) {
  normalize<T>(a, {x_ahead, kRowsAhead, kRowsAhead}, streaming, [&](auto write) {
    for (int64_t at = chunk * rows.chunk; at < rows.chunk_end(chunk); at += rows.columns)
      write(coefficients, at, std::min(rows.columns, rows.total - at), a.mask ? a.mask + at / 8 : nullptr,
            at / rows.columns * gap);
  });
}

// dx and dresidual of a chunk.
template <class T, class Args, class F>
[[gnu::noinline]] void backward_chunk(const Args& a, const Rows<T>& rows, const PerColumn<Accumulate<T>> coefficients,
                                      int64_t chunk, int64_t read_ahead, bool streaming, F dx_of) {
  backward_spans<T>(a, kRowsAhead, streaming, dx_of, [&](auto write) {
    for (int64_t at = chunk * rows.chunk; at < rows.chunk_end(chunk); at += rows.columns)
      write(coefficients, at, std::min(rows.columns, rows.total - at), a.mask ? a.mask + at / 8 : nullptr, nullptr,
            read_ahead);
  });
}

// The sums of dz and dz * (x - mean) of every channel over one chunk; then(gradient, at, i, count) for every pack.
template <class T, Slope slope, class Args, class F>
[[gnu::noinline]] void chunk_sums(const Args& a, const Rows<T>& rows, const PerColumn<Accumulate<T>> coefficients,
                                  int64_t begin, int64_t end, double* sum_dz, double* sum_dz_centered, Accumulate<T>* s,
                                  Accumulate<T>* q, F then) {
  using A = Accumulate<T>;
  using G = Gradient<T, slope, PerColumn<A>>;
  constexpr int kUnroll = 2;
  const int64_t columns = rows.columns, c = rows.c;
  alignas(64) A kept[kUnroll][slope == Slope::kKept ? kStrip : 1];
  std::fill(sum_dz, sum_dz + c, 0.0), std::fill(sum_dz_centered, sum_dz_centered + c, 0.0);
  for (int64_t block = begin; block < end; block += kBlockRows * columns) {
    const int64_t block_end = std::min(end, block + kBlockRows * columns);
    std::fill(s, s + columns, A(0)), std::fill(q, q + columns, A(0));
    // `unroll` rows from element `at` on, of which `first` is the column.
    auto add = [&](int64_t at, int64_t first, int64_t len, auto unroll) {
      const PerColumn<A> c = coefficients.from(first);
      if constexpr (slope == Slope::kKept)
        for (int u = 0; u < unroll; u++) keep_slopes<T>(a, c, at + u * columns, len, kept[u]);
      const auto lanes = new_lanes<T>(len);
      for_packs<T>(len, [&](int64_t i, auto count, auto again) {
        auto sum = load(s + first + i, Full<A>()), product = load(q + first + i, Full<A>());
        for (int u = 0; u < unroll; u++) {
          const int64_t row = at + u * columns;
          prefetch(static_cast<const T*>(a.x) + row + i + 2 * kRowsAhead);
          prefetch(static_cast<const T*>(a.dy) + row + i + 2 * kRowsAhead);
          const G g(a, c, row + i, i, a.mask + (a.mask ? row / 8 : 0), kept[u], count, again);
          const auto dz = keep(lanes, g.dz, count, again);
          sum = sum + dz, product = fmadd(dz, g.centered, product);
          then(g, row + i, first + i, count);
        }
        store(s + first + i, sum, Full<A>()), store(q + first + i, product, Full<A>());
      });
    };
    auto add_rows = [&](int64_t row, int64_t len, auto unroll) {
      const int64_t step = slope == Slope::kKept ? kStrip : len;
      for (int64_t first = 0; first < len; first += step) add(row + first, first, std::min(step, len - first), unroll);
    };
    int64_t row = block;
    for (; row + kUnroll * columns <= block_end; row += kUnroll * columns)
      add_rows(row, columns, std::integral_constant<int, kUnroll>());
    for (; row < block_end; row += columns)
      add_rows(row, std::min(columns, block_end - row), std::integral_constant<int, 1>());
    for (int64_t i = 0; i < c; i++)
      for (int64_t j = i; j < columns; j += c) sum_dz[i] += double(s[j]), sum_dz_centered[i] += double(q[j]);
  }
}

}  // namespace fastnorm::cpu::CPU_CAPABILITY
