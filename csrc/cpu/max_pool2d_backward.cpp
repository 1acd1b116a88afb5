// Max-pooling backward on the CPU: every dx gathers from the windows that it may have won; ../max_pool2d.h has the
// rules.  Sums are taken window by window in memory's order, as torch does, in float32 (float64 for float64).
//
// Planes, 2 x 2 windows side by side and inside: a vector of dy is given to its four vectors of dx, in registers.
// Planes, others: inputs that are a stride apart meet the same taps of successive windows, so lanes are these and every
// tap is
//   one load of dy and of the offsets.  Windows that overlap reach past the ends of their rows: such rows are read from
//   a copy with zeros around it, some rows ahead, as what was just stored cannot be loaded at another place at once.
// Channels ([n][h][w][c]): every input pixel takes its windows' pixels, some channels at a time, in registers; where
//   windows do not overlap, every window's pixel is given to all of its inputs in the row.
// Floor: S / stride^2 and a byte per output read, S written.
#include <algorithm>

#include "max_pool2d_lanes.h"
#include "output.h"
#include "parallel.h"

namespace fastnorm::cpu::CPU_CAPABILITY {
namespace {

// The windows of an axis that have a tap at an input: every `next` from the first on, and their taps, `less` apart.
// None is before `from`, which never decreases.  In a table, as they take divisions.
struct Windows {
  int first, count, tap, from;
};
struct AxisWindows {
  Windows* of;
  int next = 1, less;

  AxisWindows(const PoolAxis& a, Arena& scratch) : of(scratch.take<Windows>(a.in)) {
    while (next < a.out && int64_t(next) * a.stride % a.dilation) next++;
    less = int(int64_t(next) * a.stride / a.dilation);
    if (!of) return;
    for (int i = 0; i < a.in; i++) {
      const int from = a.first_window(i), end = a.end_window(i), tried = std::min<int64_t>(end, int64_t(from) + next);
      int o = from;
      auto distance = [&] { return i - int64_t(a.begin(o)); };
      while (o < tried && distance() % a.dilation) o++;
      of[i] = o < tried ? Windows{o, (end - 1 - o) / next + 1, int(distance() / a.dilation), from}
                        : Windows{from, 0, 0, from};
    }
  }
};

// ---- Planes ---------------------------------------------------------------------------------------------------------

// A row of windows from the one on that begins at the first input, or before it and nowhere nearer.
template <class A>
struct Row {
  const A* dy;
  const char* offset;
  Tap<A> first;  // of its taps in the row of dx
};

// A thread's copies of rows, in the type that is computed with.
template <class A>
struct Ring {
  static constexpr int64_t kBytes = 16 << 10;  // half of the L1 cache
  int bytes;                                   // of an offset
  bool widens;                                 // 16-bit types
  int64_t margin, pitch, slots;
  A *dy, *dx;  // dx: of 16-bit types, one row
  char* offset;
  Row<A>* rows;

