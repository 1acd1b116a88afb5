// Batch norm, backward.
//
//   dz = dy * activation'(z) = dresidual,  dbias = sum dz,  dweight = sum dz * (x - mean) * rstd
//   dx = (dz - dbias / count - (x - mean) * rstd * dweight / count) * rstd * weight;  in eval mode dz * rstd * weight
//
// Plan and bytes moved (S = bytes of x, m = S / 32 or S / 16 for the mask):
//   resident   one launch, 3S, + dresidual 4S + m.  x and dy of a group of channels are copied to the shared memory of one
//              block or of a cluster of 2 to 16 (sm_90); one pass takes the sums, a second writes dx and dresidual.
//   streamed   two launches, 5S, + dresidual 6S + 2m.  As forward: partial sums in double, added up in the prologue of the
//              second kernel, which goes backwards.
//   eval       where the parameters want no gradients one launch, 3S: the second kernel alone.
// Without a mask z is computed again from x (and residual: S more for each pass), by the operations of forward.
#include "batch_norm.cuh"

namespace fastnorm {
namespace {

// What a pass needs to know of a channel: z is affine(x) and
//   dx = dz * scale + (x - mean) * slope + offset.
template <class A>
struct Gradient {
  Affine<A> affine;
  A slope, offset;
};

// The channel's coefficients from the sums of dz and dz * (x - mean), and, where write is set, the parameters' gradients.
template <class A>
__device__ Gradient<A> finish(const BatchNormBackward& a, int64_t channel, double sum, double product, bool write_gradients) {
  const A* stats = static_cast<const A*>(a.stats);
  const A mean = stats[channel], low = stats[a.c + channel], rstd = stats[2 * a.c + channel];
  Gradient<A> g{make_affine(mean, low, rstd, a.weight, a.bias, a.param_dtype, channel), 0, 0};
  product -= double(low) * sum;
  if (write_gradients) {
    if (a.dbias) write(a.dbias, a.param_dtype, channel, sum);
    if (a.dweight) write(a.dweight, a.param_dtype, channel, product * double(rstd));
  }
  if (a.training) {
    const double count = double(a.n) * double(a.hw), scale = double(g.affine.scale);
    const double slope = -scale * double(rstd) * double(rstd) * (product / count);
    g.slope = A(slope);
    g.offset = A(-scale * (sum / count) - slope * double(low));
  }
  return g;
}

// What a pass needs beside x and dy.
struct Needs {
  bool residual, mask;
  __device__ explicit Needs(const BatchNormBackward& a)
      : residual(a.residual && !a.mask && a.activation != Activation::kNone),
        mask(a.mask && a.activation != Activation::kNone) {}
};

// distance = x - mean and dz of a slot; lanes where x and dy are both zeros because they are not valid give dz = 0.
template <class T, bool kSeveral, bool kGeneral, class A>
__device__ __forceinline__ void differentiate(const BatchNormBackward& a, const Affine<A> (&map)[kSums<T, kSeveral>],
                                              const Needs& needs, const Vector<T>& x, const Vector<T>& dy,
                                              const Vector<T>& residual, unsigned bits, A (&distance)[kLanes<T>],
                                              A (&dz)[kLanes<T>]) {
  constexpr int V = kLanes<T>;
  widen(distance, x);
  widen(dz, dy);
  A z[V];
#pragma unroll
  for (int i = 0; i < V; i++) {
    const Affine<A>& m = map[kSeveral ? i : 0];
    z[i] = m(distance[i]);
    distance[i] -= m.mean;
  }
  if (needs.residual) {
#pragma unroll
    for (int i = 0; i < V; i++) z[i] += widen(residual.lane[i]);
  }
  if constexpr (!kGeneral) {
    const bool rectify = a.activation == Activation::kRelu;
#pragma unroll
    for (int i = 0; i < V; i++) {
      const bool off = needs.mask ? !(bits >> i & 1) : z[i] <= 0;
      if (rectify && off) dz[i] = 0;
    }
  } else {
    const A negative_slope = A(a.negative_slope);
    with_activation(a.activation, [&](auto constant) {
      constexpr Activation kActivation = decltype(constant)::value;
#pragma unroll
      for (int i = 0; i < V; i++) {
        if constexpr (kTwoSlopes<kActivation>) {
          const bool on = needs.mask ? bits >> i & 1 : has_slope_one(kActivation, z[i]);
          if (!on) dz[i] = kActivation == Activation::kLeakyRelu ? dz[i] * negative_slope : A(0);
        } else {
          dz[i] *= activation_gradient(kActivation, z[i], negative_slope);
        }
      }
    });
  }
}

// Adds up dz and dz * (x - mean).
template <class T, class A>
__device__ __forceinline__ void accumulate(const A (&distance)[kLanes<T>], const A (&dz)[kLanes<T>], A (&sum)[kLanes<T>],
                                           A (&product)[kLanes<T>]) {
#pragma unroll
  for (int i = 0; i < kLanes<T>; i++) {
    sum[i] += dz[i];
    product[i] = fused(dz[i], distance[i], product[i]);
  }
}

template <class T, bool kSeveral, class A>
__device__ __forceinline__ void write_slot(const BatchNormBackward& a, const Gradient<A> (&g)[kSums<T, kSeveral>],
                                           const Slot& s, const A (&distance)[kLanes<T>], const A (&dz)[kLanes<T>]) {
  if (a.dresidual) store(static_cast<T*>(a.dresidual) + s.offset, narrow<T>(dz), s.valid);
  if (!a.dx) return;
  A dx[kLanes<T>];
#pragma unroll
  for (int i = 0; i < kLanes<T>; i++) {
    const Gradient<A>& c = g[kSeveral ? i : 0];
    dx[i] = a.training ? fused(dz[i], c.affine.scale, fused(distance[i], c.slope, c.offset)) : dz[i] * c.affine.scale;
  }
  store(static_cast<T*>(a.dx) + s.offset, narrow<T>(dx), s.valid);
}

// ---- Resident -------------------------------------------------------------------------------------------------------

template <class T, bool kSeveral, bool kGeneral>
__global__ void __launch_bounds__(kMaxThreads<T, kSeveral>)
    batch_norm_backward_resident_kernel(BatchNormBackward a, Tiles t, int cluster) {
  using A = Accumulate<T>;
  constexpr int V = kLanes<T>, P = kSums<T, kSeveral>, U = 2;
  FASTNORM_DYNAMIC_SHARED(unsigned char, memory);
  Shared shared{memory};
  const int g = t.group_channels;
  Vector<T>* xs = shared.take<Vector<T>>(t.block_slots());
  Vector<T>* dys = shared.take<Vector<T>>(t.block_slots());
  double* scratch = shared.take<double>(sum_scratch<T>(t));
  double* mine = shared.take<double>(2 * g);
  double* total = shared.take<double>(2 * g);
  Gradient<A>* gradients = shared.take<Gradient<A>>(g);
  uint8_t* bits = shared.take<uint8_t>(t.block_slots());

  const Place at = place(t);
  const Needs needs(a);
  const int thread = int(threadIdx.x), end = thread < t.step ? at.segments * t.slots : 0;
  const T* x = static_cast<const T*>(a.x);
  const T* dy = static_cast<const T*>(a.dy);
  const T* residual = static_cast<const T*>(a.residual);

  Walk<T> walk(t, at, thread);
  for (int k = thread; k < end; k += t.step, walk.advance()) {
    const Slot s = *walk;
    if (s.valid == kAllLanes<T>) {
      __pipeline_memcpy_async(&xs[k], x + s.offset, 16);
      __pipeline_memcpy_async(&dys[k], dy + s.offset, 16);
    } else {
      xs[k] = load(x + s.offset, s.valid);
      dys[k] = load(dy + s.offset, s.valid);
    }
    if (needs.mask) bits[k] = uint8_t(walk.mask_bits(a.mask, s));
  }
  __pipeline_commit();
  for (int i = thread; i < g; i += t.threads)
    gradients[i] = finish<A>(a, channel_number(t, at.group, i), 0, 0, false);
  __syncthreads();
  Gradient<A> c[P];
  Affine<A> map[P];
#pragma unroll
  for (int i = 0; i < P; i++) map[i] = gradients[channel_of_sum<T, kSeveral>(t, i)].affine;
  __pipeline_wait_prior(0);

  A sum[V] = {}, product[V] = {}, distance[V], dz[V];
  Walk<T> again(t, at, thread);
  for (int k = thread; k < end; k += U * t.step) {
    Vector<T> r[U];
    if (needs.residual) {
#pragma unroll
      for (int u = 0; u < U; u++, again.advance()) {
        const Slot s = *again;
        if (k + u * t.step < end) r[u] = load(residual + s.offset, s.valid);
      }
    }
#pragma unroll
    for (int u = 0; u < U; u++) {
      const int slot = k + u * t.step;
      if (slot >= end) break;
      differentiate<T, kSeveral, kGeneral>(a, map, needs, xs[slot], dys[slot], r[u], needs.mask ? bits[slot] : 0, distance, dz);
      accumulate<T>(distance, dz, sum, product);
    }
  }
  double value[P];
  collect<T, kSeveral>(value, sum);
  sum_channels<T, kSeveral>(t, value, scratch, mine);
  collect<T, kSeveral>(value, product);
  sum_channels<T, kSeveral>(t, value, scratch, mine + g);
  const double* sums = cluster_sum(mine, total, 2 * g, cluster);
  if (cluster > 1) cluster_arrive_relaxed();
  for (int i = thread; i < g; i += t.threads)
    gradients[i] = finish<A>(a, channel_number(t, at.group, i), sums[i], sums[g + i], owns(t, at, i));
  __syncthreads();

  if (a.dx || a.dresidual) {
#pragma unroll
    for (int i = 0; i < P; i++) c[i] = gradients[channel_of_sum<T, kSeveral>(t, i)];
    Walk<T> last(t, at, thread);
    for (int k = thread; k < end; k += U * t.step) {
      Slot s[U];
      Vector<T> r[U];
#pragma unroll
      for (int u = 0; u < U; u++, last.advance()) {
        s[u] = *last;
        if (needs.residual && k + u * t.step < end) r[u] = load(residual + s[u].offset, s[u].valid);
      }
#pragma unroll
      for (int u = 0; u < U; u++) {
        const int slot = k + u * t.step;
        if (slot >= end) break;
        differentiate<T, kSeveral, kGeneral>(a, map, needs, xs[slot], dys[slot], r[u], needs.mask ? bits[slot] : 0, distance, dz);
        write_slot<T, kSeveral>(a, c, s[u], distance, dz);
      }
    }
  }
  if (cluster > 1) cluster_wait();
}

template <class T>
size_t resident_bytes(const Tiles& t) {
  const int g = t.group_channels;
  return 2 * shared_bytes<Vector<T>>(t.block_slots()) + shared_bytes<double>(sum_scratch<T>(t)) +
         2 * shared_bytes<double>(2 * g) + shared_bytes<Gradient<Accumulate<T>>>(g) + shared_bytes<uint8_t>(t.block_slots());
}

// ---- Streamed -------------------------------------------------------------------------------------------------------

// Calls f(slot, distance, dz) for each slot of a thread.
template <class T, bool kSeveral, bool kGeneral, class A, class F>
__device__ __forceinline__ void stream(const BatchNormBackward& a, const Affine<A> (&map)[kSums<T, kSeveral>], const Tiles& t,
                                       const Place& at, F f) {
  constexpr int V = kLanes<T>, U = 2;
  const Needs needs(a);
  const int thread = int(threadIdx.x), end = thread < t.step ? at.segments * t.slots : 0;
  const T* __restrict__ x = static_cast<const T*>(a.x);
  const T* __restrict__ dy = static_cast<const T*>(a.dy);
  const T* __restrict__ residual = static_cast<const T*>(a.residual);
  Walk<T> walk(t, at, thread);
  for (int k = thread; k < end; k += U * t.step) {
    Slot s[U];
    Vector<T> vx[U], vdy[U], r[U];
    unsigned bits[U];
#pragma unroll
    for (int u = 0; u < U; u++, walk.advance()) {
      bits[u] = 0;
      if (k + u * t.step >= end) continue;
      s[u] = *walk;
      vx[u] = load(x + s[u].offset, s[u].valid);
      vdy[u] = load(dy + s[u].offset, s[u].valid);
      if (needs.residual) r[u] = load(residual + s[u].offset, s[u].valid);
      if (needs.mask) bits[u] = walk.mask_bits(a.mask, s[u]);
    }
#pragma unroll
    for (int u = 0; u < U; u++) {
      if (k + u * t.step >= end) break;
      A distance[V], dz[V];
      differentiate<T, kSeveral, kGeneral>(a, map, needs, vx[u], vdy[u], r[u], bits[u], distance, dz);
      f(s[u], distance, dz);
    }
  }
}

template <class T, bool kSeveral, bool kGeneral>
__global__ void __launch_bounds__(256) batch_norm_reduce_kernel(BatchNormBackward a, Tiles t, int cluster) {
  using A = Accumulate<T>;
  constexpr int V = kLanes<T>, P = kSums<T, kSeveral>;
  FASTNORM_DYNAMIC_SHARED(unsigned char, memory);
  Shared shared{memory};
  const int g = t.group_channels, thread = int(threadIdx.x);
  double* scratch = shared.take<double>(sum_scratch<T>(t));
  double* mine = shared.take<double>(2 * g);
  double* total = shared.take<double>(2 * g);
  Affine<A>* affine = shared.take<Affine<A>>(g);
  const Place at = place(t);
  for (int i = thread; i < g; i += t.threads)
    affine[i] = finish<A>(a, channel_number(t, at.group, i), 0, 0, false).affine;
  __syncthreads();
  Affine<A> map[P];
#pragma unroll
  for (int i = 0; i < P; i++) map[i] = affine[channel_of_sum<T, kSeveral>(t, i)];
  A sum[V] = {}, product[V] = {};
  stream<T, kSeveral, kGeneral>(a, map, t, at, [&](const Slot&, const A (&distance)[V], const A (&dz)[V]) {
    accumulate<T>(distance, dz, sum, product);
  });
  double value[P];
  collect<T, kSeveral>(value, sum);
  sum_channels<T, kSeveral>(t, value, scratch, mine);
  collect<T, kSeveral>(value, product);
  sum_channels<T, kSeveral>(t, value, scratch, mine + g);
  const double* sums = cluster_sum(mine, total, 2 * g, cluster);
  if (at.part % cluster == 0)
    write_partials(t, static_cast<double*>(a.workspace), at.part / cluster, at.group, sums, sums + g);
  if (cluster > 1) {
    cluster_arrive_relaxed();
    cluster_wait();
  }
}

template <class T>
size_t reduce_bytes(const Tiles& t) {
  const int g = t.group_channels;
  return shared_bytes<double>(sum_scratch<T>(t)) + 2 * shared_bytes<double>(2 * g) + shared_bytes<Affine<Accumulate<T>>>(g);
}

// dx and dresidual, from the partial sums of `parts`; without parts the sums are not needed.
template <class T, bool kSeveral, bool kGeneral>
__global__ void __launch_bounds__(256) batch_norm_gradient_kernel(BatchNormBackward a, Tiles t, int parts) {
  using A = Accumulate<T>;
  constexpr int V = kLanes<T>, P = kSums<T, kSeveral>;
  FASTNORM_DYNAMIC_SHARED(unsigned char, memory);
  Shared shared{memory};
  const int g = t.group_channels, thread = int(threadIdx.x);
  double* scratch = shared.take<double>(partial_scratch(t));
  double* sums = shared.take<double>(2 * g);
  Gradient<A>* gradients = shared.take<Gradient<A>>(g);
  const Place at = place(t, true);
  if (parts) sum_partials(t, static_cast<const double*>(a.workspace), parts, at.group, scratch, sums, sums + g);
  for (int i = thread; i < g; i += t.threads)
    gradients[i] = finish<A>(a, channel_number(t, at.group, i), parts ? sums[i] : 0, parts ? sums[g + i] : 0,
                             parts && owns(t, at, i));
  __syncthreads();
  if (!a.dx && !a.dresidual) return;
  Gradient<A> c[P];
  Affine<A> map[P];
#pragma unroll
  for (int i = 0; i < P; i++) c[i] = gradients[channel_of_sum<T, kSeveral>(t, i)], map[i] = c[i].affine;
  stream<T, kSeveral, kGeneral>(a, map, t, at, [&](const Slot& s, const A (&distance)[V], const A (&dz)[V]) {
    write_slot<T, kSeveral>(a, c, s, distance, dz);
  });
}

template <class T>
size_t gradient_bytes(const Tiles& t) {
  return shared_bytes<double>(partial_scratch(t)) + shared_bytes<double>(2 * t.group_channels) +
         shared_bytes<Gradient<Accumulate<T>>>(t.group_channels);
}

// ---- Launches -------------------------------------------------------------------------------------------------------

// Which kernels run, on what cuts.
template <class T>
struct BackwardPlan {
  const BatchNormBackward& a;
  bool several, sums;
  Tiles resident;  // without parts: streamed
  StreamedTiles streamed;

