// What batch norm's forward and backward kernels share: what a launch looks like.
#pragma once
#include <bit>

#include "batch_norm.h"
#include "norm.cuh"
#include "tiles_mask.cuh"
#include "tiles_sums.cuh"

namespace fastnorm {
namespace {

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
constexpr int kResidentBlocks = kBlocksAtOnce<(kGeneral && kResidentThreads<T, kSeveral> == 512 ? 1 : 2)>;

// A kernel over the blocks of t, in clusters of `cluster`, with its arguments t and `number` at the end.
template <class Args>
cudaError_t launch_tiles(void (*kernel)(Args, Tiles, int), const Tiles& t, int cluster, size_t bytes,
                         cudaStream_t stream, const Args& args, int number) {
  if (t.groups > 0x7fffffff / t.parts) return cudaErrorInvalidConfiguration;
  const dim3 blocks(unsigned(t.groups * t.parts)), threads { unsigned(t.threads) };
  if (cluster == 1) return launch(kernel, blocks, threads, bytes, stream, args, t, number);
  return launch_cluster(kernel, blocks, threads, unsigned(cluster), bytes, stream, args, t, number);
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
