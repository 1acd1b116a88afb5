// Products of two tiles in shared memory, c[m][n] += sum over k of a[m][k] * b[n][k], by the threads of a block.
//
// Tiles are rows of 64 bytes of k, kRowBytes apart, so that 8 neighbouring rows are in different banks.  Two types have
// the same interface: ScalarProducts, exact fused multiply-adds for every type, and TensorProducts, the tensor cores'
// m16n8 for 16-bit types and for float32 rounded to tf32.
#pragma once
#include "mma.cuh"
#include "vector.cuh"

namespace fastnorm {
namespace {

constexpr int kRowBytes = 64 + 16;
template <class T>
constexpr int kRow = kRowBytes / int(sizeof(T));
template <class T>
constexpr int kDepth = 64 / int(sizeof(T));  // values of k in a tile
constexpr int kRowVectors = 4;

// A block's part of the result.
template <int m, int n>
struct TileShape {
  static constexpr int kM = m, kN = n, kThreads = m * n / (m * n >= 128 * 128 ? 64 : 32), kWarps = kThreads / 32;
};
using LargeTile = TileShape<128, 128>;  // 256 threads
using SmallTile = TileShape<64, 64>;    // 128 threads

// Each thread has the rows m + i * kThreadsM and n + j * kThreadsN; a warp 4 by 8 neighbours, so that what its threads
// read at a time is from 4 and from 8 rows.
template <class T, class Shape>
struct ScalarProducts {
  using A = Accumulate<T>;
  static constexpr int kThreadsN = 16, kThreadsM = Shape::kThreads / kThreadsN;
  static constexpr int kSumsM = Shape::kM / kThreadsM, kSumsN = Shape::kN / kThreadsN;
  static constexpr int kPiece = sizeof(T) == 4 ? 4 : 2;
  struct alignas(sizeof(T) * kPiece) Piece {
    T lane[kPiece];
  };
  A sum[kSumsM][kSumsN] = {};

  static __device__ __forceinline__ int first_m() { return threadIdx.x % 32 / 8 + threadIdx.x / 64 * 4; }
  static __device__ __forceinline__ int first_n() { return threadIdx.x % 8 + threadIdx.x / 32 % 2 * 8; }

  __device__ __forceinline__ void multiply(const T* a, const T* b) {
    a += first_m() * kRow<T>;
    b += first_n() * kRow<T>;
#pragma unroll 1  // it has instructions enough; unrolled, it would have too many registers
    for (int k = 0; k < kDepth<T>; k += kPiece) {
      A left[kSumsM][kPiece];
#pragma unroll
      for (int i = 0; i < kSumsM; i++) {
        const Piece piece = *reinterpret_cast<const Piece*>(a + i * kThreadsM * kRow<T> + k);
#pragma unroll
        for (int v = 0; v < kPiece; v++) left[i][v] = widen(piece.lane[v]);
      }
#pragma unroll
      for (int j = 0; j < kSumsN; j++) {
        const Piece piece = *reinterpret_cast<const Piece*>(b + j * kThreadsN * kRow<T> + k);
#pragma unroll
        for (int v = 0; v < kPiece; v++) {
          const A right = widen(piece.lane[v]);
#pragma unroll
          for (int i = 0; i < kSumsM; i++) sum[i][j] = fused(left[i][v], right, sum[i][j]);
        }
      }
    }
  }

  // Calls f(m, n, c[m][n]) for this thread's part.
  template <class F>
  __device__ __forceinline__ void each(F f) const {
#pragma unroll
    for (int i = 0; i < kSumsM; i++)
#pragma unroll
      for (int j = 0; j < kSumsN; j++) f(first_m() + i * kThreadsM, first_n() + j * kThreadsN, sum[i][j]);
  }
};

// Each warp has a part of kM / 2 by 32.
template <class T, class Shape>
struct TensorProducts {
  static constexpr int kWarpM = Shape::kM / 2, kWarpsN = Shape::kN / 32;
  static_assert(kWarpsN * 2 == Shape::kWarps);
  static constexpr int kSumsM = kWarpM / 16, kSumsN = 4;
  float sum[kSumsM][kSumsN][4] = {};

  static __device__ __forceinline__ int first_m() { return threadIdx.x / 32 / kWarpsN * kWarpM; }
  static __device__ __forceinline__ int first_n() { return threadIdx.x / 32 % kWarpsN * 32; }

  __device__ __forceinline__ void multiply(const T* a, const T* b) {
    const int lane = threadIdx.x % 32;
    a += (first_m() + lane % 16) * kRow<T> + lane / 16 * kLanes<T>;
    b += (first_n() + lane % 8 + lane / 16 * 8) * kRow<T> + lane / 8 % 2 * kLanes<T>;
#pragma unroll
    for (int k = 0; k < kDepth<T>; k += 2 * kLanes<T>) {
      uint32_t left[kSumsM][4], right[kSumsN / 2][4];
#pragma unroll
      for (int i = 0; i < kSumsM; i++) load_matrices(left[i], a + i * 16 * kRow<T> + k);
#pragma unroll
      for (int j = 0; j < kSumsN / 2; j++) load_matrices(right[j], b + j * 16 * kRow<T> + k);
      if constexpr (sizeof(T) == 4) {
        round_to_tf32(left);
        round_to_tf32(right);
      }
#pragma unroll
      for (int i = 0; i < kSumsM; i++)
#pragma unroll
        for (int j = 0; j < kSumsN; j++)
          multiply_add<T>(sum[i][j], left[i], right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]);
    }
  }

  template <int n>
  static __device__ __forceinline__ void round_to_tf32(uint32_t (&words)[n][4]) {
#pragma unroll
    for (int i = 0; i < n; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) words[i][j] = tf32(words[i][j]);
  }

  template <class F>
  __device__ __forceinline__ void each(F f) const {
    const int m = first_m() + threadIdx.x % 32 / 4, n = first_n() + threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < kSumsM; i++)
#pragma unroll
      for (int j = 0; j < kSumsN; j++)
#pragma unroll
        for (int v = 0; v < 4; v++) f(m + i * 16 + v / 2 * 8, n + j * 8 + v % 2, sum[i][j][v]);
  }
};

// kTensor: on tensor cores where the architecture that this is compiled for has them for the type.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
template <class T, class Shape, bool kTensor>
using Products = ScalarProducts<T, Shape>;
#else
template <class T, class Shape, bool kTensor>
using Products = std::conditional_t<kTensor, TensorProducts<T, Shape>, ScalarProducts<T, Shape> >;
#endif

}  // namespace
}  // namespace fastnorm
