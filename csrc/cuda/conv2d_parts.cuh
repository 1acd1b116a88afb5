// Sums over pixels in parts, so that there are blocks enough, and the sums of those parts, always in the same order;
// the bias's gradient is one.
#pragma once
#include "conv2d_launch.cuh"
#include "reduce.cuh"

namespace fastnorm {
namespace {

// In how many parts the pixels are summed: enough blocks for the device, each with some work.
struct Parts {
  int64_t parts, pixels;
  Parts(int64_t all, int64_t blocks, int64_t least, int multiple) {
    const int64_t wanted = (4 * int64_t(sm_count()) + blocks - 1) / blocks, most = (all + least - 1) / least;
    const int64_t some = wanted < most ? wanted : most > 0 ? most : 1;
    pixels = (all + some - 1) / some;
    pixels = (pixels + multiple - 1) / multiple * multiple;
    parts = pixels > 0 ? (all + pixels - 1) / pixels : 1;
  }
};

// ---- Sums of parts --------------------------------------------------------------------------------------------------

constexpr int kSumThreads = 256;

// The sum over the block's threads with the same threadIdx.x % kChannels, in the first kChannels threads.
template <int kChannels, class A>
__device__ __forceinline__ A sum_of_rows(A v, A* scratch) {
  if constexpr (kChannels == 1) {
    v = block_sum(v, scratch);
  } else {
    scratch[threadIdx.x] = v;
    __syncthreads();
    if (threadIdx.x < kChannels)
      for (int i = kChannels; i < kSumThreads; i += kChannels) v += scratch[threadIdx.x + i];
  }
  __syncthreads();
  return v;
}

// result[o][c][t] = the sum of its parts, which are in the order of Depth; with one tap of one channel, result[o].
template <class T, int V>
__global__ void __launch_bounds__(kSumThreads)
    conv2d_parts_kernel(const void* partial, T* result, int64_t parts, int64_t items, int channels, int taps_y,
                        int taps_x, bool channels_last) {
  using A = Accumulate<T>;
  const int64_t item = int64_t(blockIdx.x) * kSumThreads + threadIdx.x;
  if (item >= items) return;
  A sum = 0;
  for (int64_t part = 0; part < parts; part++) sum += static_cast<const A*>(partial)[part * items + item];
  int64_t output = item;
  const int taps = taps_y * taps_x, k = split(output, int64_t(channels) * taps);
  const Depth d(k, channels, taps_y, taps_x, channels_last);
  result[(output * channels + d.channel) * taps + d.ky * taps_x + d.kx] = narrow<T>(sum);
}

template <class T>
cudaError_t launch_sum(const Accumulate<T>* partial, void* result, int64_t parts, const ConvShape& s, bool weight,
                       cudaStream_t stream) {
  const int64_t items = weight ? s.weights() : s.groups * s.co;
  dim3 grid;
  if (const cudaError_t error = with_blocks((items + kSumThreads - 1) / kSumThreads, grid); error != cudaSuccess)
    return error;
  return launch(conv2d_parts_kernel<T, 1>, grid, dim3(kSumThreads), 0, stream, partial, static_cast<T*>(result), parts,
                items, weight ? int(s.ci) : 1, weight ? s.y.kernel : 1, weight ? s.x.kernel : 1, s.channels_last);
}

// ---- The bias's gradient --------------------------------------------------------------------------------------------

struct BiasSum {
  const void* dy;
  void* partial;  // [parts][channels]
  Strides strides;
  int64_t n, pixels, channels;  // pixels of an image
  int64_t parts, part_pixels;
  bool channels_last;
};

// A block has kChannels channels, and for each 256 / kChannels threads of which each takes every so-many-th pixel.
template <class T, int kChannels, int V>
__global__ void __launch_bounds__(kSumThreads) conv2d_bias_kernel(BiasSum a) {
  using A = Accumulate<T>;
  constexpr int kRows = kSumThreads / kChannels;
  FASTNORM_SHARED(A, scratch, kSumThreads);
  int64_t part = blockIdx.x;
  const int lane = threadIdx.x % kChannels, row = threadIdx.x / kChannels;
  const int64_t channel = split(part, (a.channels + kChannels - 1) / kChannels) * int64_t(kChannels) + lane;
  const int64_t begin = part * a.part_pixels, all = a.n * a.pixels;
  const int64_t end = begin + a.part_pixels < all ? begin + a.part_pixels : all;
  A sum = 0;
  if (channel < a.channels) {
    const T* const dy = static_cast<const T*>(a.dy) + channel * a.strides.channel;
    for (int64_t i = begin + row; i < end; i += kRows) {
      int64_t image = i;
      const int pixel = split(image, a.pixels);
      sum += widen(dy[image * a.strides.image + pixel * a.strides.pixel]);
    }
  }
  sum = sum_of_rows<kChannels>(sum, scratch);
  if (row == 0 && channel < a.channels) static_cast<A*>(a.partial)[part * a.channels + channel] = sum;
}

template <class T>
Parts bias_parts(const ConvShape& s) {
  const int64_t channels = s.groups * s.co;
  return Parts(s.n * s.y.out * s.x.out, s.channels_last ? (channels + 31) / 32 : channels, 2048, 1);
}

template <class T>
cudaError_t launch_bias(const Conv2dBackwardWeight& a, void* partial, cudaStream_t stream) {
  const ConvShape& s = a.shape;
  const Parts parts = bias_parts<T>(s);
  const int64_t channels = s.groups * s.co, pixels = int64_t(s.y.out) * s.x.out;
  const BiasSum sum{a.dy,        partial,      image_strides(s.channels_last, channels, s.y.out, s.x.out),
                    s.n,         pixels,       channels,
                    parts.parts, parts.pixels, s.channels_last};
  dim3 grid;
  cudaError_t error = with_blocks((s.channels_last ? (channels + 31) / 32 : channels) * parts.parts, grid);
  if (error != cudaSuccess) return error;
  error = s.channels_last ? launch(conv2d_bias_kernel<T, 32, 1>, grid, dim3(kSumThreads), 0, stream, sum)
                          : launch(conv2d_bias_kernel<T, 1, 1>, grid, dim3(kSumThreads), 0, stream, sum);
  if (error != cudaSuccess) return error;
  return launch_sum<T>(static_cast<const Accumulate<T>*>(partial), a.dbias, parts.parts, s, false, stream);
}

}  // namespace
}  // namespace fastnorm
