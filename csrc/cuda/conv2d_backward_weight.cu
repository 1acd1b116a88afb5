// Convolution, backward to weight and bias; ../conv2d.h has the rules.
//
//   dweight[o][c][t] = sum over n and q of dy[n][o][q] * x[n][c][place of q + place of t]
//   dbias[o]         = sum over n and q of dy[n][o][q]
//
// A matrix product like forward's, with the pixels for k: a block has kM channels of dy by kN channels and taps of x,
// and goes over one part of the pixels.  Its sums go to the workspace, and a second kernel adds up those of all parts,
// always in the same order.  dbias likewise, and so groups of few channels, without a product
// (conv2d_small_weight.cuh).
//
// Forward's flops.  Bytes: dy once for each column of tiles, x once for each row of tiles and each tap, of which caches
// serve all but the first; 8 bytes of workspace for each weight and part.
#include "conv2d_small.cuh"
#include "conv2d_small_weight.cuh"
#include "conv2d_weight.cuh"

namespace fastnorm {
namespace {

template <class T>
Parts parts_of(const ConvShape& s) {
  return is_small(s) ? small_weight_parts(s) : weight_parts<T>(s);
}

// Of the weight's parts, which the bias's follow.
template <class T>
size_t weight_bytes(const ConvShape& s) {
  return shared_bytes<Accumulate<T>>(parts_of<T>(s).parts * s.weights());
}

template <class T>
cudaError_t launch_backward_weight(const Conv2dBackwardWeight& a, cudaStream_t stream) {
  const ConvShape& s = a.shape;
  if (s.weights() == 0) return cudaSuccess;
  cudaError_t error = is_small(s) ? launch_small_weight<T>(a, stream) : launch_weight<T>(a, stream);
  if (error != cudaSuccess) return error;
  error =
      launch_sum<T>(static_cast<const Accumulate<T>*>(a.workspace), a.dweight, parts_of<T>(s).parts, s, true, stream);
  if (error != cudaSuccess || !a.dbias) return error;
  return launch_bias<T>(a, static_cast<char*>(a.workspace) + weight_bytes<T>(s), stream);
}

}  // namespace

namespace cuda {

size_t conv2d_backward_weight_workspace(const Conv2dBackwardWeight& a) {
  const ConvShape& s = a.shape;
  if (s.weights() == 0) return 0;
  return with_type(s.dtype, [&](auto zero) {
    using T = decltype(zero);
    return weight_bytes<T>(s) + shared_bytes<Accumulate<T>>(bias_parts<T>(s).parts * s.groups * s.co);
  });
}

cudaError_t conv2d_backward_weight(const Conv2dBackwardWeight& a, cudaStream_t stream) {
  if (!is_possible(a.shape)) return cudaErrorInvalidValue;
  return with_type(a.shape.dtype, [&](auto zero) { return launch_backward_weight<decltype(zero)>(a, stream); });
}

}  // namespace cuda
}  // namespace fastnorm
