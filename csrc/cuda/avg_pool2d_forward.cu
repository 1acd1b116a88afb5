// Average pooling, forward; ../avg_pool2d.h has the rules.
//
// Bytes moved (S = bytes of x, a window stride of 2): S read, S / 4 written.  Sums are in float32 (float64 for
// float64), row by row.
//
//   channels  [n][h][w][c] with whole 16-byte pieces of channels: a thread takes one of one pixel.
//   windows   planes with large windows: a warp takes one, its lanes neighbouring columns and rows.
//   elements  any other: a thread takes one output, and neighbours neighbouring ones.
#include "avg_pool2d.cuh"
#include "reduce.cuh"

namespace fastnorm {
namespace {

constexpr int kLargeWindow = 64;  // positions

template <class T, int V>
__global__ void __launch_bounds__(kPoolThreads) avg_pool2d_kernel(AvgPool2d a, int64_t items) {
  using A = Accumulate<T>;
  const PoolShape& s = a.shape;
  int64_t item = work_item();
  if (item >= items) return;
  const int channel = s.c == 1 ? 0 : split(item, s.c / V) * V, ox = split(item, s.x.out), oy = split(item, s.y.out);
  const int first = a.first_inside(s.x, ox), end = a.end_inside(s.x, ox), end_row = a.end_inside(s.y, oy);
  const T* const x = static_cast<const T*>(a.from) + item * s.y.in * s.x.in * s.c + channel;
  const A divisor = A(a.counted_rows(oy) * a.counted_columns(ox));
  A total[V] = {};
  for (int row = a.first_inside(s.y, oy); row < end_row; row++) {
    A sum[V] = {}, v[V];
    for (int column = first; column < end; column++) {
      fetch<V>(v, x + (int64_t(row) * s.x.in + column) * s.c);
#pragma unroll
      for (int i = 0; i < V; i++) sum[i] += v[i];
    }
#pragma unroll
    for (int i = 0; i < V; i++) total[i] += sum[i];
  }
#pragma unroll
  for (int i = 0; i < V; i++) total[i] /= divisor;
  put<V>(static_cast<T*>(a.to) + ((item * s.y.out + oy) * s.x.out + ox) * s.c + channel, total);
}

// kWidth: what a lane reads at once; rows of a plane begin anywhere, so 1.
template <class T, int kWidth>
__global__ void __launch_bounds__(kPoolThreads) avg_pool2d_windows_kernel(AvgPool2d a, int64_t windows) {
  static_assert(kWidth == 1);
  using A = Accumulate<T>;
  const PoolShape& s = a.shape;
  const int lane = int(threadIdx.x) % 32;
  int64_t item = work_item() / 32;
  if (item >= windows) return;  // whole warps
  const int64_t to = item;
  const int ox = split(item, s.x.out), oy = split(item, s.y.out);
  const int first = a.first_inside(s.x, ox), row = a.first_inside(s.y, oy);
  const int width = a.end_inside(s.x, ox) - first, height = a.end_inside(s.y, oy) - row;
  A sum = 0;
  if (width > 0 && height > 0) {
    const T* const x = static_cast<const T*>(a.from) + (item * s.y.in + row) * s.x.in + first;
    const int64_t count = int64_t(width) * height;
    for (int64_t i = lane; i < count; i += 32) {
      int64_t r = i;
      const int column = split(r, width);
      sum += widen(x[r * s.x.in + column]);
    }
  }
  sum = warp_sum(sum);
  if (lane == 0) static_cast<T*>(a.to)[to] = narrow<T>(sum / A(a.counted_rows(oy) * a.counted_columns(ox)));
}

// ---- Launches -------------------------------------------------------------------------------------------------------

template <class T>
cudaError_t launch_forward(const AvgPool2d& a, cudaStream_t stream) {
  const PoolShape& s = a.shape;
  const int64_t outputs = s.outputs();
  const dim3 block(kPoolThreads);
  if (s.c == 1 && int64_t(s.y.kernel) * s.x.kernel >= kLargeWindow)
    return launch(avg_pool2d_windows_kernel<T, 1>, pool_blocks(32 * outputs), block, 0, stream, a, outputs);
  if (has_pieces<T>(a)) {
    const int64_t items = outputs / kLanes<T>;
    return launch(avg_pool2d_kernel<T, kLanes<T>>, pool_blocks(items), block, 0, stream, a, items);
  }
  return launch(avg_pool2d_kernel<T, 1>, pool_blocks(outputs), block, 0, stream, a, outputs);
}

}  // namespace

namespace cuda {

cudaError_t avg_pool2d_forward(const AvgPool2d& a, cudaStream_t stream) {
  return with_type(a.dtype, [&](auto zero) { return launch_forward<decltype(zero)>(a, stream); });
}

}  // namespace cuda
}  // namespace fastnorm
