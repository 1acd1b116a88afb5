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
#include "tiles_resident.cuh"

namespace fastnorm {
namespace {

// ---- Resident -------------------------------------------------------------------------------------------------------

template <class T, bool kSeveral, bool kGeneral>
__global__ void __launch_bounds__(kResidentThreads<T, kSeveral>, kResidentBlocks<T, kSeveral, kGeneral>)
    batch_norm_forward_resident_kernel(BatchNormForward a, Tiles t, int cluster) {
  using A = Accumulate<T>;
  constexpr int P = kSums<T, kSeveral>;
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
  const double count = double(a.n) * double(a.hw);

  copy_tiles(t, at, static_cast<const T*>(a.x), data, bits);
  if (t.tensors == 2)
    copy_tiles(t, at, static_cast<const T*>(a.residual), residuals, bits);
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
  if (a.y) apply_resident<T, kSeveral, kGeneral>(a, t, at, map, data, residuals, bits);
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
    if (!a.y) streamed.second = split<T>(groups, 1, kStreamedThreads);
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
