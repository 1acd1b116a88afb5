// Layer norm forward on the CPU; ../layer_norm.h has the formulas.
//
// Rows (inner == 1): a row's moments, then the row again while it is in the L1 or L2 cache, with the next row fetched
//   meanwhile. With fewer rows than threads a row's segments are shared: same sums, same order.
// Tiles (inner > 1): a run of pixels in all columns; sums per pixel, then the tile again while it is in the L2 cache.
// Floor: 2 S (S: bytes of x), one more for a residual, two more for an addend and the sum.
#include "elementwise.h"
#include "layer_norm_coefficients.h"
#include "output.h"

namespace fastnorm::cpu::CPU_CAPABILITY {
namespace {

template <class T>
struct Forward {
  using A = Accumulate<T>;
  const LayerNormForward& a;
  int64_t rows;
  Parameters<A> parameters;
  bool streaming;
  const T* h;

  explicit Forward(const LayerNormForward& a)
      : a(a),
        rows(a.outer * a.inner),
        parameters(a, static_cast<A*>(a.workspace)),
        h(static_cast<const T*>(a.addend ? a.sum : a.x)) {
    const int64_t run = (a.inner == 1 ? a.cols : a.inner) * sizeof(T);
    const int64_t bytes = rows * a.cols * sizeof(T);
    streaming = streams(a.y, bytes, run, (2 + (a.residual ? 1 : 0) + (a.addend ? 2 : 0)) * bytes);
  }
  // h of len elements from `at` on, where there is an addend.
  void add(int64_t at, int64_t len, int64_t read_ahead) const {
    if (!a.addend) return;
    const T *const x = static_cast<const T*>(a.x) + at, *const addend = static_cast<const T*>(a.addend) + at;
    T* const sum = static_cast<T*>(a.sum) + at;
    for_packs<T>(len, [&](int64_t i, auto count, auto) {
      fetch(x + i + read_ahead), fetch(addend + i + read_ahead);
      store(sum + i, load(x + i, count) + load(addend + i, count), count);
    });
  }
  // Variances, or mean squares, below this have lost digits to underflow unless eps hides that.
  bool accurate(double variance) const { return std::isfinite(variance) && variance + a.eps > 1e-36; }

