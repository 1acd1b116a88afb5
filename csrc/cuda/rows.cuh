// How kernels whose statistics are of rows cut x up, on the host and in kernels.
//
// A row is a number of planes of `length` elements, one after the other in memory.  Layer norm has one plane of cols
// elements; group norm one for each of a group's channels.  A plane is walked in slots of 16 bytes that begin where the
// plane does, not where memory is aligned, so that a row's sums do not depend on its place in memory.  Where planes do
// not all begin at 16-byte boundaries, elements are loaded and stored one by one.
//
// A plane has as many slots as fill whole bytes of the mask, so that the slots of a byte are neighbours in a warp.
#pragma once
#include <algorithm>
#include <type_traits>

#include "norm.cuh"
#include "reduce.cuh"

namespace fastnorm {
namespace {

constexpr int kRowThreads = 256;  // of a block, at most

// Slots that share a byte of the mask.
template <class T>
constexpr int kByteSlots = 8 / kLanes<T>;

struct Rows {
  int64_t rows, planes, length;
  int64_t plane_slots, slots;  // of a plane, of a row
  bool wide;                   // planes of all tensors begin at 16-byte boundaries
  bool wide_parameters;        // weight and bias do
  bool whole;                  // slots have all lanes
  bool simple;                 // all of these, and slots of a row can be counted in 31 bits
  unsigned divisor;            // slot / plane_slots = slot * divisor >> divisor_shift, where rows are simple
  int divisor_shift;
  int team;        // threads that share a row or a part of one: some of a warp, or all of a block
  int threads;     // of a block
  int parts;       // of a row: the blocks of a cluster, or blocks that leave partial sums
  int part_slots;  // the last part may have fewer
  int tensors;     // that are kept in shared memory

  __host__ __device__ int teams() const { return threads / team; }
  __host__ __device__ int64_t row_length() const { return planes * length; }
  __host__ __device__ int64_t plane_mask_bytes() const { return (length + 7) / 8; }
};

// ---- In kernels -----------------------------------------------------------------------------------------------------

// A slot: its first element in x, its plane in the row, its first element in the plane, and which of its lanes are in.
struct RowSlot {
  int64_t offset, plane, element;
  unsigned valid;
};

// A part of a row, whose slots are numbered from 0.
template <class T, bool kPlanes>
struct RowPart {
  const Rows& t;
  int64_t row, start;   // of the row in x
  int64_t plane, slot;  // where the part begins
  int64_t begin;        // its first element in x, where rows are simple
  int count;            // of slots; 0 where there is no such row

  __device__ __forceinline__ RowPart(const Rows& rows, int64_t r, int part)
      : t(rows), row(r), start(r * rows.row_length()), plane(0), slot(int64_t(part) * rows.part_slots) {
    begin = start + slot * kLanes<T>;
    count = r < t.rows ? int(max(int64_t(0), min(int64_t(t.part_slots), t.slots - slot))) : 0;
    if (kPlanes && slot >= t.plane_slots) plane = slot / t.plane_slots, slot -= plane * t.plane_slots;
  }
  __device__ __forceinline__ RowSlot operator[](int i) const {
    constexpr int V = kLanes<T>;
    int64_t p = plane, s = slot + i;
    if (kPlanes && s >= t.plane_slots) {
      const int64_t over = s >> 32 ? s / t.plane_slots : int64_t(unsigned(s) / unsigned(t.plane_slots));
      p += over, s -= over * t.plane_slots;
    }
    const int64_t element = s * V, left = i < count ? t.length - element : 0;
    unsigned valid = left >= V ? kAllLanes<T> : left > 0 ? (1u << int(left)) - 1 : 0;
    if (!t.wide) valid |= 1u << V;  // so that it is not kAllLanes
    return {start + p * t.length + element, p, element, valid};
  }
  // The same; kSimple: where rows are simple, for i below count.
  template <bool kSimple>
  __device__ __forceinline__ RowSlot at(int i) const {
    constexpr int V = kLanes<T>;
    if constexpr (!kSimple) {
      return (*this)[i];
    } else {
      unsigned s = unsigned(slot) + unsigned(i), p = 0;
      if constexpr (kPlanes) {
        p = unsigned(uint64_t(s) * t.divisor >> t.divisor_shift);
        s -= p * unsigned(t.plane_slots);
      }
      return {begin + int64_t(i) * V, plane + p, int64_t(s) * V, kAllLanes<T>};
    }
  }
  // Where the mask has this slot, and how far up in the byte.
  __device__ __forceinline__ int64_t mask_byte(const RowSlot& s) const {
    return (row * t.planes + s.plane) * t.plane_mask_bytes() + s.element / 8;
  }
  __device__ __forceinline__ unsigned read_mask(const uint8_t* mask, const RowSlot& s) const {
    return s.valid & kAllLanes<T> ? unsigned(mask[mask_byte(s)]) >> unsigned(s.element % 8) : 0;
  }
  // For all lanes of a warp together, whose slots follow each other.
  __device__ __forceinline__ void write_mask(uint8_t* mask, const RowSlot& s, unsigned bits) const {
    constexpr int V = kLanes<T>, n = kByteSlots<T>;
    const int place = int(threadIdx.x) % n;
    bits = (bits & s.valid & kAllLanes<T>) << (place * V);
#pragma unroll
    for (int distance = 1; distance < n; distance *= 2) bits |= __shfl_xor_sync(0xffffffffu, bits, distance);
    if (place == 0 && (s.valid & kAllLanes<T>)) mask[mask_byte(s)] = uint8_t(bits);
  }
};

// The threads that share a row: `size` neighbours in a warp, the block, or all blocks of a cluster.
struct Team {
  int size, lane, index;  // lane: this thread in the block's part of the team; index: of the team in the block
  int cluster, rank;
  double *scratch, *exchange;

