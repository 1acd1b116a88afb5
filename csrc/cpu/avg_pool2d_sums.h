// What average pooling's forward and backward share on the CPU: divisors, which rows and columns are added up for which
// result, vectors at the end of memory, rows added up, and channels, where the two differ in nothing else.
//
// Vectors run over the end of a row, as long as they stay inside of what the thread may touch: what is too much in a
// store lies in the next row, which is written later.
#pragma once
#include "../avg_pool2d.h"
#include "output.h"
#include "pool_lanes.h"

namespace fastnorm::cpu::CPU_CAPABILITY {
namespace {

// What is added up for one row or column of results: of the source, from the first to before the end.
template <class A>
struct Span {
  int first, end;
  A divisor;  // this direction's part of it, or of its reciprocal; 0 if it is not the same for all of them
  int count() const { return end - first; }
  bool is_same(const Span& other) const { return first == other.first && end == other.end && divisor == other.divisor; }
};

// The divisors, each a product of a row's and a column's number.
template <class A>
struct Divisors {
  A *y, *x;           // of the windows; x: followed by a vector of ones
  bool exact = true;  // all are powers of two: in their place are the reciprocals

  Divisors(const AvgPool2d& a, Arena& scratch) {
    const PoolShape& s = a.shape;
    y = scratch.take<A>(s.y.out), x = scratch.take<A>(s.x.out + kPoolLanes);
    if (!y) return;
    auto fill = [&](A* to, int n, auto number) {
      for (int o = 0; o < n; o++) {
        const int64_t counted = number(o);
        exact &= (counted & (counted - 1)) == 0 && counted > 0;
        to[o] = A(counted);
      }
    };
    fill(y, s.y.out, [&](int o) { return a.counted_rows(o); });
    fill(x, s.x.out, [&](int o) { return a.counted_columns(o); });
    if (exact) {
      for (int o = 0; o < s.y.out; o++) y[o] = 1 / y[o];
      for (int o = 0; o < s.x.out; o++) x[o] = 1 / x[o];
    }
    std::fill_n(x + s.x.out, kPoolLanes, A(1));
  }
  template <class V, class D>
  [[gnu::always_inline]] inline V apply(V sum, D divisor) const {
    return exact ? sum * divisor : sum / divisor;
  }

  // Forward: the positions of every window.
  Span<A>* inside(const PoolAxis& axis, const A* divisor, Arena& scratch) const {
    Span<A>* const spans = scratch.take<Span<A>>(axis.out);
    for (int o = 0; spans && o < axis.out; o++) {
      const int first = AvgPool2d::first_inside(axis, o);
      spans[o] = {first, std::max(first, AvgPool2d::end_inside(axis, o)), divisor[o]};
    }
    return spans;
  }
  // Backward: the windows of every position.
  Span<A>* windows(const PoolAxis& axis, const A* divisor, Arena& scratch) const {
    Span<A>* const spans = scratch.take<Span<A>>(axis.in);
    for (int i = 0; spans && i < axis.in; i++) {
      const int first = axis.first_window(i), end = std::max(first, axis.end_window(i));
      spans[i] = {first, end, first < end ? divisor[first] : A(1)};
      for (int o = first; o < end; o++)
        if (divisor[o] != divisor[first]) spans[i].divisor = 0;
    }
    return spans;
  }
};

// What all threads share.  inputs: whether the results are dx; else y.
template <class A>
struct Tables {
  Divisors<A> divisors;
  const Span<A>*rows, *columns;

