// Arithmetic with the numbers of work items.
#pragma once
#include <cstdint>

#include "launch.cuh"

namespace fastnorm {
namespace {

// i / d and the remainder; most of the time in 32 bits, which is several times faster.
__device__ __forceinline__ int split(int64_t& i, int64_t d) {
  if (i <= 0x7fffffff && d <= 0x7fffffff) {
    const unsigned q = unsigned(i) / unsigned(d), r = unsigned(i) - q * unsigned(d);
    i = q;
    return int(r);
  }
  const int64_t q = i / d, r = i - q * d;
  i = q;
  return int(r);
}

}  // namespace
}  // namespace fastnorm
