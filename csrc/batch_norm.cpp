// Batch norm, host side: schema, argument checks, allocation, device switch.
#include "batch_norm.h"

#include <torch/library.h>

#include <array>
#include <string_view>
#include <tuple>

#include "norm_host.h"

namespace fastnorm {
namespace {

constexpr const char* kOp = "batch_norm";

// x as [n, c, hw] with its layout; what is dense in neither way is copied.
struct View {
  explicit View(const Tensor& x)
      : format(x.suggest_memory_format()), channels_last(format != at::MemoryFormat::Contiguous) {
    n = 1, c = 0, hw = 1;
    if (x.dim() == 1 && x.sym_size(0) == 0) return;  // as torch
    TORCH_CHECK_INDEX(x.dim() >= 2, kOp, ": the input must have 2 or more dimensions (N, C, ...), got shape ",
                      shape_text(x));
    n = x.sym_size(0), c = x.sym_size(1);
    for (int64_t d = 2; d < x.dim(); d++) hw = hw * x.sym_size(d);
    if (hw == 1) channels_last = true;  // both layouts are the same memory, and rows are the faster kernel
  }
  Tensor dense(const Tensor& t) const { return t.contiguous(format); }
  Tensor like(const Tensor& x) const { return empty_tensor(x.sym_sizes(), x.options().memory_format(format)); }
  // How many elements lie between two samples of t or, channels_last, two pixels, if it is dense but for those, as a
  // slice of channels is.
  std::optional<int64_t> gap(const Tensor& t) const {
    int64_t dense = 1;  // the stride that the next dimension has if nothing lies between
    std::optional<int64_t> gap;
    for (int64_t i = 0, dims = t.dim(); i < dims; i++) {
      const int64_t of_rows = i == 0 ? 1 : i == dims - 1 ? 0 : dims - i;  // from the inside out
      const int64_t d = channels_last ? of_rows : dims - 1 - i;
      if (t.size(d) == 1) continue;
      if (!gap && (channels_last ? i > 0 : d == 0)) gap = t.stride(d) - dense, dense = t.stride(d);
      if (t.stride(d) != dense) return std::nullopt;
      dense *= t.size(d);
    }
    return gap && *gap > 0 ? gap : std::nullopt;
  }
  c10::SymInt mask_bytes() const { return batch_norm_mask_bytes(n, c, hw, channels_last); }

