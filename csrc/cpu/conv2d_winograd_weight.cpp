// The gradient of a convolution to its weights and bias by Winograd's algorithm; conv2d_winograd.h has it.
//
// For a block of tiles the transformed pixels of x are [point][panel][tile][column], those of dy are [point][bundle]
// [tile][channel], and each point's products over the tiles add up in [point][panel][co][column], which the last
// transform makes a gradient of 3x3 taps: what a product reads and writes is always a run.  The order of sums depends
// on the shape alone: blocks go to a fixed number of parts with sums of their own, which are added up in order.
//
// Floor: a quarter of im2col's multiply-adds, 4/9 with tiles of 2x2; the sums move from and to memory once per block,
// so blocks are larger with more channels, up to where what they hold leaves the L2 cache.  All of it runs at 45 to
// 70 % of the multiply-adds' peak with AVX-512 and 2 MB of L2, the less the more sums there are.
#include "conv2d_winograd.h"

namespace fastnorm::cpu::CPU_CAPABILITY {
namespace winograd {
namespace {

constexpr int64_t kBundle = 48;      // channels of dy that are side by side: whole tiles, and whole vectors
constexpr int64_t kInNearest = 144;  // of so many tiles a panel stays in the L1 cache

template <class T, int kTile>
struct WeightGradient : ConvWeightWork<T>, Sizes<kTile> {
  using Work = ConvWeightWork<T>;
  using typename Work::A, typename Work::V;
  using Sizes<kTile>::kWindow, Sizes<kTile>::kPoints;
  using Work::kColumns, Work::p, Work::s, Work::y, Work::x, Work::x_layout, Work::dy_layout;

  const int64_t panels;  // of x's channels
  const bool plain;
  const Tiles<kTile> tiles;
  const ConvParts split;
  A *sums, *bias_sums, *zeros;
  const ConvMemory memory;

  explicit WeightGradient(const Conv2dBackwardWeight& a)
      : Work(a),
        panels((s.ci + kColumns - 1) / kColumns),
        plain(s.channels_last && std::is_same_v<T, A>),
        tiles(s.n, y.out, x.out, same_points<kTile>(std::clamp<int64_t>(s.ci * s.co / 256, 32, 64))),
        split(sums_of_part() * int64_t(sizeof(A)), tiles.blocks.count, s.groups, s.co, p.threads),
        memory(*this) {}

  int64_t panel() const { return s.co * kColumns; }  // of sums
  int64_t point() const { return spread_points(panels * panel()); }
  int64_t sums_of_part() const { return s.groups * kPoints * point(); }
  int64_t dy_pitch() const { return (split.widest() + kBundle - 1) / kBundle * kBundle; }
  // From one point of a block's transformed pixels, or of dy's, to the next.
  int64_t pixels_point() const { return spread_points(tiles.most() * panels * kColumns); }
  int64_t gradients_point() const { return spread_points(tiles.most() * dy_pitch()); }
  size_t bytes() const { return memory.bytes(p.threads); }

  void layout_shared(Arena& scratch) {
    sums = scratch.take<A>(split.parts * sums_of_part());
    bias_sums = scratch.take<A>(split.parts * s.groups * s.co);
    zeros = scratch.take<A>(std::max(s.ci, s.co) + kColumns);
  }

  struct Own {
    A *image, *dy, *pixels, *gradients, *bias;

    Own(const WeightGradient& q, Arena& scratch) {
      const ConvBlocks blocks = q.tiles.result_blocks();
      image = scratch.take<A>(q.plain ? 0 : ConvView<T>::elements(q.y, q.x, blocks, q.s.ci));
      dy = scratch.take<A>(q.plain ? 0 : blocks.samples * blocks.rows * q.x.out * q.dy_pitch());
      pixels = scratch.take<A>(kPoints * q.pixels_point());
      gradients = scratch.take<A>(kPoints * q.gradients_point());
      bias = scratch.take<A>(q.dy_pitch());
    }
  };

