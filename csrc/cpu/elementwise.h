// The activations of a fused norm, and how dz comes from dy behind them.
//
// None and relu are part of the norms' loops.  The others have formulas that are longer than all the rest, so those are
// compiled once, in elementwise.cpp, and work on strips: packs of z that a norm has left in the L1 cache: the loads and
// stores are nothing beside the formulas, and the activation is told apart once for a strip.
#pragma once
#include <limits>

#include "vector.h"

namespace fastnorm::cpu::CPU_CAPABILITY {

constexpr int64_t kStrip = 1024;  // elements; a whole number of packs

// Where a strip has the i-th pack of a span.  The last one, which for_packs() lets overlap the one before, follows it
// there, as a load waits for the caches if it takes from two stores what has just been stored.
template <class T>
inline int64_t place(int64_t i, auto again) {
  if constexpr (std::is_same_v<decltype(again), Zero>) return i;
  return (i + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

// ---- Forward --------------------------------------------------------------------------------------------------------

constexpr bool takes_strips(Activation a) { return a != Activation::kNone && a != Activation::kRelu; }

// What z is raised to: relu's 0, or no bound at all.
template <class A>
inline A lower_bound(Activation a) {
  return a == Activation::kRelu ? A(0) : -std::numeric_limits<A>::infinity();
}
template <class A>
inline Pack<A> raise_to(A bound, Pack<A> z) {
  using V = at::vec::Vectorized<A>;
  return {at::vec::clamp_min(z.a, V(bound)), at::vec::clamp_min(z.b, V(bound))};
}

// A bit per lane: whether relu's slope at z is 1.
template <class A>
inline uint32_t relu_bits(Pack<A> z) {
  return less_equal(z, Pack<A>(A(0))).unset_bits();
}

// y = activation(z), which z is afterwards too.  mask: the bits of a two-slope activation, or null.
template <class T>
void store_activated(Activation activation, double negative_slope, Accumulate<T>* z, T* y, int64_t len, uint8_t* mask,
                     bool streaming);

// ---- Backward -------------------------------------------------------------------------------------------------------

// How dz comes from dy: as it is, by relu's slope at z(x), by the mask, or by slopes that were computed beforehand.
enum class Slope { kOne, kRelu, kMask, kKept };

inline Slope slope_of(Activation activation, bool mask, bool residual) {
  if (activation == Activation::kNone) return Slope::kOne;
  if (mask) return Slope::kMask;
  return activation == Activation::kRelu && !residual ? Slope::kRelu : Slope::kKept;
}

// f(integral_constant<Slope>)
template <class F>
[[gnu::always_inline]] inline void with_slope(Slope slope, F f) {
  switch (slope) {
    case Slope::kOne: return f(std::integral_constant<Slope, Slope::kOne>());
    case Slope::kRelu: return f(std::integral_constant<Slope, Slope::kRelu>());
    case Slope::kMask: return f(std::integral_constant<Slope, Slope::kMask>());
    case Slope::kKept: return f(std::integral_constant<Slope, Slope::kKept>());
  }
}

// z = d activation(z) / dz, of a strip of any length.
template <class A>
void to_slopes(Activation activation, double negative_slope, A* z, int64_t len);

// dz of the i-th pack of a span.  mask: the span's bits, kept: its slopes.
template <Slope slope, class P, class A>
inline P slope_times(Activation activation, double negative_slope, P dy, P z, const uint8_t* mask, const A* kept,
                     int64_t i, auto count, auto again) {
  if constexpr (slope == Slope::kOne) return dy;
  if constexpr (slope == Slope::kRelu) return select(less_equal(z, P(A(0))), P(A(0)), dy);
  if constexpr (slope == Slope::kKept) return dy * load(kept + place<A>(i, again), Full<A>());
  if constexpr (slope == Slope::kMask) {
    const P other = activation == Activation::kLeakyRelu ? dy * P(A(negative_slope)) : P(A(0));
    return select_bits(load_bits(mask, i, count, again), dy, other);
  }
}

}  // namespace fastnorm::cpu::CPU_CAPABILITY
