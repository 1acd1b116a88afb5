// Max-pooling forward on the CPU; ../max_pool2d.h has the rules.
//
// Planes, 2 x 2 windows but of float64, and 3 x 3 of float32: every block of outputs takes its taps in registers.
// Planes, others: a row of the input is reduced to the maxima of the windows' columns, once, and these to a row of the
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

// Whether a position in a plane needs more than the 32 bits of the lanes.
bool is_huge(const PoolShape& s) { return int64_t(s.y.in) * s.x.in > std::numeric_limits<int32_t>::max(); }

int64_t index_of(const PoolShape& s, int oy, int ox, int64_t row, int64_t column) {
  return position(s.y, oy, row) * s.x.in + position(s.x, ox, column);
}
int64_t index_of(const PoolShape& s, int oy, int ox, int64_t tap) {
  return index_of(s, oy, ox, tap / s.x.kernel, tap % s.x.kernel);
}

// f(kOffset, kIndex) as constants.
template <class F>
void with_wanted(const MaxPool2dForward& a, F f) {
  constexpr std::true_type yes;
  constexpr std::false_type no;
  if (a.offset) return a.indices ? f(yes, yes) : f(yes, no);
  a.indices ? f(no, yes) : f(no, no);
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
  int* held;  // the row in each slot
  // Of the rows that a window has inside: where the slot begins, the number of the row's first tap, and its place in x.
  struct Row {
    int64_t at;
    Tap<A> first, place;
  }* rows;

  Ring(const PoolShape& s, PoolScratch scratch, size_t* bytes = nullptr)
      : pitch(s.x.out + kPoolLanes), slots(std::min<int64_t>((s.y.kernel - 1) * int64_t(s.y.dilation) + 1, s.y.in)) {
    row = scratch.take<A>(kWidens ? s.x.in : 0), output = scratch.take<A>(kWidens ? s.x.out : 0);
    value = scratch.take<A>(slots * pitch), tap = scratch.take<Tap<A>>(slots * pitch);
    held = scratch.take<int>(slots), rows = scratch.take<Row>(s.y.kernel);
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
  auto edge = [&](int o) {  // in vectors of the same number, as branches would be taken at random
    constexpr int L = 16 / sizeof(A);
    const int first = x.first_tap(o), end = x.end_tap(o);
    Best<A, L, 1> best{lanes_of<L>(-std::numeric_limits<A>::infinity()), {lanes_of<L>(Tap<A>(first))}};
    for (int t = first; t < end; t++) best.take(lanes_of<L>(row[position(x, o, t)]), lanes_of<L>(Tap<A>(t)));
    value[o] = best.value[0];
    if (kTaps) tap[o] = best.label[0][0];
  };
  for (int o = 0; o < inside.begin; o++) edge(o);
  for_blocks(inside.begin, inside.end, [&](auto lanes, int64_t o) {
    constexpr int L = lanes;
    const A* const p = row + (o * x.stride - x.pad);
    Best<A, L, kTaps> best{strided<L, kStride>(p, 0, x.stride), {}};
    auto take = [&](Tap<A> t, int64_t at) {
      if constexpr (kTaps)
        best.take(strided<L, kStride>(p, at, x.stride), lanes_of<L>(t));
      else
        best.take(strided<L, kStride>(p, at, x.stride));
    };
    if constexpr (kKernel != 0) {
#pragma GCC unroll 4
      for (int t = 1; t < kKernel; t++) take(t, t);
    } else {
      for (int t = 1; t < x.kernel; t++) take(t, int64_t(t) * x.dilation);
    }
    store_lanes(value + o, best.value);
    if constexpr (kTaps) store_lanes(tap + o, best.label[0]);
  });
  for (int o = inside.end; o < x.out; o++) edge(o);
}

template <bool kTaps, class A>
void reduce_row(const A* row, const PoolAxis& x, Inside inside, A* value, Tap<A>* tap) {
  if (x.stride == 2 && x.kernel == 3 && x.dilation == 1) return reduce_row<2, 3, kTaps>(row, x, inside, value, tap);
  if (x.stride == 1 && x.kernel == 3 && x.dilation == 1) return reduce_row<1, 3, kTaps>(row, x, inside, value, tap);
  if (x.stride == 2 && x.kernel > 1) return reduce_row<2, 0, kTaps>(row, x, inside, value, tap);
  if (x.stride == 1) return reduce_row<1, 0, kTaps>(row, x, inside, value, tap);
  return reduce_row<0, 0, kTaps>(row, x, inside, value, tap);
}

// Indices from labels: what the tap adds to where the window begins, or in a huge plane the tap's number.
template <int L, class V>
[[gnu::always_inline]] inline void store_indices(const MaxPool2dForward& a, int64_t at, int oy, int64_t o, V label) {
  const PoolShape& s = a.shape;
  if (is_huge(s)) {
    for (int i = 0; i < L; i++) a.indices[at + i] = index_of(s, oy, int(o) + i, label[i]);
    return;
  }
  V lane;
  for (int i = 0; i < L; i++) lane[i] = i;
  const V index = label + lane * s.x.stride + s.x.begin(int(o));
  store_lanes(a.indices + at, __builtin_convertvector(index, Lanes<int64_t, L>));
}

// One row of the output from the reduced rows that ring.rows names: kRows of them, or 0 for any number.
template <bool kOffset, bool kIndex, int kRows, class T>
void finish_row(const MaxPool2dForward& a, const Ring<T>& ring, int64_t plane, int oy, int count) {
  using A = Accumulate<T>;
  const PoolShape& s = a.shape;
  const int64_t to = (plane * s.y.out + oy) * s.x.out;
  A* const y = ring.kWidens ? ring.output : reinterpret_cast<A*>(static_cast<T*>(a.y) + to);
  const int bytes = s.offset_bytes(), rows = kRows ? kRows : count;
  const Tap<A> step = is_huge(s) ? 1 : s.x.dilation;  // from one tap of a row to the next, in an index
  typename Ring<T>::Row few[kRows + 1];
  std::copy_n(ring.rows, kRows, few);
  const auto* const row = kRows ? few : ring.rows;
  for_blocks(0, s.x.out, [&](auto lanes, int64_t o) {
    constexpr int L = lanes;
    auto with_row = [&](int i, auto with) {
      const auto v = load_lanes<L>(ring.value + row[i].at + o);
      if constexpr (kOffset || kIndex) {
        const auto t = load_lanes<L>(ring.tap + row[i].at + o);
        if constexpr (kOffset && kIndex)
          with(v, t + row[i].first, t * step + row[i].place);
        else if constexpr (kOffset)
          with(v, t + row[i].first);
        else
          with(v, t * step + row[i].place);
      } else {
        with(v);
      }
    };
    Best<A, L, kOffset + kIndex> best;
    with_row(0, [&](const auto& v, const auto&... labels) { best = {v, {labels...}}; });
#pragma GCC unroll 4
    for (int i = 1; i < rows; i++) with_row(i, [&](const auto& v, const auto&... labels) { best.take(v, labels...); });
    store_lanes(y + o, best.value);
    if constexpr (kOffset) store_offsets<L>(a.offset, bytes, to + o, best.label[0]);
    if constexpr (kIndex) store_indices<L>(a, to + o, oy, o, best.label[kOffset]);
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
    if (a.offset) store_offsets<1>(a.offset, s.offset_bytes(), i, lanes_of<1>(tap));
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
  const int slots = int(ring.slots);
  int turn = int(position(s.y, begin, s.y.first_tap(begin))) / slots * slots;  // slot 0's row, at the first of a window
  for (int oy = begin; oy < end; oy++) {
    const int first = s.y.first_tap(oy), last = s.y.end_tap(oy);
    while (position(s.y, oy, first) - turn >= slots) turn += slots;
    int rows = 0;
    for (int t = first; t < last; t++) {
      const int h = int(position(s.y, oy, t)), slot = h - turn - (h - turn < slots ? 0 : slots);
      const Tap<A> first = t * s.x.kernel;
      ring.rows[rows++] = {slot * ring.pitch, first, is_huge(s) ? first : Tap<A>(h) * s.x.in};
      if (ring.held[slot] == h) continue;
      ring.held[slot] = h;
      const A* row;
      if constexpr (ring.kWidens)
        widen_row(x + int64_t(h) * s.x.in, ring.row, s.x.in), row = ring.row;
      else
        row = x + int64_t(h) * s.x.in;
      reduce_row<kOffset || kIndex>(row, s.x, inside, ring.value + slot * ring.pitch, ring.tap + slot * ring.pitch);
    }
    switch (rows) {
      case 0: empty_row<T>(a, plane, oy); break;
      case 2: finish_row<kOffset, kIndex, 2>(a, ring, plane, oy, rows); break;
      case 3: finish_row<kOffset, kIndex, 3>(a, ring, plane, oy, rows); break;
      default: finish_row<kOffset, kIndex, 0>(a, ring, plane, oy, rows);
    }
  }
}

// Rows of windows of kKernel x kKernel taps.
template <int kStride, int kKernel, bool kOffset, bool kIndex, class T>
void pool_small(const MaxPool2dForward a, int64_t plane, int begin, int end) {  // a: a copy, as stores may change it
  using A = Accumulate<T>;
  const PoolShape s = a.shape;
  const Inside inside(s.x);
  const T* const x = static_cast<const T*>(a.x) + plane * s.y.in * s.x.in;
  for (int oy = begin; oy < end; oy++) {
    const int64_t to = (plane * s.y.out + oy) * s.x.out;
    const T* const window = x + int64_t(s.y.begin(oy)) * s.x.in;
    const int from = s.y.first_tap(oy), until = s.y.end_tap(oy);
    auto with_labels = [&](auto lanes, int r, int t, auto with) __attribute__((always_inline)) {
      const auto offset = lanes_of<lanes>(Tap<A>(r * kKernel + t)), index = lanes_of<lanes>(Tap<A>(r) * s.x.in + t);
      if constexpr (kOffset && kIndex)
        with(offset, index);
      else if constexpr (kOffset)
        with(offset);
      else if constexpr (kIndex)
        with(index);
      else
        with();
    };
    auto store = [&](auto lanes, int64_t o, const auto& best) __attribute__((always_inline)) {
      constexpr int L = lanes;
      store_narrow<L>(static_cast<T*>(a.y) + to + o, best.value);
      if constexpr (kOffset) store_lanes(static_cast<uint8_t*>(a.offset) + to + o, lowest_bytes<L>(best.label[0]));
      if constexpr (kIndex) store_indices<L>(a, to + o, oy, o, best.label[kOffset] + Tap<A>(s.y.begin(oy)) * s.x.in);
    };
    auto block = [&](auto whole, auto lanes, int64_t o) __attribute__((always_inline)) {
      constexpr int L = lanes;
      const T* const p = window + (o * kStride - s.x.pad);
      const int first = whole ? 0 : from, last = whole ? kKernel : until;
      Best<A, L, kOffset + kIndex> best;
#pragma GCC unroll 4
      for (int r = first; r < last; r++)
#pragma GCC unroll 4
        for (int t = 0; t < kKernel; t++) {
          const auto v = strided<L, kStride>(p + int64_t(r) * s.x.in, t, kStride);
          with_labels(lanes, r, t, [&](const auto&... labels) __attribute__((always_inline)) {
            if (r == first && t == 0)
              best = {v, {labels...}};
            else
              best.take(v, labels...);
          });
        }
      store(lanes, o, best);
    };
    auto edge = [&](int o) {
      constexpr std::integral_constant<int, 16 / sizeof(A)> same;  // in vectors, as branches would be taken at random
      const int first = s.x.first_tap(o), last = s.x.end_tap(o);
      Best<A, same, kOffset + kIndex> best;
      for (int r = from; r < until; r++)
        for (int t = first; t < last; t++) {
          const auto v = lanes_of<same>(A(window[int64_t(r) * s.x.in + position(s.x, o, t)]));
          with_labels(same, r, t, [&](const auto&... labels) __attribute__((always_inline)) {
            if (r == from && t == first)
              best = {v, {labels...}};
            else
              best.take(v, labels...);
          });
        }
      Best<A, 1, kOffset + kIndex> one;
      one.value[0] = best.value[0];
      for (int i = 0; i < kOffset + kIndex; i++) one.label[i][0] = best.label[i][0];
      store(std::integral_constant<int, 1>(), o, one);
    };
    for (int o = 0; o < inside.begin; o++) edge(o);
    auto blocks = [&](auto whole) __attribute__((always_inline)) {
      for_blocks(inside.begin, inside.end,
                 [&](auto lanes, int64_t o) __attribute__((always_inline)) { block(whole, lanes, o); });
    };
    until - from == kKernel ? blocks(std::true_type()) : blocks(std::false_type());
    for (int o = inside.end; o < s.x.out; o++) edge(o);
  }
}

template <class T>
void pool_planes(const MaxPool2dForward& a) {
  const PoolShape& s = a.shape;
  const int stride = s.x.stride, kernel = s.x.kernel;
  const bool small = !is_huge(s) && kernel == s.y.kernel && s.x.dilation == 1 && s.y.dilation == 1;
  size_t bytes = 0;
  Ring<T>(s, {nullptr}, &bytes);
  parallel(a.threads, [&](Team team) {
    const Ring<T> ring(s, {static_cast<char*>(a.workspace) + team.rank * bytes});
    for_rows(team, s.n, s.y.out, [&](int64_t plane, int begin, int end) {
      with_wanted(a, [&](auto offset, auto index) {
        // Registers are for the types that networks have; float64's many would take long to compile.
        if constexpr (!std::is_same_v<T, double>)
          if (small && stride == 2 && kernel == 2) return pool_small<2, 2, offset, index, T>(a, plane, begin, end);
        if constexpr (std::is_same_v<T, float>) {  // 16-bit rows would be widened for each window that they are in
          if (small && stride == 2 && kernel == 3) return pool_small<2, 3, offset, index, T>(a, plane, begin, end);
          if (small && stride == 1 && kernel == 3) return pool_small<1, 3, offset, index, T>(a, plane, begin, end);
        }
        pool_plane<offset.value, index.value>(a, ring, plane, begin, end);
      });
    });
  });
}

// ---- Channels -------------------------------------------------------------------------------------------------------

// L * kVectors channels of one output pixel.  x: the first of them in the window's first pixel.
template <int L, int kVectors, bool kOffset, bool kIndex, class T>
[[gnu::always_inline]] inline void pool_channels(const MaxPool2dForward& a, const T* x, int oy, int ox, int64_t to) {
  using A = Accumulate<T>;
  const PoolShape& s = a.shape;
  const int first_row = s.y.first_tap(oy), end_row = s.y.end_tap(oy);
  const int first = s.x.first_tap(ox), end = s.x.end_tap(ox);
  const bool huge = is_huge(s);
  Best<A, L, kOffset + kIndex> best[kVectors];
  auto take = [&](int row, int column, auto&& with) {
    const Tap<A> tap = row * s.x.kernel + column;
    if constexpr (kOffset && kIndex)
      with(lanes_of<L>(tap), lanes_of<L>(huge ? tap : Tap<A>(index_of(s, oy, ox, row, column))));
    else if constexpr (kOffset)
      with(lanes_of<L>(tap));
    else if constexpr (kIndex)
      with(lanes_of<L>(huge ? tap : Tap<A>(index_of(s, oy, ox, row, column))));
    else
      with();
  };
  take(first_row, first, [&](const auto&... labels) {
    for (auto& b : best) b = {lanes_of<L>(-std::numeric_limits<A>::infinity()), {labels...}};
  });
  for (int row = first_row; row < end_row; row++) {
    const T* p = x + (int64_t(row) * s.y.dilation * s.x.in + int64_t(first) * s.x.dilation) * s.c;
    for (int column = first; column < end; column++, p += s.x.dilation * s.c)
      take(row, column, [&](const auto&... labels) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; v++) best[v].take(load_wide<L>(p + v * L), labels...);
      });
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; v++) {
    store_narrow<L>(static_cast<T*>(a.y) + to + v * L, best[v].value);
    if constexpr (kOffset) store_offsets<L>(a.offset, s.offset_bytes(), to + v * L, best[v].label[0]);
    if constexpr (kIndex) {
      const auto label = best[v].label[kOffset];
      if (huge)
        for (int i = 0; i < L; i++) a.indices[to + v * L + i] = index_of(s, oy, ox, label[i]);
      else
        store_lanes(a.indices + to + v * L, __builtin_convertvector(label, Lanes<int64_t, L>));
    }
  }
}

template <bool kOffset, bool kIndex, class T>
void pool_pixels(const MaxPool2dForward& a, int64_t n, int oy) {
  constexpr int L = kPoolLanes, kVectors = 4;
  const PoolShape& s = a.shape;
  const T* const x = static_cast<const T*>(a.x) + (n * s.y.in + s.y.begin(oy)) * s.x.in * s.c;
  for (int ox = 0; ox < s.x.out; ox++) {
    const T* const window = x + int64_t(s.x.begin(ox)) * s.c;
    const int64_t to = ((n * s.y.out + oy) * s.x.out + ox) * s.c;
    int64_t c = 0;
    for (; c + kVectors * L <= s.c; c += kVectors * L)
      pool_channels<L, kVectors, kOffset, kIndex>(a, window + c, oy, ox, to + c);
    for_blocks(c, s.c, [&](auto lanes, int64_t i) {
      pool_channels<decltype(lanes)::value, 1, kOffset, kIndex>(a, window + i, oy, ox, to + i);
    });
  }
}

}  // namespace

size_t max_pool2d_forward_workspace(const MaxPool2dForward& a) {
  size_t bytes = 0;
  if (a.shape.c == 1) with_type(a.dtype, [&](auto zero) { Ring<decltype(zero)>(a.shape, {nullptr}, &bytes); });
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
      for_rows(team, s.n, s.y.out, [&](int64_t n, int begin, int end) {
        with_wanted(a, [&](auto offset, auto index) {
          for (int oy = begin; oy < end; oy++) pool_pixels<offset.value, index.value, T>(a, n, oy);
        });
      });
    });
  });
}

}  // namespace fastnorm::cpu::CPU_CAPABILITY
