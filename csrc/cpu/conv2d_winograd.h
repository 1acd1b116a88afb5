// Winograd's F(4x4, 3x3) and F(2x2, 3x3) (Lavin and Gray, 2016), and what their kernels share: 4x4 results of a 3x3
// window from 6x6 numbers with 36 multiplications, not 144, or 2x2 from 4x4 with 16, not 36.
//
//   y = A^T [ (G g G^T) * (B^T d B) ] A,   dg = G^T [ sum over tiles of (B^T d B) * (A dy A^T) ] G
//
// with the points 0, 1, -1 and infinity, of 4x4 also 2 and -2; * element by element.  With N(0, 1) inputs the largest
// error of 4x4 is 0.5 to 2.6e-5 of the largest result, that of plain sums 0.02 to 1e-5.  2x2 only adds, subtracts and
// halves, and a ninth of the terms are in one sum: its error is 0.1 to 0.5 of oneDNN's plain sums, with any mean.
#pragma once
#include <atomic>

#include "conv2d_problem.h"

namespace fastnorm::cpu::CPU_CAPABILITY::winograd {

// Of kTile x kTile results.
template <int kTile>
struct Sizes {
  static constexpr int kWindow = kTile + 2, kPoints = kWindow * kWindow;
};

// So many tiles have as many points as `tiles` of 4x4.
template <int kTile>
constexpr int64_t same_points(int64_t tiles) {
  return tiles * Sizes<4>::kPoints / Sizes<kTile>::kPoints;
}

// ---- Transforms along one direction ---------------------------------------------------------------------------------

template <class V, class A>
inline V times(A a, V x, V y) {  // a x + y
  return at::vec::fmadd(V(a), x, y);
}

template <int kTile>
struct InputTransform;
template <>
struct InputTransform<4> {  // B^T
  static constexpr int kIn = 6, kOut = 6;
  template <class V, class A = typename V::value_type>
  static void apply(const V (&d)[6], V (&t)[6]) {
    const V a = times(A(-4), d[2], d[4]), b = times(A(-4), d[1], d[3]), c = d[4] - d[2], e = (d[3] - d[1]) * V(A(2));
    t[0] = times(A(4), d[0], times(A(-5), d[2], d[4]));
    t[1] = a + b, t[2] = a - b, t[3] = c + e, t[4] = c - e;
    t[5] = times(A(4), d[1], times(A(-5), d[3], d[5]));
  }
};
template <>
struct InputTransform<2> {
  static constexpr int kIn = 4, kOut = 4;
  template <class V>
  static void apply(const V (&d)[4], V (&t)[4]) {
    t[0] = d[0] - d[2], t[1] = d[1] + d[2], t[2] = d[2] - d[1], t[3] = d[1] - d[3];
  }
};

template <int kTile>
struct OutputTransform;
template <>
struct OutputTransform<4> {  // A^T
  static constexpr int kIn = 6, kOut = 4;
  template <class V, class A = typename V::value_type>
  static void apply(const V (&m)[6], V (&y)[4]) {
    const V a = m[1] + m[2], b = m[1] - m[2], c = m[3] + m[4], d = m[3] - m[4];
    y[0] = m[0] + a + c, y[1] = times(A(2), d, b), y[2] = times(A(4), c, a), y[3] = times(A(8), d, b) + m[5];
  }
};
template <>
struct OutputTransform<2> {
  static constexpr int kIn = 4, kOut = 2;
  template <class V>
  static void apply(const V (&m)[4], V (&y)[2]) {
    y[0] = m[0] + m[1] + m[2], y[1] = m[1] - m[2] - m[3];
  }
};

template <int kTile>
struct FilterTransform;
template <>
struct FilterTransform<4> {  // G
  static constexpr int kIn = 3, kOut = 6;
  template <class V, class A = typename V::value_type>
  static void apply(const V (&g)[3], V (&u)[6]) {
    const V sixth(A(1) / 6), s = (g[0] + g[2]) * sixth, m = g[1] * sixth;
    const V a = times(A(1) / 24, g[0], g[2] * sixth), b = g[1] * V(A(1) / 12);
    u[0] = g[0] * V(A(0.25)), u[1] = V(A(0)) - s - m, u[2] = m - s, u[3] = a + b, u[4] = a - b, u[5] = g[2];
  }
};
template <>
struct FilterTransform<2> {
  static constexpr int kIn = 3, kOut = 4;
  template <class V, class A = typename V::value_type>
  static void apply(const V (&g)[3], V (&u)[4]) {
    const V half(A(0.5)), s = g[0] + g[2];
    u[0] = g[0], u[1] = (s + g[1]) * half, u[2] = (s - g[1]) * half, u[3] = g[2];
  }
};

template <int kTile>
struct GradientTransform;
template <>
struct GradientTransform<4> {  // A
  static constexpr int kIn = 4, kOut = 6;
  template <class V, class A = typename V::value_type>
  static void apply(const V (&y)[4], V (&w)[6]) {
    const V a = y[0] + y[2], b = y[1] + y[3], c = times(A(4), y[2], y[0]), d = times(A(8), y[3], y[1] * V(A(2)));
    w[0] = y[0], w[1] = a + b, w[2] = a - b, w[3] = c + d, w[4] = c - d, w[5] = y[3];
  }
};
template <>
struct GradientTransform<2> {
  static constexpr int kIn = 2, kOut = 4;
  template <class V, class A = typename V::value_type>
  static void apply(const V (&y)[2], V (&w)[4]) {
    w[0] = y[0], w[1] = y[0] + y[1], w[2] = y[0] - y[1], w[3] = V(A(0)) - y[1];
  }
};

template <int kTile>
struct FilterGradientTransform;
template <>
struct FilterGradientTransform<4> {  // G^T
  static constexpr int kIn = 6, kOut = 3;
  template <class V, class A = typename V::value_type>
  static void apply(const V (&u)[6], V (&g)[3]) {
    const V sixth(A(1) / 6), s = (u[1] + u[2]) * sixth, t = u[3] + u[4];
    g[0] = times(A(0.25), u[0], times(A(1) / 24, t, V(A(0)) - s));
    g[1] = times(A(1) / 12, u[3] - u[4], (u[2] - u[1]) * sixth);
    g[2] = times(A(1) / 6, t, u[5] - s);
  }
};
template <>
struct FilterGradientTransform<2> {
  static constexpr int kIn = 4, kOut = 3;
  template <class V, class A = typename V::value_type>
  static void apply(const V (&u)[4], V (&g)[3]) {
    const V half(A(0.5)), s = (u[1] + u[2]) * half;
    g[0] = u[0] + s, g[1] = (u[1] - u[2]) * half, g[2] = s + u[3];
  }
};

// Transforms take infinity from infinity where plain sums would leave it alone.
template <class V>
void report(const FiniteCheck<V>& sums, bool* all_finite) {
  if (!sums.all()) std::atomic_ref(*all_finite).store(false, std::memory_order_relaxed);
}

// Both directions: load(row, column) gives the kIn x kIn vectors, store(row, column, v) takes kOut x kOut.
template <class Transform, class V, class Load, class Store>
[[gnu::always_inline]] inline void transform(Load load, Store store) {
  constexpr int kIn = Transform::kIn, kOut = Transform::kOut;
  V half[kOut][kIn];
#pragma GCC unroll 6
  for (int column = 0; column < kIn; column++) {
    V in[kIn], out[kOut];
#pragma GCC unroll 6
    for (int row = 0; row < kIn; row++) in[row] = load(row, column);
    Transform::apply(in, out);
#pragma GCC unroll 6
    for (int row = 0; row < kOut; row++) half[row][column] = out[row];
  }
#pragma GCC unroll 6
  for (int row = 0; row < kOut; row++) {
    V out[kOut];
    Transform::apply(half[row], out);
#pragma GCC unroll 6
    for (int column = 0; column < kOut; column++) store(row, column, out[column]);
  }
}

// ---- Tiles ----------------------------------------------------------------------------------------------------------

// The tiles of results that are worked on together: whole rows of tiles of one sample, or all of some samples.
template <int kTile>
struct Tiles {
  int64_t n, height, width;  // of the results
  int64_t rows, columns;     // of tiles
  ConvBlocks blocks;

