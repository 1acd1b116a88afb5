// Group norm of [n][hw][c], backward: the kernels.
#pragma once
#include "group_norm_channels_last.cuh"
#include "group_norm_gradient.cuh"
#include "tiles_gradient.cuh"

namespace fastnorm {
namespace {

template <class T, bool kGeneral>
__global__ void __launch_bounds__(kTileThreads, kBlocksAtOnce<2>)
    group_norm_tiles_reduce_kernel(GroupNormBackward all, Tiles t, double* partials) {
  using A = Accumulate<T>;
  constexpr int V = kLanes<T>;
  FASTNORM_DYNAMIC_SHARED(unsigned char, memory);
  Shared shared{memory};
  const int g = t.group_channels;
  double* const scratch = shared.take<double>(sum_scratch<T>(t));
  double* const sums = shared.take<double>(2 * g);
  const auto [sample, at] = SamplePlace(t);
  const GroupNormBackward a = sample_arguments<T>(all, sample);
  Affine<A> map[V];
  read_affine<T>(a, t, sample, at, shared.take<Affine<A>>(g), map);
  A sum[V] = {}, product[V] = {};
  stream<T, true, kGeneral>(a, map, t, at, [&](const Slot&, const A(&distance)[V], const A(&dz)[V]) {
    accumulate<T>(distance, dz, sum, product);
  });
  double value[V];
  collect<T, true>(value, sum);
  sum_channels<T, true>(t, value, scratch, sums);
  collect<T, true>(value, product);
  sum_channels<T, true>(t, value, scratch, sums + g);
  __syncthreads();
  write_partials(t, sample_partials(t, partials, sample), at.part, at.group, sums, sums + g);
}

template <class T, bool kGeneral>
__global__ void __launch_bounds__(kTileThreads, kBlocksAtOnce<(kGeneral && sizeof(T) == 2 ? 1 : 2)>)
    group_norm_tiles_gradient_kernel(GroupNormBackward all, Tiles t, const void* groups) {
  using A = Accumulate<T>;
  constexpr int V = kLanes<T>;
  FASTNORM_DYNAMIC_SHARED(unsigned char, memory);
  Shared shared{memory};
  Gradient<A>* const gradients = shared.take<Gradient<A>>(t.group_channels);
  const auto [sample, at] = SamplePlace(t, true);  // what was read last is in L2 still
  const GroupNormBackward a = sample_arguments<T>(all, sample);
  for (int i = int(threadIdx.x); i < t.group_channels; i += t.threads) {
    const int64_t channel = channel_number(t, at.group, i), row = sample * a.groups + channel / (a.c / a.groups);
    const GroupGradient<A> g = static_cast<const GroupGradient<A>*>(groups)[row];
    gradients[i] = {channel_affine(a, read_group_stats<A>(a, row), channel), g.slope, g.offset};
  }
  __syncthreads();
  Gradient<A> c[V];
  Affine<A> map[V];
#pragma unroll
  for (int i = 0; i < V; i++) c[i] = gradients[channel_of_sum<T, true>(t, i)], map[i] = c[i].affine;
  stream<T, true, kGeneral>(a, map, t, at, [&](const Slot& s, const A(&distance)[V], const A(&dz)[V]) {
    write_slot<T, true>(a, true, c, s, distance, dz);
  });
}

}  // namespace
}  // namespace fastnorm
