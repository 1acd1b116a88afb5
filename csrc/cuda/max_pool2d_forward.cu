// Max-pooling, forward; ../max_pool2d.h has the rules.
//
// Bytes moved (S = bytes of x, a window stride of 2): S read, S / 4 of y and a byte per output written: 1.31 S in
// float32, 1.38 S in 16 bits; 8 bytes per output more for indices.
//
//   planes    each thread takes 16 bytes of outputs of two rows.  It loads whole 16-byte pieces of the input's rows and
//             the few elements beside them, and compares row by row, so that a row that two windows share is read
//             and reduced once.
//   channels  [n][h][w][c] with whole 16-byte pieces of channels: a thread takes one for some output rows.
//   elements  any window, size and alignment: a thread takes one output, and neighbours neighbouring ones.
#include "max_pool2d.cuh"

namespace fastnorm {
namespace {

// ---- Planes ---------------------------------------------------------------------------------------------------------

// The maxima of V neighbouring windows within one row of the input; at: the first column of the middle windows' run.
template <class T, class W, int V>
struct RowMaxima {
  using A = Accumulate<T>;
  static constexpr int kLength = (V - 1) * W::stride + W::kernel, kRight = W::kernel - W::stride - W::pad;
  Maximum<A> maximum[V];

  __device__ __forceinline__ RowMaxima(const T* row, int at, int width) {
    A v[kLength];
#pragma unroll
    for (int i = 0; i < W::pad; i++) v[i] = at + i >= W::pad ? A(widen(row[at + i - W::pad])) : minus_infinity<A>();
#pragma unroll
    for (int piece = 0; piece < W::stride; piece++) {
      const Vector<T> x = load(row + at + piece * V);
#pragma unroll
      for (int i = 0; i < V; i++)
        if (W::pad + piece * V + i < kLength) v[W::pad + piece * V + i] = widen(x.lane[i]);
    }
#pragma unroll
    for (int i = 0; i < kRight; i++) {
      const int column = at + W::stride * V + i;
      v[kLength - kRight + i] = column < width ? A(widen(row[column])) : minus_infinity<A>();
    }
#pragma unroll
    for (int o = 0; o < V; o++) {
      maximum[o] = {minus_infinity<A>(), o == 0 && at == 0 ? W::pad : 0};
#pragma unroll
      for (int k = 0; k < W::kernel; k++) maximum[o].take(v[o * W::stride + k], k);
    }
  }
};

constexpr int kStrip = 2;  // output rows of a thread

template <class T, class W, int V>
__global__ void __launch_bounds__(kPoolThreads, 2) max_pool2d_planes_kernel(MaxPool2dForward a, int64_t items) {
  using A = Accumulate<T>;
  const PoolShape& s = a.shape;
  int64_t item = work_item();
  if (item >= items) return;
  const int ox = split(item, s.x.out / V) * V, oy = split(item, (s.y.out + kStrip - 1) / kStrip) * kStrip;
  const int64_t plane = item;
  const T* const x = static_cast<const T*>(a.x) + plane * s.y.in * s.x.in;
  Maximum<A> maximum[kStrip][V];
#pragma unroll
  for (int j = 0; j < kStrip; j++)
#pragma unroll
    for (int v = 0; v < V; v++)
      maximum[j][v] = {minus_infinity<A>(), s.y.first_tap(oy + j) * W::kernel + (v == 0 && ox == 0 ? W::pad : 0)};
  constexpr int kRows = (kStrip - 1) * W::stride + W::kernel;
#pragma unroll
  for (int r = 0; r < kRows; r++) {
    const int iy = oy * W::stride - W::pad + r;
    if (iy < 0 || iy >= s.y.in) continue;
    const RowMaxima<T, W, V> row(x + int64_t(iy) * s.x.in, ox * W::stride, s.x.in);
#pragma unroll
    for (int j = 0; j < kStrip; j++) {
      const int tap_row = r - j * W::stride;
      if (tap_row < 0 || tap_row >= W::kernel) continue;
#pragma unroll
      for (int v = 0; v < V; v++) maximum[j][v].take(row.maximum[v].value, tap_row * W::kernel + row.maximum[v].tap);
    }
  }
#pragma unroll
  for (int j = 0; j < kStrip; j++) {
    if (oy + j >= s.y.out) break;
    const int64_t at = (plane * s.y.out + oy + j) * s.x.out + ox;
    A value[V];
    int tap[V];
#pragma unroll
    for (int v = 0; v < V; v++) value[v] = maximum[j][v].value, tap[v] = maximum[j][v].tap;
    store(static_cast<T*>(a.y) + at, narrow<T>(value));
    if (a.offset) write_offsets<V>(a.offset, at, tap);
    if (a.indices)
#pragma unroll
      for (int v = 0; v < V; v++) a.indices[at + v] = index_of(a, oy + j, ox + v, maximum[j][v]);
  }
}

// ---- Channels and elements ------------------------------------------------------------------------------------------

// V channels of one window.  kKernel: of a square window without dilation, so that all its loads are under way at once;
// 0: any.
template <class T, int kKernel, int V>
__device__ __forceinline__ void pool_window(const MaxPool2dForward& a, int64_t n, int oy, int ox, int64_t channel) {
  using A = Accumulate<T>;
  const PoolShape& s = a.shape;
  const T* const x = static_cast<const T*>(a.x) + n * s.y.in * s.x.in * s.c + channel;
  const int first_row = s.y.first_tap(oy), end_row = s.y.end_tap(oy);
  const int first = s.x.first_tap(ox), end = s.x.end_tap(ox);
  Maximum<A> m[V];
#pragma unroll
  for (int v = 0; v < V; v++) m[v] = {minus_infinity<A>(), first_row * s.x.kernel + first};
  auto take = [&](int row, int column) {
    const int64_t pixel = int64_t(s.y.begin(oy) + row * s.y.dilation) * s.x.in + s.x.begin(ox) + column * s.x.dilation;
    const int tap = row * s.x.kernel + column;
    if constexpr (V == 1) {
      m[0].take(widen(x[pixel * s.c]), tap);
    } else {
      const Vector<T> piece = load(x + pixel * s.c);
#pragma unroll
      for (int v = 0; v < V; v++) m[v].take(widen(piece.lane[v]), tap);
    }
  };
  if constexpr (kKernel != 0) {
#pragma unroll
    for (int row = 0; row < kKernel; row++)
#pragma unroll
      for (int column = 0; column < kKernel; column++)
        if (row >= first_row && row < end_row && column >= first && column < end) take(row, column);
  } else {
    for (int row = first_row; row < end_row; row++)
      for (int column = first; column < end; column++) take(row, column);
  }
  const int64_t at = ((n * s.y.out + oy) * s.x.out + ox) * s.c + channel;
  if constexpr (V == 1) {
    static_cast<T*>(a.y)[at] = narrow<T>(m[0].value);
    if (a.offset) write_offset(a.offset, s.offset_bytes(), at, m[0].tap);
  } else {
    A value[V];
    int tap[V];
#pragma unroll
    for (int v = 0; v < V; v++) value[v] = m[v].value, tap[v] = m[v].tap;
    store(static_cast<T*>(a.y) + at, narrow<T>(value));
    if (a.offset) write_offsets<V>(a.offset, at, tap);
  }
  if (a.indices)
#pragma unroll
    for (int v = 0; v < V; v++) a.indices[at + v] = index_of(a, oy, ox, m[v]);
}

template <class T, int kKernel, int V>
__global__ void __launch_bounds__(kPoolThreads, 2) max_pool2d_kernel(MaxPool2dForward a, int64_t items, int strip) {
  const PoolShape& s = a.shape;
  int64_t item = work_item();
  if (item >= items) return;
  const int channel = s.c == 1 ? 0 : split(item, s.c / V) * V, ox = split(item, s.x.out);
  const int oy = split(item, (s.y.out + strip - 1) / strip) * strip;
  const int end = min(oy + strip, s.y.out);
  for (int row = oy; row < end; row++) pool_window<T, kKernel, V>(a, item, row, ox, channel);
}

// ---- Launches -------------------------------------------------------------------------------------------------------

template <class T, int kKernel, int V>
cudaError_t launch_elements(const MaxPool2dForward& a, cudaStream_t stream) {
  const PoolShape& s = a.shape;
  // Rows of one thread share its divisions, as long as there are threads enough.
  const int strip = s.outputs() / V > int64_t(sm_count()) * 2048 * 16 ? 4 : 1;
  const int64_t items = s.n * ((s.y.out + strip - 1) / strip) * s.x.out * (s.c / V);
  return launch(max_pool2d_kernel<T, kKernel, V>, pool_blocks(items), dim3(kPoolThreads), 0, stream, a, items, strip);
}

template <class T>
cudaError_t launch_channels(const MaxPool2dForward& a, cudaStream_t stream) {
  auto square = [&](int k) {
    auto fits = [k](const PoolAxis& axis) { return axis.kernel == k && axis.dilation == 1; };
    return fits(a.shape.y) && fits(a.shape.x);
  };
  if (square(3)) return launch_elements<T, 3, kLanes<T>>(a, stream);
  if (square(2)) return launch_elements<T, 2, kLanes<T>>(a, stream);
  return launch_elements<T, 0, kLanes<T>>(a, stream);
}

template <class T>
cudaError_t launch_planes(const MaxPool2dForward& a, cudaStream_t stream) {
  constexpr int V = kLanes<T>;
  const PoolShape& s = a.shape;
  const int64_t items = s.n * ((s.y.out + kStrip - 1) / kStrip) * (s.x.out / V);
  return with_window(
      s,
      [&](auto window) {
        return launch(max_pool2d_planes_kernel<T, decltype(window), V>, pool_blocks(items), dim3(kPoolThreads), 0,
                      stream, a, items);
      },
      [] { return cudaErrorInvalidValue; });
}

template <class T>
cudaError_t launch_forward(const MaxPool2dForward& a, cudaStream_t stream) {
  switch (way_of<T>(a.shape, a.x, a.y, a.offset)) {
    case Way::kPlanes: return launch_planes<T>(a, stream);
    case Way::kChannels: return launch_channels<T>(a, stream);
    default: return launch_elements<T, 0, 1>(a, stream);
  }
}

}  // namespace

namespace cuda {

cudaError_t max_pool2d_forward(const MaxPool2dForward& a, cudaStream_t stream) {
  return with_type(a.dtype, [&](auto zero) { return launch_forward<decltype(zero)>(a, stream); });
}

}  // namespace cuda
}  // namespace fastnorm
