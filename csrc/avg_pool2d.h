// Average pooling of images: what the host file hands to the kernels.  No torch here.
//
//   y[o]  = the sum of x over window o, divided by divisor(o)
//   dx[i] = the sum of dy[o] / divisor(o) over the windows o that have i inside: a gather, which writes every dx once
//
// Both are linear and each is the other's derivative, so that nothing but the shape is kept for backward.  The divisor
// is the number of the window's positions, with those in the padding, which ends `pad` after x, or without; or it is
// given.  A window that has no position inside of x has y = 0.
#pragma once
#include "pool.h"

namespace fastnorm {

struct AvgPool2d {
  PoolShape shape;         // dilation 1
  bool count_include_pad;  // whether positions in the padding count
  int64_t divisor;         // in place of their number, unless it is 0
  DType dtype;             // of what is read and written
  const void* from;        // forward: x; backward: dy
  void* to;                // forward: y; backward: dx
  void* workspace;         // ..._workspace() bytes
  int threads;             // at most, for the CPU kernels

  bool narrow_will_do() const { return shape.narrow_will_do(); }

  // The positions of window o that are inside: from the first to before the end, if that is larger.
  FASTNORM_HOST_DEVICE static int first_inside(const PoolAxis& axis, int o) {
    const int begin = axis.begin(o);
    return begin < 0 ? 0 : begin;
  }
  FASTNORM_HOST_DEVICE static int end_inside(const PoolAxis& axis, int o) {
    const int64_t end = int64_t(axis.begin(o)) + axis.kernel;
    return end < axis.in ? int(end) : axis.in;
  }
  // The divisor is the product of these numbers of both directions.
  FASTNORM_HOST_DEVICE int64_t counted(const PoolAxis& axis, int o) const {
    if (count_include_pad) {
      const int64_t left = int64_t(axis.in) + axis.pad - axis.begin(o);
      return left < axis.kernel ? left : axis.kernel;
    }
    const int inside = end_inside(axis, o) - first_inside(axis, o);
    return inside > 0 ? inside : 1;  // of no positions the sum is 0
  }
  FASTNORM_HOST_DEVICE int64_t counted_rows(int oy) const { return divisor ? divisor : counted(shape.y, oy); }
  FASTNORM_HOST_DEVICE int64_t counted_columns(int ox) const { return divisor ? 1 : counted(shape.x, ox); }
};

namespace cpu {
FASTNORM_CPU_KERNEL(size_t, avg_pool2d_forward_workspace, AvgPool2d)
FASTNORM_CPU_KERNEL(size_t, avg_pool2d_backward_workspace, AvgPool2d)
FASTNORM_CPU_KERNEL(void, avg_pool2d_forward, AvgPool2d)
FASTNORM_CPU_KERNEL(void, avg_pool2d_backward, AvgPool2d)
}  // namespace cpu

#ifdef FASTNORM_CUDA
namespace cuda {
inline size_t avg_pool2d_forward_workspace(const AvgPool2d&) { return 0; }
inline size_t avg_pool2d_backward_workspace(const AvgPool2d&) { return 0; }
cudaError_t avg_pool2d_forward(const AvgPool2d&, cudaStream_t);
cudaError_t avg_pool2d_backward(const AvgPool2d&, cudaStream_t);
}  // namespace cuda
#endif

}  // namespace fastnorm
