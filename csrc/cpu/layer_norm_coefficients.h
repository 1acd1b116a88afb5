// What the forward and the backward kernels of layer norm share: the numbers of a row or of a tile, and the tiles.
#pragma once
#include <algorithm>
#include <cmath>

#include "../layer_norm.h"
#include "moments.h"
#include "parallel.h"
#include "vector.h"

namespace fastnorm::cpu::CPU_CAPABILITY {

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Into the L1 cache: what comes next there is little.
template <class T>
inline void fetch(const T* p) {
  for (int64_t byte = 0; byte < int64_t(sizeof(T)) * kLanes<T>; byte += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(p) + byte, 0, 3);
}

// ---- Parameters -----------------------------------------------------------------------------------------------------

template <class A>
struct Constant {
  alignas(64) A v[kLanes<A>];

  constexpr explicit Constant(A value) : v() {
    for (A& lane : v) lane = value;
  }
};
template <class A>
constexpr Constant<A> kOnes{A(1)};
template <class A>
constexpr Constant<A> kZeros{A(0)};

// weight or bias, an element per column; where there is none, one pack that serves them all.
template <class A>
struct Parameter {
  const A* v;
  int64_t each;  // all bits where there is an element per column, else none

  A at(int64_t column) const { return v[column & each]; }
  Parameter from(int64_t column) const { return {v + (column & each), each}; }
  template <class Count>
  Pack<A> get(int64_t i, Count count) const {
    return load(v + (i & each), count);
  }
};

template <class A>
struct Parameters {
  Parameter<A> weight{kOnes<A>.v, 0}, bias{kZeros<A>.v, 0};

  // Workspace: parameters of another type are converted into it, [2][cols].
  template <class Args>
  static int64_t elements(const Args& a) {
    return (a.weight || a.bias) && size_of(a.param_dtype) != sizeof(A) ? 2 * a.cols : 0;
  }
  template <class Args>
  Parameters(const Args& a, A* workspace) {
    const bool convert = elements(a) != 0;
    if (a.weight) weight = {convert ? workspace : static_cast<const A*>(a.weight), -1};
    if (a.bias) bias = {convert ? workspace + a.cols : static_cast<const A*>(a.bias), -1};
  }
  template <class Args>
  static void convert(const Args& a, A* workspace, Team team) {
    if (!elements(a)) return;
    constexpr int64_t kBlock = 16384;
    team.for_each((a.cols + kBlock - 1) / kBlock, [&](int64_t block) {
      const int64_t first = block * kBlock, len = std::min(kBlock, a.cols - first);
      with_type(a.param_dtype, [&](auto zero) {
        using S = decltype(zero);
        auto each = [&](const void* from, A* to) {
          for (int64_t i = first; from && i < first + len; i++) to[i] = A(static_cast<const S*>(from)[i]);
        };
        each(a.weight, workspace), each(a.bias, workspace + a.cols);
      });
    });
  }
};

// ---- Coefficients ---------------------------------------------------------------------------------------------------

// normalized = (h - mean) * rstd + shift,  shift = -mean_low * rstd;  z = normalized * weight + bias
// dx = (dz * weight - offset - normalized * slope) * rstd
// Both kinds below are passed by value, and to functions that are inlined: a vector store may alias whatever has an
// address, and these belong in registers.

// Of a row: one set of statistics, parameters per column ...
template <class A>
struct OfRow {
  A mean_, rstd_, shift_, offset_, slope_;
  Parameter<A> weight_, bias_;

