// Vectors for the CPU kernels: a Pack is kLanes consecutive elements in the accumulate type, whatever type they have in
// memory.  Everything here lives in the namespace of the instruction set that the file is compiled for, so that no
// other variant can get at it.
#pragma once
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../activation.h"
#include "../dtype.h"

namespace fastnorm {

#if defined(CPU_CAPABILITY_AVX2) && !defined(CPU_CAPABILITY_AVX512)
// 2^i for the i that have an exponent field.
inline at::vec::Vectorized<float> two_to(__m256i i) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(i, _mm256_set1_epi32(127)), 23));
}
#endif

// Whether the formulas below are for V; others are ATen's.
template <class V>
constexpr bool kHasFormulas =
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
    std::is_same_v<V, at::vec::Vectorized<float>>;
#else
    false;
#endif

// e^v = 2^n (1 + rest), n whole and |rest| at most about sqrt(2) - 1; NaN passes.
template <class V>
struct ExpParts {
  V n, rest;

  // v from lowest on, to 89, which leads to infinity
  ExpParts(V v, float lowest) : ExpParts(at::vec::clamp(v, V(lowest), V(89.f))) {}
  explicit ExpParts(V v) {
    using at::vec::fmadd;
    // v = n ln 2 + r with |r| <= ln 2 / 2
    n = (v * V(1.44269504f)).round();
    const V r = fmadd(n, V(1.90465421e-9f), fmadd(n, V(-0.693147182f), v));
    // e^r = 1 + r + r^2 q(r), q by a minimax fit: 3e-9
    V q = fmadd(V(1.38145394e-3f), r, V(8.36874545e-3f));
    q = fmadd(fmadd(fmadd(q, r, V(4.16683890e-2f)), r, V(0.166665211f)), r, V(0.49999994f));
    rest = fmadd(q, r * r, r);
  }
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  V whole() const {
    const V power = rest + V(1.f);
#ifdef CPU_CAPABILITY_AVX512
    return _mm512_scalef_ps(power, n);
#else
    // 2^n as a product of two, each of which has an exponent field.
    const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
    return power * two_to(half) * two_to(_mm256_sub_epi32(whole, half));
#endif
  }
#endif
};

// e^v, for float32 to within 1 unit in the last place.  ATen's calls a library function for each vector, around which
// all registers are saved, and takes twice as long.
template <class V>
inline V exp(V v) {
  if constexpr (kHasFormulas<V>)
    return ExpParts<V>(v, -104.f).whole();  // the bound leads to 0
  else
    return v.exp();
}

// e^v - 1, for float32 to within 2 units in the last place.
template <class V>
inline V expm1(V v) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  if constexpr (kHasFormulas<V>) {
    // From -18 on down it is -1.  Half of 2^n has an exponent field for all n up to infinity's.
    const ExpParts<V> e(v, -18.f);
#ifdef CPU_CAPABILITY_AVX512
    const V half = _mm512_scalef_ps(V(0.5f), e.n);
#else
    const V half = two_to(_mm256_sub_epi32(_mm256_cvtps_epi32(e.n), _mm256_set1_epi32(1)));
#endif
    const V sum = at::vec::fmadd(e.rest, half, half - V(0.5f));
    return sum + sum;
  }
#endif
  return v.expm1();
}

// tanh(v), for float32 to within 3 units in the last place.
template <class V>
inline V tanh(V v) {
  if constexpr (kHasFormulas<V>) {
    // (e^2v - 1) / (e^2v + 1), which is 1 from 9.02 on; NaN passes.
    const V sign = v & V(-0.f), size = at::vec::clamp_max(v ^ sign, V(10.f)), t = fastnorm::expm1(size + size);
    return (t / (t + V(2.f))) | sign;
  }
  return v.tanh();
}

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
// v's sign bit ? x : y.  A comparison would make a vector of what is a bit, which has to be made one again.
inline at::vec::Vectorized<float> by_sign(at::vec::Vectorized<float> v, at::vec::Vectorized<float> x,
                                          at::vec::Vectorized<float> y) {
#ifdef CPU_CAPABILITY_AVX512
  return _mm512_mask_mov_ps(y, _mm512_movepi32_mask(_mm512_castps_si512(v)), x);
#else
  return _mm256_blendv_ps(y, x, v);
#endif
}
#endif

