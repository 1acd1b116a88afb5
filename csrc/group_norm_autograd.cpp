// Group norm and instance norm in autograd; norm_autograd.h has how.
#ifndef FASTNORM_CUDA_EMULATION
#include "norm_autograd.h"

namespace fastnorm {
namespace {

struct GroupNorm {
  static constexpr const char *kName = "GroupNormBackward", *kForward = "fastnorm::group_norm_forward",
                              *kBackward = "fastnorm::group_norm_backward";
  static constexpr bool kSum = false;
  using Config = std::tuple<c10::SymInt, double, std::string_view, double>;  // groups, eps, activation, negative_slope
};

std::tuple<Tensor, Tensor, Tensor> group_norm_forward(c10::DispatchKeySet keys, const Tensor& x,
                                                      const OptionalTensor& residual, const OptionalTensor& weight,
                                                      const OptionalTensor& bias, c10::SymInt groups, double eps,
                                                      std::string_view activation, double negative_slope,
                                                      bool save_mask) {
  return record<GroupNorm>(x, {}, residual, weight, bias, {groups, eps, activation, negative_slope}, save_mask,
                           [&](bool save_mask) {
                             static const auto op = find_operator<GroupNormForwardOp>(GroupNorm::kForward);
                             return op.redispatch(keys & c10::after_ADInplaceOrView_keyset, x, residual, weight, bias,
                                                  groups, eps, activation, negative_slope, save_mask);
                           });
}

}  // namespace
}  // namespace fastnorm

TORCH_LIBRARY_IMPL(fastnorm, Autograd, m) {
  m.impl("group_norm_forward", TORCH_FN(fastnorm::group_norm_forward));
  m.impl("group_norm_backward", TORCH_FN(fastnorm::BackwardKernel<fastnorm::GroupNorm>::call));
}
#endif
