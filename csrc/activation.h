// The activations that a norm can end with: one definition of each function and of its derivative, for the CPU
// kernels (T = float, double or at::vec::Vectorized of them) and the CUDA kernels (T = float or double).
//
// The derivative is a function of z = norm(x) + residual.  NaN passes through every activation, and through the
// derivative of the piecewise linear ones as in torch: relu'(NaN) = 1.
#pragma once
#include <cmath>

#ifdef __CUDACC__
#define FASTNORM_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FASTNORM_HOST_DEVICE inline
#endif

namespace fastnorm {

enum class Activation { kNone, kRelu, kRelu6, kLeakyRelu, kElu, kSigmoid, kTanh, kSilu, kGelu, kGeluTanh, kHardswish };

// In the order of the enum; the operators take an activation by its name.
constexpr const char* kActivationNames[] = {"none", "relu", "relu6", "leaky_relu", "elu",      "sigmoid",
                                            "tanh", "silu", "gelu",  "gelu_tanh",  "hardswish"};

// Whether the derivative takes two values only, so that one bit per element tells it.
constexpr bool has_two_slopes(Activation a) {
  return a == Activation::kRelu || a == Activation::kRelu6 || a == Activation::kLeakyRelu;
}

constexpr double kSqrtHalf = 0.70710678118654752440;       // 1 / sqrt(2)
constexpr double kInvSqrtTwoPi = 0.39894228040143267794;   // 1 / sqrt(2 pi)
constexpr double kSqrtTwoOverPi = 0.79788456080286535588;  // sqrt(2 / pi)
constexpr double kGeluCubic = 0.044715;

// What the formulas below need of T; specialised for at::vec::Vectorized in cpu/vector.h.
template <class T>
struct Math {
  using Mask = bool;
  static FASTNORM_HOST_DEVICE T set(double v) { return T(v); }
  static FASTNORM_HOST_DEVICE Mask less(T a, T b) { return a < b; }
  static FASTNORM_HOST_DEVICE Mask less_equal(T a, T b) { return a <= b; }
  static FASTNORM_HOST_DEVICE T select(Mask m, T a, T b) { return m ? a : b; }  // m ? a : b
  static FASTNORM_HOST_DEVICE T relu(T v) { return v <= T(0) ? T(0) : v; }      // fmax would drop NaN
  static FASTNORM_HOST_DEVICE T exp(T v) { return T(::exp(v)); }
  static FASTNORM_HOST_DEVICE T expm1(T v) { return T(::expm1(v)); }
  static FASTNORM_HOST_DEVICE T tanh(T v) { return T(::tanh(v)); }
  // 1 + erf() would have no digit left where it is small.
  static FASTNORM_HOST_DEVICE T normal_cdf(T v) { return T(0.5) * T(::erfc(v * T(-kSqrtHalf))); }
  static FASTNORM_HOST_DEVICE T normal_density(T v) { return exp(T(-0.5) * v * v) * T(kInvSqrtTwoPi); }
};

#ifdef __CUDACC__
template <>
struct Math<float> {
  using Mask = bool;
  static FASTNORM_HOST_DEVICE float set(double v) { return float(v); }
  static FASTNORM_HOST_DEVICE Mask less(float a, float b) { return a < b; }
  static FASTNORM_HOST_DEVICE Mask less_equal(float a, float b) { return a <= b; }
  static FASTNORM_HOST_DEVICE float select(Mask m, float a, float b) { return m ? a : b; }
  static FASTNORM_HOST_DEVICE float relu(float v) { return v <= 0.f ? 0.f : v; }
  static FASTNORM_HOST_DEVICE float exp(float v) { return ::expf(v); }
  static FASTNORM_HOST_DEVICE float expm1(float v) { return ::expm1f(v); }
  static FASTNORM_HOST_DEVICE float tanh(float v) { return ::tanhf(v); }
  static FASTNORM_HOST_DEVICE float normal_cdf(float v) { return 0.5f * ::erfcf(v * float(-kSqrtHalf)); }
  static FASTNORM_HOST_DEVICE float normal_density(float v) { return ::expf(-0.5f * v * v) * float(kInvSqrtTwoPi); }
};
#endif

template <class T>
FASTNORM_HOST_DEVICE T sigmoid(T z) {
  using M = Math<T>;
  return M::set(1) / (M::set(1) + M::exp(M::set(0) - z));
}

// gelu_tanh is z (1 + tanh u) / 2 = z sigmoid(2 u); 2 u of z.
template <class T>
FASTNORM_HOST_DEVICE T gelu_tanh_inner(T z) {
  using M = Math<T>;
  return M::set(2 * kSqrtTwoOverPi) * (z + M::set(kGeluCubic) * z * z * z);
}

// activation(z); slope is leaky_relu's.
template <class T>
FASTNORM_HOST_DEVICE T activate(Activation activation, T z, T slope) {
  using M = Math<T>;
  const T zero = M::set(0), one = M::set(1);
  switch (activation) {
    case Activation::kNone: return z;
    case Activation::kRelu: return M::relu(z);
    case Activation::kRelu6: return M::select(M::less(M::set(6), z), M::set(6), M::relu(z));
    case Activation::kLeakyRelu: return M::select(M::less(zero, z), z, z * slope);
    case Activation::kElu: return M::select(M::less(zero, z), z, M::expm1(z));
    case Activation::kSigmoid: return sigmoid(z);
    case Activation::kTanh: return M::tanh(z);
    case Activation::kSilu: return z / (one + M::exp(zero - z));
    case Activation::kGelu: return z * M::normal_cdf(z);
    case Activation::kGeluTanh: return z * sigmoid(gelu_tanh_inner(z));
    case Activation::kHardswish: {  // z * relu6(z + 3) / 6
      const T shifted = M::relu(z + M::set(3));
      return z * M::select(M::less(M::set(6), shifted), M::set(6), shifted) * M::set(1.0 / 6);
    }
  }
  return z;
}

// d activation(z) / dz.
template <class T>
FASTNORM_HOST_DEVICE T activation_gradient(Activation activation, T z, T slope) {
  using M = Math<T>;
  const T zero = M::set(0), one = M::set(1), half = M::set(0.5);
  switch (activation) {
    case Activation::kNone: return one;
    case Activation::kRelu: return M::select(M::less_equal(z, zero), zero, one);
    case Activation::kRelu6:
      return M::select(M::less_equal(z, zero), zero, M::select(M::less_equal(M::set(6), z), zero, one));
    case Activation::kLeakyRelu: return M::select(M::less(zero, z), one, slope);
    case Activation::kElu: return M::select(M::less(zero, z), one, M::exp(z));
    case Activation::kSigmoid: {
      const T s = sigmoid(z);
      return s * (one - s);
    }
    case Activation::kTanh: {
      const T t = M::tanh(z);
      return one - t * t;
    }
    case Activation::kSilu: {
      const T s = sigmoid(z);
      return s * (one + z * (one - s));
    }
    case Activation::kGelu: return M::normal_cdf(z) + z * M::normal_density(z);
    case Activation::kGeluTanh: {
      const T s = sigmoid(gelu_tanh_inner(z));
      return s + z * s * (one - s) * M::set(2 * kSqrtTwoOverPi) * (one + M::set(3 * kGeluCubic) * z * z);
    }
    case Activation::kHardswish:
      return M::select(M::less(z, M::set(-3)), zero,
                       M::select(M::less_equal(z, M::set(3)), z * M::set(1.0 / 3) + half, one));
  }
  return one;
}

}  // namespace fastnorm
