// What batch norm's forward and backward kernels share: the affine map, activations, what a launch looks like.
#pragma once
#include <bit>
#include <initializer_list>
#include <type_traits>

#include "batch_norm_mask.cuh"
#include "batch_norm_sums.cuh"

namespace fastnorm {
namespace {

// ---- Channels -------------------------------------------------------------------------------------------------------

// z = (x - mean) * scale + shift
template <class A>
struct Affine {
  A mean, scale, shift;
  __device__ __forceinline__ A operator()(A x) const { return fused(x - mean, scale, shift); }
};

template <class A>
__device__ __forceinline__ Affine<A> make_affine(A mean, A mean_low, A rstd, const void* weight, const void* bias,
                                                 DType type, int64_t channel) {
  const A scale = weight ? product(rstd, A(read(weight, type, channel))) : rstd;
  return {mean, scale, (bias ? A(read(bias, type, channel)) : A(0)) - product(mean_low, scale)};
}

// The channel that each of a thread's sums is of.
template <class T, bool kSeveral>
__device__ __forceinline__ int channel_of_sum(const Tiles& t, int i) {
  return kSeveral ? channel_of(t, int(threadIdx.x) % t.slots * kLanes<T> + i) : 0;
}

// Adds up lanes where they are of one channel; false if the sums are not finite.
template <class T, bool kSeveral>
__device__ __forceinline__ bool collect(double (&to)[kSums<T, kSeveral>], const Accumulate<T> (&from)[kLanes<T>]) {
  Accumulate<T> sum = from[0];
#pragma unroll
  for (int i = 1; i < kLanes<T>; i++) sum += from[i];
  if constexpr (kSeveral) {
#pragma unroll
    for (int i = 0; i < kLanes<T>; i++) to[i] = double(from[i]);
  } else {
    to[0] = double(sum);
  }
  return finite(sum);
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

// z = activation(z), and a bit for each lane where the slope is 1.
template <class T, bool kGeneral, class A>
__device__ __forceinline__ unsigned activate_lanes(Activation activation, A (&z)[kLanes<T>], A negative_slope) {
  unsigned bits = 0;
  if constexpr (kGeneral) {
    with_activation(activation, [&](auto a) {
      constexpr Activation kActivation = decltype(a)::value;
#pragma unroll
      for (int i = 0; i < kLanes<T>; i++) {
        if constexpr (kTwoSlopes<kActivation>) bits |= unsigned(has_slope_one(kActivation, z[i])) << i;
        z[i] = activate(kActivation, z[i], negative_slope);
      }
    });
  } else {
    const bool rectify = activation == Activation::kRelu;
#pragma unroll
    for (int i = 0; i < kLanes<T>; i++) {
      const bool off = z[i] <= 0;
      bits |= unsigned(!off) << i;
      if (rectify && off) z[i] = 0;
    }
  }
  return bits;
}

// Calls f with a value of the type.
template <class F>
auto with_type(DType type, F f) {
  switch (type) {
    case DType::kFloat64: return f(double());
    case DType::kFloat16: return f(__half());
    case DType::kBFloat16: return f(__nv_bfloat16());
    default: return f(float());
  }
}

// ---- Launches -------------------------------------------------------------------------------------------------------

// Whether this block is the one to write what belongs to number i of its group's channels.
__device__ __forceinline__ bool owns(const Tiles& t, const Place& at, int i) {
  const int64_t channel = at.group * t.group_channels + i;
  return at.part == 0 && channel < t.c;
}

// The most threads of a block, and how many blocks of so many must fit a multiprocessor: this is what keeps registers
// of all kernels within bounds, without any in local memory.
constexpr int kStreamedThreads = 192;
template <class T, bool kSeveral>
constexpr int kResidentThreads = kSeveral ? kSeveralThreads : (sizeof(T) == 4 ? 512 : 256);
template <class T, bool kSeveral, bool kGeneral>
constexpr int kResidentBlocks = kGeneral && kResidentThreads<T, kSeveral> == 512 ? 1 : 2;

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

// A kernel over the blocks of t, in clusters of `cluster`, with its arguments t and `number` at the end.
template <class Args>
cudaError_t launch_tiles(void (*kernel)(Args, Tiles, int), const Tiles& t, int cluster, size_t bytes,
                         cudaStream_t stream, const Args& args, int number) {
  if (t.groups > 0x7fffffff / t.parts) return cudaErrorInvalidConfiguration;
  const dim3 blocks(unsigned(t.groups * t.parts)), threads { unsigned(t.threads) };
  if (cluster == 1) return launch(kernel, blocks, threads, bytes, stream, args, t, number);
  return launch_cluster(kernel, blocks, threads, unsigned(cluster), bytes, stream, args, t, number);
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

template <class T>
Tiles make_groups(int64_t n, int64_t c, int64_t hw, bool channels_last, int misalignment, int width) {
  return make_groups<T>(n, c, hw, channels_last, std::max(misalignment, 0), misalignment < 0, width);
}

constexpr int kResidentWidth = 128, kStreamedWidth = 512;  // bytes of a group in a row

// The cut and the cluster with which a group stays on chip, or a cut without parts where it does not.  bytes(t) is the
// shared memory of a block, for `tensors` tensors of x's size and all else.  Clusters grow until two blocks fit a
// multiprocessor and there are blocks for all of them, or blocks are small.
template <class T, class Kernel, class Bytes>
Tiles resident_tiles(const Tiles& groups, int tensors, int max_threads, Kernel kernel, Bytes bytes) {
  constexpr size_t kGood = 112 << 10;
  constexpr int kSmall = 16 << 10;
  const size_t limit = groups.several ? std::min(kGood, shared_memory_limit()) : shared_memory_limit();
  const int sms = sm_count();
  Tiles best{};
  if (groups.copies > 1) return best;
  for (int cluster = 1; cluster <= 16; cluster *= 2) {
    if (cluster > 1 && compute_capability() < 90) break;
    Tiles t = split<T>(groups, cluster, max_threads);
    if (t.parts != cluster) break;
    t.tensors = tensors;
    const size_t need = bytes(t);
    if (need > limit) continue;
    if (cluster > 1) {
      // A cluster's multiprocessors must be neighbours: not where that leaves most of the chip idle.
      const int64_t active = active_clusters(kernel, dim3(unsigned(t.threads)), unsigned(cluster), need);
      if (active * cluster < std::min<int64_t>(t.groups * cluster, sms / 2 + 1)) break;
    }
    best = t;
    if (tensors * 16 * t.block_slots() <= kSmall || (need <= kGood && t.groups * cluster * 2 >= 3 * sms)) break;
  }
  // Better two launches than one block after the other on a part of the chip.
  if (best.parts == 1 && tensors * 16 * best.block_slots() > (64 << 10) && best.groups * 2 < sms) best.parts = 0;
  return best;
}

// The cuts of a first pass that leaves partial sums, with the blocks of a cluster that add theirs up, and of a second
// one that adds up what is left.
struct StreamedTiles {
  Tiles first, second;
  int cluster = 1;
  int partials() const { return first.parts / cluster; }
};

// Blocks of 64 to 128 KB, or smaller ones for the whole chip.  Where groups have several channels and partial sums are
// to be added up, which every block does for its group, there are fewer.
template <class T>
Tiles second_tiles(const Tiles& groups, bool sums) {
  const int64_t sms = sm_count(), slots = groups.runs * groups.group_length / kLanes<T> + 1;
  int64_t parts = std::max(slots / 4096, std::min(2 * sms / groups.groups, slots / 512)) + 1;
  parts = std::min(parts, (groups.several && sums ? 8 : 64) * sms / groups.groups + 1);
  if (!groups.several)
    parts = int64_t(1) << (63 - std::countl_zero(uint64_t(parts)));  // more often divides the samples
  return split<T>(groups, parts, kStreamedThreads);
}

template <class T, class Kernel, class Bytes>
StreamedTiles streamed_tiles(const Tiles& groups, Kernel first_kernel, Bytes first_bytes) {
  StreamedTiles s;
  const bool clusters = compute_capability() >= 90;
  const int64_t slots = groups.runs * groups.group_length / kLanes<T> + 1;
  const int64_t most = (!groups.several ? 8 : clusters ? 4 : 2) * int64_t(sm_count()) / groups.groups;
  const int64_t parts = std::max<int64_t>(1, std::min(slots / 1024 + 1, most));
  int cluster = parts >= 16 && clusters ? 8 : 1;
  s.first = split<T>(groups, (parts + cluster - 1) / cluster * cluster, kStreamedThreads);
  if (s.first.parts % cluster) cluster = 1;
  if (cluster > 1 &&
      !active_clusters(first_kernel, dim3(unsigned(s.first.threads)), unsigned(cluster), first_bytes(s.first)))
    cluster = 1;
  s.cluster = cluster;
  s.second = second_tiles<T>(groups, true);
  return s;
}

}  // namespace
}  // namespace fastnorm
