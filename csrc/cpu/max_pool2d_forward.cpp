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

// f(kTaps): whether it matters which tap won.
template <class F>
void with_wanted(const MaxPool2dForward& a, F f) {
  a.offset || a.indices ? f(std::true_type()) : f(std::false_type());
}

// Which outputs of channels are written by streaming stores.
struct PastCaches {
  bool y = false, indices = false;

  static PastCaches of(const MaxPool2dForward& a) {
    const PoolShape& s = a.shape;
    const int64_t size = size_of(a.dtype), wide = a.indices ? sizeof(int64_t) : 0, outputs = s.outputs();
    const int64_t touched = s.inputs() * size + outputs * (size + (a.offset ? s.offset_bytes() : 0) + wide);
    return {streams(a.y, outputs * size, s.c * size, touched),
            a.indices && streams(a.indices, outputs * wide, s.c * wide, touched)};
  }
};

// What is stored of the taps that won.  A copy of what is needed of the arguments, as stores may change those.
struct Winners {
  PoolShape shape;
  void* offset;
  int64_t* indices;
  int bytes;        // of an offset
  bool fits;        // places fit the lanes, and tap / kernel is exact in float32
  bool places;      // in place of a tap's number there is its place from where the window begins
  int column, row;  // from one tap's place to the next, and what is added for each row
  int next;         // from one tap's number() to the next
  float inverse;
  PastCaches past_caches;

  // by_place: whether the kernel numbers taps by number(), as places where those are all that is wanted
  explicit Winners(const MaxPool2dForward& a, bool by_place = false, PastCaches past_caches = {})
      : shape(a.shape), offset(a.offset), indices(a.indices), bytes(a.shape.offset_bytes()), past_caches(past_caches) {
    const PoolAxis &x = shape.x, &y = shape.y;
    fits = !is_huge(shape) && int64_t(y.kernel) * x.kernel <= 1 << 20;
    column = x.dilation, row = int(int64_t(y.dilation) * x.in - int64_t(x.kernel) * x.dilation);
    inverse = 1.f / float(x.kernel), places = by_place && fits && !offset;
    next = places ? x.dilation : 1;
  }
  int64_t number(int64_t row, int64_t column) const {
    return places ? row * shape.y.dilation * shape.x.in + column * shape.x.dilation : row * shape.x.kernel + column;
  }
  // Where the window of (oy, ox) begins, for store(); computed there it would be computed for every vector.
  int place(int oy, int ox) const { return indices && fits ? int(index_of(shape, oy, ox, 0, 0)) : 0; }

  // Outputs from element `at` on: the first of them at (oy, ox), whose place is `place`, the others `next` columns
  // further each.
  template <int L, class V>
  [[gnu::always_inline]] inline void store(int64_t at, int oy, int ox, int place, int next, V tap) const {
    if (offset) store_offsets<L>(offset, bytes, at, tap);
    if (!indices) return;
    if (!fits) {
      for (int i = 0; i < L; i++) indices[at + i] = index_of(shape, oy, ox + i * next, tap[i]);
      return;
    }
    using Int = Lanes<int32_t, L>;
    using Float = Lanes<float, L>;
    Int lane;
    for (int i = 0; i < L; i++) lane[i] = i;
    const Int t = __builtin_convertvector(tap, Int);
    Int index = t + lane * (next * shape.x.stride) + place;
    if (!places) {
      const Int rows = __builtin_convertvector((__builtin_convertvector(t, Float) + 0.5f) * inverse, Int);
      index += t * (column - 1) + rows * row;
    }
    store_run<L>(indices + at, past_caches.indices, [&](int64_t* p) __attribute__((always_inline)) {
      store_lanes(p, __builtin_convertvector(index, Lanes<int64_t, L>));
    });
  }
};

// ---- Planes ---------------------------------------------------------------------------------------------------------

