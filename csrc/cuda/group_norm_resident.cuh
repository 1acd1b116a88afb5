// Group norm of [n][hw][c] with all pixels of some groups in the shared memory of one block or cluster: the kernels.
//
// A tile is all pixels of a slice of the channels that has whole groups, 128 bytes wide or more.  Only where c is a
// multiple of 8, or a few rows of all channels make whole bytes of the mask (folded).
#pragma once
#include "group_norm_channels_last.cuh"
#include "group_norm_gradient.cuh"
#include "tiles_gradient.cuh"
#include "tiles_resident.cuh"

namespace fastnorm {
namespace {

// to[group of the tile] = the sum of from[channel of the tile] over its channels, weighted where weight() is not 1.
template <class Weight>
__device__ __forceinline__ void sum_groups_of_tile(const Tiles& t, int each, const double* from, double* to,
                                                   Weight weight) {
  const int lane = int(threadIdx.x) % 32;
  for (int group = int(threadIdx.x) / 32; group < t.group_channels / each; group += t.threads / 32) {
    double sum = 0;
    for (int i = group * each + lane; i < (group + 1) * each; i += 32) sum += weight(i) * from[i];
    sum = warp_sum(sum);
    if (lane == 0) to[group] = sum;
  }
}

// ---- Forward --------------------------------------------------------------------------------------------------------

template <class T, bool kGeneral>
__global__ void __launch_bounds__(kTileThreads, kBlocksAtOnce<2>)
    group_norm_forward_resident_kernel(GroupNormForward all, Tiles t, int cluster) {
  using A = Accumulate<T>;
  constexpr int V = kLanes<T>;
  FASTNORM_DYNAMIC_SHARED(unsigned char, memory);
  Shared shared{memory};
  const int g = t.group_channels, each = int(all.c / all.groups), groups = g / each;
  Vector<T>* const data = shared.take<Vector<T>>(t.block_slots());
  Vector<T>* const residuals = shared.take<Vector<T>>(t.tensors == 2 ? t.block_slots() : 0);
  double* const scratch = shared.take<double>(sum_scratch<T>(t));
  double* const mine = shared.take<double>(3 * g);
  double* const total = shared.take<double>(3 * g);
  double* const group_sums = shared.take<double>(3 * groups);
  Affine<A>* const affine = shared.take<Affine<A>>(g);
  uint8_t* const bits = shared.take<uint8_t>(t.block_slots());

  const auto [sample, at] = SamplePlace(t);
  const GroupNormForward a = sample_arguments<T>(all, sample);
  const int thread = int(threadIdx.x), end = thread < t.step ? at.segments * t.slots : 0;
  const double inverse = 1 / (double(each) * double(a.hw));
  auto one = [](int) { return 1.0; };
  copy_tiles(t, at, static_cast<const T*>(a.x), data, bits);
  if (t.tensors == 2)
    copy_tiles(t, at, static_cast<const T*>(a.residual), residuals, bits);
  else
    __pipeline_commit();
  __pipeline_wait_prior(1);

  // The mean, and then both moments about it.
  A mean[V];
  double value[V], squares[V];
  sum_resident<T, true>(data, thread, end, t.step, value);
  sum_channels<T, true>(t, value, scratch, mine);
  sum_groups_of_tile(t, each, cluster_sum(mine, total, g, cluster), group_sums, one);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < V; i++) mean[i] = A(group_sums[channel_of_sum<T, true>(t, i) / each] * inverse);
  square_resident<T, true>(data, t.partial ? bits : nullptr, thread, end, t.step, mean, value, squares);
  sum_channels<T, true>(t, value, scratch, mine + g);
  sum_channels<T, true>(t, squares, scratch, mine + 2 * g);
  const double* const sums = cluster_sum(mine + g, total + g, 2 * g, cluster);
  if (cluster > 1) cluster_arrive_relaxed();
  sum_groups_of_tile(t, each, sums, group_sums + groups, one);
  sum_groups_of_tile(t, each, sums + g, group_sums + 2 * groups, one);
  __syncthreads();
  for (int i = thread; i < g; i += t.threads) {
    const int group = i / each;
    const double centre = double(A(group_sums[group] * inverse));
    const RowStats<A> stats =
        finish_row<A, double>(centre, group_sums[groups + group], group_sums[2 * groups + group], inverse, a.eps, true);
    const int64_t channel = channel_number(t, at.group, i);
    affine[i] = channel_affine(a, stats, channel);
    if (at.part == 0 && i == group * each && at.group * g + i < a.c)
      write_group_stats(all, sample * a.groups + channel / each, stats);
  }
  __syncthreads();
  Affine<A> map[V];
#pragma unroll
  for (int i = 0; i < V; i++) map[i] = affine[channel_of_sum<T, true>(t, i)];
  __pipeline_wait_prior(0);
  apply_resident<T, true, kGeneral>(a, t, at, map, data, residuals, bits);
  if (cluster > 1) cluster_wait();
}

template <class T>
size_t tile_forward_bytes(const Tiles& t) {
  const int g = t.group_channels;
  return t.tensors * shared_bytes<Vector<T>>(t.block_slots()) + shared_bytes<double>(sum_scratch<T>(t)) +
         3 * shared_bytes<double>(3 * g) + shared_bytes<Affine<Accumulate<T>>>(g) +
         shared_bytes<uint8_t>(t.block_slots());
}

// ---- Backward -------------------------------------------------------------------------------------------------------

template <class T, bool kGeneral>
__global__ void __launch_bounds__(kTileThreads, kBlocksAtOnce<(kGeneral && sizeof(T) == 8 ? 1 : 2)>)
    group_norm_backward_tile_kernel(GroupNormBackward all, Tiles t, int cluster, double* channels) {
  using A = Accumulate<T>;
  constexpr int V = kLanes<T>;
  FASTNORM_DYNAMIC_SHARED(unsigned char, memory);
  Shared shared{memory};
  const int g = t.group_channels, each = int(all.c / all.groups), groups = g / each;
  Vector<T>* const xs = shared.take<Vector<T>>(t.block_slots());
  Vector<T>* const dys = shared.take<Vector<T>>(t.block_slots());
  double* const scratch = shared.take<double>(sum_scratch<T>(t));
  double* const mine = shared.take<double>(2 * g);
  double* const total = shared.take<double>(2 * g);
  double* const group_sums = shared.take<double>(2 * groups);
  Gradient<A>* const gradients = shared.take<Gradient<A>>(g);
  uint8_t* const bits = shared.take<uint8_t>(t.block_slots());

  const auto [sample, at] = SamplePlace(t);
  const int64_t first = at.group * g, row = sample * all.groups;
  const GroupNormBackward a = sample_arguments<T>(all, sample);
  const int thread = int(threadIdx.x);
  copy_pair(a, t, at, Needs(a), xs, dys, bits);
  for (int i = thread; i < g; i += t.threads) {
    const int64_t channel = channel_number(t, at.group, i);
    gradients[i].affine = channel_affine(a, read_group_stats<A>(a, row + channel / each), channel);
  }
  __syncthreads();
  Affine<A> map[V];
#pragma unroll
  for (int i = 0; i < V; i++) map[i] = gradients[channel_of_sum<T, true>(t, i)].affine;
  __pipeline_wait_prior(0);

  A sum[V] = {}, product[V] = {};
  stream_resident<T, true, kGeneral>(
      a, map, t, at, xs, dys, bits,
      [&](const Slot&, const A(&distance)[V], const A(&dz)[V]) { accumulate<T>(distance, dz, sum, product); });
  double value[V];
  collect<T, true>(value, sum);
  sum_channels<T, true>(t, value, scratch, mine);
  collect<T, true>(value, product);
  sum_channels<T, true>(t, value, scratch, mine + g);
  const double* const sums = cluster_sum(mine, total, 2 * g, cluster);
  if (cluster > 1) cluster_arrive_relaxed();
  auto weight = [&](int i) { return a.weight ? read(a.weight, a.param_dtype, channel_number(t, at.group, i)) : 1.0; };
  sum_groups_of_tile(t, each, sums, group_sums, weight);
  sum_groups_of_tile(t, each, sums + g, group_sums + groups, weight);
  __syncthreads();
  for (int i = thread; i < g; i += t.threads) {
    const RowStats<A> stats = read_group_stats<A>(a, row + channel_number(t, at.group, i) / each);
    const auto gradient =
        group_gradient(stats, group_sums[i / each], group_sums[groups + i / each], double(each) * double(a.hw));
    gradients[i].slope = gradient.slope, gradients[i].offset = gradient.offset;
    if (at.part != 0 || first + i >= a.c) continue;
    channels[sample * a.c + first + i] = sums[i];
    channels[(a.n + sample) * a.c + first + i] = sums[g + i];
  }
  __syncthreads();
  if (a.dx || a.dresidual) {
    Gradient<A> c[V];
#pragma unroll
    for (int i = 0; i < V; i++) c[i] = gradients[channel_of_sum<T, true>(t, i)];
    stream_resident<T, true, kGeneral>(a, map, t, at, xs, dys, bits,
                                       [&](const Slot& s, const A(&distance)[V], const A(&dz)[V]) {
                                         write_slot<T, true>(a, true, c, s, distance, dz);
                                       });
  }
  if (cluster > 1) cluster_wait();
}

template <class T>
size_t tile_backward_bytes(const Tiles& t) {
  const int g = t.group_channels;
  return 2 * shared_bytes<Vector<T>>(t.block_slots()) + shared_bytes<double>(sum_scratch<T>(t)) +
         3 * shared_bytes<double>(2 * g) + shared_bytes<Gradient<Accumulate<T>>>(g) +
         shared_bytes<uint8_t>(t.block_slots());
}

// ---- On the host ----------------------------------------------------------------------------------------------------

// The tiles of one sample that stay in shared memory, t.parts being the blocks of a cluster, or ones without parts.
// Small blocks, so that few samples fill the chip too: their number must not decide.
template <class T, class Args, class Kernel>
Tiles resident_sample_tiles(const Args& a, std::initializer_list<const void*> tensors, Kernel kernel,
                            size_t (*bytes)(const Tiles&)) {
  constexpr size_t kSmall = 40 << 10, kGood = 112 << 10;
  const int64_t each = a.c / a.groups, unit = a.c % 8 ? 8 : std::lcm(each, int64_t(8));
  const bool aligned = all_samples_aligned<T>(a, tensors);
  const Tiles groups = make_groups<T>(1, a.c, a.hw, true, aligned ? 0 : 1, !aligned, 128, unit);
  Tiles best{};
  if (groups.copies > 1 || groups.group_length > kLanes<T> * kTileThreads) return best;
  for (int cluster = 1; cluster <= 16; cluster *= 2) {
    Tiles t = split<T>(groups, cluster, kTileThreads);
    if (t.parts != cluster) break;
    t.tensors = 1;
    if (bytes(t) > std::min(kGood, shared_memory_limit())) continue;
    if (cluster > 1 && !active_clusters(kernel, dim3(unsigned(t.threads)), unsigned(cluster), bytes(t))) break;
    best = t;
    if (cluster >= 8 || bytes(t) <= kSmall) break;
  }
  return best;
}

// A kernel over the tiles of all samples, a cluster to each.
template <class Args, class... More>
cudaError_t launch_sample_clusters(void (*kernel)(Args, Tiles, int, More...), const Tiles& t, size_t bytes,
                                   cudaStream_t stream, const std::type_identity_t<Args>& a,
                                   std::type_identity_t<More>... more) {
  if (a.n > 0x7fffffff / (t.groups * t.parts)) return cudaErrorInvalidConfiguration;
  const dim3 grid(unsigned(a.n * t.groups * t.parts)), threads { unsigned(t.threads) };
  if (t.parts == 1) return launch(kernel, grid, threads, bytes, stream, a, t, 1, more...);
  return launch_cluster(kernel, grid, threads, unsigned(t.parts), bytes, stream, a, t, t.parts, more...);
}

}  // namespace
}  // namespace fastnorm
