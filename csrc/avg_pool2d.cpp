// Average pooling, host side: schema, argument checks, allocation, device switch.
#include "avg_pool2d.h"

#include <torch/library.h>

#include "pool_host.h"

namespace fastnorm {
namespace {

constexpr const char* kOp = "avg_pool2d";

AvgPool2d arguments(const PoolShape& shape, bool count_include_pad, std::optional<int64_t> divisor_override,
                    DType dtype, const Tensor& from, const Tensor& to) {
  AvgPool2d a{};
  a.shape = shape, a.count_include_pad = count_include_pad, a.divisor = divisor_override.value_or(0), a.dtype = dtype;
  a.from = from.const_data_ptr(), a.to = to.mutable_data_ptr();
  return a;
}

void check_divisor(std::optional<int64_t> divisor_override) {
  TORCH_CHECK(divisor_override != 0, kOp, ": divisor must be not zero, got divisor_override=0");
}

Tensor avg_pool2d_forward(const Tensor& x_in, at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding,
                          bool ceil_mode, bool count_include_pad, std::optional<int64_t> divisor_override) {
  const DType dtype = dtype_of(x_in, kOp, "input");
  const Window2d window(kOp, kernel, stride, padding, {1}, ceil_mode);
  check_divisor(divisor_override);
  TORCH_CHECK_INDEX(x_in.dim() >= 3, kOp, ": 3D or 4D (batch mode) tensor expected for input, got shape ",
                    shape_text(x_in));  // torch's class for these alone
  const PoolView view(x_in, window);
  Tensor y = empty_tensor(view.output_sizes(x_in), x_in.options().memory_format(view.format));
  const Device device = device_of(x_in, kOp);
  if (device != Device::kMeta && x_in.numel() != 0) {
    const Tensor x = x_in.contiguous(view.format);
    AvgPool2d a = arguments(view.shape(window), count_include_pad, divisor_override, dtype, x, y);
    FASTNORM_RUN(avg_pool2d_forward, a, x, device, kOp);
  }
  return y;
}

// dx of shape (..., height, width).
Tensor avg_pool2d_backward(const Tensor& dy_in, c10::SymInt height, c10::SymInt width, at::IntArrayRef kernel,
                           at::IntArrayRef stride, at::IntArrayRef padding, bool ceil_mode, bool count_include_pad,
                           std::optional<int64_t> divisor_override, bool channels_last) {
  const DType dtype = dtype_of(dy_in, kOp, "dy");
  const Window2d window(kOp, kernel, stride, padding, {1}, ceil_mode);
  check_divisor(divisor_override);
  const PoolGradient dx(dy_in, height, width, window, channels_last);
  const Device device = device_of(dy_in, kOp);
  if (device != Device::kMeta && dx.result.numel() != 0) {
    const Tensor dy = dy_in.contiguous(dx.format);
    AvgPool2d a = arguments(dx.shape(window), count_include_pad, divisor_override, dtype, dy, dx.result);
    FASTNORM_RUN(avg_pool2d_backward, a, dx.result, device, kOp);
  }
  return dx.result;
}

}  // namespace
}  // namespace fastnorm

TORCH_LIBRARY_FRAGMENT(FASTNORM_LIBRARY, m) {
  m.def(
      "avg_pool2d_forward(Tensor x, int[2] kernel, int[2] stride, int[2] padding, bool ceil_mode, "
      "bool count_include_pad, int? divisor_override) -> Tensor y",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "avg_pool2d_backward(Tensor dy, SymInt height, SymInt width, int[2] kernel, int[2] stride, int[2] padding, "
      "bool ceil_mode, bool count_include_pad, int? divisor_override, bool channels_last) -> Tensor dx",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(FASTNORM_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("avg_pool2d_forward", fastnorm::avg_pool2d_forward);
  m.impl("avg_pool2d_backward", fastnorm::avg_pool2d_backward);
}
