// Layer norm, backward, where rows have a stride (inner > 1): one launch, and one for the parameters.
//
// Bytes moved (S = bytes of x): 3S where the tiles of x and dy stay in shared memory, else 5S.  A block takes a fixed
// range of tiles, one after the other, and adds up the parameters' gradients on the way, in shared memory or, where
// there are too many columns for that, in its part of the workspace.
#pragma once
#include "layer_norm_columns.cuh"
#include "layer_norm_gradient.cuh"

namespace fastnorm {
namespace {

// The statistics of the pixels of a thread's lanes.
template <class T>
struct ColumnStats {
  using A = Accumulate<T>;
  A mean[kLanes<T>], rstd[kLanes<T>], offset[kLanes<T>];

  __device__ __forceinline__ ColumnStats(const LayerNormBackward& a, const ColumnTiles& t, const ColumnPlace<T>& at) {
#pragma unroll
    for (int i = 0; i < kLanes<T>; i++) {
      const int64_t row = at.outer * t.inner + at.pixel + i;
      const Normalize<A> normalize(at.in(i) ? read_layer_stats<A>(a, t.outer * t.inner, row) : RowStats<A>{0, 0, 0, 0});
      mean[i] = normalize.mean, rstd[i] = normalize.rstd, offset[i] = normalize.offset;
    }
  }
  __device__ __forceinline__ A operator()(int lane, A h) const {
    return fused(h - mean[lane], rstd[lane], offset[lane]);
  }
};

template <class T, bool kGeneral>
__device__ __forceinline__ void differentiate_column(const LayerNormBackward& a, const ColumnTiles& t,
                                                     const ColumnPlace<T>& at, const ColumnStats<T>& stats, int64_t col,
                                                     const Vector<T>& x, const Vector<T>& dy, LayerSlot<T>& slot) {
  using A = Accumulate<T>;
  constexpr int V = kLanes<T>, n = 8 / V;
  const Needs needs(a);
  struct {
    A weight[V], bias[V];
  } lanes;
  const A weight = a.weight ? read_as<A>(a.weight, a.param_dtype, col) : A(1);
  const A bias = a.bias ? read_as<A>(a.bias, a.param_dtype, col) : A(0);
#pragma unroll
  for (int i = 0; i < V; i++) lanes.weight[i] = weight, lanes.bias[i] = bias;
  const Vector<T> residual =
      needs.residual ? load(static_cast<const T*>(a.residual) + at.offset(col), at.valid) : zeros<T>();
  const unsigned bits = needs.mask && at.any() ? unsigned(a.mask[at.mask_byte(t, col)]) >> (at.slot % n * V) : 0;
  differentiate_slot<T, kGeneral>(a, needs, stats, lanes, x, dy, residual, bits, at.valid, slot);
}

template <class T, bool kGeneral>
__global__ void __launch_bounds__(kColumnThreads, kBlocksAtOnce<(kGeneral && sizeof(T) == 8 ? 1 : 2)>)
    layer_norm_columns_backward_kernel(LayerNormBackward a, ColumnTiles t, int64_t block_tiles, bool sums_in_shared) {
  using A = Accumulate<T>;
  constexpr int V = kLanes<T>;
  FASTNORM_DYNAMIC_SHARED(unsigned char, memory);
  Shared shared{memory};
  void* const scratch = shared.take<A>(V * (kColumnThreads + 8));
  A* const partials = static_cast<A*>(a.workspace) + 2 * int64_t(blockIdx.x) * t.cols;
  const bool parameters = wants_parameters(a);
  A* const columns = sums_in_shared ? shared.take<A>(parameters ? 2 * t.cols : 0) : partials;
  Vector<T>* const tile_data = shared.take<Vector<T>>(0);
  const A inverse = A(1 / double(t.cols));
  if (parameters && int(threadIdx.x) % t.width == 0)
    for (int64_t col = int(threadIdx.x) / t.width; col < t.cols; col += t.groups)
      columns[col] = columns[t.cols + col] = 0;

  const int64_t end = min(t.outer * t.tiles, (int64_t(blockIdx.x) + 1) * block_tiles);
  for (int64_t tile = int64_t(blockIdx.x) * block_tiles; tile < end; tile++) {
    const ColumnPlace<T> at(t, tile);
    Vector<T>*const xs = tile_data + at.slot, *const dys = xs + t.cols * t.width;
    const ColumnStats<T> stats(a, t, at);
    A sum[V] = {}, slope[V] = {};
    for (int64_t first = 0; first < t.cols; first += t.groups) {  // all of a warp together, for the shuffles
      const int64_t col = first + at.group;
      A weight = 0, bias = 0;
      if (col < t.cols) {
        const Vector<T> x = load(static_cast<const T*>(a.x) + at.offset(col), at.valid);
        const Vector<T> dy = load(static_cast<const T*>(a.dy) + at.offset(col), at.valid);
        if (t.resident) xs[col * t.width] = x, dys[col * t.width] = dy;
        LayerSlot<T> slot;
        differentiate_column<T, kGeneral>(a, t, at, stats, col, x, dy, slot);
#pragma unroll
        for (int i = 0; i < V; i++) {
          sum[i] += slot.scaled[i];
          slope[i] = fused(slot.scaled[i], slot.normalized[i], slope[i]);
          weight = fused(slot.dz[i], slot.normalized[i], weight);
          bias += slot.dz[i];
        }
      }
      if (!parameters) continue;
      for (int distance = t.width / 2; distance > 0; distance /= 2) {
        weight += __shfl_xor_sync(0xffffffffu, weight, distance);
        bias += __shfl_xor_sync(0xffffffffu, bias, distance);
      }
      if (at.slot == 0 && col < t.cols) columns[col] += weight, columns[t.cols + col] += bias;
    }
    if (!a.dx && !a.dresidual) continue;
    sum_groups(t, sum, scratch);
    sum_groups(t, slope, scratch);
#pragma unroll
    for (int i = 0; i < V; i++) sum[i] = a.rms ? A(0) : sum[i] * inverse, slope[i] *= inverse;
#pragma unroll 2
    for (int64_t col = at.group; col < t.cols; col += t.groups) {
      const Vector<T> x = t.resident ? xs[col * t.width] : load(static_cast<const T*>(a.x) + at.offset(col), at.valid);
      const Vector<T> dy =
          t.resident ? dys[col * t.width] : load(static_cast<const T*>(a.dy) + at.offset(col), at.valid);
      LayerSlot<T> slot;
      differentiate_column<T, kGeneral>(a, t, at, stats, col, x, dy, slot);
      write_gradients<T>(a, slot, at.offset(col), at.valid, stats.rstd, sum, slope);
    }
  }
  if (!parameters || !sums_in_shared) return;
  __syncthreads();
  for (int64_t i = int(threadIdx.x); i < 2 * t.cols; i += kColumnThreads) partials[i] = columns[i];
}

template <class T>
struct ColumnBackwardPlan {
  using A = Accumulate<T>;
  const LayerNormBackward& a;
  bool parameters, sums_in_shared;
  ColumnTiles tiles;
  int64_t block_tiles, blocks;

