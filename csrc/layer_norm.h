// Layer norm and RMS norm: what the host file hands to the kernels.  No torch here.
//
// x is [outer, cols, inner] in memory, dense, and is normalised over cols; residual, addend, sum, y, dy, dx and
// dresidual are laid out the same way.  inner is 1 where the normalised dimensions come last in memory (layer norm; the
// channels of channels_last images): rows of cols elements.  It is the number of pixels where the channels of
// [n][c][h][w] are normalised: rows then have a stride of inner.  There are rows = outer * inner of them, numbered
// outer first. "A" is the accumulate type: double for float64, else float.
//
//   h = x + addend, rounded to x's type;  without an addend h = x
//   layer norm:  mean and variance of each row;  normalized = (h - mean) * rstd - mean_low * rstd
//     The mean is kept as mean + mean_low, a sum of two A, so that h - mean is exact where mean / std is large.
//   RMS norm:    rstd = 1 / sqrt(mean of squares + eps);  normalized = h * rstd
//   z = normalized * weight + bias,  y = activation(z + residual)
//
// Every kernel forms normalized and z with these very operations (h - mean, then one fused multiply-add; the product
// with weight and the sum with bias another), so that what backward recomputes is bit for bit what forward had.
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
// A span of elements that follow each other begins on a byte: a row where inner is 1, else inner elements, so that
// there are outer * cols spans.  Bit i % 8 of a span's byte i / 8 belongs to its element i; padding bits are 0.
template <class Int>
Int layer_norm_mask_bytes(Int outer, Int cols, Int inner) {
  return inner == 1 ? outer * ((cols + 7) / 8) : outer * cols * ((inner + 7) / 8);
}

// As cpu/isa.h has it; by the length of a row, whose result does not depend on how many there are.
inline bool layer_norm_narrow_will_do(int64_t cols) { return cols <= 32; }

struct LayerNormForward {
  int64_t outer, cols, inner;
  DType dtype;        // of x, addend, residual, sum, y
  DType param_dtype;  // of weight and bias
  bool rms;
  double eps, negative_slope;
  Activation activation;
  const void* x;
  const void* addend;    // or null
  const void* residual;  // or null
  const void* weight;    // [cols] or null: 1
  const void* bias;      // [cols] or null: 0
  void* y;
  void* sum;        // h, where there is an addend; else null
  void* stats;      // A [3][rows]: mean, mean_low, rstd;  RMS norm: A [1][rows]: rstd
  uint8_t* mask;    // layer_norm_mask_bytes() or null: not wanted
  void* workspace;  // layer_norm_forward_workspace() bytes
  int threads;      // at most, for the CPU kernels

  bool narrow_will_do() const { return layer_norm_narrow_will_do(cols); }
};

struct LayerNormBackward {
  int64_t outer, cols, inner;
  DType dtype;        // of dy, dsum, x, residual, dx, dresidual
  DType param_dtype;  // of weight, bias, dweight, dbias
  bool rms;
  double negative_slope;
  Activation activation;
  const void* dy;
  const void* dsum;      // the gradient of h itself, added to dx; or null
  const void* x;         // h
  const void* residual;  // null where there was none or the mask says all
  const void* weight;    // [cols] or null: 1
  const void* bias;      // [cols] or null: 0
  const void* stats;     // as forward left them
  const uint8_t* mask;   // as forward left it, or null
  void* dx;              // or null: not wanted; so are the next three
  void* dresidual;       // d loss / d z
  void* dweight;         // [cols]
  void* dbias;           // [cols]
  void* workspace;       // layer_norm_backward_workspace() bytes
  int threads;           // at most, for the CPU kernels

  bool narrow_will_do() const { return layer_norm_narrow_will_do(cols); }
};

namespace cpu {
FASTNORM_CPU_KERNEL(size_t, layer_norm_forward_workspace, LayerNormForward)
FASTNORM_CPU_KERNEL(size_t, layer_norm_backward_workspace, LayerNormBackward)
FASTNORM_CPU_KERNEL(void, layer_norm_forward, LayerNormForward)
FASTNORM_CPU_KERNEL(void, layer_norm_backward, LayerNormBackward)
}  // namespace cpu

#ifdef FASTNORM_CUDA
namespace cuda {
size_t layer_norm_forward_workspace(const LayerNormForward&);
size_t layer_norm_backward_workspace(const LayerNormBackward&);
cudaError_t layer_norm_forward(const LayerNormForward&, cudaStream_t);
cudaError_t layer_norm_backward(const LayerNormBackward&, cudaStream_t);
}  // namespace cuda
#endif

}  // namespace fastnorm
