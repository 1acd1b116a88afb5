// Max-unpooling: what the host file hands to the kernels.  No torch here.
//
//   y[indices[i]] = x[i] within each plane, and 0 where no index points; of several x for one y the last one in
//   memory's order of their plane is taken.
#pragma once
#include <cstddef>
#include <cstdint>

#include "cpu/isa.h"
#include "dtype.h"
#ifdef FASTNORM_CUDA
#include <cuda_runtime_api.h>
#endif

namespace fastnorm {

// In memory x and indices are [n][in][c], y is [n][out][c]: in and out are the pixels of a plane.  Planes
// ([samples][channels][pixels]) have n = samples * channels and c = 1.
struct MaxUnpool2d {
  int64_t n, c, in, out;
  int element_bytes;
  const void* x;
  const int64_t* indices;
  void* y;
  int64_t* invalid;  // CPU: where in indices the first one is that is not in [0, out), or -1.  CUDA: unused, a trap
  void* workspace;   // max_unpool2d_workspace() bytes
  int threads;       // at most, for the CPU kernels
};

namespace cpu {
FASTNORM_CPU_KERNEL(size_t, max_unpool2d_workspace, MaxUnpool2d)
FASTNORM_CPU_KERNEL(void, max_unpool2d, MaxUnpool2d)
}  // namespace cpu

#ifdef FASTNORM_CUDA
namespace cuda {
size_t max_unpool2d_workspace(const MaxUnpool2d&);
cudaError_t max_unpool2d(const MaxUnpool2d&, cudaStream_t);
}  // namespace cuda
#endif

}  // namespace fastnorm