  explicit ColumnBackwardPlan(const LayerNormBackward& a)
      : a(a), parameters(wants_parameters(a)), sums_in_shared(a.cols <= (32 << 10) / int(sizeof(A))) {
    tiles = column_tiles<T>(a, {a.dy, a.dsum, a.x, a.residual, a.dx, a.dresidual}, 2, rest());
    const int64_t all = tiles.outer * tiles.tiles, most = std::max<int64_t>(1, shared_memory_limit() / bytes());
    blocks = std::min(all, sm_count() * std::min<int64_t>(2, most));
    block_tiles = (all + blocks - 1) / blocks;
    blocks = (all + block_tiles - 1) / block_tiles;
  }
  size_t rest() const {
    return group_scratch<A>(kLanes<T>) + (sums_in_shared && parameters ? shared_bytes<A>(2 * a.cols) : 0);
  }
  size_t bytes() const {
    return rest() + (tiles.resident ? 2 * size_t(tiles.cols * tiles.width) * sizeof(Vector<T>) : 0);
  }
  size_t workspace() const { return parameters ? size_t(blocks) * 2 * size_t(a.cols) * sizeof(A) : 0; }
  template <bool kGeneral>
  cudaError_t run(cudaStream_t stream) const {
    const cudaError_t error = launch(layer_norm_columns_backward_kernel<T, kGeneral>, dim3(unsigned(blocks)),
                                     dim3(kColumnThreads), bytes(), stream, a, tiles, block_tiles, sums_in_shared);
    if (error != cudaSuccess || !parameters) return error;
    return launch_parameter_finish<A>(a, a.workspace, blocks, stream);
  }
};

}  // namespace
}  // namespace fastnorm
