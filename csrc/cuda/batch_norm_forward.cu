// Batch norm, forward.
//
//   mean, var of each channel over n and hw;  running = (1 - momentum) * running + momentum * batch
//   z = (x - mean) * rstd * weight + bias,  y = activation(z + residual)
//
// Plan and bytes moved (S = bytes of x, m = S / 32 or S / 16 for the mask, if it is wanted):
//   resident   one launch, 2S, + residual 3S + m.  A group of channels is copied to the shared memory of one block or of
//              a cluster of 2 to 16 (sm_90), where two exact passes take the moments, the second about the mean, and a
//              third writes y.  Up to 3.5 MB for a group with clusters, else 227 KB (163 KB, 99 KB, 64 KB).
//   streamed   two launches, 3S, + residual 4S + m.  Sums about one of a thread's own elements, moved to the channel's
//              first element and added in double; every block of the second kernel adds its channels' partial sums in its
//              prologue, in the same order, and reads x in reverse order, from L2 as far as that goes.
//   eval       one launch, 2S, + residual 3S: the second kernel of these with the running statistics.
// The choice is by size alone (resident_tiles).  See batch_norm_tiles.cuh for how x is cut up.
#include "batch_norm.cuh"

namespace fastnorm {
namespace {

// ---- Statistics -----------------------------------------------------------------------------------------------------

// The moments of a channel: its mean is base + delta, m2 the sum of squared distances from it.
struct Moments {
  double base, delta, m2;
};

// sum and square are those of x - base.
__device__ __forceinline__ Moments moments_about(double base, double sum, double square, double count) {
  const double delta = sum / count, m2 = square - sum * delta;
  return {base, delta, m2 < 0 ? 0 : m2};
}

// Turns a channel's moments into the affine map, and, where write is set, puts down the statistics and updates the running
// ones, `factor` being their momentum.
template <class A>
__device__ Affine<A> finish(const BatchNormForward& a, int64_t channel, const Moments& moments, double factor, bool write_stats) {
  const double count = double(a.n) * double(a.hw), mean = moments.base + moments.delta, var = moments.m2 / count;
  const A high = A(mean), low = A((moments.base - double(high)) + moments.delta);
  const A rstd = A(1 / sqrt(var + a.eps));
  if (write_stats) {
    A* stats = static_cast<A*>(a.stats);
    stats[channel] = high;
    stats[a.c + channel] = low;
    stats[2 * a.c + channel] = rstd;
    auto update = [&](void* running, double batch) {
      if (running)
        write(running, a.running_dtype, channel, (1 - factor) * read(running, a.running_dtype, channel) + factor * batch);
    };
    update(a.running_mean, mean);
    update(a.running_var, moments.m2 / (count - 1));
  }
  return make_affine(high, low, rstd, a.weight, a.bias, a.param_dtype, channel);
}

// The same from the running statistics.
template <class A>
__device__ Affine<A> finish_eval(const BatchNormForward& a, int64_t channel, bool write_stats) {
  const double mean = read(a.running_mean, a.running_dtype, channel);
  const A high = A(mean), low = A(mean - double(high));
  const A rstd = A(1 / sqrt(read(a.running_var, a.running_dtype, channel) + a.eps));
  if (write_stats) {
    A* stats = static_cast<A*>(a.stats);
    stats[channel] = high;
    stats[a.c + channel] = low;
    stats[2 * a.c + channel] = rstd;
  }
  return make_affine(high, low, rstd, a.weight, a.bias, a.param_dtype, channel);
}

__global__ void batch_norm_count_kernel(int64_t* num_batches_tracked) { ++*num_batches_tracked; }

// ---- A thread's sums ------------------------------------------------------------------------------------------------

// Whether sums of squares of values of this type may be too large for its accumulate type, but not for double.
template <class T>
constexpr bool kOverflows = std::is_same_v<T, float> || std::is_same_v<T, __nv_bfloat16>;

template <int n>
__device__ __forceinline__ void set_zero(double (&v)[n]) {
#pragma unroll
  for (int i = 0; i < n; i++) v[i] = 0;
}

__device__ __forceinline__ void add_distance(double distance, double& sum, double& square) {
  sum += distance;
  square = fused(distance, distance, square);
}

template <class T, bool kSeveral>
__device__ __forceinline__ void fill_invalid(Accumulate<T> (&x)[kLanes<T>], unsigned valid,
                                             const Accumulate<T> (&with)[kSums<T, kSeveral>]) {
#pragma unroll
  for (int i = 0; i < kLanes<T>; i++)
    if (!(valid >> i & 1)) x[i] = with[kSeveral ? i : 0];
}

// Each comes in two forms: A sums per lane, fast; and, for the threads where those overflowed (finite values near
// 1e20 and up), sums in double.  Invalid lanes are zeros.

// to[...] = the sums of a thread's elements in shared memory.
template <class T, bool kSeveral>
__device__ __forceinline__ void sum_resident(const Vector<T>* data, int begin, int end, int step,
                                             double (&to)[kSums<T, kSeveral>]) {
  constexpr int V = kLanes<T>;
  Accumulate<T> sum[V] = {}, x[V];
#pragma unroll 4
  for (int k = begin; k < end; k += step) {
    widen(x, data[k]);
#pragma unroll
    for (int i = 0; i < V; i++) sum[i] += x[i];
  }
  if (collect<T, kSeveral>(to, sum) || !kOverflows<T>) return;
  set_zero(to);
#pragma unroll 1
  for (int k = begin; k < end; k += step) {
    widen(x, data[k]);
#pragma unroll
    for (int i = 0; i < V; i++) to[kSeveral ? i : 0] += double(x[i]);
  }
}

// The same of the distances from the mean, and of their squares; valid has the lanes of each slot, or is null.
template <class T, bool kSeveral>
__device__ __forceinline__ void square_resident(const Vector<T>* data, const uint8_t* valid, int begin, int end, int step,
                                                const Accumulate<T> (&mean)[kSums<T, kSeveral>],
                                                double (&to)[kSums<T, kSeveral>], double (&squares)[kSums<T, kSeveral>]) {
  constexpr int V = kLanes<T>;
  Accumulate<T> sum[V] = {}, square[V] = {}, x[V];
  auto read = [&](int k) {
    widen(x, data[k]);
    if (valid) fill_invalid<T, kSeveral>(x, valid[k], mean);
  };
#pragma unroll 4
  for (int k = begin; k < end; k += step) {
    read(k);
#pragma unroll
    for (int i = 0; i < V; i++) {
      const Accumulate<T> distance = x[i] - mean[kSeveral ? i : 0];
      sum[i] += distance;
      square[i] = fused(distance, distance, square[i]);
    }
  }
  collect<T, kSeveral>(to, sum);
  if (collect<T, kSeveral>(squares, square) || !kOverflows<T>) return;
  set_zero(to), set_zero(squares);
#pragma unroll 1
  for (int k = begin; k < end; k += step) {
    read(k);
#pragma unroll
    for (int i = 0; i < V; i++) add_distance(double(x[i]) - double(mean[kSeveral ? i : 0]), to[kSeveral ? i : 0], squares[kSeveral ? i : 0]);
  }
}

// ---- Resident -------------------------------------------------------------------------------------------------------

template <class T, bool kSeveral, bool kGeneral>
__global__ void __launch_bounds__(kMaxThreads<T, kSeveral>)
    batch_norm_forward_resident_kernel(BatchNormForward a, Tiles t, int cluster) {
  using A = Accumulate<T>;
  constexpr int V = kLanes<T>, P = kSums<T, kSeveral>, U = 2;
  FASTNORM_DYNAMIC_SHARED(unsigned char, memory);
  Shared shared{memory};
  const int g = t.group_channels;
  Vector<T>* data = shared.take<Vector<T>>(t.block_slots());
  double* scratch = shared.take<double>(sum_scratch<T>(t));
  double* mine = shared.take<double>(3 * g);
  double* total = shared.take<double>(3 * g);
  Affine<A>* affine = shared.take<Affine<A>>(g);
  uint8_t* bits = shared.take<uint8_t>(t.block_slots());

  const Place at = place(t);
  const int thread = int(threadIdx.x), end = thread < t.step ? at.segments * t.slots : 0;
  const T* x = static_cast<const T*>(a.x);
  const T* residual = static_cast<const T*>(a.residual);
  T* y = static_cast<T*>(a.y);
  const double count = double(a.n) * double(a.hw);

  Walk<T> walk(t, at, thread);
  for (int k = thread; k < end; k += t.step, walk.advance()) {
    const Slot s = *walk;
    if (s.valid == kAllLanes<T>) __pipeline_memcpy_async(&data[k], x + s.offset, 16);
    else data[k] = load(x + s.offset, s.valid);
    if (t.partial) bits[k] = uint8_t(s.valid);
  }
  __pipeline_commit();
  __pipeline_wait_prior(0);

  // The mean, and then both moments about it.
  A mean[P];
  double value[P], squares[P];
  {
    sum_resident<T, kSeveral>(data, thread, end, t.step, value);
    sum_channels<T, kSeveral>(t, value, scratch, mine);
    const double* sums = cluster_sum(mine, total, g, cluster);
    for (int i = thread; i < g; i += t.threads) affine[i].mean = A(sums[i] / count);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < P; i++) mean[i] = affine[channel_of_sum<T, kSeveral>(t, i)].mean;
  }
  {
    square_resident<T, kSeveral>(data, t.partial ? bits : nullptr, thread, end, t.step, mean, value, squares);
    sum_channels<T, kSeveral>(t, value, scratch, mine + g);
    sum_channels<T, kSeveral>(t, squares, scratch, mine + 2 * g);
    const double* sums = cluster_sum(mine + g, total + g, 2 * g, cluster);
    if (cluster > 1) cluster_arrive_relaxed();
    double factor = a.momentum;
    if (a.cumulative && a.num_batches_tracked) factor = 1 / double(*a.num_batches_tracked + 1);
    for (int i = thread; i < g; i += t.threads) {
      const Moments moments = moments_about(double(affine[i].mean), sums[i], sums[g + i], count);
      affine[i] = finish<A>(a, channel_number(t, at.group, i), moments, factor, owns(t, at, i));
    }
    if (blockIdx.x == 0 && thread == 0 && a.num_batches_tracked && !a.cumulative) ++*a.num_batches_tracked;
    __syncthreads();
  }

