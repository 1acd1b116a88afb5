// What kernels use of CUDA's device code, for the CPU emulator; add to it as they need more.
//
// There are no floating-point atomics on purpose: their order changes from run to run.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_functions.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda_emulator.h"

#undef __forceinline__
#undef __noinline__
#undef __launch_bounds__
#undef __shared__
#undef __grid_constant__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __shared__ _Pragma("GCC error \"declare shared memory with FASTNORM_SHARED or FASTNORM_DYNAMIC_SHARED\"")
#define __grid_constant__
#define __builtin_assume(condition)

#define threadIdx (::cuda_emulator::current->index)
#define blockIdx (::cuda_emulator::current->block->index)
#define blockDim (::cuda_emulator::engine.block)
#define gridDim (::cuda_emulator::engine.grid)
#define warpSize 32

#define FASTNORM_SHARED(T, name, n)                                                                            \
  static char name##_tag;                                                                                      \
  auto& name =                                                                                                 \
      *reinterpret_cast<T(*)[n]>(::cuda_emulator::static_shared(*::cuda_emulator::current->block, &name##_tag, \
                                                                sizeof(T[n]), {__FILE__, __LINE__})            \
                                     .get())
#define FASTNORM_DYNAMIC_SHARED(T, name) \
  T* const name = reinterpret_cast<T*>(::cuda_emulator::current->block->dynamic_shared->get())

// ---- Barriers and fences --------------------------------------------------------------------------------------------

namespace cuda_emulator {
inline unsigned arrive_block(const char* function, Site site, bool predicate = false) {
  return synchronize(current->block->barrier, current->block->exited, function, site, predicate);
}
}  // namespace cuda_emulator

inline void __syncthreads(CUDA_EMULATOR_SITE) { cuda_emulator::arrive_block("__syncthreads()", site); }
inline int __syncthreads_count(int predicate, CUDA_EMULATOR_SITE) {
  return int(cuda_emulator::arrive_block("__syncthreads_count()", site, predicate != 0));
}
inline int __syncthreads_or(int predicate, CUDA_EMULATOR_SITE) {
  return cuda_emulator::arrive_block("__syncthreads_or()", site, predicate != 0) != 0;
}
inline int __syncthreads_and(int predicate, CUDA_EMULATOR_SITE) {
  return cuda_emulator::arrive_block("__syncthreads_and()", site, predicate == 0) == 0;
}

// For ThreadSanitizer it orders memory with all earlier ones: more than on the device, so a fence that is there but
// in the wrong thread is not seen.
inline void __threadfence() {
  cuda_emulator::engine.fence.release();
  cuda_emulator::engine.fence.acquire();
}
inline void __threadfence_block() { __threadfence(); }

[[noreturn]] inline void __trap(CUDA_EMULATOR_SITE) { cuda_emulator::fail(site, "__trap()"); }

// ---- Warps ----------------------------------------------------------------------------------------------------------

inline void __syncwarp(unsigned mask = ~0u, CUDA_EMULATOR_SITE) {
  auto& order = cuda_emulator::current->block->warps[cuda_emulator::current->warp].order;
  order.release();
  cuda_emulator::warp_collective(cuda_emulator::WarpOp::kSync, "__syncwarp()", mask, 0, 0, site);
  order.acquire();
}

inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_EMULATOR_SITE) {
  using cuda_emulator::WarpOp;
  return unsigned(cuda_emulator::warp_collective(WarpOp::kBallot, "__ballot_sync()", mask, predicate != 0, 0, site));
}
inline int __any_sync(unsigned mask, int predicate, CUDA_EMULATOR_SITE) {
  return __ballot_sync(mask, predicate, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, CUDA_EMULATOR_SITE) {
  return __ballot_sync(mask, !predicate, site) == 0;
}

namespace cuda_emulator {
template <class T>
uint64_t to_bits(T v) {
  static_assert(std::is_trivially_copyable_v<T> && (sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8),
                "warp intrinsics move 2, 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &v, sizeof(T));
  return bits;
}
template <class T>
T shuffle(const char* function, unsigned mask, T v, unsigned source, Site site) {
  const uint64_t bits = warp_collective(WarpOp::kShuffle, function, mask, to_bits(v), source, site);
  std::memcpy(static_cast<void*>(&v), &bits, sizeof(T));
  return v;
}
inline int lane() { return int(current->lane); }
inline int segment(int width) { return lane() & -width; }  // where this lane's group of `width` lanes begins
}  // namespace cuda_emulator

template <class T>
unsigned __match_any_sync(unsigned mask, T v, CUDA_EMULATOR_SITE) {
  using namespace cuda_emulator;
  return unsigned(warp_collective(WarpOp::kMatch, "__match_any_sync()", mask, to_bits(v), 0, site));
}
template <class T>
T __shfl_sync(unsigned mask, T v, int source, int width = 32, CUDA_EMULATOR_SITE) {
  using namespace cuda_emulator;
  return shuffle("__shfl_sync()", mask, v, unsigned(segment(width) | (source & (width - 1))), site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int bits, int width = 32, CUDA_EMULATOR_SITE) {
  using namespace cuda_emulator;
  const int source = lane() ^ bits;
  return shuffle("__shfl_xor_sync()", mask, v, unsigned(source < segment(width) + width ? source : lane()), site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32, CUDA_EMULATOR_SITE) {
  using namespace cuda_emulator;
  const int source = lane() + int(delta);
  return shuffle("__shfl_down_sync()", mask, v, unsigned(source < segment(width) + width ? source : lane()), site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32, CUDA_EMULATOR_SITE) {
  using namespace cuda_emulator;
  const int source = lane() - int(delta);
  return shuffle("__shfl_up_sync()", mask, v, unsigned(source >= segment(width) ? source : lane()), site);
}

// ---- Memory ---------------------------------------------------------------------------------------------------------

// Loads and stores with a cache hint.  Like the device's, they want whole-value alignment; UBSan checks that.
#define CUDA_EMULATOR_LOAD(name) \
  template <class T>             \
  T name(const T* p) {           \
    return *p;                   \
  }
CUDA_EMULATOR_LOAD(__ldg)
CUDA_EMULATOR_LOAD(__ldca)
CUDA_EMULATOR_LOAD(__ldcg)
CUDA_EMULATOR_LOAD(__ldcs)
CUDA_EMULATOR_LOAD(__ldcv)
CUDA_EMULATOR_LOAD(__ldlu)
#undef CUDA_EMULATOR_LOAD
#define CUDA_EMULATOR_STORE(name)                                \
  template <class T>                                             \
  void name(T* p, typename cuda_emulator::Identity<T>::type v) { \
    *p = v;                                                      \
  }
CUDA_EMULATOR_STORE(__stcg)
CUDA_EMULATOR_STORE(__stcs)
CUDA_EMULATOR_STORE(__stwb)
CUDA_EMULATOR_STORE(__stwt)
#undef CUDA_EMULATOR_STORE

// Asynchronous copies of 4, 8 or 16 bytes to shared memory, of which the last `zfill` are zeros (cp.async).  The copy
// is made when it is waited for: who reads early reads what was there before.
inline void __pipeline_memcpy_async(void* shared, const void* global, size_t bytes, size_t zfill = 0,
                                    CUDA_EMULATOR_SITE) {
  using namespace cuda_emulator;
  const auto address = reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global);
  if ((bytes != 4 && bytes != 8 && bytes != 16) || address % bytes || zfill > bytes)
    fail(site, "__pipeline_memcpy_async() of other than 4, 8 or 16 aligned bytes");
  Quiet quiet;
  if (current->copies.empty()) current->copies.emplace_back();
  current->copies.back().push_back(
      {static_cast<char*>(shared), static_cast<const char*>(global), bytes - zfill, zfill});
}
inline void __pipeline_commit() {
  cuda_emulator::Quiet quiet;
  if (cuda_emulator::current->copies.empty()) cuda_emulator::current->copies.emplace_back();
  cuda_emulator::current->copies.emplace_back();
}
// Waits for all but the last `prior` batches.
inline void __pipeline_wait_prior(size_t prior) {
  auto& batches = cuda_emulator::current->copies;  // the last one is not committed
  const size_t done = batches.size() > prior + 1 ? batches.size() - prior - 1 : 0;
  for (size_t i = 0; i < done; i++)
    for (const auto& copy : batches[i]) {
      std::memcpy(copy.to, copy.from, copy.bytes);
      std::memset(copy.to + copy.bytes, 0, copy.zeros);
    }
  cuda_emulator::Quiet quiet;
  batches.erase(batches.begin(), batches.begin() + std::ptrdiff_t(done));
}

// ---- Integer atomics ------------------------------------------------------------------------------------------------

namespace cuda_emulator {
template <class T, class F>
T atomic_update(T* p, F f) {
  static_assert(std::is_integral_v<T> && sizeof(T) >= 4, "floating-point atomics are not reproducible");
  let_others_go_first();
  T old = __atomic_load_n(p, __ATOMIC_RELAXED);  // relaxed: only fences order other memory
  while (!__atomic_compare_exchange_n(p, &old, T(f(old)), false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}
}  // namespace cuda_emulator
#define CUDA_EMULATOR_ATOMIC(name, result)                                 \
  template <class T>                                                       \
  T name(T* p, typename cuda_emulator::Identity<T>::type v) {              \
    return cuda_emulator::atomic_update(p, [v](T old) { return result; }); \
  }
CUDA_EMULATOR_ATOMIC(atomicAdd, old + v)
CUDA_EMULATOR_ATOMIC(atomicSub, old - v)
CUDA_EMULATOR_ATOMIC(atomicMin, v < old ? v : old)
CUDA_EMULATOR_ATOMIC(atomicMax, v > old ? v : old)
CUDA_EMULATOR_ATOMIC(atomicAnd, old& v)
CUDA_EMULATOR_ATOMIC(atomicOr, old | v)
CUDA_EMULATOR_ATOMIC(atomicXor, old ^ v)
CUDA_EMULATOR_ATOMIC(atomicExch, v)
CUDA_EMULATOR_ATOMIC(atomicInc, old >= v ? 0 : old + 1)
#undef CUDA_EMULATOR_ATOMIC
template <class T>
T atomicCAS(T* p, typename cuda_emulator::Identity<T>::type from, typename cuda_emulator::Identity<T>::type to) {
  return cuda_emulator::atomic_update(p, [from, to](T old) { return old == from ? to : old; });
}

// ---- Arithmetic -----------------------------------------------------------------------------------------------------

inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __saturatef(float x) { return x > 0 ? std::fmin(x, 1.0f) : 0.0f; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline double __dadd_rn(double x, double y) { return x + y; }
inline double __dsub_rn(double x, double y) { return x - y; }
inline double __dmul_rn(double x, double y) { return x * y; }
inline double __ddiv_rn(double x, double y) { return x / y; }
inline double __fma_rn(double x, double y, double z) { return std::fma(x, y, z); }

namespace cuda_emulator {
template <class T, class U>
using Arithmetic = std::enable_if_t<std::is_arithmetic_v<T> && std::is_arithmetic_v<U>, std::common_type_t<T, U>>;
}  // namespace cuda_emulator
template <class T, class U>
cuda_emulator::Arithmetic<T, U> min(T a, U b) {
  using R = std::common_type_t<T, U>;
  if constexpr (std::is_floating_point_v<R>) return std::fmin(R(a), R(b));
  return R(b) < R(a) ? R(b) : R(a);
}
template <class T, class U>
cuda_emulator::Arithmetic<T, U> max(T a, U b) {
  using R = std::common_type_t<T, U>;
  if constexpr (std::is_floating_point_v<R>) return std::fmax(R(a), R(b));
  return R(a) < R(b) ? R(b) : R(a);
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64; }
inline unsigned __brev(unsigned x) {
  unsigned r = 0;
  for (int i = 0; i < 32; i++) r |= (x >> i & 1) << (31 - i);
  return r;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return unsigned(((uint64_t(high) << 32) | low) >> (shift & 31));
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return unsigned((((uint64_t(high) << 32) | low) << (shift & 31)) >> 32);
}

namespace cuda_emulator {
template <class To, class From>
To reinterpret_bits(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &v, sizeof(To));
  return to;
}
}  // namespace cuda_emulator
inline unsigned __float_as_uint(float x) { return cuda_emulator::reinterpret_bits<unsigned>(x); }
inline int __float_as_int(float x) { return cuda_emulator::reinterpret_bits<int>(x); }
inline float __uint_as_float(unsigned x) { return cuda_emulator::reinterpret_bits<float>(x); }
inline float __int_as_float(int x) { return cuda_emulator::reinterpret_bits<float>(x); }
inline long long __double_as_longlong(double x) { return cuda_emulator::reinterpret_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return cuda_emulator::reinterpret_bits<double>(x); }
