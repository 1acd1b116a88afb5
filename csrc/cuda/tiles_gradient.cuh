// What backward kernels do with the slots of their tiles; Args is the op's struct.
#pragma once
#include "norm.cuh"
#include "tiles_mask.cuh"
#include "tiles_sums.cuh"

namespace fastnorm {
namespace {

// distance = x - mean and dz of a slot; lanes where x and dy are both zeros because they are not valid give dz = 0.
template <class T, bool kSeveral, bool kGeneral, class Args, class A>
__device__ __forceinline__ void differentiate(const Args& a, const Affine<A> (&map)[kSums<T, kSeveral>],
                                              const Needs& needs, const Vector<T>& x, const Vector<T>& dy,
                                              const Vector<T>& residual, unsigned bits, A (&distance)[kLanes<T>],
                                              A (&dz)[kLanes<T>]) {
  constexpr int V = kLanes<T>;
  widen(distance, x);
  widen(dz, dy);
  A z[V];
  if (needs.z) {
#pragma unroll
    for (int i = 0; i < V; i++) z[i] = map[kSeveral ? i : 0](distance[i]);
    if (needs.residual) {
#pragma unroll
      for (int i = 0; i < V; i++) z[i] += widen(residual.lane[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < V; i++) distance[i] -= map[kSeveral ? i : 0].mean;
  differentiate_lanes<T, kGeneral>(a.activation, needs.mask, bits, z, dz, A(a.negative_slope));
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

template <class T, bool kSeveral, class Args, class A>
__device__ __forceinline__ void write_slot(const Args& a, bool training, const Gradient<A> (&g)[kSums<T, kSeveral>],
                                           const Slot& s, const A (&distance)[kLanes<T>], const A (&dz)[kLanes<T>]) {
  if (a.dresidual) store(static_cast<T*>(a.dresidual) + s.offset, narrow<T>(dz), s.valid);
  if (!a.dx) return;
  A dx[kLanes<T>];
#pragma unroll
  for (int i = 0; i < kLanes<T>; i++) {
    const Gradient<A>& c = g[kSeveral ? i : 0];
    dx[i] = training ? fused(dz[i], c.affine.scale, fused(distance[i], c.slope, c.offset)) : dz[i] * c.affine.scale;
  }
  store(static_cast<T*>(a.dx) + s.offset, narrow<T>(dx), s.valid);
}

// Calls f(slot, distance, dz) for each slot of a thread.
template <class T, bool kSeveral, bool kGeneral, class Args, class A, class F>
__device__ __forceinline__ void stream(const Args& a, const Affine<A> (&map)[kSums<T, kSeveral>], const Tiles& t,
                                       const Place& at, F f) {
  constexpr int V = kLanes<T>, U = 2;
  const Needs needs(a);
  const int thread = int(threadIdx.x), end = thread < t.step ? at.segments * t.slots : 0;
  const T* __restrict__ x = static_cast<const T*>(a.x);
  const T* __restrict__ dy = static_cast<const T*>(a.dy);
  const T* __restrict__ residual = static_cast<const T*>(a.residual);
  Walk<T> walk(t, at, thread);
  with_constant(!t.partial, [&](auto whole) {
    for (int k = thread; k < end; k += U * t.step) {
      Slot s[U];
      Vector<T> vx[U], vdy[U], r[U];
      MaskBytes bytes[U];
      Walk<T> again = walk;
#pragma unroll
      for (int u = 0; u < U; u++, walk.advance()) {
        if (k + u * t.step >= end) continue;
        s[u] = walk.template get<whole>();
        vx[u] = load(x + s[u].offset, s[u].valid);
        vdy[u] = load(dy + s[u].offset, s[u].valid);
        if (needs.residual) r[u] = load(residual + s[u].offset, s[u].valid);
        if (needs.mask) bytes[u] = read_mask(a.mask, walk, s[u]);
      }
#pragma unroll
      for (int u = 0; u < U; u++, again.advance()) {
        if (k + u * t.step >= end) break;
        A distance[V], dz[V];
        const unsigned bits = needs.mask ? mask_bits(a.mask, again, s[u], bytes[u]) : 0;
        differentiate<T, kSeveral, kGeneral>(a, map, needs, vx[u], vdy[u], r[u], bits, distance, dz);
        f(s[u], distance, dz);
      }
    }
  });
}

// ---- In shared memory -----------------------------------------------------------------------------------------------

// Copies a block's slots of x and dy, and the mask's bits for each; a thread those that it will read.
template <class T, class Args>
__device__ __forceinline__ void copy_pair(const Args& a, const Tiles& t, const Place& at, const Needs& needs,
                                          Vector<T>* xs, Vector<T>* dys, uint8_t* bits) {
  constexpr int U = 2;
  const int thread = int(threadIdx.x), end = thread < t.step ? at.segments * t.slots : 0;
  const T* x = static_cast<const T*>(a.x);
  const T* dy = static_cast<const T*>(a.dy);
  Walk<T> walk(t, at, thread);
  with_constant(!t.partial, [&](auto whole) {
    for (int k = thread; k < end; k += U * t.step) {
      MaskBytes bytes[U];
      const Walk<T> first = walk;
#pragma unroll
      for (int u = 0; u < U; u++, walk.advance()) {
        const int slot = k + u * t.step;
        if (slot >= end) continue;
        const Slot s = walk.template get<whole>();
        if (s.valid == kAllLanes<T>) {
          __pipeline_memcpy_async(&xs[slot], x + s.offset, 16);
          __pipeline_memcpy_async(&dys[slot], dy + s.offset, 16);
        } else {
          xs[slot] = load(x + s.offset, s.valid);
          dys[slot] = load(dy + s.offset, s.valid);
        }
        if (needs.mask) bytes[u] = read_mask(a.mask, walk, s);
      }
      if (!needs.mask) continue;
      Walk<T> again = first;
#pragma unroll
      for (int u = 0; u < U; u++, again.advance())
        if (k + u * t.step < end)
          bits[k + u * t.step] = uint8_t(mask_bits(a.mask, again, again.template get<whole>(), bytes[u]));
    }
  });
  __pipeline_commit();
}

// As stream(), of what copy_pair() copied.
template <class T, bool kSeveral, bool kGeneral, class Args, class A, class F>
__device__ __forceinline__ void stream_resident(const Args& a, const Affine<A> (&map)[kSums<T, kSeveral>],
                                                const Tiles& t, const Place& at, const Vector<T>* xs,
                                                const Vector<T>* dys, const uint8_t* bits, F f) {
  constexpr int V = kLanes<T>, U = 2;
  const Needs needs(a);
  const int thread = int(threadIdx.x), end = thread < t.step ? at.segments * t.slots : 0;
  const T* residual = static_cast<const T*>(a.residual);
  Walk<T> walk(t, at, thread);
  with_constant(!t.partial, [&](auto whole) {
    for (int k = thread; k < end; k += U * t.step) {
      Slot s[U];
      Vector<T> r[U];
#pragma unroll
      for (int u = 0; u < U; u++, walk.advance()) {
        s[u] = walk.template get<whole>();
        if (needs.residual && k + u * t.step < end) r[u] = load(residual + s[u].offset, s[u].valid);
      }
#pragma unroll
      for (int u = 0; u < U; u++) {
        const int slot = k + u * t.step;
        if (slot >= end) break;
        A distance[V], dz[V];
        differentiate<T, kSeveral, kGeneral>(a, map, needs, xs[slot], dys[slot], r[u], needs.mask ? bits[slot] : 0,
                                             distance, dz);
        f(s[u], distance, dz);
      }
    }
  });
}

}  // namespace
}  // namespace fastnorm
