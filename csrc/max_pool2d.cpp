// Max-pooling, host side: schema, argument checks, allocation, device switch.
#include "max_pool2d.h"

#include <torch/library.h>

#include <limits>
#include <tuple>

#include "max_pool2d_host.h"

namespace fastnorm {
namespace {

constexpr const char* kOp = "max_pool2d";

PoolAxis axis(const c10::SymInt& in, const c10::SymInt& out, const Window2d& w, int d) {
  return {int(in.expect_int()), int(out.expect_int()), int(w.kernel[d]),
          int(w.stride[d]),     int(w.pad[d]),         int(w.dilation[d])};
}

// x as planes or channels_last, and what comes out.
struct View {
  View(const Tensor& x, const Window2d& window)
      : format(x.suggest_memory_format()), channels_last(format == at::MemoryFormat::ChannelsLast) {
    const int64_t dims = x.dim();
    TORCH_CHECK(dims == 3 || dims == 4, kOp, ": non-empty 3D or 4D (batch mode) tensor expected for input, got shape ",
                shape_text(x));
    n = dims == 4 ? x.sym_size(0) : c10::SymInt(1);
    c = x.sym_size(-3), h = x.sym_size(-2), w = x.sym_size(-1);
    oh = window.output(h, 0), ow = window.output(w, 1);
    window.check_sizes();
    TORCH_CHECK(
        c != 0 && h != 0 && w != 0, kOp,
        ": Expected 3D or 4D (batch mode) tensor with optional 0 dim batch size for input, but got: ", shape_text(x));
    window.check_pad();
    TORCH_CHECK(oh >= 1 && ow >= 1, kOp, ": Given input size: (", c, "x", h, "x", w, "). Calculated output size: (", c,
                "x", oh, "x", ow, "). Output size is too small");
  }
  std::vector<c10::SymInt> output_sizes(const Tensor& x) const {
    auto sizes = x.sym_sizes().vec();
    sizes[sizes.size() - 2] = oh, sizes.back() = ow;
    return sizes;
  }
  PoolShape shape(const Window2d& window) const {
    return pool_shape(channels_last, n, c, axis(h, oh, window, 0), axis(w, ow, window, 1));
  }

  at::MemoryFormat format;
  bool channels_last;
  c10::SymInt n, c, h, w, oh, ow;
};

std::tuple<Tensor, Tensor, Tensor> max_pool2d_forward(const Tensor& x_in, at::IntArrayRef kernel,
                                                      at::IntArrayRef stride, at::IntArrayRef padding,
                                                      at::IntArrayRef dilation, bool ceil_mode, bool save_offset,
                                                      bool return_indices) {
  const DType dtype = dtype_of(x_in, kOp, "input");
  const Window2d window(kernel, stride, padding, dilation, ceil_mode);
  const View view(x_in, window);
  const auto sizes = view.output_sizes(x_in);
  const auto options = x_in.options().memory_format(view.format);
  const auto empty = x_in.options().memory_format(at::MemoryFormat::Contiguous);
  Tensor y = at::empty_symint(sizes, options);
  Tensor offset = save_offset ? at::empty_symint(sizes, options.dtype(window.offset_type()))
                              : at::empty({0}, empty.dtype(window.offset_type()));
  Tensor indices =
      return_indices ? at::empty_symint(sizes, options.dtype(at::kLong)) : at::empty({0}, empty.dtype(at::kLong));
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
  const Window2d window(kernel, stride, padding, dilation, false);
  window.check_sizes(), window.check_pad();
  TORCH_CHECK(dy_in.dim() == 3 || dy_in.dim() == 4, kOp, ": dy must have 3 or 4 dimensions, got shape ",
              shape_text(dy_in));
  TORCH_CHECK(offset_in.sym_sizes() == dy_in.sym_sizes() && offset_in.scalar_type() == window.offset_type(), kOp,
              ": offset must be what the forward operator returned");
  check_same_device(offset_in, dy_in, kOp, "offset");
  TORCH_CHECK(!channels_last || dy_in.dim() == 4, kOp, ": channels_last needs 4 dimensions");
  const c10::SymInt oh = dy_in.sym_size(-2), ow = dy_in.sym_size(-1);
  window.check_output(height, oh, 0), window.check_output(width, ow, 1);

  const auto format = channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  auto sizes = dy_in.sym_sizes().vec();
  sizes[sizes.size() - 2] = height, sizes.back() = width;
  Tensor dx = at::empty_symint(sizes, dy_in.options().memory_format(format));
  const Device device = device_of(dy_in, kOp);
  if (device != Device::kMeta && dx.numel() != 0) {
    const Tensor dy = dy_in.contiguous(format), offset = offset_in.contiguous(format);
    MaxPool2dBackward a{};
    a.shape = pool_shape(channels_last, dy.dim() == 4 ? dy.size(0) : 1, dy.size(-3), axis(height, oh, window, 0),
                         axis(width, ow, window, 1));
    a.dtype = dtype, a.dy = dy.const_data_ptr(), a.offset = offset.const_data_ptr(), a.dx = dx.mutable_data_ptr();
    FASTNORM_RUN(max_pool2d_backward, a, dx, device, kOp);
  }
  return dx;
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
