// Winograd's convolution, and its gradient to the input, which is one with the filters turned round; conv2d_winograd.h
// has the algorithm.
//
// For a block of tiles the transformed pixels are [point][tile][channel]; for some panels of result channels each
// point's products with the transformed filters, [panel][point][channel][column], go to [panel][point][tile][column],
// and from there through the last transform to the results.  Filters are transformed once, for this call or for others
// too, or where there would be more of them than the cache holds and nobody keeps them, those of some panels at a time
// in each block, of which there are few then.
//
// Floor: a quarter of im2col's multiply-adds, 4/9 with tiles of 2x2; transforms add some 100 vector operations, 40 with
// 2x2, per tile and vector of channels on either side.  Products run at 65 to 85 % of the multiply-adds' peak on Zen 3
// (L2: 512 KB), out of the L3 cache.
//
// Tried: panels as the outer loop, one panel's products in L2; but then every panel reads all of the pixels from L3
// again, and the products run at 50 to 75 %.  Smaller blocks, whose pixels fit L2, read the filters more often instead.
// Fetching a block's results and the next block's planes during the products: turning them round no longer waits for
// memory, but the products, which read L3, take as much longer.
#include "conv2d_winograd.h"

namespace fastnorm::cpu::CPU_CAPABILITY {
namespace winograd {
namespace {

// Terms of 2x2 in one chain of additions, whose error grows with its length; in 4x4 that of the transforms covers it.
constexpr int64_t kMostTerms = 96;
// Of so few tiles, pixels come from the L3 cache for each panel sooner than filters do from there once more.
constexpr int64_t kFewTiles = 96, kDepth = 128;      // kDepth: terms of a panel's filters in the L2 cache
constexpr int64_t kMostFilters = int64_t(12) << 20;  // bytes; not transformed again for each block
constexpr int64_t kNewResults = 128;                 // as kResults, where filters are transformed for a block alone

// kResults: channels that are worked on together.  most_tiles: of a block, as each reads all filters from the L3 cache
// once more.  Measured on a Zen 3 with 512 KB of L2 and on a Sapphire Rapids with 2 MB, where L3 is a third as fast.
#ifdef CPU_CAPABILITY_AVX512
constexpr int64_t kResults = 256;
template <int kTile>
int64_t most_tiles(int64_t filter_bytes, int) {
  return filter_bytes <= int64_t(1) << 20 ? 48 : kTile == 4 || filter_bytes > kMostFilters ? 192 : 96;
}
#else
constexpr int64_t kResults = 128;
template <int kTile>
int64_t most_tiles(int64_t filter_bytes, int threads) {  // which share the cache that the larger blocks come from
  const int64_t tiles = filter_bytes > kMostFilters ? 192 : filter_bytes > int64_t(4) << 20 ? 96 : 48;
  return std::max<int64_t>(48, tiles / threads);
}
#endif

// Tiles of a block: as many blocks for each thread, of whole samples where a block has several.
template <int kTile>
int64_t tiles_together(int64_t filter_bytes, int64_t samples, int64_t height, int64_t width, int threads) {
  const int64_t per_sample = std::max<int64_t>(1, Tiles<kTile>::along(height) * Tiles<kTile>::along(width)),
                all = std::max<int64_t>(1, samples) * per_sample,
                most = same_points<kTile>(most_tiles<kTile>(filter_bytes, threads)) * threads,
                blocks = (all + most - 1) / most * threads,
                tiles = std::max((all + blocks - 1) / blocks, same_points<kTile>(48));
  return tiles < per_sample ? tiles : (tiles + per_sample - 1) / per_sample * per_sample;
}

template <class T, int kTile>
struct Product : ConvWork<T>, Sizes<kTile> {
  using Work = ConvWork<T>;
  using typename Work::A, typename Work::V;
  using Sizes<kTile>::kWindow, Sizes<kTile>::kPoints;
  using Work::kColumns, Work::p, Work::y, Work::x, Work::n, Work::groups, Work::terms, Work::results, Work::panels,
      Work::plain, Work::in_layout, Work::out_layout;

