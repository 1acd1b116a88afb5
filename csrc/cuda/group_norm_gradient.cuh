// Group norm, backward: from sums per channel of a sample to the coefficients of dx and the parameters' gradients.
#pragma once
#include "group_norm.cuh"

namespace fastnorm {
namespace {

__host__ __device__ inline bool wants_parameters(const GroupNormBackward& a) { return a.dweight || a.dbias; }

// dx = dz * scale + (x - mean) * slope + offset, the last two the same for a group.
template <class A>
struct GroupGradient {
  A slope, offset;
};

// sums are those of dz * weight and of dz * weight * (x - mean), over the group.
template <class A>
__device__ __forceinline__ GroupGradient<A> group_gradient(const RowStats<A>& s, double sum, double product,
                                                           double count) {
  const double rstd = double(s.rstd), low = double(s.low);
  const double slope = -rstd * rstd * rstd * ((product - low * sum) / count);
  return {A(slope), A(-rstd * (sum / count) - slope * low)};
}

// The workspace: for each part of a group the sums of dz and of dz * (x - mean) per channel, [parts][2][n * c]; where
// groups are streamed, their gradients' coefficients, A [n * groups][2]; and partial sums.
struct GroupWorkspace {
  double* channels;
  void* groups;
  double* partials;
  size_t bytes;

  GroupWorkspace(const GroupNormBackward& a, int parts, bool streamed, size_t partial_bytes) {
    const size_t first = size_t(parts) * 2 * size_t(a.n * a.c) * sizeof(double);
    const size_t second = streamed ? size_t(a.n * a.groups) * 2 * sizeof(double) : 0;
    char* const start = static_cast<char*>(a.workspace);
    channels = reinterpret_cast<double*>(start);
    groups = start + first;
    partials = reinterpret_cast<double*>(start + first + second);
    bytes = first + second + partial_bytes;
  }
};

// ---- Streamed: from partial sums ------------------------------------------------------------------------------------

// A team of `size` threads to a group, `lanes` of them (1 or 32) to each channel.
__global__ void __launch_bounds__(kFinishThreads)
    group_norm_gradient_finish_kernel(GroupNormBackward a, Partials p, double* channels, void* groups, DType type,
                                      int size, int lanes) {
  FASTNORM_SHARED(double, scratch, 64);
  const int64_t rows = a.n * a.groups, each = a.c / a.groups;
  const int index = int(threadIdx.x) / size, lane = int(threadIdx.x) % size;
  const int64_t number = int64_t(blockIdx.x) * (kFinishThreads / size) + index, row = min(number, rows - 1);
  const double* const from = p.row(row);
  double v[2] = {0, 0};
  for (int64_t channel = lane / lanes; channel < each; channel += size / lanes) {
    double sums[2] = {0, 0};
    p.add(from + channel * p.channel, lane % lanes, lanes, sums);
    if (lanes == 32) sums[0] = warp_sum(sums[0]), sums[1] = warp_sum(sums[1]);
    if (lane % lanes != 0) continue;
    const double weight = a.weight ? read(a.weight, a.param_dtype, row % a.groups * each + channel) : 1;
    v[0] += weight * sums[0], v[1] += weight * sums[1];
    if (number >= rows) continue;
    channels[row * each + channel] = sums[0];
    channels[a.n * a.c + row * each + channel] = sums[1];
  }
  v[0] = warp_sum(v[0]), v[1] = warp_sum(v[1]);
  if (size > 32) {
    if (lane % 32 == 0) scratch[lane / 32] = v[0], scratch[32 + lane / 32] = v[1];
    __syncthreads();
    v[0] = v[1] = 0;
    for (int warp = 0; warp < size / 32; warp++) v[0] += scratch[warp], v[1] += scratch[32 + warp];
  }
  if (number >= rows || lane != 0) return;
  const RowStats<double> stats{read(a.stats, type, row), read(a.stats, type, rows + row),
                               read(a.stats, type, 2 * rows + row), 0};
  const GroupGradient<double> g = group_gradient(stats, v[0], v[1], double(each) * double(a.hw));
  write(groups, type, 2 * row, g.slope);
  write(groups, type, 2 * row + 1, g.offset);
}

inline cudaError_t launch_gradient_finish(const GroupNormBackward& a, const Partials& p, const GroupWorkspace& to,
                                          cudaStream_t stream) {
  const int size = finish_team(p), lanes = p.parts * p.copies > 4 ? 32 : 1;
  const int64_t blocks = (a.n * a.groups * size + kFinishThreads - 1) / kFinishThreads;
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  return launch(group_norm_gradient_finish_kernel, dim3(unsigned(blocks)), dim3(kFinishThreads), 0, stream, a, p,
                to.channels, to.groups, accumulate_type(a.dtype), size, lanes);
}

// ---- The parameters' gradients --------------------------------------------------------------------------------------

constexpr int kParameterChannels = 32, kParameterTeams = 8;

// Sums over the samples, always in the same order.
__global__ void __launch_bounds__(kParameterChannels* kParameterTeams)
    group_norm_parameter_kernel(GroupNormBackward a, const double* channels, DType type, int parts) {
  constexpr int kThreads = kParameterChannels * kParameterTeams;
  FASTNORM_SHARED(double, scratch, 2 * kThreads);
  const int lane = int(threadIdx.x) % kParameterChannels, team = int(threadIdx.x) / kParameterChannels;
  const int64_t channel = int64_t(blockIdx.x) * kParameterChannels + lane, all = a.n * a.c, rows = a.n * a.groups;
  double weight = 0, bias = 0;
  if (channel < a.c) {
    const int64_t group = channel / (a.c / a.groups);
    for (int64_t sample = team; sample < a.n; sample += kParameterTeams) {
      const int64_t row = sample * a.groups + group;
      double sum = 0, product = 0;
      for (int part = 0; part < parts; part++) {
        const double* const from = channels + 2 * part * all + sample * a.c + channel;
        sum += from[0], product += from[all];
      }
      weight += (product - read(a.stats, type, rows + row) * sum) * read(a.stats, type, 2 * rows + row);
      bias += sum;
    }
  }
  scratch[threadIdx.x] = weight, scratch[kThreads + int(threadIdx.x)] = bias;
  __syncthreads();
  if (team > 1 || channel >= a.c) return;
  void* const to = team == 0 ? a.dweight : a.dbias;
  if (!to) return;
  double sum = 0;
  for (int i = 0; i < kParameterTeams; i++) sum += scratch[team * kThreads + i * kParameterChannels + lane];
  write(to, a.param_dtype, channel, sum);
}

inline cudaError_t launch_parameters(const GroupNormBackward& a, const GroupWorkspace& from, int parts,
                                     cudaStream_t stream) {
  if (!wants_parameters(a)) return cudaSuccess;
  const int64_t blocks = (a.c + kParameterChannels - 1) / kParameterChannels;
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  return launch(group_norm_parameter_kernel, dim3(unsigned(blocks)), dim3(kParameterChannels * kParameterTeams), 0,
                stream, a, from.channels, accumulate_type(a.dtype), parts);
}

}  // namespace
}  // namespace fastnorm