  Moments wide(const T* first, int64_t stride) const {
    if (!a.rms) return wide_moments(first, a.cols, stride, 1);
    Moments m{double(a.cols), 0, 0};
    for (int64_t i = 0; i < a.cols; i++) m.m2 += double(first[i * stride]) * double(first[i * stride]);
    return m;
  }
};

// out(i, z, count, again) for every pack of z = normalized * weight + bias + residual, of `len` elements from element
// `at` on, the i-th of their span.
template <class T, class Coefficients, class Out>
[[gnu::always_inline]] inline void for_z(const Forward<T>& f, const Coefficients c, int64_t at, int64_t first,
                                         int64_t len, int64_t read_ahead, auto with_residual, Out out) {
  const T* const h = f.h + at;
  const T* const residual = static_cast<const T*>(f.a.residual) + at;
  const bool ahead = read_ahead != 0 && !f.a.addend;
  for_packs<T>(len, [&](int64_t i, auto count, auto again) {
    if (ahead) fetch(h + i + read_ahead);
    if (with_residual && read_ahead) fetch(residual + i + read_ahead);
    auto z = fmadd(normalize(c, load(h + i, count), first + i), c.weight(first + i, count), c.bias(first + i, count));
    if (with_residual) z = z + load(residual + i, count);
    out(i, z, count, again);
  });
}

// y = activation(z) of spans: each(write) calls write(coefficients, at, len, mask, read_ahead) for one after the other,
// of len elements from `at` on, whose bits are at mask.
template <class T, class F>
[[gnu::always_inline]] inline void write_outputs(const Forward<T>& f, F each) {
  using A = Accumulate<T>;
  const LayerNormForward& a = f.a;
  const bool streaming = f.streaming;
  if (takes_strips(a.activation)) {
    alignas(64) A strip[kStrip];
    int64_t begin = 0, filled = 0;  // elements that the strip has, from element `begin` on
    uint8_t* bits = nullptr;
    auto flush = [&] {
      if (filled)
        store_activated(a.activation, a.negative_slope, strip, static_cast<T*>(a.y) + begin, filled, bits, streaming);
      filled = 0;
    };
    each([&](const auto c, int64_t at, int64_t len, uint8_t* mask, int64_t read_ahead) {
      for (int64_t first = 0; first < len; first += kStrip) {
        const int64_t part = std::min(kStrip, len - first);
        // Short spans of whole packs share a strip; so their bits follow each other too.
        const bool follows = filled && part % kLanes<T> == 0 && filled % kLanes<T> == 0 && at + first == begin + filled;
        if (!follows || filled + part > kStrip) flush(), begin = at + first, bits = mask ? mask + first / 8 : nullptr;
        A* const to = strip + filled;
        for_z(f, c, at + first, first, part, read_ahead, a.residual != nullptr,
              [&](int64_t i, auto z, auto, auto again) { store(to + place<T>(i, again), z, Full<A>()); });
        filled += part;
      }
    });
    return flush();
  }
  const A bound = lower_bound<A>(a.activation);
  auto with = [&](auto residual) {
    each([&](const auto c, int64_t at, int64_t len, uint8_t* mask, int64_t read_ahead) {
      constexpr int64_t kWriteAhead = 512;
      T* const y = static_cast<T*>(a.y) + at;
      for_z(f, c, at, 0, len, read_ahead, residual, [&](int64_t i, auto z, auto count, auto again) {
        if (residual && mask) store_bits(mask, i, relu_bits(z), count, again);
        if (!streaming) prefetch<T, true>(y + i + kWriteAhead);
        store_output(y + i, raise_to(bound, z), count, again, streaming);
      });
    });
  };
  a.residual ? with(std::true_type()) : with(std::false_type());
}

// ---- Statistics -----------------------------------------------------------------------------------------------------

// Of a batch of rows, as they grow: sums of d = h - origin and of d * d over some columns, and what they are merged to.
template <class A>
struct ForwardBatch : Batch<A> {
  using Batch<A>::kPadded;
  alignas(64) A origin[kPadded], sum[kPadded], square[kPadded];
  alignas(64) double wide_mean[kPadded], m2[kPadded];  // m2: the sum of squared deviations; RMS norm: of squares
};

// Merges the sums over n columns into what was seen before, as in moments.h.
template <class A>
void merge_sums(ForwardBatch<A>& s, int64_t rows, double seen, double n, bool rms) {
  const double inv = 1 / n, part = n / (seen + n);
  if (seen == 0) std::fill(s.wide_mean, s.wide_mean + rows, 0.0), std::fill(s.m2, s.m2 + rows, 0.0);
  if (rms) {
    for (int64_t i = 0; i < rows; i++) s.m2[i] += double(s.square[i]);
    return;
  }
  for (int64_t i = 0; i < rows; i++) {
    const double sum = double(s.sum[i]), m2 = double(s.square[i]) - sum * sum * inv;
    const double d = double(s.origin[i]) + sum * inv - s.wide_mean[i];
    s.wide_mean[i] += d * part;
    s.m2[i] += (m2 < 0 ? 0 : m2) + d * d * seen * part;
  }
}

// The statistics of `rows` rows from `row` on, of which h has the first element; the strides are between rows and in
// them.
template <class T>
void finish_batch(const Forward<T>& f, ForwardBatch<Accumulate<T>>& s, int64_t row, int64_t rows, const T* h,
                  int64_t row_stride, int64_t column_stride) {
  using A = Accumulate<T>;
  using D = at::vec::Vectorized<double>;
  const LayerNormForward& a = f.a;
  const double inv = 1 / double(a.cols);
  bool accurate = true;
  for (int64_t i = 0; i < rows; i++) {
    s.m2[i] *= inv;
    accurate &= f.accurate(s.m2[i]);
  }
  for (int64_t i = 0; !accurate && i < rows; i++)
    if (!f.accurate(s.m2[i])) {
      const Moments m = f.wide(h + i * row_stride, column_stride);
      s.wide_mean[i] = m.mean, s.m2[i] = m.m2 / m.n;
    }
  for (int64_t i = 0; i < rows; i += D::size()) (D(1) / (D::loadu(s.m2 + i) + D(a.eps)).sqrt()).store(s.m2 + i);
  A* const stats = static_cast<A*>(a.stats) + row;
  for (int64_t i = 0; i < rows; i++) {
    s.mean[i] = A(s.wide_mean[i]), s.rstd[i] = A(s.m2[i]);
    const A low = A(s.wide_mean[i] - double(s.mean[i]));
    s.shift[i] = -(low * s.rstd[i]);
    if (a.rms) {
      stats[i] = s.rstd[i];
    } else {
      stats[i] = s.mean[i], stats[f.rows + i] = low, stats[2 * f.rows + i] = s.rstd[i];
    }
  }
}

// ---- Rows -----------------------------------------------------------------------------------------------------------

constexpr int64_t kReadAhead = 2048;

// h and its sums over len columns, for row i of the batch.
template <class T>
[[gnu::noinline]] void segment_sums(const Forward<T>& f, ForwardBatch<Accumulate<T>>& s, int64_t i, int64_t at,
                                    int64_t len) {
  using A = Accumulate<T>;
  using P = Pack<A>;
  f.add(at, len, kReadAhead);
  const T* const h = f.h + at;
  const bool ahead = !f.a.addend && f.a.cols > kReadAhead;
  const int64_t head = std::min(len, kLanes<T>);
  const A origin = f.a.rms ? A(0) : load(h, head).sum() / A(head);
  const P lanes = new_lanes<T>(len), from(origin);
  P sum(A(0)), square(A(0));
  for_packs<T>(len, [&](int64_t k, auto count, auto again) {
    if (ahead) fetch(h + k + kReadAhead);
    const P d = keep(lanes, load(h + k, count) - from, count, again);
    sum = sum + d, square = fmadd(d, d, square);
  });
  s.origin[i] = origin, s.sum[i] = sum.sum(), s.square[i] = square.sum();
}

// y of rows [first, last) of the batch, which begins with row `row`, from the segment at `column` back to the one at
// `first_column`: what was read last is the hottest.
template <class T>
[[gnu::noinline]] void write_rows(const Forward<T>& f, const ForwardBatch<Accumulate<T>>& s, int64_t row, int64_t first,
                                  int64_t last, int64_t first_column, int64_t column, int64_t read_ahead) {
  const int64_t cols = f.a.cols;
  write_outputs(f, [&](auto write) {
    for (int64_t i = first; i < last; i++)
      for (int64_t k = column; k >= first_column; k -= kSegment) {
        uint8_t* const mask = f.a.mask ? f.a.mask + (row + i) * ((cols + 7) / 8) + k / 8 : nullptr;
        write(s.row(i, f.parameters, k), (row + i) * cols + k, std::min(kSegment, cols - k), mask, read_ahead);
      }
  });
}

template <class T>
void forward_rows(const Forward<T>& f) {
  using A = Accumulate<T>;
  const LayerNormForward& a = f.a;
  const int64_t cols = a.cols, batch = batch_rows(cols, sizeof(T)), ahead = cols <= kReadAhead ? batch * cols : 0;
  const int64_t step = std::max<int64_t>(1, 32768 / (batch * cols)) * batch;
  parallel(a.threads, [&](Team team) {
    Parameters<A>::convert(a, static_cast<A*>(a.workspace), team);
    ForwardBatch<A> s;
    team.for_each((f.rows + step - 1) / step, [&](int64_t block) {
      const int64_t end = std::min(f.rows, (block + 1) * step);
      for (int64_t row = block * step; row < end; row += batch) {
        const int64_t rows = std::min(batch, end - row);
        for (int64_t k = 0; k < cols; k += kSegment) {
          const int64_t len = std::min(kSegment, cols - k);
          for (int64_t i = 0; i < rows; i++) segment_sums(f, s, i, (row + i) * cols + k, len);
          merge_sums(s, rows, double(k), double(len), a.rms);
        }
        finish_batch(f, s, row, rows, f.h + row * cols, cols, 1);
        write_rows(f, s, row, 0, rows, 0, (cols - 1) / kSegment * kSegment, ahead);
      }
    });
  });
}

// Rows so long and few that the threads share each.
bool shares_rows(const LayerNormForward& a) {
  return a.inner == 1 && a.cols > kSegment && a.outer < std::min<int64_t>(2 * a.threads, kMaxBatch);
}

template <class T>
void forward_shared_rows(const Forward<T>& f) {
  using A = Accumulate<T>;
  const LayerNormForward& a = f.a;
  const int64_t segments = (a.cols + kSegment - 1) / kSegment;
  struct Sums {
    A origin, sum, square;
  };
  auto* const partial = reinterpret_cast<Sums*>(static_cast<A*>(a.workspace) + Parameters<A>::elements(a));
  ForwardBatch<A> all;
  parallel(a.threads, [&](Team team) {
    Parameters<A>::convert(a, static_cast<A*>(a.workspace), team);
    ForwardBatch<A> s;
    team.for_each(f.rows * segments, [&](int64_t i) {
      const int64_t column = i % segments * kSegment;
      segment_sums(f, s, 0, i / segments * a.cols + column, std::min(kSegment, a.cols - column));
      partial[i] = {s.origin[0], s.sum[0], s.square[0]};
    });
    team.for_each(1, [&](int64_t) {
      for (int64_t j = 0; j < segments; j++) {
        for (int64_t i = 0; i < f.rows; i++) {
          const Sums& sums = partial[i * segments + j];
          all.origin[i] = sums.origin, all.sum[i] = sums.sum, all.square[i] = sums.square;
        }
        merge_sums(all, f.rows, double(j * kSegment), double(std::min(kSegment, a.cols - j * kSegment)), a.rms);
      }
      finish_batch(f, all, 0, f.rows, f.h, a.cols, 1);
    });
    team.for_each(f.rows * segments, [&](int64_t i) {
      const int64_t row = i / segments, column = i % segments * kSegment;
      write_rows(f, all, 0, row, row + 1, column, column, 0);
    });
  });
}

// ---- Tiles ----------------------------------------------------------------------------------------------------------

// The sums of `columns` columns of a tile from element `at` on, about the mean of the first few.
template <class T>
void column_sums(const Forward<T>& f, ForwardBatch<Accumulate<T>>& s, int64_t at, int64_t pixels, int64_t columns) {
  using A = Accumulate<T>;
  using P = Pack<A>;
  const T* const h = f.h + at;
  const int64_t inner = f.a.inner, head = f.a.rms ? 0 : std::min<int64_t>(8, columns);
  const P lanes = new_lanes<T>(pixels), scale(A(1) / A(std::max<int64_t>(head, 1)));
  constexpr int kUnroll = 4;
  for (int64_t j = 0; j < columns; j++) f.add(at + j * inner, pixels, kUnroll * inner);
  for_packs<T>(pixels, [&](int64_t i, auto count, auto) {
    P origin(A(0));
    for (int64_t j = 0; j < head; j++) origin = origin + load(h + j * inner + i, count);
    store(s.origin + i, origin * scale, Full<A>());
    store(s.sum + i, P(A(0)), Full<A>()), store(s.square + i, P(A(0)), Full<A>());
  });
  auto add = [&](int64_t j, auto unroll) {
    for_packs<T>(pixels, [&](int64_t i, auto count, auto again) {
      P sum = load(s.sum + i, Full<A>()), square = load(s.square + i, Full<A>());
      const P origin = load(s.origin + i, Full<A>());
      for (int u = 0; u < unroll; u++) {
        const T* const from = h + (j + u) * inner + i;
        prefetch(from + kUnroll * inner);
        const P d = keep(lanes, load(from, count) - origin, count, again);
        sum = sum + d, square = fmadd(d, d, square);
      }
      store(s.sum + i, sum, Full<A>()), store(s.square + i, square, Full<A>());
    });
  };
  int64_t j = 0;
  for (; j + kUnroll <= columns; j += kUnroll) add(j, std::integral_constant<int, kUnroll>());
  for (; j < columns; j++) add(j, std::integral_constant<int, 1>());
}

template <class T>
[[gnu::noinline]] void write_tile(const Forward<T>& f, const ForwardBatch<Accumulate<T>>& s, const Tiles::Tile& t) {
  const LayerNormForward& a = f.a;
  write_outputs(f, [&](auto write) {
    for (int64_t k = a.cols - 1; k >= 0; k--) {  // backwards: what was read last is the hottest
      uint8_t* const mask = a.mask ? a.mask + (t.sample * a.cols + k) * ((a.inner + 7) / 8) + t.first / 8 : nullptr;
      write(s.column(f.parameters, k), t.at + k * a.inner, t.pixels, mask, 0);
    }
  });
}

template <class T>
void forward_tiles(const Forward<T>& f) {
  using A = Accumulate<T>;
  const LayerNormForward& a = f.a;
  const Tiles tiles(a.outer, a.cols, a.inner, sizeof(T), kLanes<T>);
  parallel(a.threads, [&](Team team) {
    Parameters<A>::convert(a, static_cast<A*>(a.workspace), team);
    ForwardBatch<A> s;
    team.for_each(tiles.count, [&](int64_t i) {
      const Tiles::Tile t = tiles.tile(i);
      for (int64_t k = 0; k < a.cols; k += kBlockColumns) {
        const int64_t columns = std::min(kBlockColumns, a.cols - k);
        column_sums(f, s, t.at + k * a.inner, t.pixels, columns);
        merge_sums(s, t.pixels, double(k), double(columns), a.rms);
      }
      finish_batch(f, s, t.sample * a.inner + t.first, t.pixels, f.h + t.at, 1, a.inner);
      write_tile(f, s, t);
    });
  });
}

}  // namespace

size_t layer_norm_forward_workspace(const LayerNormForward& a) {
  size_t bytes = 0;
  with_type(a.dtype, [&](auto zero) {
    using A = Accumulate<decltype(zero)>;
    const int64_t partial = shares_rows(a) ? 3 * a.outer * ((a.cols + kSegment - 1) / kSegment) : 0;
    bytes = (Parameters<A>::elements(a) + partial) * sizeof(A);
  });
  return bytes;
}

void layer_norm_forward(const LayerNormForward& a) {
  const size_t bytes = size_t(a.outer) * a.cols * a.inner * size_of(a.dtype);
  prefer_huge_pages(a.y, bytes), prefer_huge_pages(a.sum, bytes);
  with_type(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    const Forward<T> f(a);
    if (a.inner > 1) return forward_tiles(f);
    shares_rows(a) ? forward_shared_rows(f) : forward_rows(f);
  });
}

}  // namespace fastnorm::cpu::CPU_CAPABILITY
