// y from the affine maps of a block's channels; Args is the op's struct.
#pragma once
#include "norm.cuh"
#include "tiles_mask.cuh"
#include "tiles_sums.cuh"

namespace fastnorm {
namespace {

constexpr int kChunkSlots = 4096;  // between two barriers, where a mask is written

// map has the channel of each of a thread's sums; bits is shared memory of chunk_bytes(), if a mask is wanted.
template <class T, bool kSeveral, bool kGeneral, class Args, class A>
__device__ __forceinline__ void apply_tiles(const Args& a, const Tiles& t, const Place& at,
                                            const Affine<A> (&map)[kSums<T, kSeveral>], uint8_t* bits) {
  constexpr int V = kLanes<T>, U = kSeveral ? 2 : 4;
  const int thread = int(threadIdx.x);
  const T* __restrict__ x = static_cast<const T*>(a.x);
  const T* __restrict__ residual = static_cast<const T*>(a.residual);
  T* __restrict__ y = static_cast<T*>(a.y);
  const A negative_slope = A(a.negative_slope);
  const int chunk = a.mask ? max(1, kChunkSlots / t.slots) : at.segments;
  for (int begin = 0; begin < at.segments; begin += chunk) {
    const int chunk_segments = min(chunk, at.segments - begin);
    const int end = thread < t.step ? chunk_segments * t.slots : 0;
    Walk<T> walk(t, at, begin * t.slots + thread);
    with_constant(!t.partial, [&](auto whole) {
      for (int k = thread; k < end; k += U * t.step) {
        Slot s[U];
        Vector<T> v[U], r[U];
#pragma unroll
        for (int u = 0; u < U; u++, walk.advance()) {
          if (k + u * t.step >= end) continue;
          s[u] = walk.template get<whole>();
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
          const unsigned on = activate_lanes<T, kGeneral>(a.activation, z, negative_slope, a.mask);
          store(y + s[u].offset, narrow<T>(z), s[u].valid);
          if (a.mask) bits[k + u * t.step] = uint8_t(on);
        }
      }
    });
    if (a.mask) {
      __syncthreads();
      write_mask<T>(t, at, begin, chunk_segments, bits, a.mask);
      __syncthreads();
    }
  }
}

inline size_t chunk_bytes(const Tiles& t) { return shared_bytes<uint8_t>(std::max(kChunkSlots, t.slots)); }

}  // namespace
}  // namespace fastnorm
