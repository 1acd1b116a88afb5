// Convolution in autograd and under autocast, and the entry for Python outside of torch.compile.
//
// Backward keeps x, weight and, for an activation whose derivative is a function of its result, y.  Where a derivative
// of the gradients may be wanted, and for forward mode, they are torch's own operators, which have all of these.
#ifndef FASTNORM_CUDA_EMULATION
#include <ATen/autocast_mode.h>
#include <ATen/ops/elu_backward.h>
#include <ATen/ops/hardtanh_backward.h>
#include <ATen/ops/leaky_relu_backward.h>
#include <ATen/ops/sigmoid_backward.h>
#include <ATen/ops/tanh_backward.h>
#include <ATen/ops/threshold_backward.h>

#include "conv2d_host.h"
#include "norm_autograd.h"
#include "python_ints.h"

namespace fastnorm {
namespace {

using Ints = at::IntArrayRef;
using ForwardOp = Tensor(const Tensor&, const Tensor&, const OptionalTensor&, Ints, Ints, Ints, int64_t,
                         std::string_view, double, std::string_view);
using BackwardOp = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, Ints, Ints, Ints,
                                                      int64_t, std::string_view, std::array<bool, 3>);
constexpr const char *kOp = "conv2d", *kForward = "fastnorm::conv2d_forward", *kBackward = "fastnorm::conv2d_backward";

// Whether the activation's derivative is a function of its result.
bool result_tells_slope(Activation a) {
  switch (a) {
    case Activation::kSilu:
    case Activation::kGelu:
    case Activation::kGeluTanh:
    case Activation::kHardswish: return false;
    default: return true;
  }
}

// dy * activation'(z), from y = activation(z).
Tensor activation_backward(Activation activation, const Tensor& dy, const Tensor& y, double negative_slope) {
  switch (activation) {
    case Activation::kRelu: return at::threshold_backward(dy, y, 0);
    case Activation::kRelu6: return at::hardtanh_backward(dy, y, 0, 6);
    case Activation::kLeakyRelu: return at::leaky_relu_backward(dy, y, negative_slope, true);
    case Activation::kElu: return at::elu_backward(dy, 1, 1, 1, true, y);
    case Activation::kSigmoid: return at::sigmoid_backward(dy, y);
    case Activation::kTanh: return at::tanh_backward(dy, y);
    default: return dy;
  }
}

struct Conv2dBackward final : torch::autograd::TraceableFunction {
  enum Input { kX, kWeight, kBias };
  SavedVariable x, weight, y;
  std::vector<int64_t> stride, padding, dilation;
  int64_t groups;
  Activation activation;
  double negative_slope;
  std::string algorithm;
  bool released = false;

  std::string name() const override { return "Conv2dBackward"; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    x.reset_data(), weight.reset_data(), y.reset_data();
    released = true;
  }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(!released, torch::autograd::ERR_BACKWARD_TWICE);
    if (!grads[0].defined()) return variable_list(3);
    std::array<bool, 3> needs;
    for (int i = 0; i < 3; i++) needs[i] = this->task_should_compute_output(i);
    if (needs == std::array<bool, 3>{}) return variable_list(3);
    const Tensor kept_x = x.unpack(), kept_weight = weight.unpack();
    Tensor dz = grads[0];
    if (activation != Activation::kNone)
      dz = activation_backward(activation, dz, y.unpack(this->getptr()), negative_slope);
    std::tuple<Tensor, Tensor, Tensor> result;
    if (at::GradMode::is_enabled()) {
      result =
          torch_convolution_backward(dz, kept_x, kept_weight, ConvWindow(stride, padding, dilation, groups), needs);
    } else {
      static const auto op = find_operator<BackwardOp>(kBackward);
      const at::AutoDispatchBelowADInplaceOrView below;
      result = op.call(dz, kept_x, kept_weight, stride, padding, dilation, groups, algorithm, needs);
    }
    variable_list out(3);
    if (needs[kX]) out[kX] = std::get<0>(result);
    if (needs[kWeight]) out[kWeight] = std::get<1>(result);
    if (needs[kBias]) out[kBias] = std::get<2>(result);
    return out;
  }
};

