// Filling the tiles that conv2d_products.cuh multiplies, from global memory.
//
// fetch() begins to load a tile, put() stores what it left in registers: between them the tile before is multiplied.
//   WeightRows         rows of a matrix, 16 bytes at a time, copied asynchronously
//   Gathered kCopies   the image's channels are neighbours, and the tile's k are channels: the same
//            kBlocks   the tile's rows are neighbours in the image: a thread loads as many k as there are values in 16
//                      bytes and transposes them in registers
//            kElements any image: value by value
#pragma once
#include "conv2d.cuh"
#include "conv2d_products.cuh"

namespace fastnorm {
namespace {

enum class Gather { kElements, kCopies, kBlocks };

// Which of a tile's 16-byte pieces are a thread's.
template <class Shape, int kRows>
struct Slots {
  static constexpr int kCount = kRows * kRowVectors / Shape::kThreads;
  static __device__ __forceinline__ int number(int i) { return int(threadIdx.x) + i * Shape::kThreads; }
  // Threads that are neighbours take the same k of neighbouring rows, or neighbouring k of the same row.
  static __device__ __forceinline__ int row(int i, bool along_rows) {
    return along_rows ? number(i) % kRows : number(i) / kRowVectors;
  }
  static __device__ __forceinline__ int piece(int i, bool along_rows) {
    return along_rows ? number(i) / kRows : number(i) % kRowVectors;
  }
};

template <class T>
__device__ __forceinline__ void copy_piece(T* to, const T* from, bool valid) {
  __pipeline_memcpy_async(to, from, 16, valid ? 0 : 16);
}

// Rows first .. first + kRows of the matrix [rows][length], whose length is a multiple of 16 bytes.
template <class T, class Shape, int kRows>
struct WeightRows {
  using S = Slots<Shape, kRows>;
  const T* matrix;
  int64_t first, rows, length;

  __device__ __forceinline__ void fetch(T* tile, int64_t k0) const {
#pragma unroll
    for (int i = 0; i < S::kCount; i++) {
      const int row = S::row(i, false), piece = S::piece(i, false);
      const int64_t k = k0 + piece * kLanes<T>;
      const bool valid = first + row < rows && k < length;
      copy_piece(tile + row * kRow<T> + piece * kLanes<T>, valid ? matrix + (first + row) * length + k : matrix, valid);
    }
  }
};

// The values where a row's and a column's places meet.
template <class T, class Shape, int kRows, Gather kGather>
struct Gathered {
  static constexpr int V = kLanes<T>;
  using S = Slots<Shape, kRows>;
  const T* image;
  unsigned height, width;
  bool along_rows;
  Place place[S::kCount];
  Vector<T> value[S::kCount];

  // place_of(row): of a row of the tile.
  template <class F>
  __device__ __forceinline__ Gathered(const T* image, unsigned height, unsigned width, bool along_rows, F place_of)
      : image(image), height(height), width(width), along_rows(kGather == Gather::kElements && along_rows) {
#pragma unroll
    for (int i = 0; i < S::kCount; i++) place[i] = place_of(S::row(i, this->along_rows));
  }

  __device__ __forceinline__ void fetch(T* tile, const Place* table) {
#pragma unroll
    for (int i = 0; i < S::kCount; i++) {
      const Place* const columns = table + S::piece(i, along_rows) * V;
      if constexpr (kGather == Gather::kCopies) {
        const bool valid = meets(place[i], *columns, height, width);
        copy_piece(at(tile, i), valid ? image + place[i].offset + columns->offset : image, valid);
      } else {
#pragma unroll
        for (int v = 0; v < V; v++) {
          const bool valid = meets(place[i], columns[v], height, width);
          value[i].lane[v] = valid ? image[place[i].offset + columns[v].offset] : narrow<T>(0);
        }
      }
    }
  }

  __device__ __forceinline__ void put(T* tile) const {
    if constexpr (kGather == Gather::kElements) {
#pragma unroll
      for (int i = 0; i < S::kCount; i++) *reinterpret_cast<Vector<T>*>(at(tile, i)) = value[i];
    }
  }

  __device__ __forceinline__ T* at(T* tile, int i) const {
    return tile + S::row(i, along_rows) * kRow<T> + S::piece(i, along_rows) * V;
  }
};

// kLast: the block's last threads do it, so that others do the other side.
template <class T, class Shape, int kRows, bool kLast>
struct GatheredBlocks {
  static constexpr int V = kLanes<T>, kCount = kRows / V * kRowVectors;
  static_assert(kCount <= Shape::kThreads);
  const T* image;
  unsigned height, width;
  int number;  // of this thread's block of V rows by V columns; none if it is negative
  Place place = no_pixel();
  Vector<T> value[V];

  template <class F>
  __device__ __forceinline__ GatheredBlocks(const T* image, unsigned height, unsigned width, bool, F place_of)
      : image(image), height(height), width(width) {
    number = int(threadIdx.x) - (kLast ? Shape::kThreads - kCount : 0);
    if (number >= kCount) number = -1;
    if (number >= 0) place = place_of(number / kRowVectors * V);
  }

  __device__ __forceinline__ void fetch(T*, const Place* table) {
    if (number < 0) return;
    const Place* const columns = table + number % kRowVectors * V;
#pragma unroll
    for (int v = 0; v < V; v++)
      value[v] = meets(place, columns[v], height, width) ? load(image + place.offset + columns[v].offset) : zeros<T>();
  }

  __device__ __forceinline__ void put(T* tile) const {
    if (number < 0) return;
    tile += number / kRowVectors * V * kRow<T> + number % kRowVectors * V;
#pragma unroll
    for (int row = 0; row < V; row++) {
      Vector<T> transposed;
#pragma unroll
      for (int v = 0; v < V; v++) transposed.lane[v] = value[v].lane[row];
      *reinterpret_cast<Vector<T>*>(tile + row * kRow<T>) = transposed;
    }
  }
};

template <class T, class Shape, int kRows, Gather kGather, bool kLast>
using Gatherer = std::conditional_t<kGather == Gather::kBlocks, GatheredBlocks<T, Shape, kRows, kLast>,
                                    Gathered<T, Shape, kRows, kGather>>;

// Tiles 0 .. tiles in turn, kStages of them in shared memory.  tabulate(tile) writes the places of its columns to table
// tile % 2, one tile before fetch(tile, stage) reads them.
template <int kStages, class Tabulate, class Fetch, class Put, class Multiply>
__device__ __forceinline__ void multiply_tiles(int tiles, Tabulate tabulate, Fetch fetch, Put put, Multiply multiply) {
  constexpr int kAhead = kStages - 1;
#pragma unroll
  for (int tile = 0; tile < kAhead; tile++) {
    if (tile < tiles) tabulate(tile);
    __syncthreads();
    if (tile < tiles) {
      fetch(tile, tile);
      put(tile);
    }
    __pipeline_commit();
  }
  if (kAhead < tiles) tabulate(kAhead);
  for (int tile = 0, stage = 0; tile < tiles; tile++) {
    __pipeline_wait_prior(kAhead - 1);
    __syncthreads();  // the tile is complete, and the one before it has been multiplied
    const int next = tile + kAhead, free = stage == 0 ? kStages - 1 : stage - 1;
    if (next + 1 < tiles) tabulate(next + 1);
    if (next < tiles) fetch(next, free);
    __pipeline_commit();
    multiply(stage);
    if (next < tiles) put(free);
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
}

}  // namespace
}  // namespace fastnorm
