// Batch norm, forward, in two kernels: for groups of channels that do not fit on chip; the second alone for eval mode.
//
// Plan and bytes moved (S = bytes of x, m = S / 32 or S / 16 for the mask): 3S, + residual 4S + m.  The first kernel
// takes the sums of the distances from one of a thread's own elements and of their squares, so that one outlier spoils
// little; moves them, exactly, to the channel's first element; and adds them up in double: over a block, over a cluster
// of 8 where there are clusters, and, in the prologue of each block of the second kernel, over what is left.  That one
// takes blocks in reverse order: what the first kernel read last is in L2 still.
#pragma once
#include "batch_norm_moments.cuh"

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
  for (int k = begin; k < end; k += U * step) {
    Vector<T> v[U];
    unsigned valid[U];
#pragma unroll
    for (int u = 0; u < U; u++, walk.advance()) {
      if (k + u * step >= end) continue;
      const Slot s = *walk;
      v[u] = load(x + s.offset, s.valid);
      valid[u] = s.valid;
    }
#pragma unroll
    for (int u = 0; u < U; u++) {
      if (k + u * step >= end) break;
      Accumulate<T> value[V];
      widen(value, v[u]);
      if (valid[u] != kAllLanes<T>) fill_invalid<T, kSeveral>(value, valid[u], shift);
#pragma unroll
      for (int i = 0; i < V; i++) {
        const Accumulate<T> distance = value[i] - shift[kSeveral ? i : 0];
        sum[i] += distance;
        square[i] = fused(distance, distance, square[i]);
      }
    }
  }
  collect<T, kSeveral>(to, sum);
  if (collect<T, kSeveral>(squares, square) || !kOverflows<T>) return;
  set_zero(to), set_zero(squares);
  Walk<T> again = start;
#pragma unroll 1
  for (int k = begin; k < end; k += step, again.advance()) {
    const Slot s = *again;
    Accumulate<T> value[V];
    widen(value, load(x + s.offset, s.valid));
    fill_invalid<T, kSeveral>(value, s.valid, shift);
#pragma unroll
    for (int i = 0; i < V; i++)
      add_distance(double(value[i]) - double(shift[kSeveral ? i : 0]), to[kSeveral ? i : 0], squares[kSeveral ? i : 0]);
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

// Where the sums of a channel are taken about: its first element.
template <class T>
__device__ __forceinline__ double base_of(const BatchNormForward& a, int64_t channel) {
  return double(widen(static_cast<const T*>(a.x)[a.channels_last ? channel : channel * a.hw]));
}

template <class T, bool kSeveral>
__global__ void __launch_bounds__(kStreamedThreads, 2)
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

constexpr int kChunkSlots = 4096;  // between two barriers, where a mask is written

// y from the partial sums of `parts`, or, in eval mode, from the running statistics.
template <class T, bool kSeveral, bool kGeneral>
__global__ void __launch_bounds__(kStreamedThreads, 2) batch_norm_apply_kernel(BatchNormForward a, Tiles t, int parts) {
  using A = Accumulate<T>;
  constexpr int V = kLanes<T>, P = kSums<T, kSeveral>, U = kSeveral ? 2 : 4;
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
  __syncthreads();
  Affine<A> map[P];
#pragma unroll
  for (int i = 0; i < P; i++) map[i] = affine[channel_of_sum<T, kSeveral>(t, i)];

  const T* __restrict__ x = static_cast<const T*>(a.x);
  const T* __restrict__ residual = static_cast<const T*>(a.residual);
  T* __restrict__ y = static_cast<T*>(a.y);
  const A negative_slope = A(a.negative_slope);
  const int chunk = a.mask ? max(1, kChunkSlots / t.slots) : at.segments;
  for (int begin = 0; begin < at.segments; begin += chunk) {
    const int chunk_segments = min(chunk, at.segments - begin);
    const int end = thread < t.step ? chunk_segments * t.slots : 0;
    Walk<T> walk(t, at, begin * t.slots + thread);
    for (int k = thread; k < end; k += U * t.step) {
      Slot s[U];
      Vector<T> v[U], r[U];
#pragma unroll
      for (int u = 0; u < U; u++, walk.advance()) {
        if (k + u * t.step >= end) continue;
        s[u] = *walk;
        v[u] = load(x + s[u].offset, s[u].valid);
        if (residual) r[u] = load(residual + s[u].offset, s[u].valid);
      }
#pragma unroll
      for (int u = 0; u < U; u++) {
        if (k + u * t.step >= end) break;
        A z[V];
        widen(z, v[u]);
#pragma unroll
        for (int i = 0; i < V; i++) z[i] = map[kSeveral ? i : 0](z[i]);
        if (residual) {
#pragma unroll
          for (int i = 0; i < V; i++) z[i] += widen(r[u].lane[i]);
        }
        const unsigned on = activate_lanes<T, kGeneral>(a.activation, z, negative_slope);
        store(y + s[u].offset, narrow<T>(z), s[u].valid);
        if (a.mask) bits[k + u * t.step] = uint8_t(on);
      }
    }
    if (a.mask) {
      __syncthreads();
      write_mask<T>(t, at, begin, chunk_segments, bits, a.mask);
      __syncthreads();
    }
  }
}

template <class T>
size_t apply_bytes(const Tiles& t, bool mask) {
  const size_t scratch = shared_bytes<double>(partial_scratch(t)) + shared_bytes<double>(2 * t.group_channels);
  const size_t bits = mask ? shared_bytes<uint8_t>(std::max(kChunkSlots, t.slots)) : 0;
  return shared_bytes<Affine<Accumulate<T>>>(t.group_channels) + std::max(scratch, bits);
}

}  // namespace
}  // namespace fastnorm
