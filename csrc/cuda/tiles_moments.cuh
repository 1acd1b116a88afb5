// Shifted sums of a thread's slots, and how many elements they are of.
#pragma once
#include "norm.cuh"
#include "tiles_sums.cuh"

namespace fastnorm {
namespace {

// The sums of a thread's distances from shift and of their squares.
template <class T, bool kSeveral>
__device__ __forceinline__ void square_streamed(const T* __restrict__ x, Walk<T> walk, int begin, int end, int step,
                                                const Accumulate<T> (&shift)[kSums<T, kSeveral>],
                                                double (&to)[kSums<T, kSeveral>],
                                                double (&squares)[kSums<T, kSeveral>]) {
  constexpr int V = kLanes<T>, U = 4;
  const Walk<T> start = walk;
  Accumulate<T> sum[V] = {}, square[V] = {};
  with_constant(!walk.t.partial, [&](auto whole) {
    for (int k = begin; k < end; k += U * step) {
      Vector<T> v[U];
      unsigned valid[U];
#pragma unroll
      for (int u = 0; u < U; u++, walk.advance()) {
        if (k + u * step >= end) continue;
        const Slot s = walk.template get<whole>();
        v[u] = load(x + s.offset, s.valid);
        valid[u] = s.valid;
      }
#pragma unroll
      for (int u = 0; u < U; u++) {
        if (k + u * step >= end) break;
        Accumulate<T> value[V];
        widen(value, v[u]);
        if (!whole && valid[u] != kAllLanes<T>) fill_invalid<T, kSeveral>(value, valid[u], shift);
#pragma unroll
        for (int i = 0; i < V; i++) {
          const Accumulate<T> distance = value[i] - shift[kSeveral ? i : 0];
          sum[i] += distance;
          square[i] = fused(distance, distance, square[i]);
        }
      }
    }
  });
  collect<T, kSeveral>(to, sum);
  if (collect<T, kSeveral>(squares, square) || !kOverflows<T>) return;
  const unsigned sums_again = clear_infinite(to, squares);
  Walk<T> again = start;
#pragma unroll 1
  for (int k = begin; k < end; k += step, again.advance()) {
    const Slot s = *again;
    Accumulate<T> value[V];
    widen(value, load(x + s.offset, s.valid));
    fill_invalid<T, kSeveral>(value, s.valid, shift);
#pragma unroll
    for (int i = 0; i < V; i++)
      if (sums_again >> (kSeveral ? i : 0) & 1)
        add_distance(double(value[i]) - double(shift[kSeveral ? i : 0]), to[kSeveral ? i : 0],
                     squares[kSeveral ? i : 0]);
  }
}

// How many of a thread's elements belong to each of its sums.
template <class T, bool kSeveral>
__device__ __forceinline__ void count_elements(const Tiles& t, Walk<T> walk, int begin, int end,
                                               int (&count)[kSums<T, kSeveral>]) {
  const int slots = begin < end ? (end - begin + t.step - 1) / t.step : 0;
#pragma unroll
  for (int i = 0; i < kSums<T, kSeveral>; i++) count[i] = kSeveral ? slots : slots * kLanes<T>;
  if (!t.partial) return;
  for (int k = begin; k < end; k += t.step, walk.advance()) {
    const unsigned missing = ~(*walk).valid & kAllLanes<T>;
    if constexpr (kSeveral) {
#pragma unroll
      for (int i = 0; i < kLanes<T>; i++) count[i] -= missing >> i & 1;
    } else {
      count[0] -= __popc(missing);
    }
  }
}

}  // namespace
}  // namespace fastnorm