Tensor forward(c10::DispatchKeySet keys, const Tensor& x, const Tensor& weight, const OptionalTensor& bias, Ints stride,
               Ints padding, Ints dilation, int64_t groups, std::string_view activation, double negative_slope,
               std::string_view algorithm) {
  const Activation kind = activation_of(activation, kOp);
  auto defined = [](const OptionalTensor& t) { return t && torch::autograd::isFwGradDefined(t); };
  if (defined(x) || defined(weight) || defined(bias)) {
    const ConvWindow window(stride, padding, dilation, groups);
    return torch_activate(kind, torch_convolution(x, weight, bias, window), negative_slope);
  }
  const bool recorded = torch::autograd::compute_requires_grad(x, weight, bias);
  const bool fused = !recorded || result_tells_slope(kind);
  Tensor y = [&] {
    static const auto op = find_operator<ForwardOp>(kForward);
    const at::AutoDispatchBelowADInplaceOrView below;
    return op.redispatch(keys & c10::after_ADInplaceOrView_keyset, x, weight, bias, stride, padding, dilation, groups,
                         fused ? activation : "none", negative_slope, algorithm);
  }();
  if (!recorded) return y;
  auto [node, backward] = make_node<Conv2dBackward>();
  backward->set_next_edges(torch::autograd::collect_next_edges(x, weight, bias));
  backward->stride = stride.vec(), backward->padding = padding.vec(), backward->dilation = dilation.vec();
  backward->groups = groups, backward->algorithm = algorithm;
  backward->activation = fused ? kind : Activation::kNone, backward->negative_slope = negative_slope;
  backward->x = SavedVariable(x, false), backward->weight = SavedVariable(weight, false);
  torch::autograd::set_history(y, node);
  if (backward->activation != Activation::kNone) backward->y = SavedVariable(y, true);
  return fused ? y : torch_activate(kind, y, negative_slope);
}

std::tuple<Tensor, Tensor, Tensor> backward(c10::DispatchKeySet keys, const Tensor& dy, const Tensor& x,
                                            const Tensor& weight, Ints stride, Ints padding, Ints dilation,
                                            int64_t groups, std::string_view algorithm,
                                            std::array<bool, 3> output_mask) {
  auto has_tangent = [](const Tensor& t) { return torch::autograd::isFwGradDefined(t); };
  if (torch::autograd::compute_requires_grad(dy, x, weight) || has_tangent(dy) || has_tangent(x) || has_tangent(weight))
    return torch_convolution_backward(dy, x, weight, ConvWindow(stride, padding, dilation, groups), output_mask);
  static const auto op = find_operator<BackwardOp>(kBackward);
  const at::AutoDispatchBelowADInplaceOrView below;
  return op.redispatch(keys & c10::after_ADInplaceOrView_keyset, dy, x, weight, stride, padding, dilation, groups,
                       algorithm, output_mask);
}

// As torch's own convolution: in the type that autocast is set to.
template <at::DeviceType kDevice>
Tensor autocast(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, Ints stride, Ints padding,
                Ints dilation, int64_t groups, std::string_view activation, double negative_slope,
                std::string_view algorithm) {
  const c10::impl::ExcludeDispatchKeyGuard below(at::autocast::get_autocast_dispatch_key_from_device_type(kDevice));
  const auto dtype = at::autocast::get_autocast_dtype(kDevice);
  auto cast = [&](const Tensor& t) { return at::autocast::cached_cast(dtype, t, kDevice); };
  static const auto op = find_operator<ForwardOp>(kForward);
  return op.call(cast(x), cast(weight), bias ? OptionalTensor(cast(*bias)) : bias, stride, padding, dilation, groups,
                 activation, negative_slope, algorithm);
}

Tensor python(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, pybind11::handle stride_in,
              pybind11::handle padding_in, pybind11::handle dilation_in, int64_t groups, std::string_view activation,
              std::string_view algorithm) {
  const PythonInts stride(stride_in, kOp, "stride"), padding(padding_in, kOp, "padding"),
      dilation(dilation_in, kOp, "dilation");
  static const auto op = find_operator<ForwardOp>(kForward);
  const pybind11::gil_scoped_release release;
  const bool batched = x.dim() != 3;
  const Tensor y = op.call(batched ? x : x.unsqueeze(0), weight, bias, stride, padding, dilation, groups, activation,
                           0.01, algorithm);
  return batched ? y : y.squeeze(0);
}

}  // namespace

void bind_conv2d(pybind11::module_& m) { m.def("conv2d", python, "y of torch.ops.fastnorm.conv2d_forward"); }

}  // namespace fastnorm

TORCH_LIBRARY_IMPL(fastnorm, Autograd, m) {
  m.impl("conv2d_forward", TORCH_FN(fastnorm::forward));
  m.impl("conv2d_backward", TORCH_FN(fastnorm::backward));
}
TORCH_LIBRARY_IMPL(fastnorm, AutocastCPU, m) { m.impl("conv2d_forward", TORCH_FN(fastnorm::autocast<at::kCPU>)); }
TORCH_LIBRARY_IMPL(fastnorm, AutocastCUDA, m) { m.impl("conv2d_forward", TORCH_FN(fastnorm::autocast<at::kCUDA>)); }
#endif
