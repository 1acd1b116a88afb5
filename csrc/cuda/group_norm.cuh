// What group norm's kernels share.
#pragma once
#include "group_norm.h"
#include "rows_moments.cuh"

namespace fastnorm {
namespace {

template <class A, class Args>
__device__ __forceinline__ RowStats<A> read_group_stats(const Args& a, int64_t row) {
  const A* const stats = static_cast<const A*>(a.stats);
  const int64_t rows = a.n * a.groups;
  return {stats[row], stats[rows + row], stats[2 * rows + row], 0};
}

template <class A>
__device__ __forceinline__ void write_group_stats(const GroupNormForward& a, int64_t row, const RowStats<A>& s) {
  A* const stats = static_cast<A*>(a.stats);
  const int64_t rows = a.n * a.groups;
  stats[row] = s.mean;
  stats[rows + row] = s.low;
  stats[2 * rows + row] = s.rstd;
  stats[3 * rows + row] = s.var;
}

// The affine map of a channel.
template <class A, class Args>
__device__ __forceinline__ Affine<A> channel_affine(const Args& a, const RowStats<A>& s, int64_t channel) {
  return make_affine(s.mean, s.low, s.rstd, a.weight, a.bias, a.param_dtype, channel);
}

// [n][c][hw]: the groups are rows, with a plane for each channel.
struct GroupNormRows {
  using Forward = GroupNormForward;
  static constexpr bool kPlanes = true, kAddend = false, kWithVar = true;

  template <class T>
  struct Row {
    using A = Accumulate<T>;
    using Lanes = Affine<A>;
    RowStats<A> stats;
    int64_t channel;  // the first one

    template <class Args>
    __device__ __forceinline__ Row(const Args& a, int64_t row, const RowStats<A>& s)
        : stats(s), channel(row % a.groups * (a.c / a.groups)) {}
    template <class Args>
    __device__ __forceinline__ Lanes lanes(const Args& a, const RowSlot& s, const Rows&) const {
      return channel_affine(a, stats, channel + s.plane);
    }
    __device__ __forceinline__ void apply(const Lanes& affine, A (&z)[kLanes<T>]) const {
#pragma unroll
      for (int i = 0; i < kLanes<T>; i++) z[i] = affine(z[i]);
    }
  };

  __host__ __device__ static const void* input(const Forward& a) { return a.x; }
  __host__ __device__ static bool centred(const Forward&) { return true; }
  template <class A>
  __device__ static RowStats<A> read_stats(const Forward& a, int64_t, int64_t row) {
    return read_group_stats<A>(a, row);
  }
  template <class A>
  __device__ static void write_stats(const Forward& a, int64_t, int64_t row, const RowStats<A>& s) {
    write_group_stats(a, row, s);
  }
};

// The groups of x as rows; tensors are those laid out like it.
template <class T, class Args>
Rows make_group_rows(const Args& a, std::initializer_list<const void*> tensors) {
  return make_rows<T>(a.n * a.groups, a.c / a.groups, a.hw, tensors, {});
}

}  // namespace
}  // namespace fastnorm