  Tables(const AvgPool2d& a, bool inputs, Arena& scratch) : divisors(a, scratch) {
    const PoolAxis &y = a.shape.y, &x = a.shape.x;
    rows = inputs ? divisors.windows(y, divisors.y, scratch) : divisors.inside(y, divisors.y, scratch);
    columns = inputs ? divisors.windows(x, divisors.x, scratch) : divisors.inside(x, divisors.x, scratch);
  }
};

// Whether a plane is one window.
inline bool is_whole(const PoolShape& s) {
  auto whole = [](const PoolAxis& a) { return a.out == 1 && a.begin(0) + int64_t(a.kernel) >= a.in; };
  return whole(s.y) && whole(s.x);
}

// ---- The end of memory ----------------------------------------------------------------------------------------------

// p[0 .. count), zeros after that; nothing from `end` on is read.
template <int L, class T>
[[gnu::always_inline]] inline Lanes<Accumulate<T>, L> load_until(const T* p, int64_t count, const T* end) {
  if (p + L <= end) [[likely]]
    return load_wide<L>(p);
  T some[L] = {};
  std::memcpy(some, p, std::min<int64_t>(count, L) * sizeof(T));
  return load_wide<L>(some);
}

// p[0 .. count), and more if that is before the end.
template <int L, class T>
[[gnu::always_inline]] inline void store_until(T* p, Lanes<Accumulate<T>, L> v, int64_t count, const T* end) {
  if (p + L <= end) [[likely]]
    return store_narrow<L>(p, v);
  T some[L];
  store_narrow<L>(some, v);
  std::memcpy(p, some, std::min<int64_t>(count, L) * sizeof(T));
}

// The first count lanes, and zeros.
template <class V>
[[gnu::always_inline]] inline V first_lanes(V v, int64_t count) {
  using A = std::remove_cvref_t<decltype(v[0])>;
  using Int = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
  constexpr int L = sizeof(V) / sizeof(A);
  Lanes<Int, L> lane;
  for (int i = 0; i < L; i++) lane[i] = i;
  return lane < lanes_of<L>(Int(std::min<int64_t>(count, L))) ? v : V{};
}

// body(first, end) for runs of rows that follow each other in memory.
template <class F>
void for_row_runs(Team team, int64_t rows, F body) {
  const int64_t tasks = team.size == 1 ? 1 : std::min<int64_t>(rows, 16 * team.size);
  team.for_each(tasks, [&](int64_t task) { body(rows * task / tasks, rows * (task + 1) / tasks); });
}

// ---- Rows -----------------------------------------------------------------------------------------------------------

// to[i] = the sum of element i of some rows, scaled by scale(sum, i), for i < width, then zeros to the vector's end.
template <class T, class Scale>
[[gnu::always_inline]] inline void add_rows(const T* from, int rows, int64_t width, const T* end, Accumulate<T>* to,
                                            Scale scale) {
  using A = Accumulate<T>;
  constexpr int L = kPoolLanes, kVectors = 4;
  int64_t i = 0;
  for (; i + kVectors * L <= width; i += kVectors * L) {
    Lanes<A, L> sum[kVectors] = {};
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++) sum[v] += load_wide<L>(from + r * width + i + v * L);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) store_lanes(to + i + v * L, scale(sum[v], i + v * L));
  }
  for (; i < width; i += L) {
    Lanes<A, L> sum{};
    for (int r = 0; r < rows; r++) sum += load_until<L>(from + r * width + i, width - i, end);
    store_lanes(to + i, first_lanes(scale(sum, i), width - i));
  }
}

// ---- Planes ---------------------------------------------------------------------------------------------------------

// For runs of the results' rows, of which a plane has so many: whole(begin, end) where a plane is one window,
// pairs(begin, end) where windows are, else rows(stride, buffer, begin, end) with the stride as a constant, or 0.
template <class Buffer, class Whole, class Pairs, class Rows>
void for_planes(const AvgPool2d& a, int rows_of_plane, char* scratch, Whole whole, Pairs pairs, Rows rows) {
  const PoolShape& s = a.shape;
  size_t bytes = 0;
  Buffer(s, {nullptr}, &bytes);
  parallel(a.threads, [&](Team team) {
    const Buffer buffer(s, {scratch + team.rank * bytes});
    for_row_runs(team, s.n * rows_of_plane, [&](int64_t begin, int64_t end) {
      if (is_whole(s)) return whole(begin, end);
      if (has_pairs(s)) return pairs(begin, end);
      switch (s.x.stride) {
        case 1: return rows(std::integral_constant<int, 1>(), buffer, begin, end);
        case 2: return rows(std::integral_constant<int, 2>(), buffer, begin, end);
        default: return rows(std::integral_constant<int, 0>(), buffer, begin, end);
      }
    });
  });
}

