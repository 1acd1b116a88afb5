// What the host files of convolution share: its window with torch's checks, torch's own convolution, packed weights.
#pragma once
#include <array>
#include <functional>
#include <tuple>
#include <vector>

#include "conv2d.h"
#include "norm_host.h"

namespace fastnorm {

// stride, padding and dilation of a convolution, height before width.
struct ConvWindow {
  std::array<int64_t, 2> stride, padding, dilation;
  int64_t groups;

  ConvWindow(at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups)
      : stride(pair(stride, "stride")),
        padding(pair(padding, "padding")),
        dilation(pair(dilation, "dilation")),
        groups(groups) {
    TORCH_CHECK(groups > 0, "conv2d: non-positive groups is not supported, got groups=", groups);
    for (int d = 0; d < 2; d++) {
      TORCH_CHECK(this->stride[d] > 0, "conv2d: non-positive stride is not supported, got ", stride);
      TORCH_CHECK(this->padding[d] >= 0, "conv2d: negative padding is not supported, got ", padding);
      TORCH_CHECK(this->dilation[d] > 0, "conv2d: dilation should be greater than zero, got ", dilation);
    }
  }

  static std::array<int64_t, 2> pair(at::IntArrayRef v, const char* name) {
    TORCH_CHECK(v.size() == 1 || v.size() == 2, "conv2d: expected ", name,
                " to be a single integer value or a list of 2 values to match the convolution dimensions, but got ",
                name, "=", v);
    for (const int64_t i : v)
      TORCH_CHECK(i >= std::numeric_limits<int>::min() && i <= std::numeric_limits<int>::max(),
                  "conv2d: integer out of range: ", i);
    return {v.front(), v.back()};
  }

  c10::SymInt output(const c10::SymInt& in, const c10::SymInt& kernel, int d) const {
    return (in + 2 * padding[d] - dilation[d] * (kernel - 1) - 1) / stride[d] + 1;
  }
};

// torch's own operators, differentiable: what they are is for conv2d.cpp to know.
Tensor torch_convolution(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const ConvWindow& w);
std::tuple<Tensor, Tensor, Tensor> torch_convolution_backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                                              const ConvWindow& w, std::array<bool, 3> mask);
Tensor torch_activate(Activation activation, const Tensor& z, double negative_slope);

// A weight as a forward kernel multiplies with it, kept from one call to the next where it is used again.  memory() is
// null where the kernel is to pack it for itself: for a weight that was not in two calls before without being written
// to between, as in training, and past a limit of memory.  What is packed depends on the weight, the algorithm and the
// number of groups alone, whatever the input's layout and the window are.
class PackedFilters {
 public:
  using Fingerprint = std::vector<std::array<uint64_t, 8>>;

  // bytes(): of the packed weight, 0 to keep none; asked where it is going to be kept.
  PackedFilters(const Tensor& weight, ConvAlgorithm algorithm, int64_t groups, const std::function<size_t()>& bytes);

  void* memory() const { return packed_.defined() ? packed_.mutable_data_ptr() : nullptr; }
  bool ready() const { return ready_; }
  // After the kernel has written to memory(): keeps it for calls to come.
  void keep();

 private:
  Tensor weight_, packed_;
  ConvAlgorithm algorithm_;
  int64_t groups_;
  Fingerprint content_;  // of the weight before it was packed, so that no change meanwhile goes unseen
  bool ready_ = false;
};

}  // namespace fastnorm
