// What the host files of the norms share beside torch_utils.h.
#pragma once
#include "torch_utils.h"

namespace fastnorm {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline OptionalTensor contiguous(const OptionalTensor& t) { return t ? OptionalTensor(t->contiguous()) : t; }

// weight and bias have one dtype: the input's, or float32 beside a 16-bit input.
inline void check_parameter_dtypes(const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& x,
                                   const char* op) {
  for (const auto& p : {weight, bias}) {
    if (!p) continue;
    TORCH_CHECK(p->scalar_type() == x.scalar_type() ||
                    (p->scalar_type() == at::kFloat && size_of(dtype_of(x, op, "input")) == 2),
                op, ": weight and bias must be ", dtype_text(x.scalar_type()),
                " like the input, or float32 beside a 16-bit input, got ", dtype_text(p->scalar_type()));
  }
  TORCH_CHECK(!weight || !bias || weight->scalar_type() == bias->scalar_type(), op,
              ": weight and bias must have one dtype, got ", dtype_text(weight->scalar_type()), " and ",
              dtype_text(bias->scalar_type()));
}

// That of the parameters, and of their gradients.
inline at::ScalarType parameter_scalar_type(const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& x) {
  const auto& p = weight ? weight : bias;
  return p ? p->scalar_type() : accumulate_scalar_type(x.scalar_type());
}

// What forward kept for backward: so many numbers for each of the groups that have statistics, and perhaps a mask.
inline void check_saved(const Tensor& stats, const c10::SymInt& numbers, const c10::SymInt& groups,
                        const OptionalTensor& mask, const c10::SymInt& mask_bytes, const Tensor& x, const char* op) {
  TORCH_CHECK(stats.dim() == 2 && stats.sym_size(0) == numbers && stats.sym_size(1) == groups &&
                  stats.is_contiguous() && stats.scalar_type() == accumulate_scalar_type(x.scalar_type()),
              op, ": stats must be what the forward operator returned");
  TORCH_CHECK(!mask || mask->sym_numel() == 0 ||
                  (mask->sym_numel() == mask_bytes && mask->scalar_type() == at::kByte && mask->is_contiguous()),
              op, ": mask must be what the forward operator returned");
}

inline const uint8_t* mask_or_null(const OptionalTensor& mask) {
  return mask && mask->numel() != 0 ? static_cast<const uint8_t*>(mask->const_data_ptr()) : nullptr;
}

// The data of a result if it is wanted.
inline void* data_if(bool wanted, const Tensor& t) { return wanted ? t.mutable_data_ptr() : nullptr; }

// args.workspace = what bytes(args) asks for, in scope while f() runs.
template <class Args, class Bytes, class F>
void with_workspace(const Tensor& x, Args& args, Bytes bytes, F f) {
  constexpr size_t kOnStack = 16 << 10;  // a small call takes as long as a tensor's allocation
  alignas(64) char on_stack[kOnStack];
  const size_t size = bytes(args);
  Tensor scratch;
  if (size > (x.is_cpu() ? kOnStack : 0))
    scratch = empty_tensor(int64_t(size), x.options().dtype(at::kByte).memory_format(at::MemoryFormat::Contiguous));
  args.workspace = scratch.defined() ? scratch.mutable_data_ptr() : size ? on_stack : nullptr;
  f();
}

// Runs cpu::kernel(args) or cuda::kernel(args, stream) on x's device, with the workspace that it asks for.
#ifdef FASTNORM_CUDA
#define FASTNORM_RUN_CUDA(kernel, args, x, device, op)                                                            \
  if ((device) == Device::kCuda) {                                                                                \
    const CudaScope scope(x);                                                                                     \
    with_workspace(x, args, cuda::kernel##_workspace, [&] { check_cuda(cuda::kernel(args, scope.stream), op); }); \
  }
#else
#define FASTNORM_RUN_CUDA(kernel, args, x, device, op)
#endif
#ifdef FASTNORM_CUDA_EMULATION
#define FASTNORM_RUN_CPU(kernel, args, x, device)
#else
#define FASTNORM_RUN_CPU(kernel, args, x, device)                                                                  \
  if ((device) == Device::kCpu) {                                                                                  \
    (args).threads = cpu_threads((x).numel());                                                                     \
    with_workspace(x, args, [](const auto& a) { return cpu::kernel##_workspace(a); }, [&] { cpu::kernel(args); }); \
  }
#endif
#define FASTNORM_RUN(kernel, args, x, device, op)  \
  do {                                             \
    FASTNORM_RUN_CUDA(kernel, args, x, device, op) \
    FASTNORM_RUN_CPU(kernel, args, x, device)      \
  } while (false)

}  // namespace fastnorm
