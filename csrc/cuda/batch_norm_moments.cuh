// From a channel's moments to the affine map that forward applies, the saved statistics and the running ones.
#pragma once
#include "batch_norm.cuh"

namespace fastnorm {
namespace {

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

}  // namespace
}  // namespace fastnorm
