// The weight's gradient where groups have few channels: see conv2d_small.cuh.
//
// A block sums dy * x over some pixels, for some taps that a thread has in registers, of one pair of channels, or of 32
// with channels_last, where they are neighbours in memory.
#pragma once
#include "conv2d_parts.cuh"

namespace fastnorm {
namespace {

constexpr int kSmallTaps = 9;  // of a thread

struct SmallWeight {
  ConvShape shape;
  const void *x, *dy;
  void* partial;  // [parts][groups * co][k], k in the order of Depth
  int64_t pairs, parts, part_pixels;
  int tap_chunks;
};

template <class T, int kChannels, int V>
__global__ void __launch_bounds__(kSumThreads) conv2d_small_weight_kernel(SmallWeight a) {
  using A = Accumulate<T>;
  constexpr int kRows = kSumThreads / kChannels;
  FASTNORM_SHARED(A, scratch, kSumThreads);
  const ConvShape& s = a.shape;
  int64_t part = blockIdx.x;
  const int first_tap = split(part, a.tap_chunks) * kSmallTaps;
  const int lane = threadIdx.x % kChannels, row = threadIdx.x / kChannels;
  const int64_t pair = split(part, (a.pairs + kChannels - 1) / kChannels) * int64_t(kChannels) + lane;
  const int64_t output = pair / s.ci, input = pair - output * s.ci, pixels = s.n * s.y.out * s.x.out;
  const int64_t begin = part * a.part_pixels, end = begin + a.part_pixels < pixels ? begin + a.part_pixels : pixels;
  const Strides of_x = image_strides(s.channels_last, s.groups * s.ci, s.y.in, s.x.in);
  const Strides of_dy = image_strides(s.channels_last, s.groups * s.co, s.y.out, s.x.out);
  const T* const x = static_cast<const T*>(a.x) + (output / s.co * s.ci + input) * of_x.channel;
  const T* const dy = static_cast<const T*>(a.dy) + output * of_dy.channel;
  A sum[kSmallTaps] = {};
  for (int64_t i = begin + row; i < end && pair < a.pairs; i += kRows) {
    int64_t n = i;
    const int qx = split(n, s.x.out), qy = split(n, s.y.out);
    const A gradient = widen(dy[n * of_dy.image + qy * of_dy.row + qx * of_dy.pixel]);
    const T* const image = x + n * of_x.image;
    int ky = unsigned(first_tap) / unsigned(s.x.kernel), kx = first_tap - ky * s.x.kernel;
#pragma unroll
    for (int t = 0; t < kSmallTaps; t++) {
      const int64_t py = s.y.position(qy, ky), px = s.x.position(qx, kx);
      const bool inside = ky < s.y.kernel && py >= 0 && py < s.y.in && px >= 0 && px < s.x.in;
      sum[t] = fused(gradient, inside ? A(widen(image[py * of_x.row + px * of_x.pixel])) : A(0), sum[t]);
      if (++kx == s.x.kernel) kx = 0, ky++;
    }
  }
#pragma unroll
  for (int t = 0; t < kSmallTaps; t++) {
    const A total = sum_of_rows<kChannels>(sum[t], scratch);
    const int64_t tap = first_tap + t, k = s.channels_last ? tap * s.ci + input : input * s.taps() + tap;
    if (row == 0 && pair < a.pairs && tap < s.taps())
      static_cast<A*>(a.partial)[part * s.weights() + output * s.ci * s.taps() + k] = total;
  }
}

inline Parts small_weight_parts(const ConvShape& s, SmallWeight* sums = nullptr) {
  const int64_t pairs = s.groups * s.co * s.ci;
  const int chunks = (s.taps() + kSmallTaps - 1) / kSmallTaps;
  const Parts parts(s.n * s.y.out * s.x.out, (s.channels_last ? (pairs + 31) / 32 : pairs) * chunks, 1024, 1);
  if (sums) sums->pairs = pairs, sums->parts = parts.parts, sums->part_pixels = parts.pixels, sums->tap_chunks = chunks;
  return parts;
}

template <class T>
cudaError_t launch_small_weight(const Conv2dBackwardWeight& a, cudaStream_t stream) {
  const ConvShape& s = a.shape;
  SmallWeight sums{s, a.x, a.dy, a.workspace, 0, 0, 0, 0};
  small_weight_parts(s, &sums);
  dim3 grid;
  const int64_t blocks = (s.channels_last ? (sums.pairs + 31) / 32 : sums.pairs) * sums.tap_chunks * sums.parts;
  if (const cudaError_t error = with_blocks(blocks, grid); error != cudaSuccess) return error;
  return s.channels_last ? launch(conv2d_small_weight_kernel<T, 32, 1>, grid, dim3(kSumThreads), 0, stream, sums)
                         : launch(conv2d_small_weight_kernel<T, 1, 1>, grid, dim3(kSumThreads), 0, stream, sums);
}

}  // namespace
}  // namespace fastnorm
