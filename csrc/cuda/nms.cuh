// Boxes in the type that they are compared in.
#pragma once
#include "nms.h"
#include "vector.cuh"

namespace fastnorm {
namespace {

template <class A>
struct alignas(16) Box {
  A x1, y1, x2, y2;
};

__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double larger(double a, double b) { return fmax(a, b); }
__device__ __forceinline__ float smaller(float a, float b) { return fminf(a, b); }
__device__ __forceinline__ double smaller(double a, double b) { return fmin(a, b); }

template <class T>
__device__ __forceinline__ Box<Accumulate<T>> load_box(const T* p) {
  struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) Stored {
    T v[4];
  } s;
  if (reinterpret_cast<uintptr_t>(p) % alignof(Stored) == 0) {
    s = *reinterpret_cast<const Stored*>(p);
  } else {
#pragma unroll
    for (int k = 0; k < 4; k++) s.v[k] = p[k];
  }
  return {widen(s.v[0]), widen(s.v[1]), widen(s.v[2]), widen(s.v[3])};
}

// Box i of some in a type that is known when the program runs.
template <class A>
__device__ __forceinline__ Box<A> load_box_as(const void* boxes, DType type, int64_t i) {
  if constexpr (std::is_same_v<A, double>) {
    return load_box(static_cast<const double*>(boxes) + 4 * i);
  } else {
    switch (type) {
      case DType::kFloat16: return load_box(static_cast<const __half*>(boxes) + 4 * i);
      case DType::kBFloat16: return load_box(static_cast<const __nv_bfloat16*>(boxes) + 4 * i);
      default: return load_box(static_cast<const float*>(boxes) + 4 * i);
    }
  }
}

template <class A>
__device__ __forceinline__ A area(const Box<A>& b) {
  return product(b.x2 - b.x1, b.y2 - b.y1);
}

// fmax and fmin skip a NaN, but then the area is NaN.
template <class A>
__device__ __forceinline__ A intersection(const Box<A>& a, const Box<A>& b) {
  return product(larger(smaller(a.x2, b.x2) - larger(a.x1, b.x1), A(0)),
                 larger(smaller(a.y2, b.y2) - larger(a.y1, b.y1), A(0)));
}

// Whether their IoU is greater than the threshold.  Boxes that do not meet, most of them, are spared the division.
template <class A>
__device__ __forceinline__ bool overlap(const Box<A>& a, const Box<A>& b, A threshold) {
  const A both = intersection(a, b);
  return (both > 0 || threshold < 0) && both / (area(a) + area(b) - both) > threshold;
}

// Calls f with a value of the type that boxes of this one are compared in.
template <class F>
auto with_accumulate(DType type, F f) {
  return type == DType::kFloat64 ? f(double()) : f(float());
}

}  // namespace
}  // namespace fastnorm
