// A row's moments: exactly, in two passes, where it is in shared memory; in shifted sums where it is streamed.
#pragma once
#include "rows.cuh"

namespace fastnorm {
namespace {

// The mean is mean + low; RMS norm's is 0, and var the mean of squares.
template <class A>
struct RowStats {
  A mean, low, rstd, var;
};

// sum and square are those of x - mean, in the accumulate type or, where that overflowed, in double.
template <class A, class B>
__device__ __forceinline__ RowStats<A> finish_row(B mean, B sum, B square, B inverse_count, B eps, bool centred) {
  RowStats<A> s{0, 0, 0, 0};
  B delta = 0;
  if (centred) {
    delta = sum * inverse_count;
    s.mean = A(mean + delta);
    s.low = A((mean - B(s.mean)) + delta);
  }
  const B m2 = centred ? square - sum * delta : square, var = (m2 < 0 ? 0 : m2) * inverse_count;
  s.var = A(var);
  s.rstd = A(1 / sqrt(var + eps));
  return s;
}

// ---- In shared memory -----------------------------------------------------------------------------------------------

// The sum of a thread's elements; lanes that are not valid hold zeros.
template <class T, class B>
__device__ __forceinline__ B sum_slots(const Vector<T>* data, int begin, int end, int step) {
  constexpr int V = kLanes<T>;
  B sum[V] = {};
#pragma unroll(sizeof(B) == sizeof(Accumulate<T>) ? 4 : 1)
  for (int i = begin; i < end; i += step) {
#pragma unroll
    for (int k = 0; k < V; k++) sum[k] += B(widen(data[i].lane[k]));
  }
#pragma unroll
  for (int k = 1; k < V; k++) sum[0] += sum[k];
  return sum[0];
}

// The sums of the distances of a thread's elements from the mean, and of their squares.
template <class T, class B, class Part>
__device__ __forceinline__ void square_slots(const Part& part, const Vector<T>* data, int begin, int step, B mean,
                                             B (&to)[2]) {
  constexpr int V = kLanes<T>;
  B sum[V] = {}, square[V] = {};
  with_constant(part.t.whole, [&](auto whole) {
#pragma unroll(sizeof(B) == sizeof(Accumulate<T>) ? 4 : 1)
    for (int i = begin; i < part.count; i += step) {
      const unsigned valid = whole ? kAllLanes<T> : part[i].valid;
#pragma unroll
      for (int k = 0; k < V; k++) {
        const B distance = valid >> k & 1 ? B(widen(data[i].lane[k])) - mean : B(0);
        sum[k] += distance;
        square[k] = fused(distance, distance, square[k]);
      }
    }
  });
#pragma unroll
  for (int k = 1; k < V; k++) sum[0] += sum[k], square[0] += square[k];
  to[0] = sum[0], to[1] = square[0];
}

// The statistics of a team's row.  Where sums leave the accumulate type's range (values near 1e19 and up), they are
// taken again in double.
template <class T, class Part>
__device__ RowStats<Accumulate<T>> resident_moments(Team& team, const Part& part, const Vector<T>* data, double eps,
                                                    bool centred) {
  using A = Accumulate<T>;
  const double inverse = 1 / double(part.t.row_length());
  A mean = 0;
  if (centred) {
    A total[1] = {sum_slots<T, A>(data, team.lane, part.count, team.size)};
    team.sum(total);
    mean = total[0] * A(inverse);
    if constexpr (kOverflows<T>) {
      if (__any_sync(0xffffffffu, !finite(total[0]))) {
        double wide[1] = {sum_slots<T, double>(data, team.lane, part.count, team.size)};
        team.sum(wide);
        if (!finite(total[0])) mean = A(wide[0] * inverse);
      }
    }
  }
  A sums[2];
  square_slots<T, A>(part, data, team.lane, team.size, mean, sums);
  team.sum(sums);
  RowStats<A> stats = finish_row<A, A>(mean, sums[0], sums[1], A(inverse), A(eps), centred);
  if constexpr (kOverflows<T>) {
    const bool over = !finite(sums[0]) || out_of_range(sums[1], eps);
    if (__any_sync(0xffffffffu, over)) {
      double wide[2];
      square_slots<T, double>(part, data, team.lane, team.size, double(mean), wide);
      team.sum(wide);
      if (over) stats = finish_row<A, double>(double(mean), wide[0], wide[1], inverse, eps, centred);
    }
  }
  return stats;
}

// ---- Streamed -------------------------------------------------------------------------------------------------------

// Pairs of partial sums, wherever an op's kernels leave them.  A row is one of `groups` of a sample.
struct Partials {
  double* data;
  int groups, channels, parts, copies;         // of a sample; of a row; of a channel; of a part
  int64_t sample, group, channel, part, copy;  // how far apart they are
  int64_t second;                              // and the two sums of a pair

