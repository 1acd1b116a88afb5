// Layer norm and RMS norm, host side: schema, argument checks, allocation, device switch.
#include "layer_norm.h"

#include <torch/library.h>

#include <array>
#include <string_view>
#include <tuple>

#include "norm_host.h"

namespace fastnorm {
namespace {

// The name in messages.
const char* op_name(bool rms) { return rms ? "rms_norm" : "layer_norm"; }

// x as [outer, cols, inner] in the memory format that the kernels read; what is not dense in it is copied.  The
// normalised dimensions are normalized_shape.size() ones from `dim` on, which counts from the end if negative.
struct View {
  View(const Tensor& x, c10::SymIntArrayRef normalized_shape, int64_t dim, const char* op)
      : suggested(x.suggest_memory_format()), format(at::MemoryFormat::Contiguous) {
    const int64_t count = int64_t(normalized_shape.size()), first = dim < 0 ? x.dim() + dim : dim;
    TORCH_CHECK(count >= 1, op, ": normalized_shape must have 1 or more dimensions, got ()");
    bool fits = first >= 0 && first + count <= x.dim();
    for (int64_t d = 0; fits && d < count; d++) fits = x.sym_size(first + d) == normalized_shape[d];
    TORCH_CHECK(fits, op, ": normalized_shape must be the input's shape from dimension ", dim, " on, got ",
                c10::str(normalized_shape), " and an input of shape ", shape_text(x));
    for (int64_t d = 0; d < x.dim(); d++) {
      c10::SymInt& size = d < first ? outer : d < first + count ? cols : inner;
      size = size * x.sym_size(d);
    }
    const bool channels = first == 1 && count == 1 && x.dim() > 2;
    if (channels && suggested != at::MemoryFormat::Contiguous) format = suggested, outer = outer * inner, inner = 1;
  }
  Tensor dense(const Tensor& t) const { return t.contiguous(format); }
  Tensor like(const Tensor& x) const { return empty_tensor(x.sym_sizes(), x.options().memory_format(format)); }
  // Results are channels_last if the input was, whatever the kernels read.
  Tensor restored(const Tensor& t) const { return t.contiguous(suggested); }
  c10::SymInt rows() const { return outer * inner; }
  c10::SymInt mask_bytes() const { return layer_norm_mask_bytes(outer, cols, inner); }

