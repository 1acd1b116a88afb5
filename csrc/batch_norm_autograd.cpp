// Batch norm in autograd: the operators record their gradients as torch's own do.  A node in C++ costs a tiny batch a
// third of what an autograd.Function in Python does.  (Derivatives of forward mode and torch.func:
// ../fastnorm/batch_norm.py.)
#ifndef FASTNORM_CUDA_EMULATION
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include "torch_utils.h"

namespace fastnorm {
namespace {

using at::Tensor;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;
using NodePointer = decltype(torch::autograd::Edge::function);  // torch 2.13: intrusive; before: std::shared_ptr

using Forward = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const OptionalTensor&, const OptionalTensor&,
                                                   const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                                                   const OptionalTensor&, bool, std::optional<double>, double,
                                                   std::string_view, double, bool);
using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const OptionalTensor&,
                                                            const OptionalTensor&, const OptionalTensor&, const Tensor&,
                                                            const OptionalTensor&, bool, double, std::string_view,
                                                            double, std::array<bool, 4>);

template <class Signature>
c10::TypedOperatorHandle<Signature> find_operator(const char* name, const char* overload = "") {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, overload).typed<Signature>();
}

template <class Node, class Pointer = NodePointer>
std::pair<Pointer, Node*> make_node() {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>) {
    auto* const node = new Node;
    return {Pointer(node, [](auto* n) { deleteNode(n); }), node};
  } else {
    auto node = c10::make_intrusive<Node>();
    auto* const raw = node.get();
    return {std::move(node), raw};
  }
}

struct BatchNormBackward final : torch::autograd::TraceableFunction {
  enum Input { kX, kResidual, kWeight, kBias, kStats, kMask, kInputs };
  SavedVariable saved[kInputs];
  bool training, released = false;
  double eps, negative_slope;
  std::string activation;

  std::string name() const override { return "BatchNormBackward"; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& s : saved) s.reset_data();
    released = true;
  }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(!released, torch::autograd::ERR_BACKWARD_TWICE);
    variable_list out(4);
    const Tensor& dy = grads[0];
    if (!dy.defined()) return out;
    auto optional = [](Tensor t) { return t.defined() ? OptionalTensor(std::move(t)) : OptionalTensor(); };
    const Tensor x = saved[kX].unpack(), stats = saved[kStats].unpack();
    const OptionalTensor residual = optional(saved[kResidual].unpack()), weight = optional(saved[kWeight].unpack()),
                         bias = optional(saved[kBias].unpack()), mask = optional(saved[kMask].unpack());
    std::array<bool, 4> needs;
    for (int i = 0; i < 4; i++) needs[i] = task_should_compute_output(i);
    if (needs[kResidual] && activation == "none") needs[kResidual] = false, out[kResidual] = dy;
    if (needs == std::array<bool, 4>{}) return out;
    static const auto op = find_operator<Backward>("fastnorm::batch_norm_backward");
    std::optional<at::AutoDispatchBelowADInplaceOrView> below;
    if (!at::GradMode::is_enabled()) below.emplace();
    auto result = op.call(dy, x, residual, weight, bias, stats, mask, training, eps, activation, negative_slope, needs);
    if (needs[kX]) out[kX] = std::move(std::get<0>(result));
    if (needs[kResidual]) out[kResidual] = std::move(std::get<1>(result));
    if (needs[kWeight]) out[kWeight] = std::move(std::get<2>(result));
    if (needs[kBias]) out[kBias] = std::move(std::get<3>(result));
    return out;
  }
};

void check_constant(const OptionalTensor& t, const char* name) {
  TORCH_CHECK(!t || !t->requires_grad() || !at::GradMode::is_enabled(), "batch_norm: ", name,
              " must not require a gradient: batch_norm is not differentiable in it");
}

