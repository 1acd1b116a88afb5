// Max-pooling, host side: schema, argument checks, allocation, device switch.
#include "max_pool2d.h"

#include <torch/library.h>

#include <limits>
#include <tuple>

#include "pool_host.h"

namespace fastnorm {
namespace {

constexpr const char* kOp = "max_pool2d";

std::tuple<Tensor, Tensor, Tensor> max_pool2d_forward(const Tensor& x_in, at::IntArrayRef kernel,
                                                      at::IntArrayRef stride, at::IntArrayRef padding,
                                                      at::IntArrayRef dilation, bool ceil_mode, bool save_offset,
                                                      bool return_indices) {
  const DType dtype = dtype_of(x_in, kOp, "input");
  const Window2d window(kOp, kernel, stride, padding, dilation, ceil_mode);
  const PoolView view(x_in, window);
  const auto sizes = view.output_sizes(x_in);
  const auto options = x_in.options().memory_format(view.format);
  auto result = [&](bool wanted, at::ScalarType type) {
    return wanted ? empty_tensor(sizes, options.dtype(type))
                  : empty_tensor(0, options.dtype(type).memory_format(at::MemoryFormat::Contiguous));
  };
  Tensor y = result(true, x_in.scalar_type()), offset = result(save_offset, window.offset_type()),
         indices = result(return_indices, at::kLong);
  const Device device = device_of(x_in, kOp);
  if (device != Device::kMeta && x_in.numel() != 0) {
    const Tensor x = x_in.contiguous(view.format);
    MaxPool2dForward a{};
    a.shape = view.shape(window), a.channels_last = view.channels_last, a.dtype = dtype;
    a.x = x.const_data_ptr(), a.y = y.mutable_data_ptr();
    a.offset = data_if(save_offset, offset);
    a.indices = static_cast<int64_t*>(data_if(return_indices, indices));
    FASTNORM_RUN(max_pool2d_forward, a, x, device, kOp);
  }
  return {y, offset, indices};
}

// dx of shape (..., height, width), from what forward kept.
Tensor max_pool2d_backward(const Tensor& dy_in, const Tensor& offset_in, c10::SymInt height, c10::SymInt width,
                           at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding,
                           at::IntArrayRef dilation, bool channels_last) {
  const DType dtype = dtype_of(dy_in, kOp, "dy");
  const Window2d window(kOp, kernel, stride, padding, dilation, false);
  TORCH_CHECK(offset_in.sym_sizes() == dy_in.sym_sizes() && offset_in.scalar_type() == window.offset_type(), kOp,
              ": offset must be what the forward operator returned");
  check_same_device(offset_in, dy_in, kOp, "offset");
  const PoolGradient dx(dy_in, height, width, window, channels_last);
  const Device device = device_of(dy_in, kOp);
  if (device != Device::kMeta && dx.result.numel() != 0) {
    const Tensor dy = dy_in.contiguous(dx.format), offset = offset_in.contiguous(dx.format);
    MaxPool2dBackward a{};
    a.shape = dx.shape(window);
    a.dtype = dtype, a.dy = dy.const_data_ptr(), a.offset = offset.const_data_ptr();
    a.dx = dx.result.mutable_data_ptr();
    FASTNORM_RUN(max_pool2d_backward, a, dx.result, device, kOp);
  }
  return dx.result;
}

}  // namespace
}  // namespace fastnorm

TORCH_LIBRARY_FRAGMENT(FASTNORM_LIBRARY, m) {
  m.def(
      "max_pool2d_forward(Tensor x, int[2] kernel, int[2] stride, int[2] padding, int[2] dilation, bool ceil_mode, "
      "bool save_offset, bool return_indices) -> (Tensor y, Tensor offset, Tensor indices)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "max_pool2d_backward(Tensor dy, Tensor offset, SymInt height, SymInt width, int[2] kernel, int[2] stride, "
      "int[2] padding, int[2] dilation, bool channels_last) -> Tensor dx",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(FASTNORM_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("max_pool2d_forward", fastnorm::max_pool2d_forward);
  m.impl("max_pool2d_backward", fastnorm::max_pool2d_backward);
}