// Of the normal distribution: |v|, at most 15, where all is 0, and e^(-v^2 / 2).  NaN passes.
template <class V>
struct NormalParts {
  V size, power;

  explicit NormalParts(V v)
      : size(at::vec::clamp_max(v.abs(), V(15.f))), power(ExpParts<V>(size * size * V(-0.5f)).whole()) {}
};

// The cdf, for float32 with a relative error of 3e-7 above -3, and below that of e^(-v^2 / 2).
template <class V>
inline V normal_cdf(V v) {
  if constexpr (kHasFormulas<V>) {
    using at::vec::fmadd;
    // The form of Abramowitz and Stegun 7.1.26: the tail beyond |v| is power * t q(1 - t), t = 1 / (1 + 0.305 |v|),
    // with q by a minimax fit: 1.1e-7, 0 at 0.
    const NormalParts<V> parts(v);
    const V one(1.f), w = parts.size * V(0.305f), t = one / (one + w), u = w * t;
    V q = fmadd(V(-3.64529351e-2f), u, V(0.103171190f));
    q = fmadd(fmadd(fmadd(q, u, V(-3.75916524e-2f)), u, V(-0.120281187f)), u, V(-5.08132254e-2f));
    q = fmadd(fmadd(fmadd(q, u, V(0.571622634f)), u, V(-0.808013034f)), u, V(0.5f));
    const V tail = parts.power * (t * q);
    return by_sign(v, tail, one - tail);
  } else {
    using M = Math<V>;
    return M::set(0.5) * (v * M::set(-kSqrtHalf)).erfc();
  }
}

template <class V>
inline V normal_density(V v) {
  using M = Math<V>;
  if constexpr (kHasFormulas<V>)
    return NormalParts<V>(v).power * M::set(kInvSqrtTwoPi);  // the compiler finds the cdf's
  else
    return M::exp(M::set(-0.5) * v * v) * M::set(kInvSqrtTwoPi);
}

template <class A>
struct Math<at::vec::Vectorized<A>> {
  using V = at::vec::Vectorized<A>;
  using Mask = V;
  static V set(double v) { return V(A(v)); }
  static Mask less(V a, V b) { return a < b; }
  static Mask less_equal(V a, V b) { return a <= b; }
  static V select(Mask m, V a, V b) { return V::blendv(b, a, m); }
  static V relu(V v) { return at::vec::clamp_min(v, V(A(0))); }
  static V exp(V v) { return fastnorm::exp(v); }
  static V expm1(V v) { return fastnorm::expm1(v); }
  static V tanh(V v) { return fastnorm::tanh(v); }
  static V normal_cdf(V v) { return fastnorm::normal_cdf(v); }
  static V normal_density(V v) { return fastnorm::normal_density(v); }
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

