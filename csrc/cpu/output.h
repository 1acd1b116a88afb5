// How large outputs get to memory: on huge pages, and past the caches.
#pragma once
#include <cstddef>
#include <cstdint>

#include "vector.h"
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fastnorm::cpu::CPU_CAPABILITY {

// Fresh memory costs a page fault per 4 KB, which takes longer than the kernels do.  For memory that is about to be
// written whole; what is mapped already is not affected.  Null is allowed.
inline void prefer_huge_pages(void* p, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = 2 << 20;
  if (!p || bytes < kHugePage) return;
  const uintptr_t data = reinterpret_cast<uintptr_t>(p);
  const uintptr_t begin = (data + kHugePage - 1) / kHugePage * kHugePage, end = (data + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: it may fail
#endif
}

// Whether memory was never written, by a page in its middle.  Then the system clears it when it is written first.
inline bool is_fresh(const void* p, int64_t bytes) {
#ifdef __linux__
  constexpr uintptr_t kLargestPage = 64 << 10;
  const uintptr_t middle = (reinterpret_cast<uintptr_t>(p) + bytes / 2) / kLargestPage * kLargestPage;
  unsigned char resident = 1;
  return mincore(reinterpret_cast<void*>(middle), 1, &resident) == 0 && !(resident & 1);
#else
  return false;
#endif
}

// What an operator may touch and still leave its output in the last-level cache.  Measured on a core complex with 32
// MB; what processors report is of little use here, as it may be the sum over a socket or none of this core's.
constexpr int64_t kCached = 20 << 20;

// Whether an output is written by streaming stores: they save reading each line first and leave the caches to what is
// still needed, but whoever reads the output next finds nothing there.  So only where all that the operator touches is
// larger than the caches anyway, and every run of the output begins with a cache line.  Not to fresh memory: its lines
// are in the caches when they have been cleared, and would be written back first; unless so much is written a bit of
// each in turn that they are not there any more.
inline bool streams(const void* output, int64_t bytes, int64_t run_bytes, int64_t touched_bytes, int64_t in_turn = 0) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  const bool whole_lines = reinterpret_cast<uintptr_t>(output) % 64 == 0 && run_bytes % 64 == 0;
  constexpr int64_t kCleared = 4 << 20;
  return whole_lines && touched_bytes > kCached && (!output || in_turn > kCleared || !is_fresh(output, bytes));
#else
  return false;
#endif
}

// So many bytes, past the caches where there are such stores; both places are aligned to that, or to a vector.
template <size_t kBytes>
[[gnu::always_inline]] inline void stream(void* to, const void* from) {
  constexpr size_t kVector = sizeof(at::vec::Vectorized<float>);
  if constexpr (kBytes > kVector) {
    stream<kVector>(to, from);
    return stream<kBytes - kVector>(static_cast<char*>(to) + kVector, static_cast<const char*>(from) + kVector);
  }
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (kBytes == 64) return _mm512_stream_si512(static_cast<__m512i*>(to), _mm512_load_si512(from));
#endif
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  if constexpr (kBytes == 32)
    return _mm256_stream_si256(static_cast<__m256i*>(to), _mm256_load_si256(static_cast<const __m256i*>(from)));
  if constexpr (kBytes == 16)
    return _mm_stream_si128(static_cast<__m128i*>(to), _mm_load_si128(static_cast<const __m128i*>(from)));
#endif
  std::memcpy(to, from, kBytes);
}

// store(p), which stores L elements there, by streaming stores where that is asked for.
template <int64_t L, class T, class F>
[[gnu::always_inline]] inline void store_run(T* p, bool streaming, F store) {
  if (!streaming) return store(p);
  alignas(64) T line[L];  // stays in registers
  store(line);
  stream<sizeof(line)>(p, line);
}

// A pack as for_packs() gives it, likewise where it is whole.
template <class T, class Count, class Again>
inline void store_output(T* p, Pack<Accumulate<T>> v, Count count, Again, bool streaming) {
  constexpr bool kWhole = !std::is_same_v<Count, int64_t> && std::is_same_v<Again, Zero>;
  auto put = [&](T* to) __attribute__((always_inline)) { store(to, v, count); };
  if constexpr (kWhole)
    store_run<kLanes<T>>(p, streaming, put);
  else
    put(p);
}

// One vector, likewise.
template <class A>
inline void store_vector(A* p, at::vec::Vectorized<A> v, bool streaming) {
  store_run<v.size()>(p, streaming, [&](A* to) __attribute__((always_inline)) { v.store(to); });
}

// Before other threads may read what was streamed.
inline void finish_streaming() {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  _mm_sfence();
#endif
}

}  // namespace fastnorm::cpu::CPU_CAPABILITY
