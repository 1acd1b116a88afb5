// Group norm of [n][c][hw], backward: the kernels.
#pragma once
#include "group_norm_gradient.cuh"

namespace fastnorm {
namespace {

// Of a slot: distance = x - mean, and dz.
template <class T>
struct PlaneSlot {
  Accumulate<T> distance[kLanes<T>], dz[kLanes<T>];
};

template <class T, bool kGeneral, class Part>
__device__ __forceinline__ void differentiate_plane(const GroupNormBackward& a, const Needs& needs, const Part& part,
                                                    const RowSlot& s, const Affine<Accumulate<T>>& affine,
                                                    const Vector<T>& x, const Vector<T>& dy, PlaneSlot<T>& to) {
  using A = Accumulate<T>;
  constexpr int V = kLanes<T>;
  A z[V];
#pragma unroll
  for (int i = 0; i < V; i++) {
    to.distance[i] = s.valid >> i & 1 ? widen(x.lane[i]) - affine.mean : A(0);
    to.dz[i] = widen(dy.lane[i]);
  }
  if (needs.z) {
#pragma unroll
    for (int i = 0; i < V; i++) z[i] = affine(widen(x.lane[i]));
    if (needs.residual) {
      const Vector<T> residual = load(static_cast<const T*>(a.residual) + s.offset, s.valid);
#pragma unroll
      for (int i = 0; i < V; i++) z[i] += widen(residual.lane[i]);
    }
  }
  const unsigned bits = needs.mask ? part.read_mask(a.mask, s) : 0;
  differentiate_lanes<T, kGeneral>(a.activation, needs.mask, bits, z, to.dz, A(a.negative_slope));
#pragma unroll
  for (int i = 0; i < V; i++)
    if (!(s.valid >> i & 1)) to.dz[i] = 0;
}

// Adds up dz, and dz * distance.
template <class T>
__device__ __forceinline__ void add_up(const PlaneSlot<T>& slot, Accumulate<T> (&sums)[2]) {
#pragma unroll
  for (int i = 0; i < kLanes<T>; i++) {
    sums[0] += slot.dz[i];
    sums[1] = fused(slot.dz[i], slot.distance[i], sums[1]);
  }
}

template <class T>
__device__ __forceinline__ Vector<T> gradient_slot(const PlaneSlot<T>& slot, Accumulate<T> scale,
                                                   const GroupGradient<Accumulate<T>>& g) {
  Accumulate<T> dx[kLanes<T>];
#pragma unroll
  for (int i = 0; i < kLanes<T>; i++) dx[i] = fused(slot.dz[i], scale, fused(slot.distance[i], g.slope, g.offset));
  return narrow<T>(dx);
}

template <class T>
__device__ __forceinline__ void write_gradients(const GroupNormBackward& a, const RowSlot& s, const Vector<T>& dx,
                                                const Vector<T>& dz) {
  if (a.dresidual) store(static_cast<T*>(a.dresidual) + s.offset, dz, s.valid);
  if (a.dx) store(static_cast<T*>(a.dx) + s.offset, dx, s.valid);
}

// ---- Resident -------------------------------------------------------------------------------------------------------

// The sums of a plane's slots in this part of the row, from those of each slot: `lanes` neighbours to a plane.  Leaves
// them in channels, and adds them up, weighted, over a thread's planes.
template <class T, class Part>
__device__ __forceinline__ void sum_planes(const GroupNormBackward& a, const Part& part, const Team& team,
                                           const Accumulate<T>* slots, double* channels, Accumulate<T> (&sums)[2]) {
  using A = Accumulate<T>;
  const Rows& t = part.t;
  int lanes = 32;
  while (lanes > 1 && (lanes > team.size || t.planes * lanes > team.size)) lanes /= 2;
  const int64_t begin = part.plane * t.plane_slots + part.slot, all = a.n * a.c;
  const int lane = team.lane % lanes;
  for (int64_t first = 0; first < t.planes; first += team.size / lanes) {  // all of a warp together, for the shuffles
    const int64_t plane = first + team.lane / lanes;
    A v[2] = {0, 0};
    if (plane < t.planes) {
      const int64_t from = max(int64_t(0), plane * t.plane_slots - begin);
      const int64_t to = min(int64_t(part.count), (plane + 1) * t.plane_slots - begin);
      for (int64_t i = from + lane; i < to; i += lanes) v[0] += slots[2 * i], v[1] += slots[2 * i + 1];
    }
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
      v[0] += __shfl_xor_sync(0xffffffffu, v[0], distance);
      v[1] += __shfl_xor_sync(0xffffffffu, v[1], distance);
    }
    if (lane != 0 || plane >= t.planes || part.row >= t.rows) continue;
    const int64_t channel = part.row * t.planes + plane;
    const A weight = a.weight ? read_as<A>(a.weight, a.param_dtype, channel % a.c) : A(1);
    sums[0] = fused(weight, v[0], sums[0]), sums[1] = fused(weight, v[1], sums[1]);
    double* const here = channels + 2 * team.rank * all + channel;
    here[0] = double(v[0]), here[all] = double(v[1]);
  }
}

template <class T, bool kGeneral>
__global__ void __launch_bounds__(kRowThreads, kBlocksAtOnce<2>)
    group_norm_backward_resident_kernel(GroupNormBackward a, Rows t, double* channels) {
  using A = Accumulate<T>;
  FASTNORM_DYNAMIC_SHARED(unsigned char, memory);
  Shared shared{memory};
  Team team(t, t.parts, shared);
  Vector<T>* const x = shared.take<Vector<T>>(int64_t(t.teams()) * 2 * t.part_slots) + team.index * 2 * t.part_slots;
  Vector<T>* const dy = x + t.part_slots;
  A* const slots = shared.take<A>(0) + int64_t(team.index) * 2 * t.part_slots;
  const RowPart<T, true> part(t, team.row(t), team.rank);
  const Needs needs(a);
  copy_slots(part, team, static_cast<const T*>(a.x), x);
  copy_slots(part, team, static_cast<const T*>(a.dy), dy);
  const int64_t known = min(part.row, t.rows - 1);
  const RowStats<A> stats = read_group_stats<A>(a, known);
  const GroupNormRows::Row<T> row(a, known, stats);
  __pipeline_wait_prior(0);
  if (!t.wide) team.sync();
  with_constant(t.simple, [&](auto simple) {
    for (int i = team.lane; i < part.count; i += team.size) {
      const RowSlot s = part.template at<simple>(i);
      A v[2] = {0, 0};
      PlaneSlot<T> slot;
      differentiate_plane<T, kGeneral>(a, needs, part, s, row.lanes(a, s, t), x[i], dy[i], slot);
      add_up<T>(slot, v);
      slots[2 * i] = v[0], slots[2 * i + 1] = v[1];
    }
  });
  team.sync();
  A sums[2] = {0, 0};
  sum_planes<T>(a, part, team, slots, channels, sums);
  if (a.dx || a.dresidual) {
    team.sum(sums);
    const auto g = group_gradient<A>(stats, double(sums[0]), double(sums[1]), double(t.row_length()));
    with_constant(t.simple, [&](auto simple) {
      for (int i = team.lane; i < part.count; i += team.size) {
        const RowSlot s = part.template at<simple>(i);
        const Affine<A> affine = row.lanes(a, s, t);
        PlaneSlot<T> slot;
        differentiate_plane<T, kGeneral>(a, needs, part, s, affine, x[i], dy[i], slot);
        const Vector<T> dx = gradient_slot(slot, affine.scale, g), dz = narrow<T>(slot.dz);
        if (simple || t.wide)
          write_gradients(a, s, dx, dz);
        else
          x[i] = dx, dy[i] = dz;
      }
    });
    if (!t.wide) {
      team.sync();
      if (a.dx) scatter_elements(part, team, x, a.dx);
      if (a.dresidual) scatter_elements(part, team, dy, a.dresidual);
    }
    team.arrive();
    team.leave();
  }
}

template <class T>
size_t group_backward_bytes(const Rows& t) {
  const int64_t slots = int64_t(t.teams()) * t.part_slots;
  return Team::bytes() + shared_bytes<Vector<T>>(2 * slots) + shared_bytes<Accumulate<T>>(2 * slots);
}

// ---- Streamed -------------------------------------------------------------------------------------------------------

// Calls f(slot, its affine map, what differentiate_plane() gives) for each slot of a thread.
template <class T, bool kGeneral, class Part, class Map, class F>
__device__ __forceinline__ void stream_planes(const GroupNormBackward& a, const Part& part, int lane, int size, Map map,
                                              F f) {
  const Needs needs(a);
  with_constant(part.t.simple, [&](auto simple) {
#pragma unroll 2
    for (int i = lane; i < part.count; i += size) {
      const RowSlot s = part.template at<simple>(i);
      const Vector<T> x = load(static_cast<const T*>(a.x) + s.offset, s.valid);
      const Vector<T> dy = load(static_cast<const T*>(a.dy) + s.offset, s.valid);
      const Affine<Accumulate<T>> affine = map(s);
      PlaneSlot<T> slot;
      differentiate_plane<T, kGeneral>(a, needs, part, s, affine, x, dy, slot);
      f(s, affine, slot);
    }
  });
}

// Sums of a plane, or of a part of one; here t's rows are planes.
template <class T, bool kGeneral>
__global__ void __launch_bounds__(kRowThreads, kBlocksAtOnce<2>)
    group_norm_planes_reduce_kernel(GroupNormBackward a, Rows t, double* partials) {
  using A = Accumulate<T>;
  FASTNORM_DYNAMIC_SHARED(unsigned char, memory);
  Shared shared{memory};
  Team team(t, 1, shared);
  const int64_t item = int64_t(blockIdx.x) * t.teams() + team.index, plane = item / t.parts;
  const RowPart<T, false> part(t, plane, int(item - plane * t.parts));
  const int64_t known = min(plane, t.rows - 1);
  const RowStats<A> stats = read_group_stats<A>(a, known / (a.c / a.groups));
  const Affine<A> affine = channel_affine(a, stats, known % a.c);
  A sums[2] = {0, 0};
  stream_planes<T, kGeneral>(
      a, part, team.lane, team.size, [&](const RowSlot&) { return affine; },
      [&](const RowSlot&, const Affine<A>&, const PlaneSlot<T>& slot) { add_up<T>(slot, sums); });
  double wide[2] = {double(sums[0]), double(sums[1])};
  team.sum(wide);
  if (!team.leads() || plane >= t.rows) return;
  partials[2 * item] = wide[0], partials[2 * item + 1] = wide[1];
}

template <class T, bool kGeneral>
__global__ void __launch_bounds__(kRowThreads, kBlocksAtOnce<2>)
    group_norm_planes_gradient_kernel(GroupNormBackward a, Rows t, const void* groups) {
  using A = Accumulate<T>;
  const unsigned block = gridDim.x - 1 - blockIdx.x;  // what was read last is in L2 still
  const int64_t number = block / unsigned(t.parts);
  const RowPart<T, true> part(t, number, int(block - unsigned(number) * unsigned(t.parts)));
  const GroupNormRows::Row<T> row(a, number, read_group_stats<A>(a, number));
  const GroupGradient<A> g = static_cast<const GroupGradient<A>*>(groups)[number];
  stream_planes<T, kGeneral>(
      a, part, int(threadIdx.x), t.threads, [&](const RowSlot& s) { return row.lanes(a, s, t); },
      [&](const RowSlot& s, const Affine<A>& affine, const PlaneSlot<T>& slot) {
        write_gradients<T>(a, s, gradient_slot(slot, affine.scale, g), narrow<T>(slot.dz));
      });
}

}  // namespace
}  // namespace fastnorm
