// Sums over a warp, a block, a cluster, in an order that depends on nothing but their shapes.
#pragma once
#include "launch.cuh"

namespace fastnorm {
namespace {

// The same in every lane.
template <class A>
__device__ __forceinline__ A warp_sum(A v) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) v += __shfl_xor_sync(0xffffffffu, v, distance);
  return v;
}

// The sum over the block's threads (whole warps), in warp 0; scratch holds a value per warp and is free when the caller
// has passed its next barrier.
template <class A>
__device__ __forceinline__ A block_sum(A v, A* scratch) {
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  v = warp_sum(v);
  if (lane == 0) scratch[warp] = v;
  __syncthreads();
  if (warp == 0) v = warp_sum(lane < int(blockDim.x) / 32 ? scratch[lane] : A(0));
  return v;
}

// total[i] = the sum of mine[i] over the cluster's blocks, for i < count, in every block.  Holds barriers before and
// after; mine must stay as it is until the blocks have passed another barrier of the cluster.  A block without a
// cluster is its own sum.
template <class A>
__device__ __forceinline__ const A* cluster_sum(A* mine, A* total, int count, int cluster) {
  if (cluster == 1) {
    __syncthreads();
    return mine;
  }
  cluster_sync();
  for (int i = int(threadIdx.x); i < count; i += int(blockDim.x)) {
    A sum = 0;
    for (int rank = 0; rank < cluster; rank++) sum += *cluster_shared(mine + i, unsigned(rank));
    total[i] = sum;
  }
  __syncthreads();
  return total;
}

}  // namespace
}  // namespace fastnorm
