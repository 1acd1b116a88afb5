// Convolution (cross-correlation) of images: what the host file hands to the kernels.  No torch here.
//
//   y[n][o][p] = activation(bias[o] + sum over c and taps t of weight[o][c][t] * x[n][c][at(p, t)])
//
//   dx[n][c][i] = sum over o and the (p, t) with at(p, t) = i of weight[o][c][t] * dy[n][o][p]
//
//   dweight[o][c][t] = sum over n and p of dy[n][o][p] * x[n][c][at(p, t)]
//
//   dbias[o] = sum over n and p of dy[n][o][p]
//
// where at(p, t) = p * stride - pad + t * dilation, with the taps outside of x left out, and each group's channels for
// itself.  Sums are in float32, for float64 in float64, and are rounded once.
//
// Algorithms (kernels for one of them say what they take):
//
//   im2col     a matrix product with the columns (the taps' pixels) of a few outputs at a time; any convolution
//
//   direct     few channels: vectors run along the image's rows; the gradient to the weight for up to kDirectTerms
//
//   depthwise  a group per channel; the gradient to the weight in channels_last, otherwise that is direct's
//
//   winograd   F(4x4, 3x3): 3x3 windows with stride 1 in a quarter of the multiplications, with 10 times the error
//
//   winograd_2x2   F(2x2, 3x3): likewise in 4/9 of the multiplications, with less of an error than oneDNN's plain sums
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

// Channels of x in a group, at most, for the direct gradient to the weight, whose sums take a vector each.
constexpr int64_t kDirectTerms = 16;

enum class ConvAlgorithm { kTorch, kIm2col, kDirect, kDepthwise, kWinograd, kWinograd2x2 };

// In the order of the enum.
constexpr const char* kConvAlgorithmNames[] = {"torch", "im2col", "direct", "depthwise", "winograd", "winograd_2x2"};

// The windows along one direction.  Padding may be larger than the window.
struct ConvAxis {
  int in, out, kernel, stride, pad, dilation;

  // Where tap t of output o is in the input; outside of [0, in) in the padding.
  FASTNORM_HOST_DEVICE int64_t position(int64_t o, int t) const { return o * stride - pad + int64_t(t) * dilation; }
};

// In memory x is [n][groups * ci][y.in][x.in] or, with channels_last, [n][y.in][x.in][groups * ci]; y likewise with co
// and out.  weight is [groups * co][ci][y.kernel][x.kernel], or with weight_channels_last [groups * co][y.kernel]
// [x.kernel][ci], which CUDA kernels do not take; dweight likewise.  All of one dtype.
struct ConvShape {
  int64_t n, groups, ci, co;  // channels of one group
  ConvAxis y, x;
  bool channels_last;
  DType dtype;
  bool weight_channels_last;

  FASTNORM_HOST_DEVICE int taps() const { return y.kernel * x.kernel; }
  FASTNORM_HOST_DEVICE int64_t inputs() const { return n * groups * ci * y.in * x.in; }
  FASTNORM_HOST_DEVICE int64_t outputs() const { return n * groups * co * y.out * x.out; }
  FASTNORM_HOST_DEVICE int64_t weights() const { return groups * co * ci * taps(); }
  FASTNORM_HOST_DEVICE int64_t multiply_adds() const { return outputs() * ci * taps(); }
  // From one number of a weight to that of the next input channel and tap.
  int64_t weight_input() const { return weight_channels_last ? 1 : taps(); }
  int64_t weight_tap() const { return weight_channels_last ? ci : 1; }
  // Windows of 3, 5 or 7 in a row, with as many taps on either side of their middle, in whole steps or every other.
  static constexpr int kMostCentredTaps = 7;
  bool has_centred_rows() const {
    return x.kernel >= 3 && x.kernel <= kMostCentredTaps && y.kernel <= kMostCentredTaps && x.kernel == 2 * x.pad + 1 &&
           x.dilation == 1 && x.stride <= 2;
  }
};

struct Conv2dForward {
  ConvShape shape;
  const void *x, *weight, *bias;  // bias [groups * co] or null
  void* y;
  Activation activation;
  double negative_slope;  // leaky_relu's
  // Where the weight is packed to, as many bytes as ..._packed() says, for other calls too; null: to the workspace.
  void* packed;
  bool is_packed;    // it is there already, and `weight` is not looked at
  void* workspace;   // as many bytes as ..._workspace() says; uninitialised
  int threads = 1;   // at most, for the CPU kernels
  bool tf32;         // whether float32 may be rounded to tf32 in products
  bool* all_finite;  // winograd: made false where a sum is not finite
};

struct Conv2dBackwardInput {
  ConvShape shape;
  const void *dy, *weight;
  void* dx;
  void* workspace;
  int threads = 1;
  bool tf32;         // whether float32 may be rounded to tf32 in products
  bool* all_finite;  // winograd: made false where a sum is not finite
};

struct Conv2dBackwardWeight {
  ConvShape shape;
  const void *x, *dy;
  void *dweight, *dbias;  // dbias may be null
  void* workspace;
  int threads = 1;
  bool tf32;         // whether float32 may be rounded to tf32 in products
  bool* all_finite;  // winograd: made false where a sum is not finite
};

// The kernels of an algorithm, each with the size of the workspace that it needs.
#define FASTNORM_CONV2D_CPU_KERNEL(algorithm, pass, Args)                    \
  FASTNORM_CPU_KERNEL(size_t, conv2d_##algorithm##_##pass##_workspace, Args) \
  FASTNORM_CPU_KERNEL(void, conv2d_##algorithm##_##pass, Args)
#define FASTNORM_CONV2D_CPU_KERNELS(algorithm)                               \
  FASTNORM_CONV2D_CPU_KERNEL(algorithm, forward, Conv2dForward)              \
  FASTNORM_CONV2D_CPU_KERNEL(algorithm, backward_input, Conv2dBackwardInput) \
  FASTNORM_CONV2D_CPU_KERNEL(algorithm, backward_weight, Conv2dBackwardWeight)

namespace cpu {
FASTNORM_CONV2D_CPU_KERNELS(im2col)
FASTNORM_CONV2D_CPU_KERNELS(winograd)
FASTNORM_CONV2D_CPU_KERNELS(winograd_2x2)
FASTNORM_CONV2D_CPU_KERNELS(direct)
FASTNORM_CONV2D_CPU_KERNELS(depthwise)
FASTNORM_CPU_KERNEL(size_t, conv2d_im2col_packed, Conv2dForward)
FASTNORM_CPU_KERNEL(size_t, conv2d_winograd_packed, Conv2dForward)
FASTNORM_CPU_KERNEL(size_t, conv2d_winograd_2x2_packed, Conv2dForward)
}  // namespace cpu

#ifdef FASTNORM_CUDA
namespace cuda {
size_t conv2d_forward_workspace(const Conv2dForward&);
size_t conv2d_backward_input_workspace(const Conv2dBackwardInput&);
size_t conv2d_backward_weight_workspace(const Conv2dBackwardWeight&);
cudaError_t conv2d_forward(const Conv2dForward&, cudaStream_t);
cudaError_t conv2d_backward_input(const Conv2dBackwardInput&, cudaStream_t);
cudaError_t conv2d_backward_weight(const Conv2dBackwardWeight&, cudaStream_t);
}  // namespace cuda
#endif

}  // namespace fastnorm
