// How kernels are launched and what launchers may ask of the machine: the one place with a launch, free of torch.
//
// The same kernel source is compiled by nvcc and, with -DFASTNORM_CUDA_EMULATION, by a C++ compiler against the CPU
// emulator of the tests, which has the same functions.  For that, every kernel goes through launch() or
// launch_cluster() and declares its shared memory with FASTNORM_SHARED or FASTNORM_DYNAMIC_SHARED.
// A launch returns the error of its own and leaves none behind for the next caller of cudaGetLastError().
#pragma once
#include <cstddef>

#ifdef FASTNORM_CUDA_EMULATION

#include "cuda_emulator.h"
#include "device_functions.h"

namespace fastnorm {
using cuda_emulator::active_clusters;
using cuda_emulator::cluster_arrive_relaxed;
using cuda_emulator::cluster_rank;
using cuda_emulator::cluster_shared;
using cuda_emulator::cluster_size;
using cuda_emulator::cluster_sync;
using cuda_emulator::cluster_wait;
using cuda_emulator::compute_capability;
using cuda_emulator::l2_bytes;
using cuda_emulator::launch;
using cuda_emulator::launch_cluster;
using cuda_emulator::shared_memory_limit;
using cuda_emulator::sm_count;
}  // namespace fastnorm

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <tuple>

// Shared memory of a block, 16-byte aligned: an array T name[n], or T* name at all that the launch asked for.
#define FASTNORM_SHARED(T, name, n) __shared__ __align__(16) T name[n]
#define FASTNORM_DYNAMIC_SHARED(T, name)                                   \
  extern __shared__ __align__(16) unsigned char fastnorm_dynamic_shared[]; \
  T* const name = reinterpret_cast<T*>(fastnorm_dynamic_shared)

namespace fastnorm {
namespace detail {

template <class T>
struct Identity {
  using type = T;  // keeps arguments out of template deduction: they convert to the kernel's parameter types
};

// Takes an error off the record, as the caller is told of it.
inline cudaError_t taken(cudaError_t error) {
  if (error != cudaSuccess) (void)cudaGetLastError();
  return error;
}

inline int device_attribute(cudaDeviceAttr attribute, int otherwise) {
  int device = 0, value = 0;
  if (taken(cudaGetDevice(&device)) != cudaSuccess) return otherwise;
  return taken(cudaDeviceGetAttribute(&value, attribute, device)) == cudaSuccess ? value : otherwise;
}

// Lifts the limits that a kernel has by default where a launch needs more.
inline cudaError_t permit(const void* kernel, size_t shared_bytes, unsigned cluster) {
  // The default limit is 48 KB, static shared memory included: of that there may be 16 KB.
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 32 << 10)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
  if (error == cudaSuccess && cluster > 8)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  return taken(error);
}

struct Configuration {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attribute{};

  Configuration(dim3 grid, dim3 block, unsigned cluster, size_t shared_bytes, cudaStream_t stream) {
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = cluster > 1;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = cluster;
    attribute.val.clusterDim.y = 1;
    attribute.val.clusterDim.z = 1;
  }
  Configuration(const Configuration&) = delete;  // config points into it
};

inline int query_active_clusters(const void* kernel, dim3 block, unsigned cluster, size_t shared_bytes) {
  cudaFuncAttributes attributes{};
  if (taken(cudaFuncGetAttributes(&attributes, kernel)) != cudaSuccess) return 0;
  if (attributes.ptxVersion < 90) return 0;  // compiled for an older device: the cluster functions below trap
  if (permit(kernel, shared_bytes, cluster) != cudaSuccess) return 0;
  Configuration setup(dim3(cluster), block, cluster, shared_bytes, nullptr);
  int clusters = 0;
  return taken(cudaOccupancyMaxActiveClusters(&clusters, kernel, &setup.config)) == cudaSuccess ? clusters : 0;
}

inline int active_clusters(const void* kernel, dim3 block, unsigned cluster, size_t shared_bytes) {
  using Question = std::tuple<int, const void*, unsigned, unsigned, unsigned, unsigned, size_t>;
  static std::mutex mutex;
  static std::map<Question, int> answers;  // the driver takes microseconds to give one
  int device = 0;
  if (taken(cudaGetDevice(&device)) != cudaSuccess) return 0;
  const std::lock_guard<std::mutex> lock(mutex);
  const Question question(device, kernel, block.x, block.y, block.z, cluster, shared_bytes);
  const auto [answer, asked_first] = answers.try_emplace(question, 0);
  if (asked_first) answer->second = query_active_clusters(kernel, block, cluster, shared_bytes);
  return answer->second;
}

}  // namespace detail

