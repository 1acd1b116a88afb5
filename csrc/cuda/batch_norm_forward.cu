// Batch norm, forward.
//
//   mean, var of each channel over n and hw;  running = (1 - momentum) * running + momentum * batch
//   z = (x - mean) * rstd * weight + bias,  y = activation(z + residual)
//
// Plan and bytes moved (S = bytes of x, m = S / 32 or S / 16 for the mask, if it is wanted):
//
//   resident  one launch, 2S, + residual 3S + m.  A group of channels is copied to the shared memory of one block, or
//             of a cluster of 2 to 16 (sm_90).  There two exact passes take the moments, the second about the mean,
//             and a third writes y.  Where there is room the residual is copied at the same time.
//   streamed  two launches, 3S, + residual 4S + m.
//   eval      one launch, 2S, + residual 3S + m: the second kernel of these, with the running statistics.
//
// Size alone decides (resident_tiles): groups up to 227 KB (163 KB, 99 KB, 64 KB before sm_90 and in small chips) or,
// in clusters, 3.5 MB are resident; 1.7 MB where rows of several channels are cut in slices of 128 bytes, as larger
// ones leave a single block to a multiprocessor, whose loads nothing overlaps.
#include "batch_norm_forward_streamed.cuh"

namespace fastnorm {
namespace {

// ---- Resident -------------------------------------------------------------------------------------------------------

// A thread's sums come in two forms: in the accumulate type; and, for a thread where those overflowed (finite values
// near 1e19 and up), once more in double.  Lanes that are not valid hold zeros.

// to[...] = the sums of a thread's elements in shared memory.
template <class T, bool kSeveral>
__device__ __forceinline__ void sum_resident(const Vector<T>* data, int begin, int end, int step,
                                             double (&to)[kSums<T, kSeveral>]) {
  constexpr int V = kLanes<T>;
  Accumulate<T> sum[V] = {}, x[V];
#pragma unroll 4
  for (int k = begin; k < end; k += step) {
    widen(x, data[k]);
#pragma unroll
    for (int i = 0; i < V; i++) sum[i] += x[i];
  }
  if (collect<T, kSeveral>(to, sum) || !kOverflows<T>) return;
  set_zero(to);
#pragma unroll 1
  for (int k = begin; k < end; k += step) {
    widen(x, data[k]);
#pragma unroll
    for (int i = 0; i < V; i++) to[kSeveral ? i : 0] += double(x[i]);
  }
}

// The same of the distances from the mean, and of their squares; valid has the lanes of each slot, or is null.
template <class T, bool kSeveral>
__device__ __forceinline__ void square_resident(const Vector<T>* data, const uint8_t* valid, int begin, int end,
                                                int step, const Accumulate<T> (&mean)[kSums<T, kSeveral>],
                                                double (&to)[kSums<T, kSeveral>],
                                                double (&squares)[kSums<T, kSeveral>]) {
  constexpr int V = kLanes<T>;
  Accumulate<T> sum[V] = {}, square[V] = {}, x[V];
  auto read = [&](int k) {
    widen(x, data[k]);
    if (valid) fill_invalid<T, kSeveral>(x, valid[k], mean);
  };
#pragma unroll 4
  for (int k = begin; k < end; k += step) {
    read(k);
#pragma unroll
    for (int i = 0; i < V; i++) {
      const Accumulate<T> distance = x[i] - mean[kSeveral ? i : 0];
      sum[i] += distance;
      square[i] = fused(distance, distance, square[i]);
    }
  }
  collect<T, kSeveral>(to, sum);
  if (collect<T, kSeveral>(squares, square) || !kOverflows<T>) return;
  set_zero(to), set_zero(squares);
#pragma unroll 1
  for (int k = begin; k < end; k += step) {
    read(k);
#pragma unroll
    for (int i = 0; i < V; i++)
      add_distance(double(x[i]) - double(mean[kSeveral ? i : 0]), to[kSeveral ? i : 0], squares[kSeveral ? i : 0]);
  }
}

template <class T, bool kSeveral, bool kGeneral>
__global__ void __launch_bounds__(kResidentThreads<T, kSeveral>, kResidentBlocks<T, kSeveral, kGeneral>)
    batch_norm_forward_resident_kernel(BatchNormForward a, Tiles t, int cluster) {
  using A = Accumulate<T>;
  constexpr int V = kLanes<T>, P = kSums<T, kSeveral>, U = 2;
  FASTNORM_DYNAMIC_SHARED(unsigned char, memory);
  Shared shared{memory};
  const int g = t.group_channels;
  Vector<T>* data = shared.take<Vector<T>>(t.block_slots());
  Vector<T>* residuals = shared.take<Vector<T>>(t.tensors == 2 ? t.block_slots() : 0);
  double* scratch = shared.take<double>(sum_scratch<T>(t));
  double* mine = shared.take<double>(3 * g);
  double* total = shared.take<double>(3 * g);
  Affine<A>* affine = shared.take<Affine<A>>(g);
  uint8_t* bits = shared.take<uint8_t>(t.block_slots());

  const Place at = place(t);
  const int thread = int(threadIdx.x), end = thread < t.step ? at.segments * t.slots : 0;
  const T* x = static_cast<const T*>(a.x);
  const T* residual = static_cast<const T*>(a.residual);
  T* y = static_cast<T*>(a.y);
  const double count = double(a.n) * double(a.hw);

  auto copy = [&](const T* from, Vector<T>* to) {
    Walk<T> walk(t, at, thread);
    for (int k = thread; k < end; k += t.step, walk.advance()) {
      const Slot s = *walk;
      if (s.valid == kAllLanes<T>)
        __pipeline_memcpy_async(&to[k], from + s.offset, 16);
      else
        to[k] = load(from + s.offset, s.valid);
      if (t.partial) bits[k] = uint8_t(s.valid);
    }
    __pipeline_commit();
  };
  copy(x, data);
  if (t.tensors == 2)
    copy(residual, residuals);
  else
    __pipeline_commit();
  __pipeline_wait_prior(1);

  // The mean, and then both moments about it.
  A mean[P];
  double value[P], squares[P];
  {
    sum_resident<T, kSeveral>(data, thread, end, t.step, value);
    sum_channels<T, kSeveral>(t, value, scratch, mine);
    const double* sums = cluster_sum(mine, total, g, cluster);
    for (int i = thread; i < g; i += t.threads) affine[i].mean = A(sums[i] / count);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < P; i++) mean[i] = affine[channel_of_sum<T, kSeveral>(t, i)].mean;
  }
  {
    square_resident<T, kSeveral>(data, t.partial ? bits : nullptr, thread, end, t.step, mean, value, squares);
    sum_channels<T, kSeveral>(t, value, scratch, mine + g);
    sum_channels<T, kSeveral>(t, squares, scratch, mine + 2 * g);
    const double* sums = cluster_sum(mine + g, total + g, 2 * g, cluster);
    if (cluster > 1) cluster_arrive_relaxed();
    double factor = a.momentum;
    if (a.cumulative && a.num_batches_tracked) factor = 1 / double(*a.num_batches_tracked + 1);
    for (int i = thread; i < g; i += t.threads) {
      const Moments moments = moments_about(double(affine[i].mean), sums[i], sums[g + i], count);
      affine[i] = finish<A>(a, channel_number(t, at.group, i), moments, factor, owns(t, at, i));
    }
    if (blockIdx.x == 0 && thread == 0 && a.num_batches_tracked && !a.cumulative) ++*a.num_batches_tracked;
    __syncthreads();
  }

