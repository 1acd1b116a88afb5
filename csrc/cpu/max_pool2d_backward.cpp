// Max-pooling backward on the CPU: every dx gathers from the windows that it may have won; ../max_pool2d.h has the
// rules.  Sums are taken window by window in memory's order, as torch does, in float32 (float64 for float64).
//
// Planes: the rows of dy and of the offsets that a row of dx needs are kept in a ring, widened and with a margin that
// no
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

// The windows of an axis that may have a tap at input i; of all inputs in a table, as they take divisions.
struct Windows {
  int first, end;
};

void fill_windows(const PoolAxis& a, Windows* windows) {
  for (int i = 0; i < a.in; i++) windows[i] = {a.first_window(i), a.end_window(i)};
}

// ---- Planes ---------------------------------------------------------------------------------------------------------

// A thread's rows.
template <class T>
struct Ring {
  using A = Accumulate<T>;
  int64_t margin, pitch, slots, blocks, columns;
  A *dy, *sums;  // [slots][pitch]; a row of dx, from the padding before it on
  Tap<A>* tap;   // [slots][pitch]
  int* held;     // the row in each slot
  // Of the windows' rows that have a tap in a row of dx: where the slot begins, and the number of that row's first tap.
  struct Row {
    int64_t at;
    Tap<A> first;
  }* rows;