  const int64_t pitch;  // of a tile's transformed pixels
  const Tiles<kTile> tiles;
  const bool on_the_fly, streaming, by_depth;
  const int64_t chain;            // terms that are added up one by one, whatever is worked on together
  const int64_t together, depth;  // panels and terms that are
  const int64_t panel_filters;    // numbers of a panel's transformed filters
  const int64_t split;            // parts of the panels that are work items of their own
  A *filters, *bias, *zeros;
  const ConvMemory memory;

  explicit Product(const ConvProblem& problem)
      : Work(problem),
        pitch(spread(terms)),
        tiles(n, y.out, x.out, tiles_together<kTile>(packed_bytes(), n, y.out, x.out, p.threads)),
        on_the_fly(!p.packed && (tiles.blocks.count == 1 || packed_bytes() > kMostFilters * (p.threads > 1 ? 4 : 1))),
        streaming(Work::streaming()),
        by_depth(on_the_fly && tiles.most() <= same_points<kTile>(kFewTiles)),
        chain(kTile == 2 ? equal_part(terms, kMostTerms) : terms),
        together(by_depth ? 1 : std::min(panels, (on_the_fly ? kNewResults : kResults) / kColumns)),
        depth(!by_depth ? terms : std::min(terms, chain < kDepth ? kDepth / chain * chain : kDepth)),
        panel_filters(kPoints * filters_point()),
        split(Work::split_panels(tiles.blocks.count * groups)),
        memory(*this) {}

  size_t bytes() const { return memory.bytes(p.threads); }
  int64_t packed_bytes() const {
    return groups * panels * kPoints * spread_points(terms * kColumns) * int64_t(sizeof(A));
  }
  // From one point to the next of a panel's filters, of a block's pixels and of a panel's products.
  int64_t filters_point() const { return spread_points(depth * kColumns); }
  int64_t pixels_point() const { return spread_points(tiles.most() * pitch); }
  int64_t products_point() const { return spread_points(tiles.most() * kColumns); }

  void layout_shared(Arena& s) {
    filters = p.packed ? static_cast<A*>(p.packed) : s.take<A>(on_the_fly ? 0 : groups * panels * panel_filters);
    bias = s.take<A>(groups * panels * kColumns);
    zeros = s.take<A>(terms + kColumns);
  }

  struct Own {
    A *image, *pixels, *products, *results, *filters;

    Own(const Product& q, Arena& s) {
      const ConvBlocks blocks = q.tiles.result_blocks();
      image = s.take<A>(q.plain ? 0 : ConvView<T>::elements(q.y, q.x, blocks, q.terms));
      pixels = s.take<A>(kPoints * q.pixels_point());
      products = s.take<A>(q.together * kPoints * q.products_point());
      results = s.take<A>(q.plain ? 0 : blocks.samples * blocks.rows * q.x.out * kColumns);
      filters = s.take<A>(q.on_the_fly ? q.together * q.panel_filters : 0);
    }
  };

  // Of the terms in [begin, end), to rows of their own.
  void transform_filters(int64_t panel, int64_t begin, int64_t end, A* to) const {
    auto put = [&](int64_t k, int64_t, int64_t, const A(*taps)[kColumns]) {
      A* const row = to + (k - begin) * kColumns;
      for (int64_t i = 0; i < kPoints; i++)  // or stores wait for these lines, twice as long in all
        __builtin_prefetch(row + i * filters_point() + 2 * kColumns, 1, 3);
      for (int64_t j = 0; j < kColumns; j += V::size())
        transform<FilterTransform<kTile>, V>(
            [&](int r, int c) { return V::loadu(taps[p.backward ? 8 - 3 * r - c : 3 * r + c] + j); },
            [&](int r, int c, V v) { v.store(row + (r * kWindow + c) * filters_point() + j); });
    };
    this->read_weights(panel / panels, panel % panels * kColumns, begin, end, put);
  }
  void read_bias(int64_t panel) const {
    const int64_t group = panel / panels, first = panel % panels * kColumns;
    for (int64_t j = 0; j < kColumns; j++) bias[panel * kColumns + j] = this->bias_of(group, first + j);
  }

