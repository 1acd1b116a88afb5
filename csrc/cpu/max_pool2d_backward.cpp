// Max-pooling backward on the CPU: every dx gathers from the windows that it may have won; ../max_pool2d.h has the
// rules.  Sums are taken window by window in memory's order, as torch does, in float32 (float64 for float64).
//
// Planes: the rows of dy and of the offsets that a row of dx needs are kept in a ring, widened and with a margin that no
//   tap matches.  Inputs that are a stride apart meet the same taps of successive windows: one such phase at a time is
//   summed in registers, and the phases are interleaved.
// Channels ([n][h][w][c]): every input pixel takes its windows' pixels, some channels at a time, in registers.
// Floor: S / stride^2 and a byte per output read, S written.
#include <algorithm>

#include "max_pool2d_lanes.h"
#include "output.h"
#include "parallel.h"

namespace fastnorm::cpu::CPU_CAPABILITY {
namespace {

// ---- Planes ---------------------------------------------------------------------------------------------------------

// A thread's rows.
template <class T>
struct Ring {
  using A = Accumulate<T>;
  int64_t margin, pitch, slots, blocks, columns;
  A *dy, *sums;  // [slots][pitch]; a row of dx, from the padding before it on
  Tap<A>* tap;   // [slots][pitch]
  int *held, *row, *tap_row;

  Ring(const PoolShape& s, PoolScratch scratch, size_t* bytes = nullptr) {
    margin = (int64_t(s.x.kernel - 1) * s.x.dilation) / s.x.stride + 1;
    // Inputs of one phase: as many as there are steps of the stride in the padding and x.
    columns = (s.x.in + int64_t(s.x.pad) + s.x.stride - 1) / s.x.stride;
    blocks = (columns + kPoolLanes - 1) / kPoolLanes;
    pitch = margin + std::max<int64_t>(blocks * kPoolLanes, s.x.out) + kPoolLanes;
    slots = std::min<int64_t>((s.y.kernel - 1) * int64_t(s.y.dilation) / s.y.stride + 1, s.y.out);
    dy = scratch.take<A>(slots * pitch), tap = scratch.take<Tap<A>>(slots * pitch);
    sums = scratch.take<A>(blocks * kPoolLanes * s.x.stride + kPoolLanes);
    held = scratch.take<int>(slots), row = scratch.take<int>(slots), tap_row = scratch.take<int>(slots);
    if (bytes) *bytes = scratch.used;
  }
  void clear() const {
    std::fill(dy, dy + slots * pitch, A(0));
    std::fill(tap, tap + slots * pitch, Tap<A>(-1));
    std::fill(held, held + slots, -1);
  }
  // Row oy of a plane into its slot.
  void fetch(const MaxPool2dBackward& a, int64_t plane, int oy) const {
    const PoolShape& s = a.shape;
    const int64_t slot = oy % slots, from = (plane * s.y.out + oy) * s.x.out;
    const int bytes = s.offset_bytes();
    held[slot] = oy;
    A* const to = dy + slot * pitch + margin;
    Tap<A>* const to_tap = tap + slot * pitch + margin;
    for_blocks(0, s.x.out, [&](auto lanes, int64_t i) {
      constexpr int L = lanes;
      store_lanes(to + i, load_wide<L>(static_cast<const T*>(a.dy) + from + i));
      store_lanes(to_tap + i, load_offsets<L, A>(a.offset, bytes, from + i));
    });
  }
};

// sums[(j * stride + phase)]: what the taps whose distance from a window's begin is `phase` more than a multiple of the
// stride give.
template <int kStride, int kKernel, class T>
void sum_row(const PoolAxis& x, int kernel, const Ring<T>& ring, int rows) {
  using A = Accumulate<T>;
  constexpr int L = kPoolLanes;
  using V = Lanes<A, L>;
  const int stride = kStride ? kStride : x.stride, dilation = kKernel ? 1 : x.dilation;
  const int width = kKernel ? kKernel : kernel;
  auto phase_sum = [&](int64_t j, int phase) {
    V sum{};
    for (int i = 0; i < rows; i++) {
      const int64_t at = ring.row[i] * ring.pitch + ring.margin + j;
      const Tap<A> first = Tap<A>(ring.tap_row[i]) * width;
#pragma GCC unroll 4
      for (int t = width - 1; t >= 0; t--) {
        if (t * int64_t(dilation) % stride != phase) continue;
        const int64_t o = at - t * int64_t(dilation) / stride;
        const auto won = load_lanes<L>(ring.tap + o) == (Lanes<Tap<A>, L>{} + (first + t));
        sum += won ? load_lanes<L>(ring.dy + o) : V{};
      }
    }
    return sum;
  };
  for (int64_t j = 0; j < ring.blocks * L; j += L) {
    if constexpr (kStride == 1) {
      store_lanes(ring.sums + j, phase_sum(j, 0));
    } else if constexpr (kStride == 2) {
      const V even = phase_sum(j, 0), odd = phase_sum(j, 1);
      for (int i = 0; i < L; i++) ring.sums[2 * (j + i)] = even[i], ring.sums[2 * (j + i) + 1] = odd[i];
    } else {
      for (int phase = 0; phase < stride; phase++) {
        const V sum = phase_sum(j, phase);
        for (int i = 0; i < L; i++) ring.sums[(j + i) * stride + phase] = sum[i];
      }
    }
  }
}

template <class T>
void sum_row(const PoolAxis& x, const Ring<T>& ring, int rows) {
  const int k = x.dilation == 1 ? x.kernel : 0;
  if (x.stride == 2 && k == 3) return sum_row<2, 3>(x, x.kernel, ring, rows);
  if (x.stride == 2 && k == 2) return sum_row<2, 2>(x, x.kernel, ring, rows);
  if (x.stride == 1 && k == 3) return sum_row<1, 3>(x, x.kernel, ring, rows);
  if (x.stride == 2) return sum_row<2, 0>(x, x.kernel, ring, rows);
  if (x.stride == 1) return sum_row<1, 0>(x, x.kernel, ring, rows);
  return sum_row<0, 0>(x, x.kernel, ring, rows);
}

template <class T>
void gather_plane(const MaxPool2dBackward& a, const Ring<T>& ring, int64_t plane, int begin, int end) {
  const PoolShape& s = a.shape;
  std::fill(ring.held, ring.held + ring.slots, -1);
  for (int iy = begin; iy < end; iy++) {
    int rows = 0;
    const int last = s.y.end_window(iy);
    for (int oy = s.y.first_window(iy); oy < last; oy++) {
      const int below = iy - s.y.begin(oy);
      if (below % s.y.dilation) continue;
      const int slot = int(oy % ring.slots);
      if (ring.held[slot] != oy) ring.fetch(a, plane, oy);
      ring.row[rows] = slot, ring.tap_row[rows++] = below / s.y.dilation;
    }
    T* const dx = static_cast<T*>(a.dx) + (plane * s.y.in + iy) * s.x.in;
    sum_row(s.x, ring, rows);
    if constexpr (std::is_same_v<T, Accumulate<T>>)
      std::memcpy(dx, ring.sums + s.x.pad, sizeof(T) * s.x.in);
    else
      narrow_row(ring.sums + s.x.pad, dx, s.x.in);
  }
}

template <class T>
void gather_planes(const MaxPool2dBackward& a) {
  const PoolShape& s = a.shape;
  size_t bytes = 0;
  Ring<T>(s, {nullptr}, &bytes);
  const int64_t bands = std::clamp<int64_t>(4 * a.threads / s.n, 1, a.threads == 1 ? 1 : s.y.in);
  const int64_t band = (s.y.in + bands - 1) / bands;
  parallel(a.threads, [&](Team team) {
    const Ring<T> ring(s, {static_cast<char*>(a.workspace) + team.rank * bytes});
    ring.clear();
    team.for_each(s.n * bands, [&](int64_t task) {
      const int begin = int(std::min<int64_t>(task % bands * band, s.y.in)),
                end = int(std::min<int64_t>(begin + band, s.y.in));
      gather_plane(a, ring, task / bands, begin, end);
    });
  });
}

// ---- Channels -------------------------------------------------------------------------------------------------------

// The windows of an axis that have a tap at input i.
struct Windows {
  int first, end;
  Windows(const PoolAxis& a, int i) : first(a.first_window(i)), end(a.end_window(i)) {}
};

template <int L, int kVectors, class T>
[[gnu::always_inline]] inline void gather_channels(const MaxPool2dBackward& a, int64_t n, int iy, int ix, Windows rows,
                                                   Windows columns, int64_t channel) {
  using A = Accumulate<T>;
  const PoolShape& s = a.shape;
  const int bytes = s.offset_bytes();
  Lanes<A, L> sum[kVectors] = {};
  for (int oy = rows.first; oy < rows.end; oy++) {
    const int below = iy - s.y.begin(oy);
    if (s.y.dilation != 1 && below % s.y.dilation) continue;
    for (int ox = columns.first; ox < columns.end; ox++) {
      const int beside = ix - s.x.begin(ox);
      if (s.x.dilation != 1 && beside % s.x.dilation) continue;
      const Tap<A> tap = below / s.y.dilation * s.x.kernel + beside / s.x.dilation;
      const int64_t at = ((n * s.y.out + oy) * s.x.out + ox) * s.c + channel;
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++) {
        const auto won = load_offsets<L, A>(a.offset, bytes, at + v * L) == (Lanes<Tap<A>, L>{} + tap);
        sum[v] += won ? load_wide<L>(static_cast<const T*>(a.dy) + at + v * L) : Lanes<A, L>{};
      }
    }
  }
  T* const dx = static_cast<T*>(a.dx) + ((n * s.y.in + iy) * s.x.in + ix) * s.c + channel;
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; v++) store_narrow<L>(dx + v * L, sum[v]);
}

