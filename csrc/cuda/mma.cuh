// Tensor cores (sm_80 and later): fragments of 16 x 8 results in a warp's registers.
//
// As the PTX manual has it, with g = lane / 4 and t = lane % 4, and words of 32 bits, each two values of k in 16-bit
// types or one in tf32:
//   a  rows g, g + 8, g, g + 8 of the left side, words t, t, t + 4, t + 4
//   b  row g of the right side, words t and t + 4
//   c  (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
#pragma once
#include <cstdint>

#include "launch.cuh"

#ifdef FASTNORM_CUDA_EMULATION
#include "tensor_cores.h"
#endif

namespace fastnorm {
namespace {

#ifdef FASTNORM_CUDA_EMULATION

using cuda_emulator::load_matrices;
using cuda_emulator::multiply_add;
using cuda_emulator::tf32;

#else

// Four matrices of 8 rows of 16 bytes: lane l gives where row l % 8 of matrix l / 8 is, and gets word t of row g of
// each.
__device__ __forceinline__ void load_matrices(uint32_t (&words)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(unsigned(__cvta_generic_to_shared(row)))
               : "memory");
}

// c += a * b in float32; of float32 a and b are rounded to tf32 already.
template <class T>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define FASTNORM_MMA(types)                                                                        \
  asm("mma.sync.aligned." types " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                             \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (std::is_same_v<T, __half>)
    FASTNORM_MMA("m16n8k16.row.col.f32.f16.f16.f32");
  else if constexpr (std::is_same_v<T, __nv_bfloat16>)
    FASTNORM_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
  else
    FASTNORM_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
#undef FASTNORM_MMA
#endif
}

// A float's bits, rounded to the 10 bits of a tf32's fraction.
__device__ __forceinline__ uint32_t tf32(uint32_t bits) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(bits)));
  return rounded;
#else
  return bits;
#endif
}

#endif

}  // namespace
}  // namespace fastnorm
