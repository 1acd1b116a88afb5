// What kernels use of tensor cores, for the CPU emulator: warps exchange their fragments as the PTX manual lays them
// out.
#pragma once
#include "device_functions.h"

namespace cuda_emulator {

// ldmatrix.x4: lane l gives where row l % 8 of matrix l / 8 is, and gets word l % 4 of row l / 4 of each.
inline void load_matrices(uint32_t (&words)[4], const void* row, CUDA_EMULATOR_SITE) {
  if (reinterpret_cast<uintptr_t>(row) % 16) fail(site, "ldmatrix of a row that is not 16-byte aligned");
  for (int i = 0; i < 4; i++) {
    const auto* other =
        reinterpret_cast<const char*>(__shfl_sync(~0u, reinterpret_cast<uintptr_t>(row), i * 8 + lane() / 4, 32, site));
    std::memcpy(&words[i], other + lane() % 4 * 4, 4);
  }
}

inline uint32_t tf32(uint32_t bits) { return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & ~0x1fffu; }

template <class T>
void words_to_floats(float* to, uint64_t two_words) {
  T values[8 / sizeof(T)];
  std::memcpy(static_cast<void*>(values), &two_words, 8);
  for (size_t i = 0; i < 8 / sizeof(T); i++) to[i] = float(values[i]);
}

// c += a * b of mma.m16n8k16 (16-bit types) or mma.m16n8k8 (tf32).
template <class T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, CUDA_EMULATOR_SITE) {
  constexpr int kWord = 4 / int(sizeof(T));  // values in a word
  const uint64_t upper = a[0] | uint64_t(a[2]) << 32, lower = a[1] | uint64_t(a[3]) << 32, b = b0 | uint64_t(b1) << 32;
  float row[2][4][2 * kWord], column[2][4][2 * kWord];  // [t][words t and t + 4]
  const int g = lane() / 4, n = lane() % 4 * 2;
  for (int t = 0; t < 4; t++) {
    words_to_floats<T>(row[0][t], __shfl_sync(~0u, upper, g * 4 + t, 32, site));
    words_to_floats<T>(row[1][t], __shfl_sync(~0u, lower, g * 4 + t, 32, site));
    for (int j = 0; j < 2; j++) words_to_floats<T>(column[j][t], __shfl_sync(~0u, b, (n + j) * 4 + t, 32, site));
  }
  for (int i = 0; i < 4; i++)
    for (int t = 0; t < 4; t++)
      for (int k = 0; k < 2 * kWord; k++) c[i] += row[i / 2][t][k] * column[i % 2][t][k];
}

}  // namespace cuda_emulator
