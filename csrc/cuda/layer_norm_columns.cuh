// How layer norm's kernels cut [outer, cols, inner] up where inner > 1: rows have a stride then.
//
// A tile is some pixels (a few slots of neighbouring elements of inner) of all cols.  Threads lie along the pixels
// first, so that a warp reads runs of up to 128 bytes, and along cols next; a thread keeps a sum for each lane.
#pragma once
#include "layer_norm.cuh"

namespace fastnorm {
namespace {

constexpr int kColumnThreads = 256;

struct ColumnTiles {
  int64_t outer, cols, inner;
  int64_t inner_slots, tiles;  // of an outer, of 16 bytes; of an outer
  int width, groups;           // slots of a tile; threads for each of them
  bool wide;                   // all slots are at 16-byte boundaries
  bool resident;               // a tile is kept in shared memory
};

// A thread's place in a tile.
template <class T>
struct ColumnPlace {
  static constexpr int V = kLanes<T>;
  int64_t outer, pixel, start, stride;  // pixel: of inner; start: in x, of column 0
  int group, slot;                      // of the tile
  unsigned valid;

  __device__ __forceinline__ ColumnPlace(const ColumnTiles& t, int64_t tile) : outer(tile / t.tiles), stride(t.inner) {
    group = int(threadIdx.x) / t.width, slot = int(threadIdx.x) - group * t.width;
    pixel = ((tile - outer * t.tiles) * t.width + slot) * V;
    start = outer * t.cols * t.inner + pixel;
    const int64_t left = t.inner - pixel;
    valid = left >= V ? kAllLanes<T> : left > 0 ? (1u << int(left)) - 1 : 0;
    if (!t.wide) valid |= 1u << V;  // so that it is not kAllLanes
  }
  __device__ __forceinline__ int64_t offset(int64_t col) const { return start + col * stride; }
  __device__ __forceinline__ bool in(int lane) const { return valid >> lane & 1; }
  __device__ __forceinline__ bool any() const { return valid & kAllLanes<T>; }
  __device__ __forceinline__ int64_t mask_byte(const ColumnTiles& t, int64_t col) const {
    return (outer * t.cols + col) * ((t.inner + 7) / 8) + pixel / 8;
  }
};

// v[...] = their sums over the threads of the same slot, in all of these; scratch holds V for each thread and slot.
template <class A, int V>
__device__ __forceinline__ void sum_groups(const ColumnTiles& t, A (&v)[V], void* scratch) {
  A* const values = static_cast<A*>(scratch);
  A* const totals = values + V * kColumnThreads;
  const int thread = int(threadIdx.x), slot = thread % t.width;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < V; i++) values[i * kColumnThreads + thread] = v[i];
  __syncthreads();
  if (thread < t.width * V) {
    const A* const from = values + thread / t.width * kColumnThreads + slot;
    A sum = 0;
    for (int group = 0; group < t.groups; group++) sum += from[group * t.width];
    totals[thread] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < V; i++) v[i] = totals[i * t.width + slot];
}
template <class A>
size_t group_scratch(int lanes) {
  return shared_bytes<A>(lanes * (kColumnThreads + 8));
}

// ---- On the host ----------------------------------------------------------------------------------------------------

// tensors: all that are laid out like x; of these `kept` in shared memory, beside `rest` bytes.
template <class T, class Args>
ColumnTiles column_tiles(const Args& a, std::initializer_list<const void*> tensors, int kept, size_t rest) {
  constexpr int V = kLanes<T>, kWidest = 8, kNarrowest = 4;
  ColumnTiles t{};
  t.outer = a.outer, t.cols = a.cols, t.inner = a.inner;
  t.inner_slots = (a.inner + 7) / 8 * (8 / V);
  t.wide = a.inner % V == 0 && common_misalignment(tensors, sizeof(T)) == 0;
  int widest = 8 / V;
  while (widest < kWidest && widest < t.inner_slots) widest *= 2;
  const size_t limit = shared_memory_limit(), column = size_t(kept) * size_t(a.cols) * sizeof(Vector<T>);
  auto fits = [&](int width, size_t most) { return column * size_t(width) + rest <= most; };
  t.width = widest;
  while (t.width > kNarrowest && !fits(t.width, limit / 3)) t.width /= 2;
  t.resident = fits(t.width, limit);
  if (!t.resident) t.width = widest;
  t.groups = kColumnThreads / t.width;
  t.tiles = (t.inner_slots + t.width - 1) / t.width;
  return t;
}

}  // namespace
}  // namespace fastnorm
