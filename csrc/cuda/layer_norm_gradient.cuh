// What layer norm's backward kernels do with a slot, and with the partial sums of the parameters' gradients.
#pragma once
#include "layer_norm.cuh"

namespace fastnorm {
namespace {

// Of a slot: normalized, dz, and scaled = dz * weight.
template <class T>
struct LayerSlot {
  Accumulate<T> normalized[kLanes<T>], dz[kLanes<T>], scaled[kLanes<T>];
};

template <class T, bool kGeneral, class Normalized, class Lanes>
__device__ __forceinline__ void differentiate_slot(const LayerNormBackward& a, const Needs& needs,
                                                   const Normalized& normalize, const Lanes& l, const Vector<T>& x,
                                                   const Vector<T>& dy, const Vector<T>& residual, unsigned bits,
                                                   unsigned valid, LayerSlot<T>& to) {
  using A = Accumulate<T>;
  constexpr int V = kLanes<T>;
  A z[V];
#pragma unroll
  for (int i = 0; i < V; i++) to.normalized[i] = normalize(i, widen(x.lane[i])), to.dz[i] = widen(dy.lane[i]);
  if (needs.z) {
#pragma unroll
    for (int i = 0; i < V; i++) z[i] = fused(to.normalized[i], l.weight[i], l.bias[i]);
    if (needs.residual) {
#pragma unroll
      for (int i = 0; i < V; i++) z[i] += widen(residual.lane[i]);
    }
  }
  differentiate_lanes<T, kGeneral>(a.activation, needs.mask, bits, z, to.dz, A(a.negative_slope));
#pragma unroll
  for (int i = 0; i < V; i++) {
    if (!(valid >> i & 1)) to.normalized[i] = to.dz[i] = 0;
    to.scaled[i] = to.dz[i] * l.weight[i];
  }
}

// The same for a slot of a row in memory or in shared memory.
template <class T, bool kGeneral, class Part>
__device__ __forceinline__ void differentiate_row(const LayerNormBackward& a, const Needs& needs, const Part& part,
                                                  const RowSlot& s, const Normalize<Accumulate<T>>& normalize,
                                                  const Vector<T>& x, const Vector<T>& dy, LayerSlot<T>& to) {
  const auto lanes = LayerNormRows::Row<T>::lanes(a, s, part.t, needs.z);
  const Vector<T> residual = needs.residual ? load(static_cast<const T*>(a.residual) + s.offset, s.valid) : zeros<T>();
  const unsigned bits = needs.mask ? part.read_mask(a.mask, s) : 0;
  differentiate_slot<T, kGeneral>(
      a, needs, [&](int, Accumulate<T> h) { return normalize(h); }, lanes, x, dy, residual, bits, s.valid, to);
}

// Adds up scaled, and scaled * normalized.
template <class T>
__device__ __forceinline__ void add_up(const LayerSlot<T>& slot, Accumulate<T> (&sums)[2]) {
#pragma unroll
  for (int i = 0; i < kLanes<T>; i++) {
    sums[0] += slot.scaled[i];
    sums[1] = fused(slot.scaled[i], slot.normalized[i], sums[1]);
  }
}

// dx and dresidual of a slot; mean and slope are the means of scaled and of scaled * normalized.
template <class T>
__device__ __forceinline__ void write_gradients(const LayerNormBackward& a, const LayerSlot<T>& slot, int64_t offset,
                                                unsigned valid, const Accumulate<T> (&rstd)[kLanes<T>],
                                                const Accumulate<T> (&mean)[kLanes<T>],
                                                const Accumulate<T> (&slope)[kLanes<T>]) {
  using A = Accumulate<T>;
  if (a.dresidual) store(static_cast<T*>(a.dresidual) + offset, narrow<T>(slot.dz), valid);
  if (!a.dx) return;
  A dx[kLanes<T>];
#pragma unroll
  for (int i = 0; i < kLanes<T>; i++)
    dx[i] = product(rstd[i], fused(-slot.normalized[i], slope[i], slot.scaled[i] - mean[i]));
  if (a.dsum) {
    const Vector<T> dsum = load(static_cast<const T*>(a.dsum) + offset, valid);
#pragma unroll
    for (int i = 0; i < kLanes<T>; i++) dx[i] += widen(dsum.lane[i]);
  }
  store(static_cast<T*>(a.dx) + offset, narrow<T>(dx), valid);
}

// Rows have one of each for all lanes.
template <class T>
__device__ __forceinline__ void write_gradients(const LayerNormBackward& a, const LayerSlot<T>& slot, const RowSlot& s,
                                                Accumulate<T> rstd, Accumulate<T> mean, Accumulate<T> slope) {
  Accumulate<T> r[kLanes<T>], m[kLanes<T>], k[kLanes<T>];
#pragma unroll
  for (int i = 0; i < kLanes<T>; i++) r[i] = rstd, m[i] = mean, k[i] = slope;
  write_gradients<T>(a, slot, s.offset, s.valid, r, m, k);
}

// ---- The parameters' gradients --------------------------------------------------------------------------------------

__host__ __device__ inline bool wants_parameters(const LayerNormBackward& a) { return a.dweight || a.dbias; }

constexpr int kParameterColumns = 32, kParameterTeams = 32;

// dweight and dbias from A [parts][2][cols] partial sums, always added up in the same order; kWidth: of an access, 1.
template <class A, int kWidth>
__global__ void __launch_bounds__(kParameterColumns* kParameterTeams)
    layer_norm_parameter_finish_kernel(LayerNormBackward a, const A* __restrict__ partials, int64_t parts) {
  FASTNORM_SHARED(double, scratch, 2 * kParameterColumns * kParameterTeams);
  const int lane = int(threadIdx.x) % kParameterColumns, team = int(threadIdx.x) / kParameterColumns;
  const int64_t column = int64_t(blockIdx.x) * kParameterColumns + lane;
  double weight = 0, bias = 0;
  if (column < a.cols) {
#pragma unroll 8
    for (int64_t part = team; part < parts; part += kParameterTeams) {
      weight += double(partials[2 * part * a.cols + column]);
      bias += double(partials[(2 * part + 1) * a.cols + column]);
    }
  }
  scratch[threadIdx.x] = weight;
  scratch[kParameterColumns * kParameterTeams + int(threadIdx.x)] = bias;
  __syncthreads();
  if (team > 1 || column >= a.cols) return;
  void* const to = team == 0 ? a.dweight : a.dbias;
  if (!to) return;
  double sum = 0;
#pragma unroll 8
  for (int i = 0; i < kParameterTeams; i++) sum += scratch[(team * kParameterTeams + i) * kParameterColumns + lane];
  write(to, a.param_dtype, column, sum);
}

template <class A>
cudaError_t launch_parameter_finish(const LayerNormBackward& a, const void* partials, int64_t parts,
                                    cudaStream_t stream) {
  const int64_t blocks = (a.cols + kParameterColumns - 1) / kParameterColumns;
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  return launch(layer_norm_parameter_finish_kernel<A, 1>, dim3(unsigned(blocks)),
                dim3(kParameterColumns * kParameterTeams), 0, stream, a, static_cast<const A*>(partials), parts);
}

}  // namespace
}  // namespace fastnorm
