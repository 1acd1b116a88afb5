// Group norm and instance norm, host side: schema, argument checks, allocation, device switch.
#include "group_norm.h"

#include <torch/library.h>

#include <array>
#include <string_view>
#include <tuple>

#include "norm_host.h"

namespace fastnorm {
namespace {

constexpr const char* kOp = "group_norm";

// x as [n, c, hw] with its layout; what is dense in neither way is copied.
struct View {
  View(const Tensor& x, const c10::SymInt& groups)
      : format(x.suggest_memory_format()), channels_last(format != at::MemoryFormat::Contiguous), groups(groups) {
    TORCH_CHECK(x.dim() >= 2, kOp, ": the input must have 2 or more dimensions (N, C, ...), got shape ", shape_text(x));
    n = x.sym_size(0), c = x.sym_size(1);
    for (int64_t d = 2; d < x.dim(); d++) hw = hw * x.sym_size(d);
    if (hw == 1) channels_last = true;  // both layouts are the same memory, and rows are the faster kernel
    TORCH_CHECK(groups > 0, kOp, ": the number of groups must be positive, got ", groups);
    TORCH_CHECK(c % groups == 0, kOp, ": the number of channels must be a multiple of the number of groups, ", groups,
                ", got an input of shape ", shape_text(x));
  }
  Tensor dense(const Tensor& t) const { return t.contiguous(format); }
  Tensor like(const Tensor& x) const { return empty_tensor(x.sym_sizes(), x.options().memory_format(format)); }
  c10::SymInt mask_bytes() const { return group_norm_mask_bytes(n, c, hw, channels_last); }

