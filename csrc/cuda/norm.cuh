// What the kernels of all norms share: the affine map, moments, activations, shared memory.
#pragma once
#include <initializer_list>
#include <type_traits>

#include "vector.cuh"

namespace fastnorm {
namespace {

// How many blocks must fit a multiprocessor, which bounds their registers: only where they have been measured, as other
// architectures' compilers need more registers for the same kernel and would put some in local memory.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 900
template <int wanted>
constexpr int kBlocksAtOnce = 1;
#else
template <int wanted>
constexpr int kBlocksAtOnce = wanted;
#endif

// ---- The affine map -------------------------------------------------------------------------------------------------

// z = (x - mean) * scale + shift
template <class A>
struct Affine {
  A mean, scale, shift;
  __device__ __forceinline__ A operator()(A x) const { return fused(x - mean, scale, shift); }
};

template <class A>
__device__ __forceinline__ Affine<A> make_affine(A mean, A mean_low, A rstd, const void* weight, const void* bias,
                                                 DType type, int64_t channel) {
  const A scale = weight ? product(rstd, read_as<A>(weight, type, channel)) : rstd;
  return {mean, scale, (bias ? read_as<A>(bias, type, channel) : A(0)) - product(mean_low, scale)};
}

// dx = dz * scale + (x - mean) * slope + offset
template <class A>
struct Gradient {
  Affine<A> affine;
  A slope, offset;
};

// ---- Moments --------------------------------------------------------------------------------------------------------

// Whether sums of squares of values of this type may be too large for its accumulate type, but not for double.
template <class T>
constexpr bool kOverflows = std::is_same_v<T, float> || std::is_same_v<T, __nv_bfloat16>;

// Whether a sum of squares left the range of its type, upwards or, where eps does not hide that, downwards.
template <class A>
__device__ __forceinline__ bool out_of_range(A square, double eps) {
  return !finite(square) || (square < A(1e-30) && eps < 1e-20);
}

// The moments of some elements: their mean is base + delta, m2 the sum of squared distances from it.
struct Moments {
  double base, delta, m2;
};

// sum and square are those of x - base.
__device__ __forceinline__ Moments moments_about(double base, double sum, double square, double count) {
  const double delta = sum / count, m2 = square - sum * delta;
  return {base, delta, m2 < 0 ? 0 : m2};
}

__device__ __forceinline__ void add_distance(double distance, double& sum, double& square) {
  sum += distance;
  square = fused(distance, distance, square);
}

// Sets pairs of sums to 0 where one of them is not finite, and has a bit for each: they are taken again in double, and
// they alone, so that one channel's values do not show in another's.
template <int n>
__device__ __forceinline__ unsigned clear_infinite(double (&sum)[n], double (&square)[n]) {
  unsigned again = 0;
#pragma unroll
  for (int i = 0; i < n; i++) {
    if (finite(sum[i]) && finite(square[i])) continue;
    again |= 1u << i;
    sum[i] = square[i] = 0;
  }
  return again;
}

// ---- Activations ----------------------------------------------------------------------------------------------------
// Kernels come in two kinds: one for none and relu, and one that has all of them, chosen when it runs.

constexpr bool is_simple(Activation a) { return a == Activation::kNone || a == Activation::kRelu; }

template <Activation kActivation>
constexpr bool kTwoSlopes = has_two_slopes(kActivation);

// Calls f(std::integral_constant<Activation, a>()), so that the choice is made once for all lanes.
template <class F>
__device__ __forceinline__ void with_activation(Activation a, F f) {
  switch (a) {
#define FASTNORM_CASE(name) \
  case Activation::name: return f(std::integral_constant<Activation, Activation::name>())
    FASTNORM_CASE(kNone);
    FASTNORM_CASE(kRelu);
    FASTNORM_CASE(kRelu6);
    FASTNORM_CASE(kLeakyRelu);
    FASTNORM_CASE(kElu);
    FASTNORM_CASE(kSigmoid);
    FASTNORM_CASE(kTanh);
    FASTNORM_CASE(kSilu);
    FASTNORM_CASE(kGelu);
    FASTNORM_CASE(kGeluTanh);
    FASTNORM_CASE(kHardswish);
#undef FASTNORM_CASE
  }
}

// Whether a two-slope activation has slope 1 at z.
template <class A>
__device__ __forceinline__ bool has_slope_one(Activation a, A z) {
  return activation_gradient(a, z, A(0)) == A(1);
}

// z = activation(z), and, where that is wanted, a bit for each lane where the slope is 1.
template <class T, bool kGeneral, class A>
__device__ __forceinline__ unsigned activate_lanes(Activation activation, A (&z)[kLanes<T>], A negative_slope,
                                                   bool wanted) {
  unsigned bits = 0;
  if constexpr (kGeneral) {
    with_activation(activation, [&](auto a) {
      constexpr Activation kActivation = decltype(a)::value;
      if constexpr (kTwoSlopes<kActivation>) {
        if (wanted) {
#pragma unroll
          for (int i = 0; i < kLanes<T>; i++) bits |= unsigned(has_slope_one(kActivation, z[i])) << i;
        }
      }
#pragma unroll
      for (int i = 0; i < kLanes<T>; i++) z[i] = activate(kActivation, z[i], negative_slope);
    });
  } else {
    if (wanted) {
#pragma unroll
      for (int i = 0; i < kLanes<T>; i++) bits |= unsigned(!(z[i] <= 0)) << i;
    }
    if (activation == Activation::kRelu) {
#pragma unroll
      for (int i = 0; i < kLanes<T>; i++) z[i] = z[i] <= 0 ? A(0) : z[i];
    }
  }
  return bits;
}

// dz = dy * activation'(z); of a two-slope activation from the mask's bits where there is one, and then z is not used.
template <class T, bool kGeneral, class A>
__device__ __forceinline__ void differentiate_lanes(Activation activation, bool masked, unsigned bits,
                                                    const A (&z)[kLanes<T>], A (&dz)[kLanes<T>], A negative_slope) {
  constexpr int V = kLanes<T>;
  if constexpr (!kGeneral) {
    if (activation != Activation::kRelu) return;
    if (masked) {
#pragma unroll
      for (int i = 0; i < V; i++) dz[i] = bits >> i & 1 ? dz[i] : A(0);
    } else {
#pragma unroll
      for (int i = 0; i < V; i++) dz[i] = z[i] <= 0 ? A(0) : dz[i];
    }
  } else {
    with_activation(activation, [&](auto constant) {
      constexpr Activation kActivation = decltype(constant)::value;
#pragma unroll
      for (int i = 0; i < V; i++) {
        if constexpr (kTwoSlopes<kActivation>) {
          const bool on = masked ? bits >> i & 1 : has_slope_one(kActivation, z[i]);
          if (!on) dz[i] = kActivation == Activation::kLeakyRelu ? dz[i] * negative_slope : A(0);
        } else {
          dz[i] *= activation_gradient(kActivation, z[i], negative_slope);
        }
      }
    });
  }
}

// What a backward pass needs beside x and dy: z, and for it the residual, or the mask.
struct Needs {
  bool z, residual, mask;
  template <class Args>
  __device__ explicit Needs(const Args& a)
      : z(!a.mask && a.activation != Activation::kNone),
        residual(a.residual && z),
        mask(a.mask && a.activation != Activation::kNone) {}
};

// ---- Shared memory and alignment ------------------------------------------------------------------------------------

// Shared memory that is handed out piece by piece.
struct Shared {
  unsigned char* at;
  template <class U>
  __device__ __forceinline__ U* take(int64_t n) {
    U* p = reinterpret_cast<U*>(at);
    at += (n * int64_t(sizeof(U)) + 15) / 16 * 16;
    return p;
  }
};
template <class U>
size_t shared_bytes(int64_t n) {
  return size_t(n * int64_t(sizeof(U)) + 15) / 16 * 16;
}

// The distance from a 16-byte boundary that all of these tensors have, in elements; -1 if they differ.
inline int common_misalignment(std::initializer_list<const void*> tensors, int element_size) {
  int common = -1;
  for (const void* p : tensors) {
    if (!p) continue;
    const int mine = int(reinterpret_cast<uintptr_t>(p) % 16) / element_size;
    if (common >= 0 && common != mine) return -1;
    common = mine;
  }
  return common;
}

}  // namespace
}  // namespace fastnorm
