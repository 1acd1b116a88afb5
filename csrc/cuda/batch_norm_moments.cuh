// From a channel's moments to the affine map that forward applies, the saved statistics and the running ones.
#pragma once
#include "batch_norm.cuh"

namespace fastnorm {
namespace {

// The moments of a channel: its mean is base + delta, m2 the sum of squared distances from it.
struct Moments {
  double base, delta, m2;
};

// sum and square are those of x - base.
__device__ __forceinline__ Moments moments_about(double base, double sum, double square, double count) {
  const double delta = sum / count, m2 = square - sum * delta;
  return {base, delta, m2 < 0 ? 0 : m2};
}

// Turns a channel's moments into the affine map, and, where write is set, puts down the statistics and updates the
// running ones, `factor` being their momentum.
template <class A>
__device__ Affine<A> finish(const BatchNormForward& a, int64_t channel, const Moments& moments, double factor,
                            bool write_stats) {
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
        write(running, a.running_dtype, channel,
              (1 - factor) * read(running, a.running_dtype, channel) + factor * batch);
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

}  // namespace
}  // namespace fastnorm
