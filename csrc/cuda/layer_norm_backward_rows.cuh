// Layer norm, backward, of rows that follow each other in memory: the kernels.
#pragma once
#include "layer_norm_gradient.cuh"

namespace fastnorm {
namespace {

// ---- Resident -------------------------------------------------------------------------------------------------------

// Of a block, at most: 512 threads have 128 registers each, which is enough for float32 alone.
template <class T>
constexpr int kBackwardThreads = sizeof(T) == 4 ? 512 : 256;

// A thread's own share of the sums of dz * normalized and of dz per column, 16 bytes apart so that no banks conflict.
template <class T>
struct ColumnSums {
  using A = Accumulate<T>;
  static constexpr int V = kLanes<T>, W = kLanes<A>, kChunks = V / W;
  Vector<A>* data;
  int slots;

  __device__ __forceinline__ Vector<A>& at(int which, int chunk, int slot) const {
    return data[(which * kChunks + chunk) * slots + slot];
  }
  __device__ __forceinline__ void clear(int slot) const {
#pragma unroll
    for (int i = 0; i < 2 * kChunks; i++) at(0, i, slot) = zeros<A>();
  }
  __device__ __forceinline__ void add(int slot, const LayerSlot<T>& s) const {
#pragma unroll
    for (int chunk = 0; chunk < kChunks; chunk++) {
      Vector<A> weight = at(0, chunk, slot), bias = at(1, chunk, slot);
#pragma unroll
      for (int i = 0; i < W; i++) {
        weight.lane[i] = fused(s.dz[chunk * W + i], s.normalized[chunk * W + i], weight.lane[i]);
        bias.lane[i] += s.dz[chunk * W + i];
      }
      at(0, chunk, slot) = weight, at(1, chunk, slot) = bias;
    }
  }
  __device__ __forceinline__ A get(int which, int column) const {
    return at(which, column % V / W, column / V).lane[column % W];
  }
  __host__ __device__ static int64_t vectors(int64_t slots) { return 2 * kChunks * slots; }
};

// Copies a row's x and, `slots` further on, its dy; a thread the slots that it will read.
template <class T>
__device__ __forceinline__ void fetch_row(const LayerNormBackward& a, const RowPart<T, false>& part, const Team& team,
                                          Vector<T>* to) {
  const int slots = part.t.part_slots;
  with_constant(part.t.simple, [&](auto simple) {
#pragma unroll 2
    for (int i = team.lane; i < part.count; i += team.size) {
      const RowSlot s = part.template at<simple>(i);
      const T *const x = static_cast<const T*>(a.x) + s.offset, *const dy = static_cast<const T*>(a.dy) + s.offset;
      if (s.valid == kAllLanes<T>) {
        __pipeline_memcpy_async(&to[i], x, 16);
        __pipeline_memcpy_async(&to[slots + i], dy, 16);
      } else {
        to[i] = load(x, s.valid), to[slots + i] = load(dy, s.valid);
      }
    }
  });
  __pipeline_commit();
}

// A block's sums per column, from those of its teams, which follow each other.
template <class T>
__device__ __forceinline__ void write_columns(const LayerNormBackward& a, const Rows& t, Vector<Accumulate<T>>* sums) {
  using A = Accumulate<T>;
  A* const to = static_cast<A*>(a.workspace) + 2 * int64_t(blockIdx.x) * a.cols;
  for (int i = int(threadIdx.x); i < 2 * int(a.cols); i += t.threads) {
    const int which = i >= int(a.cols), column = i - which * int(a.cols);
    A sum = 0;
    for (int team = 0; team < t.teams(); team++)
      sum += ColumnSums<T>{sums + team * ColumnSums<T>::vectors(t.part_slots), t.part_slots}.get(which, column);
    to[i] = sum;
  }
}

// Each team takes every teams-th of its block's rows.  The next row's x and dy are on their way while one is worked on,
// if there is room (t.tensors is 4 then, else 2).
template <class T, bool kGeneral>
__global__ void __launch_bounds__(kBackwardThreads<T>, 1)
    layer_norm_backward_resident_kernel(LayerNormBackward a, Rows t, int64_t block_rows) {
  using A = Accumulate<T>;
  FASTNORM_DYNAMIC_SHARED(unsigned char, memory);
  Shared shared{memory};
  Team team(t, 1, shared);
  const int slots = t.part_slots, stages = t.tensors / 2, teams = t.teams();
  Vector<T>* const buffers =
      shared.take<Vector<T>>(int64_t(teams) * t.tensors * slots) + team.index * t.tensors * slots;
  Vector<A>* const all_sums = reinterpret_cast<Vector<A>*>(shared.at);
  const ColumnSums<T> columns{all_sums + team.index * ColumnSums<T>::vectors(slots), slots};
  const bool parameters = wants_parameters(a);
  const Needs needs(a);
  const A inverse = A(1 / double(a.cols));
  const int64_t first = int64_t(blockIdx.x) * block_rows, end = min(t.rows, first + block_rows);
  const int turns = int((end - first + teams - 1) / teams);

  auto part_of = [&](int turn) {
    const int64_t row = first + int64_t(turn) * teams + team.index;
    return RowPart<T, false>(t, row < end ? row : t.rows, 0);
  };
  auto stage = [&](int turn) { return buffers + turn % stages * 2 * slots; };

  if (parameters)
    for (int i = team.lane; i < slots; i += team.size) columns.clear(i);
  fetch_row(a, part_of(0), team, stage(0));
  for (int turn = 0; turn < turns; turn++) {
    const RowPart<T, false> part = part_of(turn);
    const RowStats<A> stats = read_layer_stats<A>(a, t.rows, min(part.row, t.rows - 1));
    const Normalize<A> normalize(stats);
    if (stages == 2) {
      fetch_row(a, part_of(turn + 1), team, stage(turn + 1));
      __pipeline_wait_prior(1);
    } else {
      __pipeline_wait_prior(0);
    }
    const Vector<T>*const x = stage(turn), *const dy = x + slots;
    A sums[2] = {0, 0};
    with_constant(t.simple, [&](auto simple) {
      for (int i = team.lane; i < part.count; i += team.size) {
        LayerSlot<T> slot;
        differentiate_row<T, kGeneral>(a, needs, part, part.template at<simple>(i), normalize, x[i], dy[i], slot);
        add_up<T>(slot, sums);
        if (parameters) columns.add(i, slot);
      }
    });
    if (a.dx || a.dresidual) {
      team.sum(sums);
      const A mean = a.rms ? A(0) : sums[0] * inverse, slope = sums[1] * inverse;
      with_constant(t.simple, [&](auto simple) {
        for (int i = team.lane; i < part.count; i += team.size) {
          const RowSlot s = part.template at<simple>(i);
          LayerSlot<T> slot;
          differentiate_row<T, kGeneral>(a, needs, part, s, normalize, x[i], dy[i], slot);
          write_gradients<T>(a, slot, s, stats.rstd, mean, slope);
        }
      });
    }
    if (stages == 1) fetch_row(a, part_of(turn + 1), team, stage(0));
  }
  if (!parameters) return;
  __pipeline_wait_prior(0);
  __syncthreads();
  write_columns<T>(a, t, all_sums);
}

template <class T>
size_t backward_resident_bytes(const Rows& t, bool parameters) {
  return Team::bytes() + shared_bytes<Vector<T>>(int64_t(t.teams()) * t.tensors * t.part_slots) +
         (parameters ? size_t(t.teams() * ColumnSums<T>::vectors(t.part_slots)) * 16 : 0);
}

// ---- Streamed -------------------------------------------------------------------------------------------------------

// A block's part of a row in the streamed kernels.
template <class T>
__device__ __forceinline__ RowPart<T, false> streamed_part(const Rows& t, unsigned block) {
  const int64_t row = block / unsigned(t.parts);
  return {t, row, int(block - unsigned(row) * unsigned(t.parts))};
}

// Calls f(slot of the row, what differentiate_row() gives) for each slot of a thread.
template <class T, bool kGeneral, class F>
__device__ __forceinline__ void stream_row(const LayerNormBackward& a, const RowPart<T, false>& part,
                                           const Normalize<Accumulate<T>>& normalize, F f) {
  const Needs needs(a);
  with_constant(part.t.simple, [&](auto simple) {
#pragma unroll 2
    for (int i = int(threadIdx.x); i < part.count; i += part.t.threads) {
      const RowSlot s = part.template at<simple>(i);
      const Vector<T> x = load(static_cast<const T*>(a.x) + s.offset, s.valid);
      const Vector<T> dy = load(static_cast<const T*>(a.dy) + s.offset, s.valid);
      LayerSlot<T> slot;
      differentiate_row<T, kGeneral>(a, needs, part, s, normalize, x, dy, slot);
      f(s, slot);
    }
  });
}

template <class T, bool kGeneral>
__global__ void __launch_bounds__(kRowThreads, kBlocksAtOnce<2>) layer_norm_reduce_kernel(LayerNormBackward a, Rows t) {
  using A = Accumulate<T>;
  FASTNORM_DYNAMIC_SHARED(unsigned char, memory);
  Shared shared{memory};
  Team team(t, 1, shared);
  const RowPart<T, false> part = streamed_part<T>(t, blockIdx.x);
  const Normalize<A> normalize(read_layer_stats<A>(a, t.rows, part.row));
  A sums[2] = {0, 0};
  stream_row<T, kGeneral>(a, part, normalize, [&](const RowSlot&, const LayerSlot<T>& slot) { add_up<T>(slot, sums); });
  double wide[2] = {double(sums[0]), double(sums[1])};
  team.sum(wide);
  if (!team.leads()) return;
  double* const to = static_cast<double*>(a.workspace) + 2 * int64_t(blockIdx.x);
  to[0] = wide[0], to[1] = wide[1];
}

template <class T, bool kGeneral>
__global__ void __launch_bounds__(kRowThreads, kBlocksAtOnce<2>)
    layer_norm_gradient_kernel(LayerNormBackward a, Rows t) {
  using A = Accumulate<T>;
  FASTNORM_SHARED(double, scratch, 64);
  const RowPart<T, false> part = streamed_part<T>(t, gridDim.x - 1 - blockIdx.x);
  const RowStats<A> stats = read_layer_stats<A>(a, t.rows, part.row);
  double sums[2];
  sum_partials(row_partials(a.workspace, t.parts), part.row, int(threadIdx.x), t.threads, scratch, sums);
  const A mean = a.rms ? A(0) : A(sums[0] / double(a.cols)), slope = A(sums[1] / double(a.cols));
  stream_row<T, kGeneral>(a, part, Normalize<A>(stats), [&](const RowSlot& s, const LayerSlot<T>& slot) {
    write_gradients<T>(a, slot, s, stats.rstd, mean, slope);
  });
}

// Partial sums of the parameters' gradients.  A block takes 32 slots of some rows, a warp every eighth of these.
constexpr int kColumnRows = 64;

template <class T, bool kGeneral>
__global__ void __launch_bounds__(kRowThreads, kBlocksAtOnce<2>)
    layer_norm_parameter_kernel(LayerNormBackward a, Rows t) {
  using A = Accumulate<T>;
  constexpr int V = kLanes<T>, kWarps = kRowThreads / 32;
  FASTNORM_SHARED(A, scratch, kWarps * 2 * V * 32);
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int64_t chunk = blockIdx.x / unsigned(t.parts);
  const int piece = int(blockIdx.x - unsigned(chunk) * unsigned(t.parts));
  const Needs needs(a);
  A weight[V] = {}, bias[V] = {};
  for (int64_t row = chunk * kColumnRows + warp; row < min(t.rows, (chunk + 1) * kColumnRows); row += kWarps) {
    const RowPart<T, false> part(t, row, piece);
    if (lane >= part.count) break;
    const RowSlot s = part[lane];
    const Normalize<A> normalize(read_layer_stats<A>(a, t.rows, row));
    const Vector<T> x = load(static_cast<const T*>(a.x) + s.offset, s.valid);
    const Vector<T> dy = load(static_cast<const T*>(a.dy) + s.offset, s.valid);
    LayerSlot<T> slot;
    differentiate_row<T, kGeneral>(a, needs, part, s, normalize, x, dy, slot);
#pragma unroll
    for (int i = 0; i < V; i++) {
      weight[i] = fused(slot.dz[i], slot.normalized[i], weight[i]);
      bias[i] += slot.dz[i];
    }
  }
#pragma unroll
  for (int i = 0; i < V; i++) {
    scratch[((warp * 2 + 0) * V + i) * 32 + lane] = weight[i];
    scratch[((warp * 2 + 1) * V + i) * 32 + lane] = bias[i];
  }
  __syncthreads();
  A* const to = static_cast<A*>(a.workspace) + 2 * chunk * a.cols;
  for (int i = int(threadIdx.x); i < 2 * V * 32; i += kRowThreads) {
    const int which = i / (V * 32), column = i - which * V * 32;
    const int64_t at = int64_t(piece) * 32 * V + column;
    if (at >= a.cols) continue;
    A sum = 0;
    for (int k = 0; k < kWarps; k++) sum += scratch[((k * 2 + which) * V + column % V) * 32 + column / V];
    to[which * a.cols + at] = sum;
  }
}

}  // namespace
}  // namespace fastnorm