  Pack<A> mean(int64_t) const { return Pack<A>(mean_); }
  Pack<A> rstd(int64_t) const { return Pack<A>(rstd_); }
  Pack<A> shift(int64_t) const { return Pack<A>(shift_); }
  Pack<A> offset(int64_t) const { return Pack<A>(offset_); }
  Pack<A> slope(int64_t) const { return Pack<A>(slope_); }
  Pack<A> weight(int64_t i, auto count) const { return weight_.get(i, count); }
  Pack<A> bias(int64_t i, auto count) const { return bias_.get(i, count); }
};

// ... or of one column of a tile: parameters of that column, statistics per row.
template <class A>
struct OfColumn {
  const A *mean_, *rstd_, *shift_, *offset_, *slope_;
  A weight_, bias_;

  Pack<A> mean(int64_t i) const { return load(mean_ + i, Full<A>()); }
  Pack<A> rstd(int64_t i) const { return load(rstd_ + i, Full<A>()); }
  Pack<A> shift(int64_t i) const { return load(shift_ + i, Full<A>()); }
  Pack<A> offset(int64_t i) const { return load(offset_ + i, Full<A>()); }
  Pack<A> slope(int64_t i) const { return load(slope_ + i, Full<A>()); }
  Pack<A> weight(int64_t, auto) const { return Pack<A>(weight_); }
  Pack<A> bias(int64_t, auto) const { return Pack<A>(bias_); }
};

constexpr int64_t kMaxBatch = 1024;

// The statistics of rows that are worked on together, so that what is done once for a row is done in vectors too.
template <class A>
struct Batch {
  static constexpr int64_t kPadded = kMaxBatch + kLanes<A>;
  alignas(64) A mean[kPadded], rstd[kPadded], shift[kPadded], offset[kPadded], slope[kPadded];

  // Row i from a column on ...
  OfRow<A> row(int64_t i, const Parameters<A>& p, int64_t column) const {
    return {mean[i], rstd[i], shift[i], offset[i], slope[i], p.weight.from(column), p.bias.from(column)};
  }
  // ... or a column.
  OfColumn<A> column(const Parameters<A>& p, int64_t k) const {
    return {mean, rstd, shift, offset, slope, p.weight.at(k), p.bias.at(k)};
  }
};

template <class C, class P>
inline P normalize(const C& c, P h, int64_t i) {
  return fmadd(h - c.mean(i), c.rstd(i), c.shift(i));
}

// Rows whose statistics are finished together; they stay in the L1 or L2 cache meanwhile.  bytes: of all that is read
// for an element.
inline int64_t batch_rows(int64_t cols, int64_t bytes) {
  constexpr int64_t kCache = 16 << 10;
  return std::clamp<int64_t>(kCache / (cols * bytes), 1, 64);
}

// ---- Tiles ----------------------------------------------------------------------------------------------------------

// Where the normalised elements lie inner apart, a tile is a run of pixels of one sample in all columns; it stays in
// the L2 cache between the passes over it.
struct Tiles {
  int64_t cols, inner, pixels, per_sample, count;

  // bytes: of all that is read for an element
  Tiles(int64_t outer, int64_t cols, int64_t inner, int64_t bytes, int64_t lanes) : cols(cols), inner(inner) {
    constexpr int64_t kCache = 384 << 10;
    const int64_t most = std::clamp(kCache / (cols * bytes), lanes, kMaxBatch), parts = (inner + most - 1) / most;
    pixels = ((inner + parts - 1) / parts + lanes - 1) / lanes * lanes;
    per_sample = (inner + pixels - 1) / pixels, count = outer * per_sample;
  }
  struct Tile {
    int64_t sample, first, pixels, at;  // at: its first element
  };
  Tile tile(int64_t i) const {
    const int64_t sample = i / per_sample, first = i % per_sample * pixels;
    return {sample, first, std::min(pixels, inner - first), sample * cols * inner + first};
  }
  // How far from a tile's first element lies the next tile's.
  int64_t ahead(const Tile& t) const { return t.first + t.pixels < inner ? t.pixels : cols * inner - t.first; }
};

constexpr int64_t kBlockColumns = 256;  // whose sums are in the accumulate type

}  // namespace fastnorm::cpu::CPU_CAPABILITY
