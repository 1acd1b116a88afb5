// Convolution, host side: schema, argument checks, allocation, device and algorithm switch.
#include "conv2d.h"

#include <ATen/Context.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/elu.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/hardswish.h>
#include <ATen/ops/leaky_relu.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/relu6.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/tanh.h>
#include <torch/library.h>

#include <tuple>

#include "conv2d_choice.h"
#include "conv2d_host.h"

namespace fastnorm {

// ---- Torch's own ----------------------------------------------------------------------------------------------------

namespace {

// As torch's: channels_last if either argument is.
at::MemoryFormat format_of(const Tensor& x, const Tensor& weight) {
  const bool channels_last = x.suggest_memory_format() == at::MemoryFormat::ChannelsLast ||
                             weight.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
  return channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

// Whether there is something to mend for the CPU's kernels, and not a graph being recorded.
bool is_on_cpu(const Tensor& t) { return t.is_cpu() && !t.unsafeGetTensorImpl()->has_symbolic_sizes_strides(); }

// Dilated windows along an axis, none of which sees a pixel; there are some.
bool sees_nothing(const Tensor& x, const Tensor& weight, const ConvWindow& w, int d) {
  const int64_t in = x.size(2 + d), kernel = weight.size(2 + d);
  const int64_t end = in + 2 * w.padding[d] - w.dilation[d] * (kernel - 1);
  if (w.dilation[d] == 1 || in == 0 || kernel == 0 || end <= 0) return false;
  for (int64_t first = -w.padding[d]; first < end - w.padding[d]; first += w.stride[d])
    for (int64_t tap = 0; tap < kernel; tap++)
      if (const int64_t at = first + tap * w.dilation[d]; at >= 0 && at < in) return false;
  return true;
}

// What torch cannot be asked.  oneDNN 3.12 crashes over windows that see nothing.  With AMX, in 16 bits, it reads and
// writes other memory where a row has one result, or fewer pixels than a stride.  In bfloat16 and channels_last it
// leaves the gradient to a depthwise weight unwritten if rows are apart.
bool torch_is_lost(const Tensor& x, const Tensor& weight, const ConvWindow& w, bool to_weight) {
  if (x.dim() != 4 || weight.dim() != 4 || !is_on_cpu(x) || !is_on_cpu(weight)) return false;
  if (sees_nothing(x, weight, w, 0) || sees_nothing(x, weight, w, 1)) return true;
  if (!at::isReducedFloatingType(x.scalar_type())) return false;
  const bool unwritten = to_weight && x.scalar_type() == at::kBFloat16 && w.dilation[0] > 1 && w.groups > 1 &&
                         weight.size(0) == w.groups && format_of(x, weight) == at::MemoryFormat::ChannelsLast;
  return unwritten || (w.stride[1] > 1 && (x.size(3) < w.stride[1] || w.output(x.size(3), weight.size(3), 1) == 1));
}

// The same convolution of an image that has its padding, in 32 bits or more.
struct PaddedConvolution {
  Tensor x, weight;
  ConvWindow window;

  PaddedConvolution(const Tensor& x, const Tensor& weight, const ConvWindow& w)
      : x(at::constant_pad_nd(wide(x), {w.padding[1], w.padding[1], w.padding[0], w.padding[0]})),
        weight(wide(weight)),
        window(w) {
    window.padding = {0, 0};
  }
  static Tensor wide(const Tensor& t) { return at::isReducedFloatingType(t.scalar_type()) ? t.to(at::kFloat) : t; }
};

// A single sample's stride says nothing; torch's own loops over groups go by it.
Tensor with_stride_of_samples(const Tensor& x) {
  if (!is_on_cpu(x) || x.size(0) != 1 || x.stride(0) == x.numel()) return x;
  std::vector<int64_t> strides = x.strides().vec();
  strides[0] = x.numel();
  return x.as_strided(x.sizes(), strides);
}

}  // namespace

Tensor torch_convolution(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const ConvWindow& w) {
  if (torch_is_lost(x, weight, w, false)) {
    const PaddedConvolution p(x, weight, w);
    const OptionalTensor wide_bias = bias ? OptionalTensor(p.wide(*bias)) : bias;
    return torch_convolution(p.x, p.weight, wide_bias, p.window).to(x.scalar_type());
  }
  return at::convolution(x, weight, bias, w.stride, w.padding, w.dilation, false, {0, 0}, w.groups);
}

std::tuple<Tensor, Tensor, Tensor> torch_convolution_backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                                              const ConvWindow& w, std::array<bool, 3> mask) {
  if (torch_is_lost(x, weight, w, mask[1])) {
    const PaddedConvolution p(x, weight, w);
    auto [dx, dweight, dbias] = torch_convolution_backward(p.wide(dy), p.x, p.weight, p.window, mask);
    if (mask[0]) dx = dx.narrow(2, w.padding[0], x.size(2)).narrow(3, w.padding[1], x.size(3));
    for (Tensor* t : {&dx, &dweight, &dbias})
      if (t->defined()) *t = t->to(x.scalar_type());
    return {dx, dweight, dbias};
  }
  const std::array<c10::SymInt, 2> stride{w.stride[0], w.stride[1]}, padding{w.padding[0], w.padding[1]},
      dilation{w.dilation[0], w.dilation[1]}, none{0, 0};
  const std::array<c10::SymInt, 1> bias{weight.sym_size(0)};
  return at::convolution_backward_symint(with_stride_of_samples(dy), with_stride_of_samples(x), weight,
                                         at::OptionalSymIntArrayRef(bias), stride, padding, dilation, false, none,
                                         w.groups, mask);
}

Tensor torch_activate(Activation activation, const Tensor& z, double negative_slope) {
  switch (activation) {
    case Activation::kNone: return z;
    case Activation::kRelu: return at::relu(z);
    case Activation::kRelu6: return at::relu6(z);
    case Activation::kLeakyRelu: return at::leaky_relu(z, negative_slope);
    case Activation::kElu: return at::elu(z);
    case Activation::kSigmoid: return at::sigmoid(z);
    case Activation::kTanh: return at::tanh(z);
    case Activation::kSilu: return at::silu(z);
    case Activation::kGelu: return at::gelu(z);
    case Activation::kGeluTanh: return at::gelu(z, "tanh");
    case Activation::kHardswish: return at::hardswish(z);
  }
  return z;
}

namespace {

constexpr const char* kOp = "conv2d";

std::optional<ConvAlgorithm> algorithm_of(std::string_view name) {
  if (name == "auto") return std::nullopt;
  for (int i = 0; i < int(std::size(kConvAlgorithmNames)); i++)
    if (name == kConvAlgorithmNames[i]) return ConvAlgorithm(i);
  TORCH_CHECK_VALUE(false, kOp,
                    ": algorithm must be one of auto, torch, im2col, direct, depthwise, winograd, winograd_2x2, got ",
                    name);
}

// Checks that x, weight and window go together, as torch does.
void check_arguments(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const ConvWindow& w) {
  TORCH_CHECK(x.dim() == 4, kOp,
              ": Expected 3D (unbatched) or 4D (batched) input to conv2d, but got input of size: ", shape_text(x));
  TORCH_CHECK(weight.dim() == 4, kOp, ": weight must have 4 dimensions, got shape ", shape_text(weight));
  check_same_device(weight, x, kOp, "weight");
  TORCH_CHECK(weight.scalar_type() == x.scalar_type(), kOp, ": Input type (", dtype_text(x.scalar_type()),
              ") and weight type (", dtype_text(weight.scalar_type()), ") should be the same");
  TORCH_CHECK(weight.sym_size(0) >= w.groups, kOp, ": Given groups=", w.groups, ", expected weight to be at least ",
              w.groups, " at dimension 0, but got weight of size ", shape_text(weight), " instead");
  TORCH_CHECK(weight.sym_size(0) % w.groups == 0, kOp, ": Given groups=", w.groups,
              ", expected weight to be divisible by ", w.groups, " at dimension 0, but got weight of size ",
              shape_text(weight), " instead");
  TORCH_CHECK(x.sym_size(1) == weight.sym_size(1) * w.groups, kOp, ": Given groups=", w.groups, ", weight of size ",
              shape_text(weight), ", expected input", shape_text(x), " to have ", weight.sym_size(1) * w.groups,
              " channels, but got ", x.sym_size(1), " channels instead");
  if (bias) {
    TORCH_CHECK(bias->dim() == 1 && bias->sym_size(0) == weight.sym_size(0), kOp, ": Given weight of size ",
                shape_text(weight), ", expected bias to be 1-dimensional with ", weight.sym_size(0),
                " elements, but got bias of size ", shape_text(*bias), " instead");
    check_same_device(*bias, x, kOp, "bias");
    TORCH_CHECK(bias->scalar_type() == x.scalar_type(), kOp, ": Input type (", dtype_text(x.scalar_type()),
                ") and bias type (", dtype_text(bias->scalar_type()), ") should be the same");
  }
  for (int d = 0; d < 2; d++) {
    const c10::SymInt padded = x.sym_size(2 + d) + 2 * w.padding[d],
                      reach = w.dilation[d] * (weight.sym_size(2 + d) - 1) + 1;
    TORCH_CHECK(weight.sym_size(2 + d) > 0 && padded >= reach, kOp, ": Calculated padded input size per channel: (",
                x.sym_size(2) + 2 * w.padding[0], " x ", x.sym_size(3) + 2 * w.padding[1], "). Kernel size: (",
                weight.sym_size(2), " x ", weight.sym_size(3),
                "). Kernel size can't be greater than actual input size");
  }
}

ConvShape shape_of(const Tensor& x, const Tensor& weight, const ConvWindow& w, at::MemoryFormat format, Device device) {
  auto axis = [&](int d) {
    const int64_t in = x.size(2 + d), kernel = weight.size(2 + d);
    return ConvAxis{int(in),           int(w.output(in, kernel, d).expect_int()),
                    int(kernel),       int(w.stride[d]),
                    int(w.padding[d]), int(w.dilation[d])};
  };
  return {x.size(0),
          w.groups,
          weight.size(1),
          weight.size(0) / w.groups,
          axis(0),
          axis(1),
          format == at::MemoryFormat::ChannelsLast,
          dtype_of(x, kOp, "input"),
          device == Device::kCpu && weight.suggest_memory_format() == at::MemoryFormat::ChannelsLast};
}

at::MemoryFormat weight_format(const ConvShape& s) {
  return s.weight_channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

// Nothing to compute, or no terms to add up: torch's own operators know every such case.
bool is_empty(const ConvShape& s) { return s.inputs() == 0 || s.outputs() == 0 || s.weights() == 0; }

// Whether torch's convolution is oneDNN's, as torch itself tells; for 16 bits that depends on the processor.
bool torch_has_onednn(DType dtype) {
  auto ask = [](const char* op) {
    const auto schema = c10::Dispatcher::singleton().findSchema({op, ""});
    return schema && schema->typed<bool()>().call();
  };
  static const bool bfloat16 = ask("mkldnn::_is_mkldnn_bf16_supported"),
                    float16 = ask("mkldnn::_is_mkldnn_fp16_supported");
  switch (dtype) {
    case DType::kFloat64: return false;
    case DType::kBFloat16: return bfloat16;
    case DType::kFloat16: return float16;
    default: return true;
  }
}

// What runs a pass.  forced: what the caller asked for; for a pass that it has no kernel for, im2col.
ConvAlgorithm choose(std::optional<ConvAlgorithm> forced, const ConvShape& shape, ConvPass pass, Device device) {
  if (is_empty(shape)) return ConvAlgorithm::kTorch;
  if (forced) {
    TORCH_CHECK_VALUE(computes(*forced, shape, ConvPass::kForward), kOp, ": algorithm ",
                      kConvAlgorithmNames[int(*forced)], " does not compute this convolution");
    return computes(*forced, shape, pass) ? *forced : ConvAlgorithm::kIm2col;
  }
#ifdef FASTNORM_CUDA_EMULATION
  return ConvAlgorithm::kIm2col;
#else
  if (device == Device::kCuda) return ConvAlgorithm::kTorch;  // ours were not timed against cuDNN's
  const bool approximate = at::globalContext().float32MatmulPrecision() != at::Float32MatmulPrecision::HIGHEST;
  return choose(shape, pass, approximate, torch_has_onednn(shape.dtype));
#endif
}

// ---- Kernels --------------------------------------------------------------------------------------------------------

#define FASTNORM_CONV2D_CASE(algorithm, name, pass)                                           \
  case ConvAlgorithm::algorithm:                                                              \
    return with_workspace(                                                                    \
        like, args, [](const auto& a) { return cpu::conv2d_##name##_##pass##_workspace(a); }, \
        [&] { cpu::conv2d_##name##_##pass(args); });
#ifdef FASTNORM_CUDA_EMULATION
#define FASTNORM_CONV2D_CPU(...)
#else
#define FASTNORM_CONV2D_CPU(...)                                                                    \
  if (device == Device::kCpu) switch (algorithm) {                                                  \
      __VA_ARGS__                                                                                   \
      default: TORCH_INTERNAL_ASSERT(false, "no kernel for ", kConvAlgorithmNames[int(algorithm)]); \
    }
#endif
#ifdef FASTNORM_CUDA
#define FASTNORM_CONV2D_CUDA(pass)                                                            \
  if (device == Device::kCuda) {                                                              \
    const CudaScope scope(like);                                                              \
    return with_workspace(like, args, cuda::conv2d_##pass##_workspace,                        \
                          [&] { check_cuda(cuda::conv2d_##pass(args, scope.stream), kOp); }); \
  }
#else
#define FASTNORM_CONV2D_CUDA(pass)
#endif
// An elementwise kernel's element takes as long as so many of a product's terms, for the number of threads.
constexpr int64_t kTermsPerElement = 32;

// run_kernel(algorithm, args, a tensor on the device, device) of a pass, with the cases of its CPU kernels.
#define FASTNORM_CONV2D_RUN(Args, pass, ...)                                               \
  void run_kernel(ConvAlgorithm algorithm, Args args, const Tensor& like, Device device) { \
    args.threads = cpu_threads(args.shape.multiply_adds() / kTermsPerElement);             \
    args.tf32 = at::globalContext().allowTF32CuBLAS();                                     \
    FASTNORM_CONV2D_CUDA(pass)                                                             \
    FASTNORM_CONV2D_CPU(__VA_ARGS__)                                                       \
  }
// clang-format off
FASTNORM_CONV2D_RUN(Conv2dForward, forward,
                    FASTNORM_CONV2D_CASE(kIm2col, im2col, forward)
                    FASTNORM_CONV2D_CASE(kDirect, direct, forward)
                    FASTNORM_CONV2D_CASE(kDepthwise, depthwise, forward)
                    FASTNORM_CONV2D_CASE(kWinograd, winograd, forward)
                    FASTNORM_CONV2D_CASE(kWinograd2x2, winograd_2x2, forward))
FASTNORM_CONV2D_RUN(Conv2dBackwardInput, backward_input,
                    FASTNORM_CONV2D_CASE(kIm2col, im2col, backward_input)
                    FASTNORM_CONV2D_CASE(kDirect, direct, backward_input)
                    FASTNORM_CONV2D_CASE(kDepthwise, depthwise, backward_input)
                    FASTNORM_CONV2D_CASE(kWinograd, winograd, backward_input)
                    FASTNORM_CONV2D_CASE(kWinograd2x2, winograd_2x2, backward_input))
FASTNORM_CONV2D_RUN(Conv2dBackwardWeight, backward_weight,
                    FASTNORM_CONV2D_CASE(kIm2col, im2col, backward_weight)
                    FASTNORM_CONV2D_CASE(kDirect, direct, backward_weight)
                    FASTNORM_CONV2D_CASE(kDepthwise, depthwise, backward_weight)
                    FASTNORM_CONV2D_CASE(kWinograd, winograd, backward_weight)
                    FASTNORM_CONV2D_CASE(kWinograd2x2, winograd_2x2, backward_weight))
// clang-format on

// Where Winograd's sums are not all finite, plain sums take their place: infinities are as torch has them.
template <class Args>
void run(ConvAlgorithm algorithm, Args args, const Tensor& like, Device device) {
  bool all_finite = true;
  args.all_finite = &all_finite;
  run_kernel(algorithm, args, like, device);
  if (all_finite) return;
  if constexpr (requires { args.packed; }) args.packed = nullptr, args.is_packed = false;
  run_kernel(ConvAlgorithm::kIm2col, args, like, device);
}

// Of a weight in the kernel's form; 0 for kernels that pack it as fast as it is compared.
size_t packed_bytes(ConvAlgorithm algorithm, const Conv2dForward& a) {
#ifndef FASTNORM_CUDA_EMULATION
  if (algorithm == ConvAlgorithm::kIm2col) return cpu::conv2d_im2col_packed(a);
  if (algorithm == ConvAlgorithm::kWinograd) return cpu::conv2d_winograd_packed(a);
  if (algorithm == ConvAlgorithm::kWinograd2x2) return cpu::conv2d_winograd_2x2_packed(a);
#endif
  return 0;
}

// ---- Operators ------------------------------------------------------------------------------------------------------

Tensor conv2d_forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, at::IntArrayRef stride,
                      at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, std::string_view activation,
                      double negative_slope, std::string_view algorithm) {
  dtype_of(x, kOp, "input");
  const ConvWindow window(stride, padding, dilation, groups);
  const Activation kind = activation_of(activation, kOp);
  check_arguments(x, weight, bias, window);
  const Device device = device_of(x, kOp);
  const auto format = format_of(x, weight);
  auto empty = [&] {
    return empty_tensor({x.sym_size(0), weight.sym_size(0), window.output(x.sym_size(2), weight.sym_size(2), 0),
                         window.output(x.sym_size(3), weight.sym_size(3), 1)},
                        x.options().memory_format(format));
  };
  const auto forced = algorithm_of(algorithm);
  if (device == Device::kMeta) return empty();
  const ConvShape shape = shape_of(x, weight, window, format, device);
  const ConvAlgorithm chosen = choose(forced, shape, ConvPass::kForward, device);
  if (chosen == ConvAlgorithm::kTorch) {
    Tensor z = torch_convolution(x, weight, bias, window);
    return (kind == Activation::kRelu ? at::relu_(z) : torch_activate(kind, z, negative_slope)).contiguous(format);
  }
  Tensor y = empty();
  const Tensor dense_x = x.contiguous(format), dense_weight = weight.contiguous(weight_format(shape));
  const OptionalTensor dense_bias = contiguous(bias);
  Conv2dForward a{};
  a.shape = shape, a.x = dense_x.const_data_ptr(), a.weight = dense_weight.const_data_ptr();
  a.bias = data_or_null(dense_bias), a.y = y.mutable_data_ptr();
  a.activation = kind, a.negative_slope = negative_slope;
  std::optional<PackedFilters> filters;
  if (device == Device::kCpu && dense_weight.is_same(weight)) {
    filters.emplace(weight, chosen, shape.groups, [&] { return packed_bytes(chosen, a); });
    a.packed = filters->memory(), a.is_packed = filters->ready();
  }
  run(chosen, a, y, device);
  if (filters) filters->keep();
  return y;
}

// dx, dweight and dbias, those that output_mask wants; dy as it is before the activation.
std::tuple<Tensor, Tensor, Tensor> conv2d_backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                                   at::IntArrayRef stride, at::IntArrayRef padding,
                                                   at::IntArrayRef dilation, int64_t groups, std::string_view algorithm,
                                                   std::array<bool, 3> output_mask) {
  dtype_of(x, kOp, "input");
  const ConvWindow window(stride, padding, dilation, groups);
  check_arguments(x, weight, std::nullopt, window);
  const auto format = format_of(x, weight);
  TORCH_CHECK(dy.dim() == 4 && dy.sym_size(0) == x.sym_size(0) && dy.sym_size(1) == weight.sym_size(0) &&
                  dy.sym_size(2) == window.output(x.sym_size(2), weight.sym_size(2), 0) &&
                  dy.sym_size(3) == window.output(x.sym_size(3), weight.sym_size(3), 1),
              kOp, ": dy must have the output's shape, got ", shape_text(dy));
  TORCH_CHECK(dy.scalar_type() == x.scalar_type(), kOp, ": dy must have the input's dtype ",
              dtype_text(x.scalar_type()), ", got ", dtype_text(dy.scalar_type()));
  check_same_device(dy, x, kOp, "dy");
  const auto forced = algorithm_of(algorithm);
  const Device device = device_of(x, kOp);
  const auto plain = x.options().memory_format(at::MemoryFormat::Contiguous);
  auto empty_dx = [&] { return empty_tensor(x.sym_sizes(), x.options().memory_format(format)); };
  const auto dweight_format = weight.suggest_memory_format();  // in another autograd would copy it
  auto empty_dweight = [&](at::MemoryFormat f) { return empty_tensor(weight.sym_sizes(), plain.memory_format(f)); };
  auto empty_dbias = [&] { return empty_tensor(weight.sym_size(0), plain); };
  Tensor result[3];
  auto results = [&] {
    for (auto& t : result)
      if (!t.defined()) t = empty_tensor(0, plain);
    return std::tuple(result[0], result[1], result[2]);
  };
  const auto [want_dx, want_dweight, want_dbias] = output_mask;
  if (device == Device::kMeta) {
    if (want_dx) result[0] = empty_dx();
    if (want_dweight) result[1] = empty_dweight(dweight_format);
    if (want_dbias) result[2] = empty_dbias();
    return results();
  }
  const ConvShape shape = shape_of(x, weight, window, format, device);
  const auto for_dx = choose(forced, shape, ConvPass::kBackwardInput, device),
             for_dweight = choose(forced, shape, ConvPass::kBackwardWeight, device);
  // What torch computes, a bias alone among it, for which there is no need of a product.
  const bool torch_dweight = for_dweight == ConvAlgorithm::kTorch || !want_dweight;
  const std::array<bool, 3> torch_mask{want_dx && for_dx == ConvAlgorithm::kTorch, want_dweight && torch_dweight,
                                       want_dbias && torch_dweight};
  if (torch_mask != std::array<bool, 3>{}) {
    auto [dx, dweight, dbias] = torch_convolution_backward(dy, x, weight, window, torch_mask);
    if (torch_mask[0]) result[0] = dx.contiguous(format);
    if (torch_mask[1]) result[1] = dweight.contiguous(dweight_format);
    if (torch_mask[2]) result[2] = dbias;
  }
  if (torch_mask == output_mask) return results();
  const Tensor dense_dy = dy.contiguous(format);
  if (want_dx && !torch_mask[0]) {
    result[0] = empty_dx();
    const Tensor dense_weight = weight.contiguous(weight_format(shape));
    Conv2dBackwardInput a{};
    a.shape = shape, a.dy = dense_dy.const_data_ptr(), a.weight = dense_weight.const_data_ptr();
    a.dx = result[0].mutable_data_ptr();
    run(for_dx, a, dense_dy, device);
  }
  if (want_dweight && !torch_mask[1]) {
    result[1] = empty_dweight(weight_format(shape));
    if (want_dbias) result[2] = empty_dbias();
    const Tensor dense_x = x.contiguous(format);
    Conv2dBackwardWeight a{};
    a.shape = shape, a.x = dense_x.const_data_ptr(), a.dy = dense_dy.const_data_ptr();
    a.dweight = result[1].mutable_data_ptr(), a.dbias = data_if(want_dbias, result[2]);
    run(for_dweight, a, dense_dy, device);
    result[1] = result[1].contiguous(dweight_format);
  }
  return results();
}

}  // namespace
}  // namespace fastnorm

TORCH_LIBRARY_FRAGMENT(FASTNORM_LIBRARY, m) {
  m.def(
      "conv2d_forward(Tensor x, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, int[2] dilation, "
      "int groups, str activation, float negative_slope, str algorithm) -> Tensor y",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "conv2d_backward(Tensor dy, Tensor x, Tensor weight, int[2] stride, int[2] padding, int[2] dilation, "
      "int groups, str algorithm, bool[3] output_mask) -> (Tensor dx, Tensor dweight, Tensor dbias)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(FASTNORM_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("conv2d_forward", fastnorm::conv2d_forward);
  m.impl("conv2d_backward", fastnorm::conv2d_backward);
}
