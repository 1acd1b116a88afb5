// Convolution, forward; ../conv2d.h has the rules.
//
//   y[n][o][q] = activation(bias[o] + sum over c and taps t of weight[o][c][t] * x[n][c][place of q + place of t])
//
//   small    groups of few channels (depthwise): a thread per value, conv2d_small.cuh
//   product  all others: an implicit matrix product, conv2d_gemm.cuh; the columns (the taps' pixels) are gathered
//            straight into shared memory
//
// 2 * ci * taps flops for each value of y.  Bytes: x once for each row of tiles (128 or 64 channels of y) and each tap,
// of which caches serve all but the first; y written once; the weight read and, where its rows are not in the order of
// the product, written once more.
#include "conv2d_gemm.cuh"
#include "conv2d_small.cuh"

namespace fastnorm {
namespace cuda {

size_t conv2d_forward_workspace(const Conv2dForward& a) { return is_small(a.shape) ? 0 : packed_bytes<false>(a.shape); }

cudaError_t conv2d_forward(const Conv2dForward& a, cudaStream_t stream) {
  if (!is_possible(a.shape)) return cudaErrorInvalidValue;
  if (a.shape.outputs() == 0) return cudaSuccess;
  return with_type(a.shape.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (is_small(a.shape)) {
      return launch_small<T, false>({a.shape, a.x, a.weight, a.bias, a.y, a.activation, a.negative_slope}, stream);
    }
    PixelProduct p{};
    p.shape = a.shape;
    p.source = a.x, p.weight = a.weight, p.bias = a.bias, p.result = a.y;
    p.activation = a.activation, p.negative_slope = a.negative_slope;
    return launch_pixels<T, false>(p, a.workspace, a.tf32, stream);
  });
}

}  // namespace cuda
}  // namespace fastnorm