  static constexpr int kScratch = 2 * 32, kExchange = 8;
  __device__ __forceinline__ Team(const Rows& t, int blocks, Shared& shared)
      : size(t.team), cluster(blocks), rank(blocks > 1 ? int(cluster_rank()) : 0) {
    index = int(threadIdx.x) / size;
    lane = int(threadIdx.x) - index * size;
    scratch = shared.take<double>(kScratch);
    exchange = shared.take<double>(kExchange);
  }
  __device__ __forceinline__ int64_t row(const Rows& t) const {
    return int64_t(blockIdx.x / unsigned(cluster)) * t.teams() + index;
  }
  __device__ __forceinline__ bool leads() const { return lane == 0 && rank == 0; }

  // v[...] = their sums over the team, the same bits in all its threads.  All threads of the block come here, those of
  // a cluster at most kExchange / n times.
  template <class A, int n>
  __device__ __forceinline__ void sum(A (&v)[n]) {
    for (int distance = min(size, 32) / 2; distance > 0; distance /= 2)
#pragma unroll
      for (int i = 0; i < n; i++) v[i] += __shfl_xor_sync(0xffffffffu, v[i], distance);
    if (size <= 32) return;
    A* const sums = reinterpret_cast<A*>(scratch);
    const int in_warp = lane % 32;
    __syncthreads();
    if (in_warp == 0)
#pragma unroll
      for (int i = 0; i < n; i++) sums[i * 32 + lane / 32] = v[i];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < n; i++) v[i] = warp_sum(in_warp < size / 32 ? sums[i * 32 + in_warp] : A(0));
    if (cluster == 1) return;
    A* const mine = reinterpret_cast<A*>(exchange);
    exchange += n;
    if (lane == 0)
#pragma unroll
      for (int i = 0; i < n; i++) mine[i] = v[i];
    cluster_sync();
#pragma unroll
    for (int i = 0; i < n; i++)
      v[i] = warp_sum(in_warp < cluster ? *cluster_shared(mine + i, unsigned(in_warp)) : A(0));
  }
  // A barrier of the team's threads in this block.
  __device__ __forceinline__ void sync() const {
    if (size > 32)
      __syncthreads();
    else
      __syncwarp();
  }
  // After the last sum, and before the kernel ends.
  __device__ __forceinline__ void arrive() const {
    if (cluster > 1) cluster_arrive_relaxed();
  }
  __device__ __forceinline__ void leave() const {
    if (cluster > 1) cluster_wait();
  }
  static size_t bytes() { return shared_bytes<double>(kScratch) + shared_bytes<double>(kExchange); }
};

// Calls f(place in the part's slots, place in x or -1 where there is no element), such that neighbouring threads have
// neighbouring elements: for planes whose slots are not aligned, as there each access would move one element of many
// slots.  Slots are then read by other threads than those that wrote them.
template <class T, class Part, class F>
__device__ __forceinline__ void for_elements(const Part& part, const Team& team, F f) {
  const Rows& t = part.t;
  const int64_t padded = t.plane_slots * kLanes<T>;
  const int64_t planes = team.size / padded, rest = team.size - planes * padded;
  int64_t element = part.slot * kLanes<T> + team.lane, plane = part.plane + element / padded;
  element %= padded;
#pragma unroll 4
  for (int i = team.lane; i < part.count * kLanes<T>; i += team.size) {
    f(i, element < t.length ? part.start + plane * t.length + element : int64_t(-1));
    plane += planes, element += rest;
    if (element >= padded) element -= padded, plane++;
  }
}

// A tensor's part of a row to slots in shared memory, and back.
template <class T, class Part>
__device__ __forceinline__ void gather_elements(const Part& part, const Team& team, const void* from, Vector<T>* to) {
  T* const elements = reinterpret_cast<T*>(to);
  for_elements<T>(part, team,
                  [&](int i, int64_t at) { elements[i] = at >= 0 ? static_cast<const T*>(from)[at] : narrow<T>(0); });
}
template <class T, class Part>
__device__ __forceinline__ void scatter_elements(const Part& part, const Team& team, const Vector<T>* from, void* to) {
  const T* const elements = reinterpret_cast<const T*>(from);
  for_elements<T>(part, team, [&](int i, int64_t at) {
    if (at >= 0) static_cast<T*>(to)[at] = elements[i];
  });
}

// Copies a team's part of a row to shared memory: where slots are aligned, a thread those that it will read; else all
// wait for each other before they do.
template <class T, class Part>
__device__ __forceinline__ void copy_slots(const Part& part, const Team& team, const T* from, Vector<T>* to) {
  if (!part.t.wide) {
    gather_elements(part, team, from, to);
  } else if (part.t.simple) {
#pragma unroll 4
    for (int i = team.lane; i < part.count; i += team.size)
      __pipeline_memcpy_async(&to[i], from + part.begin + int64_t(i) * kLanes<T>, 16);
  } else {
#pragma unroll 2
    for (int i = team.lane; i < part.count; i += team.size) {
      const RowSlot s = part[i];
      if (s.valid == kAllLanes<T>)
        __pipeline_memcpy_async(&to[i], from + s.offset, 16);
      else
        to[i] = load(from + s.offset, s.valid);
    }
  }
  __pipeline_commit();
}

// A weight or bias for each lane of a slot.
template <class T>
__device__ __forceinline__ void read_lanes(Accumulate<T> (&to)[kLanes<T>], const void* p, DType type, int64_t element,
                                           unsigned valid, bool wide, Accumulate<T> otherwise) {
  constexpr int V = kLanes<T>;
  if (!p) {
#pragma unroll
    for (int i = 0; i < V; i++) to[i] = otherwise;
    return;
  }
  if constexpr (sizeof(T) == 2) {
    if (type == DType::kFloat32) {
      const float* const from = static_cast<const float*>(p) + element;
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const unsigned lanes = valid >> (4 * half) & kAllLanes<float>;
        const Vector<float> v = load(from + 4 * half, wide && lanes == kAllLanes<float> ? lanes : lanes | 16);
#pragma unroll
        for (int i = 0; i < 4; i++) to[4 * half + i] = v.lane[i];
      }
      return;
    }
  }
  widen(to, load(static_cast<const T*>(p) + element, wide ? valid : valid | 1u << V));
}

