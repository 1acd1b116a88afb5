// Max-unpooling in autograd: dx = the elements of dy that x went to.
#ifndef FASTNORM_CUDA_EMULATION
#include "pool_autograd.h"

namespace fastnorm {
namespace {

using UnpoolOp = Tensor(const Tensor&, const Tensor&, c10::SymIntArrayRef);

struct MaxUnpool2dBackward final : torch::autograd::TraceableFunction {
  SavedVariable saved;
  bool released = false;

  std::string name() const override { return "MaxUnpool2dBackward"; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    saved.reset_data();
    released = true;
  }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(!released, torch::autograd::ERR_BACKWARD_TWICE);
    if (!grads[0].defined()) return {Tensor()};
    const Tensor indices = saved.unpack(this->getptr());
    return {gather_planes(grads[0], indices)};
  }
};

Tensor unpool(c10::DispatchKeySet keys, const Tensor& x, const Tensor& indices, c10::SymIntArrayRef output_size) {
  static const auto op = find_operator<UnpoolOp>("fastnorm::max_unpool2d");
  Tensor y = [&] {
    const at::AutoDispatchBelowADInplaceOrView below;
    return op.redispatch(keys & c10::after_ADInplaceOrView_keyset, x, indices, output_size);
  }();
  if (torch::autograd::compute_requires_grad(x)) {
    auto [node, backward] = make_node<MaxUnpool2dBackward>();
    backward->set_next_edges(torch::autograd::collect_next_edges(x));
    torch::autograd::set_history(y, node);
    backward->saved = SavedVariable(indices, false);
  }
  if (torch::autograd::isFwGradDefined(x)) y._set_fw_grad(op.call(x._fw_grad(0), indices, output_size), 0, false);
  return y;
}

}  // namespace
}  // namespace fastnorm

TORCH_LIBRARY_IMPL(fastnorm, Autograd, m) { m.impl("max_unpool2d", TORCH_FN(fastnorm::unpool)); }
#endif
