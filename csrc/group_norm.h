// Group norm, and with groups == c instance norm: what the host file hands to the kernels.  No torch here.
//
// x is [n, c, hw].  In memory it is dense, as [n][c][hw] or, channels_last, as [n][hw][c]; residual, y, dy, dx and
// dresidual are laid out the same way.  A group is c / groups neighbouring channels of one sample, over all of hw.
// "A" is the accumulate type: double for float64, else float.
//
//   mean and variance of each group.  The mean is kept as mean + mean_low, a sum of two A, so that x - mean is exact
//   where
//     mean / std is large.
//   z = (x - mean) * scale + shift,  scale = rstd * weight,  shift = bias - mean_low * scale
//   y = activation(z + residual)
//
// Every kernel forms scale, shift and z with these very operations (the last one fused multiply-add), so that what
// backward recomputes is bit for bit what forward had.  A sample's numbers depend on that sample alone.
#pragma once
#include <cstddef>
#include <cstdint>

#include "activation.h"
#include "cpu/isa.h"
#include "dtype.h"
#ifdef FASTNORM_CUDA
#include <cuda_runtime_api.h>
#endif

namespace fastnorm {

// One bit per element, set where a two-slope activation has slope 1, kept for backward when a residual was added.
// [n][c][hw]: every plane of hw elements begins on a byte.  channels_last: every sample of hw * c elements does.
// Bit i % 8 of byte i / 8 belongs to element i; padding bits are 0.
template <class Int>
Int group_norm_mask_bytes(Int n, Int c, Int hw, bool channels_last) {
  return channels_last ? n * ((hw * c + 7) / 8) : n * c * ((hw + 7) / 8);
}

struct GroupNormForward {
  int64_t n, c, hw, groups;
  bool channels_last;
  DType dtype;        // of x, residual, y
  DType param_dtype;  // of weight and bias
  double eps, negative_slope;
  Activation activation;
  const void* x;
  const void* residual;  // or null
  const void* weight;    // [c] or null: 1
  const void* bias;      // [c] or null: 0
  void* y;
  void* stats;      // A [4][n * groups]: mean, mean_low, rstd, for backward; and the biased variance
  uint8_t* mask;    // group_norm_mask_bytes() or null: not wanted
  void* workspace;  // group_norm_forward_workspace() bytes
  int threads;      // at most, for the CPU kernels
};

struct GroupNormBackward {
  int64_t n, c, hw, groups;
  bool channels_last;
  DType dtype;        // of dy, x, residual, dx, dresidual
  DType param_dtype;  // of weight, bias, dweight, dbias
  double negative_slope;
  Activation activation;
  const void* dy;
  const void* x;
  const void* residual;  // null where there was none or the mask says all
  const void* weight;    // [c] or null: 1
  const void* bias;      // [c] or null: 0
  const void* stats;     // A [4][n * groups] as forward left it
  const uint8_t* mask;   // as forward left it, or null
  void* dx;              // or null: not wanted; so are the next three
  void* dresidual;       // d loss / d z
  void* dweight;         // [c]
  void* dbias;           // [c]
  void* workspace;       // group_norm_backward_workspace() bytes
  int threads;           // at most, for the CPU kernels
};

namespace cpu {
FASTNORM_CPU_KERNEL(size_t, group_norm_forward_workspace, GroupNormForward)
FASTNORM_CPU_KERNEL(size_t, group_norm_backward_workspace, GroupNormBackward)
FASTNORM_CPU_KERNEL(void, group_norm_forward, GroupNormForward)
FASTNORM_CPU_KERNEL(void, group_norm_backward, GroupNormBackward)
}  // namespace cpu

#ifdef FASTNORM_CUDA
namespace cuda {
size_t group_norm_forward_workspace(const GroupNormForward&);
size_t group_norm_backward_workspace(const GroupNormBackward&);
cudaError_t group_norm_forward(const GroupNormForward&, cudaStream_t);
cudaError_t group_norm_backward(const GroupNormBackward&, cudaStream_t);
}  // namespace cuda
#endif

}  // namespace fastnorm