  Affine<A> map[P];
#pragma unroll
  for (int i = 0; i < P; i++) map[i] = affine[channel_of_sum<T, kSeveral>(t, i)];
  Walk<T> again(t, at, thread);
  const A negative_slope = A(a.negative_slope);
  for (int k = thread; k < end; k += U * t.step) {
    Slot s[U];
    Vector<T> r[U];
#pragma unroll
    for (int u = 0; u < U; u++, again.advance()) {
      s[u] = *again;
      if (residual && k + u * t.step < end) r[u] = load(residual + s[u].offset, s[u].valid);
    }
#pragma unroll
    for (int u = 0; u < U; u++) {
      const int slot = k + u * t.step;
      if (slot >= end) break;
      A z[V];
      widen(z, data[slot]);
#pragma unroll
      for (int i = 0; i < V; i++) z[i] = map[kSeveral ? i : 0](z[i]);
      if (residual) {
#pragma unroll
        for (int i = 0; i < V; i++) z[i] += widen(r[u].lane[i]);
      }
      const unsigned on = activate_lanes<T, kGeneral>(a.activation, z, negative_slope);
      store(y + s[u].offset, narrow<T>(z), s[u].valid);
      if (a.mask) bits[slot] = uint8_t(on);
    }
  }
  if (a.mask) {
    __syncthreads();
    write_mask<T>(t, at, 0, at.segments, bits, a.mask);
  }
  if (cluster > 1) cluster_wait();
}

template <class T>
size_t resident_bytes(const Tiles& t) {
  const int g = t.group_channels;
  return shared_bytes<Vector<T>>(t.block_slots()) + shared_bytes<double>(sum_scratch<T>(t)) +
         2 * shared_bytes<double>(3 * g) + shared_bytes<Affine<Accumulate<T>>>(g) + shared_bytes<uint8_t>(t.block_slots());
}

// ---- Streamed -------------------------------------------------------------------------------------------------------

// The sums of a thread's distances from shift and of their squares.
template <class T, bool kSeveral>
__device__ __forceinline__ void square_streamed(const T* __restrict__ x, Walk<T> walk, int begin, int end, int step,
                                                const Accumulate<T> (&shift)[kSums<T, kSeveral>],
                                                double (&to)[kSums<T, kSeveral>], double (&squares)[kSums<T, kSeveral>]) {
  constexpr int V = kLanes<T>, U = 4;
  const Walk<T> start = walk;
  Accumulate<T> sum[V] = {}, square[V] = {};
  for (int k = begin; k < end; k += U * step) {
    Vector<T> v[U];
    unsigned valid[U];
#pragma unroll
    for (int u = 0; u < U; u++, walk.advance()) {
      if (k + u * step >= end) continue;
      const Slot s = *walk;
      v[u] = load(x + s.offset, s.valid);
      valid[u] = s.valid;
    }
#pragma unroll
    for (int u = 0; u < U; u++) {
      if (k + u * step >= end) break;
      Accumulate<T> value[V];
      widen(value, v[u]);
      if (valid[u] != kAllLanes<T>) fill_invalid<T, kSeveral>(value, valid[u], shift);
#pragma unroll
      for (int i = 0; i < V; i++) {
        const Accumulate<T> distance = value[i] - shift[kSeveral ? i : 0];
        sum[i] += distance;
        square[i] = fused(distance, distance, square[i]);
      }
    }
  }
  collect<T, kSeveral>(to, sum);
  if (collect<T, kSeveral>(squares, square) || !kOverflows<T>) return;
  set_zero(to), set_zero(squares);
  Walk<T> again = start;
#pragma unroll 1
  for (int k = begin; k < end; k += step, again.advance()) {
    const Slot s = *again;
    Accumulate<T> value[V];
    widen(value, load(x + s.offset, s.valid));
    fill_invalid<T, kSeveral>(value, s.valid, shift);
#pragma unroll
    for (int i = 0; i < V; i++) add_distance(double(value[i]) - double(shift[kSeveral ? i : 0]), to[kSeveral ? i : 0], squares[kSeveral ? i : 0]);
  }
}

// How many of a thread's elements belong to each of its sums.
template <class T, bool kSeveral>
__device__ __forceinline__ void count_elements(const Tiles& t, Walk<T> walk, int begin, int end, int (&count)[kSums<T, kSeveral>]) {
  const int slots = begin < end ? (end - begin + t.step - 1) / t.step : 0;
#pragma unroll
  for (int i = 0; i < kSums<T, kSeveral>; i++) count[i] = kSeveral ? slots : slots * kLanes<T>;
  if (!t.partial) return;
  for (int k = begin; k < end; k += t.step, walk.advance()) {
    const unsigned missing = ~(*walk).valid & kAllLanes<T>;
    if constexpr (kSeveral) {
#pragma unroll
      for (int i = 0; i < kLanes<T>; i++) count[i] -= missing >> i & 1;
    } else {
      count[0] -= __popc(missing);
    }
  }
}

// Where the sums of a channel are taken about: its first element.
template <class T>
__device__ __forceinline__ double base_of(const BatchNormForward& a, int64_t channel) {
  return double(widen(static_cast<const T*>(a.x)[a.channels_last ? channel : channel * a.hw]));
}

template <class T, bool kSeveral>
__global__ void __launch_bounds__(256) batch_norm_statistics_kernel(BatchNormForward a, Tiles t, int cluster) {
  using A = Accumulate<T>;
  constexpr int P = kSums<T, kSeveral>;
  FASTNORM_DYNAMIC_SHARED(unsigned char, memory);
  Shared shared{memory};
  const int g = t.group_channels;
  double* scratch = shared.take<double>(sum_scratch<T>(t));
  double* mine = shared.take<double>(2 * g);
  double* total = shared.take<double>(2 * g);
  const Place at = place(t);
  const int thread = int(threadIdx.x), end = thread < t.step ? at.segments * t.slots : 0;
  const T* x = static_cast<const T*>(a.x);
  const Walk<T> walk(t, at, thread);

  // About a thread's first elements, so that one outlier spoils little; then, exactly, about the channel's.
  A shift[P];
#pragma unroll
  for (int i = 0; i < P; i++) shift[i] = 0;
  if (thread < end) {
    const Slot s = *walk;
    const unsigned valid = s.valid & kAllLanes<T>;
    if constexpr (kSeveral) {
#pragma unroll
      for (int i = 0; i < P; i++)
        if (valid >> i & 1) shift[i] = widen(x[s.offset + i]);
    } else {
      if (valid) shift[0] = widen(x[s.offset + __ffs(int(valid)) - 1]);
    }
  }
  double value[P], squares[P];
  square_streamed<T, kSeveral>(x, walk, thread, end, t.step, shift, value, squares);
  int count[P];
  count_elements<T, kSeveral>(t, walk, thread, end, count);
#pragma unroll
  for (int i = 0; i < P; i++) {
    if (count[i] == 0) continue;
    const double d = double(shift[i]) - base_of<T>(a, channel_number(t, at.group, channel_of_sum<T, kSeveral>(t, i)));
    squares[i] += d * (2 * value[i] + count[i] * d);
    value[i] += count[i] * d;
  }
  sum_channels<T, kSeveral>(t, value, scratch, mine);
  sum_channels<T, kSeveral>(t, squares, scratch, mine + g);
  const double* sums = cluster_sum(mine, total, 2 * g, cluster);
  if (at.part % cluster == 0) write_partials(t, static_cast<double*>(a.workspace), at.part / cluster, at.group, sums, sums + g);
  if (blockIdx.x == 0 && thread == 0 && a.num_batches_tracked) ++*a.num_batches_tracked;
  if (cluster > 1) {
    cluster_arrive_relaxed();
    cluster_wait();
  }
}

template <class T>
size_t statistics_bytes(const Tiles& t) {
  return shared_bytes<double>(sum_scratch<T>(t)) + 2 * shared_bytes<double>(2 * t.group_channels);
}

constexpr int kChunkSlots = 4096;  // between two barriers, where a mask is written

// y from the partial sums of `parts`, or, in eval mode, from the running statistics.
template <class T, bool kSeveral, bool kGeneral>
__global__ void __launch_bounds__(256) batch_norm_apply_kernel(BatchNormForward a, Tiles t, int parts) {
  using A = Accumulate<T>;
  constexpr int V = kLanes<T>, P = kSums<T, kSeveral>, U = kSeveral ? 2 : 4;
  FASTNORM_DYNAMIC_SHARED(unsigned char, memory);
  Shared shared{memory};
  const int g = t.group_channels, thread = int(threadIdx.x);
  const Place at = place(t, true);
  Affine<A>* affine = shared.take<Affine<A>>(g);
  double* scratch = shared.take<double>(partial_scratch(t));
  double* sums = shared.take<double>(2 * g);
  uint8_t* bits = reinterpret_cast<uint8_t*>(scratch);  // later

  if (a.training) {
    sum_partials(t, static_cast<const double*>(a.workspace), parts, at.group, scratch, sums, sums + g);
    const double count = double(a.n) * double(a.hw);
    double factor = a.momentum;
    if (a.cumulative && a.num_batches_tracked) factor = 1 / double(*a.num_batches_tracked);
    for (int i = thread; i < g; i += t.threads) {
      const int64_t channel = channel_number(t, at.group, i);
      const Moments moments = moments_about(base_of<T>(a, channel), sums[i], sums[g + i], count);
      affine[i] = finish<A>(a, channel, moments, factor, owns(t, at, i));
    }
  } else {
    for (int i = thread; i < g; i += t.threads)
      affine[i] = finish_eval<A>(a, channel_number(t, at.group, i), owns(t, at, i));
  }
  __syncthreads();
  Affine<A> map[P];
#pragma unroll
  for (int i = 0; i < P; i++) map[i] = affine[channel_of_sum<T, kSeveral>(t, i)];

  const T* __restrict__ x = static_cast<const T*>(a.x);
  const T* __restrict__ residual = static_cast<const T*>(a.residual);
  T* __restrict__ y = static_cast<T*>(a.y);
  const A negative_slope = A(a.negative_slope);
  const int chunk = a.mask ? max(1, kChunkSlots / t.slots) : at.segments;
  for (int begin = 0; begin < at.segments; begin += chunk) {
    const int chunk_segments = min(chunk, at.segments - begin);
    const int end = thread < t.step ? chunk_segments * t.slots : 0;
    Walk<T> walk(t, at, begin * t.slots + thread);
    for (int k = thread; k < end; k += U * t.step) {
      Slot s[U];
      Vector<T> v[U], r[U];
#pragma unroll
      for (int u = 0; u < U; u++, walk.advance()) {
        if (k + u * t.step >= end) continue;
        s[u] = *walk;
        v[u] = load(x + s[u].offset, s[u].valid);
        if (residual) r[u] = load(residual + s[u].offset, s[u].valid);
      }
#pragma unroll
      for (int u = 0; u < U; u++) {
        if (k + u * t.step >= end) break;
        A z[V];
        widen(z, v[u]);
#pragma unroll
        for (int i = 0; i < V; i++) z[i] = map[kSeveral ? i : 0](z[i]);
        if (residual) {
#pragma unroll
          for (int i = 0; i < V; i++) z[i] += widen(r[u].lane[i]);
        }
        const unsigned on = activate_lanes<T, kGeneral>(a.activation, z, negative_slope);
        store(y + s[u].offset, narrow<T>(z), s[u].valid);
        if (a.mask) bits[k + u * t.step] = uint8_t(on);
      }
    }
    if (a.mask) {
      __syncthreads();
      write_mask<T>(t, at, begin, chunk_segments, bits, a.mask);
      __syncthreads();
    }
  }
}

template <class T>
size_t apply_bytes(const Tiles& t, bool mask) {
  const size_t scratch = shared_bytes<double>(partial_scratch(t)) + shared_bytes<double>(2 * t.group_channels);
  const size_t bits = mask ? shared_bytes<uint8_t>(std::max(kChunkSlots, t.slots)) : 0;
  return shared_bytes<Affine<Accumulate<T>>>(t.group_channels) + std::max(scratch, bits);
}

// ---- Launches -------------------------------------------------------------------------------------------------------

// Which kernels run, on what cuts.
template <class T>
struct ForwardPlan {
  const BatchNormForward& a;
  bool several;
  Tiles resident;  // without parts: streamed
  StreamedTiles streamed;

