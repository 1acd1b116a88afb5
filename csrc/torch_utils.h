// What the host files share: checks with one style of message, torch's types in the kernels' terms, and the device
// switch.  Narrow headers only: ATen/ATen.h would add seconds to every host file.
#pragma once
#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <optional>
#include <sstream>
#include <string>
#include <string_view>

#include "activation.h"
#include "dtype.h"
#if defined(FASTNORM_CUDA_EMULATION)
#include "cuda_emulator.h"
#elif defined(FASTNORM_CUDA)
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

// The operators' namespace.  The test-only build that runs the CUDA kernels on the CPU has its own.
#ifdef FASTNORM_CUDA_EMULATION
#define FASTNORM_LIBRARY fastnorm_emu
#else
#define FASTNORM_LIBRARY fastnorm
#endif

namespace fastnorm {

// A copy, as torch 2.11 returns strings of its own and torch 2.13 views.
inline std::string dtype_text(at::ScalarType t) { return std::string(c10::getDtypeNames(t).first); }

inline DType dtype_of(at::ScalarType t, const char* op, const char* name) {
  switch (t) {
    case at::kDouble: return DType::kFloat64;
    case at::kFloat: return DType::kFloat32;
    case at::kHalf: return DType::kFloat16;
    case at::kBFloat16: return DType::kBFloat16;
    default:
      TORCH_CHECK_NOT_IMPLEMENTED(false, op, ": ", name, " must be float64, float32, float16 or bfloat16, got ",
                                  dtype_text(t));
  }
}
inline DType dtype_of(const at::Tensor& t, const char* op, const char* name) {
  return dtype_of(t.scalar_type(), op, name);
}

inline at::ScalarType accumulate_scalar_type(at::ScalarType t) { return t == at::kDouble ? at::kDouble : at::kFloat; }

inline Activation activation_of(std::string_view name, const char* op) {
  for (int i = 0; i < int(std::size(kActivationNames)); i++)
    if (name == kActivationNames[i]) return Activation(i);
  TORCH_CHECK_VALUE(false, op,
                    ": activation must be one of none, relu, relu6, leaky_relu, elu, sigmoid, tanh, silu, gelu, ",
                    "gelu_tanh, hardswish, got ", name);
}

inline void check_same_device(const at::Tensor& t, const at::Tensor& x, const char* op, const char* name) {
  TORCH_CHECK(t.device() == x.device(), op, ": ", name, " must be on ", x.device(), " like the input, got ",
              t.device());
}

// A shape as Python writes it.
inline std::string shape_text(const at::Tensor& t) {
  std::ostringstream text;
  for (int64_t d = 0; d < t.dim(); d++) text << (d ? ", " : "(") << t.sym_size(d);
  return text.str() + (t.dim() == 0 ? "()" : t.dim() == 1 ? ",)" : ")");
}

// A per-channel argument: [channels], on x's device.
inline void check_channels(const std::optional<at::Tensor>& t, const at::Tensor& x, const c10::SymInt& channels,
                           const char* op, const char* name) {
  if (!t) return;
  TORCH_CHECK(t->dim() == 1 && t->sym_size(0) == channels, op, ": ", name, " must have shape (", channels, ",), got ",
              shape_text(*t));
  check_same_device(*t, x, op, name);
}

// A tensor that goes with x element by element.
inline void check_like(const at::Tensor& t, const at::Tensor& x, const char* op, const char* name) {
  TORCH_CHECK(t.sym_sizes() == x.sym_sizes(), op, ": ", name, " must have the input's shape ", shape_text(x), ", got ",
              shape_text(t));
  TORCH_CHECK(t.scalar_type() == x.scalar_type(), op, ": ", name, " must have the input's dtype ",
              dtype_text(x.scalar_type()), ", got ", dtype_text(t.scalar_type()));
  check_same_device(t, x, op, name);
}

inline const void* data_or_null(const std::optional<at::Tensor>& t) { return t ? t->const_data_ptr() : nullptr; }
inline void* mutable_data_or_null(const std::optional<at::Tensor>& t) { return t ? t->mutable_data_ptr() : nullptr; }

// at::empty(); past the dispatcher for memory of the CPU, which costs a tiny batch more than its arithmetic.
inline at::Tensor empty_tensor(c10::SymIntArrayRef sizes, const at::TensorOptions& options) {
  const bool filled = at::globalContext().deterministicAlgorithms();  // torch's operator fills it with NaN then
  const auto ints = options.device().is_cpu() && !filled ? c10::asIntArrayRefSlowOpt(sizes) : std::nullopt;
  return ints ? at::Tensor(at::detail::empty_cpu(*ints, options)) : at::empty_symint(sizes, options);
}
inline at::Tensor empty_tensor(const c10::SymInt& size, const at::TensorOptions& options) {
  return empty_tensor(c10::SymIntArrayRef(size), options);
}

// How many threads a kernel over this many elements may use: a region costs more than 32k elements do.
inline int cpu_threads(int64_t numel) {
  if (at::in_parallel_region()) return 1;
  return int(std::min<int64_t>(at::get_num_threads(), 1 + numel / 32768));
}

// ---- The device switch ----------------------------------------------------------------------------------------------

enum class Device { kMeta, kCpu, kCuda };

inline Device device_of(const at::Tensor& x, const char* op) {
  if (x.is_meta()) return Device::kMeta;
#if defined(FASTNORM_CUDA_EMULATION)
  if (x.is_cpu()) return Device::kCuda;
#else
  if (x.is_cpu()) return Device::kCpu;
#ifdef FASTNORM_CUDA
  if (x.is_cuda()) return Device::kCuda;
#else
  TORCH_CHECK(!x.is_cuda(), op,
              ": this build of fastnorm has no CUDA kernels; rebuild where nvcc and a CUDA torch are: ",
              "FASTNORM_CUDA=1 pip install --no-build-isolation --force-reinstall fastnorm");
#endif
#endif
  TORCH_CHECK_NOT_IMPLEMENTED(false, op, ": the device must be cpu, cuda or meta, got ", x.device());
}

#ifdef FASTNORM_CUDA
// The tensor's GPU and its current stream, while in scope.
struct CudaScope {
#ifdef FASTNORM_CUDA_EMULATION
  explicit CudaScope(const at::Tensor&) {}
  cudaStream_t stream = nullptr;
#else
  explicit CudaScope(const at::Tensor& t) : guard(t.device()), stream(c10::cuda::getCurrentCUDAStream()) {}
  c10::cuda::CUDAGuard guard;
  cudaStream_t stream;
#endif
};

inline void check_cuda(cudaError_t error, const char* op) {
#ifdef FASTNORM_CUDA_EMULATION
  TORCH_CHECK(error == cudaSuccess, op, ": ", cuda_emulator::last_error());
#else
  TORCH_CHECK(error == cudaSuccess, op, ": CUDA error: ", cudaGetErrorString(error));
#endif
}
#endif

}  // namespace fastnorm
