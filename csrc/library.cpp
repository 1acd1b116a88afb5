// The extension module: importing it registers the operators; isa() says which CPU kernels run; the forward operators
// for Python outside of torch.compile.
#include <ATen/Version.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <atomic>
#include <iterator>
#include <optional>
#include <string>

#include "cpu/isa.h"
#include "norm_autograd.h"

namespace fastnorm::cpu {

namespace {

constexpr const char* kIsaNames[] = {"DEFAULT", "AVX2", "AVX512"};
constexpr int kChosen = -1;
std::atomic<int> forced = kChosen;

Isa isa_of_processor() {
#ifdef FASTNORM_X86
  static const Isa found = [] {
    const std::string name = at::get_cpu_capability();
    return name == "AVX512" ? Isa::kAvx512 : name == "AVX2" ? Isa::kAvx2 : Isa::kDefault;
  }();
  return found;
#else
  return Isa::kDefault;
#endif
}

std::string isa_name() { return kIsaNames[int(isa())]; }

// For tests: the kernels of one instruction set for every call, or with None those that are chosen.
void force_isa(std::optional<std::string_view> name) {
  const auto* const found = std::find(std::begin(kIsaNames), std::end(kIsaNames), name.value_or(""));
  TORCH_CHECK_VALUE(!name || found <= kIsaNames + int(isa_of_processor()), "force_isa: this processor has no ", *name);
  forced = name ? int(found - kIsaNames) : kChosen;
}

}  // namespace

Isa isa(bool narrow_will_do) {
  if (const int i = forced.load(std::memory_order_relaxed); i != kChosen) return Isa(i);
  return narrow_will_do ? std::min(isa_of_processor(), Isa::kAvx2) : isa_of_processor();
}

}  // namespace fastnorm::cpu

namespace fastnorm {

// In the ops' ..._autograd.cpp:
void bind_avg_pool2d(pybind11::module_&);
void bind_conv2d(pybind11::module_&);
void bind_max_pool2d(pybind11::module_&);

namespace {

// ---- Operators ------------------------------------------------------------------------------------------------------

// What torch.ops.fastnorm would call: but arguments go from Python to the dispatcher without the schema being read and
// without a stack of boxed values, which a tiny batch notices.

// Calls an operator without holding the interpreter's lock.
template <class Signature, class... Args>
auto call(const c10::TypedOperatorHandle<Signature>& op, const Args&... args) {
  const pybind11::gil_scoped_release release;
  return op.call(args...);
}

Tensor batch_norm(const Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
                  const OptionalTensor& bias, const OptionalTensor& running_mean, const OptionalTensor& running_var,
                  const OptionalTensor& num_batches_tracked, bool training, std::optional<double> momentum, double eps,
                  std::string_view activation, double negative_slope) {
  static const auto op = find_operator<BatchNormForwardOp>("fastnorm::batch_norm_forward");
  static const auto frozen = find_operator<BatchNormForwardOp>("fastnorm::batch_norm_forward", "frozen");
  return std::get<0>(call(training ? op : frozen, x, residual, weight, bias, running_mean, running_var,
                          num_batches_tracked, training, momentum, eps, activation, negative_slope, false));
}

void batch_norm_inference_(const Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
                           const OptionalTensor& bias, const Tensor& running_mean, const Tensor& running_var,
                           double eps, std::string_view activation, double negative_slope) {
  static const auto op =
      find_operator<void(const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                         const Tensor&, const Tensor&, double, std::string_view, double)>(
          "fastnorm::batch_norm_inference_");
  call(op, x, residual, weight, bias, running_mean, running_var, eps, activation, negative_slope);
}

std::pair<Tensor, OptionalTensor> layer_norm(const Tensor& x, const OptionalTensor& addend,
                                             const OptionalTensor& residual, const OptionalTensor& weight,
                                             const OptionalTensor& bias, c10::SymIntArrayRef normalized_shape,
                                             int64_t dim, bool rms, double eps, std::string_view activation,
                                             double negative_slope) {
  static const auto op = find_operator<LayerNormForwardOp>("fastnorm::layer_norm_forward");
  auto result =
      call(op, x, addend, residual, weight, bias, normalized_shape, dim, rms, eps, activation, negative_slope, false);
  return {std::get<0>(result), addend ? OptionalTensor(std::get<1>(result)) : std::nullopt};
}

std::pair<Tensor, Tensor> group_norm(const Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
                                     const OptionalTensor& bias, const c10::SymInt& groups, double eps,
                                     std::string_view activation, double negative_slope) {
  static const auto op = find_operator<GroupNormForwardOp>("fastnorm::group_norm_forward");
  auto result = call(op, x, residual, weight, bias, groups, eps, activation, negative_slope, false);
  return {std::get<0>(result), std::get<1>(result)};
}

}  // namespace
}  // namespace fastnorm

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastnorm's compiled operators (torch.ops.fastnorm).";
  m.def("isa", fastnorm::cpu::isa_name, "The instruction set whose CPU kernels run, but for the shortest calls");
  m.def("force_isa", fastnorm::cpu::force_isa, "For tests: that of every call, or None");
  m.def("batch_norm", fastnorm::batch_norm, "y of torch.ops.fastnorm.batch_norm_forward");
  m.def("batch_norm_inference_", fastnorm::batch_norm_inference_, "torch.ops.fastnorm.batch_norm_inference_");
  m.def("layer_norm", fastnorm::layer_norm, "y, and sum or None, of torch.ops.fastnorm.layer_norm_forward");
  m.def("group_norm", fastnorm::group_norm, "y and stats of torch.ops.fastnorm.group_norm_forward");
  fastnorm::bind_avg_pool2d(m);
  fastnorm::bind_conv2d(m);
  fastnorm::bind_max_pool2d(m);
}