  __device__ __forceinline__ const double* row(int64_t number) const {
    const int64_t at = number / groups;
    return data + at * sample + (number - at * groups) * group;
  }
  // Adds up some of a channel's pairs.
  __device__ __forceinline__ void add(const double* from, int first, int step, double (&v)[2]) const {
    const int all = parts * copies;
#pragma unroll 4
    for (int i = first; i < all; i += step) {
      const int number = copies == 1 ? i : i / copies;
      const double* const at = from + number * part + (i - number * copies) * copy;
      v[0] += at[0], v[1] += at[second];
    }
  }
  // ... and of a row's, all channels of it.
  __device__ __forceinline__ void add_row(const double* from, int first, int step, double (&v)[2]) const {
    if (channels == 1) return add(from, first, step, v);
    const int all = parts * copies * channels;
#pragma unroll 4
    for (int i = first; i < all; i += step) {
      const int pair = i / channels, number = copies == 1 ? pair : pair / copies;
      const double* const at = from + (i - pair * channels) * channel + number * part + (pair - number * copies) * copy;
      v[0] += at[0], v[1] += at[second];
    }
  }
};

// Of a pair for each part of each row.
__host__ __device__ inline Partials row_partials(void* data, int parts) {
  return {static_cast<double*>(data), 1, 1, parts, 1, 2 * int64_t(parts), 0, 0, 2, 0, 1};
}

// What is needed to make rows' statistics of them.  They are of distances from the row's first element in x, where
// samples and groups have these distances, unless they are not centred.
struct RowFinish {
  Partials partials;
  int64_t rows;
  const void* x;
  DType dtype, stats_type;
  int64_t sample_length, group_length;
  double inverse_count, eps;
  bool centred, with_var;
  void* stats;
};

constexpr int kFinishThreads = 128;

// The two sums of a row, in all threads of its team: 32 of them or a block.
__device__ __forceinline__ void sum_partials(const Partials& p, int64_t row, int lane, int size, double* scratch,
                                             double (&v)[2]) {
  v[0] = v[1] = 0;
  const double* const from = p.row(row);
  p.add_row(from, lane, size, v);
  v[0] = warp_sum(v[0]), v[1] = warp_sum(v[1]);
  if (size == 32) return;
  __syncthreads();
  if (lane % 32 == 0) scratch[lane / 32] = v[0], scratch[32 + lane / 32] = v[1];
  __syncthreads();
  v[0] = v[1] = 0;
  for (int warp = 0; warp < size / 32; warp++) v[0] += scratch[warp], v[1] += scratch[32 + warp];
}

__global__ void __launch_bounds__(kFinishThreads) row_finish_kernel(RowFinish f, int size) {
  FASTNORM_SHARED(double, scratch, 64);
  const int index = int(threadIdx.x) / size, lane = int(threadIdx.x) % size;
  const int64_t row = int64_t(blockIdx.x) * (kFinishThreads / size) + index;
  double v[2];
  sum_partials(f.partials, min(row, f.rows - 1), lane, size, scratch, v);
  if (row >= f.rows || lane != 0) return;
  const int64_t sample = row / f.partials.groups;
  const int64_t first = sample * f.sample_length + (row - sample * f.partials.groups) * f.group_length;
  auto put = [&](int i, double value) { write(f.stats, f.stats_type, i * f.rows + row, value); };
  const double base = f.centred ? read(f.x, f.dtype, first) : 0;
  const RowStats<double> s = finish_row<double, double>(base, v[0], v[1], f.inverse_count, f.eps, f.centred);
  if (!f.centred) {
    put(0, s.rstd);
    return;
  }
  const double high = f.stats_type == DType::kFloat32 ? double(float(s.mean)) : s.mean;
  put(0, high);
  put(1, (s.mean - high) + s.low);
  put(2, s.rstd);
  if (f.with_var) put(3, s.var);
}

// Threads to a row: a warp, or a block where it has much to add up.
inline int finish_team(const Partials& p) {
  return int64_t(p.parts) * p.copies * p.channels > 128 ? kFinishThreads : 32;
}

inline cudaError_t launch_finish(const RowFinish& f, cudaStream_t stream) {
  const int size = finish_team(f.partials);
  const int64_t blocks = (f.rows * size + kFinishThreads - 1) / kFinishThreads;
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  return launch(row_finish_kernel, dim3(unsigned(blocks)), dim3(kFinishThreads), 0, stream, f, size);
}

}  // namespace
}  // namespace fastnorm
