// Convolution, backward to weight and bias; ../conv2d.h has the rules.
//
//   dweight[o][c][t] = sum over n and q of dy[n][o][q] * x[n][c][place of q + place of t]
//
// A matrix product like forward's, with the pixels for k: a block has kM channels of dy by kN channels and taps of x,
// and goes over some of the pixels.  Its sums go to the workspace, and a second kernel adds up those of all blocks,
// always in the same order.  dbias likewise.
#include "conv2d_weight.cuh"

namespace fastnorm {
namespace cuda {

size_t conv2d_backward_weight_workspace(const Conv2dBackwardWeight& a) {
  return with_type(a.shape.dtype, [&](auto zero) { return weight_workspace<decltype(zero)>(a); });
}

cudaError_t conv2d_backward_weight(const Conv2dBackwardWeight& a, cudaStream_t stream) {
  if (!is_possible(a.shape)) return cudaErrorInvalidValue;
  return with_type(a.shape.dtype, [&](auto zero) { return launch_backward_weight<decltype(zero)>(a, stream); });
}

}  // namespace cuda
}  // namespace fastnorm
