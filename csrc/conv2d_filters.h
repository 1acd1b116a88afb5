// Weights as a convolution's kernel multiplies with them, kept from one call to the next where they are used again.
#pragma once
#include <ATen/core/Tensor.h>

#include "conv2d.h"

namespace fastnorm {

// What a forward call has of its weight.  memory() is null where the kernel is to pack it for itself: for a weight that
// was not in two calls before without being written to between, as in training, and past a limit of memory.
class PackedFilters {
 public:
  // bytes: of the packed weight; 0 if there is no point in keeping it.
  PackedFilters(const at::Tensor& weight, ConvAlgorithm algorithm, int64_t groups, size_t bytes);

  void* memory() const { return packed_.defined() ? packed_.mutable_data_ptr() : nullptr; }
  bool ready() const { return ready_; }
  // After the kernel has written to memory(): keeps it for calls to come.
  void keep();

 private:
  at::Tensor weight_, packed_;
  ConvAlgorithm algorithm_;
  int64_t groups_;
  bool ready_ = false;
};

}  // namespace fastnorm
