// Layer norm and RMS norm in autograd; norm_autograd.h has how.
#ifndef FASTNORM_CUDA_EMULATION
#include "norm_autograd.h"

namespace fastnorm {
namespace {

struct LayerNorm {
  static constexpr const char *kName = "LayerNormBackward", *kForward = "fastnorm::layer_norm_forward",
                              *kBackward = "fastnorm::layer_norm_backward";
  static constexpr bool kSum = true;
  // normalized_shape, dim, rms, eps, activation, negative_slope
  using Config = std::tuple<c10::SymIntArrayRef, int64_t, bool, double, std::string_view, double>;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_forward(
    c10::DispatchKeySet keys, const Tensor& x, const OptionalTensor& addend, const OptionalTensor& residual,
    const OptionalTensor& weight, const OptionalTensor& bias, c10::SymIntArrayRef normalized_shape, int64_t dim,
    bool rms, double eps, std::string_view activation, double negative_slope, bool save_mask) {
  return record<LayerNorm>(
      x, addend, residual, weight, bias, {normalized_shape, dim, rms, eps, activation, negative_slope}, save_mask,
      [&](bool save_mask) {
        static const auto op = find_operator<LayerNormForwardOp>(LayerNorm::kForward);
        return op.redispatch(keys & c10::after_ADInplaceOrView_keyset, x, addend, residual, weight, bias,
                             normalized_shape, dim, rms, eps, activation, negative_slope, save_mask);
      });
}

}  // namespace
}  // namespace fastnorm

TORCH_LIBRARY_IMPL(fastnorm, Autograd, m) {
  m.impl("layer_norm_forward", TORCH_FN(fastnorm::layer_norm_forward));
  m.impl("layer_norm_backward", TORCH_FN(fastnorm::BackwardKernel<fastnorm::LayerNorm>::call));
}
#endif
