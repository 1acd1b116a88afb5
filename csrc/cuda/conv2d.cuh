// What the convolution kernels share: where pixels and taps are in memory.
//
// All three passes gather: a value that they read is at (a pixel's place) + (a tap's place), coordinates and offsets
// alike, and is zero if the coordinates lie outside of the image.  In a matrix product one of the two belongs to a row
// of a tile, and a thread keeps it; the other belongs to a column, and the block keeps a table of them.
#pragma once
#include "conv2d.h"
#include "index.cuh"
#include "norm.cuh"

namespace fastnorm {
namespace {

// One direction of a gather: pixel q and tap j meet at q * step + origin + j * tap_step in the source, where that is in
// [0, source).  q stands for the pixel q * spacing + first of the result, j for the tap j * tap_spacing + tap_first of
// the weight.
struct GatherAxis {
  int pixels, taps, source;
  int step, origin, tap_step;
  int spacing, first, tap_spacing, tap_first;
};

// y's pixels from x.
__host__ __device__ inline GatherAxis forward_axis(const ConvAxis& a) {
  return {a.out, a.kernel, a.in, a.stride, -a.pad, a.dilation, 1, 0, 1, 0};
}

// dx's pixels from dy.  With a stride, a pixel meets only some of the taps, and which ones depends on its remainder;
// those that meet the tap `tap_first` are one class, and to it the convolution has stride 1.  divisor: the greatest
// common one of stride and dilation.
__host__ __device__ inline GatherAxis backward_axis(const ConvAxis& a, int divisor, int tap_first) {
  const int64_t shift = int64_t(tap_first) * a.dilation - a.pad;
  const int64_t below = shift % a.stride, first = below < 0 ? below + a.stride : below;
  const int tap_spacing = a.stride / divisor;
  const int pixels = first < a.in ? int((a.in - first + a.stride - 1) / a.stride) : 0;
  return {pixels,
          (a.kernel - tap_first + tap_spacing - 1) / tap_spacing,
          a.out,
          1,
          int((first - shift) / a.stride),
          -(a.dilation / divisor),
          a.stride,
          int(first),
          tap_spacing,
          tap_first};
}

inline int common_divisor(int a, int b) { return b == 0 ? a : common_divisor(b, a % b); }

// The classes of backward_axis() that have taps; where there are fewer than `stride`, the other pixels of dx are zero.
inline int tap_classes(const ConvAxis& a) {
  const int spacing = a.stride / common_divisor(a.stride, a.dilation);
  return spacing < a.kernel ? spacing : a.kernel;
}

// Distances in an image tensor, in elements.
struct Strides {
  int64_t image, row, pixel, channel;
};

__host__ __device__ inline Strides image_strides(bool channels_last, int64_t channels, int64_t height, int64_t width) {
  if (channels_last) return {channels * height * width, channels * width, channels, 1};
  return {channels * height * width, width, 1, height * width};
}

// Coordinates wrap around in unsigned arithmetic, so that one comparison finds those outside.
struct alignas(16) Place {
  int64_t offset;
  unsigned y, x;
};

// No image is larger in one direction: with a pixel or a tap that is nowhere, in either, none is inside.
constexpr int kMaxExtent = 1 << 30;
__device__ __forceinline__ Place no_pixel() { return {0, 1u << 31, 0}; }
__device__ __forceinline__ Place no_tap() { return {0, 0, 1u << 31}; }

__device__ __forceinline__ Place place_at(const Strides& s, int64_t offset, int64_t y, int64_t x) {
  return {offset + y * s.row + x * s.pixel, unsigned(y), unsigned(x)};
}

// Of pixel q of [n][y.pixels][x.pixels].
__device__ __forceinline__ Place pixel_place(const GatherAxis& y, const GatherAxis& x, const Strides& s, int64_t q) {
  const int qx = split(q, x.pixels), qy = split(q, y.pixels);
  return place_at(s, q * s.image, int64_t(qy) * y.step + y.origin, int64_t(qx) * x.step + x.origin);
}

// The taps and channels of one output, in the order in which they are summed: k -> channel, tap (ky, kx).  Channels
// come last with channels_last, as in the image.
struct Depth {
  int channel, ky, kx;
  __device__ __forceinline__ Depth(int k, int channels, int taps_y, int taps_x, bool channels_last) {
    const int taps = taps_y * taps_x, outer = unsigned(k) / unsigned(channels_last ? channels : taps);
    const int inner = k - outer * (channels_last ? channels : taps), tap = channels_last ? outer : inner;
    channel = channels_last ? inner : outer;
    ky = unsigned(tap) / unsigned(taps_x);
    kx = tap - ky * taps_x;
  }
};

__device__ __forceinline__ Place tap_place(const GatherAxis& y, const GatherAxis& x, const Strides& s, int channels,
                                           bool channels_last, int k) {
  const Depth d(k, channels, y.taps, x.taps, channels_last);
  return place_at(s, d.channel * s.channel, int64_t(d.ky) * y.tap_step, int64_t(d.kx) * x.tap_step);
}

__device__ __forceinline__ bool meets(const Place& a, const Place& b, unsigned height, unsigned width) {
  return a.y + b.y < height && a.x + b.x < width;
}

}  // namespace
}  // namespace fastnorm
