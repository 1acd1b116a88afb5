// What batch norm's backward kernels do with a slot, and with the sums of a channel.
#pragma once
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
__device__ __forceinline__ void accumulate(const A (&distance)[kLanes<T>], const A (&dz)[kLanes<T>],
                                           A (&sum)[kLanes<T>], A (&product)[kLanes<T>]) {
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

}  // namespace
}  // namespace fastnorm
