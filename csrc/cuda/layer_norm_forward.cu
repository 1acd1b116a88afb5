// Layer norm and RMS norm, forward.
//
//   h = x + addend;  mean, var of each row of h;  normalized = (h - mean) * rstd
//   z = normalized * weight + bias,  y = activation(z + residual)
//
// Plan and bytes moved (S = bytes of x, m = S / 32 or S / 16 for the mask, if it is wanted; S more for each of addend,
// sum and residual):
//
//   resident  one launch, 2S.  Rows of up to 4 KB go to a part of a warp, larger ones to a block or, on sm_90, to a
//             cluster of 2 to 16.  A row is copied to shared memory; there two exact passes take the moments, the
//             second about the mean, and a third writes y.
//   streamed  three launches, 3S, for rows that no cluster holds: partial sums, the statistics, y.
//   columns   where inner > 1: one launch, 2S: tiles of pixels in shared memory.
//
// Size alone decides, never the number of rows, so a row's result does not depend on its batch.
#include "layer_norm_columns_forward.cuh"
#include "rows_forward.cuh"

namespace fastnorm {
namespace {
template <class T>
RowForwardPlan<T, LayerNormRows> row_plan(const LayerNormForward& a) {
  return {a, make_rows<T>(a.outer, 1, a.cols, {a.x, a.addend, a.residual, a.y, a.sum}, {a.weight, a.bias})};
}
}  // namespace

namespace cuda {

size_t layer_norm_forward_workspace(const LayerNormForward& a) {
  if (a.inner > 1) return 0;
  return with_type(a.dtype, [&](auto type) { return row_plan<decltype(type)>(a).workspace(); });
}

cudaError_t layer_norm_forward(const LayerNormForward& a, cudaStream_t stream) {
  return with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    return a.inner > 1 ? ColumnForwardPlan<T>(a).run(stream) : row_plan<T>(a).run(stream);
  });
}

}  // namespace cuda
}  // namespace fastnorm
