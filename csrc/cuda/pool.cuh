// What the pooling kernels share: work items.
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

}  // namespace
}  // namespace fastnorm