template <class T>
void gather_pixels(const MaxPool2dBackward& a, int64_t n, int iy) {
  constexpr int L = kPoolLanes, kVectors = 4;
  const PoolShape& s = a.shape;
  const Windows rows(s.y, iy);
  for (int ix = 0; ix < s.x.in; ix++) {
    const Windows columns(s.x, ix);
    int64_t c = 0;
    for (; c + kVectors * L <= s.c; c += kVectors * L)
      gather_channels<L, kVectors, T>(a, n, iy, ix, rows, columns, c);
    for_blocks(c, s.c, [&](auto lanes, int64_t i) {
      gather_channels<decltype(lanes)::value, 1, T>(a, n, iy, ix, rows, columns, i);
    });
  }
}

}  // namespace

size_t max_pool2d_backward_workspace(const MaxPool2dBackward& a) {
  size_t bytes = 0;
  if (a.shape.c == 1)
    with_type(a.dtype, [&](auto zero) { Ring<decltype(zero)>(a.shape, {nullptr}, &bytes); });
  return bytes * a.threads;
}

void max_pool2d_backward(const MaxPool2dBackward& a) {
  const PoolShape& s = a.shape;
  prefer_huge_pages(a.dx, size_t(s.inputs() * size_of(a.dtype)));
  with_type(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (s.c == 1) return gather_planes<T>(a);
    parallel(a.threads, [&](Team team) {
      team.for_each(s.n * s.y.in, [&](int64_t task) { gather_pixels<T>(a, task / s.y.in, int(task % s.y.in)); });
    });
  });
}

}  // namespace fastnorm::cpu::CPU_CAPABILITY
