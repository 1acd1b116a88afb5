// Non-maximum suppression, hard and soft: what the host file hands to the kernels.  No torch here.
//
// Boxes are x1, y1, x2, y2.  "A" is the type that is computed in: double for float64, else float.
//
//   intersection = max(0, min(x2) - max(x1)) * max(0, min(y2) - max(y1))
//   IoU = intersection / (area + other area - intersection),  area = (x2 - x1) * (y2 - y1)
//
// Each operation is rounded on its own, none is fused, and the division is a true one, so that every kernel decides
// alike.  0 / 0 is NaN and so no overlap; a box with a NaN has a NaN area and neither suppresses nor is suppressed.
//
// hard: boxes by decreasing score, NaN first and ties in their order; a box is kept unless its IoU with one that was
//   kept before, in the same segment, is greater than the threshold.
// soft: the box with the highest score is selected and the scores of the others in its segment are multiplied by
//   1 - IoU, where that is at least the threshold, or by exp(-IoU^2 / sigma); and again, until no score is greater than
//   the score threshold.
#pragma once
#include <cstddef>
#include <cstdint>

#include "cpu/isa.h"
#include "dtype.h"
#ifdef FASTNORM_CUDA
#include <cuda_runtime_api.h>
#endif

namespace fastnorm {

struct Nms {
  int64_t rows, n;          // images, and boxes in each; n < 2^31
  int64_t capacity;         // of indices; a row's further boxes are not wanted
  DType dtype;              // of boxes and scores
  double threshold;         // of the IoU
  bool drop;                // boxes whose score is not greater than
  double drop_scores;       // this one
  const void* boxes;        // [rows][n][4]
  const void* scores;       // [rows][n]
  const int64_t* segments;  // [rows][n]: boxes of different ones do not meet; or null: a row is one segment
  // What the CUDA kernels want to have sorted; the CPU kernels sort for themselves.
  const int64_t* order;             // [rows][n]: a row's boxes by score
  const int64_t* grouped;           // [rows][n]: the same, stably sorted by segment
  const int64_t* grouped_segments;  // [rows][n]: their segments, or null
  int64_t* indices;                 // [rows][capacity]: what is kept, by score, then -1
  int64_t* count;                   // [rows]
  void* workspace;                  // nms_workspace() bytes
  int threads;                      // at most, for the CPU kernels
};

struct SoftNms {
  int64_t n;         // < 2^31
  int64_t capacity;  // of indices and updated
  DType dtype;       // of boxes, scores and updated
  bool gaussian;     // or linear
  double threshold;  // of the IoU, linear only
  double sigma;      // gaussian only
  double drop_scores;
  const void* boxes;        // [n][4]
  const void* scores;       // [n]
  const int64_t* segments;  // [n] or null
  int64_t* indices;         // [capacity]: what is selected, in that order
  void* updated;            // [capacity]: the scores that it was selected with
  int64_t* count;           // how many
  void* workspace;          // soft_nms_workspace() bytes
  int threads;              // not used: every selection depends on the one before
};

// The largest A that is not greater than the threshold: for x of type A, x > threshold means x > this.
template <class A>
A round_down(double threshold) {
  const A nearest = A(threshold);
  if constexpr (sizeof(A) == 4)
    if (double(nearest) > threshold) return __builtin_nextafterf(nearest, -__builtin_inff());
  return nearest;
}

namespace cpu {
FASTNORM_CPU_KERNEL(size_t, nms_workspace, Nms)
FASTNORM_CPU_KERNEL(size_t, soft_nms_workspace, SoftNms)
FASTNORM_CPU_KERNEL(void, nms, Nms)
FASTNORM_CPU_KERNEL(void, soft_nms, SoftNms)
}  // namespace cpu

#ifdef FASTNORM_CUDA
namespace cuda {
size_t nms_workspace(const Nms&);
size_t soft_nms_workspace(const SoftNms&);
cudaError_t nms(const Nms&, cudaStream_t);
cudaError_t soft_nms(const SoftNms&, cudaStream_t);
}  // namespace cuda
#endif

}  // namespace fastnorm
