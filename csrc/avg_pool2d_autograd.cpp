// Average pooling in autograd, and the entry for Python outside of torch.compile.
//
// The two operators are linear, and each is the other's derivative, forward mode included: a node keeps the shape.
#ifndef FASTNORM_CUDA_EMULATION
#include "norm_autograd.h"
#include "pool_host.h"
#include "python_ints.h"

namespace fastnorm {
namespace {

using Ints = at::IntArrayRef;
using Divisor = std::optional<int64_t>;
using ForwardOp = Tensor(const Tensor&, Ints, Ints, Ints, bool, bool, Divisor);
using BackwardOp = Tensor(const Tensor&, c10::SymInt, c10::SymInt, Ints, Ints, Ints, bool, bool, Divisor, bool);
constexpr const char *kOp = "avg_pool2d", *kForward = "fastnorm::avg_pool2d_forward",
                     *kBackward = "fastnorm::avg_pool2d_backward";

struct Pooling {
  Window2d window;
  bool count_include_pad;
  Divisor divisor;
  c10::SymInt height, width;  // of x
  bool channels_last;

  Tensor pool(const Tensor& x) const {
    static const auto op = find_operator<ForwardOp>(kForward);
    return op.call(x, window.kernel, window.stride, window.pad, window.ceil_mode, count_include_pad, divisor);
  }
  Tensor spread(const Tensor& dy) const {
    static const auto op = find_operator<BackwardOp>(kBackward);
    return op.call(dy, height, width, window.kernel, window.stride, window.pad, window.ceil_mode, count_include_pad,
                   divisor, channels_last);
  }
};

struct AvgPool2dBackward final : torch::autograd::TraceableFunction {
  Pooling pooling;
  bool pools = false;  // the gradient of spread(); else of pool()

  std::string name() const override { return pools ? "AvgPool2dBackwardBackward" : "AvgPool2dBackward"; }

  variable_list apply(variable_list&& grads) override {
    if (!grads[0].defined()) return {Tensor()};
    std::optional<at::AutoDispatchBelowADInplaceOrView> below;
    if (!at::GradMode::is_enabled()) below.emplace();
    return {pools ? pooling.pool(grads[0]) : pooling.spread(grads[0])};
  }
};

// result = op(input), where pooling says what its derivative is.
void record(Tensor& result, const Tensor& input, bool pools, const Pooling& pooling) {
  if (torch::autograd::compute_requires_grad(input)) {
    auto [node, backward] = make_node<AvgPool2dBackward>();
    backward->set_next_edges(torch::autograd::collect_next_edges(input));
    backward->pooling = pooling;
    backward->pools = pools;
    torch::autograd::set_history(result, node);
  }
  if (torch::autograd::isFwGradDefined(input)) {
    const Tensor tangent = input._fw_grad(0);
    result._set_fw_grad(pools ? pooling.spread(tangent) : pooling.pool(tangent), 0, false);
  }
}

bool is_recorded(const Tensor& input) {
  return torch::autograd::compute_requires_grad(input) || torch::autograd::isFwGradDefined(input);
}

Tensor forward(c10::DispatchKeySet keys, const Tensor& x, Ints kernel, Ints stride, Ints padding, bool ceil_mode,
               bool count_include_pad, Divisor divisor) {
  Tensor y = [&] {
    static const auto op = find_operator<ForwardOp>(kForward);
    const at::AutoDispatchBelowADInplaceOrView below;
    return op.redispatch(keys & c10::after_ADInplaceOrView_keyset, x, kernel, stride, padding, ceil_mode,
                         count_include_pad, divisor);
  }();
  if (is_recorded(x))
    record(y, x, false,
           {Window2d(kOp, kernel, stride, padding, {1}, ceil_mode), count_include_pad, divisor, x.sym_size(-2),
            x.sym_size(-1), x.suggest_memory_format() == at::MemoryFormat::ChannelsLast});
  return y;
}

Tensor backward(c10::DispatchKeySet keys, const Tensor& dy, c10::SymInt height, c10::SymInt width, Ints kernel,
                Ints stride, Ints padding, bool ceil_mode, bool count_include_pad, Divisor divisor,
                bool channels_last) {
  Tensor dx = [&] {
    static const auto op = find_operator<BackwardOp>(kBackward);
    const at::AutoDispatchBelowADInplaceOrView below;
    return op.redispatch(keys & c10::after_ADInplaceOrView_keyset, dy, height, width, kernel, stride, padding,
                         ceil_mode, count_include_pad, divisor, channels_last);
  }();
  if (is_recorded(dy))
    record(dx, dy, true,
           {Window2d(kOp, kernel, stride, padding, {1}, ceil_mode), count_include_pad, divisor, height, width,
            channels_last});
  return dx;
}

// ---- For Python -----------------------------------------------------------------------------------------------------

Tensor python(const Tensor& x, pybind11::handle kernel_size, pybind11::handle stride_or_none,
              pybind11::handle padding_in, bool ceil_mode, bool count_include_pad, pybind11::handle divisor_or_none) {
  const PythonInts kernel(kernel_size, kOp, "kernel_size"), padding(padding_in, kOp, "padding");
  const PythonInts stride = stride_or_none.is_none() ? kernel : PythonInts(stride_or_none, kOp, "stride");
  const Divisor divisor =
      divisor_or_none.is_none() ? Divisor() : PythonInts::number(divisor_or_none, kOp, "divisor_override");
  static const auto op = find_operator<ForwardOp>(kForward);
  const pybind11::gil_scoped_release release;
  return op.call(x, kernel, stride, padding, ceil_mode, count_include_pad, divisor);
}

}  // namespace

void bind_avg_pool2d(pybind11::module_& m) {
  m.def("avg_pool2d", python, "y of torch.ops.fastnorm.avg_pool2d_forward");
}

}  // namespace fastnorm

TORCH_LIBRARY_IMPL(fastnorm, Autograd, m) {
  m.impl("avg_pool2d_forward", TORCH_FN(fastnorm::forward));
  m.impl("avg_pool2d_backward", TORCH_FN(fastnorm::backward));
}
#endif
