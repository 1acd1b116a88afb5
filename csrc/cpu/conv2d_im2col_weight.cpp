// The gradient of a convolution to its weights and bias, as a matrix product; ../conv2d.h has the formulas.
//
// Rows of the product are channels of dy, columns the taps and channels of x, and the sum runs over the pixels.  Or it
// is turned round, where x has few channels and dy whole panels: then no column fills up a panel, and neither is copied
// into one.  A block of pixels stays in L2 while all tiles add it up, in an order that depends on the shape alone: the
// blocks go to a fixed number of parts, each with sums of its own, which are added up in order in the end.
//
// Floor: n * pixels * co * ci * taps multiply-adds, as forward; every tile of sums moves from and to memory once per
// block.
#include "conv2d_problem.h"

namespace fastnorm::cpu::CPU_CAPABILITY {
namespace {

constexpr int64_t kPixels = 128;       // of a block
constexpr int64_t kFewChannels = 64;   // so many side by side are no trouble for the L1 cache
constexpr int64_t kFewNumbers = 1024;  // dy's channels times panels: to copy them would take longer
constexpr int64_t kStep = 32;          // pixels, between which a little of what comes next is fetched
constexpr int64_t kMostColumns = 512;  // that are copied together: with them a block stays in L2
constexpr int64_t kSideBySide = 24;    // rows of copied dy: whole tiles, and whole blocks of a transposition

template <class T>
struct WeightGradient : ConvWeightWork<T> {
  using Work = ConvWeightWork<T>;
  using typename Work::A, typename Work::V;
  using Work::kColumns, Work::p, Work::s, Work::y, Work::x, Work::x_layout, Work::dy_layout;

  const ConvBlocks blocks;
  const bool copied, merged;
  const bool by_panel;          // x is copied a panel at a time, which stays in the L1 cache: for windows of a pixel
  const int64_t x_pitch;        // of copied pixels
  const int64_t pieces, piece;  // so many runs of a window's columns follow each other in memory, each so long
  const bool plain;             // dy is read where it is
  const bool turned;            // x's numbers are the rows, and dy's channels the columns
  const bool gathered;          // copied once more, to be one run: where pieces would not fill their panels
  const int64_t side_by_side;   // channels of copied dy
  const int64_t runs, run_length, panels;  // of the window as the product finds it; panels of each run
  const ConvParts split;
  A *sums, *bias_sums, *zeros;
  const ConvMemory memory;

  explicit WeightGradient(const Conv2dBackwardWeight& a)
      : Work(a),
        blocks(s.n, y.out, x.out, kPixels),
        // A panel reads whole vectors, so a pixel of the image itself must have as many channels.
        copied(!in_place() || s.ci >= kFewChannels || s.ci < kColumns),
        merged(copied && x.neighbours() && s.ci < kFewChannels),
        by_panel(s.taps() == 1 && s.y.in == s.y.out && s.x.in == s.x.out && s.ci >= kFewChannels),
        x_pitch(merged ? s.ci : spread(s.ci)),
        pieces(merged ? y.kernel : s.taps()),
        piece(merged ? x.kernel * s.ci : s.ci),
        plain(in_place() && (s.co < kFewChannels || panels_of(pieces * piece) * s.co <= kFewNumbers)),
        turned(merged && s.co % kColumns == 0),
        gathered(!turned && copied && pieces * piece <= kMostColumns &&
                 panels_of(pieces * piece) < pieces * panels_of(piece)),
        side_by_side(turned ? kColumns : kSideBySide),
        runs(gathered ? 1 : pieces),
        run_length(gathered ? pieces * piece : piece),
        panels(panels_of(run_length)),
        split(sums_of_part() * int64_t(sizeof(A)), blocks.count, s.groups, s.co, p.threads, turned ? kColumns : 1),
        memory(*this) {}

  bool in_place() const { return s.channels_last && std::is_same_v<T, A>; }
  static int64_t tiles_of(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }
  static int64_t panels_of(int64_t columns) { return (columns + kColumns - 1) / kColumns; }
  // A pitch of copied pixels for which a column of them does not fall into few sets of the L1 cache.
  static int64_t spread(int64_t channels) { return channels < kFewChannels ? channels : widened(channels); }
  static int64_t widened(int64_t columns) { return (columns + 31) / 32 * 32 + 16; }

  // Sums are [part][group][run][panel][channel of dy][column], or [part][group][panel of dy][run][number][column], so
  // that tiles follow each other.
  int64_t sums_of_panel() const { return s.co * kColumns; }
  int64_t sums_of_group() const { return turned ? runs * run_length * s.co : runs * panels * sums_of_panel(); }
  int64_t sums_of_channel() const { return turned ? runs * run_length : kColumns; }
  int64_t sums_of_part() const { return s.groups * sums_of_group(); }