  // Gradients of `count` tiles from `width` channels of dy, and these channels' sums.
  void transform_dy(int64_t block, int64_t channel, int64_t width, int64_t count, const Own& own) const {
    const ConvBlock rows = tiles.result_rows(block);
    const int64_t per_sample = (rows.row_end - rows.row) * x.out, at = rows.row * x.out;
    const T* const first = static_cast<const T*>(p.dy);
    if (!plain)
      for (int64_t n = rows.sample; n < rows.sample_end; n++)
        read_pixels<T>(first + n * dy_layout.channels * dy_layout.pixels, dy_layout, channel, width, at, per_sample,
                       own.dy + (n - rows.sample) * per_sample * dy_pitch(), dy_pitch());
    const int64_t step = gradients_point();
    std::fill_n(own.bias, dy_pitch(), A(0));
    tiles.for_each(block, [&](int64_t i, int64_t n, int64_t row, int64_t column) {
      const A* pixel[kTile][kTile];
      for (int64_t r = 0; r < kTile; r++)
        for (int64_t c = 0; c < kTile; c++) {
          pixel[r][c] = zeros;
          if (row + r >= y.out || column + c >= x.out) continue;
          const int64_t in_rows = (row + r - rows.row) * x.out + column + c;
          pixel[r][c] = own.dy + ((n - rows.sample) * per_sample + in_rows) * dy_pitch();
          if constexpr (std::is_same_v<T, A>)
            if (plain) pixel[r][c] = first + (n * dy_layout.pixels + at + in_rows) * dy_layout.channels + channel;
        }
      auto run = [&](int64_t k, auto read) {
        A* const to = own.gradients + (k / kBundle * count + i) * kBundle + k % kBundle;
        if (plain && k % kLine<A> == 0)
          for (const auto& pixels : pixel)
            for (const A* q : pixels) __builtin_prefetch(q + kTile * dy_layout.channels + k, 0, 2);
        V sum(A(0));
        transform<GradientTransform<kTile>, V>(
            [&](int r, int c) {
              const V v = read(pixel[r][c] + k);
              sum = sum + v;
              return v;
            },
            [&](int r, int c, V v) { v.store(to + (r * kWindow + c) * step); });
        (V::loadu(own.bias + k) + sum).store(own.bias + k);
      };
      int64_t k = 0;
      for (; k + V::size() <= width; k += V::size()) run(k, [](const A* q) { return V::loadu(q); });
      if (k < width) run(k, [&](const A* q) { return V::loadu(q, width - k); });
    });
  }

  void add_block(int64_t block, bool first, int64_t group, int64_t begin, int64_t end, const Own& own, A* to) const {
    ConvView<T> view(y, x, x_layout, group * s.ci, s.ci, !plain, p.x, zeros, own.image, s.ci);
    view.read(tiles.result_rows(block));
    const int64_t count = tiles.for_each(block, [](auto...) {});
    transform_input(tiles, block, view, pixels_point(), [&](int64_t i, int64_t k) {
      return own.pixels + (k / kColumns * count + i) * kColumns + k % kColumns;
    });
    transform_dy(block, group * s.co + begin, end - begin, count, own);
    for (int64_t i = 0; i < kPoints; i++)
      for (int64_t j = 0; j < panels; j++)
        for (int64_t tile = 0; tile < count; tile += kInNearest)
          add_products(own.pixels + i * pixels_point() + (j * count + tile) * kColumns,
                       own.gradients + i * gradients_point() + tile * kBundle, count,
                       std::min(kInNearest, count - tile), end - begin, first && tile == 0,
                       to + i * point() + j * panel() + begin * kColumns);
  }
  // Those of `some` of a block's `count` tiles, of a panel of x with `width` channels of dy.
  void add_products(const A* pixels, const A* gradients, int64_t count, int64_t some, int64_t width, bool first,
                    A* to) const {
    for (int64_t o = 0; o < width; o += kTileRows)
      with_rows(std::min<int64_t>(kTileRows, width - o), [&](auto row_count) {
        constexpr int R = row_count;
        A* const at = to + o * kColumns;
        const A* const dy = gradients + o / kBundle * kBundle * count + o % kBundle;
        if (!first) prefetch_run(at + R * kColumns, kTileRows * kColumns);
        Tile<A, R> tile;
        first ? tile.clear() : tile.load(at, kColumns);
        tile.outer_add(
            some, [&](int64_t k) { return dy + k * kBundle; }, [&](int64_t k) { return pixels + k * kColumns; });
        tile.store(at, kColumns);
      });
  }