  // Of so many equal parts of n as have `most` or fewer.
  static int64_t equal_part(int64_t n, int64_t most) {
    const int64_t parts = (n - 1) / most + 1;
    return (n + parts - 1) / parts;
  }

  // products[panel][point] = pixels[point] filters[panel][point] for `width` panels, or plus the products of the terms
  // in [begin, end), some of them at a time, whose filters stay in the L1 cache for all tiles.  What comes next is
  // fetched meanwhile: the next panel's filters, and a share of the next point's pixels.
  void multiply(const Own& own, int64_t count, int64_t width, int64_t begin, int64_t end,
                const A* panel_filters_begin) const {
    const int64_t row_tiles = (count + kTileRows - 1) / kTileRows;
    const int64_t some = kTile == 2 ? chain : equal_part(end - begin, kDepth), steps = (end - begin + some - 1) / some;
    for (int64_t point = 0; point < kPoints; point++) {
      const A* const pixels = own.pixels + point * pixels_point();
      FetchAhead<A> next_pixels{pixels + pixels_point(), begin == 0 ? count * pitch : 0, row_tiles * steps * width};
      for (int64_t i = 0; i < width; i++) {
        const A* const filter = panel_filters_begin + i * panel_filters + point * filters_point();
        FetchAhead<A> next_filter{i + 1 < width ? filter + panel_filters : filter - i * panel_filters + filters_point(),
                                  (end - begin) * kColumns, row_tiles * steps};
        A* const to = own.products + i * kPoints * products_point() + point * products_point();
        for (int64_t k = begin; k < end; k += some)
          for (int64_t m = 0; m < count; m += kTileRows) {
            next_pixels.step(), next_filter.step();
            with_rows(std::min<int64_t>(kTileRows, count - m), [&](auto row_count) {
              constexpr int R = row_count;
              const bool begins = k % chain == 0;  // else the terms before began it
              const A* rows[R];
              for (int r = 0; r < R; r++) rows[r] = pixels + (m + r) * pitch + k;
              Tile<A, R> tile;
              begins ? tile.clear() : tile.load(to + m * kColumns, kColumns);
              tile.multiply_add(rows, std::min(some, end - k), filter + (k - begin) * kColumns);
              if (begins && k > 0) tile.add(to + m * kColumns, kColumns);
              tile.store(to + m * kColumns, kColumns);
            });
          }
      }
    }
  }

  // The results of a panel; first: where the block's begin, step: from one pixel to the next.
  void finish(const Own& own, const A* products, int64_t block, const A* panel_bias, A* first, int64_t step,
              int64_t count, bool stream) const {
    const ConvBlock rows = tiles.result_rows(block);
    const int64_t height = rows.row_end - rows.row;
    FiniteCheck<V> finite;
    tiles.for_each(block, [&](int64_t i, int64_t sample, int64_t row, int64_t column) {
      alignas(64) A tile[kTile * kTile * kColumns];
      for (int64_t j = 0; j < kColumns; j += V::size()) {
        const A* const from = products + i * kColumns + j;
        const V b = V::loadu(panel_bias + j);
        transform<OutputTransform<kTile>, V>(
            [&](int r, int c) { return V::loadu(from + (r * kWindow + c) * products_point()); },
            [&](int r, int c, V v) {
              finite.see(v);
              this->activate_simple(v + b).store(tile + (r * kTile + c) * kColumns + j);
            });
      }
      if (!this->simple_activation()) this->activate_all(tile, kTile * kTile * kColumns);
      A* const to = first + (((sample - rows.sample) * height + row - rows.row) * x.out + column) * step;
      const int64_t r_end = std::min<int64_t>(kTile, y.out - row), c_end = std::min<int64_t>(kTile, x.out - column);
      for (int64_t r = 0; r < r_end; r++)
        for (int64_t c = 0; c < c_end; c++) {
          const Pack<A> v = load<A>(tile + (r * kTile + c) * kColumns, Full<A>());
          A* const at = to + (r * x.out + c) * step;
          count == kColumns ? store_output<A>(at, v, Full<A>(), Zero(), stream) : store<A>(at, v, count);
        }
    });
    report(finite, p.all_finite);
  }

