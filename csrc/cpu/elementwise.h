// The activations of a fused norm on packs, and how dz comes from dy behind them.
#pragma once
#include "vector.h"

namespace fastnorm::cpu::CPU_CAPABILITY {

// ---- Forward --------------------------------------------------------------------------------------------------------

// The cheap and common ones apart from the others, which are told apart at run time: most of those call functions,
// which costs more than the branch.
enum class Kind { kNone, kRelu, kSilu, kGelu, kGeneral };

// f(integral_constant<Kind>)
template <class F>
inline void with_kind(Activation activation, F f) {
  switch (activation) {
    case Activation::kNone: return f(std::integral_constant<Kind, Kind::kNone>());
    case Activation::kRelu: return f(std::integral_constant<Kind, Kind::kRelu>());
    case Activation::kSilu: return f(std::integral_constant<Kind, Kind::kSilu>());
    case Activation::kGelu: return f(std::integral_constant<Kind, Kind::kGelu>());
    default: return f(std::integral_constant<Kind, Kind::kGeneral>());
  }
}

template <Kind kind, class A>
inline Pack<A> apply(Activation activation, A negative_slope, Pack<A> z) {
  using V = at::vec::Vectorized<A>;
  if constexpr (kind == Kind::kNone) return z;
  if constexpr (kind == Kind::kRelu) return {Math<V>::relu(z.a), Math<V>::relu(z.b)};
  const V slope(negative_slope);
  if constexpr (kind == Kind::kSilu) activation = Activation::kSilu;
  if constexpr (kind == Kind::kGelu) activation = Activation::kGelu;
  return {activate(activation, z.a, slope), activate(activation, z.b, slope)};
}

// A bit per lane: whether the slope of the activation at z is 1.
template <Kind kind, class A>
inline uint32_t slope_bits(Activation activation, Pack<A> z) {
  const Pack<A> zero(A(0));
  if constexpr (kind == Kind::kRelu) return less_equal(z, zero).unset_bits();
  if (activation == Activation::kRelu6) return (less_equal(z, zero) | less_equal(Pack<A>(A(6)), z)).unset_bits();
  return ~less(zero, z).unset_bits();
}

// ---- Backward -------------------------------------------------------------------------------------------------------

// How dz comes from dy: as it is, by relu's, silu's, gelu's or any activation's slope at z(x), at z(x) + residual, or
// by the mask.
enum class Slope { kOne, kRelu, kSilu, kGelu, kGeneral, kGeneralResidual, kMask };

// f(integral_constant<Slope>)
template <class F>
inline void with_slope(Activation activation, bool mask, bool residual, F f) {
  if (activation == Activation::kNone) return f(std::integral_constant<Slope, Slope::kOne>());
  if (mask) return f(std::integral_constant<Slope, Slope::kMask>());
  if (residual) return f(std::integral_constant<Slope, Slope::kGeneralResidual>());
  if (activation == Activation::kRelu) return f(std::integral_constant<Slope, Slope::kRelu>());
  if (activation == Activation::kSilu) return f(std::integral_constant<Slope, Slope::kSilu>());
  if (activation == Activation::kGelu) return f(std::integral_constant<Slope, Slope::kGelu>());
  return f(std::integral_constant<Slope, Slope::kGeneral>());
}

// Whether the slope costs so much that it should be computed once only.
constexpr bool is_costly(Slope slope) {
  return slope == Slope::kSilu || slope == Slope::kGelu || slope == Slope::kGeneral || slope == Slope::kGeneralResidual;
}
constexpr bool needs_z(Slope slope) { return slope != Slope::kOne && slope != Slope::kMask; }

// dz of a pack; residual: its first element, mask: the bits of its span, of which it is the i-th element.
template <Slope slope, class T, class P, class A>
inline P slope_times(Activation activation, A negative_slope, P dy, P z, const T* residual, const uint8_t* mask,
                     int64_t i, auto count, auto again) {
  using V = at::vec::Vectorized<A>;
  const V s(negative_slope);
  if constexpr (slope == Slope::kOne) return dy;
  if constexpr (slope == Slope::kRelu) return select(less_equal(z, P(A(0))), P(A(0)), dy);
  if constexpr (slope == Slope::kMask) {
    const P other = activation == Activation::kLeakyRelu ? dy * P(negative_slope) : P(A(0));
    return select_bits(load_bits(mask, i, count, again), dy, other);
  }
  if constexpr (slope == Slope::kGeneralResidual) z = z + load(residual, count);
  if constexpr (slope == Slope::kSilu) activation = Activation::kSilu;
  if constexpr (slope == Slope::kGelu) activation = Activation::kGelu;
  return {dy.a * activation_gradient(activation, z.a, s), dy.b * activation_gradient(activation, z.b, s)};
}

}  // namespace fastnorm::cpu::CPU_CAPABILITY
