// Batch norm: what the host file hands to the kernels.  No torch here.
//
// x is [n, c, hw].  In memory it is dense, as [n][c][hw] or, channels_last, as [n * hw][c], or a slice of the channels
// of such a tensor where x_gap says so; residual, y, dy, dx and dresidual are dense in the same order.  "A" is the
// accumulate type: double for float64, else float.
//
//   statistics (training): mean and variance over n and hw, per channel.  The mean is kept as mean + mean_low, a sum of
//     two A, so that x - mean is exact where mean / std is large.
//   z = (x - mean) * scale + shift,  scale = rstd * weight,  shift = bias - mean_low * scale
//   y = activation(z + residual)
//
// Every kernel forms scale, shift and z with these very operations (the last one fused multiply-add), so that what
// backward recomputes is bit for bit what forward had.
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
// [n][c][hw]: every plane of hw elements starts on a byte.  channels_last: the bits follow each other without gaps.
// Bit i % 8 of byte i / 8 belongs to element i.
template <class Int>
Int batch_norm_mask_bytes(Int n, Int c, Int hw, bool channels_last) {
  return channels_last ? (n * hw * c + 7) / 8 : n * c * ((hw + 7) / 8);
}

struct BatchNormForward {
  int64_t n, c, hw;
  bool channels_last;
  DType dtype;          // of x, residual, y
  DType param_dtype;    // of weight and bias
  DType running_dtype;  // of running_mean and running_var
  bool training;        // statistics of this batch; else the running ones
  bool cumulative;      // running averages over all batches, factor 1 / num_batches_tracked, instead of momentum
  double momentum, eps, negative_slope;
  Activation activation;
  int64_t x_gap;  // elements between two samples of x or, channels_last, two pixels: on the CPU, not training; or 0
  const void* x;
  const void* residual;          // or null
  const void* weight;            // [c] or null: 1
  const void* bias;              // [c] or null: 0
  void* running_mean;            // [c] or null; updated when training
  void* running_var;             // [c] or null; updated when training
  int64_t* num_batches_tracked;  // [1] or null; 1 is added when training
  void* y;                       // or null: not wanted, only the statistics are; x on the CPU, if not training
  void* stats;                   // A [3][c]: mean, mean_low, rstd, for backward
  uint8_t* mask;                 // batch_norm_mask_bytes() or null: not wanted
  void* workspace;               // batch_norm_forward_workspace() bytes
  int threads;                   // at most, for the CPU kernels
};

struct BatchNormBackward {
  int64_t n, c, hw;
  bool channels_last;
  DType dtype;        // of dy, x, residual, dx, dresidual
  DType param_dtype;  // of weight, bias, dweight, dbias
  bool training;      // the statistics are functions of x; else constants
  double negative_slope;
  Activation activation;
  const void* dy;
  const void* x;
  const void* residual;  // null where there was none or the mask says all
  const void* weight;    // [c] or null: 1
  const void* bias;      // [c] or null: 0
  const void* stats;     // A [3][c] as forward left it
  const uint8_t* mask;   // as forward left it, or null
  const double* means;  // [2][c], of dz and of dz * (x - mean) * rstd, where they are over more than this batch, for dx
                        //   (then dweight and dbias are null); or null
  void* dx;             // or null: not wanted; so are the next three
  void* dresidual;      // d loss / d z
  void* dweight;        // [c]
  void* dbias;          // [c]
  void* workspace;      // batch_norm_backward_workspace() bytes
  int threads;          // at most, for the CPU kernels
};

namespace cpu {
FASTNORM_CPU_KERNEL(size_t, batch_norm_forward_workspace, BatchNormForward)
FASTNORM_CPU_KERNEL(size_t, batch_norm_backward_workspace, BatchNormBackward)
FASTNORM_CPU_KERNEL(void, batch_norm_forward, BatchNormForward)
FASTNORM_CPU_KERNEL(void, batch_norm_backward, BatchNormBackward)
}  // namespace cpu

#ifdef FASTNORM_CUDA
namespace cuda {
size_t batch_norm_forward_workspace(const BatchNormForward&);
size_t batch_norm_backward_workspace(const BatchNormBackward&);
cudaError_t batch_norm_forward(const BatchNormForward&, cudaStream_t);
cudaError_t batch_norm_backward(const BatchNormBackward&, cudaStream_t);
}  // namespace cuda
#endif

}  // namespace fastnorm