  void run_item(int64_t item, const Own& own) const {
    const int64_t part = item % split, group = item / split % groups, block = item / split / groups;
    const ConvBlock rows = tiles.result_rows(block);
    ConvView<T> view(y, x, in_layout, group * terms, terms, !plain, p.in, zeros, own.image, terms);
    view.read(rows);
    transform_input(tiles, block, view, pixels_point(),
                    [&](int64_t i, int64_t k) { return own.pixels + i * pitch + k; });
    const int64_t count = tiles.for_each(block, [](auto...) {}), end = panels * (part + 1) / split;
    for (int64_t i = panels * part / split; i < end; i += together) {
      const int64_t width = std::min(together, end - i), panel = group * panels + i;
      for (int64_t k = 0; k < terms; k += depth) {
        const int64_t k_end = std::min(terms, k + depth);
        if (on_the_fly)
          for (int64_t j = 0; j < width; j++) transform_filters(panel + j, k, k_end, own.filters + j * panel_filters);
        multiply(own, count, width, k, k_end, on_the_fly ? own.filters : filters + panel * panel_filters);
      }
      for (int64_t j = 0; j < width; j++)
        finish_panel(own, own.products + j * kPoints * products_point(), block, group, i + j);
    }
  }
  void finish_panel(const Own& own, const A* products, int64_t block, int64_t group, int64_t i) const {
    const ConvBlock rows = tiles.result_rows(block);
    const int64_t channel = group * results + i * kColumns, columns = std::min(kColumns, results - i * kColumns);
    const int64_t per_sample = (rows.row_end - rows.row) * x.out;
    const A* const panel_bias = bias + (group * panels + i) * kColumns;
    if (plain) {
      A* const first =
          static_cast<A*>(p.out) + (rows.sample * out_layout.pixels + rows.row * x.out) * out_layout.channels;
      return finish(own, products, block, panel_bias, first + channel, out_layout.channels, columns, streaming);
    }
    finish(own, products, block, panel_bias, own.results, kColumns, kColumns, false);
    for (int64_t s = rows.sample; s < rows.sample_end; s++)
      write_pixels<T>(own.results + (s - rows.sample) * per_sample * kColumns, kColumns,
                      static_cast<T*>(p.out) + s * out_layout.channels * out_layout.pixels, out_layout, channel,
                      columns, rows.row * x.out, per_sample);
  }

  void run() {
    Arena shared = memory.shared_at(p.workspace);
    layout_shared(shared);
    std::fill_n(zeros, terms + kColumns, A(0));
    prefer_huge_pages(p.out, this->out_bytes());
    parallel(p.threads, [&](Team team) {
      team.for_each(groups * panels, [&](int64_t panel) {
        read_bias(panel);
        if (!on_the_fly && !p.is_packed) transform_filters(panel, 0, terms, filters + panel * panel_filters);
      });
      Arena scratch = memory.own_at(p.workspace, team.rank);
      const Own own(*this, scratch);
      team.for_each(tiles.blocks.count * groups * split, [&](int64_t item) { run_item(item, own); });
    });
  }
};

template <class T>
using Product4x4 = Product<T, 4>;
template <class T>
using Product2x2 = Product<T, 2>;

}  // namespace
}  // namespace winograd

size_t conv2d_winograd_packed(const Conv2dForward& a) { return conv_packed<winograd::Product4x4, false>(a); }
size_t conv2d_winograd_2x2_packed(const Conv2dForward& a) { return conv_packed<winograd::Product2x2, false>(a); }
FASTNORM_WINOGRAD_PASS(winograd, forward, Conv2dForward, Product4x4)
FASTNORM_WINOGRAD_PASS(winograd, backward_input, Conv2dBackwardInput, Product4x4)
FASTNORM_WINOGRAD_PASS(winograd_2x2, forward, Conv2dForward, Product2x2)
FASTNORM_WINOGRAD_PASS(winograd_2x2, backward_input, Conv2dBackwardInput, Product2x2)

}  // namespace fastnorm::cpu::CPU_CAPABILITY
