// Layer norm and RMS norm, backward.
//
//   dz = dy * activation'(z) = dresidual,  dbias = sum dz,  dweight = sum dz * normalized
//   dx = (g - mean of g - normalized * mean of g * normalized) * rstd + dsum,  g = dz * weight;  RMS norm: no mean of g
//
// Plan and bytes moved (S = bytes of x; S more for each of dsum and dresidual; the mask's m):
//
//   resident  one launch, 3S, and a small one for the parameters.  A fixed range of the rows goes to each block, whose
//             threads add up the parameters' gradients in shared memory while they write dx.
//   streamed  four launches, 7S, for rows that no block holds: sums, dx, sums per column, the parameters.
//   columns   where inner > 1: as resident, in tiles of pixels.
//
// Without a mask z is computed again from x, and the residual if there was one, by the operations of forward.
#include "layer_norm_backward_rows.cuh"
#include "layer_norm_columns_backward.cuh"

namespace fastnorm {
namespace {

// Which kernels run for rows that follow each other.
template <class T>
struct RowBackwardPlan {
  using A = Accumulate<T>;
  const LayerNormBackward& a;
  bool parameters, resident;
  Rows rows, columns;                 // of all kernels but one; of the streamed sums per column
  int64_t block_rows = 0, parts = 0;  // of the resident kernel; partial sums of the parameters' gradients

  explicit RowBackwardPlan(const LayerNormBackward& a) : a(a), parameters(wants_parameters(a)), columns() {
    const Rows all =
        make_rows<T>(a.outer, 1, a.cols, {a.dy, a.dsum, a.x, a.residual, a.dx, a.dresidual}, {a.weight, a.bias});
    const size_t limit = shared_memory_limit();
    rows = all;
    resident = all.slots <= 1 << 16;
    if (resident) {
      set_team<T>(rows, kBackwardThreads<T>, 128, 2);
      rows.tensors = 4;
      if (bytes() > kGoodRowBytes && 2 * bytes() > limit) rows.tensors = 2;
      resident = bytes() <= limit;
    }
    if (resident) {
      const int64_t teams = rows.teams(), turns = (a.outer + teams - 1) / teams;
      const int64_t blocks = sm_count() * std::max<int64_t>(1, std::min<int64_t>(limit / bytes(), 768 / rows.threads));
      block_rows = std::min<int64_t>((turns + blocks - 1) / blocks, 1024) * teams;
      parts = (a.outer + block_rows - 1) / block_rows;
    } else {
      rows = columns = all;
      rows = streamed_rows<T>(all);
      columns.part_slots = 32;
      columns.parts = int((all.slots + 31) / 32);
      columns.threads = kRowThreads;
      parts = (a.outer + kColumnRows - 1) / kColumnRows;
    }
  }
  size_t bytes() const { return backward_resident_bytes<T>(rows, parameters); }
  size_t workspace() const {
    const size_t sums = resident ? 0 : size_t(rows.rows) * size_t(rows.parts) * 2 * sizeof(double);
    return std::max(sums, parameters ? size_t(parts) * 2 * size_t(a.cols) * sizeof(A) : 0);
  }
  template <bool kGeneral>
  cudaError_t run(cudaStream_t stream) const {
    cudaError_t error = cudaSuccess;
    if (resident) {
      if (parts > 0x7fffffff) return cudaErrorInvalidConfiguration;
      error = launch(layer_norm_backward_resident_kernel<T, kGeneral>, dim3(unsigned(parts)),
                     dim3(unsigned(rows.threads)), bytes(), stream, a, rows, block_rows);
    } else {
      if (a.dx) error = launch_parts(layer_norm_reduce_kernel<T, kGeneral>, rows, Team::bytes(), stream, a);
      if (error == cudaSuccess && (a.dx || a.dresidual))
        error = launch_parts(layer_norm_gradient_kernel<T, kGeneral>, rows, 0, stream, a);
      if (error == cudaSuccess && parameters) {
        if (parts > 0x7fffffff / columns.parts) return cudaErrorInvalidConfiguration;
        error = launch(layer_norm_parameter_kernel<T, kGeneral>, dim3(unsigned(parts * columns.parts)),
                       dim3(kRowThreads), 0, stream, a, columns);
      }
    }
    if (error != cudaSuccess || !parameters) return error;
    return launch_parameter_finish<A>(a, a.workspace, parts, stream);
  }
};

// Calls f with the plan for the arguments.
template <class F>
auto with_plan(const LayerNormBackward& a, F f) {
  return with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    return a.inner > 1 ? f(ColumnBackwardPlan<T>(a)) : f(RowBackwardPlan<T>(a));
  });
}

}  // namespace

namespace cuda {

size_t layer_norm_backward_workspace(const LayerNormBackward& a) {
  return with_plan(a, [](const auto& plan) { return plan.workspace(); });
}

cudaError_t layer_norm_backward(const LayerNormBackward& a, cudaStream_t stream) {
  if (!a.dx && !a.dresidual && !wants_parameters(a)) return cudaSuccess;
  return with_plan(a, [&](const auto& plan) {
    return is_simple(a.activation) ? plan.template run<false>(stream) : plan.template run<true>(stream);
  });
}

}  // namespace cuda
}  // namespace fastnorm