// ---- On the host ----------------------------------------------------------------------------------------------------

constexpr int kGoodRowBytes = 72 << 10;  // of shared memory: three blocks fit a multiprocessor of 227 KB

// tensors: all that are laid out like x.  Nothing that decides on the order of a sum depends on the number of rows.
template <class T>
Rows make_rows(int64_t rows, int64_t planes, int64_t length, std::initializer_list<const void*> tensors,
               std::initializer_list<const void*> parameters) {
  constexpr int V = kLanes<T>;
  Rows t{};
  t.rows = rows, t.planes = planes, t.length = length;
  t.plane_slots = (length + 7) / 8 * kByteSlots<T>;
  t.slots = planes * t.plane_slots;
  t.whole = length % 8 == 0;
  t.wide = length % V == 0 && common_misalignment(tensors, sizeof(T)) == 0;
  t.wide_parameters = common_misalignment(parameters, 1) <= 0 && length % V == 0;
  t.simple = t.wide && t.whole && t.slots < int64_t(1) << 31;
  if (t.simple) {  // the shift is 31 + ceil(log2(plane_slots)): exact for slots of 31 bits
    while (int64_t(1) << t.divisor_shift < t.plane_slots) t.divisor_shift++;
    t.divisor_shift += 31;
    t.divisor = unsigned(((uint64_t(1) << t.divisor_shift) + uint64_t(t.plane_slots) - 1) / uint64_t(t.plane_slots));
  }
  t.parts = t.tensors = 1;
  return t;
}