  Ring(const MaxPool2dBackward& a, Arena scratch, size_t* used = nullptr)
      : bytes(a.shape.offset_bytes()), widens(size_of(a.dtype) != sizeof(A)) {
    const PoolShape& s = a.shape;
    margin = int64_t(s.x.kernel - 1) * s.x.dilation / s.x.stride;
    pitch = margin + std::max<int64_t>(s.x.out, (s.x.in - 1 + int64_t(s.x.pad)) / s.x.stride + 1);
    const int64_t needed = (s.y.kernel - 1) * int64_t(s.y.dilation) / s.y.stride + 1;
    slots = std::min<int64_t>(std::max<int64_t>(needed, kBytes / (pitch * (sizeof(A) + bytes))), s.y.out);
    if (margin == 0 && bytes == 1 && !widens) slots = 0;
    dy = scratch.take<A>(slots * pitch), offset = scratch.take<char>(slots * pitch * bytes);
    dx = scratch.take<A>(widens ? s.x.in : 0), rows = scratch.take<Row<A>>(s.y.kernel);
    if (used) *used = scratch.used;
  }
  void clear() const {
    std::fill(dy, dy + slots * pitch, A(0));
    std::fill(offset, offset + slots * pitch * bytes, char(0));
  }
  [[gnu::noinline]] void fetch(const MaxPool2dBackward& a, int64_t from, int64_t slot) const {
    const char* const source_offset = static_cast<const char*>(a.offset) + from * bytes;
    char* const to_offset = offset + (slot * pitch + margin) * bytes;
    with_type(a.dtype, [&](auto zero) {
      using T = decltype(zero);
      if constexpr (std::is_same_v<Accumulate<T>, A>)
        for_blocks(0, a.shape.x.out,
                   [from = static_cast<const T*>(a.dy) + from, to = dy + slot * pitch + margin](auto lanes, int64_t i) {
                     store_lanes(to + i, load_wide<lanes>(from + i));
                   });
    });
    for_blocks(0, a.shape.x.out * int64_t(bytes),
               [&](auto lanes, int64_t i) { std::memcpy(to_offset + i, source_offset + i, lanes); });
  }
  // The row that was made in `dx`, to element `at` on.
  [[gnu::noinline]] void narrow(const MaxPool2dBackward& a, int64_t at) const {
    with_type(a.dtype, [&](auto zero) {
      using T = decltype(zero);
      if constexpr (std::is_same_v<Accumulate<T>, A>)
        for_blocks(0, a.shape.x.in, [from = dx, to = static_cast<T*>(a.dx) + at](auto lanes, int64_t i) {
          store_narrow<lanes>(to + i, load_lanes<lanes>(from + i));
        });
    });
  }
};

// A row of dx from `count` rows of windows, kRows of them if that is not 0; so are the others.  kPad: what the
// stride leaves of the padding, where kKernel is not 0.  end: where rows may not be read any more.
template <int kStride, int kKernel, int kPad, int kRows, int kBytes, class A>
[[gnu::always_inline]] inline void gather_row(const PoolAxis x, int bytes, const Row<A>* row, int count, int64_t end,
                                              A* dx) {
  const int stride = kStride ? kStride : x.stride, pad = kKernel ? kPad : x.pad % stride;
  const int width = kKernel ? kKernel : x.kernel, dilation = kKernel ? 1 : x.dilation;
  const int rows = kRows ? kRows : count;
  // Of the inputs e behind m strides.
  auto sum = [&](auto lanes, int64_t m, int e) __attribute__((always_inline)) {
    constexpr int L = lanes;
    Lanes<A, L> sum{};
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
      for (int t = width - 1; t >= 0; t--) {
        const int64_t begin = e + pad - int64_t(t) * dilation;
        if (begin % stride) continue;
        const int64_t j = m + begin / stride;
        if (L == 1 && j >= end) continue;
        const auto won = load_offsets<kBytes, L, A>(row[i].offset, bytes, j) == lanes_of<L>(Tap<A>(row[i].first + t));
        sum += won ? load_lanes<L>(row[i].dy + j) : Lanes<A, L>{};
      }
    return sum;
  };
  const int64_t whole = std::clamp<int64_t>(end - (stride - 1 + pad) / stride, 0, x.in / stride);
  for_blocks(0, whole, [&](auto lanes, int64_t m) {
    constexpr int L = lanes;
    if constexpr (kStride == 1) {
      store_lanes(dx + m, sum(lanes, m, 0));
    } else if constexpr (kStride == 2 && L > 1) {
      const auto even = sum(lanes, m, 0), odd = sum(lanes, m, 1);
      constexpr std::make_integer_sequence<int, L> all;
      store_lanes(dx + 2 * m, interleave<0>(even, odd, all));
      store_lanes(dx + 2 * m + L, interleave<L / 2>(even, odd, all));
    } else {
      for (int e = 0; e < stride; e++) {
        const auto v = sum(lanes, m, e);
        for (int i = 0; i < L; i++) dx[(m + i) * stride + e] = v[i];
      }
    }
  });
  constexpr std::integral_constant<int, 1> one;
  for (int64_t i = whole * stride; i < x.in; i++) dx[i] = sum(one, i / stride, int(i % stride))[0];
}

template <int kStride, int kKernel, int kPad, int kBytes, class A>
void gather_plane(const MaxPool2dBackward a, const Ring<A> ring, const AxisWindows windows, int64_t plane, int begin,
                  int end) {
  const PoolShape s = a.shape;  // a copy, as stores may change what is referred to
  const int slots = int(ring.slots), bytes = ring.bytes, skip = s.x.pad / s.x.stride;
  const int64_t readable = slots ? s.x.in : s.x.out - skip, first = plane * s.y.out;
  const A* const dy = static_cast<const A*>(a.dy);
  const char* const offset = static_cast<const char*>(a.offset);
  int turn = 0, fetched = 0;  // slot 0's row; one past the last row that is in the ring
  const int last = s.y.end_window(end - 1);
  for (int iy = begin; iy < end; iy++) {
    const Windows w = windows.of[iy];
    auto slot = [&](int oy) { return oy - turn - (oy - turn < slots ? 0 : slots); };
    if (slots && w.count) {
      while (w.from - turn >= slots) turn += slots;
      if (w.first + (w.count - 1) * windows.next >= fetched) {
        fetched = std::max(fetched, w.from);
        for (const int until = std::min(last, w.from + slots); fetched < until; fetched++)
          ring.fetch(a, (first + fetched) * s.x.out, slot(fetched));
      }
    }
    // By members, as vectors of what was stored piece by piece would wait for the stores.
    auto set_row = [&](int i, Row<A>& row) __attribute__((always_inline)) {
      const int oy = w.first + i * windows.next;
      const int64_t at = skip + (slots ? slot(oy) * ring.pitch + ring.margin : (first + oy) * s.x.out);
      row.dy = (slots ? ring.dy : dy) + at;
      row.offset = (slots ? ring.offset : offset) + at * bytes;
      row.first = Tap<A>(w.tap - i * windows.less) * s.x.kernel;
    };
    const int64_t to = (plane * s.y.in + iy) * s.x.in;
    A* const dx = ring.widens ? ring.dx : static_cast<A*>(a.dx) + to;
    auto gather = [&](auto rows) __attribute__((always_inline)) {
      Row<A> few[rows + 1];  // in registers, where they are few
      Row<A>* const all = rows ? few : ring.rows;
      for (int i = 0; i < (rows ? rows : w.count); i++) set_row(i, all[i]);
      gather_row<kStride, kKernel, kPad, rows, kBytes>(s.x, bytes, all, w.count, readable, dx);
    };
    // With a constant kernel inputs inside have one of these numbers of windows.
    constexpr int kMost = kKernel ? (kKernel + kStride - 1) / kStride : 0, kLeast = kKernel ? kKernel / kStride : 0;
    if (w.count == kMost || kMost == 0)
      gather(std::integral_constant<int, kMost>());
    else if (w.count == kLeast && kLeast != kMost)
      gather(std::integral_constant<int, kLeast == kMost ? 0 : kLeast>());
    else
      gather(std::integral_constant<int, 0>());
    if (ring.widens) ring.narrow(a, to);
  }
}

template <class A>
void gather_planes(const MaxPool2dBackward& a, const AxisWindows& windows, char* scratch) {
  const PoolShape& s = a.shape;
  size_t bytes = 0;
  Ring<A>(a, {nullptr}, &bytes);
  parallel(a.threads, [&](Team team) {
    const Ring<A> ring(a, {scratch + team.rank * bytes});
    ring.clear();
    for_rows(team, s.n, s.y.in, [&](int64_t plane, int begin, int end) {
      auto gather = [&](auto stride, auto kernel, auto pad, auto bytes) {
        gather_plane<stride, kernel, pad, bytes>(a, ring, windows, plane, begin, end);
      };
      constexpr std::integral_constant<int, 0> _0;
      constexpr std::integral_constant<int, 1> _1;
      constexpr std::integral_constant<int, 2> _2;
      constexpr std::integral_constant<int, 3> _3;
      const int stride = s.x.stride, kernel = s.x.dilation == 1 ? s.x.kernel : 0;
      const bool odd = s.x.pad % 2;
      if (ring.bytes != 1) return gather(_0, _0, _0, _0);
      if constexpr (std::is_same_v<A, double>) return gather(_0, _0, _0, _1);  // others would take long to compile
      if (stride == 1) return kernel == 3 ? gather(_1, _3, _0, _1) : gather(_1, _0, _0, _1);
      if (stride != 2) return gather(_0, _0, _0, _1);
      if (kernel == 3) return odd ? gather(_2, _3, _1, _1) : gather(_2, _3, _0, _1);
      if (kernel == 2) return odd ? gather(_2, _2, _1, _1) : gather(_2, _2, _0, _1);
      gather(_2, _0, _0, _1);
    });
  });
}

// ---- Channels -------------------------------------------------------------------------------------------------------

// A row of input pixels.
template <int kBytes, class T>
void gather_pixels(const MaxPool2dBackward& a, int64_t n, int iy, const AxisWindows& y, const AxisWindows x,
                   bool streaming) {
  using A = Accumulate<T>;
  constexpr int L = kPoolLanes, kVectors = 4;
  const PoolShape s = a.shape;  // a copy, as stores may change what is referred to
  const int bytes = s.offset_bytes(), next = y.next, less = y.less;
  const int64_t next_column = x.next * s.c;
  const Windows rows = y.of[iy];
  const int64_t first_row = (n * s.y.out + rows.first) * s.x.out;
  const T* const dy = static_cast<const T*>(a.dy);
  const void* const offset = a.offset;
  T* const dx = static_cast<T*>(a.dx) + (n * s.y.in + iy) * s.x.in * s.c;
  // L * kVectors channels of a pixel.
  auto gather = [&](auto lanes, auto vectors, int ix, int64_t channel) __attribute__((always_inline)) {
    constexpr int L = lanes, kVectors = vectors;
    const Windows columns = x.of[ix];
    Lanes<A, L> sum[kVectors] = {};
    for (int i = 0; i < rows.count; i++) {
      int64_t at = (first_row + int64_t(i) * next * s.x.out + columns.first) * s.c + channel;
      Tap<A> tap = Tap<A>(rows.tap - i * less) * s.x.kernel + columns.tap;
      for (int j = 0; j < columns.count; j++, at += next_column, tap -= x.less)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; v++) {
          const auto won = load_offsets<kBytes, L, A>(offset, bytes, at + v * L) == lanes_of<L>(tap);
          sum[v] += won ? load_wide<L>(dy + at + v * L) : Lanes<A, L>{};
        }
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++)
      store_run<L>(dx + ix * s.c + channel + v * L, streaming,
                   [&](T* p) __attribute__((always_inline)) { store_narrow<L>(p, sum[v]); });
  };
  constexpr std::integral_constant<int, 1> one;
  int ix = 0;
  const bool at_end = n == s.n - 1 && rows.first + (rows.count - 1) * next == s.y.out - 1;
  if (kBytes == 1 && !at_end)
    with_spilling_lanes(s.c, [&](auto lanes) __attribute__((always_inline)) {
      for (; ix + 1 < s.x.in; ix++) gather(lanes, one, ix, 0);
    });
  for (; ix < s.x.in; ix++) {
    int64_t c = 0;
    for (; c + kVectors * L <= s.c; c += kVectors * L)
      gather(std::integral_constant<int, L>(), std::integral_constant<int, kVectors>(), ix, c);
    for_blocks(c, s.c, [&](auto lanes, int64_t i) __attribute__((always_inline)) { gather(lanes, one, ix, i); });
  }
}

// All samples' rows.
void gather_channels(const MaxPool2dBackward& a, const AxisWindows& y, const AxisWindows& x, bool streaming) {
  with_type(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    parallel(a.threads, [&](Team team) {
      for_rows(team, a.shape.n, a.shape.y.in, [&](int64_t n, int begin, int end) {
        for (int iy = begin; iy < end; iy++)
          a.shape.offset_bytes() == 1 ? gather_pixels<1, T>(a, n, iy, y, x, streaming)
                                      : gather_pixels<0, T>(a, n, iy, y, x, streaming);
      });
    });
  });
}

