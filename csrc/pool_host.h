// The window of a pooling as the host files see it: torch's defaults, checks and output sizes.
#pragma once
#include <array>
#include <limits>

#include "norm_host.h"
#include "pool.h"

namespace fastnorm {

struct Window2d {
  const char* op = "";                                           // whose errors are raised
  std::array<int64_t, 2> kernel{}, stride{}, pad{}, dilation{};  // height, width
  bool ceil_mode = false;

  Window2d() = default;
  Window2d(const char* op, at::IntArrayRef kernel_in, at::IntArrayRef stride_in, at::IntArrayRef padding_in,
           at::IntArrayRef dilation_in, bool ceil_mode)
      : op(op), ceil_mode(ceil_mode) {
    TORCH_CHECK(kernel_in.size() == 1 || kernel_in.size() == 2, op,
                ": kernel_size must either be a single int, or a tuple of two ints, got ", kernel_in);
    TORCH_CHECK(stride_in.size() <= 2, op,
                ": stride must either be omitted, a single int, or a tuple of two ints, got ", stride_in);
    TORCH_CHECK(padding_in.size() == 1 || padding_in.size() == 2, op,
                ": padding must either be a single int, or a tuple of two ints, got ", padding_in);
    TORCH_CHECK(dilation_in.size() == 1 || dilation_in.size() == 2, op,
                ": dilation must be either a single int, or a tuple of two ints, got ", dilation_in);
    kernel = pair(kernel_in), pad = pair(padding_in), dilation = pair(dilation_in);
    stride = stride_in.empty() ? kernel : pair(stride_in);
  }

  std::array<int64_t, 2> pair(at::IntArrayRef v) const {
    for (const int64_t i : v)
      TORCH_CHECK(i >= std::numeric_limits<int>::min() && i <= std::numeric_limits<int>::max(), op,
                  ": integer out of range: ", i);
    return {v.front(), v.back()};
  }

  // The output's size; checks what has to hold for that.
  c10::SymInt output(const c10::SymInt& in, int d) const {
    TORCH_CHECK(stride[d] != 0, op, ": stride should not be zero");
    TORCH_CHECK(pad[d] >= 0, op, ": pad must be non-negative, but got pad: ", pad[d]);
    const int64_t reach = dilation[d] * (kernel[d] - 1) + 1;
    TORCH_CHECK(pad[d] <= reach / 2, op, ": pad should be at most half of effective kernel size, but got pad=", pad[d],
                ", kernel_size=", kernel[d], " and dilation=", dilation[d]);
    if (stride[d] < 0) return 0;  // refused by check_sizes()
    const c10::SymInt room = in + 2 * pad[d] - reach + (ceil_mode ? stride[d] - 1 : 0);
    if (room < 0) return 0;  // not even one window; the caller refuses that
    c10::SymInt out = room / stride[d] + 1;
    if (ceil_mode && (out - 1) * stride[d] >= in + pad[d]) out = out - 1;  // the last window begins inside
    return out;
  }

  void check_sizes() const {
    TORCH_CHECK(kernel[0] > 0 && kernel[1] > 0, op,
                ": kernel size should be greater than zero, but got kH: ", kernel[0], " kW: ", kernel[1]);
    TORCH_CHECK(stride[0] > 0 && stride[1] > 0, op, ": stride should be greater than zero, but got dH: ", stride[0],
                " dW: ", stride[1]);
    TORCH_CHECK(dilation[0] > 0 && dilation[1] > 0, op,
                ": dilation should be greater than zero, but got dilationH: ", dilation[0],
                " dilationW: ", dilation[1]);
  }

  void check_pad() const {
    TORCH_CHECK(pad[0] <= kernel[0] / 2 && pad[1] <= kernel[1] / 2, op,
                ": pad should be smaller than or equal to half of kernel size, but got padW = ", pad[1],
                ", padH = ", pad[0], ", kW = ", kernel[1], ", kH = ", kernel[0]);
  }