template <bool kFrozen>
std::tuple<Tensor, Tensor, Tensor> batch_norm_forward(
    c10::DispatchKeySet keys, const Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& running_mean, const OptionalTensor& running_var,
    const OptionalTensor& num_batches_tracked, bool training, std::optional<double> momentum, double eps,
    std::string_view activation, double negative_slope, bool save_mask) {
  check_constant(running_mean, "running_mean"), check_constant(running_var, "running_var");
  for (const auto& t : {OptionalTensor(x), residual, weight, bias})
    TORCH_CHECK_NOT_IMPLEMENTED(!torch::autograd::isFwGradDefined(t),
                                "torch.ops.fastnorm.batch_norm_forward has no forward-mode derivative; "
                                "fastnorm.functional.batch_norm has");
  NodePointer node;
  BatchNormBackward* backward = nullptr;
  if (torch::autograd::compute_requires_grad(x, residual, weight, bias)) {
    std::tie(node, backward) = make_node<BatchNormBackward>();
    backward->set_next_edges(torch::autograd::collect_next_edges(x, residual, weight, bias));
    const Activation kind = activation_of(activation, "batch_norm");
    save_mask = residual && has_two_slopes(kind);
    backward->saved[0] = SavedVariable(x, false);
    // A linear end or a mask leaves nothing to recompute from the residual.
    if (residual && !save_mask && kind != Activation::kNone) backward->saved[1] = SavedVariable(residual, false);
    backward->saved[2] = SavedVariable(weight, false), backward->saved[3] = SavedVariable(bias, false);
    backward->training = training, backward->eps = eps, backward->negative_slope = negative_slope;
    backward->activation = activation;
  }
  static const auto op = find_operator<Forward>("fastnorm::batch_norm_forward", kFrozen ? "frozen" : "");
  auto result = [&] {
    const at::AutoDispatchBelowADInplaceOrView below;
    return op.redispatch(keys & c10::after_ADInplaceOrView_keyset, x, residual, weight, bias, running_mean, running_var,
                         num_batches_tracked, training, momentum, eps, activation, negative_slope, save_mask);
  }();
  if (node) {
    torch::autograd::set_history(std::get<0>(result), node);
    backward->saved[4] = SavedVariable(std::get<1>(result), false);
    if (save_mask) backward->saved[5] = SavedVariable(std::get<2>(result), false);
  }
  return result;
}

// Where its own gradient is wanted, the operator is written in torch's operators (fastnorm/batch_norm.py).
std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_backward(c10::DispatchKeySet keys, const Tensor& dy,
                                                               const Tensor& x, const OptionalTensor& residual,
                                                               const OptionalTensor& weight, const OptionalTensor& bias,
                                                               const Tensor& stats, const OptionalTensor& mask,
                                                               bool training, double eps, std::string_view activation,
                                                               double negative_slope, std::array<bool, 4> output_mask) {
  if (torch::autograd::compute_requires_grad(dy, x, residual, weight, bias)) {
    static const auto op = find_operator<Backward>("fastnorm::batch_norm_backward_recorded");
    return op.call(dy, x, residual, weight, bias, stats, mask, training, eps, activation, negative_slope, output_mask);
  }
  static const auto op = find_operator<Backward>("fastnorm::batch_norm_backward");
  const at::AutoDispatchBelowADInplaceOrView below;
  return op.redispatch(keys & c10::after_ADInplaceOrView_keyset, dy, x, residual, weight, bias, stats, mask, training,
                       eps, activation, negative_slope, output_mask);
}

}  // namespace
}  // namespace fastnorm

TORCH_LIBRARY_IMPL(fastnorm, Autograd, m) {
  m.impl("batch_norm_forward", TORCH_FN(fastnorm::batch_norm_forward<false>));
  m.impl("batch_norm_forward.frozen", TORCH_FN(fastnorm::batch_norm_forward<true>));
  m.impl("batch_norm_backward", TORCH_FN(fastnorm::batch_norm_backward));
}
#endif
