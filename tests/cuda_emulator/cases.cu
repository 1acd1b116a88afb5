// Small kernels, right ones and wrong ones, that the emulator's own tests run: cases NAME [SCHEDULE SEED
// BLOCKS_AT_ONCE]. Prints "ok", or what went wrong.
#include <cstdio>
#include <map>
#include <string>
#include <vector>

#include "launch.cuh"

namespace {

using fastnorm::launch;
using fastnorm::launch_cluster;

// ---- Right kernels --------------------------------------------------------------------------------------------------

__global__ void shuffle_kernel(int* out) {
  const int lane = int(threadIdx.x);
  int* o = out + lane * 8;
  o[0] = __shfl_xor_sync(~0u, lane, 5);
  o[1] = __shfl_down_sync(~0u, lane, 3);
  o[2] = __shfl_up_sync(~0u, lane, 3);
  o[3] = __shfl_sync(~0u, lane, 3, 8);
  o[4] = int(__ballot_sync(~0u, lane % 3 == 0));
  o[5] = __any_sync(~0u, lane == 31) + 2 * __all_sync(~0u, lane < 31) + 4 * __any_sync(~0u, 0) + 8 * __all_sync(~0u, 1);
  const unsigned mine = lane < 12 ? 0xfffu : ~0xfffu;
  o[6] = __shfl_sync(mine, lane, lane < 12 ? 11 : 12);  // two groups of lanes, each on its own
  o[7] = int(__match_any_sync(~0u, lane / 4));
}

bool shuffles() {
  std::vector<int> out(32 * 8, -1);
  if (launch(shuffle_kernel, 1, 32, 0, nullptr, out.data()) != cudaSuccess) return false;
  bool good = true;
  for (int lane = 0; lane < 32; lane++) {
    const int* o = &out[lane * 8];
    good &= o[0] == (lane ^ 5) && o[1] == (lane < 29 ? lane + 3 : lane) && o[2] == (lane < 3 ? lane : lane - 3);
    good &= o[3] == lane / 8 * 8 + 3 && unsigned(o[4]) == 0x49249249u && o[5] == 1 + 8;
    good &= o[6] == (lane < 12 ? 11 : 12) && unsigned(o[7]) == 0xfu << lane / 4 * 4;
  }
  return good;
}

__device__ float block_sum(float v) {
  FASTNORM_SHARED(float, partial, 32);
  for (int d = 16; d > 0; d /= 2) v += __shfl_xor_sync(~0u, v, d);
  __syncthreads();  // an earlier call's readers are done
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = v;
  __syncthreads();
  v = 0;
  for (unsigned i = 0; i < blockDim.x / 32; i++) v += partial[i];
  return v;
}

__global__ void __launch_bounds__(128) block_sum_kernel(float* out) {
  const float once = block_sum(float(threadIdx.x));
  const float twice = block_sum(once);
  const int odd = __syncthreads_count(threadIdx.x % 2);
  if (threadIdx.x == 0) out[blockIdx.x] = twice + float(odd) + float(blockIdx.x);
}

bool barriers() {
  std::vector<float> out(9);
  if (launch(block_sum_kernel, 9, 128, 0, nullptr, out.data()) != cudaSuccess) return false;
  for (int b = 0; b < 9; b++)
    if (out[b] != 127 * 64 * 128 + 64 + b) return false;
  return true;
}

// Each block of a cluster puts its number down; each sums all of them.
__global__ void cluster_sum_kernel(float* out) {
  FASTNORM_SHARED(float, sum, 1);
  FASTNORM_DYNAMIC_SHARED(float, values);
  values[threadIdx.x] = float(blockIdx.x + 1);
  const float own = block_sum(values[threadIdx.x]);
  if (threadIdx.x == 0) sum[0] = own;
  fastnorm::cluster_sync();
  float total = 0;
  for (unsigned r = 0; r < fastnorm::cluster_size(); r++)
    total += *fastnorm::cluster_shared(sum, r) + fastnorm::cluster_shared(values, r)[threadIdx.x];
  fastnorm::cluster_arrive_relaxed();
  if (threadIdx.x == 0) out[blockIdx.x] = total + 1e6f * float(fastnorm::cluster_rank());
  fastnorm::cluster_wait();
}

bool clusters() {
  const unsigned size = fastnorm::max_cluster_size(cluster_sum_kernel, 32, 128);
  std::vector<float> out(48);
  bool good = true;
  for (unsigned cluster : {1u, 3u, size}) {
    if (launch_cluster(cluster_sum_kernel, 48, 32, cluster, 128, nullptr, out.data()) != cudaSuccess) return false;
    for (unsigned b = 0; b < 48; b++) {
      float total = 0;
      for (unsigned i = b / cluster * cluster; i < b / cluster * cluster + cluster; i++) total += 33 * float(i + 1);
      good &= out[b] == total + 1e6f * float(b % cluster);
    }
  }
  return good && size == 16;
}

// The block that is done last sums what all have written.
__global__ void last_block_kernel(int* parts, unsigned* done, int* out) {
  FASTNORM_SHARED(bool, last, 1);
  parts[blockIdx.x * blockDim.x + threadIdx.x] = int(blockIdx.x);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last[0] = atomicAdd(done, 1) == gridDim.x - 1;
  __syncthreads();
  if (!last[0]) return;
  __threadfence();
  int sum = 0;
  for (unsigned i = threadIdx.x; i < gridDim.x * blockDim.x; i += blockDim.x) sum += parts[i];
  out[threadIdx.x] = sum;
}

bool last_block() {
  std::vector<int> parts(7 * 64), out(64);
  unsigned done = 0;
  if (launch(last_block_kernel, 7, 64, 0, nullptr, parts.data(), &done, out.data()) != cudaSuccess) return false;
  for (int sum : out)
    if (sum != 21) return false;
  return true;
}

__global__ void async_copy_kernel(const float* in, float* out) {
  FASTNORM_SHARED(float, stage, 2 * 128);
  const unsigned i = threadIdx.x * 4;
  for (int s = 0; s < 2; s++) {
    __pipeline_memcpy_async(stage + s * 128 + i, in + s * 128 + i, 16, s == 1 && i == 124 ? 4 : 0);
    __pipeline_commit();
  }
  for (int s = 0; s < 2; s++) {
    if (s == 0)
      __pipeline_wait_prior(1);
    else
      __pipeline_wait_prior(0);
    __syncthreads();
    for (unsigned j = 0; j < 4; j++) out[s * 128 + i + j] = stage[s * 128 + 127 - i - j];
  }
}

bool async_copies() {
  std::vector<float> in(256), out(256);
  for (int i = 0; i < 256; i++) in[i] = float(i + 1);
  if (launch(async_copy_kernel, 1, 32, 0, nullptr, in.data(), out.data()) != cudaSuccess) return false;
  for (int i = 0; i < 256; i++)
    if (out[i] != (i == 128 ? 0 : float(i / 128 * 128 + 128 - i % 128))) return false;
  return true;
}

// Shows in what order threads ran.
__global__ void trace_kernel(std::string* out) {
  for (int i = 0; i < 2; i++) {
    *out += std::to_string(blockIdx.x) + "." + std::to_string(threadIdx.x) + " ";
    __syncthreads();
  }
}

bool trace() {
  std::string out;
  if (launch(trace_kernel, 3, 40, 0, nullptr, &out) != cudaSuccess) return false;
  std::printf("%s\n", out.c_str());
  return true;
}

__global__ void nothing_kernel() {}

bool bad_launches() {
  bool good = true;
  auto refused = [&](cudaError_t error, const char* why) {
    good &= error != cudaSuccess && cuda_emulator::last_error().find(why) != std::string::npos;
  };
  refused(launch(nothing_kernel, 0, 32, 0, nullptr), "invalid grid");
  refused(launch(nothing_kernel, dim3(1, 65536), 32, 0, nullptr), "invalid grid");
  refused(launch(nothing_kernel, 1, 1025, 0, nullptr), "invalid block");
  refused(launch(nothing_kernel, 1, 32, 228 << 10, nullptr), "bytes of shared memory");
  refused(launch_cluster(nothing_kernel, 9, 32, 2, 0, nullptr), "invalid cluster");
  good &= launch(nothing_kernel, 0, 32, 0, nullptr) != cudaSuccess;  // ignored here, so the next one fails
  refused(launch(nothing_kernel, 1, 32, 0, nullptr), "ignored");
  good &= launch(nothing_kernel, 1, 32, 0, nullptr) == cudaSuccess;
  cuda_emulator::options.compute_capability = 80;
  good &= fastnorm::max_cluster_size(nothing_kernel, 32, 0) == 0 && fastnorm::shared_memory_limit() == 163 << 10;
  refused(launch_cluster(nothing_kernel, 8, 32, 2, 0, nullptr), "clusters need");
  return good;
}

// ---- Wrong kernels --------------------------------------------------------------------------------------------------

__global__ void divergent_barrier_kernel() {
  if (threadIdx.x < 40) __syncthreads();
}

__global__ void two_barriers_kernel() {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
}

__global__ void divergent_shuffle_kernel(int* out) {
  if (threadIdx.x % 2)
    out[threadIdx.x] = __shfl_sync(~0u, 1, 0);
  else
    __syncthreads();
}

__global__ void foreign_mask_kernel() { __syncwarp(0xffff); }

__global__ void early_peer_kernel(float* out) {
  FASTNORM_SHARED(float, value, 1);
  value[0] = 1;
  out[blockIdx.x] = *fastnorm::cluster_shared(value, fastnorm::cluster_rank() ^ 1);
}

// Reads a peer's shared memory that may be gone.
__global__ void late_peer_kernel(float* out) {
  FASTNORM_SHARED(float, value, 32);
  value[threadIdx.x] = float(blockIdx.x);
  fastnorm::cluster_sync();
  const float* peer = fastnorm::cluster_shared(value, fastnorm::cluster_rank() ^ 1);
  atomicAdd(reinterpret_cast<int*>(out + 32), 0);  // lets others run
  if (blockIdx.x == 1) out[threadIdx.x] = peer[threadIdx.x];
}

__global__ void arrive_only_kernel() { fastnorm::cluster_arrive_relaxed(); }

__global__ void trap_kernel() {
  if (blockIdx.x == 1 && threadIdx.x == 2) __trap();
}

__global__ void too_much_shared_kernel() {
  FASTNORM_SHARED(float, value, 13 << 10);
  value[threadIdx.x] = 0;
}

// Each thread reads what its neighbour wrote; the barrier between them is missing.
__global__ void missing_barrier_kernel(int* out) {
  FASTNORM_SHARED(int, value, 64);
  value[threadIdx.x] = int(threadIdx.x);
  out[threadIdx.x] = value[(threadIdx.x + 1) % 64];
}

__global__ void past_shared_kernel(float* out) {
  FASTNORM_DYNAMIC_SHARED(float, value);
  value[threadIdx.x + (threadIdx.x == 63)] = 1;
  __syncthreads();
  out[threadIdx.x] = value[63 - threadIdx.x];
}

__global__ void past_global_kernel(const float* in, float* out) { out[threadIdx.x] = in[threadIdx.x + 1]; }

__global__ void misaligned_kernel(const float* in, float* out) {
  const float4 v = *reinterpret_cast<const float4*>(in + threadIdx.x);
  out[threadIdx.x] = v.x + v.w;
}

__global__ void two_blocks_one_output_kernel(float* out) { out[threadIdx.x] = 1; }

__global__ void missing_fence_kernel(int* part, unsigned* done, int* out) {
  part[blockIdx.x] = 1;
  if (atomicAdd(done, 1) == gridDim.x - 1)
    for (unsigned i = 0; i < gridDim.x; i++) *out += part[i];
}

bool ran(cudaError_t error) { return error == cudaSuccess; }

float memory[128];
int numbers[128];

const std::map<std::string, bool (*)()> kCases = {
    {"shuffles", shuffles},
    {"barriers", barriers},
    {"clusters", clusters},
    {"last_block", last_block},
    {"async_copies", async_copies},
    {"trace", trace},
    {"bad_launches", bad_launches},
    {"divergent_barrier", [] { return ran(launch(divergent_barrier_kernel, 1, 64, 0, nullptr)); }},
    {"two_barriers", [] { return ran(launch(two_barriers_kernel, 1, 64, 0, nullptr)); }},
    {"divergent_shuffle", [] { return ran(launch(divergent_shuffle_kernel, 1, 32, 0, nullptr, numbers)); }},
    {"foreign_mask", [] { return ran(launch(foreign_mask_kernel, 1, 32, 0, nullptr)); }},
    {"early_peer", [] { return ran(launch_cluster(early_peer_kernel, 2, 1, 2, 0, nullptr, memory)); }},
    {"late_peer",
     [] {
       if (!ran(launch_cluster(late_peer_kernel, 2, 32, 2, 0, nullptr, memory))) return false;
       for (int i = 0; i < 32; i++)
         if (memory[i] != 0) return false;
       return true;
     }},
    {"arrive_only", [] { return ran(launch_cluster(arrive_only_kernel, 2, 1, 2, 0, nullptr)); }},
    {"trap", [] { return ran(launch(trap_kernel, 2, 3, 0, nullptr)); }},
    {"too_much_shared", [] { return ran(launch(too_much_shared_kernel, 1, 32, 0, nullptr)); }},
    {"missing_barrier",
     [] {
       if (!ran(launch(missing_barrier_kernel, 1, 64, 0, nullptr, numbers))) return false;
       for (int i = 0; i < 64; i++)
         if (numbers[i] != (i + 1) % 64) return false;
       return true;
     }},
    {"past_shared", [] { return ran(launch(past_shared_kernel, 1, 64, 64 * sizeof(float), nullptr, memory)); }},
    {"past_global",
     [] {
       const std::vector<float> in(64);
       return ran(launch(past_global_kernel, 1, 64, 0, nullptr, in.data(), memory));
     }},
    {"misaligned", [] { return ran(launch(misaligned_kernel, 1, 2, 0, nullptr, memory, memory + 64)); }},
    {"two_blocks_one_output", [] { return ran(launch(two_blocks_one_output_kernel, 2, 64, 0, nullptr, memory)); }},
    {"missing_fence",
     [] {
       unsigned done = 0;
       return ran(launch(missing_fence_kernel, 3, 1, 0, nullptr, numbers, &done, numbers + 8)) && numbers[8] == 3;
     }},
};

}  // namespace

int main(int argc, char** argv) {
  const auto found = argc > 1 ? kCases.find(argv[1]) : kCases.end();
  if (found == kCases.end()) {
    std::fprintf(stderr, "no such case\n");
    return 2;
  }
  auto number = [&](int i, int otherwise) { return argc > i ? std::atoi(argv[i]) : otherwise; };
  fastnorm_emulator_configure(number(2, 0), uint64_t(number(3, 1)), unsigned(number(4, 1)), 4, 90, 64 << 10);
  const bool good = found->second();
  const std::string error = cuda_emulator::last_error();
  std::printf("%s\n", !error.empty() ? error.c_str() : good ? "ok" : "wrong result");
  return good ? 0 : 1;
}