// ---- Windows that do not overlap ------------------------------------------------------------------------------------
// Every dy goes to one dx: it is moved, not added.  Offsets are a byte.  B: an unsigned integer as wide as an element.

// Bits of dy as they are when added to 0, which makes -0 into 0.
template <int L, class B>
[[gnu::always_inline]] inline Lanes<B, L> load_added(const B* dy) {
  const auto v = load_lanes<L>(dy);
  return v == lanes_of<L>(B(B(1) << (8 * sizeof(B) - 1))) ? Lanes<B, L>{} : v;
}

// Planes, 2 x 2 windows side by side and inside: rows [begin, end) of them.
template <class B>
void scatter_rows(const MaxPool2dBackward& a, int64_t plane, int begin, int end) {
  const PoolAxis y = a.shape.y, x = a.shape.x;  // copies, as stores may change what is referred to
  for (int64_t oy = begin; oy < end; oy++) {
    const int64_t from = (plane * y.out + oy) * x.out;
    const B* const dy = static_cast<const B*>(a.dy) + from;
    const uint8_t* const offset = static_cast<const uint8_t*>(a.offset) + from;
    B* const dx = static_cast<B*>(a.dx) + (plane * y.in + 2 * oy) * x.in;
    constexpr int64_t kWriteAhead = 2048 / sizeof(B);
    prefetch_run<true>(dx + kWriteAhead, int64_t(2) * x.in);
    for_blocks(0, x.out, [&](auto lanes, int64_t o) __attribute__((always_inline)) {
      constexpr int L = lanes;
      const auto v = load_added<L>(dy + o);
      const auto won = load_bytes<B, L>(offset + o);
      auto taken = [&](int tap) { return won == lanes_of<L>(B(tap)) ? v : Lanes<B, L>{}; };
#pragma GCC unroll 2
      for (int row = 0; row < 2; row++) {
        B* const to = dx + row * int64_t(x.in) + 2 * o;
        const auto even = taken(2 * row), odd = taken(2 * row + 1);
        if constexpr (L == 1) {
          to[0] = even[0], to[1] = odd[0];
        } else {
          constexpr std::make_integer_sequence<int, L> all;
          store_lanes(to, interleave<0>(even, odd, all)), store_lanes(to + L, interleave<L / 2>(even, odd, all));
        }
      }
    });
    for (int64_t i = int64_t(2) * x.out; i < x.in; i++) dx[i] = dx[x.in + i] = 0;
  }
  if (end == y.out) {
    B* const dx = static_cast<B*>(a.dx) + plane * y.in * x.in;
    std::fill(dx + int64_t(2) * y.out * x.in, dx + int64_t(y.in) * x.in, B(0));
  }
}

