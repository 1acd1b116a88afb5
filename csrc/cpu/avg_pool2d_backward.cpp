// Average pooling backward on the CPU: every dx gathers from the windows that it is in; ../avg_pool2d.h has the rules.
//
// Planes, 2 x 2 windows that do not overlap: dy, divided, and the same once more beside and below it, in registers.
// Planes, one window of the whole plane: filled.
// Planes, others: the rows of dy that a row of dx is in are divided and added up to one, with zeros around it, and
//   neighbours of that to dx; rows in the same windows share it.
// Channels ([n][h][w][c]): every input pixel takes its windows' pixels, some channels at a time, in registers.
// Floor: S / stride^2 read, S written.
#include "avg_pool2d_sums.h"

namespace fastnorm::cpu::CPU_CAPABILITY {
namespace {

// A thread's sums of rows, element 0 behind a margin.
template <class A>
struct Buffer {
  static constexpr int64_t kBytes = 16 << 10;  // half of the L1 cache
  static constexpr int64_t kMost = 64;
  int64_t margin, pitch, slots;
  A* rows;

  Buffer(const PoolShape& s, Arena scratch, size_t* bytes = nullptr) {
    margin = (s.x.kernel - 1) / s.x.stride + 1;
    pitch = margin + std::max<int64_t>(s.x.out, (s.x.in - 1 + int64_t(s.x.pad)) / s.x.stride + 1);
    slots = std::clamp<int64_t>(kBytes / (pitch * sizeof(A)), 1, std::min(kMost, s.n * s.y.in));
    rows = scratch.take<A>(size());
    if (bytes) *bytes = scratch.used;
  }
  int64_t size() const { return slots * pitch + 2 * kPoolLanes; }
};

// A row of dx from v, the sums of its windows' rows.
template <int kStride, class T, class A>
[[gnu::always_inline]] inline void spread_row(const PoolAxis x, const A* v, T* dx, const T* end) {
  constexpr int L = kPoolLanes;
  constexpr std::make_integer_sequence<int, L> lanes;
  const int stride = kStride ? kStride : x.stride;
  // Of the inputs e behind m strides and the lanes after it.
  auto sum = [&](int64_t m, int e) __attribute__((always_inline)) {
    Lanes<A, L> sum{};
    const int64_t last = m + (int64_t(e) + x.pad) / stride;
    const int64_t taps = (x.kernel - 1 - (int64_t(e) + x.pad) % stride + stride) / stride;
    for (int64_t j = last - taps + 1; j <= last; j++) sum += load_lanes<L>(v + j);
    return sum;
  };
  if constexpr (kStride == 1) {
    for (int64_t i = 0; i < x.in; i += L) store_until<L>(dx + i, sum(i, 0), x.in - i, end);
  } else if constexpr (kStride == 2) {
    for (int64_t i = 0; i < x.in; i += 2 * L) {
      const auto even = sum(i / 2, 0), odd = sum(i / 2, 1);
      store_until<L>(dx + i, interleave<0>(even, odd, lanes), x.in - i, end);
      if (i + L < x.in) store_until<L>(dx + i + L, interleave<L / 2>(even, odd, lanes), x.in - i - L, end);
    }
  } else {
    for (int64_t m = 0; m * stride < x.in; m += L)
      for (int e = 0; e < stride && m * stride + e < x.in; e++) {
        const auto s = sum(m, e);
        A lane[L];
        store_lanes(lane, s);
        const int64_t count = std::min<int64_t>(L, (x.in - 1 - e - m * stride) / stride + 1);
        for (int64_t i = 0; i < count; i++) dx[(m + i) * stride + e] = T(lane[i]);
      }
  }
}

// As add_rows(), of windows that have not all the same divisor.
template <class T, class A>
void divide_rows(const T* dy, Span<A> span, const Divisors<A>& divisors, int64_t width, const T* end, A* to) {
  constexpr int L = kPoolLanes;
  for (int64_t i = 0; i < width; i += L) {
    Lanes<A, L> sum{};
    for (int r = 0; r < span.count(); r++)
      sum += divisors.apply(load_until<L>(dy + r * width + i, width - i, end),
                            load_lanes<L>(divisors.x + i) * divisors.y[span.first + r]);
    store_lanes(to + i, first_lanes(sum, width - i));
  }
}

// Rows [begin, end) of all planes' dx.
template <int kStride, class T, class A = Accumulate<T>>
void spread_rows(const AvgPool2d& a, const Tables<A> tables, const Buffer<A> buffer, int64_t begin, int64_t end) {
  const Divisors<A> divisors = tables.divisors;
  PlaneRows<T> at(a, divisors, true, begin, end);
  const PoolAxis y = at.s.y, x = at.s.x;
  std::fill_n(buffer.rows, buffer.size(), A(0));
  const A* sums[Buffer<A>::kMost];
  for (int64_t r = begin; r < end; r += buffer.slots) {
    const int64_t count = std::min(buffer.slots, end - r);
    for (int64_t i = 0; i < count; i++, at.next()) {
      const Span<A> span = tables.rows[at.row];
      if (i > 0 && at.row > 0 && span.is_same(tables.rows[at.row - 1])) {
        sums[i] = sums[i - 1];
        continue;
      }
      A* const to = buffer.rows + i * buffer.pitch + buffer.margin;
      const T* const dy = at.from + (at.plane * y.out + span.first) * x.out;
      if (span.divisor != 0)
        add_rows(dy, span.count(), x.out, at.from_end, to, [&](auto sum, int64_t o) __attribute__((always_inline)) {
          return divisors.apply(sum, load_lanes<kPoolLanes>(divisors.x + o) * span.divisor);
        });
      else
        divide_rows(dy, span, divisors, x.out, at.from_end, to);
      sums[i] = to;
    }
    for (int64_t i = 0; i < count; i++) spread_row<kStride, T>(x, sums[i], at.to + (r + i) * x.in, at.to_end);
  }
}

template <class T, class A = Accumulate<T>>
void spread_pairs(const AvgPool2d& a, const Divisors<A> divisors, int64_t begin, int64_t end) {
  constexpr int L = kPoolLanes;
  constexpr std::make_integer_sequence<int, L> lanes;
  PlaneRows<T> at(a, divisors, true, begin, end);
  const PoolAxis y = at.s.y, x = at.s.x;
  for (int64_t r = begin; r < end; r++, at.next()) {
    const T* const dy = at.from + (at.plane * y.out + at.row / 2) * x.out;
    const int64_t columns = at.row / 2 < y.out ? x.out : 0;
    T* const to = at.to + r * x.in;
    for (int64_t i = 0; i < x.in; i += 2 * L) {
      const int64_t left = std::max<int64_t>(columns - i / 2, 0);
      auto v = divisors.apply(load_until<L>(dy + i / 2, left, at.from_end), at.divisor);
      if (left < L) v = first_lanes(v, left);
      store_until<L>(to + i, interleave<0>(v, v, lanes), x.in - i, at.to_end);
      if (i + L < x.in) store_until<L>(to + i + L, interleave<L / 2>(v, v, lanes), x.in - i - L, at.to_end);
    }
  }
}

// Rows [begin, end) of planes that are one window.
template <class T, class A = Accumulate<T>>
void spread_whole(const AvgPool2d& a, const Divisors<A>& divisors, int64_t begin, int64_t end) {
  PlaneRows<T> at(a, divisors, true, begin, end);
  for (int64_t r = begin; r < end; at.row = 0, at.plane++) {
    const int64_t rows = std::min<int64_t>(at.height - at.row, end - r);
    const T v = T(divisors.apply(A(at.from[at.plane]), at.divisor));
    std::fill_n(at.to + r * at.s.x.in, rows * at.s.x.in, v);
    r += rows;
  }
}

template <class T, class A>
void spread_planes(const AvgPool2d& a, const Tables<A>& tables, char* scratch) {
  const Divisors<A>& divisors = tables.divisors;
  for_planes<Buffer<A>>(
      a, a.shape.y.in, scratch, [&](int64_t begin, int64_t end) { spread_whole<T>(a, divisors, begin, end); },
      [&](int64_t begin, int64_t end) { spread_pairs<T>(a, divisors, begin, end); },
      [&](auto stride, const Buffer<A>& buffer, int64_t begin, int64_t end) {
        spread_rows<stride, T>(a, tables, buffer, begin, end);
      });
}

}  // namespace

size_t avg_pool2d_backward_workspace(const AvgPool2d& a) { return workspace_bytes<Buffer>(a, true); }

void avg_pool2d_backward(const AvgPool2d& a) {
  pool(a, true,
       [&](auto zero, const auto& tables, char* scratch) { spread_planes<decltype(zero)>(a, tables, scratch); });
}

}  // namespace fastnorm::cpu::CPU_CAPABILITY
