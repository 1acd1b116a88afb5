// Soft non-maximum suppression: a block, as every selection depends on the one before.
//
// A round: each thread lowers the scores of its boxes by their overlap with the one selected last and finds the highest
// of them; two barriers find the block's.  The scores stay in global memory, where a thread reads none but its own.
#include "nms.cuh"

namespace fastnorm {
namespace {

constexpr int kSoftThreads = 1024;

// The better of two candidates: higher score, then lower index; index -1 is none.
template <class A>
struct Best {
  A score;
  int index;
  __device__ __forceinline__ void take(A other_score, int other) {
    if (other >= 0 && (index < 0 || other_score > score || (other_score == score && other < index)))
      score = other_score, index = other;
  }
};

// In every thread.
template <class A>
__device__ __forceinline__ Best<A> block_best(Best<A> best, A* scores, int* indices) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, warps = int(blockDim.x) / 32;
  for (int distance = 16; distance > 0; distance /= 2) {
    const A score = __shfl_xor_sync(~0u, best.score, distance);
    best.take(score, __shfl_xor_sync(~0u, best.index, distance));
  }
  if (lane == 0) scores[warp] = best.score, indices[warp] = best.index;
  __syncthreads();
  best.index = -1;
  if (lane < warps) best = {scores[lane], indices[lane]};
  for (int distance = 16; distance > 0; distance /= 2) {
    const A score = __shfl_xor_sync(~0u, best.score, distance);
    best.take(score, __shfl_xor_sync(~0u, best.index, distance));
  }
  __syncthreads();
  return best;
}

__device__ __forceinline__ float decay(float iou, float sigma) { return expf(-product(iou, iou) / sigma); }
__device__ __forceinline__ double decay(double iou, double sigma) { return exp(-product(iou, iou) / sigma); }

template <class A>
__global__ void __launch_bounds__(kSoftThreads)
    nms_soft_kernel(const __grid_constant__ SoftNms a, Box<A>* __restrict__ boxes, A* __restrict__ scores) {
  FASTNORM_SHARED(A, best_scores, kSoftThreads / 32);
  FASTNORM_SHARED(int, best_indices, kSoftThreads / 32);
  const int n = int(a.n), step = int(blockDim.x);
  const A drop = A(a.drop_scores), threshold = A(a.threshold), sigma = A(a.sigma);
  Best<A> best{A(0), -1};
  for (int i = int(threadIdx.x); i < n; i += step) {
    boxes[i] = load_box_as<A>(a.boxes, a.dtype, i);
    scores[i] = read_as<A>(a.scores, a.dtype, i);
    if (scores[i] > drop) best.take(scores[i], i);
  }
  int64_t selected = 0;
  for (; selected < a.capacity; selected++) {
    best = block_best(best, best_scores, best_indices);
    if (best.index < 0) break;
    const int chosen = best.index;
    if (threadIdx.x == 0) {
      a.indices[selected] = chosen;
      write(a.updated, a.dtype, selected, best.score);
    }
    const Box<A> box = boxes[chosen];
    const int64_t segment = a.segments ? a.segments[chosen] : 0;
    best.index = -1;
#pragma unroll 1
    for (int i = int(threadIdx.x); i < n; i += step) {
      A score = scores[i];
      if (!(score > drop)) continue;
      if (i == chosen) {
        scores[i] = score = drop;  // never again
      } else if (!a.segments || a.segments[i] == segment) {
        const Box<A> other = boxes[i];
        const A both = intersection(box, other);
        const A iou = both > 0 ? both / (area(box) + area(other) - both) : A(0);
        if (iou > 0 && (a.gaussian || iou >= threshold))
          scores[i] = score = product(score, a.gaussian ? decay(iou, sigma) : A(1) - iou);
      }
      if (score > drop) best.take(score, i);
    }
  }
  if (threadIdx.x == 0) *a.count = selected;
}

}  // namespace

namespace cuda {

size_t soft_nms_workspace(const SoftNms& a) { return size_t(a.n) * 5 * size_of(accumulate_type(a.dtype)); }

cudaError_t soft_nms(const SoftNms& a, cudaStream_t stream) {
  return with_accumulate(a.dtype, [&](auto type) {
    using A = decltype(type);
    auto* const boxes = static_cast<Box<A>*>(a.workspace);
    const int64_t threads = (a.n + 31) / 32 * 32;
    return launch(nms_soft_kernel<A>, dim3(1), dim3(unsigned(threads < kSoftThreads ? threads : kSoftThreads)), 0,
                  stream, a, boxes, reinterpret_cast<A*>(boxes + a.n));
  });
}

}  // namespace cuda
}  // namespace fastnorm
