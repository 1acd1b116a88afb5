// Max-unpooling; ../max_unpool2d.h has the rule.
//
// Which x is the last one for a y is decided by integers, whose maximum does not depend on the order of threads: clear
// (4 bytes per y), claim by atomicMax (8 bytes per x read), then every y fetches its x or is 0.  An index that is out
// of range traps, as torch's kernel does.
#include "launch.cuh"
#include "max_unpool2d.h"

namespace fastnorm {
namespace {

constexpr int kUnpoolThreads = 256;

__device__ __forceinline__ int64_t unpool_item() { return int64_t(blockIdx.x) * kUnpoolThreads + threadIdx.x; }

// winner: [n][out][c], 0 or one more than the number of the pixel of x.
__global__ void __launch_bounds__(kUnpoolThreads) max_unpool2d_clear_kernel(int* winner, int64_t count) {
  const int64_t i = unpool_item();
  if (i < count) winner[i] = 0;
}

__global__ void __launch_bounds__(kUnpoolThreads) max_unpool2d_claim_kernel(MaxUnpool2d a, int* winner) {
  const int64_t i = unpool_item();
  if (i >= a.n * a.in * a.c) return;
  const int64_t to = a.indices[i];
  if (to < 0 || to >= a.out) __trap();
  const int64_t row = i / a.c, channel = i - row * a.c, n = row / a.in;
  atomicMax(&winner[(n * a.out + to) * a.c + channel], int(row - n * a.in) + 1);
}

// One element a thread: where an x is found is anywhere.
template <class Bits, int kWidth>
__global__ void __launch_bounds__(kUnpoolThreads) max_unpool2d_kernel(MaxUnpool2d a, const int* winner) {
  const int64_t i = unpool_item();
  if (i >= a.n * a.out * a.c) return;
  const int won = winner[i];
  Bits v = 0;
  if (won) {
    const int64_t row = i / a.c, channel = i - row * a.c;
    v = static_cast<const Bits*>(a.x)[(row / a.out * a.in + won - 1) * a.c + channel];
  }
  static_cast<Bits*>(a.y)[i] = v;
}

dim3 unpool_blocks(int64_t items) { return dim3(unsigned((items + kUnpoolThreads - 1) / kUnpoolThreads)); }

}  // namespace

namespace cuda {

size_t max_unpool2d_workspace(const MaxUnpool2d& a) { return size_t(a.n * a.out * a.c) * sizeof(int); }

cudaError_t max_unpool2d(const MaxUnpool2d& a, cudaStream_t stream) {
  const int64_t inputs = a.n * a.in * a.c, outputs = a.n * a.out * a.c;
  if (outputs == 0) return cudaErrorInvalidValue;  // every index is out of range
  int* const winner = static_cast<int*>(a.workspace);
  const dim3 block(kUnpoolThreads);
  cudaError_t error = launch(max_unpool2d_clear_kernel, unpool_blocks(outputs), block, 0, stream, winner, outputs);
  if (error != cudaSuccess) return error;
  error = launch(max_unpool2d_claim_kernel, unpool_blocks(inputs), block, 0, stream, a, winner);
  if (error != cudaSuccess) return error;
  auto fetch = [&](auto kernel) { return launch(kernel, unpool_blocks(outputs), block, 0, stream, a, winner); };
  switch (a.element_bytes) {
    case 8: return fetch(max_unpool2d_kernel<uint64_t, 1>);
    case 4: return fetch(max_unpool2d_kernel<uint32_t, 1>);
    default: return fetch(max_unpool2d_kernel<uint16_t, 1>);
  }
}

}  // namespace cuda
}  // namespace fastnorm