  template <bool kSeveral>
  auto resident_kernel() const {
    return is_simple(a.activation) ? batch_norm_forward_resident_kernel<T, kSeveral, false>
                                   : batch_norm_forward_resident_kernel<T, kSeveral, true>;
  }
  template <bool kSeveral>
  auto apply_kernel() const {
    return is_simple(a.activation) ? batch_norm_apply_kernel<T, kSeveral, false> : batch_norm_apply_kernel<T, kSeveral, true>;
  }
  auto resident_kernel() const { return several ? resident_kernel<true>() : resident_kernel<false>(); }
  auto apply_kernel() const { return several ? apply_kernel<true>() : apply_kernel<false>(); }
  auto statistics_kernel() const { return several ? batch_norm_statistics_kernel<T, true> : batch_norm_statistics_kernel<T, false>; }

  explicit ForwardPlan(const BatchNormForward& a) : a(a), resident() {
    const int misalignment = common_misalignment({a.x, a.residual, a.y}, sizeof(T));
    Tiles groups = make_groups<T>(a.n, a.c, a.hw, a.channels_last, misalignment, kResidentWidth);
    several = groups.several;
    if (a.training)
      resident = resident_tiles<T>(groups, several ? kMaxThreads<T, true> : kMaxThreads<T, false>, resident_kernel(), resident_bytes<T>);
    if (resident.parts) return;
    groups = make_groups<T>(a.n, a.c, a.hw, a.channels_last, misalignment, kStreamedWidth);
    if (a.training) streamed = streamed_tiles<T>(groups, statistics_kernel(), statistics_bytes<T>);
    else streamed.second = second_tiles<T>(groups);
  }
  size_t workspace() const {
    return !a.training || resident.parts ? 0 : size_t(streamed.partials()) * 2 * size_t(streamed.first.channels) * sizeof(double);
  }
  cudaError_t run(cudaStream_t stream) const {
    if (resident.parts) {
      const cudaError_t error =
          launch_tiles(resident_kernel(), resident, resident.parts, resident_bytes<T>(resident), stream, a, resident.parts);
      if (error != cudaSuccess || !a.cumulative || !a.num_batches_tracked) return error;
      return launch(batch_norm_count_kernel, dim3(1), dim3(1), 0, stream, a.num_batches_tracked);
    }
    const auto& [first, second, cluster] = streamed;
    if (a.training) {
      const cudaError_t error =
          launch_tiles(statistics_kernel(), first, cluster, statistics_bytes<T>(first), stream, a, cluster);
      if (error != cudaSuccess) return error;
    }
    return launch_tiles(apply_kernel(), second, 1, apply_bytes<T>(second, a.mask != nullptr), stream, a,
                        a.training ? streamed.partials() : 0);
  }
};

}  // namespace

namespace cuda {

size_t batch_norm_forward_workspace(const BatchNormForward& a) {
  return with_type(a.dtype, [&](auto type) { return ForwardPlan<decltype(type)>(a).workspace(); });
}

cudaError_t batch_norm_forward(const BatchNormForward& a, cudaStream_t stream) {
  return with_type(a.dtype, [&](auto type) { return ForwardPlan<decltype(type)>(a).run(stream); });
}

}  // namespace cuda
}  // namespace fastnorm