  Affine<A> map[P];
#pragma unroll
  for (int i = 0; i < P; i++) map[i] = affine[channel_of_sum<T, kSeveral>(t, i)];
  __pipeline_wait_prior(0);
  Walk<T> walk(t, at, thread);
  const A negative_slope = A(a.negative_slope);
  for (int k = thread; k < end; k += U * t.step) {
    Slot s[U];
    Vector<T> r[U];
#pragma unroll
    for (int u = 0; u < U; u++, walk.advance()) {
      s[u] = *walk;
      if (!residual || k + u * t.step >= end) continue;
      r[u] = t.tensors == 2 ? residuals[k + u * t.step] : load(residual + s[u].offset, s[u].valid);
    }
#pragma unroll
    for (int u = 0; u < U; u++) {
      const int slot = k + u * t.step;
      if (slot >= end) break;
      A z[V];
      widen(z, data[slot]);
#pragma unroll
      for (int i = 0; i < V; i++) z[i] = map[kSeveral ? i : 0](z[i]);
      if (residual) {
#pragma unroll
        for (int i = 0; i < V; i++) z[i] += widen(r[u].lane[i]);
      }
      const unsigned on = activate_lanes<T, kGeneral>(a.activation, z, negative_slope);
      store(y + s[u].offset, narrow<T>(z), s[u].valid);
      if (a.mask) bits[slot] = uint8_t(on);
    }
  }
  if (a.mask) {
    __syncthreads();
    write_mask<T>(t, at, 0, at.segments, bits, a.mask);
  }
  if (cluster > 1) cluster_wait();
}

template <class T>
size_t resident_bytes(const Tiles& t) {
  const int g = t.group_channels;
  return t.tensors * shared_bytes<Vector<T>>(t.block_slots()) + shared_bytes<double>(sum_scratch<T>(t)) +
         2 * shared_bytes<double>(3 * g) + shared_bytes<Affine<Accumulate<T>>>(g) +
         shared_bytes<uint8_t>(t.block_slots());
}

// ---- Launches -------------------------------------------------------------------------------------------------------

__global__ void batch_norm_count_kernel(int64_t* num_batches_tracked) { ++*num_batches_tracked; }

// Which kernels run, on what cuts.
template <class T>
struct ForwardPlan {
  const BatchNormForward& a;
  bool several;
  Tiles resident;  // without parts: streamed
  StreamedTiles streamed;

