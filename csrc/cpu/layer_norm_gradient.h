// What the backward kernels of layer norm share: the plan of the work, and what is done with each element.
#pragma once
#include "elementwise.h"
#include "layer_norm_coefficients.h"
#include "output.h"

namespace fastnorm::cpu::CPU_CAPABILITY {
namespace {

constexpr int64_t kBlockRows = 256;    // whose share of dweight and dbias is summed in the accumulate type
constexpr int64_t kWideRow = 32768;    // a row from here on is shared by the threads ...
constexpr int64_t kWideRows = 4;       // ... together with the next ones
constexpr int64_t kReadAhead = 8192;   // elements, at most: what is fetched must still be there when it is read
constexpr int64_t kChunkSize = 65536;  // elements, at least
constexpr int64_t kMaxChunks = 128;

// Workspace: doubles [chunks][2][cols]: dweight, dbias;  sums of the segments of wide rows [segments][kWideRows];  then
// A: parameters converted, and per thread [2][padded cols], where dweight and dbias grow, and slopes where they are
// kept from the first pass for the second.  Threads share the latter two for wide rows.
struct Plan {
  int64_t rows, segments, batch, per_chunk, chunks, padded, scratch;  // scratch: elements per thread
  bool wide;

  template <class T>
  Plan(const LayerNormBackward& a, T) : rows(a.outer * a.inner), segments((a.cols + kSegment - 1) / kSegment) {
    const Tiles tiles(a.outer, a.cols, a.inner, 2 * sizeof(T), kLanes<T>);
    wide = a.inner == 1 && a.cols >= kWideRow;
    batch = a.inner > 1 ? tiles.pixels : wide ? kWideRows : std::max<int64_t>(4, batch_rows(a.cols, 2 * sizeof(T)));
    const int64_t items = a.inner > 1 ? tiles.count : rows, size = a.cols * (a.inner > 1 ? tiles.pixels : 1);
    per_chunk = wide ? rows : std::max((kChunkSize + size - 1) / size, (items + kMaxChunks - 1) / kMaxChunks);
    chunks = (items + per_chunk - 1) / per_chunk;
    padded = round_up(a.cols, kLanes<T>);
    const bool keep = slope_of(a.activation, a.mask, a.residual) == Slope::kKept;
    scratch = round_up(2 * padded + (keep ? batch * padded : 0), 16);
  }
  int64_t doubles(const LayerNormBackward& a) const {
    return chunks * 2 * a.cols + (wide ? segments * 2 * kWideRows : 0);
  }
};

template <class T>
struct Backward {
  using A = Accumulate<T>;
  const LayerNormBackward& a;
  Plan plan;
  double *chunk_sums, *segment_sums;
  A *converted, *scratch;
  Parameters<A> parameters;
  const A* stats;
  Slope slope;
  bool with_parameters, streaming;

  explicit Backward(const LayerNormBackward& a)
      : a(a),
        plan(a, T()),
        chunk_sums(static_cast<double*>(a.workspace)),
        segment_sums(chunk_sums + plan.chunks * 2 * a.cols),
        converted(reinterpret_cast<A*>(chunk_sums + plan.doubles(a))),
        scratch(converted + Parameters<A>::elements(a)),
        parameters(a, converted),
        stats(static_cast<const A*>(a.stats)),
        slope(slope_of(a.activation, a.mask, a.residual)),
        with_parameters(a.dweight || a.dbias) {
    const int64_t run = (a.inner == 1 ? a.cols : a.inner) * sizeof(T);
    const int64_t streams_of_x = 2 + !!a.dsum + !!a.residual + !!a.dx + !!a.dresidual;
    const int64_t bytes = plan.rows * a.cols * sizeof(T), touched = streams_of_x * bytes;
    streaming = streams(a.dx, bytes, run, touched) && streams(a.dresidual, bytes, run, touched);
  }
  A mean(int64_t row) const { return a.rms ? A(0) : stats[row]; }
  A mean_low(int64_t row) const { return a.rms ? A(0) : stats[plan.rows + row]; }
  A rstd(int64_t row) const { return stats[a.rms ? row : 2 * plan.rows + row]; }
  const uint8_t* mask(int64_t span, int64_t len, int64_t first) const {
    return a.mask ? a.mask + span * ((len + 7) / 8) + first / 8 : nullptr;
  }
  double* sums(int64_t chunk, int which) const { return chunk_sums + (chunk * 2 + which) * a.cols; }
  A* dweight(int rank) const { return scratch + (plan.wide ? 0 : rank) * plan.scratch; }
  A* dbias(int rank) const { return dweight(rank) + plan.padded; }
  A* kept(int rank) const { return dbias(rank) + plan.padded; }
};

// dz and normalized of a pack at element `at`, which is the i-th of its span; mask: the span's bits, kept: its slopes.
template <class T, Slope slope, class Coefficients>
struct Gradient {
  using A = Accumulate<T>;
  using P = Pack<A>;
  P dz, normalized;

