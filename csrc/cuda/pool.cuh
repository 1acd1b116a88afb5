// What the pooling kernels share: work items and types.
#pragma once
#include "index.cuh"
#include "pool.h"
#include "vector.cuh"

namespace fastnorm {
namespace {

constexpr int kPoolThreads = 256;

__device__ __forceinline__ int64_t work_item() { return int64_t(blockIdx.x) * kPoolThreads + threadIdx.x; }

// The blocks that so many work items, at least one, need.
inline dim3 pool_blocks(int64_t items) { return dim3(unsigned((items + kPoolThreads - 1) / kPoolThreads)); }

// f(T()) with the C++ type.
template <class F>
cudaError_t with_pool_type(DType t, F f) {
  switch (t) {
    case DType::kFloat64: return f(double());
    case DType::kFloat32: return f(float());
    case DType::kFloat16: return f(__half());
    case DType::kBFloat16: return f(__nv_bfloat16());
  }
  return cudaErrorInvalidValue;
}

}  // namespace
}  // namespace fastnorm
