// The norms in autograd: the operators record their gradients as torch's own do.  A node in C++ costs a tiny batch a
// third of what an autograd.Function in Python does.  (Derivatives of forward mode and torch.func:
// ../fastnorm/transforms.py.)
#pragma once
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include <array>
#include <string>
#include <tuple>
#include <vector>

#include "torch_utils.h"

namespace fastnorm {

using at::Tensor;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;
using NodePointer = decltype(torch::autograd::Edge::function);  // torch 2.13: intrusive; before: std::shared_ptr

template <class Signature>
c10::TypedOperatorHandle<Signature> find_operator(const char* name, const char* overload = "") {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, overload).typed<Signature>();
}

// The forward operators' signatures.
using BatchNormForwardOp = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const OptionalTensor&,
                                                              const OptionalTensor&, const OptionalTensor&,
                                                              const OptionalTensor&, const OptionalTensor&,
                                                              const OptionalTensor&, bool, std::optional<double>,
                                                              double, std::string_view, double, bool);
using LayerNormForwardOp = std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor&, const OptionalTensor&,
                                                                      const OptionalTensor&, const OptionalTensor&,
                                                                      const OptionalTensor&, c10::SymIntArrayRef,
                                                                      int64_t, bool, double, std::string_view, double,
                                                                      bool);
using GroupNormForwardOp = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const OptionalTensor&,
                                                              const OptionalTensor&, const OptionalTensor&, c10::SymInt,
                                                              double, std::string_view, double, bool);

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

// What a node keeps of an operator's argument.
template <class T>
T stored(T v) {
  return v;
}
inline std::string stored(std::string_view v) { return std::string(v); }
inline std::vector<c10::SymInt> stored(c10::SymIntArrayRef v) { return v.vec(); }

// A tensor of numbers in memory, whose operators nobody looks at.
inline bool is_plain(const Tensor& t) {
  using c10::DispatchKey;
  constexpr c10::DispatchKeySet kWrappers({DispatchKey::Python, DispatchKey::Functionalize, DispatchKey::Batched,
                                           DispatchKey::FuncTorchBatched, DispatchKey::FuncTorchGradWrapper});
  return t.is_cpu() && t.has_storage() && !t.key_set().has_any(kWrappers) && !c10::impl::dispatch_mode_enabled();
}

// Whether a gradient that the engine has passed is nobody else's and may be written over, as torch's own sums of
// gradients are: then it becomes the gradient to x, which the kernels read as it lies.
inline bool may_become_dx(const Tensor& dy, const Tensor& x) {
  return !at::GradMode::is_enabled() && is_plain(dy) && is_plain(x) && dy.use_count() == 1 &&
         dy.storage().use_count() == 1 && dy.scalar_type() == x.scalar_type() && dy.sizes() == x.sizes() &&
         dy.strides() == x.strides() && x.is_contiguous(x.suggest_memory_format());
}

// Op says what is special about a norm:
//   kName, kForward, kBackward   of the node and of the operators
//   in_place(config)             a backward operator that writes dx to dy, or null; not if none does
//   kSum                         the operator takes an addend too and has x + addend as its second output
//   Config                       std::tuple of what the backward operator takes between the tensors and output_mask,
//                                which ends with activation and negative_slope
template <class Op>
struct NormBackward final : torch::autograd::TraceableFunction {
  using Tensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;

  template <class Config>
  struct Types;
  template <class... C>
  struct Types<std::tuple<C...>> {
    using Stored = std::tuple<decltype(stored(std::declval<C>()))...>;
    using Plain = Tensors(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                          const OptionalTensor&, const Tensor&, const OptionalTensor&, C..., std::array<bool, 4>);
    using WithSum = Tensors(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                            const OptionalTensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&, C...,
                            std::array<bool, 4>);
    using Backward = std::conditional_t<Op::kSum, WithSum, Plain>;
    using InPlace = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const OptionalTensor&,
                                                       const OptionalTensor&, const OptionalTensor&, const Tensor&,
                                                       const OptionalTensor&, C..., std::array<bool, 4>);
  };
  using Backward = typename Types<typename Op::Config>::Backward;
  using InPlace = typename Types<typename Op::Config>::InPlace;
  using Config = typename Types<typename Op::Config>::Stored;

  enum Input { kX, kResidual, kWeight, kBias, kStats, kMask, kInputs };
  enum Gradient { kGradients = 4, kAddend = 4 };
  SavedVariable saved[kInputs];
  Config config;
  bool released = false;

  std::string name() const override { return Op::kName; }
  const std::string& activation() const { return std::get<std::tuple_size_v<Config> - 2>(config); }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& s : saved) s.reset_data();
    released = true;
  }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(!released, torch::autograd::ERR_BACKWARD_TWICE);
    variable_list out(this->num_outputs());
    const Tensor& dy = grads[0];
    OptionalTensor dsum;
    if constexpr (Op::kSum)
      if (grads[1].defined()) dsum = grads[1];
    auto give_dx = [&](const Tensor& dx) {
      out[kX] = dx;
      if (out.size() > kAddend) out[kAddend] = dx;
    };
    if (!dy.defined()) {
      if (dsum) give_dx(*dsum);
      return out;
    }
    auto unpack = [&](Input i) { return saved[i].unpack(this->getptr()); };
    auto optional = [&](Input i) {
      Tensor t = unpack(i);
      return t.defined() ? OptionalTensor(std::move(t)) : OptionalTensor();
    };
    const Tensor x = unpack(kX), stats = unpack(kStats);
    const OptionalTensor residual = optional(kResidual), weight = optional(kWeight), bias = optional(kBias),
                         mask = optional(kMask);
    std::array<bool, kGradients> needs;
    for (int i = 0; i < kGradients; i++) needs[i] = this->task_should_compute_output(i);
    if (out.size() > kAddend) needs[kX] = needs[kX] || this->task_should_compute_output(kAddend);
    if (needs[kResidual] && activation() == "none") needs[kResidual] = false, out[kResidual] = dy;
    if (needs == std::array<bool, kGradients>{}) return out;
    std::optional<at::AutoDispatchBelowADInplaceOrView> below;
    if (!at::GradMode::is_enabled()) below.emplace();
    static const auto op = find_operator<Backward>(Op::kBackward);
    auto result = std::apply(
        [&](const auto&... c) {
          if constexpr (requires { Op::in_place(config); })
            if (const char* const name = Op::in_place(config); name && needs[kX] && may_become_dx(dy, x)) {
              static const auto in_place = find_operator<InPlace>(name);
              return std::tuple_cat(std::tuple(dy),
                                    in_place.call(dy, x, residual, weight, bias, stats, mask, c..., needs));
            }
          if constexpr (Op::kSum)
            return op.call(dy, x, residual, weight, bias, stats, mask, dsum, c..., needs);
          else
            return op.call(dy, x, residual, weight, bias, stats, mask, c..., needs);
        },
        config);
    if (needs[kX]) give_dx(std::get<0>(result));
    if (needs[kResidual]) out[kResidual] = std::move(std::get<1>(result));
    if (needs[kWeight]) out[kWeight] = std::move(std::get<2>(result));
    if (needs[kBias]) out[kBias] = std::move(std::get<3>(result));
    return out;
  }
};