  // Whether windows and input go together, as backward relies on: each window begins inside or in the padding before.
  void check_output(const c10::SymInt& in, const c10::SymInt& out, int d) const {
    TORCH_CHECK(in >= 1 && out >= 1 && (out - 1) * stride[d] < in + pad[d], op, ": an input of size ", in,
                " has not as many as ", out, " windows");
  }

  PoolAxis axis(const c10::SymInt& in, const c10::SymInt& out, int d) const {
    return {int(in.expect_int()), int(out.expect_int()), int(kernel[d]), int(stride[d]), int(pad[d]), int(dilation[d])};
  }

  at::ScalarType offset_type() const {
    const int64_t taps = kernel[0] * kernel[1];
    return taps <= 256 ? at::kByte : taps <= 32768 ? at::kShort : at::kInt;
  }
};

inline PoolShape pool_shape(bool channels_last, const c10::SymInt& n, const c10::SymInt& c, PoolAxis y, PoolAxis x) {
  const int64_t samples = n.expect_int(), channels = c.expect_int();
  return channels_last ? PoolShape{samples, channels, y, x} : PoolShape{samples * channels, 1, y, x};
}

// x as planes or channels_last, and what comes out.
struct PoolView {
  PoolView(const Tensor& x, const Window2d& window)
      : format(x.suggest_memory_format()), channels_last(format == at::MemoryFormat::ChannelsLast) {
    const int64_t dims = x.dim();
    TORCH_CHECK(dims == 3 || dims == 4, window.op,
                ": non-empty 3D or 4D (batch mode) tensor expected for input, got shape ", shape_text(x));
    n = dims == 4 ? x.sym_size(0) : c10::SymInt(1);
    c = x.sym_size(-3), h = x.sym_size(-2), w = x.sym_size(-1);
    oh = window.output(h, 0), ow = window.output(w, 1);
    window.check_sizes();
    TORCH_CHECK(
        c != 0 && h != 0 && w != 0, window.op,
        ": Expected 3D or 4D (batch mode) tensor with optional 0 dim batch size for input, but got: ", shape_text(x));
    window.check_pad();
    TORCH_CHECK(oh >= 1 && ow >= 1, window.op, ": Given input size: (", c, "x", h, "x", w,
                "). Calculated output size: (", c, "x", oh, "x", ow, "). Output size is too small");
  }
  std::vector<c10::SymInt> output_sizes(const Tensor& x) const {
    auto sizes = x.sym_sizes().vec();
    sizes[sizes.size() - 2] = oh, sizes.back() = ow;
    return sizes;
  }
  PoolShape shape(const Window2d& window) const {
    return pool_shape(channels_last, n, c, window.axis(h, oh, 0), window.axis(w, ow, 1));
  }

  at::MemoryFormat format;
  bool channels_last;
  c10::SymInt n, c, h, w, oh, ow;
};

// dx of shape (..., height, width), not yet written, from dy's; checks what backward relies on.
struct PoolGradient {
  PoolGradient(const Tensor& dy, const c10::SymInt& height, const c10::SymInt& width, const Window2d& window,
               bool channels_last)
      : format(channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous),
        channels_last(channels_last) {
    window.check_sizes(), window.check_pad();
    TORCH_CHECK(dy.dim() == 3 || dy.dim() == 4, window.op, ": dy must have 3 or 4 dimensions, got shape ",
                shape_text(dy));
    TORCH_CHECK(!channels_last || dy.dim() == 4, window.op, ": channels_last needs 4 dimensions");
    oh = dy.sym_size(-2), ow = dy.sym_size(-1);
    window.check_output(height, oh, 0), window.check_output(width, ow, 1);
    auto sizes = dy.sym_sizes().vec();
    sizes[sizes.size() - 2] = height, sizes.back() = width;
    result = empty_tensor(sizes, dy.options().memory_format(format));
  }
  PoolShape shape(const Window2d& window) const {
    return pool_shape(channels_last, result.dim() == 4 ? result.sym_size(0) : 1, result.sym_size(-3),
                      window.axis(result.sym_size(-2), oh, 0), window.axis(result.sym_size(-1), ow, 1));
  }

  at::MemoryFormat format;
  bool channels_last;
  c10::SymInt oh, ow;
  Tensor result;
};

}  // namespace fastnorm
