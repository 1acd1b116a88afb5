// Sums per channel: over a block's threads, and over the partial sums that blocks leave in global memory.  In double,
// so that in float32 no digits are lost after a thread's own sums, and always in the same order.
#pragma once
#include "reduce.cuh"
#include "tiles.cuh"

namespace fastnorm {
namespace {

// How many sums a thread keeps: a lane of its slots always meets the same channel.
template <class T, bool kSeveral>
constexpr int kSums = kSeveral ? kLanes<T> : 1;

// Doubles of shared memory that sum_channels() needs.
template <class T>
__host__ __device__ inline int sum_scratch(const Tiles& t) {
  return t.several ? kLanes<T> * t.threads : 32;
}

// The channel, in the group, of an element of a segment.
__device__ __forceinline__ int channel_of(const Tiles& t, int element) { return element / t.plane % t.group_channels; }

// The channel that each of a thread's sums is of.
template <class T, bool kSeveral>
__device__ __forceinline__ int channel_of_sum(const Tiles& t, int i) {
  return kSeveral ? channel_of(t, int(threadIdx.x) % t.slots * kLanes<T> + i) : 0;
}

// Adds up lanes where they are of one channel; false if the sums are not finite.
template <class T, bool kSeveral>
__device__ __forceinline__ bool collect(double (&to)[kSums<T, kSeveral>], const Accumulate<T> (&from)[kLanes<T>]) {
  Accumulate<T> sum = from[0];
#pragma unroll
  for (int i = 1; i < kLanes<T>; i++) sum += from[i];
  if constexpr (kSeveral) {
#pragma unroll
    for (int i = 0; i < kLanes<T>; i++) to[i] = double(from[i]);
  } else {
    to[0] = double(sum);
  }
  return finite(sum);
}

template <class T, bool kSeveral>
__device__ __forceinline__ void fill_invalid(Accumulate<T> (&x)[kLanes<T>], unsigned valid,
                                             const Accumulate<T> (&with)[kSums<T, kSeveral>]) {
#pragma unroll
  for (int i = 0; i < kLanes<T>; i++)
    if (!(valid >> i & 1)) x[i] = with[kSeveral ? i : 0];
}

// sums[channel of the group] = the sum of value over the block's threads; the caller's next barrier makes it visible.
// Scratch is free before and after.
template <class T, bool kSeveral>
__device__ void sum_channels(const Tiles& t, const double (&value)[kSums<T, kSeveral>], double* scratch, double* sums) {
  const int thread = int(threadIdx.x);
  __syncthreads();
  if constexpr (!kSeveral) {
    const double sum = block_sum(value[0], scratch);
    if (thread == 0) sums[0] = sum;
  } else {
    // Over the threads that met the same elements of segments, then over a channel's elements.
#pragma unroll
    for (int i = 0; i < kLanes<T>; i++) scratch[i * t.threads + thread] = value[i];
    __syncthreads();
    const bool direct = t.plane * t.folds == 1;
    for (int j = thread; j < kLanes<T> * t.slots; j += t.threads) {
      const int lane = j / t.slots, slot = j - lane * t.slots;
      double sum = 0;
      for (int k = slot; k < t.step; k += t.slots) sum += scratch[lane * t.threads + k];
      if (!direct)
        scratch[lane * t.threads + slot] = sum;
      else if (slot * kLanes<T> + lane < t.group_channels)
        sums[slot * kLanes<T> + lane] = sum;
    }
    if (direct) return;
    __syncthreads();
    for (int channel = thread / 32; channel < t.group_channels; channel += t.threads / 32) {
      double sum = 0;
      for (int k = thread % 32; k < t.plane * t.folds; k += 32) {
        const int fold = k / t.plane, element = (fold * t.group_channels + channel) * t.plane + (k - fold * t.plane);
        sum += scratch[element % kLanes<T> * t.threads + element / kLanes<T>];
      }
      sum = warp_sum(sum);
      if (thread % 32 == 0) sums[channel] = sum;
    }
  }
}

// The channel that number i of a group's channels stands for; where the last group has fewer, any.
__device__ __forceinline__ int64_t channel_number(const Tiles& t, int64_t group, int i) {
  const int64_t channel = group * t.group_channels + i;
  return channel < t.c ? channel : channel % t.c;
}

// Partial sums in global memory: two of each of t.channels per part.
__device__ __forceinline__ void write_partials(const Tiles& t, double* partials, int64_t part, int64_t group,
                                               const double* first, const double* second) {
  for (int i = int(threadIdx.x); i < t.group_channels; i += int(blockDim.x)) {
    const int64_t channel = group * t.group_channels + i;
    if (channel >= t.channels) break;
    partials[(2 * part) * t.channels + channel] = first[i];
    partials[(2 * part + 1) * t.channels + channel] = second[i];
  }
}

// Doubles of shared memory that sum_partials() needs.
__host__ __device__ inline int partial_scratch(const Tiles& t) {
  return 2 * (t.threads > t.group_channels ? t.threads : t.group_channels);
}

// first[channel of the group], second[...] = the totals of `parts` partials.  Ends with a barrier.
__device__ inline void sum_partials(const Tiles& t, const double* __restrict__ partials, int parts, int64_t group,
                                    double* scratch, double* first, double* second) {
  const int g = t.group_channels, all = parts * t.copies;
  const int teams = max(1, min(min(int(blockDim.x) / g, 32), all));
  for (int i = int(threadIdx.x); i < teams * g; i += int(blockDim.x)) {
    const int team = i / g;
    const double* p = partials + channel_number(t, group, i - team * g);
    double a = 0, b = 0;
#pragma unroll 4
    for (int k = team; k < all; k += teams) {
      const int part = t.copies == 1 ? k : k / t.copies;
      const double* q = p + 2 * int64_t(part) * t.channels + (k - part * t.copies) * t.c;
      a += q[0], b += q[t.channels];
    }
    scratch[i] = a, scratch[teams * g + i] = b;
  }
  __syncthreads();
  for (int i = int(threadIdx.x); i < g; i += int(blockDim.x)) {
    double a = 0, b = 0;
    for (int team = 0; team < teams; team++) a += scratch[team * g + i], b += scratch[(teams + team) * g + i];
    first[i] = a, second[i] = b;
  }
  __syncthreads();
}

}  // namespace
}  // namespace fastnorm