// A row of windows ends before p: as many rows as the next one adds, from a little further on, as a short row takes
// less time than a fetch.
template <class T>
void fetch_rows(const T* p, const PoolShape& s) {
  constexpr int64_t kAhead = 1024 / sizeof(T);
  const int64_t rows = std::min(s.y.stride, s.y.kernel);
  prefetch_run(p + (s.y.stride - rows) * s.x.in + kAhead, rows * s.x.in);
}

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
  // Of the rows that a window has inside: where the slot begins, and the number of the row's first tap.
  struct Row {
    int64_t at;
    Tap<A> first;
  }* rows;

  Ring(const PoolShape& s, Arena scratch, size_t* bytes = nullptr)
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
    Best<A, L, true> best{lanes_of<L>(-std::numeric_limits<A>::infinity()), lanes_of<L>(Tap<A>(first))};
    for (int t = first; t < end; t++) best.take(lanes_of<L>(row[position(x, o, t)]), lanes_of<L>(Tap<A>(t)));
    value[o] = best.value[0];
    if (kTaps) tap[o] = best.tap[0];
  };
  for (int o = 0; o < inside.begin; o++) edge(o);
  for_blocks(inside.begin, inside.end, [&](auto lanes, int64_t o) {
    constexpr int L = lanes;
    const A* const p = row + (o * x.stride - x.pad);
    Best<A, L, kTaps> best{strided<L, kStride>(p, 0, x.stride), {}};
    auto take = [&](Tap<A> t, int64_t at) { best.take(strided<L, kStride>(p, at, x.stride), lanes_of<L>(t)); };
    if constexpr (kKernel != 0) {
#pragma GCC unroll 4
      for (int t = 1; t < kKernel; t++) take(t, t);
    } else {
      for (int t = 1; t < x.kernel; t++) take(t, int64_t(t) * x.dilation);
    }
    store_lanes(value + o, best.value);
    if constexpr (kTaps) store_lanes(tap + o, best.tap);
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

// One row of the output from the reduced rows that ring.rows names: kRows of them, or 0 for any number.
template <bool kTaps, int kRows, class T>
void finish_row(const MaxPool2dForward& a, const Winners winners, const Ring<T>& ring, int64_t plane, int oy,
                int count) {
  using A = Accumulate<T>;
  const PoolShape& s = winners.shape;
  const int64_t to = (plane * s.y.out + oy) * s.x.out;
  const int place = winners.place(oy, 0);
  A* const y = ring.kWidens ? ring.output : reinterpret_cast<A*>(static_cast<T*>(a.y) + to);
  const int rows = kRows ? kRows : count;
  typename Ring<T>::Row few[kRows + 1];
  std::copy_n(ring.rows, kRows, few);
  const auto* const row = kRows ? few : ring.rows;
  for_blocks(0, s.x.out, [&](auto lanes, int64_t o) {
    constexpr int L = lanes;
    auto value = [&](int i) { return load_lanes<L>(ring.value + row[i].at + o); };
    auto tap = [&](int i) {
      if constexpr (kTaps) return load_lanes<L>(ring.tap + row[i].at + o) + row[i].first;
      return Lanes<Tap<A>, L>{};
    };
    Best<A, L, kTaps> best{value(0), tap(0)};
#pragma GCC unroll 4
    for (int i = 1; i < rows; i++) best.take(value(i), tap(i));
    store_lanes(y + o, best.value);
    if constexpr (kTaps) winners.store<L>(to + o, oy, int(o), place + int(o) * s.x.stride, 1, best.tap);
  });
  if constexpr (ring.kWidens) copy_row(ring.output, static_cast<T*>(a.y) + to, s.x.out);
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

template <bool kTaps, class T>
void pool_plane(const MaxPool2dForward& a, const Ring<T>& ring, int64_t plane, int begin, int end) {
  using A = Accumulate<T>;
  const PoolShape& s = a.shape;
  const Winners winners(a);
  const Inside inside(s.x);
  const T* const x = static_cast<const T*>(a.x) + plane * s.y.in * s.x.in;
  std::fill(ring.held, ring.held + ring.slots, -1);
  const int slots = int(ring.slots);
  int turn = int(position(s.y, begin, s.y.first_tap(begin))) / slots * slots;  // slot 0's row, at the first of a window
  for (int oy = begin; oy < end; oy++) {
    const int first = s.y.first_tap(oy), last = s.y.end_tap(oy);
    while (position(s.y, oy, first) - turn >= slots) turn += slots;
    int rows = 0;
    fetch_rows(x + position(s.y, oy, s.y.kernel) * s.x.in, s);
    for (int t = first; t < last; t++) {
      const int h = int(position(s.y, oy, t)), slot = h - turn - (h - turn < slots ? 0 : slots);
      ring.rows[rows++] = {slot * ring.pitch, Tap<A>(t) * s.x.kernel};
      if (ring.held[slot] == h) continue;
      ring.held[slot] = h;
      const A* row;
      if constexpr (ring.kWidens)
        copy_row(x + int64_t(h) * s.x.in, ring.row, s.x.in), row = ring.row;
      else
        row = x + int64_t(h) * s.x.in;
      reduce_row<kTaps>(row, s.x, inside, ring.value + slot * ring.pitch, ring.tap + slot * ring.pitch);
    }
    switch (rows) {
      case 0: empty_row<T>(a, plane, oy); break;
      case 2: finish_row<kTaps, 2>(a, winners, ring, plane, oy, rows); break;
      case 3: finish_row<kTaps, 3>(a, winners, ring, plane, oy, rows); break;
      default: finish_row<kTaps, 0>(a, winners, ring, plane, oy, rows);
    }
  }
}

// Rows of windows of kKernel x kKernel taps.
template <int kStride, int kKernel, bool kTaps, class T>
void pool_small(const MaxPool2dForward& a, int64_t plane, int begin, int end) {
  using A = Accumulate<T>;
  const Winners winners(a);
  const PoolShape& s = winners.shape;
  const Inside inside(s.x);
  const T* const x = static_cast<const T*>(a.x) + plane * s.y.in * s.x.in;
  T* const y = static_cast<T*>(a.y);
  for (int oy = begin; oy < end; oy++) {
    const int64_t to = (plane * s.y.out + oy) * s.x.out;
    const int place = winners.place(oy, 0);
    const T* const window = x + int64_t(s.y.begin(oy)) * s.x.in;
    const int from = s.y.first_tap(oy), until = s.y.end_tap(oy);
    fetch_rows(window + int64_t(kKernel) * s.x.in, s);
    auto store = [&](auto lanes, int64_t o, const auto& best) __attribute__((always_inline)) {
      constexpr int L = lanes;
      store_narrow<L>(y + to + o, best.value);
      if constexpr (kTaps) winners.store<L>(to + o, oy, int(o), place + int(o) * s.x.stride, 1, best.tap);
    };
    auto block = [&](auto whole, auto lanes, int64_t o) __attribute__((always_inline)) {
      constexpr int L = lanes;
      const T* const p = window + (o * kStride - s.x.pad);
      const int first = whole ? 0 : from, last = whole ? kKernel : until;
      Best<A, L, kTaps> best;
#pragma GCC unroll 4
      for (int r = first; r < last; r++)
#pragma GCC unroll 4
        for (int t = 0; t < kKernel; t++) {
          const auto v = strided<L, kStride>(p + int64_t(r) * s.x.in, t, kStride);
          const auto tap = lanes_of<L>(Tap<A>(r * kKernel + t));
          if (r == first && t == 0)
            best = {v, tap};
          else
            best.take(v, tap);
        }
      store(lanes, o, best);
    };
    auto edge = [&](int o) {
      constexpr int L = 16 / sizeof(A);  // in vectors, as branches would be taken at random
      const int first = s.x.first_tap(o), last = s.x.end_tap(o);
      Best<A, L, kTaps> best;
      for (int r = from; r < until; r++)
        for (int t = first; t < last; t++) {
          const auto v = lanes_of<L>(A(window[int64_t(r) * s.x.in + position(s.x, o, t)]));
          const auto tap = lanes_of<L>(Tap<A>(r * kKernel + t));
          if (r == from && t == first)
            best = {v, tap};
          else
            best.take(v, tap);
        }
      Best<A, 1, kTaps> one;
      one.value[0] = best.value[0], one.tap[0] = best.tap[0];
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
      with_wanted(a, [&](auto taps) {
        // Registers are for the types that networks have; float64's many would take long to compile.
        if constexpr (!std::is_same_v<T, double>)
          if (small && stride == 2 && kernel == 2) return pool_small<2, 2, taps, T>(a, plane, begin, end);
        if constexpr (std::is_same_v<T, float>) {  // 16-bit rows would be widened for each window that they are in
          if (small && stride == 2 && kernel == 3) return pool_small<2, 3, taps, T>(a, plane, begin, end);
          if (small && stride == 1 && kernel == 3) return pool_small<1, 3, taps, T>(a, plane, begin, end);
        }
        pool_plane<taps.value>(a, ring, plane, begin, end);
      });
    });
  });
}

// ---- Channels -------------------------------------------------------------------------------------------------------

// L * kVectors channels of one output pixel.  x: the first of them in the window's first pixel.
template <int L, int kVectors, bool kTaps, class T>
[[gnu::always_inline]] inline void pool_channels(const MaxPool2dForward& a, const Winners& winners, const T* x, int oy,
                                                 int ox, int place, int64_t to) {
  using A = Accumulate<T>;
  const PoolShape& s = winners.shape;
  const int first_row = s.y.first_tap(oy), end_row = s.y.end_tap(oy);
  const int first = s.x.first_tap(ox), end = s.x.end_tap(ox);
  Best<A, L, kTaps> best[kVectors];
  for (auto& b : best)
    b = {lanes_of<L>(-std::numeric_limits<A>::infinity()), lanes_of<L>(Tap<A>(winners.number(first_row, first)))};
  for (int row = first_row; row < end_row; row++) {
    const T* p = x + (int64_t(row) * s.y.dilation * s.x.in + int64_t(first) * s.x.dilation) * s.c;
    Tap<A> tap = Tap<A>(winners.number(row, first));
    for (int column = first; column < end; column++, p += s.x.dilation * s.c, tap += winners.next)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++) best[v].take(load_wide<L>(p + v * L), lanes_of<L>(tap));
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; v++) {
    store_run<L>(static_cast<T*>(a.y) + to + v * L, winners.past_caches.y,
                 [&](T* p) __attribute__((always_inline)) { store_narrow<L>(p, best[v].value); });
    if constexpr (kTaps) winners.store<L>(to + v * L, oy, ox, place, 0, best[v].tap);
  }
}