  void run_item(int64_t item, const Own& own) const {
    const int64_t i = item % split.slices, group = item / split.slices % s.groups,
                  part = item / split.slices / s.groups;
    A* const to = sums + (part * s.groups + group) * kPoints * point();
    A* const bias_to = bias_sums + (part * s.groups + group) * s.co;
    const int64_t first = tiles.blocks.count * part / split.parts;
    std::fill(bias_to + split.slice(i), bias_to + split.slice(i + 1), A(0));
    for (int64_t b = first; b < tiles.blocks.count * (part + 1) / split.parts; b++) {
      add_block(b, b == first, group, split.slice(i), split.slice(i + 1), own, to);
      for (int64_t o = split.slice(i); o < split.slice(i + 1); o++) bias_to[o] += own.bias[o - split.slice(i)];
    }
  }

  // One channel of dy, all parts.
  void finish(int64_t channel) const {
    const int64_t group = channel / s.co, o = channel % s.co;
    A* const first = sums + group * kPoints * point() + o * kColumns;
    T* const to = static_cast<T*>(p.dweight) + channel * s.ci * 9;
    for (int64_t part = 1; part < split.parts; part++) {
      for (int64_t i = 0; i < kPoints; i++)
        for (int64_t j = 0; j < panels; j++) {
          A* const at = first + i * point() + j * panel();
          store<A>(at, load<A>(at, Full<A>()) + load<A>(at + part * sums_of_part(), Full<A>()), Full<A>());
        }
      bias_sums[channel] += bias_sums[part * s.groups * s.co + channel];
    }
    FiniteCheck<V> finite;
    for (int64_t j = 0; j < s.ci; j += V::size()) {
      const A* const from = first + j / kColumns * panel() + j % kColumns;
      for (int64_t i = 0; i < kPoints; i++) prefetch_run(from + i * point() + panel(), 1);
      A taps[9][V::size()];
      transform<FilterGradientTransform<kTile>, V>(
          [&](int r, int c) { return V::loadu(from + (r * kWindow + c) * point()); },
          [&](int r, int c, V v) {
            finite.see(v);
            v.store(taps[r * 3 + c]);
          });
      for (int64_t k = j; k < std::min<int64_t>(j + V::size(), s.ci); k++)
        for (int tap = 0; tap < 9; tap++) to[k * s.weight_input() + tap * s.weight_tap()] = T(taps[tap][k - j]);
    }
    report(finite, p.all_finite);
    if (p.dbias) static_cast<T*>(p.dbias)[channel] = T(bias_sums[channel]);
  }

  void run() {
    Arena shared = memory.shared_at(p.workspace);
    layout_shared(shared);
    std::fill_n(zeros, std::max(s.ci, s.co) + kColumns, A(0));
    parallel(p.threads, [&](Team team) {
      Arena scratch = memory.own_at(p.workspace, team.rank);
      const Own own(*this, scratch);
      // Columns that fill up a panel are added up with the others, and some numbers are slow to.
      if (s.ci % kColumns != 0) std::fill_n(own.pixels, kPoints * pixels_point(), A(0));
      team.for_each(split.parts * split.slices * s.groups, [&](int64_t item) { run_item(item, own); });
      team.for_each(s.groups * s.co, [&](int64_t channel) { finish(channel); });
    });
  }
};

template <class T>
using WeightGradient4x4 = WeightGradient<T, 4>;
template <class T>
using WeightGradient2x2 = WeightGradient<T, 2>;

}  // namespace
}  // namespace winograd

FASTNORM_WINOGRAD_PASS(winograd, backward_weight, Conv2dBackwardWeight, WeightGradient4x4)
FASTNORM_WINOGRAD_PASS(winograd_2x2, backward_weight, Conv2dBackwardWeight, WeightGradient2x2)

}  // namespace fastnorm::cpu::CPU_CAPABILITY
