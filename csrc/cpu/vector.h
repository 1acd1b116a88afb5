// Vectors for the CPU kernels: a Pack is kLanes consecutive elements in the accumulate type, whatever type they have in
// memory.  Everything here lives in the namespace of the instruction set that the file is compiled for, so that no other
// variant can get at it.
#pragma once
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../activation.h"
#include "../dtype.h"

namespace fastnorm {

template <class A>
struct Math<at::vec::Vectorized<A>> {
  using V = at::vec::Vectorized<A>;
  using Mask = V;
  static V set(double v) { return V(A(v)); }
  static Mask less(V a, V b) { return a < b; }
  static Mask less_equal(V a, V b) { return a <= b; }
  static V select(Mask m, V a, V b) { return V::blendv(b, a, m); }
  static V relu(V v) { return at::vec::clamp_min(v, V(A(0))); }
  static V exp(V v) { return v.exp(); }
  static V expm1(V v) { return v.expm1(); }
  static V tanh(V v) { return v.tanh(); }
  static V erf(V v) { return v.erf(); }
};

namespace cpu::CPU_CAPABILITY {

template <class T>
using Accumulate = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class A>
struct Pack {
  using V = at::vec::Vectorized<A>;
  static constexpr int64_t kHalf = V::size(), kLanes = 2 * kHalf;
  V a, b;

  Pack() = default;
  Pack(V a, V b) : a(a), b(b) {}
  explicit Pack(A v) : a(v), b(v) {}

  friend Pack operator+(Pack x, Pack y) { return {x.a + y.a, x.b + y.b}; }
  friend Pack operator-(Pack x, Pack y) { return {x.a - y.a, x.b - y.b}; }
  friend Pack operator*(Pack x, Pack y) { return {x.a * y.a, x.b * y.b}; }
  friend Pack fmadd(Pack x, Pack y, Pack z) { return {at::vec::fmadd(x.a, y.a, z.a), at::vec::fmadd(x.b, y.b, z.b)}; }

  // mask ? x : y, the mask from a comparison
  friend Pack select(Pack mask, Pack x, Pack y) { return {V::blendv(y.a, x.a, mask.a), V::blendv(y.b, x.b, mask.b)}; }
  friend Pack less(Pack x, Pack y) { return {x.a < y.a, x.b < y.b}; }
  friend Pack less_equal(Pack x, Pack y) { return {x.a <= y.a, x.b <= y.b}; }
  friend Pack operator|(Pack x, Pack y) { return {x.a | y.a, x.b | y.b}; }

  // the first count lanes, zero in the others
  Pack first(int64_t count) const {
    const V lane = V::arange(A(0), A(1)), n = V(A(count));
    return {a & (lane < n), b & (lane + V(A(kHalf)) < n)};
  }
  A sum() const {
    return at::vec::vec_reduce_all<A>([](V x, V y) { return x + y; }, a + b);
  }
  // one bit per lane: set where the mask is not
  uint32_t unset_bits() const { return uint32_t(a.zero_mask()) | uint32_t(b.zero_mask()) << kHalf; }
};

template <class T>
constexpr int64_t kLanes = Pack<Accumulate<T>>::kLanes;

// A full pack's count is a constant, so that the same code serves the body of a loop and its tail.
template <class T>
using Full = std::integral_constant<int64_t, kLanes<T>>;

template <class T, class Count>
inline Pack<Accumulate<T>> load(const T* p, Count count) {
  using P = Pack<Accumulate<T>>;
  using Stored = at::vec::Vectorized<T>;
  constexpr bool full = !std::is_same_v<Count, int64_t>;
  if constexpr (std::is_same_v<T, Accumulate<T>>) {
    if constexpr (full) return P(Stored::loadu(p), Stored::loadu(p + P::kHalf));
    if (count <= P::kHalf) return P(Stored::loadu(p, count), Stored(T(0)));
    return P(Stored::loadu(p), Stored::loadu(p + P::kHalf, count - P::kHalf));
  } else {
    const auto [a, b] = at::vec::convert_to_float<T>(full ? Stored::loadu(p) : Stored::loadu(p, count));
    return P(a, b);
  }
}

template <class T, class Count>
inline void store(T* p, Pack<Accumulate<T>> v, Count count) {
  using P = Pack<Accumulate<T>>;
  constexpr bool full = !std::is_same_v<Count, int64_t>;
  if constexpr (std::is_same_v<T, Accumulate<T>>) {
    if constexpr (full) {
      v.a.store(p), v.b.store(p + P::kHalf);
    } else if (count <= P::kHalf) {
      v.a.store(p, count);
    } else {
      v.a.store(p), v.b.store(p + P::kHalf, count - P::kHalf);
    }
  } else {
    const auto stored = at::vec::convert_from_float<T>(v.a, v.b);
    full ? stored.store(p) : stored.store(p, count);
  }
}

// f(i, count) for every pack of len elements; the last count may be smaller and is then an int64_t.
template <class T, class F>
inline void for_packs(int64_t len, F f) {
  int64_t i = 0;
  for (; i + kLanes<T> <= len; i += kLanes<T>) f(i, Full<T>());
  if (i < len) f(i, len - i);
}

template <class T, bool kWrite = false>
inline void prefetch(const T* p) {
  for (int64_t byte = 0; byte < int64_t(sizeof(T)) * kLanes<T>; byte += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(p) + byte, kWrite, 2);
}

// ---- Bits -----------------------------------------------------------------------------------------------------------

template <class Count>
inline void store_bits(uint8_t* p, uint32_t bits, Count count) {
  std::memcpy(p, &bits, (count + 7) / 8);  // little-endian, as every processor that torch runs on
}

template <class A, class Count>
inline uint32_t load_bits(const uint8_t* p, Count count) {
  uint32_t bits = 0;
  std::memcpy(&bits, p, (count + 7) / 8);
  return bits;
}

// All ones in the lanes whose bit is set.
template <class A>
inline Pack<A> mask_of_bits(uint32_t bits) {
  using Int = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
  using VI = at::vec::Vectorized<Int>;
  using P = Pack<A>;
  alignas(64) static constexpr auto lane_bits = [] {
    struct {
      Int v[P::kHalf];
    } t{};
    for (int i = 0; i < P::kHalf; i++) t.v[i] = Int(1) << i;
    return t;
  }();
  const VI lane = VI::loadu(lane_bits.v);
  auto half = [&](uint32_t h) { return at::vec::cast<A, Int>((VI(Int(h)) & lane) == lane); };
  return P(half(bits), half(bits >> P::kHalf));
}

// ---- Types at run time ----------------------------------------------------------------------------------------------

// f(T()) with the C++ type.
template <class F>
inline void with_type(DType t, F f) {
  switch (t) {
    case DType::kFloat64: return f(double());
    case DType::kFloat32: return f(float());
    case DType::kFloat16: return f(c10::Half());
    case DType::kBFloat16: return f(c10::BFloat16());
  }
}

// Element i of a small array, such as a parameter per channel; missing is what a null array means.
inline double read(const void* p, DType t, int64_t i, double missing) {
  double v = missing;
  if (p) with_type(t, [&](auto zero) { v = double(static_cast<const decltype(zero)*>(p)[i]); });
  return v;
}

inline void write(void* p, DType t, int64_t i, double v) {
  if (p) with_type(t, [&](auto zero) { static_cast<decltype(zero)*>(p)[i] = static_cast<Accumulate<decltype(zero)>>(v); });
}

}  // namespace cpu::CPU_CAPABILITY
}  // namespace fastnorm
