// Batch norm, backward, in two kernels: for groups of channels that do not fit on chip; the second alone where no sums
// are wanted.
//
// Plan and bytes moved (S = bytes of x, m = S / 32 or S / 16 for the mask): 5S, + dresidual 6S + 2m.  The first kernel
// leaves partial sums as forward's does; the second adds them up in its prologue and takes blocks in reverse order.
#pragma once
#include "batch_norm_gradient.cuh"

namespace fastnorm {
namespace {

template <class T, bool kSeveral, bool kGeneral>
__global__ void __launch_bounds__(kStreamedThreads, kBlocksAtOnce<2>)
    batch_norm_reduce_kernel(BatchNormBackward a, Tiles t, int cluster) {
  using A = Accumulate<T>;
  constexpr int V = kLanes<T>, P = kSums<T, kSeveral>;
  FASTNORM_DYNAMIC_SHARED(unsigned char, memory);
  Shared shared{memory};
  const int g = t.group_channels, thread = int(threadIdx.x);
  double* scratch = shared.take<double>(sum_scratch<T>(t));
  double* mine = shared.take<double>(2 * g);
  double* total = shared.take<double>(2 * g);
  Affine<A>* affine = shared.take<Affine<A>>(g);
  const Place at = place(t);
  for (int i = thread; i < g; i += t.threads)
    affine[i] = finish<A>(a, channel_number(t, at.group, i), 0, 0, false).affine;
  __syncthreads();
  Affine<A> map[P];
#pragma unroll
  for (int i = 0; i < P; i++) map[i] = affine[channel_of_sum<T, kSeveral>(t, i)];
  A sum[V] = {}, product[V] = {};
  stream<T, kSeveral, kGeneral>(a, map, t, at, [&](const Slot&, const A(&distance)[V], const A(&dz)[V]) {
    accumulate<T>(distance, dz, sum, product);
  });
  double value[P];
  collect<T, kSeveral>(value, sum);
  sum_channels<T, kSeveral>(t, value, scratch, mine);
  collect<T, kSeveral>(value, product);
  sum_channels<T, kSeveral>(t, value, scratch, mine + g);
  const double* sums = cluster_sum(mine, total, 2 * g, cluster);
  if (at.part % cluster == 0)
    write_partials(t, static_cast<double*>(a.workspace), at.part / cluster, at.group, sums, sums + g);
  if (cluster > 1) {
    cluster_arrive_relaxed();
    cluster_wait();
  }
}

template <class T>
size_t reduce_bytes(const Tiles& t) {
  const int g = t.group_channels;
  return shared_bytes<double>(sum_scratch<T>(t)) + 2 * shared_bytes<double>(2 * g) +
         shared_bytes<Affine<Accumulate<T>>>(g);
}

// The sums of dz and dz * (x - mean) that the given means of dz and dz * normalized stand for.
template <class A>
__device__ __forceinline__ void sums_of_means(const BatchNormBackward& a, int64_t channel, double& sum,
                                              double& product) {
  const A* stats = static_cast<const A*>(a.stats);
  const double count = double(a.n) * double(a.hw), low = double(stats[a.c + channel]);
  sum = a.means[channel] * count;
  product = a.means[a.c + channel] * count / double(stats[2 * a.c + channel]) + low * sum;
}

// dx and dresidual, from the partial sums of `parts` or from given means; without either the sums are not needed.
template <class T, bool kSeveral, bool kGeneral>
__global__ void __launch_bounds__(kStreamedThreads, kBlocksAtOnce<2>)
    batch_norm_gradient_kernel(BatchNormBackward a, Tiles t, int parts) {
  using A = Accumulate<T>;
  constexpr int V = kLanes<T>, P = kSums<T, kSeveral>;
  FASTNORM_DYNAMIC_SHARED(unsigned char, memory);
  Shared shared{memory};
  const int g = t.group_channels, thread = int(threadIdx.x);
  double* scratch = shared.take<double>(partial_scratch(t));
  double* sums = shared.take<double>(2 * g);
  Gradient<A>* gradients = shared.take<Gradient<A>>(g);
  const Place at = place(t, true);
  if (parts) sum_partials(t, static_cast<const double*>(a.workspace), parts, at.group, scratch, sums, sums + g);
  for (int i = thread; i < g; i += t.threads) {
    const int64_t channel = channel_number(t, at.group, i);
    double sum = parts ? sums[i] : 0, product = parts ? sums[g + i] : 0;
    if (a.means) sums_of_means<A>(a, channel, sum, product);
    gradients[i] = finish<A>(a, channel, sum, product, parts && owns(t, at, i));
  }
  __syncthreads();
  if (!a.dx && !a.dresidual) return;
  Gradient<A> c[P];
  Affine<A> map[P];
#pragma unroll
  for (int i = 0; i < P; i++) c[i] = gradients[channel_of_sum<T, kSeveral>(t, i)], map[i] = c[i].affine;
  stream<T, kSeveral, kGeneral>(a, map, t, at, [&](const Slot& s, const A(&distance)[V], const A(&dz)[V]) {
    write_slot<T, kSeveral>(a, a.training, c, s, distance, dz);
  });
}

template <class T>
size_t gradient_bytes(const Tiles& t) {
  return shared_bytes<double>(partial_scratch(t)) + shared_bytes<double>(2 * t.group_channels) +
         shared_bytes<Gradient<Accumulate<T>>>(t.group_channels);
}

}  // namespace
}  // namespace fastnorm