  template <bool kSeveral>
  auto resident_kernel() const {
    return is_simple(a.activation) ? batch_norm_forward_resident_kernel<T, kSeveral, false>
                                   : batch_norm_forward_resident_kernel<T, kSeveral, true>;
  }
  template <bool kSeveral>
  auto apply_kernel() const {
    return is_simple(a.activation) ? batch_norm_apply_kernel<T, kSeveral, false>
                                   : batch_norm_apply_kernel<T, kSeveral, true>;
  }
  auto resident_kernel() const { return several ? resident_kernel<true>() : resident_kernel<false>(); }
  auto apply_kernel() const { return several ? apply_kernel<true>() : apply_kernel<false>(); }
  auto statistics_kernel() const {
    return several ? batch_norm_statistics_kernel<T, true> : batch_norm_statistics_kernel<T, false>;
  }

  explicit ForwardPlan(const BatchNormForward& a) : a(a), resident() {
    const int misalignment = common_misalignment({a.x, a.residual, a.y}, sizeof(T));
    Tiles groups = make_groups<T>(a.n, a.c, a.hw, a.channels_last, misalignment, kResidentWidth);
    several = groups.several;
    // A residual is copied too where there is room for it, so that it is on its way while the sums are taken.
    for (int tensors = a.residual ? 2 : 1; a.training && !resident.parts && tensors > 0; tensors--)
      resident = resident_tiles<T>(groups, tensors, several ? kResidentThreads<T, true> : kResidentThreads<T, false>,
                                   resident_kernel(), resident_bytes<T>);
    if (resident.parts) return;
    groups = make_groups<T>(a.n, a.c, a.hw, a.channels_last, misalignment, kStreamedWidth);
    if (a.training)
      streamed = streamed_tiles<T>(groups, statistics_kernel(), statistics_bytes<T>);
    else
      streamed.second = second_tiles<T>(groups, false);
  }
  size_t workspace() const {
    return !a.training || resident.parts
               ? 0
               : size_t(streamed.partials()) * 2 * size_t(streamed.first.channels) * sizeof(double);
  }
  cudaError_t run(cudaStream_t stream) const {
    if (resident.parts) {
      const cudaError_t error = launch_tiles(resident_kernel(), resident, resident.parts, resident_bytes<T>(resident),
                                             stream, a, resident.parts);
      if (error != cudaSuccess || !a.cumulative || !a.num_batches_tracked) return error;
      return launch(batch_norm_count_kernel, dim3(1), dim3(1), 0, stream, a.num_batches_tracked);
    }
    const auto& [first, second, cluster] = streamed;
    if (a.training) {
      const cudaError_t error =
          launch_tiles(statistics_kernel(), first, cluster, statistics_bytes<T>(first), stream, a, cluster);
      if (error != cudaSuccess) return error;
    }
    return launch_tiles(apply_kernel(), second, 1, apply_bytes<T>(second, a.mask != nullptr), stream, a,
                        a.training ? streamed.partials() : 0);
  }
};

}  // namespace

namespace cuda {

size_t batch_norm_forward_workspace(const BatchNormForward& a) {
  return with_type(a.dtype, [&](auto type) { return ForwardPlan<decltype(type)>(a).workspace(); });
}

cudaError_t batch_norm_forward(const BatchNormForward& a, cudaStream_t stream) {
  return with_type(a.dtype, [&](auto type) { return ForwardPlan<decltype(type)>(a).run(stream); });
}

}  // namespace cuda
}  // namespace fastnorm
