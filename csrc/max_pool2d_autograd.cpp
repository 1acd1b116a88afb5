// Max-pooling in autograd, and the entry for Python outside of torch.compile.
//
// dx = scatter(dy) by the offsets that forward kept, and the derivative of that is gather(): neither needs x, and each
// is the other's derivative, forward mode included.
#ifndef FASTNORM_CUDA_EMULATION
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/div.h>
#include <ATen/ops/where.h>

#include "pool_autograd.h"
#include "pool_host.h"
#include "python_ints.h"

namespace fastnorm {
namespace {

using Ints = at::IntArrayRef;
using ForwardOp = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, Ints, Ints, Ints, Ints, bool, bool, bool);
using BackwardOp = Tensor(const Tensor&, const Tensor&, c10::SymInt, c10::SymInt, Ints, Ints, Ints, Ints, bool);
constexpr const char *kOp = "max_pool2d", *kForward = "fastnorm::max_pool2d_forward",
                     *kBackward = "fastnorm::max_pool2d_backward";

// What a derivative has to know of a pooling beside the offsets.
struct Pooling {
  c10::SymInt height, width;  // of x
  Window2d window;
  bool channels_last;

  Tensor scatter(const Tensor& dy, const Tensor& offset) const {
    static const auto op = find_operator<BackwardOp>(kBackward);
    return op.call(dy, offset, height, width, window.kernel, window.stride, window.pad, window.dilation, channels_last);
  }

  // Of every window the element of t, which is like x, that won; in torch's operators.
  Tensor gather(const Tensor& t, const Tensor& offset) const {
    const auto options = offset.options().dtype(at::kLong).memory_format(at::MemoryFormat::Contiguous);
    const Tensor tap = offset.to(at::kLong), tap_row = at::div(tap, window.kernel[1], "floor");
    auto begin = [&](int64_t d) {
      return at::arange(offset.sym_size(d - 2), options) * window.stride[d] - window.pad[d];
    };
    const Tensor row = begin(0).unsqueeze(-1) + tap_row * window.dilation[0];
    const Tensor column = begin(1) + (tap - tap_row * window.kernel[1]) * window.dilation[1];
    Tensor index = row * width + column;
    const bool all_inside = window.dilation[0] == 1 && window.dilation[1] == 1;  // else a window may have no tap inside
    const Tensor inside = all_inside ? Tensor() : row.lt(height).logical_and(column.lt(width));
    if (!all_inside) index = at::where(inside, index, 0);
    const Tensor won = gather_planes(t, index);
    return all_inside ? won : at::where(inside, won, 0);
  }
};

struct MaxPool2dBackward final : torch::autograd::TraceableFunction {
  SavedVariable saved;
  Pooling pooling;
  bool gathers = false;  // of scatter(); else of the pooling
  bool released = false;

  std::string name() const override { return gathers ? "MaxPool2dBackwardBackward" : "MaxPool2dBackward"; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    saved.reset_data();
    released = true;
  }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(!released, torch::autograd::ERR_BACKWARD_TWICE);
    if (!grads[0].defined()) return {Tensor()};
    const Tensor offset = saved.unpack(this->getptr());
    std::optional<at::AutoDispatchBelowADInplaceOrView> below;
    if (!at::GradMode::is_enabled() && !gathers) below.emplace();
    return {gathers ? pooling.gather(grads[0], offset) : pooling.scatter(grads[0], offset)};
  }
};

std::pair<NodePointer, MaxPool2dBackward*> record(const Tensor& input, const Pooling& pooling, bool gathers) {
  auto made = make_node<MaxPool2dBackward>();
  made.second->set_next_edges(torch::autograd::collect_next_edges(input));
  made.second->pooling = pooling;
  made.second->gathers = gathers;
  return made;
}

