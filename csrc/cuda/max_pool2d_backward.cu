// Max-pooling, backward: every dx gathers from the windows that it may have won; ../max_pool2d.h has the rules.
//
// Bytes moved (S = bytes of x, a window stride of 2): S / 4 of dy and a byte per output read, S written: 1.31 S in
// float32, 1.38 S in 16 bits.  Sums are in float32 (float64 for float64), window by window in memory's order.
//
//   planes    each thread takes 16 bytes of outputs, and with them stride rows of stride * 16 bytes of dx.
//   channels  [n][h][w][c] with whole 16-byte pieces of channels: a thread takes one of one pixel.
//   elements  any window, size and alignment: a thread takes one dx, and neighbours neighbouring ones.
#include "max_pool2d.cuh"

namespace fastnorm {
namespace {

// ---- Planes ---------------------------------------------------------------------------------------------------------

template <class T, class W, int V>
__global__ void __launch_bounds__(kPoolThreads, 2)
    max_pool2d_planes_gradient_kernel(MaxPool2dBackward a, int64_t items) {
  using A = Accumulate<T>;
  const PoolShape& s = a.shape;
  int64_t item = work_item();
  if (item >= items) return;
  const int ox = split(item, s.x.out / V) * V, oy = split(item, (s.y.in + W::stride - 1) / W::stride);
  const int64_t plane = item;
  A sum[W::stride][W::stride * V] = {};
#pragma unroll
  for (int j = -W::before; j <= W::after; j++) {
    if (oy + j < 0 || oy + j >= s.y.out) continue;
    const int64_t row = (plane * s.y.out + oy + j) * s.x.out;
    const T* const dy = static_cast<const T*>(a.dy) + row;
    const uint8_t* const offset = static_cast<const uint8_t*>(a.offset) + row;
    A g[W::before + V + W::after];
    int tap[W::before + V + W::after];
    const Vector<T> middle = load(dy + ox);
    const OffsetWord<V> taps = read_offsets<V>(offset, ox);
#pragma unroll
    for (int i = 0; i < W::before + V + W::after; i++) {
      const int column = ox + i - W::before;
      if (i >= W::before && i < W::before + V) {
        g[i] = widen(middle.lane[i - W::before]);
        tap[i] = int(taps >> (8 * (i - W::before)) & 255);
      } else {
        const bool inside = column >= 0 && column < s.x.out;
        g[i] = inside ? A(widen(dy[column])) : A(0);
        tap[i] = inside ? int(offset[column]) : -1;
      }
    }
#pragma unroll
    for (int r = 0; r < W::stride; r++) {
      const int tap_row = r + W::pad - j * W::stride;
      if (tap_row < 0 || tap_row >= W::kernel) continue;
#pragma unroll
      for (int c = 0; c < W::stride * V; c++)
#pragma unroll
        for (int i = 0; i < W::before + V + W::after; i++) {
          const int tap_column = c + W::pad - (i - W::before) * W::stride;
          if (tap_column < 0 || tap_column >= W::kernel) continue;
          if (tap[i] == tap_row * W::kernel + tap_column) sum[r][c] += g[i];
        }
    }
  }
#pragma unroll
  for (int r = 0; r < W::stride; r++) {
    const int iy = oy * W::stride + r;
    if (iy >= s.y.in) break;
    T* const dx = static_cast<T*>(a.dx) + (plane * s.y.in + iy) * s.x.in + ox * W::stride;
#pragma unroll
    for (int piece = 0; piece < W::stride; piece++) {
      A value[V];
#pragma unroll
      for (int v = 0; v < V; v++) value[v] = sum[r][piece * V + v];
      store(dx + piece * V, narrow<T>(value));
    }
  }
}

// ---- Channels and elements ------------------------------------------------------------------------------------------

template <class T, int V>
__global__ void __launch_bounds__(kPoolThreads, 2) max_pool2d_gradient_kernel(MaxPool2dBackward a, int64_t items) {
  using A = Accumulate<T>;
  const PoolShape& s = a.shape;
  int64_t item = work_item();
  if (item >= items) return;
  const int channel = s.c == 1 ? 0 : split(item, s.c / V) * V, ix = split(item, s.x.in), iy = split(item, s.y.in);
  const int64_t n = item;
  const int bytes = s.offset_bytes();
  const int first = s.x.first_window(ix), end = s.x.end_window(ix), end_row = s.y.end_window(iy);
  A sum[V] = {};
  for (int oy = s.y.first_window(iy); oy < end_row; oy++) {
    const int below = iy - s.y.begin(oy), row = below / s.y.dilation;
    if (row * s.y.dilation != below) continue;
    for (int ox = first; ox < end; ox++) {
      const int beside = ix - s.x.begin(ox), column = beside / s.x.dilation;
      if (column * s.x.dilation != beside) continue;
      const int tap = row * s.x.kernel + column;
      const int64_t at = ((n * s.y.out + oy) * s.x.out + ox) * s.c + channel;
      if constexpr (V == 1) {
        if (read_offset(a.offset, bytes, at) == tap) sum[0] += widen(static_cast<const T*>(a.dy)[at]);
      } else {
        const Vector<T> g = load(static_cast<const T*>(a.dy) + at);
        const OffsetWord<V> taps = read_offsets<V>(a.offset, at);
#pragma unroll
        for (int v = 0; v < V; v++) {
          // Widened whether it is needed or not: a branch here breaks the load up on sm_100.
          const A wide = widen(g.lane[v]);
          sum[v] += int(taps >> (8 * v) & 255) == tap ? wide : A(0);
        }
      }
    }
  }
  T* const dx = static_cast<T*>(a.dx) + ((n * s.y.in + iy) * s.x.in + ix) * s.c + channel;
  if constexpr (V == 1)
    *dx = narrow<T>(sum[0]);
  else
    store(dx, narrow<T>(sum));
}

// ---- Launches -------------------------------------------------------------------------------------------------------

template <class T, int V>
cudaError_t launch_elements(const MaxPool2dBackward& a, cudaStream_t stream) {
  const int64_t items = a.shape.inputs() / V;
  return launch(max_pool2d_gradient_kernel<T, V>, pool_blocks(items), dim3(kPoolThreads), 0, stream, a, items);
}

template <class T>
cudaError_t launch_planes(const MaxPool2dBackward& a, cudaStream_t stream) {
  constexpr int V = kLanes<T>;
  const PoolShape& s = a.shape;
  return with_window(
      s,
      [&](auto window) {
        using W = decltype(window);
        const int64_t items = s.n * ((s.y.in + W::stride - 1) / W::stride) * (s.x.out / V);
        return launch(max_pool2d_planes_gradient_kernel<T, W, V>, pool_blocks(items), dim3(kPoolThreads), 0, stream, a,
                      items);
      },
      [] { return cudaErrorInvalidValue; });
}

template <class T>
cudaError_t launch_backward(const MaxPool2dBackward& a, cudaStream_t stream) {
  switch (way_of<T>(a.shape, a.dy, a.dx, a.offset)) {
    case Way::kPlanes: return launch_planes<T>(a, stream);
    case Way::kChannels: return launch_elements<T, kLanes<T>>(a, stream);
    default: return launch_elements<T, 1>(a, stream);
  }
}

}  // namespace

namespace cuda {

cudaError_t max_pool2d_backward(const MaxPool2dBackward& a, cudaStream_t stream) {
  return with_type(a.dtype, [&](auto zero) { return launch_backward<decltype(zero)>(a, stream); });
}

}  // namespace cuda
}  // namespace fastnorm
