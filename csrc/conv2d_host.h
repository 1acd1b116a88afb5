// What the host files of convolution share: torch's checks, and the activation in torch's operators.
#pragma once
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/elu.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/hardswish.h>
#include <ATen/ops/leaky_relu.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/relu6.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/tanh.h>

#include <array>

#include "conv2d.h"
#include "norm_host.h"

namespace fastnorm {

// stride, padding and dilation of a convolution, height before width.
struct ConvWindow {
  std::array<int64_t, 2> stride, padding, dilation;
  int64_t groups;

  ConvWindow(at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups)
      : stride(pair(stride, "stride")),
        padding(pair(padding, "padding")),
        dilation(pair(dilation, "dilation")),
        groups(groups) {
    TORCH_CHECK(groups > 0, "conv2d: non-positive groups is not supported, got groups=", groups);
    for (int d = 0; d < 2; d++) {
      TORCH_CHECK(this->stride[d] > 0, "conv2d: non-positive stride is not supported, got ", stride);
      TORCH_CHECK(this->padding[d] >= 0, "conv2d: negative padding is not supported, got ", padding);
      TORCH_CHECK(this->dilation[d] > 0, "conv2d: dilation should be greater than zero, got ", dilation);
    }
  }

  static std::array<int64_t, 2> pair(at::IntArrayRef v, const char* name) {
    TORCH_CHECK(v.size() == 1 || v.size() == 2, "conv2d: expected ", name,
                " to be a single integer value or a list of 2 values to match the convolution dimensions, but got ",
                name, "=", v);
    for (const int64_t i : v)
      TORCH_CHECK(i >= std::numeric_limits<int>::min() && i <= std::numeric_limits<int>::max(),
                  "conv2d: integer out of range: ", i);
    return {v.front(), v.back()};
  }

  c10::SymInt output(const c10::SymInt& in, const c10::SymInt& kernel, int d) const {
    return (in + 2 * padding[d] - dilation[d] * (kernel - 1) - 1) / stride[d] + 1;
  }
};

inline Tensor torch_convolution(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                const ConvWindow& w) {
  return at::convolution(x, weight, bias, w.stride, w.padding, w.dilation, false, {0, 0}, w.groups);
}

inline std::tuple<Tensor, Tensor, Tensor> torch_convolution_backward(const Tensor& dy, const Tensor& x,
                                                                     const Tensor& weight, const ConvWindow& w,
                                                                     std::array<bool, 3> mask) {
  const std::array<c10::SymInt, 2> stride{w.stride[0], w.stride[1]}, padding{w.padding[0], w.padding[1]},
      dilation{w.dilation[0], w.dilation[1]}, none{0, 0};
  const std::array<c10::SymInt, 1> bias{weight.sym_size(0)};
  return at::convolution_backward_symint(dy, x, weight, at::OptionalSymIntArrayRef(bias), stride, padding, dilation,
                                         false, none, w.groups, mask);
}

// activation(z), differentiable.
inline Tensor torch_activate(Activation activation, const Tensor& z, double negative_slope) {
  switch (activation) {
    case Activation::kNone: return z;
    case Activation::kRelu: return at::relu(z);
    case Activation::kRelu6: return at::relu6(z);
    case Activation::kLeakyRelu: return at::leaky_relu(z, negative_slope);
    case Activation::kElu: return at::elu(z);
    case Activation::kSigmoid: return at::sigmoid(z);
    case Activation::kTanh: return at::tanh(z);
    case Activation::kSilu: return at::silu(z);
    case Activation::kGelu: return at::gelu(z);
    case Activation::kGeluTanh: return at::gelu(z, "tanh");
    case Activation::kHardswish: return at::hardswish(z);
  }
  return z;
}

}  // namespace fastnorm
