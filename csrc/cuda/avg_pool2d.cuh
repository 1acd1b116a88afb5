// What average pooling's kernels share: divisors, and which kernel runs.
#pragma once
#include "avg_pool2d.h"
#include "pool.cuh"

namespace fastnorm {
namespace {

// Whether all windows have the divisor of the first.
inline bool has_one_divisor(const AvgPool2d& a) {
  auto same = [](const PoolAxis& x, bool padded) {
    const int64_t end = int64_t(x.begin(x.out - 1)) + x.kernel;
    return padded ? end <= int64_t(x.in) + x.pad : x.pad == 0 && end <= x.in;
  };
  const bool padded = a.count_include_pad;
  return a.divisor || (same(a.shape.y, padded) && same(a.shape.x, padded));
}

// Whether 16-byte pieces of channels are whole and aligned.
template <class T>
bool has_pieces(const AvgPool2d& a) {
  auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  return a.shape.c % kLanes<T> == 0 && aligned(a.from) && aligned(a.to);
}

// V elements in the type that is computed with, to or from memory.
template <int V, class T>
__device__ __forceinline__ void fetch(Accumulate<T> (&to)[V], const T* from) {
  if constexpr (V == 1)
    to[0] = widen(*from);
  else
    widen(to, load(from));
}
template <int V, class T>
__device__ __forceinline__ void put(T* to, const Accumulate<T> (&from)[V]) {
  if constexpr (V == 1)
    *to = narrow<T>(from[0]);
  else
    store(to, narrow<T>(from));
}

}  // namespace
}  // namespace fastnorm