  Tiles(int64_t n, int64_t height, int64_t width, int64_t together)
      : n(n),
        height(height),
        width(width),
        rows(along(height)),
        columns(along(width)),
        blocks(n, rows, columns, together) {}

  static int64_t along(int64_t results) { return (results + kTile - 1) / kTile; }
  int64_t most() const { return blocks.samples * blocks.rows * columns; }  // tiles of a block
  ConvBlock tile_rows(int64_t block) const { return blocks(block, n, rows); }
  // The same in rows of results.
  ConvBlock result_rows(int64_t block) const {
    const ConvBlock b = tile_rows(block);
    return {b.sample, b.sample_end, b.row * kTile, std::min(b.row_end * kTile, height)};
  }
  ConvBlocks result_blocks() const {
    ConvBlocks b = blocks;
    b.rows = std::min(b.rows * kTile, height);
    return b;
  }
  // f(index in the block, sample, first row, first column) for every tile; returns how many.
  template <class F>
  int64_t for_each(int64_t block, F f) const {
    const ConvBlock b = tile_rows(block);
    int64_t i = 0;
    for (int64_t sample = b.sample; sample < b.sample_end; sample++)
      for (int64_t row = b.row; row < b.row_end; row++)
        for (int64_t column = 0; column < columns; column++) f(i++, sample, row * kTile, column * kTile);
    return i;
  }
};

// A distance between neighbours in [point][tile][channel] for which these do not meet in few sets of the L1 cache.
inline int64_t spread(int64_t channels) { return (channels + 31) / 32 * 32 + 16; }

// Likewise from one point to the next: an odd number of cache lines, as a tile's points are written together.
inline int64_t spread_points(int64_t elements) { return ((elements + 15) / 16 | 1) * 16; }

// The transformed pixels that each tile's results see, point by point, from one of which to the next it is `point`;
// place(tile, channel): where the first point has a vector of them.
template <int kTile, class T, class Place>
void transform_input(const Tiles<kTile>& tiles, int64_t block, const ConvView<T>& view, int64_t point, Place place) {
  using A = Accumulate<T>;
  using V = at::vec::Vectorized<A>;
  constexpr int kWindow = Sizes<kTile>::kWindow;
  tiles.for_each(block, [&](int64_t i, int64_t sample, int64_t row, int64_t column) {
    const A* pixel[kWindow][kWindow];
    for (int r = 0; r < kWindow; r++)
      for (int c = 0; c < kWindow; c++)
        pixel[r][c] = view.pixel_or_zeros(sample, view.y.begin(row) + r, view.x.begin(column) + c);
    const int64_t next_tile = kTile * view.layout.channels;
    auto run = [&](int64_t k, auto read) {
      if (!view.copied && k % kLine<A> == 0)  // what the next tile's pixels add
        for (int r = kWindow - kTile; r < kWindow; r++)
          for (int c = kWindow - kTile; c < kWindow; c++) __builtin_prefetch(pixel[r][c] + next_tile + k, 0, 2);
      A* const to = place(i, k);
      transform<InputTransform<kTile>, V>([&](int r, int c) { return read(pixel[r][c] + k); },
                                          [&](int r, int c, V v) { v.store(to + (r * kWindow + c) * point); });
    };
    int64_t k = 0;
    for (; k + V::size() <= view.c; k += V::size()) run(k, [](const A* p) { return V::loadu(p); });
    if (k < view.c) run(k, [&](const A* p) { return V::loadu(p, view.c - k); });
  });
}

}  // namespace fastnorm::cpu::CPU_CAPABILITY::winograd

// The entries of a pass for a kernel.
#define FASTNORM_WINOGRAD_PASS(name, pass, Args, Kernel)                                                          \
  size_t conv2d_##name##_##pass##_workspace(const Args& a) { return conv_workspace<winograd::Kernel, false>(a); } \
  void conv2d_##name##_##pass(const Args& a) { conv_run<winograd::Kernel, false>(a); }
