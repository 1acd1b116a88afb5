// Average pooling forward on the CPU; ../avg_pool2d.h has the rules.
//
// Planes, 2 x 2 windows that do not overlap and are all inside: in registers.
// Planes, one window of the whole plane: vectors along the plane, in chunks whose sums are added in float64.
// Planes, others: the rows of the windows are added up to one row, with zeros in the padding's place, and neighbours of
//   that to outputs.  Some rows at a time, as what was just stored cannot be loaded at another place at once.
// Channels ([n][h][w][c]): every output pixel takes its window's pixels, some channels at a time, in registers.
// No sum is taken from another one, so that a NaN stays where it is.  Floor: S read, S / stride^2 written.
#include "avg_pool2d_sums.h"

namespace fastnorm::cpu::CPU_CAPABILITY {
namespace {

// A thread's sums of rows.
template <class A>
struct Buffer {
  static constexpr int64_t kBytes = 16 << 10;  // half of the L1 cache
  static constexpr int64_t kMost = 64;
  int64_t pitch, slots;
  A* rows;

  Buffer(const PoolShape& s, Arena scratch, size_t* bytes = nullptr) {
    pitch = std::max<int64_t>(int64_t(s.x.pad) + s.x.in, (s.x.out - 1) * int64_t(s.x.stride) + s.x.kernel);
    slots = std::clamp<int64_t>(kBytes / (pitch * sizeof(A)), 1, std::min(kMost, s.n * s.y.out));
    rows = scratch.take<A>(size());
    if (bytes) *bytes = scratch.used;
  }
  int64_t size() const { return slots * pitch + 4 * kPoolLanes; }
};

// For lane i the sum of v[i * stride + t] over t < kernel; lanes from count on are of no use.  Reads less than four
// vectors behind the last element that counts.
template <int kStride, int L, class A>
[[gnu::always_inline]] inline Lanes<A, L> add_columns(const A* v, int stride, int kernel, int64_t count) {
  constexpr std::make_integer_sequence<int, L> lanes;
  Lanes<A, L> sum{};
  if constexpr (kStride == 1) {
    for (int t = 0; t < kernel; t++) sum += load_lanes<L>(v + t);
  } else if constexpr (kStride == 2) {
    int t = 0;
    for (; t + 2 <= kernel; t += 2) sum += every_other<0, L>(v + t, lanes) + every_other<1, L>(v + t, lanes);
    if (t < kernel) sum += every_other<0, L>(v + t, lanes);
  } else {
    A lane[L] = {};
    for (int64_t i = 0; i < std::min<int64_t>(L, count); i++)
      for (int t = 0; t < kernel; t++) lane[i] += v[i * stride + t];
    sum = load_lanes<L>(lane);
  }
  return sum;
}

// Rows [begin, end) of all planes' outputs.
template <int kStride, class T, class A = Accumulate<T>>
void pool_rows(const AvgPool2d& a, const Tables<A> tables, const Buffer<A> buffer, int64_t begin, int64_t end) {
  const Divisors<A> divisors = tables.divisors;
  constexpr int L = kPoolLanes;
  PlaneRows<T> at(a, divisors, false, begin, end);
  const PoolAxis y = at.s.y, x = at.s.x;
  std::fill_n(buffer.rows, buffer.size(), A(0));
  A divisor[Buffer<A>::kMost];
  for (int64_t r = begin; r < end; r += buffer.slots) {
    const int64_t count = std::min(buffer.slots, end - r);
    for (int64_t i = 0; i < count; i++, at.next()) {
      const Span<A> span = tables.rows[at.row];
      divisor[i] = span.divisor;
      add_rows(at.from + (at.plane * y.in + span.first) * x.in, span.count(), x.in, at.from_end,
               buffer.rows + i * buffer.pitch + x.pad, [](auto sum, int64_t) { return sum; });
    }
    for (int64_t i = 0; i < count; i++) {
      const A* const v = buffer.rows + i * buffer.pitch;
      T* const to = at.to + (r + i) * x.out;
      for (int64_t o = 0; o < x.out; o += L) {
        const auto sum = add_columns<kStride, L>(v + o * x.stride, x.stride, x.kernel, x.out - o);
        store_until<L>(to + o, divisors.apply(sum, load_lanes<L>(divisors.x + o) * divisor[i]), x.out - o, at.to_end);
      }
    }
  }
}

template <class T, class A = Accumulate<T>>
void pool_pairs(const AvgPool2d& a, const Divisors<A> divisors, int64_t begin, int64_t end) {
  constexpr int L = kPoolLanes;
  constexpr std::make_integer_sequence<int, L> lanes;
  PlaneRows<T> at(a, divisors, false, begin, end);
  const int64_t in = at.s.x.in, out = at.s.x.out;
  for (int64_t r = begin; r < end; r++, at.next()) {
    const T* const row = at.from + (at.plane * at.s.y.in + 2 * at.row) * in;
    T* const to = at.to + r * out;
    for (int64_t o = 0; o < out; o += L) {
      const T *const p = row + 2 * o, *const q = p + in;
      const int64_t left = 2 * (out - o), more = std::max<int64_t>(left - L, 0);
      const auto low = load_until<L>(p, left, at.from_end) + load_until<L>(q, left, at.from_end);
      const auto high = load_until<L>(p + L, more, at.from_end) + load_until<L>(q + L, more, at.from_end);
      const auto sum = deinterleave<0>(low, high, lanes) + deinterleave<1>(low, high, lanes);
      store_until<L>(to + o, divisors.apply(sum, at.divisor), out - o, at.to_end);
    }
  }
}

// The sum of p[0 .. n).
template <class T>
double add_all(const T* p, int64_t n, const T* end) {
  using A = Accumulate<T>;
  constexpr int L = kPoolLanes, kVectors = 4;
  constexpr int64_t kChunk = 4096;
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    const int64_t until = std::min(n, begin + kChunk);
    Lanes<A, L> sum[kVectors] = {};
    int64_t i = begin;
    for (; i + kVectors * L <= until; i += kVectors * L)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++) sum[v] += load_wide<L>(p + i + v * L);
    for (; i + L <= until; i += L) sum[0] += load_wide<L>(p + i);
    if (i < until) sum[1] += first_lanes(load_until<L>(p + i, until - i, end), until - i);
    A lane[L];
    store_lanes(lane, (sum[0] + sum[1]) + (sum[2] + sum[3]));
#pragma GCC unroll 4
    for (int half = L / 2; half > 0; half /= 2)
      for (int j = 0; j < half; j++) lane[j] += lane[j + half];
    total += double(lane[0]);
  }
  return total;
}

