// Max-unpooling, host side: schema, argument checks, allocation, device switch.
#include "max_unpool2d.h"

#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <limits>

#include "norm_host.h"

namespace fastnorm {
namespace {

constexpr const char* kOp = "max_unpool2d";

Tensor max_unpool2d(const Tensor& x_in, const Tensor& indices_in, c10::SymIntArrayRef output_size) {
  const DType dtype = dtype_of(x_in, kOp, "input");
  TORCH_CHECK(indices_in.scalar_type() == at::kLong, kOp,
              ": elements in indices should be type int64 but got: ", dtype_text(indices_in.scalar_type()));
  TORCH_CHECK(output_size.size() == 2, kOp,
              ": There should be exactly two elements (height, width) in output_size, but got ", output_size.size(),
              " elements.");
  TORCH_CHECK(x_in.dim() == 3 || x_in.dim() == 4, kOp,
              ": Input to max_unpooling2d should be a 3d or 4d Tensor, but got a tensor with ", x_in.dim(),
              " dimensions.");
  TORCH_CHECK(x_in.sym_sizes() == indices_in.sym_sizes(), kOp,
              ": Expected shape of indices to be same as that of the input tensor ", shape_text(x_in),
              " but got indices tensor with shape: ", shape_text(indices_in));
  check_same_device(indices_in, x_in, kOp, "indices");
  for (int64_t d = 1; d < x_in.dim(); d++)
    TORCH_CHECK(x_in.sym_size(d) > 0, kOp, ": Expected input to have non-zero size for non-batch dimensions, but got ",
                shape_text(x_in), " with dimension ", d, " being empty.");
  for (const auto& size : output_size)
    TORCH_CHECK(size >= 0, kOp, ": output_size must contain non-negative spatial dimensions, but got ", size);

  const at::MemoryFormat format = x_in.suggest_memory_format();
  const bool channels_last = format == at::MemoryFormat::ChannelsLast;
  auto sizes = x_in.sym_sizes().vec();
  sizes[sizes.size() - 2] = output_size[0], sizes.back() = output_size[1];
  Tensor y = empty_tensor(sizes, x_in.options().memory_format(format));
  const Device device = device_of(x_in, kOp);
  if (device == Device::kMeta || x_in.numel() == 0) return y;
  const Tensor x = x_in.contiguous(format), indices = indices_in.contiguous(format);
  MaxUnpool2d a{};
  const int64_t samples = x.dim() == 4 ? x.size(0) : 1, channels = x.size(-3);
  a.n = channels_last ? samples : samples * channels, a.c = channels_last ? channels : 1;
  a.in = x.size(-2) * x.size(-1), a.out = y.size(-2) * y.size(-1);
  TORCH_CHECK(a.in < std::numeric_limits<int>::max(), kOp, ": a plane of the input must have fewer than 2**31 - 1 ",
              "elements, got ", a.in);
  a.element_bytes = size_of(dtype);
  a.x = x.const_data_ptr(), a.indices = static_cast<const int64_t*>(indices.const_data_ptr());
  a.y = y.mutable_data_ptr();
  int64_t invalid = -1;
  a.invalid = &invalid;
  FASTNORM_RUN(max_unpool2d, a, y, device, kOp);
  TORCH_CHECK(invalid < 0, kOp, ": Found an invalid max index: ", a.indices[invalid], " (output volumes are of size ",
              output_size[0], "x", output_size[1]);
  return y;
}

}  // namespace
}  // namespace fastnorm

TORCH_LIBRARY_FRAGMENT(FASTNORM_LIBRARY, m) {
  m.def("max_unpool2d(Tensor x, Tensor indices, SymInt[2] output_size) -> Tensor y", {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(FASTNORM_LIBRARY, CompositeExplicitAutograd, m) { m.impl("max_unpool2d", fastnorm::max_unpool2d); }