// A forward call: calls forward(save_mask), the operator below autograd, and records what its gradients need.  Returns
// what that returns, a tuple that begins with y, then x + addend if Op::kSum, and ends with stats and mask.
template <class Op, class Forward>
auto record(const Tensor& x, const OptionalTensor& addend, const OptionalTensor& residual, const OptionalTensor& weight,
            const OptionalTensor& bias, typename Op::Config config, bool save_mask, Forward forward) {
  using Node = NormBackward<Op>;
  for (const auto& t : {OptionalTensor(x), addend, residual, weight, bias})
    TORCH_CHECK_NOT_IMPLEMENTED(!torch::autograd::isFwGradDefined(t), "torch.ops.", Op::kForward,
                                " has no forward-mode derivative; fastnorm.functional has");
  NodePointer node;
  Node* backward = nullptr;
  if (torch::autograd::compute_requires_grad(x, addend, residual, weight, bias)) {
    std::tie(node, backward) = make_node<Node>();
    backward->set_next_edges(addend ? torch::autograd::collect_next_edges(x, residual, weight, bias, addend)
                                    : torch::autograd::collect_next_edges(x, residual, weight, bias));
    backward->config = std::apply([](const auto&... c) { return typename Node::Config(stored(c)...); }, config);
    const Activation kind = activation_of(backward->activation(), Op::kName);
    save_mask = residual && has_two_slopes(kind);
    // A linear end or a mask leaves nothing to recompute from the residual.
    if (residual && !save_mask && kind != Activation::kNone)
      backward->saved[Node::kResidual] = SavedVariable(residual, false);
    if (!addend) backward->saved[Node::kX] = SavedVariable(x, false);
    backward->saved[Node::kWeight] = SavedVariable(weight, false);
    backward->saved[Node::kBias] = SavedVariable(bias, false);
  }
  auto result = [&] {
    const at::AutoDispatchBelowADInplaceOrView below;
    return forward(save_mask);
  }();
  if (node) {
    constexpr int kLast = std::tuple_size_v<decltype(result)> - 1;
    torch::autograd::set_history(std::get<0>(result), node);
    if constexpr (Op::kSum) {
      if (addend) {
        torch::autograd::set_history(std::get<1>(result), node);
        backward->saved[Node::kX] = SavedVariable(std::get<1>(result), true);
      } else {
        node->add_input_metadata(torch::autograd::Node::undefined_input());
      }
    }
    backward->saved[Node::kStats] = SavedVariable(std::get<kLast - 1>(result), false);
    if (save_mask) backward->saved[Node::kMask] = SavedVariable(std::get<kLast>(result), false);
  }
  return result;
}

// The backward operator where its own gradient may be wanted: then it is written in torch's operators
// (../fastnorm/transforms.py).
template <class Op, class Signature = typename NormBackward<Op>::Backward>
struct BackwardKernel;
template <class Op, class... Args>
struct BackwardKernel<Op, typename NormBackward<Op>::Tensors(Args...)> {
  static auto call(c10::DispatchKeySet keys, Args... args) {
    const auto all = std::tie(args...);
    OptionalTensor dsum;
    if constexpr (Op::kSum) dsum = std::get<7>(all);
    if (torch::autograd::compute_requires_grad(std::get<0>(all), std::get<1>(all), std::get<2>(all), std::get<3>(all),
                                               std::get<4>(all), dsum)) {
      static const auto recorded =
          find_operator<typename NormBackward<Op>::Backward>((std::string(Op::kBackward) + "_recorded").c_str());
      return recorded.call(args...);
    }
    static const auto op = find_operator<typename NormBackward<Op>::Backward>(Op::kBackward);
    const at::AutoDispatchBelowADInplaceOrView below;
    return op.redispatch(keys & c10::after_ADInplaceOrView_keyset, args...);
  }
};

}  // namespace fastnorm