  Ring(const PoolShape& s, PoolScratch scratch, size_t* bytes = nullptr) {
    margin = (int64_t(s.x.kernel - 1) * s.x.dilation) / s.x.stride + 1;
    // Inputs of one phase: as many as there are steps of the stride in the padding and x.
    columns = (s.x.in + int64_t(s.x.pad) + s.x.stride - 1) / s.x.stride;
    blocks = (columns + kPoolLanes - 1) / kPoolLanes;
    pitch = margin + std::max<int64_t>(blocks * kPoolLanes, s.x.out) + kPoolLanes;
    slots = std::min<int64_t>((s.y.kernel - 1) * int64_t(s.y.dilation) / s.y.stride + 1, s.y.out);
    dy = scratch.take<A>(slots * pitch), tap = scratch.take<Tap<A>>(slots * pitch);
    sums = scratch.take<A>(blocks * kPoolLanes * s.x.stride + kPoolLanes);
    held = scratch.take<int>(slots), rows = scratch.take<Row>(slots);
    if (bytes) *bytes = scratch.used;
  }
  void clear() const {
    std::fill(dy, dy + slots * pitch, A(0));
    std::fill(tap, tap + slots * pitch, Tap<A>(-1));
    std::fill(held, held + slots, -1);
  }
  // Row oy of a plane into a slot.
  void fetch(const MaxPool2dBackward& a, int64_t plane, int oy, int slot) const {
    const PoolShape& s = a.shape;
    const int64_t from = (plane * s.y.out + oy) * s.x.out;
    const int bytes = s.offset_bytes();
    held[slot] = oy;
    A* const to = dy + slot * pitch + margin;
    Tap<A>* const to_tap = tap + slot * pitch + margin;
    for_blocks(0, s.x.out, [&](auto lanes, int64_t i) {
      constexpr int L = lanes;
      store_lanes(to + i, load_wide<L>(static_cast<const T*>(a.dy) + from + i));
      store_lanes(to_tap + i, load_offsets<0, L, A>(a.offset, bytes, from + i));
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
  const auto* const row = ring.rows;
  auto phase_sum = [&](int64_t j, int phase) {
    V sum{};
    for (int i = 0; i < rows; i++) {
      const A* const dy = ring.dy + row[i].at + j;
      const Tap<A>* const tap = ring.tap + row[i].at + j;
#pragma GCC unroll 4
      for (int t = width - 1; t >= 0; t--) {
        if (t * int64_t(dilation) % stride != phase) continue;
        const int64_t before = t * int64_t(dilation) / stride;
        const auto won = load_lanes<L>(tap - before) == lanes_of<L>(Tap<A>(row[i].first + t));
        sum += won ? load_lanes<L>(dy - before) : V{};
      }
    }
    return sum;
  };
  for (int64_t j = 0; j < ring.blocks * L; j += L) {
    if constexpr (kStride == 1) {
      store_lanes(ring.sums + j, phase_sum(j, 0));
    } else if constexpr (kStride == 2) {
      const V even = phase_sum(j, 0), odd = phase_sum(j, 1);
      constexpr std::make_integer_sequence<int, L> all;
      store_lanes(ring.sums + 2 * j, interleave<0>(even, odd, all));
      store_lanes(ring.sums + 2 * j + L, interleave<L / 2>(even, odd, all));
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
void gather_plane(const MaxPool2dBackward& a, const Ring<T>& ring, const Windows* windows, int64_t plane, int begin,
                  int end) {
  const PoolShape& s = a.shape;
  const int slots = int(ring.slots);
  int turn = windows[begin].first / slots * slots;  // slot 0's row, at the first of an input
  std::fill(ring.held, ring.held + slots, -1);
  for (int iy = begin; iy < end; iy++) {
    int rows = 0;
    while (windows[iy].first - turn >= slots) turn += slots;
    for (int oy = windows[iy].first; oy < windows[iy].end; oy++) {
      const int below = iy - s.y.begin(oy), slot = oy - turn - (oy - turn < slots ? 0 : slots);
      if (s.y.dilation != 1 && below % s.y.dilation) continue;
      if (ring.held[slot] != oy) ring.fetch(a, plane, oy, slot);
      const int row = s.y.dilation == 1 ? below : below / s.y.dilation;
      ring.rows[rows++] = {slot * ring.pitch + ring.margin, Tap<Accumulate<T>>(row) * s.x.kernel};
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
void gather_planes(const MaxPool2dBackward& a, const Windows* windows, char* scratch) {
  const PoolShape& s = a.shape;
  size_t bytes = 0;
  Ring<T>(s, {nullptr}, &bytes);
  const int64_t bands = std::clamp<int64_t>(4 * a.threads / s.n, 1, a.threads == 1 ? 1 : s.y.in);
  const int64_t band = (s.y.in + bands - 1) / bands;
  parallel(a.threads, [&](Team team) {
    const Ring<T> ring(s, {scratch + team.rank * bytes});
    ring.clear();
    team.for_each(s.n * bands, [&](int64_t task) {
      const int begin = int(std::min<int64_t>(task % bands * band, s.y.in)),
                end = int(std::min<int64_t>(begin + band, s.y.in));
      if (begin < end) gather_plane(a, ring, windows, task / bands, begin, end);
    });
  });
}

// ---- Channels -------------------------------------------------------------------------------------------------------

template <int L, int kVectors, int kBytes, class T>
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
        const auto won = load_offsets<kBytes, L, A>(a.offset, bytes, at + v * L) == lanes_of<L>(tap);
        sum[v] += won ? load_wide<L>(static_cast<const T*>(a.dy) + at + v * L) : Lanes<A, L>{};
      }
    }
  }
  T* const dx = static_cast<T*>(a.dx) + ((n * s.y.in + iy) * s.x.in + ix) * s.c + channel;
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; v++) store_narrow<L>(dx + v * L, sum[v]);
}

// windows: of every column of the input.
template <int kBytes, class T>
void gather_pixels(const MaxPool2dBackward& a, int64_t n, int iy, Windows rows, const Windows* windows) {
  constexpr int L = kPoolLanes, kVectors = 4;
  const PoolShape& s = a.shape;
  for (int ix = 0; ix < s.x.in; ix++) {
    const Windows columns = windows[ix];
    int64_t c = 0;
    for (; c + kVectors * L <= s.c; c += kVectors * L)
      gather_channels<L, kVectors, kBytes, T>(a, n, iy, ix, rows, columns, c);
    for_blocks(c, s.c, [&](auto lanes, int64_t i) {
      gather_channels<decltype(lanes)::value, 1, kBytes, T>(a, n, iy, ix, rows, columns, i);
    });
  }
}

}  // namespace

size_t max_pool2d_backward_workspace(const MaxPool2dBackward& a) {
  PoolScratch scratch{nullptr};
  scratch.take<Windows>(a.shape.y.in), scratch.take<Windows>(a.shape.x.in);
  size_t bytes = 0;
  if (a.shape.c == 1) with_type(a.dtype, [&](auto zero) { Ring<decltype(zero)>(a.shape, {nullptr}, &bytes); });
  return scratch.used + bytes * a.threads;
}

void max_pool2d_backward(const MaxPool2dBackward& a) {
  const PoolShape& s = a.shape;
  prefer_huge_pages(a.dx, size_t(s.inputs() * size_of(a.dtype)));
  PoolScratch scratch{static_cast<char*>(a.workspace)};
  Windows *const rows = scratch.take<Windows>(s.y.in), *const columns = scratch.take<Windows>(s.x.in);
  fill_windows(s.y, rows), fill_windows(s.x, columns);
  with_type(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (s.c == 1) return gather_planes<T>(a, rows, scratch.at + scratch.used);
    parallel(a.threads, [&](Team team) {
      team.for_each(s.n * s.y.in, [&](int64_t task) {
        const int64_t n = task / s.y.in;
        const int iy = int(task % s.y.in);
        s.offset_bytes() == 1 ? gather_pixels<1, T>(a, n, iy, rows[iy], columns)
                              : gather_pixels<0, T>(a, n, iy, rows[iy], columns);
      });
    });
  });
}

}  // namespace fastnorm::cpu::CPU_CAPABILITY
