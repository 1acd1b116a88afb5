// What the max-pooling kernels share: offsets of any size, the rule by which a tap wins, which kernel runs.
#pragma once
#include <cstring>
#include <type_traits>

#include "max_pool2d.h"
#include "pool.cuh"

namespace fastnorm {
namespace {

__device__ __forceinline__ void write_offset(void* p, int bytes, int64_t i, int tap) {
  switch (bytes) {
    case 1: static_cast<uint8_t*>(p)[i] = uint8_t(tap); break;
    case 2: static_cast<int16_t*>(p)[i] = int16_t(tap); break;
    default: static_cast<int32_t*>(p)[i] = tap;
  }
}

__device__ __forceinline__ int read_offset(const void* p, int bytes, int64_t i) {
  switch (bytes) {
    case 1: return static_cast<const uint8_t*>(p)[i];
    case 2: return static_cast<const int16_t*>(p)[i];
    default: return static_cast<const int32_t*>(p)[i];
  }
}

// V offsets of one byte, in one access; i is a multiple of V.
template <int V>
using OffsetWord = std::conditional_t<V == 2, uint16_t, std::conditional_t<V == 4, uint32_t, uint64_t>>;

template <int V>
__device__ __forceinline__ void write_offsets(void* p, int64_t i, const int (&tap)[V]) {
  OffsetWord<V> word = 0;
#pragma unroll
  for (int v = 0; v < V; v++) word |= OffsetWord<V>(tap[v]) << (8 * v);
  *reinterpret_cast<OffsetWord<V>*>(static_cast<uint8_t*>(p) + i) = word;
}

template <int V>
__device__ __forceinline__ OffsetWord<V> read_offsets(const void* p, int64_t i) {
  return *reinterpret_cast<const OffsetWord<V>*>(static_cast<const uint8_t*>(p) + i);
}

template <class A>
__device__ __forceinline__ A minus_infinity() {
  return -A(1) / A(0);
}

// The greatest value so far and where it was.
template <class A>
struct Maximum {
  A value;
  int tap;

  __device__ __forceinline__ void take(A v, int at) {
    if (v > value || v != v) value = v, tap = at;
  }
};

// As in torch, whose channels_last CUDA kernel has index 0 where no value is greater than -inf; elsewhere it is the
// first tap's.
template <class A>
__device__ __forceinline__ int64_t index_of(const MaxPool2dForward& a, int oy, int ox, const Maximum<A>& m) {
  if (a.channels_last && m.value == minus_infinity<A>()) return 0;
  const PoolAxis &y = a.shape.y, &x = a.shape.x;
  const int row = m.tap / x.kernel, column = m.tap - row * x.kernel;
  return int64_t(y.begin(oy) + row * y.dilation) * x.in + x.begin(ox) + column * x.dilation;
}

// ---- Which windows have a kernel of their own -----------------------------------------------------------------------

// Planes whose width is the output's times the stride, in whole vectors: 3 x 3 and 2 x 2 windows as networks have them.
template <int kKernel, int kStride, int kPad>
struct Window {
  static constexpr int kernel = kKernel, stride = kStride, pad = kPad;
  // The windows that a run of inputs, the i-th a multiple of the stride, has beside those of i / stride: so many before
  // and after.
  static constexpr int before = (kKernel - 1 - kPad) / kStride, after = (kStride - 1 + kPad) / kStride;
  static bool fits(const PoolAxis& a) {
    return a.kernel == kKernel && a.stride == kStride && a.pad == kPad && a.dilation == 1;
  }
};

// f(Window<...>()) for a window that has a kernel of its own, else otherwise().
template <class F, class G>
auto with_window(const PoolShape& s, F f, G otherwise) {
  auto fits = [&](auto window) { return window.fits(s.y) && window.fits(s.x) && s.x.in == s.x.out * window.stride; };
  if (fits(Window<3, 2, 1>())) return f(Window<3, 2, 1>());
  if (fits(Window<2, 2, 0>())) return f(Window<2, 2, 0>());
  if (fits(Window<3, 1, 1>())) return f(Window<3, 1, 1>());
  if (fits(Window<3, 2, 0>())) return f(Window<3, 2, 0>());
  return otherwise();
}

enum class Way { kElements, kChannels, kPlanes };

// Which kernel runs for these images, x and y or dy and dx.
template <class T>
Way way_of(const PoolShape& s, const void* image, const void* other, const void* offset) {
  constexpr int V = kLanes<T>;
  auto is_multiple = [](const void* p, int of) { return reinterpret_cast<uintptr_t>(p) % of == 0; };
  if (s.offset_bytes() != 1 || !is_multiple(image, 16) || !is_multiple(other, 16) || !is_multiple(offset, V))
    return Way::kElements;
  if (s.c % V == 0) return Way::kChannels;
  const bool planes = s.c == 1 && s.x.out % V == 0 && with_window(s, [](auto) { return true; }, [] { return false; });
  return planes ? Way::kPlanes : Way::kElements;
}

}  // namespace
}  // namespace fastnorm