// ---- What the current device has ------------------------------------------------------------------------------------

inline int sm_count() { return detail::device_attribute(cudaDevAttrMultiProcessorCount, 1); }

// 90 for sm_90.
inline int compute_capability() {
  return 10 * detail::device_attribute(cudaDevAttrComputeCapabilityMajor, 0) +
         detail::device_attribute(cudaDevAttrComputeCapabilityMinor, 0);
}

// The most shared memory that one block can have, static and dynamic together.
inline size_t shared_memory_limit() {
  return size_t(detail::device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, 48 << 10));
}

inline size_t l2_bytes() { return size_t(detail::device_attribute(cudaDevAttrL2CacheSize, 4 << 20)); }

// How many clusters of this shape can run at once on the whole device; 0 where none can, as before sm_90.
template <class... P>
int active_clusters(void (*kernel)(P...), dim3 block, unsigned cluster, size_t shared_bytes) {
  if (cluster == 0 || compute_capability() < 90) return 0;
  return detail::active_clusters(reinterpret_cast<const void*>(kernel), block, cluster, shared_bytes);
}

// ---- Launches -------------------------------------------------------------------------------------------------------

// As launch(), in clusters of `cluster` blocks that are neighbours in x; grid.x is a multiple of it.  Ask
// active_clusters() or max_cluster_size() first, and go another way where they say 0.
template <class... P>
cudaError_t launch_cluster(void (*kernel)(P...), dim3 grid, dim3 block, unsigned cluster, size_t shared_bytes,
                           cudaStream_t stream, typename detail::Identity<P>::type... args) {
  const cudaError_t error = detail::permit(reinterpret_cast<const void*>(kernel), shared_bytes, cluster);
  if (error != cudaSuccess) return error;
  detail::Configuration setup(grid, block, cluster, shared_bytes, stream);
  return detail::taken(cudaLaunchKernelEx(&setup.config, kernel, args...));
}

// kernel<<<grid, block, shared_bytes, stream>>>(args...).  An empty grid is an error, as it is to CUDA.
template <class... P>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   typename detail::Identity<P>::type... args) {
  return launch_cluster(kernel, grid, block, 1, shared_bytes, stream, args...);
}

// ---- Clusters, in kernels -------------------------------------------------------------------------------------------
// A kernel that launch() started is a cluster of one.  Before sm_90 these compile, and trap when they run.

// This block's number in its cluster.
__device__ __forceinline__ unsigned cluster_rank() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  return __clusterRelativeBlockRank();
#else
  __trap();
  return 0;
#endif
}

// The number of blocks in this cluster.
__device__ __forceinline__ unsigned cluster_size() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  return __clusterSizeInBlocks();
#else
  __trap();
  return 0;
#endif
}

// A barrier of all threads of the cluster; what they wrote before it, to shared or global memory, all of them see
// after. There must be one before a peer's shared memory is first touched, as it may not run yet, and one after the
// last time, as it may be gone.
__device__ __forceinline__ void cluster_sync() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  __cluster_barrier_arrive();  // with release
  __cluster_barrier_wait();    // with acquire
#else
  __trap();
#endif
}

// A barrier in two steps that orders no memory, for the end of a kernel: every thread arrives when it has read the last
// of its peers' shared memory, goes on with other work, and waits before it returns.  cluster_sync() there would first
// wait for the thread's own stores to global memory.
__device__ __forceinline__ void cluster_arrive_relaxed() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  __cluster_barrier_arrive_relaxed();
#else
  __trap();
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  __cluster_barrier_wait();
#else
  __trap();
#endif
}

// Where block `rank` of the cluster has what this block has at p in its shared memory.
template <class T>
__device__ __forceinline__ T* cluster_shared(T* p, unsigned rank) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  return static_cast<T*>(__cluster_map_shared_rank(p, rank));
#else
  __trap();
  return p;
#endif
}

}  // namespace fastnorm

#endif

namespace fastnorm {

// The most blocks that a cluster of this kernel can have, a power of two up to 16; 0 where there are no clusters.
template <class... P>
unsigned max_cluster_size(void (*kernel)(P...), dim3 block, size_t shared_bytes) {
  for (unsigned cluster = 16; cluster > 1; cluster /= 2)
    if (active_clusters(kernel, block, cluster, shared_bytes) > 0) return cluster;
  return 0;
}

}  // namespace fastnorm
