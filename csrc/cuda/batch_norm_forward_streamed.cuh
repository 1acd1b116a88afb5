// Batch norm, forward, in two kernels: for groups of channels that do not fit on chip; the second alone for eval mode.
//
// Plan and bytes moved (S = bytes of x, m = S / 32 or S / 16 for the mask): 3S, + residual 4S + m.  The first kernel
// takes the sums of the distances from one of a thread's own elements and of their squares, so that one outlier spoils
// little; moves them, exactly, to the channel's first element; and adds them up in double: over a block, over a cluster
// of 8 where there are clusters, and, in the prologue of each block of the second kernel, over what is left.  That one
// takes blocks in reverse order: what the first kernel read last is in L2 still.
#pragma once
#include "batch_norm_moments.cuh"
#include "tiles_apply.cuh"
#include "tiles_moments.cuh"

namespace fastnorm {
namespace {

// Where the sums of a channel are taken about: its first element.
template <class T>
__device__ __forceinline__ double base_of(const BatchNormForward& a, int64_t channel) {
  return double(widen(static_cast<const T*>(a.x)[a.channels_last ? channel : channel * a.hw]));
}

template <class T, bool kSeveral>
__global__ void __launch_bounds__(kStreamedThreads, kBlocksAtOnce<2>)
    batch_norm_statistics_kernel(BatchNormForward a, Tiles t, int cluster) {
  using A = Accumulate<T>;
  constexpr int P = kSums<T, kSeveral>;
  FASTNORM_DYNAMIC_SHARED(unsigned char, memory);
  Shared shared{memory};
  const int g = t.group_channels;
  double* scratch = shared.take<double>(sum_scratch<T>(t));
  double* mine = shared.take<double>(2 * g);
  double* total = shared.take<double>(2 * g);
  const Place at = place(t);
  const int thread = int(threadIdx.x), end = thread < t.step ? at.segments * t.slots : 0;
  const T* x = static_cast<const T*>(a.x);
  const Walk<T> walk(t, at, thread);

  // About a thread's first elements, so that one outlier spoils little; then, exactly, about the channel's.
  A shift[P];
#pragma unroll
  for (int i = 0; i < P; i++) shift[i] = 0;
  if (thread < end) {
    const Slot s = *walk;
    const unsigned valid = s.valid & kAllLanes<T>;
    if constexpr (kSeveral) {
#pragma unroll
      for (int i = 0; i < P; i++)
        if (valid >> i & 1) shift[i] = widen(x[s.offset + i]);
    } else {
      if (valid) shift[0] = widen(x[s.offset + __ffs(int(valid)) - 1]);
    }
  }
  double value[P], squares[P];
  square_streamed<T, kSeveral>(x, walk, thread, end, t.step, shift, value, squares);
  int count[P];
  count_elements<T, kSeveral>(t, walk, thread, end, count);
#pragma unroll
  for (int i = 0; i < P; i++) {
    if (count[i] == 0) continue;
    const double d = double(shift[i]) - base_of<T>(a, channel_number(t, at.group, channel_of_sum<T, kSeveral>(t, i)));
    squares[i] += d * (2 * value[i] + count[i] * d);
    value[i] += count[i] * d;
  }
  sum_channels<T, kSeveral>(t, value, scratch, mine);
  sum_channels<T, kSeveral>(t, squares, scratch, mine + g);
  const double* sums = cluster_sum(mine, total, 2 * g, cluster);
  if (at.part % cluster == 0)
    write_partials(t, static_cast<double*>(a.workspace), at.part / cluster, at.group, sums, sums + g);
  if (blockIdx.x == 0 && thread == 0 && a.num_batches_tracked) ++*a.num_batches_tracked;
  if (cluster > 1) {
    cluster_arrive_relaxed();
    cluster_wait();
  }
}

template <class T>
size_t statistics_bytes(const Tiles& t) {
  return shared_bytes<double>(sum_scratch<T>(t)) + 2 * shared_bytes<double>(2 * t.group_channels);
}

// y from the partial sums of `parts`, or, in eval mode, from the running statistics.
template <class T, bool kSeveral, bool kGeneral>
__global__ void __launch_bounds__(kStreamedThreads, kBlocksAtOnce<2>)
    batch_norm_apply_kernel(BatchNormForward a, Tiles t, int parts) {
  using A = Accumulate<T>;
  constexpr int P = kSums<T, kSeveral>;
  FASTNORM_DYNAMIC_SHARED(unsigned char, memory);
  Shared shared{memory};
  const int g = t.group_channels, thread = int(threadIdx.x);
  const Place at = place(t, true);
  Affine<A>* affine = shared.take<Affine<A>>(g);
  double* scratch = shared.take<double>(partial_scratch(t));
  double* sums = shared.take<double>(2 * g);
  uint8_t* bits = reinterpret_cast<uint8_t*>(scratch);  // later

  if (a.training) {
    sum_partials(t, static_cast<const double*>(a.workspace), parts, at.group, scratch, sums, sums + g);
    const double count = double(a.n) * double(a.hw);
    double factor = a.momentum;
    if (a.cumulative && a.num_batches_tracked) factor = 1 / double(*a.num_batches_tracked);
    for (int i = thread; i < g; i += t.threads) {
      const int64_t channel = channel_number(t, at.group, i);
      const Moments moments = moments_about(base_of<T>(a, channel), sums[i], sums[g + i], count);
      affine[i] = finish<A>(a, channel, moments, factor, owns(t, at, i));
    }
  } else {
    for (int i = thread; i < g; i += t.threads)
      affine[i] = finish_eval<A>(a, channel_number(t, at.group, i), owns(t, at, i));
  }
  if (!a.y) return;
  __syncthreads();
  Affine<A> map[P];
#pragma unroll
  for (int i = 0; i < P; i++) map[i] = affine[channel_of_sum<T, kSeveral>(t, i)];

  apply_tiles<T, kSeveral, kGeneral>(a, t, at, map, bits);
}

template <class T>
size_t apply_bytes(const Tiles& t, bool mask) {
  const size_t scratch = shared_bytes<double>(partial_scratch(t)) + shared_bytes<double>(2 * t.group_channels);
  const size_t bits = mask ? chunk_bytes(t) : 0;
  return shared_bytes<Affine<Accumulate<T>>>(t.group_channels) + std::max(scratch, bits);
}

}  // namespace
}  // namespace fastnorm