  Gradient(const LayerNormBackward& a, const Coefficients& c, int64_t at, int64_t i, const uint8_t* mask, const A* kept,
           auto count, auto again) {
    normalized = normalize(c, load(static_cast<const T*>(a.x) + at, count), i);
    P z = normalized;
    if constexpr (slope == Slope::kRelu) z = fmadd(normalized, c.weight(i, count), c.bias(i, count));
    dz = slope_times<slope>(a.activation, a.negative_slope, load(static_cast<const T*>(a.dy) + at, count), z, mask,
                            kept, i, count, again);
  }
};

// The slopes of len elements from `at` on.
template <class T, class Coefficients>
[[gnu::noinline]] void keep_slopes(const Backward<T>& b, const Coefficients c, int64_t at, int64_t len,
                                   Accumulate<T>* kept) {
  const LayerNormBackward& a = b.a;
  const T *const x = static_cast<const T*>(a.x) + at, *const residual = static_cast<const T*>(a.residual) + at;
  const bool with_residual = a.residual != nullptr;
  for_packs<T>(len, [&](int64_t i, auto count, auto again) {
    auto z = fmadd(normalize(c, load(x + i, count), i), c.weight(i, count), c.bias(i, count));
    if (with_residual) z = z + load(residual + i, count);
    store(kept + place<T>(i, again), z, Full<Accumulate<T>>());
  });
  to_slopes(a.activation, a.negative_slope, kept, len);
}

// dx, and where kMore dresidual and what dsum adds, of len elements from `at` on; dy is fetched dy_ahead ahead.
template <class T, Slope slope, bool kMore, class Coefficients>
[[gnu::always_inline]] inline void write_span(const Backward<T>& b, const Coefficients c, int64_t at, int64_t len,
                                              const uint8_t* mask, const Accumulate<T>* kept, int64_t dy_ahead) {
  const LayerNormBackward a = b.a;
  constexpr int64_t kWriteAhead = 512;
  const T *const dy = static_cast<const T*>(a.dy) + at, *const dsum = static_cast<const T*>(a.dsum) + at;
  T *const dx = static_cast<T*>(a.dx) + at, *const dresidual = static_cast<T*>(a.dresidual) + at;
  const bool streaming = b.streaming;
  for_packs<T>(len, [&](int64_t i, auto count, auto again) {
    auto write = [&](T* p, auto v) {
      if (!streaming) prefetch<T, true>(p + kWriteAhead);
      store_output(p, v, count, again, streaming);
    };
    fetch(dy + i + dy_ahead);
    const Gradient<T, slope, Coefficients> g(a, c, at + i, i, mask, kept, count, again);
    if (kMore && a.dresidual) write(dresidual + i, g.dz);
    if (kMore && !a.dx) return;
    auto v = (g.dz * c.weight(i, count) - fmadd(g.normalized, c.slope(i), c.offset(i))) * c.rstd(i);
    if (kMore && a.dsum) v = v + load(dsum + i, count);
    write(dx + i, v);
  });
}

// The same for spans: each(write) calls write(coefficients, at, len, mask, kept, dy_ahead) for one after the other.
template <class T, class F>
[[gnu::always_inline]] inline void write_gradients(const Backward<T>& b, F each) {
  const bool more = !b.a.dx || b.a.dresidual || b.a.dsum;
  with_slope(b.slope, [&](auto slope) {
    auto with = [&](auto more) {
      each([&](const auto& c, auto... span) { write_span<T, slope, more>(b, c, span...); });
    };
    more ? with(std::true_type()) : with(std::false_type());
  });
}

// Adds what dweight and dbias have grown to in the accumulate type.
template <class A>
void flush(const A* grown, double* sums, int64_t len) {
  for (int64_t i = 0; i < len; i++) sums[i] += double(grown[i]);
}

// The chunks in order, into dweight and dbias.
template <class T>
void finish_parameters(const Backward<T>& b, Team team) {
  if (!b.with_parameters) return;
  constexpr int64_t kBlock = 2048;
  const int64_t cols = b.a.cols;
  team.for_each((cols + kBlock - 1) / kBlock, [&](int64_t block) {
    const int64_t first = block * kBlock, last = std::min(cols, first + kBlock);
    for (int which = 0; which < 2; which++) {
      void* const out = which ? b.a.dbias : b.a.dweight;
      double* const total = b.sums(0, which);
      for (int64_t chunk = 1; out && chunk < b.plan.chunks; chunk++) {
        const double* const part = b.sums(chunk, which);
        for (int64_t i = first; i < last; i++) total[i] += part[i];
      }
      with_type(b.a.param_dtype, [&](auto zero) {
        using S = decltype(zero);
        for (int64_t i = first; out && i < last; i++) static_cast<S*>(out)[i] = Accumulate<S>(total[i]);
      });
    }
  });
}

}  // namespace
}  // namespace fastnorm::cpu::CPU_CAPABILITY
