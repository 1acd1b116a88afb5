// From a channel's sums to the coefficients of dx and the gradients of the parameters.
#pragma once
#include "batch_norm.cuh"
#include "tiles_gradient.cuh"

namespace fastnorm {
namespace {

// The channel's coefficients from the sums of dz and dz * (x - mean), and, where write is set, the parameters'
// gradients.
template <class A>
__device__ Gradient<A> finish(const BatchNormBackward& a, int64_t channel, double sum, double product,
                              bool write_gradients) {
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

}  // namespace
}  // namespace fastnorm