  // A mask of the first count lanes.
  static Pack first(int64_t count) {
    const V lane = V::arange(A(0), A(1)), n = V(A(count));
    return {lane < n, lane + V(A(kHalf)) < n};
  }
  // ... and of all but the first count.
  static Pack after(int64_t count) {
    const V lane = V::arange(A(0), A(1)), n = V(A(count));
    return {n <= lane, n <= lane + V(A(kHalf))};
  }
  friend Pack operator&(Pack x, Pack y) { return {x.a & y.a, x.b & y.b}; }
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

using Zero = std::integral_constant<int64_t, 0>;

// f(i, count, again) for every pack of len elements.  What is left after the last full pack is taken as a full pack
// too: it ends with the span, so that `again` of its first lanes were taken before.  Only a span that is shorter than a
// pack has a smaller count, which then is an int64_t; `again` is a constant 0 in all but that last pack.
template <class T, class F>
inline void for_packs(int64_t len, F f) {
  constexpr int64_t W = kLanes<T>;
  if (len < W) return f(int64_t(0), len, Zero());
  int64_t i = 0;
  for (; i + W <= len; i += W) f(i, Full<T>(), Zero());
  if (i < len) f(len - W, Full<T>(), i - (len - W));
}

// For sums over such packs: a mask of the lanes that the tail of a span adds, and its use.
template <class T>
inline Pack<Accumulate<T>> new_lanes(int64_t len) {
  using P = Pack<Accumulate<T>>;
  return len < kLanes<T> ? P::first(len) : P::after((kLanes<T> - len % kLanes<T>) % kLanes<T>);
}

template <class P, class Count, class Again>
inline P keep(P lanes, P v, Count, Again) {
  if constexpr (std::is_same_v<Count, int64_t> || std::is_same_v<Again, int64_t>) return v & lanes;
  return v;
}

// Fetches what is read or written next and the processor does not see coming.
template <bool kWrite = false, class T>
inline void prefetch_run(const T* p, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(p + i, kWrite, 2);
}

// A pack's.
template <class T, bool kWrite = false>
inline void prefetch(const T* p) {
  prefetch_run<kWrite>(p, kLanes<T>);
}

// ---- Bits -----------------------------------------------------------------------------------------------------------

// A span's bits begin with a byte; these are the bits of a pack as for_packs() gives it.  Little-endian, as every
// processor that torch runs on.

template <class Count, class Again>
inline void store_bits(uint8_t* span, int64_t i, uint32_t bits, Count count, Again again) {
  if constexpr (!std::is_same_v<Count, int64_t> && std::is_same_v<Again, Zero>) {
    std::memcpy(span + i / 8, &bits, count / 8);
  } else {                                               // the lanes that were taken before end with a byte
    if (count < 32) bits &= (uint32_t(1) << count) - 1;  // padding is 0
    for (int64_t lane = again; lane < count; lane += 8) span[(i + lane) / 8] = uint8_t(bits >> lane);
  }
}

template <class Count, class Again>
inline uint32_t load_bits(const uint8_t* span, int64_t i, Count count, Again again) {
  uint32_t bits = 0;
  if constexpr (std::is_same_v<Count, int64_t>) {
    for (int64_t lane = 0; lane < count; lane += 8) bits |= uint32_t(span[lane / 8]) << lane;
  } else {
    std::memcpy(&bits, span + i / 8, count / 8);
    if constexpr (!std::is_same_v<Again, Zero>)
      if (const int shift = i % 8) bits = bits >> shift | uint32_t(span[(i + count - 1) / 8]) << (count - shift);
  }
  return bits;
}

// bit ? x : y in every lane.
template <class A>
inline Pack<A> select_bits(uint32_t bits, Pack<A> x, Pack<A> y) {
#ifdef CPU_CAPABILITY_AVX512  // which has the bits' type in hardware
  if constexpr (std::is_same_v<A, float>)
    return {_mm512_mask_mov_ps(y.a, __mmask16(bits), x.a), _mm512_mask_mov_ps(y.b, __mmask16(bits >> 16), x.b)};
  else
    return {_mm512_mask_mov_pd(y.a, __mmask8(bits), x.a), _mm512_mask_mov_pd(y.b, __mmask8(bits >> 8), x.b)};
#else
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
  return select(P(half(bits), half(bits >> P::kHalf)), x, y);
#endif
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

// f(0) of the unsigned integer of so many bytes: elements that are only moved.
template <class F>
inline void with_bits(int64_t bytes, F f) {
  switch (bytes) {
    case 8: return f(uint64_t());
    case 4: return f(uint32_t());
    default: return f(uint16_t());
  }
}

// Element i of a small array, such as a parameter per channel; missing is what a null array means.
inline double read(const void* p, DType t, int64_t i, double missing) {
  double v = missing;
  if (p) with_type(t, [&](auto zero) { v = double(static_cast<const decltype(zero)*>(p)[i]); });
  return v;
}

inline void write(void* p, DType t, int64_t i, double v) {
  if (p)
    with_type(t, [&](auto zero) { static_cast<decltype(zero)*>(p)[i] = static_cast<Accumulate<decltype(zero)>>(v); });
}

}  // namespace cpu::CPU_CAPABILITY
}  // namespace fastnorm
