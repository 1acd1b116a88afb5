// Tiles in shared memory: copies of them, their moments, y.
#pragma once
#include "norm.cuh"
#include "tiles_mask.cuh"
#include "tiles_sums.cuh"

namespace fastnorm {
namespace {

// Copies a block's slots of a tensor; a thread those that it will read.  valid gets their lanes, where some lack any.
template <class T>
__device__ __forceinline__ void copy_tiles(const Tiles& t, const Place& at, const T* from, Vector<T>* to,
                                           uint8_t* valid) {
  const int thread = int(threadIdx.x), end = thread < t.step ? at.segments * t.slots : 0;
  Walk<T> walk(t, at, thread);
  with_constant(!t.partial, [&](auto whole) {
#pragma unroll(whole ? 4 : 1)
    for (int k = thread; k < end; k += t.step, walk.advance()) {
      const Slot s = walk.template get<whole>();
      if (s.valid == kAllLanes<T>)
        __pipeline_memcpy_async(&to[k], from + s.offset, 16);
      else
        to[k] = load(from + s.offset, s.valid);
      if (!whole) valid[k] = uint8_t(s.valid);
    }
  });
  __pipeline_commit();
}

// A thread's sums come in two forms: in the accumulate type; and, for a thread where those overflowed (finite values
// near 1e19 and up), once more in double.  Lanes that are not valid hold zeros.

// to[...] = the sums of a thread's elements in shared memory.
template <class T, bool kSeveral>
__device__ __forceinline__ void sum_resident(const Vector<T>* data, int begin, int end, int step,
                                             double (&to)[kSums<T, kSeveral>]) {
  constexpr int V = kLanes<T>;
  Accumulate<T> sum[V] = {}, x[V];
#pragma unroll 4
  for (int k = begin; k < end; k += step) {
    widen(x, data[k]);
#pragma unroll
    for (int i = 0; i < V; i++) sum[i] += x[i];
  }
  if (collect<T, kSeveral>(to, sum) || !kOverflows<T>) return;
  const unsigned again = clear_infinite(to, to);
#pragma unroll 1
  for (int k = begin; k < end; k += step) {
    widen(x, data[k]);
#pragma unroll
    for (int i = 0; i < V; i++)
      if (again >> (kSeveral ? i : 0) & 1) to[kSeveral ? i : 0] += double(x[i]);
  }
}

// The same of the distances from the mean, and of their squares; valid has the lanes of each slot, or is null.
template <class T, bool kSeveral>
__device__ __forceinline__ void square_resident(const Vector<T>* data, const uint8_t* valid, int begin, int end,
                                                int step, const Accumulate<T> (&mean)[kSums<T, kSeveral>],
                                                double (&to)[kSums<T, kSeveral>],
                                                double (&squares)[kSums<T, kSeveral>]) {
  constexpr int V = kLanes<T>;
  Accumulate<T> sum[V] = {}, square[V] = {}, x[V];
  auto read = [&](int k, bool whole) {
    widen(x, data[k]);
    if (!whole) fill_invalid<T, kSeveral>(x, valid[k], mean);
  };
  with_constant(!valid, [&](auto whole) {
#pragma unroll 4
    for (int k = begin; k < end; k += step) {
      read(k, whole);
#pragma unroll
      for (int i = 0; i < V; i++) {
        const Accumulate<T> distance = x[i] - mean[kSeveral ? i : 0];
        sum[i] += distance;
        square[i] = fused(distance, distance, square[i]);
      }
    }
  });
  collect<T, kSeveral>(to, sum);
  if (collect<T, kSeveral>(squares, square) || !kOverflows<T>) return;
  const unsigned again = clear_infinite(to, squares);
#pragma unroll 1
  for (int k = begin; k < end; k += step) {
    read(k, !valid);
#pragma unroll
    for (int i = 0; i < V; i++)
      if (again >> (kSeveral ? i : 0) & 1)
        add_distance(double(x[i]) - double(mean[kSeveral ? i : 0]), to[kSeveral ? i : 0], squares[kSeveral ? i : 0]);
  }
}

// y and the mask; map has the channel of each of a thread's sums.  The residual is in shared memory if t.tensors is 2.
template <class T, bool kSeveral, bool kGeneral, class Args, class A>
__device__ __forceinline__ void apply_resident(const Args& a, const Tiles& t, const Place& at,
                                               const Affine<A> (&map)[kSums<T, kSeveral>], const Vector<T>* data,
                                               const Vector<T>* residuals, uint8_t* bits) {
  constexpr int V = kLanes<T>, U = 2;
  const int thread = int(threadIdx.x), end = thread < t.step ? at.segments * t.slots : 0;
  const T* residual = static_cast<const T*>(a.residual);
  T* y = static_cast<T*>(a.y);
  Walk<T> walk(t, at, thread);
  const A negative_slope = A(a.negative_slope);
  with_constant(!t.partial, [&](auto whole) {
    for (int k = thread; k < end; k += U * t.step) {
      Slot s[U];
      Vector<T> r[U];
#pragma unroll
      for (int u = 0; u < U; u++, walk.advance()) {
        s[u] = walk.template get<whole>();
        if (!residual || k + u * t.step >= end) continue;
        r[u] = t.tensors == 2 ? residuals[k + u * t.step] : load(residual + s[u].offset, s[u].valid);
      }
#pragma unroll
      for (int u = 0; u < U; u++) {
        const int slot = k + u * t.step;
        if (slot >= end) break;
        A z[V];
        widen(z, data[slot]);
#pragma unroll
        for (int i = 0; i < V; i++) z[i] = map[kSeveral ? i : 0](z[i]);
        if (residual) {
#pragma unroll
          for (int i = 0; i < V; i++) z[i] += widen(r[u].lane[i]);
        }
        const unsigned on = activate_lanes<T, kGeneral>(a.activation, z, negative_slope, a.mask);
        store(y + s[u].offset, narrow<T>(z), s[u].valid);
        if (a.mask) bits[slot] = uint8_t(on);
      }
    }
  });
  if (a.mask) {
    __syncthreads();
    write_mask<T>(t, at, 0, at.segments, bits, a.mask);
  }
}

}  // namespace
}  // namespace fastnorm
