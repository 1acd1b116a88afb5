// The window of a max-pooling as its host files see it: torch's defaults, checks and output sizes.
#pragma once
#include <array>
#include <limits>

#include "max_pool2d.h"
#include "norm_host.h"

namespace fastnorm {

struct Window2d {
  std::array<int64_t, 2> kernel, stride, pad, dilation;  // height, width
  bool ceil_mode;

  Window2d(at::IntArrayRef kernel_in, at::IntArrayRef stride_in, at::IntArrayRef padding_in,
           at::IntArrayRef dilation_in, bool ceil_mode)
      : ceil_mode(ceil_mode) {
    TORCH_CHECK(kernel_in.size() == 1 || kernel_in.size() == 2,
                "max_pool2d: kernel_size must either be a single int, or a tuple of two ints, got ", kernel_in);
    TORCH_CHECK(stride_in.size() <= 2,
                "max_pool2d: stride must either be omitted, a single int, or a tuple of two ints, got ", stride_in);
    TORCH_CHECK(padding_in.size() == 1 || padding_in.size() == 2,
                "max_pool2d: padding must either be a single int, or a tuple of two ints, got ", padding_in);
    TORCH_CHECK(dilation_in.size() == 1 || dilation_in.size() == 2,
                "max_pool2d: dilation must be either a single int, or a tuple of two ints, got ", dilation_in);
    kernel = pair(kernel_in), pad = pair(padding_in), dilation = pair(dilation_in);
    stride = stride_in.empty() ? kernel : pair(stride_in);
  }

  static std::array<int64_t, 2> pair(at::IntArrayRef v) {
    for (const int64_t i : v)
      TORCH_CHECK(i >= std::numeric_limits<int>::min() && i <= std::numeric_limits<int>::max(),
                  "max_pool2d: integer out of range: ", i);
    return {v.front(), v.back()};
  }

  // The output's size; checks what has to hold for that.
  c10::SymInt output(const c10::SymInt& in, int d) const {
    TORCH_CHECK(stride[d] != 0, "max_pool2d: stride should not be zero");
    TORCH_CHECK(pad[d] >= 0, "max_pool2d: pad must be non-negative, but got pad: ", pad[d]);
    const int64_t reach = dilation[d] * (kernel[d] - 1) + 1;
    TORCH_CHECK(pad[d] <= reach / 2,
                "max_pool2d: pad should be at most half of effective kernel size, but got pad=", pad[d],
                ", kernel_size=", kernel[d], " and dilation=", dilation[d]);
    if (stride[d] < 0) return 0;  // refused by check_sizes()
    const c10::SymInt room = in + 2 * pad[d] - reach + (ceil_mode ? stride[d] - 1 : 0);
    if (room < 0) return 0;  // not even one window; the caller refuses that
    c10::SymInt out = room / stride[d] + 1;
    if (ceil_mode && (out - 1) * stride[d] >= in + pad[d]) out = out - 1;  // the last window begins inside
    return out;
  }

  void check_sizes() const {
    TORCH_CHECK(kernel[0] > 0 && kernel[1] > 0,
                "max_pool2d: kernel size should be greater than zero, but got kH: ", kernel[0], " kW: ", kernel[1]);
    TORCH_CHECK(stride[0] > 0 && stride[1] > 0,
                "max_pool2d: stride should be greater than zero, but got dH: ", stride[0], " dW: ", stride[1]);
    TORCH_CHECK(dilation[0] > 0 && dilation[1] > 0,
                "max_pool2d: dilation should be greater than zero, but got dilationH: ", dilation[0],
                " dilationW: ", dilation[1]);
  }

  void check_pad() const {
    TORCH_CHECK(pad[0] <= kernel[0] / 2 && pad[1] <= kernel[1] / 2,
                "max_pool2d: pad should be smaller than or equal to half of kernel size, but got padW = ", pad[1],
                ", padH = ", pad[0], ", kW = ", kernel[1], ", kH = ", kernel[0]);
  }

  // Whether windows and input go together, as backward relies on: each window begins inside or in the padding before.
  void check_output(const c10::SymInt& in, const c10::SymInt& out, int d) const {
    TORCH_CHECK(in >= 1 && out >= 1 && (out - 1) * stride[d] < in + pad[d], "max_pool2d: an input of size ", in,
                " has not as many as ", out, " windows");
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

}  // namespace fastnorm
