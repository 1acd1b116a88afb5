// Group norm and instance norm, backward.
//
//   dz = dy * activation'(z) = dresidual,  dbias = sum dz,  dweight = sum dz * normalized
//   dx = (g - mean of g - normalized * mean of g * normalized) * rstd,  g = dz * weight, means over a group
//
// Plan and bytes moved (S = bytes of x, m = S / 32 or S / 16 for the mask, if there is one):
//
//   resident       one launch, 3S, + dresidual 4S + m, and a small one for the parameters.  [n][c][hw]: x and dy of a
//                  group are copied to the shared memory of a part of a warp, of a block or of a cluster; one pass
//                  takes the sums of each slot, which are added up per channel, and a second writes dx and dresidual.
//   streamed       three launches, 5S, + dresidual 6S + 2m, and the parameters: sums per channel, coefficients per
//                  group, dx.
//   channels_last  as streamed, in tiles of pixels and channels.
//
// Without a mask z is computed again from x, and the residual if there was one, by the operations of forward.
#include "group_norm_backward_channels_last.cuh"
#include "group_norm_backward_planes.cuh"
#include "group_norm_resident.cuh"

namespace fastnorm {
namespace {

template <class T, bool kGeneral>
struct PlaneBackwardPlan {
  const GroupNormBackward& a;
  Rows resident, planes, rows;  // without parts: streamed, first planes for the sums and then rows

  static constexpr auto kResident = group_norm_backward_resident_kernel<T, kGeneral>;
  explicit PlaneBackwardPlan(const GroupNormBackward& a) : a(a), planes(), rows() {
    const std::initializer_list<const void*> tensors = {a.dy, a.x, a.residual, a.dx, a.dresidual};
    const Rows groups = make_group_rows<T>(a, tensors);
    resident = resident_rows<T>(groups, kRowThreads, kResident, group_backward_bytes<T>);
    if (resident.parts) return;
    rows = streamed_rows<T>(groups);
    planes = make_rows<T>(a.n * a.c, 1, a.hw, tensors, {});
    if (planes.slots <= 4096)
      set_team<T>(planes, kRowThreads);
    else
      planes = streamed_rows<T>(planes);
  }
  GroupWorkspace workspace() const {
    if (resident.parts) return {a, resident.parts, false, 0};
    return {a, 1, true, size_t(planes.rows) * size_t(planes.parts) * 2 * sizeof(double)};
  }
  cudaError_t run(cudaStream_t stream) const {
    const GroupWorkspace w = workspace();
    if (resident.parts) {
      const cudaError_t error =
          launch_resident(kResident, resident, group_backward_bytes<T>(resident), stream, a, w.channels);
      return error != cudaSuccess ? error : launch_parameters(a, w, resident.parts, stream);
    }
    const int64_t items = planes.rows * planes.parts, blocks = (items + planes.teams() - 1) / planes.teams();
    if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
    cudaError_t error = launch(group_norm_planes_reduce_kernel<T, kGeneral>, dim3(unsigned(blocks)),
                               dim3(unsigned(planes.threads)), Team::bytes(), stream, a, planes, w.partials);
    if (error != cudaSuccess) return error;
    const int64_t each = a.c / a.groups, channel = 2 * planes.parts;
    const Partials partials{
        w.partials, int(a.groups), int(each), planes.parts, 1, a.c * channel, each * channel, channel, 2, 0, 1};
    error = launch_gradient_finish(a, partials, w, stream);
    if (error == cudaSuccess && (a.dx || a.dresidual))
      error = launch_parts(group_norm_planes_gradient_kernel<T, kGeneral>, rows, 0, stream, a, w.groups);
    return error != cudaSuccess ? error : launch_parameters(a, w, 1, stream);
  }
};

template <class T, bool kGeneral>
struct TileBackwardPlan {
  using A = Accumulate<T>;
  const GroupNormBackward& a;
  Tiles resident, streamed;  // the former without parts: the latter

  static constexpr auto kResident = group_norm_backward_tile_kernel<T, kGeneral>;
  explicit TileBackwardPlan(const GroupNormBackward& a) : a(a), streamed() {
    const std::initializer_list<const void*> tensors = {a.dy, a.x, a.residual, a.dx, a.dresidual};
    resident = resident_sample_tiles<T>(a, tensors, kResident, tile_backward_bytes<T>);
    if (!resident.parts) streamed = streamed_sample_tiles<T>(a, tensors);
  }
  GroupWorkspace workspace() const {
    if (resident.parts) return {a, 1, false, 0};
    return {a, 1, true, partial_bytes(streamed, a.n)};
  }
  cudaError_t run(cudaStream_t stream) const {
    const GroupWorkspace w = workspace();
    cudaError_t error = cudaSuccess;
    if (resident.parts) {
      error = launch_sample_clusters(kResident, resident, tile_backward_bytes<T>(resident), stream, a, w.channels);
    } else {
      const size_t affine = shared_bytes<Affine<A>>(streamed.group_channels);
      error = launch_samples(group_norm_tiles_reduce_kernel<T, kGeneral>, streamed,
                             tile_sum_bytes<T>(streamed) + affine, stream, a, w.partials);
      if (error != cudaSuccess) return error;
      error = launch_gradient_finish(a, tile_partials(streamed, a.groups, w.partials), w, stream);
      if (error == cudaSuccess && (a.dx || a.dresidual))
        error = launch_samples(group_norm_tiles_gradient_kernel<T, kGeneral>, streamed,
                               shared_bytes<Gradient<A>>(streamed.group_channels), stream, a, w.groups);
    }
    return error != cudaSuccess ? error : launch_parameters(a, w, 1, stream);
  }
};

template <class T, bool kGeneral, class F>
auto with_layout(const GroupNormBackward& a, F f) {
  return a.channels_last ? f(TileBackwardPlan<T, kGeneral>(a)) : f(PlaneBackwardPlan<T, kGeneral>(a));
}

template <class F>
auto with_plan(const GroupNormBackward& a, F f) {
  return with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    return is_simple(a.activation) ? with_layout<T, false>(a, f) : with_layout<T, true>(a, f);
  });
}

}  // namespace

namespace cuda {

size_t group_norm_backward_workspace(const GroupNormBackward& a) {
  return with_plan(a, [](const auto& plan) { return plan.workspace().bytes; });
}

cudaError_t group_norm_backward(const GroupNormBackward& a, cudaStream_t stream) {
  if (!a.dx && !a.dresidual && !wants_parameters(a)) return cudaSuccess;
  return with_plan(a, [&](const auto& plan) { return plan.run(stream); });
}

}  // namespace cuda
}  // namespace fastnorm
