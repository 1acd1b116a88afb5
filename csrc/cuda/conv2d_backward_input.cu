// Convolution, backward to x; ../conv2d.h has the rules.
//
//   dx[n][c][i] = sum over o and the taps t that meet i of weight[o][c][t] * dy[n][o][(i + pad - t * dilation) /
//   stride]
//
// The kernels are forward's, from dy to dx with the weight transposed.  With a stride, the pixels of dx that meet the
// same taps are a convolution of stride 1 each, so that no product is with a zero between the outputs: flops and bytes
// are forward's.  Pixels that meet no tap are zero; where there are some, all of dx is cleared first.
#include "conv2d_gemm.cuh"
#include "conv2d_small.cuh"

namespace fastnorm {
namespace {

constexpr int kClearThreads = 256;

template <class T, int V>
__global__ void __launch_bounds__(kClearThreads) conv2d_clear_kernel(T* p, int64_t n) {
  for (int64_t i = int64_t(blockIdx.x) * kClearThreads + threadIdx.x; i < n; i += int64_t(gridDim.x) * kClearThreads)
    p[i] = narrow<T>(0);
}

template <class T>
cudaError_t launch_backward_input(const Conv2dBackwardInput& a, cudaStream_t stream) {
  const ConvShape& s = a.shape;
  if (is_small(s)) return launch_small<T, true>({s, a.dy, a.weight, nullptr, a.dx, Activation::kNone, 0}, stream);
  if (tap_classes(s.y) < s.y.stride || tap_classes(s.x) < s.x.stride) {  // some pixels meet no tap
    const int64_t blocks = (s.inputs() + kClearThreads - 1) / kClearThreads, most = 32 * int64_t(sm_count());
    const cudaError_t error = launch(conv2d_clear_kernel<T, 1>, dim3(unsigned(blocks < most ? blocks : most)),
                                     dim3(kClearThreads), 0, stream, static_cast<T*>(a.dx), s.inputs());
    if (error != cudaSuccess) return error;
  }
  PixelProduct p{};
  p.shape = s;
  p.source = a.dy, p.weight = a.weight, p.result = a.dx;
  p.activation = Activation::kNone;
  return launch_pixels<T, true>(p, a.workspace, a.tf32, stream);
}

}  // namespace

namespace cuda {

size_t conv2d_backward_input_workspace(const Conv2dBackwardInput& a) {
  return is_small(a.shape) ? 0 : packed_bytes<true>(a.shape);
}

cudaError_t conv2d_backward_input(const Conv2dBackwardInput& a, cudaStream_t stream) {
  if (!is_possible(a.shape)) return cudaErrorInvalidValue;
  if (a.shape.inputs() == 0) return cudaSuccess;
  return with_type(a.shape.dtype, [&](auto zero) { return launch_backward_input<decltype(zero)>(a, stream); });
}

}  // namespace cuda
}  // namespace fastnorm
