// Batch norm, backward.
//
//   dz = dy * activation'(z) = dresidual,  dbias = sum dz,  dweight = sum dz * (x - mean) * rstd
//   dx = (dz - dbias / count - (x - mean) * rstd * dweight / count) * rstd * weight;  in eval mode dz * rstd * weight
//
// Plan and bytes moved (S = bytes of x, m = S / 32 or S / 16 for the mask, if there is one):
//
//   resident  one launch, 3S, + dresidual 4S + m.  x and dy of a group of channels are copied to the shared memory of
//             one block, or of a cluster of 2 to 16 (sm_90); one pass takes the sums, a second writes dx and dresidual.
//   streamed  two launches, 5S, + dresidual 6S + 2m.
//   eval      where the parameters want no gradients one launch, 3S: the second kernel of these alone; so where the
//   means
//             of dz and dz * normalized are given.
//
// Size alone decides, as in forward, with two tensors instead of one.  Without a mask z is computed again from x, and
// the residual if there was one (S more for each pass), by the operations of forward.
#include "batch_norm_backward_streamed.cuh"

namespace fastnorm {
namespace {

// ---- Resident -------------------------------------------------------------------------------------------------------

template <class T, bool kSeveral, bool kGeneral>
__global__ void __launch_bounds__(kResidentThreads<T, kSeveral>, kResidentBlocks<T, kSeveral, kGeneral>)
    batch_norm_backward_resident_kernel(BatchNormBackward a, Tiles t, int cluster) {
  using A = Accumulate<T>;
  constexpr int V = kLanes<T>, P = kSums<T, kSeveral>;
  FASTNORM_DYNAMIC_SHARED(unsigned char, memory);
  Shared shared{memory};
  const int g = t.group_channels;
  Vector<T>* xs = shared.take<Vector<T>>(t.block_slots());
  Vector<T>* dys = shared.take<Vector<T>>(t.block_slots());
  double* scratch = shared.take<double>(sum_scratch<T>(t));
  double* mine = shared.take<double>(2 * g);
  double* total = shared.take<double>(2 * g);
  Gradient<A>* gradients = shared.take<Gradient<A>>(g);
  uint8_t* bits = shared.take<uint8_t>(t.block_slots());

  const Place at = place(t);
  const Needs needs(a);
  const int thread = int(threadIdx.x);
  copy_pair(a, t, at, needs, xs, dys, bits);
  for (int i = thread; i < g; i += t.threads) gradients[i] = finish<A>(a, channel_number(t, at.group, i), 0, 0, false);
  __syncthreads();
  Gradient<A> c[P];
  Affine<A> map[P];
#pragma unroll
  for (int i = 0; i < P; i++) map[i] = gradients[channel_of_sum<T, kSeveral>(t, i)].affine;
  __pipeline_wait_prior(0);

  A sum[V] = {}, product[V] = {};
  stream_resident<T, kSeveral, kGeneral>(
      a, map, t, at, xs, dys, bits,
      [&](const Slot&, const A(&distance)[V], const A(&dz)[V]) { accumulate<T>(distance, dz, sum, product); });
  double value[P];
  collect<T, kSeveral>(value, sum);
  sum_channels<T, kSeveral>(t, value, scratch, mine);
  collect<T, kSeveral>(value, product);
  sum_channels<T, kSeveral>(t, value, scratch, mine + g);
  const double* sums = cluster_sum(mine, total, 2 * g, cluster);
  if (cluster > 1) cluster_arrive_relaxed();
  for (int i = thread; i < g; i += t.threads)
    gradients[i] = finish<A>(a, channel_number(t, at.group, i), sums[i], sums[g + i], owns(t, at, i));
  __syncthreads();

  if (a.dx || a.dresidual) {
#pragma unroll
    for (int i = 0; i < P; i++) c[i] = gradients[channel_of_sum<T, kSeveral>(t, i)];
    stream_resident<T, kSeveral, kGeneral>(a, map, t, at, xs, dys, bits,
                                           [&](const Slot& s, const A(&distance)[V], const A(&dz)[V]) {
                                             write_slot<T, kSeveral>(a, a.training, c, s, distance, dz);
                                           });
  }
  if (cluster > 1) cluster_wait();
}

template <class T>
size_t resident_bytes(const Tiles& t) {
  const int g = t.group_channels;
  return 2 * shared_bytes<Vector<T>>(t.block_slots()) + shared_bytes<double>(sum_scratch<T>(t)) +
         2 * shared_bytes<double>(2 * g) + shared_bytes<Gradient<Accumulate<T>>>(g) +
         shared_bytes<uint8_t>(t.block_slots());
}

// ---- Launches -------------------------------------------------------------------------------------------------------

// Which kernels run, on what cuts.
template <class T>
struct BackwardPlan {
  const BatchNormBackward& a;
  bool several, sums;
  Tiles resident;  // without parts: streamed
  StreamedTiles streamed;

