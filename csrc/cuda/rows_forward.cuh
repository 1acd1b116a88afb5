// Forward kernels of norms whose statistics are of rows.  Op says what layer norm and group norm do not share:
//
//   Op::Forward          the op's arguments
//   Op::Row<T>           a row's coefficients, from its statistics; lanes() loads those of a slot, apply() makes z
//   Op::input, centred   what is normalised; whether about a mean
//   Op::kPlanes, kAddend, kWithVar   whether rows have several planes, x an addend, statistics the variance
//
//   resident  a row in the shared memory of some threads of a warp, of a block or of a cluster: one launch
//   streamed  three launches: partial sums, the statistics, y
#pragma once
#include "rows_moments.cuh"

namespace fastnorm {
namespace {

// A slot of h: of x or, rounded, of x + addend, which is written to a.sum as well.
template <class T, class Op>
__device__ __forceinline__ Vector<T> input_slot(const typename Op::Forward& a, const RowSlot& s) {
  Vector<T> h = load(static_cast<const T*>(a.x) + s.offset, s.valid);
  if constexpr (Op::kAddend) {
    if (!a.addend) return h;
    const Vector<T> addend = load(static_cast<const T*>(a.addend) + s.offset, s.valid);
#pragma unroll
    for (int i = 0; i < kLanes<T>; i++) h.lane[i] = narrow<T>(widen(h.lane[i]) + widen(addend.lane[i]));
    store(static_cast<T*>(a.sum) + s.offset, h, s.valid);
  }
  return h;
}

// y of kSlots slots of each thread, from slot number `first` on; value(i, slot) and other(i, slot) give those of h and
// of the residual, put(i, slot, y) takes the result.
template <class T, class Op, bool kGeneral, bool kSimple, int kSlots, class Row, class Part, class Value, class Other,
          class Put>
__device__ __forceinline__ void write_slots(const typename Op::Forward& a, const Row& row, const Part& part, int first,
                                            int step, Value value, Other other, Put put) {
  using A = Accumulate<T>;
  constexpr int V = kLanes<T>;
  RowSlot s[kSlots];
  Vector<T> h[kSlots], r[kSlots];
  typename Row::Lanes lanes[kSlots];
#pragma unroll
  for (int u = 0; u < kSlots; u++) {
    const int i = first + u * step;
    s[u] = part.template at<kSimple>(i);
    if (i >= part.count) continue;
    h[u] = value(i, s[u]);
    if (a.residual) r[u] = other(i, s[u]);
    lanes[u] = row.lanes(a, s[u], part.t);
  }
#pragma unroll
  for (int u = 0; u < kSlots; u++) {
    unsigned on = 0;
    if (first + u * step < part.count) {
      A z[V];
      widen(z, h[u]);
      row.apply(lanes[u], z);
      if (a.residual) {
#pragma unroll
        for (int i = 0; i < V; i++) z[i] += widen(r[u].lane[i]);
      }
      on = activate_lanes<T, kGeneral>(a.activation, z, A(a.negative_slope), a.mask);
      put(first + u * step, s[u], narrow<T>(z));
    }
    if (a.mask) part.write_mask(a.mask, first + u * step < part.count ? s[u] : RowSlot{}, on);
  }
}

template <class T, class Op, bool kGeneral>
__global__ void __launch_bounds__(kRowThreads, kBlocksAtOnce<(kGeneral || sizeof(T) == 8 ? 2 : 3)>)
    row_forward_resident_kernel(typename Op::Forward a, Rows t) {
  FASTNORM_DYNAMIC_SHARED(unsigned char, memory);
  Shared shared{memory};
  Team team(t, t.parts, shared);
  Vector<T>* const data = shared.take<Vector<T>>(0) + int64_t(team.index) * t.tensors * t.part_slots;
  Vector<T>* const residuals = data + t.part_slots;
  const RowPart<T, Op::kPlanes> part(t, team.row(t), team.rank);

  if (Op::input(a) == a.x) {
    copy_slots(part, team, static_cast<const T*>(a.x), data);
  } else {
    with_constant(t.simple, [&](auto simple) {
#pragma unroll 2
      for (int i = team.lane; i < part.count; i += team.size)
        data[i] = input_slot<T, Op>(a, part.template at<simple>(i));
    });
    __pipeline_commit();
  }
  const T* const residual = static_cast<const T*>(a.residual);
  if (t.tensors == 2)
    copy_slots(part, team, residual, residuals);
  else
    __pipeline_commit();
  __pipeline_wait_prior(1);
  if (!t.wide) team.sync();

  const auto stats = resident_moments<T>(team, part, data, a.eps, Op::centred(a));
  team.arrive();
  if (team.leads() && part.row < t.rows) Op::write_stats(a, t.rows, part.row, stats);
  const typename Op::template Row<T> row(a, part.row, stats);
  __pipeline_wait_prior(0);
  constexpr int U = sizeof(T) == 2 ? 1 : 2;  // by their registers
  with_constant(t.simple, [&](auto simple) {
    for (int first = team.lane; first < t.part_slots + team.lane; first += U * team.size)
      write_slots<T, Op, kGeneral, simple, U>(
          a, row, part, first, team.size, [&](int i, const RowSlot&) { return data[i]; },
          [&](int i, const RowSlot& s) { return t.tensors == 2 ? residuals[i] : load(residual + s.offset, s.valid); },
          [&](int i, const RowSlot& s, const Vector<T>& y) {
            if (simple || t.wide)
              store(static_cast<T*>(a.y) + s.offset, y, s.valid);
            else
              data[i] = y;
          });
  });
  if (!t.wide) {
    team.sync();
    scatter_elements(part, team, data, a.y);
  }
  team.leave();
}

template <class T>
size_t row_forward_bytes(const Rows& t) {
  return Team::bytes() + shared_bytes<Vector<T>>(int64_t(t.teams()) * t.tensors * t.part_slots);
}

// ---- Streamed -------------------------------------------------------------------------------------------------------

// The distances of a thread's elements from one of its own, so that one outlier spoils little; then, exactly, from the
// row's first.  Writes h where there is an addend.
template <class T, class Op>
__global__ void __launch_bounds__(kRowThreads, kBlocksAtOnce<2>) row_partial_kernel(typename Op::Forward a, Rows t) {
  using A = Accumulate<T>;
  constexpr int V = kLanes<T>, U = 4;
  FASTNORM_DYNAMIC_SHARED(unsigned char, memory);
  Shared shared{memory};
  Team team(t, 1, shared);
  const int64_t number = blockIdx.x / unsigned(t.parts);
  const RowPart<T, Op::kPlanes> part(t, number, int(blockIdx.x - unsigned(number) * unsigned(t.parts)));
  const bool centred = Op::centred(a);
  auto first_of = [&](int64_t offset) {
    A first = widen(static_cast<const T*>(a.x)[offset]);
    if constexpr (Op::kAddend) {
      if (a.addend) first = widen(narrow<T>(first + widen(static_cast<const T*>(a.addend)[offset])));
    }
    return first;
  };
  const RowSlot begin = part[team.lane];
  const A shift = centred ? first_of(begin.valid & 1 ? begin.offset : part.start) : A(0);
  A sum[V] = {}, square[V] = {};
  double wide[3] = {0, 0, 0};  // of the distances, of their squares; and how many there are
  for (int first = team.lane; first < part.count; first += U * team.size) {
    RowSlot s[U];
    Vector<T> h[U];
#pragma unroll
    for (int u = 0; u < U; u++) {
      s[u] = part[first + u * team.size];
      h[u] = input_slot<T, Op>(a, s[u]);
    }
#pragma unroll
    for (int u = 0; u < U; u++) {
      wide[2] += __popc(s[u].valid & kAllLanes<T>);
#pragma unroll
      for (int i = 0; i < V; i++) {
        const A distance = s[u].valid >> i & 1 ? widen(h[u].lane[i]) - shift : A(0);
        sum[i] += distance;
        square[i] = fused(distance, distance, square[i]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < V; i++) wide[0] += double(sum[i]), wide[1] += double(square[i]);
  if (kOverflows<T> && (!finite(wide[0]) || out_of_range(wide[1], a.eps))) {
    wide[0] = wide[1] = 0;
#pragma unroll 1
    for (int i = team.lane; i < part.count; i += team.size) {
      const RowSlot s = part[i];
      const Vector<T> h = load(static_cast<const T*>(Op::input(a)) + s.offset, s.valid);
#pragma unroll
      for (int k = 0; k < V; k++)
        if (s.valid >> k & 1) add_distance(double(widen(h.lane[k])) - double(shift), wide[0], wide[1]);
    }
  }
  if (centred && wide[2] > 0) {
    const double d = double(shift) - double(first_of(part.start));
    wide[1] += d * (2 * wide[0] + wide[2] * d);
    wide[0] += wide[2] * d;
  }
  team.sum(wide);
  if (!team.leads()) return;
  double* const to = static_cast<double*>(a.workspace) + 2 * int64_t(blockIdx.x);
  to[0] = wide[0], to[1] = wide[1];
}

template <class T, class Op, bool kGeneral>
__global__ void __launch_bounds__(kRowThreads, kBlocksAtOnce<2>) row_apply_kernel(typename Op::Forward a, Rows t) {
  const unsigned block = gridDim.x - 1 - blockIdx.x;  // what was read last is in L2 still
  const int64_t number = block / unsigned(t.parts);
  const RowPart<T, Op::kPlanes> part(t, number, int(block - unsigned(number) * unsigned(t.parts)));
  const typename Op::template Row<T> row(a, number, Op::template read_stats<Accumulate<T>>(a, t.rows, number));
  const T* const h = static_cast<const T*>(Op::input(a));
  const T* const residual = static_cast<const T*>(a.residual);
  constexpr int U = 2;
  with_constant(t.simple, [&](auto simple) {
    for (int first = int(threadIdx.x); first < t.part_slots + int(threadIdx.x); first += U * t.threads)
      write_slots<T, Op, kGeneral, simple, U>(
          a, row, part, first, t.threads, [&](int, const RowSlot& s) { return load(h + s.offset, s.valid); },
          [&](int, const RowSlot& s) { return load(residual + s.offset, s.valid); },
          [&](int, const RowSlot& s, const Vector<T>& y) { store(static_cast<T*>(a.y) + s.offset, y, s.valid); });
  });
}

// ---- Launches -------------------------------------------------------------------------------------------------------

template <class T, class Op>
struct RowForwardPlan {
  using Forward = typename Op::Forward;
  const Forward& a;
  Rows resident, streamed;  // the former without parts: the latter

  auto resident_kernel() const {
    return is_simple(a.activation) ? row_forward_resident_kernel<T, Op, false>
                                   : row_forward_resident_kernel<T, Op, true>;
  }
  auto apply_kernel() const {
    return is_simple(a.activation) ? row_apply_kernel<T, Op, false> : row_apply_kernel<T, Op, true>;
  }
  RowForwardPlan(const Forward& a, Rows rows) : a(a), streamed() {
    // A residual is copied too where there is room for it, so that it is on its way while the sums are taken.
    rows.tensors = a.residual && rows.slots <= (kGoodRowBytes / 32) ? 2 : 1;
    resident = resident_rows<T>(rows, kRowThreads, resident_kernel(), row_forward_bytes<T>);
    if (!resident.parts) streamed = streamed_rows<T>(rows);
  }
  size_t workspace() const {
    return resident.parts ? 0 : size_t(streamed.rows) * size_t(streamed.parts) * 2 * sizeof(double);
  }
  cudaError_t run(cudaStream_t stream) const {
    if (resident.parts) return launch_resident(resident_kernel(), resident, row_forward_bytes<T>(resident), stream, a);
    cudaError_t error = launch_parts(row_partial_kernel<T, Op>, streamed, Team::bytes(), stream, a);
    if (error != cudaSuccess) return error;
    RowFinish f{};
    f.partials = row_partials(a.workspace, streamed.parts);
    f.rows = streamed.rows, f.sample_length = streamed.row_length(),
    f.inverse_count = 1 / double(streamed.row_length());
    f.x = Op::input(a), f.dtype = a.dtype, f.stats_type = accumulate_type(a.dtype), f.stats = a.stats, f.eps = a.eps;
    f.centred = Op::centred(a), f.with_var = Op::kWithVar;
    error = launch_finish(f, stream);
    if (error != cudaSuccess) return error;
    return launch_parts(apply_kernel(), streamed, 0, stream, a);
  }
};

}  // namespace
}  // namespace fastnorm
