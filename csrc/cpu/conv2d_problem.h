// What a convolution's kernels that compute the gradient to the input as a convolution, too, see of either.
#pragma once
#include "../conv2d.h"

namespace fastnorm::cpu::CPU_CAPABILITY {

struct ConvProblem {
  ConvShape shape;
  bool backward;
  const void *in, *weight, *bias;
  void* out;
  Activation activation;
  double slope;
  void* workspace;
  int threads;
};

inline ConvProblem problem(const Conv2dForward& a) {
  return {a.shape, false, a.x, a.weight, a.bias, a.y, a.activation, a.negative_slope, a.workspace, a.threads};
}
inline ConvProblem problem(const Conv2dBackwardInput& a) {
  return {a.shape, true, a.dy, a.weight, nullptr, a.dx, Activation::kNone, 0, a.workspace, a.threads};
}

}  // namespace fastnorm::cpu::CPU_CAPABILITY