// A row to some lanes of a warp, where it has few slots, or to a block of threads that take `each` or more.
template <class T>
void set_team(Rows& t, int max_threads, int most_of_warp = 256, int each = 8) {
  if (t.slots <= most_of_warp) {
    t.team = kByteSlots<T>;
    while (t.team < 32 && t.team * 4 < t.slots) t.team *= 2;
    t.threads = 128;
  } else {
    t.threads = 64;
    while (t.threads < max_threads && t.threads * each < t.slots) t.threads *= 2;
    t.team = t.threads;
  }
  t.part_slots = int(t.slots);
}

// Rows that stay in shared memory: parts is 0 where they do not.  bytes(t) is the shared memory of a block.
template <class T, class Kernel, class Bytes>
Rows resident_rows(Rows t, int max_threads, Kernel kernel, Bytes bytes) {
  const size_t limit = shared_memory_limit(), good = std::min<size_t>(kGoodRowBytes, limit);
  Rows best = t;
  best.parts = 0;
  if (t.slots > (int64_t(1) << 24)) return best;
  set_team<T>(t, max_threads);
  if (bytes(t) <= good || t.team <= 32) {
    best = t;
    return best;
  }
  for (int cluster = 1; cluster <= 16; cluster *= 2) {
    t.parts = cluster;
    t.part_slots = int((t.slots + cluster - 1) / cluster + 3) / 4 * 4;
    if (bytes(t) > limit) continue;
    if (cluster > 1 && !active_clusters(kernel, dim3(unsigned(t.threads)), unsigned(cluster), bytes(t))) break;
    best = t;
    if (bytes(t) <= good) break;
  }
  return best;
}

// Rows in parts that leave partial sums.
template <class T>
Rows streamed_rows(Rows t) {
  t.team = t.threads = kRowThreads;
  t.part_slots = int(std::min<int64_t>(2048, (t.slots + kRowThreads - 1) / kRowThreads * kRowThreads));
  while (t.part_slots < (1 << 20) && t.slots / t.part_slots > 1024) t.part_slots *= 2;
  t.parts = int((t.slots + t.part_slots - 1) / t.part_slots);
  return t;
}

// A kernel with a row for each team of each block or cluster.
template <class Args, class... More>
cudaError_t launch_resident(void (*kernel)(Args, Rows, More...), const Rows& t, size_t bytes, cudaStream_t stream,
                            const std::type_identity_t<Args>& args, std::type_identity_t<More>... more) {
  const int64_t blocks = (t.rows + t.teams() - 1) / t.teams() * t.parts;
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  const dim3 grid{unsigned(blocks)}, threads{unsigned(t.threads)};
  if (t.parts == 1) return launch(kernel, grid, threads, bytes, stream, args, t, more...);
  return launch_cluster(kernel, grid, threads, unsigned(t.parts), bytes, stream, args, t, more...);
}

// A kernel with a block for each part of each row.
template <class Args, class... More>
cudaError_t launch_parts(void (*kernel)(Args, Rows, More...), const Rows& t, size_t bytes, cudaStream_t stream,
                         const std::type_identity_t<Args>& args, std::type_identity_t<More>... more) {
  if (t.rows > 0x7fffffff / t.parts) return cudaErrorInvalidConfiguration;
  return launch(kernel, dim3(unsigned(t.rows * t.parts)), dim3(unsigned(t.threads)), bytes, stream, args, t, more...);
}

}  // namespace
}  // namespace fastnorm