  at::MemoryFormat suggested, format;
  c10::SymInt outer = 1, cols = 1, inner = 1;
};

void check_parameters(const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& x,
                      c10::SymIntArrayRef normalized_shape, const char* op) {
  auto check = [&](const OptionalTensor& t, const char* name) {
    if (!t) return;
    TORCH_CHECK(t->sym_sizes() == normalized_shape, op, ": ", name, " must have normalized_shape ",
                c10::str(normalized_shape), ", got ", shape_text(*t));
    check_same_device(*t, x, op, name);
  };
  check(weight, "weight"), check(bias, "bias");
  check_parameter_dtypes(weight, bias, x, op);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_forward(
    const Tensor& x_in, const OptionalTensor& addend_in, const OptionalTensor& residual_in,
    const OptionalTensor& weight_in, const OptionalTensor& bias_in, c10::SymIntArrayRef normalized_shape, int64_t dim,
    bool rms, double eps, std::string_view activation_name, double negative_slope, bool save_mask) {
  const char* const op = op_name(rms);
  const DType dtype = dtype_of(x_in, op, "input");
  const View view(x_in, normalized_shape, dim, op);
  const Activation activation = activation_of(activation_name, op);
  if (addend_in) check_like(*addend_in, x_in, op, "the tensor to add");
  if (residual_in) check_like(*residual_in, x_in, op, "residual");
  check_parameters(weight_in, bias_in, x_in, normalized_shape, op);

  const Tensor x = view.dense(x_in);
  const auto options = x.options().memory_format(at::MemoryFormat::Contiguous);
  Tensor y = view.like(x);
  Tensor sum = addend_in ? view.like(x) : empty_tensor(0, options);
  Tensor stats = empty_tensor({rms ? 1 : 3, view.rows()}, options.dtype(accumulate_scalar_type(x.scalar_type())));
  Tensor mask = empty_tensor(save_mask ? view.mask_bytes() : 0, options.dtype(at::kByte));
  const Device device = device_of(x, op);
  if (device != Device::kMeta && x.numel() == 0) {
    stats.zero_();
  } else if (device != Device::kMeta) {
    const OptionalTensor addend = addend_in ? OptionalTensor(view.dense(*addend_in)) : addend_in;
    const OptionalTensor residual = residual_in ? OptionalTensor(view.dense(*residual_in)) : residual_in;
    const OptionalTensor weight = contiguous(weight_in), bias = contiguous(bias_in);
    LayerNormForward a{};
    a.outer = view.outer.expect_int(), a.cols = view.cols.expect_int(), a.inner = view.inner.expect_int();
    a.dtype = dtype, a.param_dtype = dtype_of(parameter_scalar_type(weight, bias, x), op, "weight");
    a.rms = rms, a.eps = eps, a.negative_slope = negative_slope, a.activation = activation;
    a.x = x.const_data_ptr(), a.addend = data_or_null(addend), a.residual = data_or_null(residual);
    a.weight = data_or_null(weight), a.bias = data_or_null(bias);
    a.y = y.mutable_data_ptr(), a.sum = data_if(addend.has_value(), sum), a.stats = stats.mutable_data_ptr();
    a.mask = static_cast<uint8_t*>(data_if(save_mask, mask));
    FASTNORM_RUN(layer_norm_forward, a, x, device, op);
  }
  return {view.restored(y), addend_in ? view.restored(sum) : sum, stats, mask};
}

// The gradients that output_mask asks for, of x, residual, weight, bias; the others are empty.  x is the sum where
// there was one, and dsum the gradient of that.
std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_backward(
    const Tensor& dy_in, const Tensor& x_in, const OptionalTensor& residual_in, const OptionalTensor& weight_in,
    const OptionalTensor& bias_in, const Tensor& stats, const OptionalTensor& mask, const OptionalTensor& dsum_in,
    c10::SymIntArrayRef normalized_shape, int64_t dim, bool rms, double /*eps*/, std::string_view activation_name,
    double negative_slope, std::array<bool, 4> output_mask) {
  const char* const op = op_name(rms);
  const DType dtype = dtype_of(x_in, op, "input");
  const View view(x_in, normalized_shape, dim, op);
  check_like(dy_in, x_in, op, "dy");
  if (dsum_in) check_like(*dsum_in, x_in, op, "dsum");
  if (residual_in) check_like(*residual_in, x_in, op, "residual");
  check_parameters(weight_in, bias_in, x_in, normalized_shape, op);
  check_saved(stats, rms ? 1 : 3, view.rows(), mask, view.mask_bytes(), x_in, op);

  const Tensor x = view.dense(x_in);
  const auto options = x.options().memory_format(at::MemoryFormat::Contiguous);
  const auto param_options = options.dtype(parameter_scalar_type(weight_in, bias_in, x));
  const c10::SymInt none = 0;
  Tensor dx = output_mask[0] ? view.like(x) : empty_tensor(0, options);
  Tensor dresidual = output_mask[1] ? view.like(x) : empty_tensor(0, options);
  Tensor dweight = empty_tensor(output_mask[2] ? normalized_shape : c10::SymIntArrayRef(none), param_options);
  Tensor dbias = empty_tensor(output_mask[3] ? normalized_shape : c10::SymIntArrayRef(none), param_options);
  const Device device = device_of(x, op);
  if (device != Device::kMeta && x.numel() == 0) {
    dweight.zero_(), dbias.zero_();
  } else if (device != Device::kMeta) {
    const Tensor dy = view.dense(dy_in);
    const OptionalTensor dsum = dsum_in ? OptionalTensor(view.dense(*dsum_in)) : dsum_in;
    const OptionalTensor residual = residual_in ? OptionalTensor(view.dense(*residual_in)) : residual_in;
    const OptionalTensor weight = contiguous(weight_in), bias = contiguous(bias_in);
    LayerNormBackward a{};
    a.outer = view.outer.expect_int(), a.cols = view.cols.expect_int(), a.inner = view.inner.expect_int();
    a.dtype = dtype, a.param_dtype = dtype_of(parameter_scalar_type(weight, bias, x), op, "weight");
    a.rms = rms, a.negative_slope = negative_slope, a.activation = activation_of(activation_name, op);
    a.dy = dy.const_data_ptr(), a.dsum = data_or_null(dsum), a.x = x.const_data_ptr();
    a.residual = data_or_null(residual), a.weight = data_or_null(weight), a.bias = data_or_null(bias);
    a.stats = stats.const_data_ptr(), a.mask = mask_or_null(mask);
    a.dx = data_if(output_mask[0], dx), a.dresidual = data_if(output_mask[1], dresidual);
    a.dweight = data_if(output_mask[2], dweight), a.dbias = data_if(output_mask[3], dbias);
    FASTNORM_RUN(layer_norm_backward, a, x, device, op);
  }
  return {dx, dresidual, dweight, dbias};
}

}  // namespace
}  // namespace fastnorm

TORCH_LIBRARY_FRAGMENT(FASTNORM_LIBRARY, m) {
  // sum is x + addend, which is what is normalised; empty without an addend.
  m.def(
      "layer_norm_forward(Tensor x, Tensor? addend, Tensor? residual, Tensor? weight, Tensor? bias, "
      "SymInt[] normalized_shape, int dim, bool rms, float eps, str activation, float negative_slope, bool save_mask) "
      "-> (Tensor y, Tensor sum, Tensor stats, Tensor mask)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "layer_norm_backward(Tensor dy, Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor stats, "
      "Tensor? mask, Tensor? dsum, SymInt[] normalized_shape, int dim, bool rms, float eps, str activation, "
      "float negative_slope, bool[4] output_mask) -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(FASTNORM_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("layer_norm_forward", fastnorm::layer_norm_forward);
  m.impl("layer_norm_backward", fastnorm::layer_norm_backward);
}