std::tuple<Tensor, Tensor, Tensor> forward(c10::DispatchKeySet keys, const Tensor& x, Ints kernel, Ints stride,
                                           Ints padding, Ints dilation, bool ceil_mode, bool save_offset,
                                           bool return_indices) {
  const bool recorded = torch::autograd::compute_requires_grad(x), has_tangent = torch::autograd::isFwGradDefined(x);
  auto result = [&] {
    static const auto op = find_operator<ForwardOp>(kForward);
    const at::AutoDispatchBelowADInplaceOrView below;
    return op.redispatch(keys & c10::after_ADInplaceOrView_keyset, x, kernel, stride, padding, dilation, ceil_mode,
                         save_offset || recorded || has_tangent, return_indices);
  }();
  if (!recorded && !has_tangent) return result;
  auto& [y, offset, indices] = result;
  const Pooling pooling{x.sym_size(-2), x.sym_size(-1), Window2d(kOp, kernel, stride, padding, dilation, ceil_mode),
                        x.suggest_memory_format() == at::MemoryFormat::ChannelsLast};
  if (recorded) {
    auto [node, backward] = record(x, pooling, false);
    torch::autograd::set_history(y, node);
    backward->saved = SavedVariable(offset, false);
  }
  if (has_tangent) y._set_fw_grad(pooling.gather(x._fw_grad(0), offset), 0, false);
  return result;
}

Tensor backward(c10::DispatchKeySet keys, const Tensor& dy, const Tensor& offset, c10::SymInt height, c10::SymInt width,
                Ints kernel, Ints stride, Ints padding, Ints dilation, bool channels_last) {
  Tensor dx = [&] {
    static const auto op = find_operator<BackwardOp>(kBackward);
    const at::AutoDispatchBelowADInplaceOrView below;
    return op.redispatch(keys & c10::after_ADInplaceOrView_keyset, dy, offset, height, width, kernel, stride, padding,
                         dilation, channels_last);
  }();
  const bool recorded = torch::autograd::compute_requires_grad(dy), has_tangent = torch::autograd::isFwGradDefined(dy);
  if (!recorded && !has_tangent) return dx;
  const Pooling pooling{height, width, Window2d(kOp, kernel, stride, padding, dilation, false), channels_last};
  if (recorded) {
    auto [node, second] = record(dy, pooling, true);
    torch::autograd::set_history(dx, node);
    second->saved = SavedVariable(offset, false);
  }
  if (has_tangent) dx._set_fw_grad(pooling.scatter(dy._fw_grad(0), offset), 0, false);
  return dx;
}

// ---- For Python -----------------------------------------------------------------------------------------------------

pybind11::object python(const Tensor& x, pybind11::handle kernel_size, pybind11::handle stride_or_none,
                        pybind11::handle padding_in, pybind11::handle dilation_in, bool ceil_mode,
                        bool return_indices) {
  const PythonInts kernel(kernel_size, kOp, "kernel_size"), padding(padding_in, kOp, "padding"),
      dilation(dilation_in, kOp, "dilation");
  const PythonInts stride = stride_or_none.is_none() ? kernel : PythonInts(stride_or_none, kOp, "stride");
  const auto result = [&] {
    static const auto op = find_operator<ForwardOp>(kForward);
    const pybind11::gil_scoped_release release;
    return op.call(x, kernel, stride, padding, dilation, ceil_mode, false, return_indices);
  }();
  if (!return_indices) return pybind11::cast(std::get<0>(result));
  return pybind11::make_tuple(std::get<0>(result), std::get<2>(result));
}

}  // namespace

void bind_max_pool2d(pybind11::module_& m) {
  m.def("max_pool2d", python, "y, or y and indices, of torch.ops.fastnorm.max_pool2d_forward");
}

}  // namespace fastnorm

TORCH_LIBRARY_IMPL(fastnorm, Autograd, m) {
  m.impl("max_pool2d_forward", TORCH_FN(fastnorm::forward));
  m.impl("max_pool2d_backward", TORCH_FN(fastnorm::backward));
}
#endif