  void layout_shared(Arena& scratch) {
    sums = scratch.take<A>(split.parts * sums_of_part());
    bias_sums = scratch.take<A>(split.parts * s.groups * s.co);
    zeros = scratch.take<A>(s.ci + kColumns);
  }

  struct Own {
    A *image, *dy;     // dy: [channels side by side][pixel][channel]
    A* columns;        // [pixel][column], if gathered
    const A** x_rows;  // [piece or run][pixel]

    Own(const WeightGradient& q, Arena& scratch) {
      const int64_t pixels = q.blocks.samples * q.blocks.rows * q.x.out;
      image = scratch.take<A>(q.by_panel ? pixels * kColumns
                              : q.copied ? ConvView<T>::elements(q.y, q.x, q.blocks, q.x_pitch)
                                         : 0);
      dy = scratch.take<A>(q.plain ? 0 : pixels * (q.split.widest() + q.side_by_side));
      columns = scratch.take<A>(q.gathered ? pixels * widened(q.run_length) : 0);
      x_rows = scratch.take<const A*>(pixels * q.pieces);
    }
  };
  size_t bytes() const { return memory.bytes(p.threads); }

  // Where a panel of a run begins: the last one ends with the run if that has a whole panel, and else with a copy's
  // end.
  int64_t panel_begin(int64_t panel) const {
    return copied ? panel * kColumns : std::min(panel * kColumns, run_length - kColumns);
  }

  // What the block sees of x, and where its windows' pieces begin.
  void read_image(const ConvBlock& block, int64_t group, const Own& own) const {
    ConvView<T> view(y, x, x_layout, group * s.ci, s.ci, copied, p.x, zeros, own.image, x_pitch);
    view.read(block);
    const A** x_row = own.x_rows;
    for (int64_t i = 0; i < pieces; i++) {
      const int ky = merged ? i : i / x.kernel, kx = merged ? 0 : i % x.kernel;
      for (int64_t n = block.sample; n < block.sample_end; n++)
        for (int64_t row = block.row; row < block.row_end; row++) {
          view.pixels(n, y.position(row, ky), x.position(0, kx), x.stride, x.out, x_row);
          x_row += x.out;
        }
    }
  }

  // What a whole vector copies too much is written over by the next piece, or is beyond the columns.
  void gather(const Own& own, int64_t pixels) const {
    const int64_t pitch = widened(run_length), length = piece;
    const A* const* from = own.x_rows;
    for (int64_t i = 0; i < pieces; i++) {
      A* to = own.columns + i * length;
      for (int64_t pixel = 0; pixel < pixels; pixel++, to += pitch) {
        const A* const numbers = *from++;
        for (int64_t j = 0; j < length; j += V::size()) V::loadu(numbers + j).store(to + j);
      }
    }
    for (int64_t pixel = 0; pixel < pixels; pixel++) own.x_rows[pixel] = own.columns + pixel * pitch;
  }

  // next: what comes after the block, and is fetched meanwhile; or null.
  void add_block(const ConvBlock& block, const ConvBlock* next, bool is_first, int64_t group, int64_t slice_begin,
                 int64_t slice_end, const Own& own, A* to, A* bias_to) const {
    if (!by_panel) read_image(block, group, own);
    const int64_t rows = block.row_end - block.row, per_sample = rows * x.out, width = slice_end - slice_begin;
    const int64_t pixels = (block.sample_end - block.sample) * per_sample, channel = group * s.co + slice_begin;
    for (int64_t n = block.sample; !plain && n < block.sample_end; n++)
      for (int64_t o = 0; o < width; o += side_by_side)
        read_pixels<T>(this->dy_of(n), dy_layout, channel + o, std::min(side_by_side, width - o), block.row * x.out,
                       per_sample, own.dy + o * pixels + (n - block.sample) * per_sample * side_by_side, side_by_side);
    // The first pixel's numbers from channel o on, and the way to the next pixel's.
    auto dy_from = [&](int64_t o) -> const A* {
      if constexpr (std::is_same_v<T, A>)
        if (plain) return this->dy_of(block.sample) + block.row * x.out * dy_layout.channels + channel + o;
      return own.dy + o / side_by_side * side_by_side * pixels + o % side_by_side;
    };
    const int64_t dy_step = plain ? dy_layout.channels : side_by_side;
    if (gathered) gather(own, pixels);
    FetchAhead<T> next_x, next_dy;
    const int64_t tiles = turned ? width / kColumns * runs * tiles_of(run_length) : runs * panels * tiles_of(width);
    if (next) {
      const int64_t shares = tiles * ((pixels + kStep - 1) / kStep), samples = next->sample_end - next->sample;
      const int64_t first = std::clamp<int64_t>(y.begin(next->row), 0, y.in);
      const int64_t last = std::clamp<int64_t>(y.end(next->row_end), first, y.in);
      next_x = fetch_pixels(this->x_of(next->sample), x_layout, group * s.ci, s.ci, first * x.in, last * x.in, samples,
                            shares);
      next_dy = fetch_pixels(this->dy_of(next->sample), dy_layout, channel, width, next->row * x.out,
                             next->row_end * x.out, samples, shares);
    }
    auto add_tile = [&](A* sums, int64_t rows, auto left, auto right) __attribute__((always_inline)) {
      with_rows(rows, [&](auto row_count) __attribute__((always_inline)) {
        constexpr int R = row_count;
        prefetch_run(sums + R * kColumns, kTileRows * kColumns);
        Tile<A, R> tile;
        is_first ? tile.clear() : tile.load(sums, kColumns);
        for (int64_t i = 0; i < pixels; i += kStep) {
          next_x.step(), next_dy.step();
          tile.outer_add(
              std::min(kStep, pixels - i), [&](int64_t j) { return left(i + j); },
              [&](int64_t j) { return right(i + j); });
        }
        tile.store(sums, kColumns);
      });
    };
    if (by_panel)
      for_panels(block, group, own, width, dy_from, dy_step, to, add_tile);
    else
      for_tiles(own, pixels, width, dy_from, dy_step, to, add_tile);
    if (p.dbias) add_bias(pixels, width, dy_from, dy_step, bias_to);
  }