// A run of the results' rows, as kernels need it: a copy of the arguments, as stores may change what is referred to.
template <class T>
struct PlaneRows {
  using A = Accumulate<T>;
  PoolShape s;
  const T *from, *from_end;
  T *to, *to_end;
  A divisor;        // of the first window
  int64_t plane;    // where the next row is
  int row, height;  // of how many in its plane

  PlaneRows(const AvgPool2d& a, const Divisors<A>& divisors, bool inputs, int64_t begin, int64_t end)
      : s(a.shape), from(static_cast<const T*>(a.from)), to(static_cast<T*>(a.to)) {
    height = inputs ? s.y.in : s.y.out;
    from_end = from + (inputs ? s.outputs() : s.inputs());
    to_end = to + end * (inputs ? s.x.in : s.x.out);
    divisor = divisors.y[0] * divisors.x[0];
    plane = begin / height, row = int(begin - plane * height);
  }
  void next() {
    if (++row == height) row = 0, plane++;
  }
};

// ---- Channels -------------------------------------------------------------------------------------------------------

// Results [n][height][width][c] from a source [n][source_height][source_width][c].  Where a span has no divisor, it is
// the windows', which then are the source.
template <class T>
struct ChannelSums {
  using A = Accumulate<T>;
  const Tables<A>& tables;
  int64_t n, c, height, width, source_height, source_width;
  const T* from;
  T* to;

  ChannelSums(const AvgPool2d& a, const Tables<A>& tables, bool inputs)
      : tables(tables), n(a.shape.n), c(a.shape.c), from(static_cast<const T*>(a.from)), to(static_cast<T*>(a.to)) {
    const PoolAxis &y = a.shape.y, &x = a.shape.x;
    height = inputs ? y.in : y.out, source_height = inputs ? y.out : y.in;
    width = inputs ? x.in : x.out, source_width = inputs ? x.out : x.in;
  }