  template <bool kSeveral>
  auto resident_kernel() const {
    return is_simple(a.activation) ? batch_norm_backward_resident_kernel<T, kSeveral, false>
                                   : batch_norm_backward_resident_kernel<T, kSeveral, true>;
  }
  template <bool kSeveral>
  auto reduce_kernel() const {
    return is_simple(a.activation) ? batch_norm_reduce_kernel<T, kSeveral, false> : batch_norm_reduce_kernel<T, kSeveral, true>;
  }
  template <bool kSeveral>
  auto gradient_kernel() const {
    return is_simple(a.activation) ? batch_norm_gradient_kernel<T, kSeveral, false> : batch_norm_gradient_kernel<T, kSeveral, true>;
  }
  auto resident_kernel() const { return several ? resident_kernel<true>() : resident_kernel<false>(); }
  auto reduce_kernel() const { return several ? reduce_kernel<true>() : reduce_kernel<false>(); }
  auto gradient_kernel() const { return several ? gradient_kernel<true>() : gradient_kernel<false>(); }

  explicit BackwardPlan(const BatchNormBackward& a)
      : a(a), sums(a.dweight || a.dbias || (a.training && a.dx)), resident() {
    const int misalignment = common_misalignment({a.dy, a.x, a.residual, a.dx, a.dresidual}, sizeof(T));
    Tiles groups = make_groups<T>(a.n, a.c, a.hw, a.channels_last, misalignment, kResidentWidth);
    several = groups.several;
    if (sums)
      resident = resident_tiles<T>(groups, several ? kMaxThreads<T, true> : kMaxThreads<T, false>, resident_kernel(), resident_bytes<T>);
    if (resident.parts) return;
    groups = make_groups<T>(a.n, a.c, a.hw, a.channels_last, misalignment, kStreamedWidth);
    if (sums) streamed = streamed_tiles<T>(groups, reduce_kernel(), reduce_bytes<T>);
    else streamed.second = second_tiles<T>(groups);
    if (!a.dx && !a.dresidual) streamed.second = split<T>(groups, 1, 256);
  }
  size_t workspace() const {
    return !sums || resident.parts ? 0 : size_t(streamed.partials()) * 2 * size_t(streamed.first.channels) * sizeof(double);
  }
  cudaError_t run(cudaStream_t stream) const {
    if (!sums && !a.dx && !a.dresidual) return cudaSuccess;
    if (resident.parts)
      return launch_tiles(resident_kernel(), resident, resident.parts, resident_bytes<T>(resident), stream, a, resident.parts);
    const auto& [first, second, cluster] = streamed;
    if (sums) {
      const cudaError_t error = launch_tiles(reduce_kernel(), first, cluster, reduce_bytes<T>(first), stream, a, cluster);
      if (error != cudaSuccess) return error;
    }
    return launch_tiles(gradient_kernel(), second, 1, gradient_bytes<T>(second), stream, a, sums ? streamed.partials() : 0);
  }
};

}  // namespace

namespace cuda {

size_t batch_norm_backward_workspace(const BatchNormBackward& a) {
  return with_type(a.dtype, [&](auto type) { return BackwardPlan<decltype(type)>(a).workspace(); });
}

cudaError_t batch_norm_backward(const BatchNormBackward& a, cudaStream_t stream) {
  return with_type(a.dtype, [&](auto type) { return BackwardPlan<decltype(type)>(a).run(stream); });
}

}  // namespace cuda
}  // namespace fastnorm