  at::MemoryFormat format;
  bool channels_last;
  c10::SymInt n, c, hw;
};

void check_parameters(const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& x, const c10::SymInt& c) {
  check_channels(weight, x, c, kOp, "weight");
  check_channels(bias, x, c, kOp, "bias");
  check_parameter_dtypes(weight, bias, x, kOp);
}

// in_place: y is x itself where the kernels can write to it.
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x_in, const OptionalTensor& residual_in,
                                           const OptionalTensor& weight_in, const OptionalTensor& bias_in,
                                           const OptionalTensor& running_mean, const OptionalTensor& running_var,
                                           const OptionalTensor& num_batches_tracked, bool training,
                                           std::optional<double> momentum, double eps, std::string_view activation_name,
                                           double negative_slope, bool save_mask, bool in_place) {
  const View view(x_in);
  const DType dtype = dtype_of(x_in, kOp, "input");
  const Activation activation = activation_of(activation_name, kOp);
  if (residual_in) check_like(*residual_in, x_in, kOp, "residual");
  check_parameters(weight_in, bias_in, x_in, view.c);
  check_channels(running_mean, x_in, view.c, kOp, "running_mean");
  check_channels(running_var, x_in, view.c, kOp, "running_var");
  TORCH_CHECK(training || (running_mean && running_var), kOp,
              ": running_mean and running_var must be given in evaluation mode, got None");
  TORCH_CHECK_VALUE(running_mean.has_value() == running_var.has_value(), kOp,
                    ": running_mean and running_var must both be given or both be None");
  if (running_mean) {
    dtype_of(*running_mean, kOp, "running_mean");
    TORCH_CHECK(running_mean->scalar_type() == running_var->scalar_type(), kOp,
                ": running_mean and running_var must have one dtype, got ", dtype_text(running_mean->scalar_type()),
                " and ", dtype_text(running_var->scalar_type()));
  }
  TORCH_CHECK(!num_batches_tracked ||
                  (num_batches_tracked->scalar_type() == at::kLong && num_batches_tracked->sym_numel() == 1),
              kOp, ": num_batches_tracked must be one int64");
  TORCH_CHECK(!training || !running_mean || momentum || num_batches_tracked, kOp,
              ": momentum=None averages over num_batches_tracked, which is None");

  const Device device = device_of(x_in, kOp);
  const bool dense = x_in.is_contiguous(view.format);
  // What is read once is read where it lies.
  const auto gap = !training && !dense && device == Device::kCpu ? view.gap(x_in) : std::nullopt;
  const Tensor x = gap ? x_in : view.dense(x_in);
  const OptionalTensor residual = residual_in ? OptionalTensor(view.dense(*residual_in)) : residual_in;
  const auto options = x.options().memory_format(at::MemoryFormat::Contiguous);
  Tensor y = in_place && device == Device::kCpu && dense ? x_in : view.like(x);
  Tensor stats = empty_tensor({3, view.c}, options.dtype(accumulate_scalar_type(x.scalar_type())));
  Tensor mask = empty_tensor(save_mask ? view.mask_bytes() : 0, options.dtype(at::kByte));
  if (device == Device::kMeta) return {y, stats, mask};

  auto finish = [&] {
    for (const auto& t : {running_mean, running_var, num_batches_tracked})
      if (training && t) t->unsafeGetTensorImpl()->bump_version();
    return std::tuple(y, stats, mask);
  };
  if (x.numel() == 0) {  // no statistics, so the running ones stay as they are; the batch counts, as in torch
    stats.zero_();
    if (training && num_batches_tracked) num_batches_tracked->add_(1);
    return finish();
  }

  const OptionalTensor weight = contiguous(weight_in), bias = contiguous(bias_in);
  const OptionalTensor mean = contiguous(running_mean), var = contiguous(running_var);
  BatchNormForward a{};
  a.n = view.n.expect_int(), a.c = view.c.expect_int(), a.hw = view.hw.expect_int(),
  a.channels_last = view.channels_last;
  a.dtype = dtype;
  a.param_dtype = dtype_of(parameter_scalar_type(weight, bias, x), kOp, "weight");
  if (running_mean) a.running_dtype = dtype_of(*running_mean, kOp, "running_mean");
  a.training = training, a.cumulative = !momentum, a.momentum = momentum.value_or(0), a.eps = eps;
  a.negative_slope = negative_slope, a.activation = activation;
  a.x = x.const_data_ptr(), a.x_gap = gap.value_or(0), a.residual = data_or_null(residual);
  a.weight = data_or_null(weight), a.bias = data_or_null(bias);
  a.running_mean = mutable_data_or_null(mean), a.running_var = mutable_data_or_null(var);
  a.num_batches_tracked = static_cast<int64_t*>(mutable_data_or_null(num_batches_tracked));
  a.y = y.mutable_data_ptr(), a.stats = stats.mutable_data_ptr();
  a.mask = save_mask ? static_cast<uint8_t*>(mask.mutable_data_ptr()) : nullptr;
  FASTNORM_RUN(batch_norm_forward, a, x, device, kOp);
  if (training && running_mean && !mean->is_same(*running_mean)) running_mean->copy_(*mean);
  if (training && running_var && !var->is_same(*running_var)) running_var->copy_(*var);
  return finish();
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_forward(
    const Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& running_mean, const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
    bool training, std::optional<double> momentum, double eps, std::string_view activation, double negative_slope,
    bool save_mask) {
  return forward(x, residual, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps,
                 activation, negative_slope, save_mask, false);
}

// In evaluation mode, y in the place of x: no fresh memory, whose pages cost more than the arithmetic.
void batch_norm_inference_(const Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
                           const OptionalTensor& bias, const Tensor& running_mean, const Tensor& running_var,
                           double eps, std::string_view activation, double negative_slope) {
  const Tensor y = std::get<0>(forward(x, residual, weight, bias, running_mean, running_var, {}, false, {}, eps,
                                       activation, negative_slope, false, true));
  if (!y.is_same(x)) x.copy_(y);
  x.unsafeGetTensorImpl()->bump_version();
}

// Of this batch alone, for statistics over several batches: float64 [2, c], mean and unbiased variance.
Tensor batch_norm_statistics(const Tensor& x_in) {
  const View view(x_in);
  const DType dtype = dtype_of(x_in, kOp, "input");
  const Tensor x = view.dense(x_in);
  const auto options = x.options().memory_format(at::MemoryFormat::Contiguous);
  Tensor moments = empty_tensor({2, view.c}, options.dtype(at::kDouble));
  const Device device = device_of(x, kOp);
  if (device == Device::kMeta) return moments;
  moments.zero_();
  if (x.numel() == 0) return moments;
  const Tensor stats = empty_tensor({3, view.c}, options.dtype(accumulate_scalar_type(x.scalar_type())));
  BatchNormForward a{};
  a.n = view.n.expect_int(), a.c = view.c.expect_int(), a.hw = view.hw.expect_int();
  a.channels_last = view.channels_last, a.dtype = dtype, a.param_dtype = accumulate_type(dtype);
  a.training = true, a.momentum = 1, a.activation = Activation::kNone;
  a.running_dtype = DType::kFloat64;
  a.running_mean = moments.mutable_data_ptr();
  a.running_var = static_cast<double*>(a.running_mean) + a.c;
  a.x = x.const_data_ptr(), a.stats = stats.mutable_data_ptr();
  FASTNORM_RUN(batch_norm_forward, a, x, device, kOp);
  return moments;
}

// The gradients that output_mask asks for, of x, residual, weight, bias; the others are empty.  in_place: dx is dy
// itself where the kernels can write to it.
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& dy_in, const Tensor& x_in,
                                                    const OptionalTensor& residual_in, const OptionalTensor& weight_in,
                                                    const OptionalTensor& bias_in, const Tensor& stats,
                                                    const OptionalTensor& mask, const OptionalTensor& means,
                                                    bool training, std::string_view activation_name,
                                                    double negative_slope, std::array<bool, 4> output_mask,
                                                    bool in_place = false) {
  const View view(x_in);
  const DType dtype = dtype_of(x_in, kOp, "input");
  check_like(dy_in, x_in, kOp, "dy");
  if (residual_in) check_like(*residual_in, x_in, kOp, "residual");
  check_parameters(weight_in, bias_in, x_in, view.c);
  check_saved(stats, 3, view.c, mask, view.mask_bytes(), x_in, kOp);

  const Tensor x = view.dense(x_in);
  const auto options = x.options().memory_format(at::MemoryFormat::Contiguous);
  const auto param_options = options.dtype(parameter_scalar_type(weight_in, bias_in, x));
  const Device device = device_of(x, kOp);
  in_place = in_place && output_mask[0] && training && device == Device::kCpu && dy_in.is_contiguous(view.format);
  Tensor dx = in_place ? dy_in : output_mask[0] ? view.like(x) : empty_tensor(0, options);
  Tensor dresidual = output_mask[1] ? view.like(x) : empty_tensor(0, options);
  Tensor dweight = empty_tensor(output_mask[2] ? view.c : 0, param_options);
  Tensor dbias = empty_tensor(output_mask[3] ? view.c : 0, param_options);
  if (device == Device::kMeta) return {dx, dresidual, dweight, dbias};
  if (x.numel() == 0) {
    dweight.zero_(), dbias.zero_();
    return {dx, dresidual, dweight, dbias};
  }

  const Tensor dy = view.dense(dy_in);
  const OptionalTensor residual = residual_in ? OptionalTensor(view.dense(*residual_in)) : residual_in;
  const OptionalTensor weight = contiguous(weight_in), bias = contiguous(bias_in);
  BatchNormBackward a{};
  a.n = view.n.expect_int(), a.c = view.c.expect_int(), a.hw = view.hw.expect_int(),
  a.channels_last = view.channels_last;
  a.dtype = dtype;
  a.param_dtype = dtype_of(parameter_scalar_type(weight, bias, x), kOp, "weight");
  a.training = training, a.negative_slope = negative_slope, a.activation = activation_of(activation_name, kOp);
  a.dy = dy.const_data_ptr(), a.x = x.const_data_ptr(), a.residual = data_or_null(residual);
  a.weight = data_or_null(weight), a.bias = data_or_null(bias), a.stats = stats.const_data_ptr();
  a.mask = mask_or_null(mask), a.means = static_cast<const double*>(data_or_null(means));
  a.dx = data_if(output_mask[0], dx), a.dresidual = data_if(output_mask[1], dresidual);
  a.dweight = data_if(output_mask[2], dweight), a.dbias = data_if(output_mask[3], dbias);
  FASTNORM_RUN(batch_norm_backward, a, x, device, kOp);
  return {dx, dresidual, dweight, dbias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_backward(
    const Tensor& dy, const Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
    const OptionalTensor& bias, const Tensor& stats, const OptionalTensor& mask, bool training, double /*eps*/,
    std::string_view activation, double negative_slope, std::array<bool, 4> output_mask) {
  return backward(dy, x, residual, weight, bias, stats, mask, {}, training, activation, negative_slope, output_mask);
}

// dx in the place of dy: no fresh memory, as in batch_norm_inference_.
std::tuple<Tensor, Tensor, Tensor> batch_norm_backward_(const Tensor& dy, const Tensor& x,
                                                        const OptionalTensor& residual, const OptionalTensor& weight,
                                                        const OptionalTensor& bias, const Tensor& stats,
                                                        const OptionalTensor& mask, bool training, double /*eps*/,
                                                        std::string_view activation, double negative_slope,
                                                        std::array<bool, 4> output_mask) {
  output_mask[0] = true;
  auto [dx, dresidual, dweight, dbias] =
      backward(dy, x, residual, weight, bias, stats, mask, {}, training, activation, negative_slope, output_mask, true);
  if (!dx.is_same(dy)) dy.copy_(dx);
  dy.unsafeGetTensorImpl()->bump_version();
  return {dresidual, dweight, dbias};
}

// dx where the means of dz and of dz * normalized are over several batches; without an activation, so that dy is dz.
Tensor batch_norm_backward_elementwise(const Tensor& dz, const Tensor& x, const OptionalTensor& weight,
                                       const Tensor& stats, const Tensor& means) {
  TORCH_CHECK(means.dim() == 2 && means.sym_size(0) == 2 && means.sym_size(1) == x.sym_size(1) &&
                  means.is_contiguous() && means.scalar_type() == at::kDouble,
              kOp, ": means must be contiguous float64 (2, C), got ", dtype_text(means.scalar_type()), " ",
              shape_text(means));
  check_same_device(means, x, kOp, "means");
  return std::get<0>(backward(dz, x, {}, weight, {}, stats, {}, means, true, "none", 0, {true, false, false, false}));
}

}  // namespace
}  // namespace fastnorm

TORCH_LIBRARY_FRAGMENT(FASTNORM_LIBRARY, m) {
  m.def(
      "batch_norm_forward(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, bool training, float? momentum, float eps, "
      "str activation, float negative_slope, bool save_mask) -> (Tensor y, Tensor stats, Tensor mask)",
      {at::Tag::pt2_compliant_tag});
  // With training=False: nothing is written, so that exported and compiled graphs have no mutated buffers.
  m.def(
      "batch_norm_forward.frozen(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? running_mean, "
      "Tensor? running_var, Tensor? num_batches_tracked, bool training, float? momentum, float eps, "
      "str activation, float negative_slope, bool save_mask) -> (Tensor y, Tensor stats, Tensor mask)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "batch_norm_inference_(Tensor(a!) x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor running_mean, "
      "Tensor running_var, float eps, str activation, float negative_slope) -> ()",
      {at::Tag::pt2_compliant_tag});
  m.def("batch_norm_statistics(Tensor x) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def("batch_norm_backward_elementwise(Tensor dz, Tensor x, Tensor? weight, Tensor stats, Tensor means) -> Tensor",
        {at::Tag::pt2_compliant_tag});
  m.def(
      "batch_norm_backward(Tensor dy, Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor stats, "
      "Tensor? mask, bool training, float eps, str activation, float negative_slope, bool[4] output_mask) -> "
      "(Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "batch_norm_backward_(Tensor(a!) dy, Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor stats, "
      "Tensor? mask, bool training, float eps, str activation, float negative_slope, bool[4] output_mask) -> "
      "(Tensor dresidual, Tensor dweight, Tensor dbias)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(FASTNORM_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("batch_norm_forward", fastnorm::batch_norm_forward);
  m.impl("batch_norm_forward.frozen", fastnorm::batch_norm_forward);
  m.impl("batch_norm_inference_", fastnorm::batch_norm_inference_);
  m.impl("batch_norm_statistics", fastnorm::batch_norm_statistics);
  m.impl("batch_norm_backward", fastnorm::batch_norm_backward);
  m.impl("batch_norm_backward_", fastnorm::batch_norm_backward_);
  m.impl("batch_norm_backward_elementwise", fastnorm::batch_norm_backward_elementwise);
}
