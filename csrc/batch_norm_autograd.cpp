// Batch norm in autograd; norm_autograd.h has how.
#ifndef FASTNORM_CUDA_EMULATION
#include "norm_autograd.h"

namespace fastnorm {
namespace {

struct BatchNorm {
  static constexpr const char *kName = "BatchNormBackward", *kForward = "fastnorm::batch_norm_forward",
                              *kBackward = "fastnorm::batch_norm_backward";
  static constexpr bool kSum = false;
  using Config = std::tuple<bool, double, std::string_view, double>;  // training, eps, activation, negative_slope
  static const char* in_place(const auto& config) {
    return std::get<0>(config) ? "fastnorm::batch_norm_backward_" : nullptr;
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
  return record<BatchNorm>(
      x, {}, residual, weight, bias, {training, eps, activation, negative_slope}, save_mask, [&](bool save_mask) {
        static const auto op = find_operator<BatchNormForwardOp>(BatchNorm::kForward, kFrozen ? "frozen" : "");
        return op.redispatch(keys & c10::after_ADInplaceOrView_keyset, x, residual, weight, bias, running_mean,
                             running_var, num_batches_tracked, training, momentum, eps, activation, negative_slope,
                             save_mask);
      });
}

}  // namespace
}  // namespace fastnorm

TORCH_LIBRARY_IMPL(fastnorm, Autograd, m) {
  m.impl("batch_norm_forward", TORCH_FN(fastnorm::batch_norm_forward<false>));
  m.impl("batch_norm_forward.frozen", TORCH_FN(fastnorm::batch_norm_forward<true>));
  m.impl("batch_norm_backward", TORCH_FN(fastnorm::BackwardKernel<fastnorm::BatchNorm>::call));
}
#endif
