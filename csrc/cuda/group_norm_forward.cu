// Group norm and instance norm, forward.
//
//   mean, var of each group of each sample;  z = (x - mean) * rstd * weight + bias,  y = activation(z + residual)
//
// Plan and bytes moved (S = bytes of x, m = S / 32 or S / 16 for the mask, if it is wanted; S more for a residual):
//
//   resident  one launch, 2S.  [n][c][hw]: a group is a row.  Up to 4 KB of them go to a part of a warp, larger ones to
//             a block or, on sm_90, to a cluster of 2 to 16.  [n][hw][c]: a block or cluster takes a slice of channels
//             that has whole groups.  They are copied to shared memory; there two exact passes take the moments, the
//             second about the mean, and a third writes y.
//   streamed  three launches, 3S, for what no cluster holds: partial sums, the statistics, y.
//
// The sizes of a sample alone decide, never the number of samples, so its result does not depend on its batch.
#include "group_norm_resident.cuh"
#include "rows_forward.cuh"

namespace fastnorm {
namespace {
template <class T>
RowForwardPlan<T, GroupNormRows> row_plan(const GroupNormForward& a) {
  return {a, make_group_rows<T>(a, {a.x, a.residual, a.y})};
}

template <class T>
struct TileForwardPlan {
  const GroupNormForward& a;
  Tiles resident, streamed;  // the former without parts: the latter

  auto resident_kernel() const {
    return is_simple(a.activation) ? group_norm_forward_resident_kernel<T, false>
                                   : group_norm_forward_resident_kernel<T, true>;
  }
  auto apply_kernel() const {
    return is_simple(a.activation) ? group_norm_apply_kernel<T, false> : group_norm_apply_kernel<T, true>;
  }
  explicit TileForwardPlan(const GroupNormForward& a) : a(a), streamed() {
    const std::initializer_list<const void*> tensors = {a.x, a.residual, a.y};
    resident = resident_sample_tiles<T>(a, tensors, resident_kernel(), tile_forward_bytes<T>);
    if (!resident.parts) streamed = streamed_sample_tiles<T>(a, tensors);
  }
  size_t workspace() const { return resident.parts ? 0 : partial_bytes(streamed, a.n); }
  cudaError_t run(cudaStream_t stream) const {
    if (resident.parts)
      return launch_sample_clusters(resident_kernel(), resident, tile_forward_bytes<T>(resident), stream, a);
    cudaError_t error =
        launch_samples(group_norm_statistics_kernel<T>, streamed, tile_sum_bytes<T>(streamed), stream, a);
    if (error != cudaSuccess) return error;
    RowFinish f{};
    f.partials = tile_partials(streamed, a.groups, a.workspace);
    f.rows = a.n * a.groups, f.sample_length = a.c * a.hw, f.group_length = a.c / a.groups;
    f.x = a.x, f.dtype = a.dtype, f.stats_type = accumulate_type(a.dtype), f.stats = a.stats;
    f.inverse_count = 1 / (double(a.c / a.groups) * double(a.hw)), f.eps = a.eps, f.centred = f.with_var = true;
    error = launch_finish(f, stream);
    if (error != cudaSuccess) return error;
    return launch_samples(apply_kernel(), streamed, apply_bytes<T>(streamed, a.mask), stream, a);
  }
};

template <class F>
auto with_plan(const GroupNormForward& a, F f) {
  return with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    return a.channels_last ? f(TileForwardPlan<T>(a)) : f(row_plan<T>(a));
  });
}

}  // namespace

namespace cuda {

size_t group_norm_forward_workspace(const GroupNormForward& a) {
  return with_plan(a, [](const auto& plan) { return plan.workspace(); });
}

cudaError_t group_norm_forward(const GroupNormForward& a, cudaStream_t stream) {
  return with_plan(a, [&](const auto& plan) { return plan.run(stream); });
}

}  // namespace cuda
}  // namespace fastnorm