  // L * kVectors channels of one result; p is where they are in the first pixel that is added up.  kRows * kColumns
  // pixels, if those are not 0.  kInside: memory does not end before a vector does.
  template <int L, int kVectors, int kRows, int kColumns, bool kInside>
  [[gnu::always_inline]] inline void sum(const T* p, Span<A> row, Span<A> column, T* result, const T* from_end,
                                         const T* to_end) const {
    const Divisors<A>& divisors = tables.divisors;
    const int tap_rows = kRows ? kRows : row.count(), tap_columns = kColumns ? kColumns : column.count();
    const A divisor = row.divisor * column.divisor;
    Lanes<A, L> total[kVectors] = {};
#pragma GCC unroll 4
    for (int i = 0; i < tap_rows; i++, p += source_width * c) {
      Lanes<A, L> sum[kVectors] = {};
#pragma GCC unroll 4
      for (int j = 0; j < tap_columns; j++)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; v++) {
          const T* const q = p + j * c + v * L;
          const auto x = kInside ? load_wide<L>(q) : load_until<L>(q, c, from_end);
          if (kRows || divisor != 0)
            sum[v] += x;
          else
            sum[v] += divisors.apply(x, divisors.y[row.first + i] * divisors.x[column.first + j]);
        }
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++) total[v] += sum[v];
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) {
      const auto y = kRows || divisor != 0 ? divisors.apply(total[v], divisor) : total[v];
      kInside ? store_narrow<L>(result + v * L, y) : store_until<L>(result, y, c, to_end);
    }
  }

  template <int L, bool kInside>
  [[gnu::always_inline]] inline void sum_row(const T* source, Span<A> row, T* results, const T* from_end,
                                             const T* to_end) const {
    constexpr int kVectors = 4;
    for (int64_t i = 0; i < width; i++) {
      const Span<A> column = tables.columns[i];
      const T* const p = source + column.first * c;
      T* const result = results + i * c;
      if (c >= kVectors * L && i > 0 && column.is_same(tables.columns[i - 1])) {
        std::memcpy(result, result - c, c * sizeof(T));
        continue;
      }
      auto all = [&](auto tap_rows, auto tap_columns) __attribute__((always_inline)) {
        int64_t at = 0;
        if constexpr (L == kPoolLanes) {
          for (; at + kVectors * L <= c; at += kVectors * L)
            sum<L, kVectors, tap_rows, tap_columns, true>(p + at, row, column, result + at, from_end, to_end);
          for (; at + 2 * L <= c; at += 2 * L)
            sum<L, 2, tap_rows, tap_columns, true>(p + at, row, column, result + at, from_end, to_end);
        }
        for (; at < c; at += L) {
          const int64_t k = at + L > c && c >= L ? c - L : at;
          sum<L, 1, tap_rows, tap_columns, kInside>(p + k, row, column, result + k, from_end, to_end);
        }
      };
      constexpr std::integral_constant<int, 0> any;
      constexpr std::integral_constant<int, 1> one;
      constexpr std::integral_constant<int, 2> two;
      if (row.count() == 1 && column.count() == 1)
        all(one, one);
      else if (row.count() == 2 && column.count() == 2 && row.divisor * column.divisor != 0)
        all(two, two);
      else
        all(any, any);
    }
  }

  // The rows [begin, end) of all samples' results.
  template <int L>
  void run(int64_t begin, int64_t end) const {
    constexpr size_t kCopied = 16 << 10;  // bytes of a row that is still in the L1 cache
    const ChannelSums a = *this;          // a copy, as stores may change what is referred to
    const T *const from_end = a.from + a.n * a.source_height * a.source_width * a.c, *const to_end =
                                                                                         a.to + end * a.width * a.c;
    for (int64_t r = begin; r < end; r++) {
      const int64_t sample = r / a.height, y = r - sample * a.height, size = a.width * a.c;
      const Span<A> row = a.tables.rows[y];
      T* const results = a.to + r * size;
      if (r > begin && y > 0 && size * sizeof(T) <= kCopied && row.is_same(a.tables.rows[y - 1])) {
        std::memcpy(results, results - size, size * sizeof(T));
        continue;
      }
      const int64_t source_size = a.source_width * a.c;
      const T* const source = a.from + (sample * a.source_height + row.first) * source_size;
      if (source + row.count() * source_size + L <= from_end && results + size + L <= to_end)
        a.template sum_row<L, true>(source, row, results, from_end, to_end);
      else
        a.template sum_row<L, false>(source, row, results, from_end, to_end);
    }
  }

  void run(int threads) const {
    parallel(threads, [&](Team team) {
      for_row_runs(team, n * height, [&](int64_t begin, int64_t end) {
        if (2 * c > kPoolLanes || sizeof(T) == 2) return run<kPoolLanes>(begin, end);
        if (4 * c > kPoolLanes) return run<kPoolLanes / 2>(begin, end);
        run<kPoolLanes / 4>(begin, end);
      });
    });
  }
};

// ---- Entries --------------------------------------------------------------------------------------------------------

template <template <class> class Buffer>
size_t workspace_bytes(const AvgPool2d& a, bool inputs) {
  Arena scratch{nullptr};
  size_t bytes = 0;
  with_type(a.dtype, [&](auto zero) {
    using A = Accumulate<decltype(zero)>;
    const Tables<A> tables(a, inputs, scratch);
    if (a.shape.c == 1) Buffer<A>(a.shape, {nullptr}, &bytes);
  });
  return scratch.used + bytes * a.threads;
}

// planes(T(), tables, scratch of the threads), or what channels need.
template <class Planes>
void pool(const AvgPool2d& a, bool inputs, Planes planes) {
  const PoolShape& s = a.shape;
  prefer_huge_pages(a.to, size_t((inputs ? s.inputs() : s.outputs()) * size_of(a.dtype)));
  with_type(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    Arena scratch{a.workspace};
    const Tables<Accumulate<T>> tables(a, inputs, scratch);
    if (s.c == 1) return planes(zero, tables, scratch.begin + scratch.used);
    ChannelSums<T>(a, tables, inputs).run(a.threads);
  });
}

}  // namespace
}  // namespace fastnorm::cpu::CPU_CAPABILITY