  template <bool kSeveral>
  auto resident_kernel() const {
    return is_simple(a.activation) ? batch_norm_backward_resident_kernel<T, kSeveral, false>
                                   : batch_norm_backward_resident_kernel<T, kSeveral, true>;
  }
  template <bool kSeveral>
  auto reduce_kernel() const {
    return is_simple(a.activation) ? batch_norm_reduce_kernel<T, kSeveral, false>
                                   : batch_norm_reduce_kernel<T, kSeveral, true>;
  }
  template <bool kSeveral>
  auto gradient_kernel() const {
    return is_simple(a.activation) ? batch_norm_gradient_kernel<T, kSeveral, false>
                                   : batch_norm_gradient_kernel<T, kSeveral, true>;
  }
  auto resident_kernel() const { return several ? resident_kernel<true>() : resident_kernel<false>(); }
  auto reduce_kernel() const { return several ? reduce_kernel<true>() : reduce_kernel<false>(); }
  auto gradient_kernel() const { return several ? gradient_kernel<true>() : gradient_kernel<false>(); }

  explicit BackwardPlan(const BatchNormBackward& a)
      : a(a), sums(!a.means && (a.dweight || a.dbias || (a.training && a.dx))), resident() {
    const int misalignment = common_misalignment({a.dy, a.x, a.residual, a.dx, a.dresidual}, sizeof(T));
    Tiles groups = make_groups<T>(a.n, a.c, a.hw, a.channels_last, misalignment, kResidentWidth);
    several = groups.several;
    if (sums)
      resident = resident_tiles<T>(groups, 2, several ? kResidentThreads<T, true> : kResidentThreads<T, false>,
                                   resident_kernel(), resident_bytes<T>);
    if (resident.parts) return;
    groups = make_groups<T>(a.n, a.c, a.hw, a.channels_last, misalignment, kStreamedWidth);
    if (sums)
      streamed = streamed_tiles<T>(groups, reduce_kernel(), reduce_bytes<T>);
    else
      streamed.second = second_tiles<T>(groups, false);
    if (!a.dx && !a.dresidual) streamed.second = split<T>(groups, 1, kStreamedThreads);
  }
  size_t workspace() const {
    return !sums || resident.parts ? 0
                                   : size_t(streamed.partials()) * 2 * size_t(streamed.first.channels) * sizeof(double);
  }
  cudaError_t run(cudaStream_t stream) const {
    if (!sums && !a.dx && !a.dresidual) return cudaSuccess;
    if (resident.parts)
      return launch_tiles(resident_kernel(), resident, resident.parts, resident_bytes<T>(resident), stream, a,
                          resident.parts);
    const auto& [first, second, cluster] = streamed;
    if (sums) {
      const cudaError_t error =
          launch_tiles(reduce_kernel(), first, cluster, reduce_bytes<T>(first), stream, a, cluster);
      if (error != cudaSuccess) return error;
    }
    return launch_tiles(gradient_kernel(), second, 1, gradient_bytes<T>(second), stream, a,
                        sums ? streamed.partials() : 0);
  }
};

}  // namespace

namespace cuda {

size_t batch_norm_backward_workspace(const BatchNormBackward& a) {
  return with_type(a.dtype, [&](auto type) { return BackwardPlan<decltype(type)>(a).workspace(); });
}

cudaError_t batch_norm_backward(const BatchNormBackward& a, cudaStream_t stream) {
  return with_type(a.dtype, [&](auto type) { return BackwardPlan<decltype(type)>(a).run(stream); });
}

}  // namespace cuda
}  // namespace fastnorm
