// What the max-pooling kernels compute with beside pool_lanes.h: maxima that know their tap, and offsets of any size.
#pragma once
#include "../max_pool2d.h"
#include "pool_lanes.h"

namespace fastnorm::cpu::CPU_CAPABILITY {
namespace {

// An integer as wide as A: what tells the taps of a vector of A apart.
template <class A>
using Tap = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;

// The greatest values so far, and which tap each of them came from, if that is wanted.
template <class A, int L, bool kTaps>
struct Best {
  Lanes<A, L> value;
  Lanes<Tap<A>, L> tap;

  [[gnu::always_inline]] inline void take(const Lanes<A, L>& v, const Lanes<Tap<A>, L>& t) {
    const auto better = (v > value) | (v != v);
    value = better ? v : value;
    if constexpr (kTaps) tap = better ? t : tap;
  }
};

// ---- Offsets --------------------------------------------------------------------------------------------------------

// The lowest byte of each lane.  GCC 12 does that lane by lane.
template <int L, class V>
[[gnu::always_inline]] inline Lanes<uint8_t, L> lowest_bytes(V v) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (sizeof(V) == 64 && L == 16) return Lanes<uint8_t, L>(_mm512_cvtepi32_epi8((__m512i)v));
  if constexpr (sizeof(V) == 4 * L && (L == 8 || L == 4)) {
    __m128i all;
    if constexpr (L == 8)
      all = _mm256_cvtepi32_epi8((__m256i)v);
    else
      all = _mm_cvtepi32_epi8((__m128i)v);
    Lanes<uint8_t, L> bytes;
    std::memcpy(&bytes, &all, sizeof(bytes));
    return bytes;
  }
#elif defined(CPU_CAPABILITY_AVX2)
  if constexpr (sizeof(V) == 32 && L == 8) {
    constexpr int kZero = -1;
    const __m256i order = _mm256_setr_epi8(0, 4, 8, 12, kZero, kZero, kZero, kZero, kZero, kZero, kZero, kZero, kZero,
                                           kZero, kZero, kZero, kZero, kZero, kZero, kZero, 0, 4, 8, 12, kZero, kZero,
                                           kZero, kZero, kZero, kZero, kZero, kZero);
    const __m256i quarters = _mm256_shuffle_epi8((__m256i)v, order);
    const int64_t all =
        _mm_cvtsi128_si64(_mm_or_si128(_mm256_castsi256_si128(quarters), _mm256_extracti128_si256(quarters, 1)));
    Lanes<uint8_t, L> bytes;
    std::memcpy(&bytes, &all, sizeof(bytes));
    return bytes;
  }
  if constexpr (sizeof(V) == 16 && L == 4) {
    const int all = _mm_cvtsi128_si32(_mm_shuffle_epi8((__m128i)v, _mm_set1_epi32(0x0c080400)));
    Lanes<uint8_t, L> bytes;
    std::memcpy(&bytes, &all, sizeof(bytes));
    return bytes;
  }
#endif
  return __builtin_convertvector(v, Lanes<uint8_t, L>);
}

template <int L, class V>
[[gnu::always_inline]] inline void store_offsets(void* p, int bytes, int64_t i, V tap) {
  switch (bytes) {
    case 1: return store_lanes(static_cast<uint8_t*>(p) + i, lowest_bytes<L>(tap));
    case 2: return store_lanes(static_cast<int16_t*>(p) + i, __builtin_convertvector(tap, Lanes<int16_t, L>));
    default: return store_lanes(static_cast<int32_t*>(p) + i, __builtin_convertvector(tap, Lanes<int32_t, L>));
  }
}

// Bytes as wider numbers, for which GCC 12 shifts and masks.
template <class Wide, int L>
[[gnu::always_inline]] inline Lanes<Wide, L> load_bytes(const uint8_t* p) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (sizeof(Wide) == 4 && L == 16)
    return Lanes<Wide, L>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#endif
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  if constexpr (sizeof(Wide) == 2 && L == 16)
    return Lanes<Wide, L>(_mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  if constexpr (sizeof(Wide) == 2 && L == 8)
    return Lanes<Wide, L>(_mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  if constexpr (sizeof(Wide) == 4 && L == 8)
    return Lanes<Wide, L>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  if constexpr (sizeof(Wide) == 4 && L == 4) {
    int all;
    std::memcpy(&all, p, sizeof(all));
    return Lanes<Wide, L>(_mm_cvtepu8_epi32(_mm_cvtsi32_si128(all)));
  }
#endif
  return __builtin_convertvector(load_lanes<L>(p), Lanes<Wide, L>);
}

// kBytes: of an offset, or 0 where that is only known when the program runs.
template <int kBytes, int L, class A>
[[gnu::always_inline]] inline Lanes<Tap<A>, L> load_offsets(const void* p, int bytes, int64_t i) {
  using V = Lanes<Tap<A>, L>;
  switch (kBytes ? kBytes : bytes) {
    case 1: return load_bytes<Tap<A>, L>(static_cast<const uint8_t*>(p) + i);
    case 2: return __builtin_convertvector(load_lanes<L>(static_cast<const int16_t*>(p) + i), V);
    default: return __builtin_convertvector(load_lanes<L>(static_cast<const int32_t*>(p) + i), V);
  }
}

}  // namespace
}  // namespace fastnorm::cpu::CPU_CAPABILITY
