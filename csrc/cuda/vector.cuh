// Values as memory has them and as kernels compute with them, and 16 bytes of them at a time.
#pragma once
#include <cstdint>
#include <type_traits>

#include "activation.h"
#include "dtype.h"
#include "launch.cuh"

namespace fastnorm {
namespace {

// The type that values of type T are computed with.
template <class T>
struct AccumulateOf {
  using type = float;
};
template <>
struct AccumulateOf<double> {
  using type = double;
};
template <class T>
using Accumulate = typename AccumulateOf<T>::type;

// Calls f with a value of the type.
template <class F>
auto with_type(DType type, F f) {
  switch (type) {
    case DType::kFloat64: return f(double());
    case DType::kFloat16: return f(__half());
    case DType::kBFloat16: return f(__nv_bfloat16());
    default: return f(float());
  }
}

// torch's build turns off the operators of __half and __nv_bfloat16; conversions by name always work.
__device__ __forceinline__ double widen(double v) { return v; }
__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ float widen(__half v) { return __half2float(v); }
__device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class T>
__device__ __forceinline__ T narrow(Accumulate<T> v) {
  return T(v);
}
template <>
__device__ __forceinline__ __half narrow<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// a * b + c, rounded once.
__device__ __forceinline__ float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ __forceinline__ double fused(double a, double b, double c) { return __fma_rn(a, b, c); }

// a * b, rounded: never made part of a fused multiply-add.
__device__ __forceinline__ float product(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double product(double a, double b) { return __dmul_rn(a, b); }

// Whether v is neither infinite nor NaN.
template <class A>
__device__ __forceinline__ bool finite(A v) {
  return v - v == 0;
}

// A bool as a type; std::bool_constant's conversion is the host's alone.
template <bool b>
struct Bool {
  __host__ __device__ constexpr operator bool() const { return b; }
};

// Calls f(Bool<b>()): a loop that knows its slots to be whole has half the instructions.
template <class F>
__device__ __forceinline__ void with_constant(bool b, F f) {
  b ? f(Bool<true>()) : f(Bool<false>());
}

// ---- Sixteen bytes --------------------------------------------------------------------------------------------------

template <class T>
constexpr int kLanes = 16 / int(sizeof(T));

template <class T>
struct alignas(16) Vector {
  T lane[kLanes<T>];
};

template <class T>
__device__ __forceinline__ Vector<T> zeros() {
  Vector<T> v;
#pragma unroll
  for (int i = 0; i < kLanes<T>; i++) v.lane[i] = narrow<T>(0);
  return v;
}

// All lanes that a Vector<T> has, as a bit mask.
template <class T>
constexpr unsigned kAllLanes = (1u << kLanes<T>)-1;

// The lanes of p[0 .. kLanes) that are valid, zeros for the others; p is 16-byte aligned if valid is kAllLanes.
template <class T>
__device__ __forceinline__ Vector<T> load(const T* p, unsigned valid = kAllLanes<T>) {
  if (valid == kAllLanes<T>) return *reinterpret_cast<const Vector<T>*>(p);
  Vector<T> v = zeros<T>();
#pragma unroll
  for (int i = 0; i < kLanes<T>; i++)
    if (valid >> i & 1) v.lane[i] = p[i];
  return v;
}

// To global memory.
template <class T>
__device__ __forceinline__ void store(T* p, const Vector<T>& v, unsigned valid = kAllLanes<T>) {
  if (valid == kAllLanes<T>) {
    uint4 bits;
    memcpy(&bits, &v, 16);
    __stwb(reinterpret_cast<uint4*>(p), bits);  // in one: compilers share the last lane's store with the other branch
  } else {
#pragma unroll
    for (int i = 0; i < kLanes<T>; i++)
      if (valid >> i & 1) p[i] = v.lane[i];
  }
}

template <class T>
__device__ __forceinline__ void widen(Accumulate<T> (&to)[kLanes<T>], const Vector<T>& from) {
#pragma unroll
  for (int i = 0; i < kLanes<T>; i++) to[i] = widen(from.lane[i]);
}

template <class T>
__device__ __forceinline__ Vector<T> narrow(const Accumulate<T> (&from)[kLanes<T>]) {
  Vector<T> v;
#pragma unroll
  for (int i = 0; i < kLanes<T>; i++) v.lane[i] = narrow<T>(from[i]);
  return v;
}

// ---- Per-channel arrays, whose type is known when the program runs --------------------------------------------------

__device__ __forceinline__ double read(const void* p, DType type, int64_t i) {
  switch (type) {
    case DType::kFloat64: return static_cast<const double*>(p)[i];
    case DType::kFloat32: return widen(static_cast<const float*>(p)[i]);
    case DType::kFloat16: return widen(static_cast<const __half*>(p)[i]);
    case DType::kBFloat16: return widen(static_cast<const __nv_bfloat16*>(p)[i]);
  }
  return 0;
}

// The same in the accumulate type: without a detour over double for float.
template <class A>
__device__ __forceinline__ A read_as(const void* p, DType type, int64_t i) {
  if constexpr (std::is_same_v<A, double>) {
    return read(p, type, i);
  } else {
    switch (type) {
      case DType::kFloat16: return widen(static_cast<const __half*>(p)[i]);
      case DType::kBFloat16: return widen(static_cast<const __nv_bfloat16*>(p)[i]);
      default: return static_cast<const float*>(p)[i];
    }
  }
}

__device__ __forceinline__ void write(void* p, DType type, int64_t i, double v) {
  switch (type) {
    case DType::kFloat64: static_cast<double*>(p)[i] = v; break;
    case DType::kFloat32: static_cast<float*>(p)[i] = float(v); break;
    case DType::kFloat16: static_cast<__half*>(p)[i] = __float2half_rn(float(v)); break;
    case DType::kBFloat16: static_cast<__nv_bfloat16*>(p)[i] = __float2bfloat16_rn(float(v)); break;
  }
}

}  // namespace
}  // namespace fastnorm
