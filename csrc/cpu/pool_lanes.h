// What the pooling kernels compute with: vectors of any power of two of lanes, in the compiler's own vector types, as
// at::vec has one size only and rows are often shorter; and rows of 16-bit types as float32.
#pragma once
#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "../pool.h"
#include "arena.h"
#include "parallel.h"
#include "vector.h"

namespace fastnorm::cpu::CPU_CAPABILITY {
namespace {

template <class T, int L>
struct LanesOf {
  typedef T type __attribute__((vector_size(L * sizeof(T))));
};
template <class T, int L>
using Lanes = typename LanesOf<T, L>::type;

constexpr int kPoolLanes = at::vec::Vectorized<float>::size();  // as many as a register has, in float32

template <int L, class T>
[[gnu::always_inline]] inline Lanes<T, L> load_lanes(const T* p) {
  Lanes<T, L> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <class T, class V>
[[gnu::always_inline]] inline void store_lanes(T* p, V v) {
  std::memcpy(p, &v, sizeof(v));
}

// f(L, i) for blocks that cover [begin, end), the last of which may overlap the one before.
template <int L = kPoolLanes, class F>
[[gnu::always_inline]] inline void for_blocks(int64_t begin, int64_t end, F f) {
  if (end - begin >= L) {
    for (int64_t i = begin; i < end; i += L) f(std::integral_constant<int, L>(), std::min(i, end - L));
  } else if constexpr (L > 4) {
    for_blocks<L / 2>(begin, end, f);
  } else {
    for (int64_t i = begin; i < end; i++) f(std::integral_constant<int, 1>(), i);
  }
}

// f(L) where c channels fill more than half of L lanes and not all: what is too much lies in the next pixel, whose
// stores make it good.
template <int L = kPoolLanes, class F>
[[gnu::always_inline]] inline void with_spilling_lanes(int64_t c, F f) {
  if (c < L && 2 * c > L)
    f(std::integral_constant<int, L>());
  else if constexpr (L > 4)
    with_spilling_lanes<L / 2>(c, f);
}

// A number in every lane.
template <int L, class T>
[[gnu::always_inline]] inline Lanes<T, L> lanes_of(T v) {
  return v - Lanes<T, L>{};  // not a sum, which would make -0 into 0
}

// Elements of a and b in turn, the first or the second half of them.
template <int kFirst, class V, int... i>
[[gnu::always_inline]] inline V interleave(V a, V b, std::integer_sequence<int, i...>) {
  constexpr int L = sizeof...(i);
  return __builtin_shufflevector(a, b, (kFirst + i / 2 + i % 2 * L)...);
}

// Whether all windows are 2 x 2, side by side and inside.
inline bool has_pairs(const PoolShape& s) {
  auto pairs = [](const PoolAxis& a) {
    return a.kernel == 2 && a.stride == 2 && a.dilation == 1 && a.pad == 0 && 2 * int64_t(a.out) <= a.in;
  };
  return pairs(s.y) && pairs(s.x);
}

// ---- 16-bit types ---------------------------------------------------------------------------------------------------

// to[i] = from[i], from or to a 16-bit type; a row's end may be written more than once.
template <class From, class To>
inline void copy_row(const From* from, To* to, int64_t n) {
  using T = std::conditional_t<sizeof(From) < sizeof(To), From, To>;
  for_packs<T>(n, [&](int64_t i, auto count, auto) { store(to + i, load(from + i, count), count); });
}

// L values in the type that is computed with.
template <int L, class T>
[[gnu::always_inline]] inline Lanes<Accumulate<T>, L> load_wide(const T* p) {
  if constexpr (std::is_same_v<T, Accumulate<T>>) {
    return load_lanes<L>(p);
  } else if constexpr (std::is_same_v<T, c10::BFloat16>) {
    using Bits = Lanes<uint32_t, L>;
    const Bits bits = __builtin_convertvector(load_lanes<L>(reinterpret_cast<const uint16_t*>(p)), Bits) << 16;
    return Lanes<float, L>(bits);
  } else {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
    if constexpr (L == 8) return Lanes<float, L>(_mm256_cvtph_ps(__m128i(load_lanes<8>((const int16_t*)p))));
    if constexpr (L == 4) {
      const auto low = load_lanes<4>((const int16_t*)p);
      return Lanes<float, L>(_mm_cvtph_ps(__m128i(__builtin_shufflevector(low, low, 0, 1, 2, 3, 0, 1, 2, 3))));
    }
#endif
#ifdef CPU_CAPABILITY_AVX512
    if constexpr (L == 16) return Lanes<float, L>(_mm512_cvtph_ps(__m256i(load_lanes<16>((const int16_t*)p))));
#endif
    Lanes<float, L> v;
    for (int i = 0; i < L; i++) v[i] = float(p[i]);
    return v;
  }
}

// Every other lane of a and then b.
template <int kFirst, class V, int... i>
[[gnu::always_inline]] inline V deinterleave(V a, V b, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(a, b, (2 * i + kFirst)...);
}

// Every other one of 2 L elements.
template <int kFirst, int L, class T, int... i>
[[gnu::always_inline]] inline auto every_other(const T* p, std::integer_sequence<int, i...> lanes) {
  return deinterleave<kFirst>(load_wide<L>(p), load_wide<L>(p + L), lanes);
}

// p[at + i * stride] for every lane i; kStride is the stride, or 0 where it is only known when the program runs.
// Touches nothing beside the elements from p[0] to the last of them.  With a stride of 2, p[1] is there.
template <int L, int kStride, class T>
[[gnu::always_inline]] inline Lanes<Accumulate<T>, L> strided(const T* p, int64_t at, int64_t stride) {
  if constexpr (kStride == 1) {
    return load_wide<L>(p + at);
  } else if constexpr (kStride == 2) {
    constexpr std::make_integer_sequence<int, L> lanes;
    return at == 0 ? every_other<0, L>(p, lanes) : every_other<1, L>(p + at - 1, lanes);
  } else {
    Lanes<Accumulate<T>, L> v;
    for (int i = 0; i < L; i++) v[i] = Accumulate<T>(p[at + i * stride]);
    return v;
  }
}

template <int L, class T>
[[gnu::always_inline]] inline void store_narrow(T* p, Lanes<Accumulate<T>, L> v) {
  if constexpr (std::is_same_v<T, Accumulate<T>>) {
    store_lanes(p, v);
  } else if constexpr (std::is_same_v<T, c10::BFloat16>) {
    using Bits = Lanes<uint32_t, L>;
    const Bits bits = Bits(v), rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;  // to the nearest, or to even
    const Bits kept = v == v ? rounded : lanes_of<L>(0x7fc0u);
    store_lanes(reinterpret_cast<uint16_t*>(p), __builtin_convertvector(kept, Lanes<uint16_t, L>));
  } else {
    [[maybe_unused]] constexpr int kNearest = 0;
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
    if constexpr (L == 8) return store_lanes(p, _mm256_cvtps_ph(__m256(v), kNearest));
    if constexpr (L == 4) {
      const __m128i narrow = _mm_cvtps_ph(__m128(v), kNearest);
      return void(std::memcpy(p, &narrow, 8));
    }
#endif
#ifdef CPU_CAPABILITY_AVX512
    if constexpr (L == 16) return store_lanes(p, _mm512_cvtps_ph(__m512(v), kNearest));
#endif
    for (int i = 0; i < L; i++) p[i] = T(v[i]);
  }
}

// body(plane, begin, end) for all rows of all planes: whole planes if there are enough of them for the team, else
// bands.
template <class F>
inline void for_rows(Team team, int64_t planes, int rows, F body) {
  const int64_t tasks = team.size == 1 ? 1 : 16 * team.size;
  const int64_t bands = std::clamp<int64_t>(tasks / planes, 1, rows), groups = std::min(planes, tasks);
  team.for_each(groups * bands, [&](int64_t task) {
    const int64_t group = task / bands, band = task % bands;
    const int64_t end = planes * (group + 1) / groups;
    const int first_row = int(rows * band / bands), end_row = int(rows * (band + 1) / bands);
    for (int64_t plane = planes * group / groups; plane < end; plane++) body(plane, first_row, end_row);
  });
}

}  // namespace
}  // namespace fastnorm::cpu::CPU_CAPABILITY