  at::MemoryFormat format;
  bool channels_last;
  c10::SymInt n, c, hw = 1, groups;
};

template <class Args>
void set_shape(Args& a, const View& view) {
  a.n = view.n.expect_int(), a.c = view.c.expect_int(), a.hw = view.hw.expect_int();
  a.groups = view.groups.expect_int(), a.channels_last = view.channels_last;
}

void check_parameters(const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& x, const View& view) {
  check_channels(weight, x, view.c, kOp, "weight");
  check_channels(bias, x, view.c, kOp, "bias");
  check_parameter_dtypes(weight, bias, x, kOp);
}

std::tuple<Tensor, Tensor, Tensor> group_norm_forward(const Tensor& x_in, const OptionalTensor& residual_in,
                                                      const OptionalTensor& weight_in, const OptionalTensor& bias_in,
                                                      c10::SymInt groups, double eps, std::string_view activation_name,
                                                      double negative_slope, bool save_mask) {
  const DType dtype = dtype_of(x_in, kOp, "input");
  const View view(x_in, groups);
  const Activation activation = activation_of(activation_name, kOp);
  if (residual_in) check_like(*residual_in, x_in, kOp, "residual");
  check_parameters(weight_in, bias_in, x_in, view);

  const Tensor x = view.dense(x_in);
  const auto options = x.options().memory_format(at::MemoryFormat::Contiguous);
  Tensor y = view.like(x);
  Tensor stats = empty_tensor({4, view.n * groups}, options.dtype(accumulate_scalar_type(x.scalar_type())));
  Tensor mask = empty_tensor(save_mask ? view.mask_bytes() : 0, options.dtype(at::kByte));
  const Device device = device_of(x, kOp);
  if (device != Device::kMeta && x.numel() == 0) {
    stats.zero_();
  } else if (device != Device::kMeta) {
    const OptionalTensor residual = residual_in ? OptionalTensor(view.dense(*residual_in)) : residual_in;
    const OptionalTensor weight = contiguous(weight_in), bias = contiguous(bias_in);
    GroupNormForward a{};
    set_shape(a, view);
    a.dtype = dtype, a.param_dtype = dtype_of(parameter_scalar_type(weight, bias, x), kOp, "weight");
    a.eps = eps, a.negative_slope = negative_slope, a.activation = activation;
    a.x = x.const_data_ptr(), a.residual = data_or_null(residual);
    a.weight = data_or_null(weight), a.bias = data_or_null(bias);
    a.y = y.mutable_data_ptr(), a.stats = stats.mutable_data_ptr();
    a.mask = static_cast<uint8_t*>(data_if(save_mask, mask));
    FASTNORM_RUN(group_norm_forward, a, x, device, kOp);
  }
  return {y, stats, mask};
}

// The gradients that output_mask asks for, of x, residual, weight, bias; the others are empty.
std::tuple<Tensor, Tensor, Tensor, Tensor> group_norm_backward(
    const Tensor& dy_in, const Tensor& x_in, const OptionalTensor& residual_in, const OptionalTensor& weight_in,
    const OptionalTensor& bias_in, const Tensor& stats, const OptionalTensor& mask, c10::SymInt groups, double /*eps*/,
    std::string_view activation_name, double negative_slope, std::array<bool, 4> output_mask) {
  const DType dtype = dtype_of(x_in, kOp, "input");
  const View view(x_in, groups);
  check_like(dy_in, x_in, kOp, "dy");
  if (residual_in) check_like(*residual_in, x_in, kOp, "residual");
  check_parameters(weight_in, bias_in, x_in, view);
  check_saved(stats, 4, view.n * groups, mask, view.mask_bytes(), x_in, kOp);

  const Tensor x = view.dense(x_in);
  const auto options = x.options().memory_format(at::MemoryFormat::Contiguous);
  const auto param_options = options.dtype(parameter_scalar_type(weight_in, bias_in, x));
  Tensor dx = output_mask[0] ? view.like(x) : empty_tensor(0, options);
  Tensor dresidual = output_mask[1] ? view.like(x) : empty_tensor(0, options);
  Tensor dweight = empty_tensor(output_mask[2] ? view.c : 0, param_options);
  Tensor dbias = empty_tensor(output_mask[3] ? view.c : 0, param_options);
  const Device device = device_of(x, kOp);
  if (device != Device::kMeta && x.numel() == 0) {
    dweight.zero_(), dbias.zero_();
  } else if (device != Device::kMeta) {
    const Tensor dy = view.dense(dy_in);
    const OptionalTensor residual = residual_in ? OptionalTensor(view.dense(*residual_in)) : residual_in;
    const OptionalTensor weight = contiguous(weight_in), bias = contiguous(bias_in);
    GroupNormBackward a{};
    set_shape(a, view);
    a.dtype = dtype, a.param_dtype = dtype_of(parameter_scalar_type(weight, bias, x), kOp, "weight");
    a.negative_slope = negative_slope, a.activation = activation_of(activation_name, kOp);
    a.dy = dy.const_data_ptr(), a.x = x.const_data_ptr(), a.residual = data_or_null(residual);
    a.weight = data_or_null(weight), a.bias = data_or_null(bias);
    a.stats = stats.const_data_ptr(), a.mask = mask_or_null(mask);
    a.dx = data_if(output_mask[0], dx), a.dresidual = data_if(output_mask[1], dresidual);
    a.dweight = data_if(output_mask[2], dweight), a.dbias = data_if(output_mask[3], dbias);
    FASTNORM_RUN(group_norm_backward, a, x, device, kOp);
  }
  return {dx, dresidual, dweight, dbias};
}

}  // namespace
}  // namespace fastnorm

TORCH_LIBRARY_FRAGMENT(FASTNORM_LIBRARY, m) {
  m.def(
      "group_norm_forward(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, SymInt groups, float eps, "
      "str activation, float negative_slope, bool save_mask) -> (Tensor y, Tensor stats, Tensor mask)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "group_norm_backward(Tensor dy, Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor stats, "
      "Tensor? mask, SymInt groups, float eps, str activation, float negative_slope, bool[4] output_mask) -> "
      "(Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(FASTNORM_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("group_norm_forward", fastnorm::group_norm_forward);
  m.impl("group_norm_backward", fastnorm::group_norm_backward);
}
