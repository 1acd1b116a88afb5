// Layer norm backward on the CPU; ../layer_norm.h has the formulas.
//
//   dx = (dz * weight - c1 - normalized * c2) * rstd + dsum,  c1 = mean(dz * weight) (RMS norm: 0),
//   c2 = mean(dz * weight * normalized);  dweight = sum(dz * normalized),  dbias = sum(dz)
//
// Each row (inner == 1) or tile of pixels (inner > 1) is gone through twice, the second time from the L1 or L2 cache:
// its sums and what it adds to dweight and dbias, then dx. Rows or tiles are cut into chunks by their shape alone; a
// chunk's share of dweight and dbias is summed in the accumulate type over few rows, beyond that in double, and chunks
// are added in order. Floor: 3 S (S: bytes of x), one more for dsum, residual and dresidual each.
#include <utility>

#include "layer_norm_gradient.h"

namespace fastnorm::cpu::CPU_CAPABILITY {
namespace {

// ---- Sums -----------------------------------------------------------------------------------------------------------

// Of a batch of rows, over the columns: of dz * weight and of dz * weight * normalized.
template <class A>
struct BackwardBatch : Batch<A> {
  using Batch<A>::kPadded;
  alignas(64) A sum[kPadded], product[kPadded];                 // over some columns
  alignas(64) double wide_sum[kPadded], wide_product[kPadded];  // over all
};

template <class T>
void start_batch(const Backward<T>& b, BackwardBatch<Accumulate<T>>& s, int64_t row, int64_t rows) {
  for (int64_t i = 0; i < rows; i++) {
    s.mean[i] = b.mean(row + i), s.rstd[i] = b.rstd(row + i), s.shift[i] = -(b.mean_low(row + i) * s.rstd[i]);
    s.wide_sum[i] = s.wide_product[i] = 0;
  }
  for (int64_t i = rows; i < round_up(rows, kLanes<T>); i++) s.mean[i] = s.rstd[i] = s.shift[i] = 0;  // 0 * NaN is NaN
}

template <class A>
void merge_sums(BackwardBatch<A>& s, int64_t rows) {
  flush(s.sum, s.wide_sum, rows), flush(s.product, s.wide_product, rows);
}

template <class A>
void finish_batch(const LayerNormBackward& a, BackwardBatch<A>& s, int64_t rows) {
  const double inv = 1 / double(a.cols), inv_or_zero = a.rms ? 0 : inv;
  for (int64_t i = 0; i < rows; i++)
    s.offset[i] = A(s.wide_sum[i] * inv_or_zero), s.slope[i] = A(s.wide_product[i] * inv);
}

// ---- Rows -----------------------------------------------------------------------------------------------------------

// The sums over one segment of kRows rows, of which `row` is the i-th of the batch; adds to dweight and dbias.
template <class T, Slope slope, int kRows>
[[gnu::noinline]] void segment_sums(const Backward<T>& b, BackwardBatch<Accumulate<T>>& s, int rank, int64_t i,
                                    int64_t row, int64_t column, int64_t x_ahead) {
  using A = Accumulate<T>;
  using P = Pack<A>;
  const LayerNormBackward a = b.a;
  const int64_t cols = a.cols, len = std::min(kSegment, cols - column), at = row * cols + column;
  const T* const ahead = static_cast<const T*>(a.x) + at + x_ahead;
  A *const dweight = b.dweight(rank) + column, *const dbias = b.dbias(rank) + column;
  A* const kept = b.kept(rank) + i * b.plan.padded + column;  // of slopes
  const P lanes = new_lanes<T>(len);
  const bool grow = b.with_parameters;
  auto take = [&]<size_t... u>(std::index_sequence<u...>) {
    const OfRow<A> c[] = {s.row(i + u, b.parameters, column)...};
    const uint8_t* const mask[] = {b.mask(row + u, cols, column)...};
    if constexpr (slope == Slope::kKept) (keep_slopes(b, c[u], at + u * cols, len, kept + u * b.plan.padded), ...);
    P sum[kRows], product[kRows];
    ((sum[u] = product[u] = P(A(0))), ...);
    for_packs<T>(len, [&](int64_t k, auto count, auto again) {
      P dw(A(0)), db(A(0));
      if (grow) dw = load(dweight + k, Full<A>()), db = load(dbias + k, Full<A>());
      const P weight = c[0].weight(k, count);
      auto add = [&](int r) {
        fetch(ahead + r * cols + k);
        const Gradient<T, slope, OfRow<A>> g(a, c[r], at + r * cols + k, k, mask[r], kept + r * b.plan.padded, count,
                                             again);
        const P dz = keep(lanes, g.dz, count, again), weighted = dz * weight;
        dw = fmadd(dz, g.normalized, dw), db = db + dz;
        sum[r] = sum[r] + weighted, product[r] = fmadd(weighted, g.normalized, product[r]);
      };
      (add(u), ...);
      if (grow) store(dweight + k, dw, Full<A>()), store(dbias + k, db, Full<A>());
    });
    ((s.sum[i + u] = sum[u].sum(), s.product[i + u] = product[u].sum()), ...);
  };
  take(std::make_index_sequence<kRows>());
}

// ... and of any number of rows, from the first of the batch on.
template <class T>
void segment_sums_of(const Backward<T>& b, BackwardBatch<Accumulate<T>>& s, int rank, int64_t row, int64_t rows,
                     int64_t column, int64_t x_ahead) {
  constexpr int kRows = 4;
  with_slope(b.slope, [&](auto slope) {
    int64_t i = 0;
    for (; i + kRows <= rows; i += kRows) segment_sums<T, slope, kRows>(b, s, rank, i, row + i, column, x_ahead);
    for (; i < rows; i++) segment_sums<T, slope, 1>(b, s, rank, i, row + i, column, x_ahead);
  });
}

template <class T>
[[gnu::noinline]] void write_segment(const Backward<T>& b, const BackwardBatch<Accumulate<T>>& s, int rank, int64_t i,
                                     int64_t row, int64_t column, int64_t dy_ahead) {
  const int64_t cols = b.a.cols;
  write_gradients(b, [&](auto write) {
    write(s.row(i, b.parameters, column), (row + i) * cols + column, std::min(kSegment, cols - column),
          b.mask(row + i, cols, column), b.kept(rank) + i * b.plan.padded + column, dy_ahead);
  });
}

// The sums of a batch of rows, while what comes next of x is fetched, then their gradients, and the same with dy.
template <class T>
void backward_batch(const Backward<T>& b, BackwardBatch<Accumulate<T>>& s, int rank, int64_t row, int64_t rows) {
  const int64_t cols = b.a.cols, ahead = cols <= kReadAhead ? b.plan.batch * cols : kReadAhead;
  start_batch(b, s, row, rows);
  for (int64_t k = 0; k < cols; k += kSegment) {
    segment_sums_of(b, s, rank, row, rows, k, ahead);
    merge_sums(s, rows);
  }
  finish_batch(b.a, s, rows);
  if (!b.a.dx && !b.a.dresidual) return;
  for (int64_t i = 0; i < rows; i++)
    for (int64_t k = (cols - 1) / kSegment * kSegment; k >= 0; k -= kSegment)  // what was read last is the hottest
      write_segment(b, s, rank, i, row, k, cols <= kReadAhead ? ahead : 0);
}

template <class T>
void backward_rows(const Backward<T>& b) {
  using A = Accumulate<T>;
  const LayerNormBackward& a = b.a;
  const Plan& plan = b.plan;
  parallel(a.threads, [&](Team team) {
    Parameters<A>::convert(a, b.converted, team);
    A *const dweight = b.dweight(team.rank), *const dbias = b.dbias(team.rank);
    BackwardBatch<A> s;
    team.for_each(plan.chunks, [&](int64_t chunk) {
      const int64_t end = std::min(plan.rows, (chunk + 1) * plan.per_chunk);
      if (b.with_parameters) std::fill(b.sums(chunk, 0), b.sums(chunk, 0) + 2 * a.cols, 0.0);
      for (int64_t block = chunk * plan.per_chunk; block < end; block += kBlockRows) {
        if (b.with_parameters) std::fill(dweight, dweight + 2 * plan.padded, A(0));
        const int64_t block_end = std::min(end, block + kBlockRows);
        for (int64_t row = block; row < block_end; row += plan.batch)
          backward_batch(b, s, team.rank, row, std::min(plan.batch, block_end - row));
        if (b.with_parameters) flush(dweight, b.sums(chunk, 0), a.cols), flush(dbias, b.sums(chunk, 1), a.cols);
      }
    });
    finish_parameters(b, team);
  });
}

// A few rows after another, each shared by the threads.
template <class T>
void backward_wide_rows(const Backward<T>& b) {
  using A = Accumulate<T>;
  const LayerNormBackward& a = b.a;
  const Plan& plan = b.plan;
  auto* const partial = reinterpret_cast<A*>(b.segment_sums);  // [segments][2][kWideRows]
  parallel(a.threads, [&](Team team) {
    Parameters<A>::convert(a, b.converted, team);
    BackwardBatch<A> s;
    for (int64_t row = 0; row < plan.rows; row += kWideRows) {
      const int64_t rows = std::min(kWideRows, plan.rows - row);
      start_batch(b, s, row, rows);
      team.for_each(plan.segments, [&](int64_t j) {
        const int64_t k = j * kSegment, len = std::min(kSegment, a.cols - k);
        A* const p = partial + j * 2 * kWideRows;
        auto both = [&](auto f) { f(b.dweight(0) + k, b.sums(0, 0) + k), f(b.dbias(0) + k, b.sums(0, 1) + k); };
        if (row == 0) both([&](A*, double* sums) { std::fill(sums, sums + len, 0.0); });
        if (row % kBlockRows == 0)
          both([&](A* grown, double*) { std::fill(grown, grown + round_up(len, kLanes<T>), A(0)); });
        segment_sums_of(b, s, 0, row, rows, k, kReadAhead);
        std::copy(s.sum, s.sum + rows, p), std::copy(s.product, s.product + rows, p + kWideRows);
        if ((row + kWideRows) % kBlockRows == 0 || row + kWideRows >= plan.rows)
          both([&](const A* grown, double* sums) { flush(grown, sums, len); });
      });
      for (int64_t j = 0; j < plan.segments; j++) {
        const A* const p = partial + j * 2 * kWideRows;
        std::copy(p, p + rows, s.sum), std::copy(p + kWideRows, p + kWideRows + rows, s.product);
        merge_sums(s, rows);
      }
      finish_batch(a, s, rows);
      team.for_each(a.dx || a.dresidual ? rows * plan.segments : 0, [&](int64_t i) {
        write_segment(b, s, 0, i / plan.segments, row, i % plan.segments * kSegment, kReadAhead);
      });
    }
    finish_parameters(b, team);
  });
}

// ---- Tiles ----------------------------------------------------------------------------------------------------------

struct Share {
  double dweight, dbias;
};

// Adds one column of a tile to the sums per pixel; returns its share of dweight and dbias.
template <class T, Slope slope>
[[gnu::noinline]] Share add_column(const Backward<T>& b, BackwardBatch<Accumulate<T>>& s,
                                   const OfColumn<Accumulate<T>> c, int64_t at, int64_t pixels, const uint8_t* mask,
                                   Accumulate<T>* kept, int64_t read_ahead) {
  using A = Accumulate<T>;
  using P = Pack<A>;
  const LayerNormBackward a = b.a;
  const P lanes = new_lanes<T>(pixels);
  P dw(A(0)), db(A(0));
  for_packs<T>(pixels, [&](int64_t i, auto count, auto again) {
    prefetch(static_cast<const T*>(a.x) + at + i + read_ahead);
    prefetch(static_cast<const T*>(a.dy) + at + i + read_ahead);
    const Gradient<T, slope, OfColumn<A>> g(a, c, at + i, i, mask, kept, count, again);
    const P dz = keep(lanes, g.dz, count, again), weighted = dz * c.weight(i, count);
    dw = fmadd(dz, g.normalized, dw), db = db + dz;
    store(s.sum + i, load(s.sum + i, Full<A>()) + weighted, Full<A>());
    store(s.product + i, fmadd(weighted, g.normalized, load(s.product + i, Full<A>())), Full<A>());
  });
  return {double(dw.sum()), double(db.sum())};
}

template <class T>
[[gnu::noinline]] void write_tile(const Backward<T>& b, const BackwardBatch<Accumulate<T>>& s, const Tiles::Tile& t,
                                  const Accumulate<T>* kept) {
  const LayerNormBackward& a = b.a;
  write_gradients(b, [&](auto write) {
    for (int64_t k = a.cols - 1; k >= 0; k--)
      write(s.column(b.parameters, k), t.at + k * a.inner, t.pixels, b.mask(t.sample * a.cols + k, a.inner, t.first),
            kept + k * b.plan.batch, 0);
  });
}

template <class T>
void backward_tile(const Backward<T>& b, BackwardBatch<Accumulate<T>>& s, int rank, const Tiles::Tile& t,
                   int64_t chunk) {
  using A = Accumulate<T>;
  const LayerNormBackward& a = b.a;
  constexpr int64_t kColumnsAhead = 4;
  auto mask = [&](int64_t k) { return b.mask(t.sample * a.cols + k, a.inner, t.first); };
  auto kept = [&](int64_t k) { return b.kept(rank) + k * b.plan.batch; };
  double *const dweight = b.sums(chunk, 0), *const dbias = b.sums(chunk, 1);
  start_batch(b, s, t.sample * a.inner + t.first, t.pixels);
  for (int64_t block = 0; block < a.cols; block += kBlockColumns) {
    std::fill(s.sum, s.sum + round_up(t.pixels, kLanes<T>), A(0));
    std::fill(s.product, s.product + round_up(t.pixels, kLanes<T>), A(0));
    for (int64_t k = block; k < std::min(a.cols, block + kBlockColumns); k++) {
      const auto c = s.column(b.parameters, k);
      const int64_t at = t.at + k * a.inner;
      if (b.slope == Slope::kKept) keep_slopes(b, c, at, t.pixels, kept(k));
      with_slope(b.slope, [&](auto slope) {
        const Share share = add_column<T, slope>(b, s, c, at, t.pixels, mask(k), kept(k), kColumnsAhead * a.inner);
        dweight[k] += share.dweight, dbias[k] += share.dbias;
      });
    }
    merge_sums(s, t.pixels);
  }
  finish_batch(a, s, t.pixels);
  if (a.dx || a.dresidual) write_tile(b, s, t, kept(0));
}

template <class T>
void backward_tiles(const Backward<T>& b) {
  using A = Accumulate<T>;
  const LayerNormBackward& a = b.a;
  const Tiles tiles(a.outer, a.cols, a.inner, 2 * sizeof(T), kLanes<T>);
  parallel(a.threads, [&](Team team) {
    Parameters<A>::convert(a, b.converted, team);
    BackwardBatch<A> s;
    team.for_each(b.plan.chunks, [&](int64_t chunk) {
      std::fill(b.sums(chunk, 0), b.sums(chunk, 0) + 2 * a.cols, 0.0);
      for (int64_t i = chunk * b.plan.per_chunk; i < std::min(tiles.count, (chunk + 1) * b.plan.per_chunk); i++)
        backward_tile(b, s, team.rank, tiles.tile(i), chunk);
    });
    finish_parameters(b, team);
  });
}

}  // namespace

size_t layer_norm_backward_workspace(const LayerNormBackward& a) {
  size_t bytes = 0;
  with_type(a.dtype, [&](auto zero) {
    using A = Accumulate<decltype(zero)>;
    const Plan plan(a, zero);
    const int64_t threads = plan.wide ? 1 : a.threads;
    bytes = plan.doubles(a) * sizeof(double) + (Parameters<A>::elements(a) + threads * plan.scratch) * sizeof(A);
  });
  return bytes;
}

void layer_norm_backward(const LayerNormBackward& a) {
  const size_t bytes = size_t(a.outer) * a.cols * a.inner * size_of(a.dtype);
  prefer_huge_pages(a.dx, bytes), prefer_huge_pages(a.dresidual, bytes);
  with_type(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    const Backward<T> b(a);
    if (a.inner > 1) return backward_tiles(b);
    b.plan.wide ? backward_wide_rows(b) : backward_rows(b);
  });
}

}  // namespace fastnorm::cpu::CPU_CAPABILITY