  // f(sums, rows, left, right) for every tile: left(pixel) are numbers for each of its rows, right(pixel) a panel.
  template <class From, class F>
  [[gnu::always_inline]] void for_tiles(const Own& own, int64_t pixels, int64_t width, From dy_from, int64_t dy_step,
                                        A* to, F f) const {
    for (int64_t first = 0; turned && first < width; first += kColumns)
      for (int64_t run = 0; run < runs; run++) {
        const A* const dy = dy_from(first);
        const A* const* const x_rows = own.x_rows + run * pixels;
        A* const run_to = to + first * sums_of_channel() + run * run_length * kColumns;
        for_shares(run_length, kTileRows, [&](int64_t row, int64_t end) __attribute__((always_inline)) {
          f(
              run_to + row * kColumns, end - row, [&](int64_t pixel) { return x_rows[pixel] + row; },
              [&](int64_t pixel) { return dy + pixel * dy_step; });
        });
      }
    for (int64_t run = 0; !turned && run < runs; run++)
      for (int64_t panel = 0; panel < panels; panel++) {
        const int64_t begin = panel_begin(panel);
        const A* const* const x_rows = own.x_rows + run * pixels;
        A* const panel_to = to + (run * panels + panel) * sums_of_panel();
        for (int64_t o = 0; o < width; o += kTileRows) {
          const A* const dy = dy_from(o);
          f(
              panel_to + o * kColumns, std::min<int64_t>(kTileRows, width - o),
              [&](int64_t pixel) { return dy + pixel * dy_step; },
              [&](int64_t pixel) { return x_rows[pixel] + begin; });
        }
      }
  }

  // Likewise of a window of a pixel.
  template <class From, class F>
  [[gnu::always_inline]] void for_panels(const ConvBlock& block, int64_t group, const Own& own, int64_t width,
                                         From dy_from, int64_t dy_step, A* to, F f) const {
    const int64_t first = block.row * x.out, pixels = (block.row_end - block.row) * x.out;
    for (int64_t panel = 0; panel < panels; panel++) {
      const int64_t begin = panel_begin(panel), channel = group * s.ci + begin,
                    count = std::min(kColumns, s.ci - begin);
      for (int64_t n = block.sample; n < block.sample_end; n++)
        read_pixels<T>(this->x_of(n), x_layout, channel, count, first, pixels,
                       own.image + (n - block.sample) * pixels * kColumns, kColumns);
      for (int64_t o = 0; o < width; o += kTileRows) {
        const A* const dy = dy_from(o);
        f(
            to + panel * sums_of_panel() + o * kColumns, std::min<int64_t>(kTileRows, width - o),
            [&](int64_t pixel) { return dy + pixel * dy_step; },
            [&](int64_t pixel) { return own.image + pixel * kColumns; });
      }
    }
  }

  template <class From>
  void add_bias(int64_t pixels, int64_t width, From dy_from, int64_t dy_step, A* to) const {
    for (int64_t first = 0, count; first < width; first += count) {
      const A* const dy = dy_from(first);
      count = std::min({int64_t(V::size()), width - first, side_by_side - first % side_by_side});
      V even(A(0)), odd(A(0));  // two chains of additions, which are waited for
      int64_t i = 0;
      for (; i + 2 <= pixels; i += 2)
        even = even + V::loadu(dy + i * dy_step, count), odd = odd + V::loadu(dy + (i + 1) * dy_step, count);
      if (i < pixels) even = even + V::loadu(dy + i * dy_step, count);
      (V::loadu(to + first, count) + even + odd).store(to + first, count);
    }
  }