template <bool kTaps, class T>
void pool_pixels(const MaxPool2dForward& a, PastCaches past_caches, int64_t n, int oy) {
  constexpr int L = kPoolLanes, kVectors = 4;
  const Winners winners(a, true, past_caches);
  const PoolShape& s = winners.shape;
  const T* const x = static_cast<const T*>(a.x) + (n * s.y.in + s.y.begin(oy)) * s.x.in * s.c;
  auto pool = [&](auto lanes, auto vectors, int ox, int place, int64_t c) __attribute__((always_inline)) {
    pool_channels<lanes, vectors, kTaps>(a, winners, x + int64_t(s.x.begin(ox)) * s.c + c, oy, ox, place,
                                         ((n * s.y.out + oy) * s.x.out + ox) * s.c + c);
  };
  constexpr std::integral_constant<int, 1> one;
  int ox = 0;
  const bool at_end = n == s.n - 1 && position(s.y, oy, s.y.end_tap(oy) - 1) == s.y.in - 1;
  if (!at_end)
    with_spilling_lanes(s.c, [&](auto lanes) __attribute__((always_inline)) {
      for (; ox + 1 < s.x.out; ox++) pool(lanes, one, ox, winners.place(oy, ox), 0);
    });
  for (; ox < s.x.out; ox++) {
    const int place = winners.place(oy, ox);
    int64_t c = 0;
    for (; c + kVectors * L <= s.c; c += kVectors * L)
      pool(std::integral_constant<int, L>(), std::integral_constant<int, kVectors>(), ox, place, c);
    for_blocks(c, s.c, [&](auto lanes, int64_t i) __attribute__((always_inline)) { pool(lanes, one, ox, place, i); });
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
    const PastCaches past_caches = PastCaches::of(a);
    parallel(a.threads, [&](Team team) {
      for_rows(team, s.n, s.y.out, [&](int64_t n, int begin, int end) {
        with_wanted(a, [&](auto taps) {
          for (int oy = begin; oy < end; oy++) pool_pixels<taps.value, T>(a, past_caches, n, oy);
        });
      });
    });
  });
}

}  // namespace fastnorm::cpu::CPU_CAPABILITY
