// Average pooling, backward: every dx gathers from the windows that it is in; ../avg_pool2d.h has the rules.
//
// Bytes moved (S = bytes of x, a window stride of 2): S / 4 read, S written.  Sums are in float32 (float64 for
// float64), row by row, and divided once where all windows have the same divisor.
//
//   channels  [n][h][w][c] with whole 16-byte pieces of channels: a thread takes one of one pixel.
//   elements  any other: a thread takes one dx, and neighbours neighbouring ones.
#include "avg_pool2d.cuh"

namespace fastnorm {
namespace {

template <class T, bool kOneDivisor, int V>
__global__ void __launch_bounds__(kPoolThreads) avg_pool2d_gradient_kernel(AvgPool2d a, int64_t items) {
  using A = Accumulate<T>;
  const PoolShape& s = a.shape;
  int64_t item = work_item();
  if (item >= items) return;
  const int channel = s.c == 1 ? 0 : split(item, s.c / V) * V, ix = split(item, s.x.in), iy = split(item, s.y.in);
  const int first = s.x.first_window(ix), end = s.x.end_window(ix), end_row = s.y.end_window(iy);
  const T* const dy = static_cast<const T*>(a.from) + item * s.y.out * s.x.out * s.c + channel;
  A total[V] = {};
  for (int oy = s.y.first_window(iy); oy < end_row; oy++) {
    A sum[V] = {}, v[V];
    for (int ox = first; ox < end; ox++) {
      fetch<V>(v, dy + (int64_t(oy) * s.x.out + ox) * s.c);
      const A divisor = kOneDivisor ? A(1) : A(a.counted_rows(oy) * a.counted_columns(ox));
#pragma unroll
      for (int i = 0; i < V; i++) sum[i] += kOneDivisor ? v[i] : v[i] / divisor;
    }
#pragma unroll
    for (int i = 0; i < V; i++) total[i] += sum[i];
  }
  if constexpr (kOneDivisor) {
    const A divisor = A(a.counted_rows(0) * a.counted_columns(0));
#pragma unroll
    for (int i = 0; i < V; i++) total[i] /= divisor;
  }
  put<V>(static_cast<T*>(a.to) + ((item * s.y.in + iy) * s.x.in + ix) * s.c + channel, total);
}

// ---- Launches -------------------------------------------------------------------------------------------------------

template <class T, int V>
cudaError_t launch_pieces(const AvgPool2d& a, cudaStream_t stream) {
  const int64_t items = a.shape.inputs() / V;
  auto* const kernel =
      has_one_divisor(a) ? avg_pool2d_gradient_kernel<T, true, V> : avg_pool2d_gradient_kernel<T, false, V>;
  return launch(kernel, pool_blocks(items), dim3(kPoolThreads), 0, stream, a, items);
}

}  // namespace

namespace cuda {

cudaError_t avg_pool2d_backward(const AvgPool2d& a, cudaStream_t stream) {
  return with_type(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    return has_pieces<T>(a) ? launch_pieces<T, kLanes<T>>(a, stream) : launch_pieces<T, 1>(a, stream);
  });
}

}  // namespace cuda
}  // namespace fastnorm
