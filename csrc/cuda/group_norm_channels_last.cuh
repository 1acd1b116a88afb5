// Group norm of [n][hw][c], streamed: how a sample is cut into tiles, and the forward kernels.
#pragma once
#include "group_norm.cuh"
#include "tiles_apply.cuh"
#include "tiles_moments.cuh"

namespace fastnorm {
namespace {

constexpr int kTileThreads = 192;

// Whether the tiles of all samples begin at 16-byte boundaries; no sum depends on that.
template <class T, class Args>
bool all_samples_aligned(const Args& a, std::initializer_list<const void*> tensors) {
  return common_misalignment(tensors, sizeof(T)) == 0 && (a.n == 1 || a.c * a.hw % kLanes<T> == 0);
}

// The tiles of one sample, which their number has no part in.
template <class T, class Args>
Tiles streamed_sample_tiles(const Args& a, std::initializer_list<const void*> tensors) {
  constexpr int kWidth = 512;  // bytes of a tile in a row
  const bool aligned = all_samples_aligned<T>(a, tensors);
  const Tiles groups = make_groups<T>(1, a.c, a.hw, true, aligned ? 0 : 1, !aligned, kWidth);
  const int64_t slots = groups.runs * (groups.group_length / kLanes<T> + 1);
  const int64_t each = slots * groups.groups < (1 << 17) ? 1024 : 2048;
  return split<T>(groups, std::min<int64_t>(slots / each + 1, 256), kTileThreads);
}

// Where a block is: its sample, and its place in it.
struct SamplePlace {
  int64_t sample;
  Place at;
  __device__ __forceinline__ explicit SamplePlace(const Tiles& t, bool reverse = false) {
    const unsigned block = reverse ? gridDim.x - 1 - blockIdx.x : blockIdx.x, each = unsigned(t.groups * t.parts);
    const unsigned number = block / each;
    sample = number;
    at = place_of(t, block - number * each);
  }
};

template <class T, class P>
__device__ __forceinline__ P* shifted(P* p, int64_t elements) {
  using Byte = std::conditional_t<std::is_const_v<P>, const char, char>;
  return p ? reinterpret_cast<Byte*>(p) + elements * int64_t(sizeof(T)) : nullptr;
}

// The arguments of one sample: its tensors and its mask.
template <class T, class Args>
__device__ __forceinline__ Args sample_arguments(Args a, int64_t sample) {
  const int64_t elements = sample * a.c * a.hw;
  a.x = shifted<T>(a.x, elements), a.residual = shifted<T>(a.residual, elements);
  if (a.mask) a.mask += sample * ((a.c * a.hw + 7) / 8);
  if constexpr (std::is_same_v<Args, GroupNormForward>) {
    a.y = shifted<T>(a.y, elements);
  } else {
    a.dy = shifted<T>(a.dy, elements);
    a.dx = shifted<T>(a.dx, elements), a.dresidual = shifted<T>(a.dresidual, elements);
  }
  return a;
}

// Partial sums of a sample's tiles in the workspace: two of each of t.channels per part.
inline Partials tile_partials(const Tiles& t, int64_t groups, void* data) {
  const int64_t each = t.c / groups, part = 2 * t.channels;
  return {static_cast<double*>(data),
          int(groups),
          int(each),
          t.parts,
          t.copies,
          t.parts * part,
          each,
          1,
          part,
          t.c,
          t.channels};
}
__device__ __forceinline__ double* sample_partials(const Tiles& t, void* data, int64_t sample) {
  return static_cast<double*>(data) + sample * t.parts * 2 * t.channels;
}
inline size_t partial_bytes(const Tiles& t, int64_t samples) {
  return size_t(samples * t.parts * 2 * t.channels) * sizeof(double);
}

// A kernel over all tiles of all samples.
template <class Args, class... More>
cudaError_t launch_samples(void (*kernel)(Args, Tiles, More...), const Tiles& t, size_t bytes, cudaStream_t stream,
                           const std::type_identity_t<Args>& a, std::type_identity_t<More>... more) {
  if (a.n > 0x7fffffff / (t.groups * t.parts)) return cudaErrorInvalidConfiguration;
  return launch(kernel, dim3(unsigned(a.n * t.groups * t.parts)), dim3(unsigned(t.threads)), bytes, stream, a, t,
                more...);
}

// ---- Forward --------------------------------------------------------------------------------------------------------

// Sums of distances from a thread's own first elements, so that one outlier spoils little; then, exactly, from the
// group's first.
template <class T>
__global__ void __launch_bounds__(kTileThreads, kBlocksAtOnce<2>)
    group_norm_statistics_kernel(GroupNormForward all, Tiles t) {
  using A = Accumulate<T>;
  constexpr int V = kLanes<T>;
  FASTNORM_DYNAMIC_SHARED(unsigned char, memory);
  Shared shared{memory};
  const int g = t.group_channels, thread = int(threadIdx.x);
  double* const scratch = shared.take<double>(sum_scratch<T>(t));
  double* const sums = shared.take<double>(2 * g);
  const auto [sample, at] = SamplePlace(t);
  const GroupNormForward a = sample_arguments<T>(all, sample);
  const T* const x = static_cast<const T*>(a.x);
  const int end = thread < t.step ? at.segments * t.slots : 0;
  const Walk<T> walk(t, at, thread);
  A shift[V] = {};
  if (thread < end) {
    const Slot s = *walk;
#pragma unroll
    for (int i = 0; i < V; i++)
      if (s.valid >> i & 1) shift[i] = widen(x[s.offset + i]);
  }
  double value[V], squares[V];
  square_streamed<T, true>(x, walk, thread, end, t.step, shift, value, squares);
  int count[V];
  count_elements<T, true>(t, walk, thread, end, count);
  const int64_t each = a.c / a.groups;
#pragma unroll
  for (int i = 0; i < V; i++) {
    if (count[i] == 0) continue;
    const int64_t channel = channel_number(t, at.group, channel_of_sum<T, true>(t, i));
    const double d = double(shift[i]) - double(widen(x[channel / each * each]));
    squares[i] += d * (2 * value[i] + count[i] * d);
    value[i] += count[i] * d;
  }
  sum_channels<T, true>(t, value, scratch, sums);
  sum_channels<T, true>(t, squares, scratch, sums + g);
  __syncthreads();
  write_partials(t, sample_partials(t, a.workspace, sample), at.part, at.group, sums, sums + g);
}

template <class T>
size_t tile_sum_bytes(const Tiles& t) {
  return shared_bytes<double>(sum_scratch<T>(t)) + shared_bytes<double>(2 * t.group_channels);
}

// The affine maps of a thread's lanes, by way of shared memory.
template <class T, class Args>
__device__ __forceinline__ void read_affine(const Args& a, const Tiles& t, int64_t sample, const Place& at,
                                            Affine<Accumulate<T>>* shared, Affine<Accumulate<T>> (&map)[kLanes<T>]) {
  using A = Accumulate<T>;
  for (int i = int(threadIdx.x); i < t.group_channels; i += t.threads) {
    const int64_t channel = channel_number(t, at.group, i);
    const int64_t row = sample * a.groups + channel / (a.c / a.groups);
    shared[i] = channel_affine(a, read_group_stats<A>(a, row), channel);
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kLanes<T>; i++) map[i] = shared[channel_of_sum<T, true>(t, i)];
}

template <class T, bool kGeneral>
__global__ void __launch_bounds__(kTileThreads, kBlocksAtOnce<2>)
    group_norm_apply_kernel(GroupNormForward all, Tiles t) {
  using A = Accumulate<T>;
  FASTNORM_DYNAMIC_SHARED(unsigned char, memory);
  Shared shared{memory};
  Affine<A>* const affine = shared.take<Affine<A>>(t.group_channels);
  const auto [sample, at] = SamplePlace(t, true);  // what was read last is in L2 still
  const GroupNormForward a = sample_arguments<T>(all, sample);
  Affine<A> map[kLanes<T>];
  read_affine<T>(a, t, sample, at, affine, map);
  apply_tiles<T, true, kGeneral>(a, t, at, map, shared.at);
}

template <class T>
size_t apply_bytes(const Tiles& t, bool mask) {
  return shared_bytes<Affine<Accumulate<T>>>(t.group_channels) + (mask ? chunk_bytes(t) : 0);
}

}  // namespace
}  // namespace fastnorm
