// Layer norm, forward, where rows have a stride (inner > 1): one launch, a block for each tile.
//
// Bytes moved (S = bytes of x): 2S where a tile stays in shared memory; else h is read again in each of two more
// passes, mostly from L2.
#pragma once
#include "layer_norm_columns.cuh"

namespace fastnorm {
namespace {

// The sums of a thread's distances from mean, and of their squares, per lane; value(col) gives a slot of h.
template <class T, class B, class Value>
__device__ __forceinline__ void square_columns(const ColumnTiles& t, const ColumnPlace<T>& at,
                                               const B (&mean)[kLanes<T>], Value value, B (&sum)[kLanes<T>],
                                               B (&square)[kLanes<T>]) {
#pragma unroll
  for (int i = 0; i < kLanes<T>; i++) sum[i] = square[i] = 0;
#pragma unroll(sizeof(B) == sizeof(Accumulate<T>) ? 2 : 1)
  for (int64_t col = at.group; col < t.cols; col += t.groups) {
    const Vector<T> h = value(col);
#pragma unroll
    for (int i = 0; i < kLanes<T>; i++) {
      const B distance = B(widen(h.lane[i])) - mean[i];
      sum[i] += distance;
      square[i] = fused(distance, distance, square[i]);
    }
  }
}

// The statistics of the pixels of a thread's lanes: exactly, in two passes; in double where these overflow.
template <class T, class Value>
__device__ void column_moments(const LayerNormForward& a, const ColumnTiles& t, const ColumnPlace<T>& at, void* scratch,
                               Value value, RowStats<Accumulate<T>> (&stats)[kLanes<T>]) {
  using A = Accumulate<T>;
  constexpr int V = kLanes<T>;
  const double inverse = 1 / double(t.cols);
  A mean[V] = {}, sum[V], square[V];
  if (!a.rms) {
    square_columns<T, A>(t, at, mean, value, sum, square);
    sum_groups(t, sum, scratch);
#pragma unroll
    for (int i = 0; i < V; i++) mean[i] = sum[i] * A(inverse);
    if constexpr (kOverflows<T>) {
      unsigned over = 0;
#pragma unroll
      for (int i = 0; i < V; i++) over |= unsigned(!finite(sum[i])) << i;
      if (__syncthreads_or(int(over))) {
        double none[V] = {}, wide[V], unused[V];
        square_columns<T, double>(t, at, none, value, wide, unused);
        sum_groups(t, wide, scratch);
#pragma unroll
        for (int i = 0; i < V; i++)
          if (over >> i & 1) mean[i] = A(wide[i] * inverse);
      }
    }
  }
  square_columns<T, A>(t, at, mean, value, sum, square);
  sum_groups(t, sum, scratch);
  sum_groups(t, square, scratch);
  unsigned over = 0;
#pragma unroll
  for (int i = 0; i < V; i++) {
    stats[i] = finish_row<A, A>(mean[i], sum[i], square[i], A(inverse), A(a.eps), !a.rms);
    over |= unsigned(!finite(sum[i]) || out_of_range(square[i], a.eps)) << i;
  }
  if constexpr (kOverflows<T>) {
    if (!__syncthreads_or(int(over))) return;
    double centre[V], wide[V], squares[V];
#pragma unroll
    for (int i = 0; i < V; i++) centre[i] = double(mean[i]);
    square_columns<T, double>(t, at, centre, value, wide, squares);
    sum_groups(t, wide, scratch);
    sum_groups(t, squares, scratch);
#pragma unroll
    for (int i = 0; i < V; i++)
      if (over >> i & 1) stats[i] = finish_row<A, double>(centre[i], wide[i], squares[i], inverse, a.eps, !a.rms);
  }
}

template <class T, bool kGeneral>
__global__ void __launch_bounds__(kColumnThreads, kBlocksAtOnce<2>)
    layer_norm_columns_forward_kernel(LayerNormForward a, ColumnTiles t) {
  using A = Accumulate<T>;
  constexpr int V = kLanes<T>;
  FASTNORM_DYNAMIC_SHARED(unsigned char, memory);
  Shared shared{memory};
  void* const scratch = shared.take<double>(V * (kColumnThreads + 8));
  const ColumnPlace<T> at(t, blockIdx.x);
  Vector<T>* const data = shared.take<Vector<T>>(0) + at.slot;
  const T* const input = static_cast<const T*>(a.addend ? a.sum : a.x);
  auto value = [&](int64_t col) { return t.resident ? data[col * t.width] : load(input + at.offset(col), at.valid); };

  if (t.resident || a.addend) {
#pragma unroll 4
    for (int64_t col = at.group; col < t.cols; col += t.groups) {
      Vector<T> h = load(static_cast<const T*>(a.x) + at.offset(col), at.valid);
      if (a.addend) {
        const Vector<T> addend = load(static_cast<const T*>(a.addend) + at.offset(col), at.valid);
#pragma unroll
        for (int i = 0; i < V; i++) h.lane[i] = narrow<T>(widen(h.lane[i]) + widen(addend.lane[i]));
        store(static_cast<T*>(a.sum) + at.offset(col), h, at.valid);
      }
      if (t.resident) data[col * t.width] = h;
    }
  }
  RowStats<A> stats[V];
  column_moments<T>(a, t, at, scratch, value, stats);
  if (at.group == 0) {
#pragma unroll
    for (int i = 0; i < V; i++)
      if (at.in(i)) write_layer_stats(a, t.outer * t.inner, at.outer * t.inner + at.pixel + i, stats[i]);
  }

  for (int64_t first = 0; first < t.cols; first += t.groups) {  // all of a warp together, for the mask
    const int64_t col = first + at.group;
    unsigned on = 0;
    if (col < t.cols) {
      const A weight = a.weight ? read_as<A>(a.weight, a.param_dtype, col) : A(1);
      const A bias = a.bias ? read_as<A>(a.bias, a.param_dtype, col) : A(0);
      A z[V];
      widen(z, value(col));
#pragma unroll
      for (int i = 0; i < V; i++) z[i] = fused(Normalize<A>(stats[i])(z[i]), weight, bias);
      if (a.residual) {
        const Vector<T> residual = load(static_cast<const T*>(a.residual) + at.offset(col), at.valid);
#pragma unroll
        for (int i = 0; i < V; i++) z[i] += widen(residual.lane[i]);
      }
      on = activate_lanes<T, kGeneral>(a.activation, z, A(a.negative_slope), a.mask) & at.valid & kAllLanes<T>;
      store(static_cast<T*>(a.y) + at.offset(col), narrow<T>(z), at.valid);
    }
    if (!a.mask) continue;
    constexpr int n = 8 / V;
    on <<= at.slot % n * V;
#pragma unroll
    for (int distance = 1; distance < n; distance *= 2) on |= __shfl_xor_sync(0xffffffffu, on, distance);
    if (at.slot % n == 0 && col < t.cols && at.any()) a.mask[at.mask_byte(t, col)] = uint8_t(on);
  }
}

template <class T>
struct ColumnForwardPlan {
  const LayerNormForward& a;
  ColumnTiles tiles;

  explicit ColumnForwardPlan(const LayerNormForward& a)
      : a(a), tiles(column_tiles<T>(a, {a.x, a.addend, a.residual, a.y, a.sum}, 1, scratch())) {}
  static size_t scratch() { return group_scratch<double>(kLanes<T>); }
  cudaError_t run(cudaStream_t stream) const {
    const size_t bytes = scratch() + (tiles.resident ? size_t(tiles.cols * tiles.width) * sizeof(Vector<T>) : 0);
    if (tiles.tiles > 0x7fffffff / tiles.outer) return cudaErrorInvalidConfiguration;
    return launch(is_simple(a.activation) ? layer_norm_columns_forward_kernel<T, false>
                                          : layer_norm_columns_forward_kernel<T, true>,
                  dim3(unsigned(tiles.outer * tiles.tiles)), dim3(kColumnThreads), bytes, stream, a, tiles);
  }
};

}  // namespace
}  // namespace fastnorm
