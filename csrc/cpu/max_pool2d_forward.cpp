// Max-pooling forward on the CPU; ../max_pool2d.h has the rules.
//
// Planes: a row of the input is reduced to the maxima of the windows' columns, once, and these rows to rows of the
//   output.  In that order the first of equal values and the last NaN win by themselves, without comparing positions.
//   The reduced rows that later windows need stay in a ring in the L1 cache.
// Channels ([n][h][w][c]): every output pixel takes its windows' pixels, some channels at a time, in registers.
// Floor: S read, S / stride^2 written, and a byte per output, or 8 for indices.
#include <algorithm>

#include "max_pool2d_lanes.h"
#include "output.h"
#include "parallel.h"

namespace fastnorm::cpu::CPU_CAPABILITY {
namespace {

// Output `o` of the axis, tap `t`: where that is in the input.
int64_t position(const PoolAxis& a, int o, int64_t t) { return a.begin(o) + t * a.dilation; }

int64_t index_of(const PoolShape& s, int oy, int ox, int64_t tap) {
  return position(s.y, oy, tap / s.x.kernel) * s.x.in + position(s.x, ox, tap % s.x.kernel);
}

// ---- Planes ---------------------------------------------------------------------------------------------------------

// A thread's rows, all of A or Tap<A>.
template <class T>
struct Ring {
  using A = Accumulate<T>;
  static constexpr bool kWidens = !std::is_same_v<T, A>;
  int64_t pitch, slots;
  A *row, *output;  // of 16-bit types: a row of x and one of y as float32
  A* value;         // [slots][pitch]
  Tap<A>* tap;
  int *held, *valid;  // the row in each slot; the taps of a window's rows that are inside