// Channels: a row of input pixels.
template <class B>
void scatter_pixels(const MaxPool2dBackward& a, int64_t n, int iy, const AxisWindows& y, bool streaming) {
  const PoolShape s = a.shape;  // a copy, as stores may change what is referred to
  const Windows rows = y.of[iy];
  B* const dx = static_cast<B*>(a.dx) + (n * s.y.in + iy) * s.x.in * s.c;
  const bool covered = s.x.stride == s.x.kernel && s.x.pad == 0 && int64_t(s.x.out) * s.x.stride >= s.x.in;
  if (!covered || rows.count == 0) std::fill_n(dx, s.x.in * s.c, B(0));
  if (rows.count == 0) return;
  const int64_t first_row = (n * s.y.out + rows.first) * s.x.out;
  const B* const dy = static_cast<const B*>(a.dy);
  const uint8_t* const offset = static_cast<const uint8_t*>(a.offset);
  const int first_tap = rows.tap * s.x.kernel;
  // L channels of a window, to the inputs of its taps [first, end), which begin at `to`.
  auto scatter = [&](auto lanes, int64_t at, B* to, int first, int end) __attribute__((always_inline)) {
    constexpr int L = lanes;
    const auto won = load_bytes<B, L>(offset + at);
    const auto v = load_added<L>(dy + at);
    for (int t = first; t < end; t++, to += s.c)
      store_run<L>(to, streaming, [&](B* p) __attribute__((always_inline)) {
        store_lanes(p, won == lanes_of<L>(B(first_tap + t)) ? v : Lanes<B, L>{});
      });
  };
  int ox = 0;
  if (covered)
    with_spilling_lanes(s.c, [&](auto lanes) __attribute__((always_inline)) {
      int64_t at = first_row * s.c;
      B* to = dx;
      const int kernel = s.x.kernel;
      for (; ox + 1 < s.x.out; ox++, at += s.c, to += kernel * s.c)
        kernel == 2 ? scatter(lanes, at, to, 0, 2) : scatter(lanes, at, to, 0, kernel);  // 2 is unrolled
    });
  for (; ox < s.x.out; ox++) {
    const int first = s.x.first_tap(ox), end = s.x.end_tap(ox);
    for_blocks(0, s.c, [&](auto lanes, int64_t c) __attribute__((always_inline)) {
      scatter(lanes, (first_row + ox) * s.c + c, dx + (s.x.begin(ox) + first) * s.c + c, first, end);
    });
  }
}

