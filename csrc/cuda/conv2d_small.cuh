// Convolutions with few channels in a group, depthwise ones above all, without a matrix: a thread per result.
//
// Bytes moved: those of x, y and weight, each from global memory once as caches hold the taps' rows; 2 * ci * taps
// flops for each value of y, too few for a product of tiles to pay off, which would be mostly empty.
//
//   channels  [n][h][w][c], a channel per group: a thread takes 16 bytes of channels of a pixel
//   elements  any: a thread takes one value, and neighbours neighbouring ones in memory
#pragma once
#include "conv2d_launch.cuh"

namespace fastnorm {
namespace {

constexpr int kSmallThreads = 256, kSmallChannels = 4;

// Whether the groups are so small.
inline bool is_small(const ConvShape& s) { return s.ci <= kSmallChannels && s.co <= kSmallChannels; }

struct SmallConv {
  ConvShape shape;
  const void *source, *weight, *bias;
  void* result;
  Activation activation;
  double negative_slope;
};

// The output that reads tap t at input i, or -1.
__device__ __forceinline__ int64_t output_of(const ConvAxis& a, int64_t i, int t) {
  const int64_t at = i + a.pad - int64_t(t) * a.dilation;
  if (a.stride == 1 || at < 0) return at;
  const int q = int(unsigned(at) / unsigned(a.stride));
  return int64_t(q) * a.stride == at ? q : -1;
}

// Calls f(y, x, tap) for the taps of a result's pixel that are inside of the source.
template <bool kBackward, class F>
__device__ __forceinline__ void for_each_tap(const ConvShape& s, int64_t py, int64_t px, F f) {
  const int height = kBackward ? s.y.out : s.y.in, width = kBackward ? s.x.out : s.x.in;
  for (int ky = 0; ky < s.y.kernel; ky++) {
    const int64_t y = kBackward ? output_of(s.y, py, ky) : s.y.position(py, ky);
    if (y < 0 || y >= height) continue;
    for (int kx = 0; kx < s.x.kernel; kx++) {
      const int64_t x = kBackward ? output_of(s.x, px, kx) : s.x.position(px, kx);
      if (x >= 0 && x < width) f(y, x, ky * s.x.kernel + kx);
    }
  }
}

// V channels of a pixel, one in each group; or one value, V = 1.
template <class T, bool kBackward, int V>
__global__ void __launch_bounds__(kSmallThreads, 1) conv2d_small_kernel(SmallConv a, int64_t items) {
  using A = Accumulate<T>;
  int64_t item = int64_t(blockIdx.x) * kSmallThreads + threadIdx.x;
  if (item >= items) return;
  const ConvShape& s = a.shape;
  const int64_t rows = kBackward ? s.ci : s.co, depth = kBackward ? s.co : s.ci;
  const ConvAxis &y = s.y, &x = s.x;
  const Strides inputs = image_strides(s.channels_last, s.groups * s.ci, y.in, x.in);
  const Strides outputs = image_strides(s.channels_last, s.groups * s.co, y.out, x.out);
  const Strides &from = kBackward ? outputs : inputs, &to = kBackward ? inputs : outputs;
  const int height = kBackward ? y.in : y.out, width = kBackward ? x.in : x.out;
  const int64_t channels = s.groups * rows;
  int64_t channel = 0;
  if (s.channels_last) channel = split(item, channels / V) * int64_t(V);
  const int64_t px = split(item, width), py = split(item, height);
  if (!s.channels_last) channel = split(item, channels);
  const int64_t n = item;
  int64_t group = channel;
  if (V == 1) split(group, rows);
  const T* const weight = static_cast<const T*>(a.weight);
  const T* const source = static_cast<const T*>(a.source) + n * from.image + group * depth * from.channel;
  T* const result = static_cast<T*>(a.result) + n * to.image + py * to.row + px * to.pixel + channel * to.channel;
  A sum[V] = {};
  for_each_tap<kBackward>(s, py, px, [&](int64_t sy, int64_t sx, int tap) {
    const T* const at = source + sy * from.row + sx * from.pixel;
    if constexpr (V == 1) {
      for (int64_t c = 0; c < depth; c++) {
        const int64_t row = kBackward ? (group * s.co + c) * s.ci + channel - group * rows : channel * s.ci + c;
        sum[0] = fused(A(widen(weight[row * s.taps() + tap])), A(widen(at[c * from.channel])), sum[0]);
      }
    } else {
      const Vector<T> value = load(at);
#pragma unroll
      for (int v = 0; v < V; v++)
        sum[v] = fused(A(widen(weight[(channel + v) * s.taps() + tap])), A(widen(value.lane[v])), sum[v]);
    }
  });
  if constexpr (!kBackward) {
    const T* const bias = static_cast<const T*>(a.bias);
#pragma unroll
    for (int v = 0; v < V; v++) sum[v] += bias ? A(widen(bias[channel + v])) : A(0);
    if constexpr (V == 1)
      sum[0] = activate(a.activation, sum[0], A(a.negative_slope));
    else
      activate_lanes<T, true>(a.activation, sum, A(a.negative_slope), false);
  }
  if constexpr (V == 1)
    *result = narrow<T>(sum[0]);
  else
    store(result, narrow<T>(sum));
}

template <class T, bool kBackward>
cudaError_t launch_small(const SmallConv& a, cudaStream_t stream) {
  constexpr int V = sizeof(T) == 8 ? 1 : kLanes<T>;
  const ConvShape& s = a.shape;
  const bool wide =
      s.channels_last && s.ci == 1 && s.co == 1 && s.groups % V == 0 && is_aligned(a.source) && is_aligned(a.result);
  const int64_t items = (kBackward ? s.inputs() : s.outputs()) / (wide ? V : 1);
  dim3 grid;
  const cudaError_t error = with_blocks((items + kSmallThreads - 1) / kSmallThreads, grid);
  if (error != cudaSuccess) return error;
  return launch(wide ? conv2d_small_kernel<T, kBackward, V> : conv2d_small_kernel<T, kBackward, 1>, grid,
                dim3(kSmallThreads), 0, stream, a, items);
}

}  // namespace
}  // namespace fastnorm