  Ring(const PoolShape& s, PoolScratch scratch, size_t* bytes = nullptr)
      : pitch(s.x.out + kPoolLanes), slots(std::min<int64_t>((s.y.kernel - 1) * int64_t(s.y.dilation) + 1, s.y.in)) {
    row = scratch.take<A>(kWidens ? s.x.in : 0), output = scratch.take<A>(kWidens ? s.x.out : 0);
    value = scratch.take<A>(slots * pitch), tap = scratch.take<Tap<A>>(slots * pitch);
    held = scratch.take<int>(slots), valid = scratch.take<int>(s.y.kernel);
    if (bytes) *bytes = scratch.used;
  }
};

// The outputs whose windows are inside, columns only.
struct Inside {
  int begin, end;
  explicit Inside(const PoolAxis& a) {
    begin = std::min(a.out, (a.pad + a.stride - 1) / a.stride);
    const int64_t room = a.in - 1 - int64_t(a.kernel - 1) * a.dilation + a.pad;
    end = room < 0 ? begin : int(std::clamp<int64_t>(room / a.stride + 1, begin, a.out));
  }
};

// value[o], tap[o] = the maximum of the columns of window o in this row of the input, and which column it is.
template <int kStride, int kKernel, bool kTaps, class A>
void reduce_row(const A* row, const PoolAxis& x, Inside inside, A* value, Tap<A>* tap) {
  auto edge = [&](int o) {
    const int first = x.first_tap(o), end = x.end_tap(o);
    A best = -std::numeric_limits<A>::infinity();
    int at = first;
    for (int t = first; t < end; t++)
      if (const A v = row[position(x, o, t)]; v > best || v != v) best = v, at = t;
    value[o] = best;
    if (kTaps) tap[o] = at;
  };
  for (int o = 0; o < inside.begin; o++) edge(o);
  for_blocks(inside.begin, inside.end, [&](auto lanes, int64_t o) {
    constexpr int L = lanes;
    const A* const p = row + (o * x.stride - x.pad);
    Best<A, L, kTaps> best{strided<L, kStride>(p, 0, x.stride), {}};
    if constexpr (kKernel != 0) {
#pragma GCC unroll 4
      for (int t = 1; t < kKernel; t++) best.take(strided<L, kStride>(p, t, x.stride), taps<L, A>(t));
    } else {
      for (int t = 1; t < x.kernel; t++)
        best.take(strided<L, kStride>(p, int64_t(t) * x.dilation, x.stride), taps<L, A>(t));
    }
    store_lanes(value + o, best.value);
    if constexpr (kTaps) store_lanes(tap + o, best.tap);
  });
  for (int o = inside.end; o < x.out; o++) edge(o);
}

template <bool kTaps, class A>
void reduce_row(const A* row, const PoolAxis& x, Inside inside, A* value, Tap<A>* tap) {
  if (x.stride == 2 && x.kernel == 3 && x.dilation == 1) return reduce_row<2, 3, kTaps>(row, x, inside, value, tap);
  if (x.stride == 2 && x.kernel == 2 && x.dilation == 1) return reduce_row<2, 2, kTaps>(row, x, inside, value, tap);
  if (x.stride == 1 && x.kernel == 3 && x.dilation == 1) return reduce_row<1, 3, kTaps>(row, x, inside, value, tap);
  if (x.stride == 2 && x.kernel > 1) return reduce_row<2, 0, kTaps>(row, x, inside, value, tap);
  if (x.stride == 1) return reduce_row<1, 0, kTaps>(row, x, inside, value, tap);
  return reduce_row<0, 0, kTaps>(row, x, inside, value, tap);
}

// One row of the output from the reduced rows that ring.valid names.
template <bool kOffset, bool kIndex, class T>
void finish_row(const MaxPool2dForward& a, const Ring<T>& ring, int64_t plane, int oy, int rows) {
  using A = Accumulate<T>;
  constexpr bool kTaps = kOffset || kIndex;
  const PoolShape& s = a.shape;
  const int64_t to = (plane * s.y.out + oy) * s.x.out;
  A* const y = ring.kWidens ? ring.output : reinterpret_cast<A*>(static_cast<T*>(a.y) + to);
  const int bytes = s.offset_bytes();
  auto slot = [&](int i) { return position(s.y, oy, ring.valid[i]) % ring.slots * ring.pitch; };
  for_blocks(0, s.x.out, [&](auto lanes, int64_t o) {
    constexpr int L = lanes;
    using V = Lanes<Tap<A>, L>;
    Best<A, L, kOffset> best{load_lanes<L>(ring.value + slot(0) + o), {}};
    V index{};
    // Of a row's tap t: its number in the window, and its place in x without the column that the window begins in.
    auto number = [&](V t, int i) { return t + Tap<A>(ring.valid[i] * s.x.kernel); };
    auto place = [&](V t, int i) {
      return t * Tap<A>(s.x.dilation) + Tap<A>(position(s.y, oy, ring.valid[i]) * s.x.in);
    };
    if constexpr (kTaps) {
      const V t = load_lanes<L>(ring.tap + slot(0) + o);
      if constexpr (kOffset) best.tap = number(t, 0);
      if constexpr (kIndex) index = place(t, 0);
    }
    for (int i = 1; i < rows; i++) {
      const Lanes<A, L> v = load_lanes<L>(ring.value + slot(i) + o);
      const V t = kTaps ? load_lanes<L>(ring.tap + slot(i) + o) : V{};
      if constexpr (kIndex) {
        const auto better = (v > best.value) | (v != v);
        index = better ? place(t, i) : index;
      }
      best.take(v, kOffset ? number(t, i) : t);
    }
    store_lanes(y + o, best.value);
    if constexpr (kOffset) store_offsets<L>(a.offset, bytes, to + o, best.tap);
    if constexpr (kIndex) {
      V lane;
      for (int i = 0; i < L; i++) lane[i] = i;
      const V column = lane * Tap<A>(s.x.stride) + Tap<A>(s.x.begin(int(o)));
      store_lanes(a.indices + to + o, __builtin_convertvector(index + column, Lanes<int64_t, L>));
    }
  });
  if constexpr (ring.kWidens) narrow_row(ring.output, static_cast<T*>(a.y) + to, s.x.out);
}

// A row of windows that have no tap inside.
template <class T>
void empty_row(const MaxPool2dForward& a, int64_t plane, int oy) {
  const PoolShape& s = a.shape;
  for (int ox = 0; ox < s.x.out; ox++) {
    const int64_t i = (plane * s.y.out + oy) * s.x.out + ox;
    const int tap = s.y.first_tap(oy) * s.x.kernel + s.x.first_tap(ox);
    static_cast<T*>(a.y)[i] = T(-std::numeric_limits<float>::infinity());
    if (a.offset) store_offsets<1>(a.offset, s.offset_bytes(), i, taps<1, float>(tap));
    if (a.indices) a.indices[i] = index_of(s, oy, ox, tap);
  }
}

template <bool kOffset, bool kIndex, class T>
void pool_plane(const MaxPool2dForward& a, const Ring<T>& ring, int64_t plane, int begin, int end) {
  using A = Accumulate<T>;
  const PoolShape& s = a.shape;
  const Inside inside(s.x);
  const T* const x = static_cast<const T*>(a.x) + plane * s.y.in * s.x.in;
  std::fill(ring.held, ring.held + ring.slots, -1);
  for (int oy = begin; oy < end; oy++) {
    const int first = s.y.first_tap(oy), last = s.y.end_tap(oy);
    int rows = 0;
    for (int t = first; t < last; t++) {
      const int64_t h = position(s.y, oy, t), slot = h % ring.slots;
      ring.valid[rows++] = t;
      if (ring.held[slot] == h) continue;
      ring.held[slot] = int(h);
      const A* row;
      if constexpr (ring.kWidens)
        widen_row(x + h * s.x.in, ring.row, s.x.in), row = ring.row;
      else
        row = x + h * s.x.in;
      reduce_row<kOffset || kIndex>(row, s.x, inside, ring.value + slot * ring.pitch, ring.tap + slot * ring.pitch);
    }
    if (rows)
      finish_row<kOffset, kIndex>(a, ring, plane, oy, rows);
    else
      empty_row<T>(a, plane, oy);
  }
}

template <class T>
void pool_planes(const MaxPool2dForward& a) {
  const PoolShape& s = a.shape;
  size_t bytes = 0;
  Ring<T>(s, {nullptr}, &bytes);
  // Few planes are cut, at the price of rows that are reduced twice.
  const int64_t bands = std::clamp<int64_t>(4 * a.threads / s.n, 1, a.threads == 1 ? 1 : s.y.out);
  const int64_t band = (s.y.out + bands - 1) / bands;
  parallel(a.threads, [&](Team team) {
    const Ring<T> ring(s, {static_cast<char*>(a.workspace) + team.rank * bytes});
    team.for_each(s.n * bands, [&](int64_t task) {
      const int begin = int(std::min<int64_t>(task % bands * band, s.y.out)),
                end = int(std::min<int64_t>(begin + band, s.y.out));
      const int64_t plane = task / bands;
      if (a.offset && a.indices) return pool_plane<true, true>(a, ring, plane, begin, end);
      if (a.offset) return pool_plane<true, false>(a, ring, plane, begin, end);
      if (a.indices) return pool_plane<false, true>(a, ring, plane, begin, end);
      pool_plane<false, false>(a, ring, plane, begin, end);
    });
  });
}

// ---- Channels -------------------------------------------------------------------------------------------------------

// L * kVectors channels of one output pixel.  x: the first of them in the window's first pixel.
template <int L, int kVectors, bool kTaps, class T>
[[gnu::always_inline]] inline void pool_channels(const MaxPool2dForward& a, const T* x, int oy, int ox, int64_t to) {
  using A = Accumulate<T>;
  const PoolShape& s = a.shape;
  const int first_row = s.y.first_tap(oy), end_row = s.y.end_tap(oy);
  const int first = s.x.first_tap(ox), end = s.x.end_tap(ox);
  Best<A, L, kTaps> best[kVectors];
  for (auto& b : best)
    b = {Lanes<A, L>{} - std::numeric_limits<A>::infinity(), taps<L, A>(first_row * s.x.kernel + first)};
  for (int row = first_row; row < end_row; row++) {
    const T* p = x + (int64_t(row) * s.y.dilation * s.x.in + int64_t(first) * s.x.dilation) * s.c;
    for (int column = first; column < end; column++, p += s.x.dilation * s.c)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++)
        best[v].take(load_wide<L>(p + v * L), taps<L, A>(row * s.x.kernel + column));
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; v++) {
    store_narrow<L>(static_cast<T*>(a.y) + to + v * L, best[v].value);
    if constexpr (kTaps) {
      if (a.offset) store_offsets<L>(a.offset, s.offset_bytes(), to + v * L, best[v].tap);
      if (a.indices)
        for (int i = 0; i < L; i++) a.indices[to + v * L + i] = index_of(s, oy, ox, best[v].tap[i]);
    }
  }
}

template <bool kTaps, class T>
void pool_pixels(const MaxPool2dForward& a, int64_t n, int oy) {
  constexpr int L = kPoolLanes, kVectors = 4;
  const PoolShape& s = a.shape;
  const T* const x = static_cast<const T*>(a.x) + (n * s.y.in + s.y.begin(oy)) * s.x.in * s.c;
  for (int ox = 0; ox < s.x.out; ox++) {
    const T* const window = x + int64_t(s.x.begin(ox)) * s.c;
    const int64_t to = ((n * s.y.out + oy) * s.x.out + ox) * s.c;
    int64_t c = 0;
    for (; c + kVectors * L <= s.c; c += kVectors * L) pool_channels<L, kVectors, kTaps>(a, window + c, oy, ox, to + c);
    for_blocks(c, s.c, [&](auto lanes, int64_t i) {
      pool_channels<decltype(lanes)::value, 1, kTaps>(a, window + i, oy, ox, to + i);
    });
  }
}

}  // namespace

size_t max_pool2d_forward_workspace(const MaxPool2dForward& a) {
  size_t bytes = 0;
  if (a.shape.c == 1)
    with_type(a.dtype, [&](auto zero) { Ring<decltype(zero)>(a.shape, {nullptr}, &bytes); });
  return bytes * a.threads;
}

void max_pool2d_forward(const MaxPool2dForward& a) {
  const PoolShape& s = a.shape;
  prefer_huge_pages(a.y, size_t(s.outputs() * size_of(a.dtype)));
  prefer_huge_pages(a.indices, size_t(s.outputs() * sizeof(int64_t)));
  prefer_huge_pages(a.offset, size_t(s.outputs() * s.offset_bytes()));
  with_type(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (s.c == 1) return pool_planes<T>(a);
    parallel(a.threads, [&](Team team) {
      team.for_each(s.n * s.y.out, [&](int64_t task) {
        const int64_t n = task / s.y.out;
        const int oy = int(task % s.y.out);
        a.offset || a.indices ? pool_pixels<true, T>(a, n, oy) : pool_pixels<false, T>(a, n, oy);
      });
    });
  });
}

}  // namespace fastnorm::cpu::CPU_CAPABILITY