// f(B(), plane or sample, first row, end) on all threads.
template <class F>
void for_rows_of_bits(const MaxPool2dBackward& a, int rows, F f) {
  with_bits(size_of(a.dtype), [&](auto bits) {
    parallel(a.threads, [&](Team team) {
      for_rows(team, a.shape.n, rows, [&](int64_t n, int begin, int end) { f(bits, n, begin, end); });
    });
  });
}

}  // namespace

size_t max_pool2d_backward_workspace(const MaxPool2dBackward& a) {
  if (a.shape.c == 1 && has_pairs(a.shape)) return 0;
  Arena scratch{nullptr};
  AxisWindows(a.shape.y, scratch), AxisWindows(a.shape.x, scratch);
  size_t bytes = 0;
  if (a.shape.c == 1)
    a.dtype == DType::kFloat64 ? void(Ring<double>(a, {nullptr}, &bytes)) : void(Ring<float>(a, {nullptr}, &bytes));
  return scratch.used + bytes * a.threads;
}

void max_pool2d_backward(const MaxPool2dBackward& a) {
  const PoolShape& s = a.shape;
  prefer_huge_pages(a.dx, size_t(s.inputs() * size_of(a.dtype)));
  if (s.c == 1 && has_pairs(s))
    return for_rows_of_bits(a, s.y.out, [&](auto bits, int64_t plane, int begin, int end) {
      scatter_rows<decltype(bits)>(a, plane, begin, end);
    });
  Arena scratch{a.workspace};
  const AxisWindows y(s.y, scratch), x(s.x, scratch);
  if (s.c == 1) {
    char* const rings = scratch.begin + scratch.used;
    return a.dtype == DType::kFloat64 ? gather_planes<double>(a, y, rings) : gather_planes<float>(a, y, rings);
  }
  const int64_t size = size_of(a.dtype), bytes = s.inputs() * size;
  const bool streaming = streams(a.dx, bytes, s.c * size, bytes + s.outputs() * (size + s.offset_bytes()));
  auto is_apart = [](const PoolAxis& axis) { return axis.kernel <= axis.stride && axis.dilation == 1; };
  if (s.offset_bytes() == 1 && is_apart(s.y) && is_apart(s.x))
    return for_rows_of_bits(a, s.y.in, [&](auto bits, int64_t n, int begin, int end) {
      for (int iy = begin; iy < end; iy++) scatter_pixels<decltype(bits)>(a, n, iy, y, streaming);
    });
  gather_channels(a, y, x, streaming);
}

}  // namespace fastnorm::cpu::CPU_CAPABILITY