  void run_item(int64_t item, const Own& own) const {
    const int64_t i = item % split.slices, group = item / split.slices % s.groups,
                  part = item / split.slices / s.groups;
    const int64_t width = split.slice(i + 1) - split.slice(i);
    A* const to = sums + part * sums_of_part() + group * sums_of_group() + split.slice(i) * sums_of_channel();
    A* const bias_to = bias_sums + (part * s.groups + group) * s.co + split.slice(i);
    std::fill_n(bias_to, width, A(0));
    const int64_t first = blocks.count * part / split.parts;
    for (int64_t b = first, end = blocks.count * (part + 1) / split.parts; b < end; b++) {
      const ConvBlock next = blocks(b + 1, s.n, y.out);
      add_block(blocks(b, s.n, y.out), b + 1 < end ? &next : nullptr, b == first, group, split.slice(i),
                split.slice(i + 1), own, to, bias_to);
    }
  }

  // One channel of dy, all parts.
  void finish(int64_t channel) const {
    for (int64_t part = 1; part < split.parts; part++)
      bias_sums[channel] += bias_sums[part * s.groups * s.co + channel];
    if (p.dbias) static_cast<T*>(p.dbias)[channel] = T(bias_sums[channel]);
    A* const group = sums + channel / s.co * sums_of_group();
    T* const to = static_cast<T*>(p.dweight) + channel * s.ci * s.taps();
    turned ? finish_turned(group, channel % s.co, to) : finish_panels(group + channel % s.co * kColumns, to);
  }
  void finish_turned(const A* group, int64_t channel, T* to) const {
    const A* from = group + channel / kColumns * kColumns * sums_of_channel() + channel % kColumns;
    for (int64_t i = 0; i < runs * run_length; i++, from += kColumns) {
      A sum = *from;
      for (int64_t part = 1; part < split.parts; part++) sum += from[part * sums_of_part()];
      to[i % s.ci * s.weight_input() + i / s.ci * s.weight_tap()] = T(sum);
    }
  }
  void finish_panels(A* first, T* to) const {
    for (int64_t run = 0; run < runs; run++)
      for (int64_t panel = 0; panel < panels; panel++) {
        A* const from = first + (run * panels + panel) * sums_of_panel();
        for (int64_t part = 1; part < split.parts; part++)
          store<A>(from, load<A>(from, Full<A>()) + load<A>(from + part * sums_of_part(), Full<A>()), Full<A>());
        const int64_t begin = panel_begin(panel), end = std::min(begin + kColumns, run_length);
        for (int64_t j = begin, count; j < end; j += count) {
          const int64_t c = j % s.ci, tap = s.taps() / runs * run + j / s.ci;
          count = std::min(s.ci - c, end - j);
          T* const place = to + c * s.weight_input() + tap * s.weight_tap();
          const A* const part = from + j - begin;
          if (s.weight_input() == 1)
            for_packs<T>(count, [&](int64_t i, auto n, auto) { store(place + i, load<A>(part + i, n), n); });
          else
            for (int64_t i = 0; i < count; i++) place[i * s.weight_input()] = T(part[i]);
        }
      }
  }

  void run() {
    Arena shared = memory.shared_at(p.workspace);
    layout_shared(shared);
    std::fill_n(zeros, s.ci + kColumns, A(0));
    parallel(p.threads, [&](Team team) {
      Arena scratch = memory.own_at(p.workspace, team.rank);
      const Own own(*this, scratch);
      // Columns that fill up a panel are added up with the others, and some numbers are slow to.
      if (by_panel) std::fill_n(own.image, blocks.samples * blocks.rows * x.out * kColumns, A(0));
      if (gathered) std::fill_n(own.columns, blocks.samples * blocks.rows * x.out * widened(run_length), A(0));
      team.for_each(split.parts * split.slices * s.groups, [&](int64_t item) { run_item(item, own); });
      team.for_each(s.groups * s.co, [&](int64_t channel) { finish(channel); });
    });
  }
};

}  // namespace

size_t conv2d_im2col_backward_weight_workspace(const Conv2dBackwardWeight& a) {
  return conv_workspace<WeightGradient>(a);
}
void conv2d_im2col_backward_weight(const Conv2dBackwardWeight& a) { conv_run<WeightGradient>(a); }

}  // namespace fastnorm::cpu::CPU_CAPABILITY
