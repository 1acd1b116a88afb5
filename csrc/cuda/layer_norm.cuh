// What layer norm's kernels share.  RMS norm is layer norm with a mean of 0.
#pragma once
#include "layer_norm.h"
#include "rows_moments.cuh"

namespace fastnorm {
namespace {

template <class A, class Args>
__device__ __forceinline__ RowStats<A> read_layer_stats(const Args& a, int64_t rows, int64_t row) {
  const A* const stats = static_cast<const A*>(a.stats);
  if (a.rms) return {0, 0, stats[row], 0};
  return {stats[row], stats[rows + row], stats[2 * rows + row], 0};
}

template <class A>
__device__ __forceinline__ void write_layer_stats(const LayerNormForward& a, int64_t rows, int64_t row,
                                                  const RowStats<A>& s) {
  A* const stats = static_cast<A*>(a.stats);
  if (a.rms) {
    stats[row] = s.rstd;
    return;
  }
  stats[row] = s.mean;
  stats[rows + row] = s.low;
  stats[2 * rows + row] = s.rstd;
}

// normalized = (h - mean) * rstd - mean_low * rstd; for RMS norm the same bits as h * rstd.
template <class A>
struct Normalize {
  A mean, rstd, offset;
  __device__ __forceinline__ explicit Normalize(const RowStats<A>& s)
      : mean(s.mean), rstd(s.rstd), offset(-product(s.low, s.rstd)) {}
  __device__ __forceinline__ A operator()(A h) const { return fused(h - mean, rstd, offset); }
};

struct LayerNormRows {
  using Forward = LayerNormForward;
  static constexpr bool kPlanes = false, kAddend = true, kWithVar = false;

  template <class T>
  struct Row {
    using A = Accumulate<T>;
    struct Lanes {
      A weight[kLanes<T>], bias[kLanes<T>];
    };
    Normalize<A> normalize;

    template <class Args>
    __device__ __forceinline__ Row(const Args&, int64_t, const RowStats<A>& s) : normalize(s) {}
    template <class Args>
    __device__ __forceinline__ static Lanes lanes(const Args& a, const RowSlot& s, const Rows& t,
                                                  bool with_bias = true) {
      Lanes l;
      const unsigned valid = s.valid & kAllLanes<T>;
      read_lanes<T>(l.weight, a.weight, a.param_dtype, s.element, valid, t.wide_parameters, A(1));
      read_lanes<T>(l.bias, with_bias ? a.bias : nullptr, a.param_dtype, s.element, valid, t.wide_parameters, A(0));
      return l;
    }
    __device__ __forceinline__ void apply(const Lanes& l, A (&z)[kLanes<T>]) const {
#pragma unroll
      for (int i = 0; i < kLanes<T>; i++) z[i] = fused(normalize(z[i]), l.weight[i], l.bias[i]);
    }
  };

  __host__ __device__ static const void* input(const Forward& a) { return a.addend ? a.sum : a.x; }
  __host__ __device__ static bool centred(const Forward& a) { return !a.rms; }
  template <class A>
  __device__ static RowStats<A> read_stats(const Forward& a, int64_t rows, int64_t row) {
    return read_layer_stats<A>(a, rows, row);
  }
  template <class A>
  __device__ static void write_stats(const Forward& a, int64_t rows, int64_t row, const RowStats<A>& s) {
    write_layer_stats(a, rows, row, s);
  }
};

}  // namespace
}  // namespace fastnorm