template <class T, class A>
void pool_planes(const AvgPool2d& a, const Tables<A>& tables, char* scratch) {
  const Divisors<A>& divisors = tables.divisors;
  for_planes<Buffer<A>>(
      a, a.shape.y.out, scratch,
      [&](int64_t begin, int64_t end) {
        const PlaneRows<T> at(a, divisors, false, begin, end);
        const int64_t plane = int64_t(at.s.y.in) * at.s.x.in;
        for (int64_t i = begin; i < end; i++)
          at.to[i] = T(divisors.apply(A(add_all(at.from + i * plane, plane, at.from_end)), at.divisor));
      },
      [&](int64_t begin, int64_t end) { pool_pairs<T>(a, divisors, begin, end); },
      [&](auto stride, const Buffer<A>& buffer, int64_t begin, int64_t end) {
        pool_rows<stride, T>(a, tables, buffer, begin, end);
      });
}

}  // namespace

size_t avg_pool2d_forward_workspace(const AvgPool2d& a) { return workspace_bytes<Buffer>(a, false); }

void avg_pool2d_forward(const AvgPool2d& a) {
  pool(a, false,
       [&](auto zero, const auto& tables, char* scratch) { pool_planes<decltype(zero)>(a, tables, scratch); });
}

}  // namespace fastnorm::cpu::CPU_CAPABILITY
