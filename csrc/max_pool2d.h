// Max-pooling of images: what the host file hands to the kernels.  No torch here.
//
//   y[o] = max over the taps t of x[o * stride - pad + t * dilation], in both directions, taps outside of x left out
//
// The taps are compared row by row.  One replaces the maximum if it is greater or NaN, so the first of equal values is
// kept and the last of several NaNs.  What backward needs is which tap won: its number, row * kernel.x + column, in one
// byte.  A window of nothing but -inf keeps the first tap inside of x, or the one that follows the padding if no tap is
// inside, and y is -inf.
//
//   index  = the position in its plane of x of the tap that won
//   dx[i]  = the sum of dy[o] over the windows o that i won: a gather, which writes every dx once
#pragma once
#include "pool.h"

namespace fastnorm {

struct MaxPool2dForward {
  PoolShape shape;
  bool channels_last;
  DType dtype;  // of x and y
  const void* x;
  void* y;
  void* offset;      // offset_bytes() each, or null: not wanted; so are
  int64_t* indices;  // these
  void* workspace;   // max_pool2d_forward_workspace() bytes
  int threads;       // at most, for the CPU kernels

  bool narrow_will_do() const { return shape.narrow_will_do(); }
};

struct MaxPool2dBackward {
  PoolShape shape;
  DType dtype;  // of dy and dx
  const void* dy;
  const void* offset;  // as forward left it
  void* dx;
  void* workspace;  // max_pool2d_backward_workspace() bytes
  int threads;      // at most, for the CPU kernels

  bool narrow_will_do() const { return shape.narrow_will_do(); }
};

namespace cpu {
FASTNORM_CPU_KERNEL(size_t, max_pool2d_forward_workspace, MaxPool2dForward)
FASTNORM_CPU_KERNEL(size_t, max_pool2d_backward_workspace, MaxPool2dBackward)
FASTNORM_CPU_KERNEL(void, max_pool2d_forward, MaxPool2dForward)
FASTNORM_CPU_KERNEL(void, max_pool2d_backward, MaxPool2dBackward)
}  // namespace cpu

#ifdef FASTNORM_CUDA
namespace cuda {
inline size_t max_pool2d_forward_workspace(const MaxPool2dForward&) { return 0; }
inline size_t max_pool2d_backward_workspace(const MaxPool2dBackward&) { return 0; }
cudaError_t max_pool2d_forward(const MaxPool2dForward&, cudaStream_t);
cudaError_t max_pool2d_backward(const MaxPool2dBackward&, cudaStream_t);
}  // namespace cuda
#endif

}  // namespace fastnorm
