// The gradient of a convolution to its weights and bias, as a matrix product; ../conv2d.h has the formulas.
//
// Rows of the product are channels of dy, columns the taps and channels of x, and the sum runs over the pixels.  A
// block of pixels stays in L2 while all tiles add it up, in an order that depends on the shape alone: the blocks go to
// a fixed number of parts, each with sums of its own, which are added up in order in the end.
//
// Floor: n * pixels * co * ci * taps multiply-adds, as forward; every tile of sums moves from and to memory once per
// block.
#include "conv2d_problem.h"

namespace fastnorm::cpu::CPU_CAPABILITY {
namespace {

constexpr int64_t kPixels = 128;       // of a block
constexpr int64_t kFewChannels = 64;   // so many side by side are no trouble for the L1 cache
constexpr int64_t kStep = 32;          // pixels, between which a little of what comes next is fetched
constexpr int64_t kMostColumns = 512;  // that are copied together: with them a block stays in L2
constexpr int64_t kSideBySide = 24;    // channels of copied dy: whole tiles, and whole blocks of a transposition

template <class T>
struct WeightGradient : ConvWeightWork<T> {
  using Work = ConvWeightWork<T>;
  using typename Work::A, typename Work::V;
  using Work::kColumns, Work::p, Work::s, Work::y, Work::x, Work::x_layout, Work::dy_layout;

  const ConvBlocks blocks;
  const bool plain, copied, merged;
  const int64_t x_pitch;        // of copied pixels
  const int64_t pieces, piece;  // so many runs of a window's columns follow each other in memory, each so long
  const bool gathered;          // copied once more, to be one run: where pieces would not fill their panels
  const int64_t runs, run_length, panels;  // of columns as the product finds them; panels of each run
  const ConvParts split;
  A *sums, *bias_sums, *zeros;
  const ConvMemory memory;

  explicit WeightGradient(const Conv2dBackwardWeight& a)
      : Work(a),
        blocks(s.n, y.out, x.out, kPixels),
        plain(s.channels_last && std::is_same_v<T, A> && s.ci < kFewChannels && s.co < kFewChannels),
        // A panel reads whole vectors, so a pixel of the image itself must have as many channels.
        copied(!plain || s.ci < kColumns),
        merged(copied && x.neighbours() && s.ci < kFewChannels),
        x_pitch(merged ? s.ci : spread(s.ci)),
        pieces(merged ? y.kernel : s.taps()),
        piece(merged ? x.kernel * s.ci : s.ci),
        gathered(copied && pieces * piece <= kMostColumns && panels_of(pieces * piece) < pieces * panels_of(piece)),
        runs(gathered ? 1 : pieces),
        run_length(gathered ? pieces * piece : piece),
        panels(panels_of(run_length)),
        split(sums_of_part() * int64_t(sizeof(A)), blocks.count, s.groups, s.co, p.threads),
        memory(*this) {}

  static int64_t panels_of(int64_t columns) { return (columns + kColumns - 1) / kColumns; }
  // A pitch of copied pixels for which a column of them does not fall into few sets of the L1 cache.
  static int64_t spread(int64_t channels) { return channels < kFewChannels ? channels : widened(channels); }
  static int64_t widened(int64_t columns) { return (columns + 31) / 32 * 32 + 16; }

  // Sums are [part][group][run][panel][channel of dy][column], so that tiles follow each other.
  int64_t sums_of_panel() const { return s.co * kColumns; }
  int64_t sums_of_group() const { return runs * panels * sums_of_panel(); }
  int64_t sums_of_part() const { return s.groups * sums_of_group(); }

  void layout_shared(Arena& scratch) {
    sums = scratch.take<A>(split.parts * sums_of_part());
    bias_sums = scratch.take<A>(split.parts * s.groups * s.co);
    zeros = scratch.take<A>(s.ci + kColumns);
  }

  struct Own {
    A *image, *dy;     // dy: [kSideBySide channels][pixel][channel]
    A* columns;        // [pixel][column], if gathered
    const A** x_rows;  // [piece or run][pixel]

    Own(const WeightGradient& q, Arena& scratch) {
      const int64_t pixels = q.blocks.samples * q.blocks.rows * q.x.out;
      image = scratch.take<A>(q.copied ? ConvView<T>::elements(q.y, q.x, q.blocks, q.x_pitch) : 0);
      dy = scratch.take<A>(q.plain ? 0 : pixels * (q.split.widest() + kSideBySide));
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
    ConvView<T> view(y, x, x_layout, group * s.ci, s.ci, copied, p.x, zeros, own.image, x_pitch);
    view.read(block);
    const int64_t rows = block.row_end - block.row, per_sample = rows * x.out, width = slice_end - slice_begin;
    const int64_t pixels = (block.sample_end - block.sample) * per_sample, channel = group * s.co + slice_begin;
    for (int64_t n = block.sample; !plain && n < block.sample_end; n++)
      for (int64_t o = 0; o < width; o += kSideBySide)
        read_pixels<T>(this->dy_of(n), dy_layout, channel + o, std::min(kSideBySide, width - o), block.row * x.out,
                       per_sample, own.dy + o * pixels + (n - block.sample) * per_sample * kSideBySide, kSideBySide);
    // The first pixel's numbers from channel o on, and the way to the next pixel's.
    auto dy_from = [&](int64_t o) -> const A* {
      if constexpr (std::is_same_v<T, A>)
        if (plain) return this->dy_of(block.sample) + block.row * x.out * dy_layout.channels + channel + o;
      return own.dy + o / kSideBySide * kSideBySide * pixels + o % kSideBySide;
    };
    const int64_t dy_step = plain ? dy_layout.channels : kSideBySide;
    const A** x_row = own.x_rows;
    for (int64_t i = 0; i < pieces; i++) {
      const int ky = merged ? i : i / x.kernel, kx = merged ? 0 : i % x.kernel;
      for (int64_t n = block.sample; n < block.sample_end; n++)
        for (int64_t row = block.row; row < block.row_end; row++) {
          view.pixels(n, y.position(row, ky), x.position(0, kx), x.stride, x.out, x_row);
          x_row += x.out;
        }
    }
    if (gathered) gather(own, pixels);
    FetchAhead<T> next_x, next_dy;
    if (next) {
      const int64_t shares = runs * panels * ((width + kTileRows - 1) / kTileRows) * ((pixels + kStep - 1) / kStep),
                    samples = next->sample_end - next->sample;
      const int64_t first = std::clamp<int64_t>(y.begin(next->row), 0, y.in);
      const int64_t last = std::clamp<int64_t>(y.end(next->row_end), first, y.in);
      next_x = fetch_pixels(this->x_of(next->sample), x_layout, group * s.ci, s.ci, first * x.in, last * x.in, samples,
                            shares);
      next_dy = fetch_pixels(this->dy_of(next->sample), dy_layout, channel, width, next->row * x.out,
                             next->row_end * x.out, samples, shares);
    }
    for (int64_t run = 0; run < runs; run++)
      for (int64_t panel = 0; panel < panels; panel++) {
        const int64_t begin = panel_begin(panel);
        const A* const* const x_rows = own.x_rows + run * pixels;
        A* const panel_to = to + (run * panels + panel) * sums_of_panel();
        for (int64_t o = 0; o < width; o += kTileRows)
          with_rows(std::min<int64_t>(kTileRows, width - o), [&](auto row_count) {
            constexpr int R = row_count;
            A* const sums = panel_to + o * kColumns;
            const A* const dy = dy_from(o);
            prefetch_run(sums + R * kColumns, kTileRows * kColumns);
            Tile<A, R> tile;
            is_first ? tile.clear() : tile.load(sums, kColumns);
            for (int64_t i = 0; i < pixels; i += kStep) {
              next_x.step(), next_dy.step();
              tile.outer_add(
                  std::min(kStep, pixels - i), [&](int64_t j) { return dy + (i + j) * dy_step; },
                  [&](int64_t j) { return x_rows[i + j] + begin; });
            }
            tile.store(sums, kColumns);
          });
      }
    if (p.dbias) add_bias(pixels, width, dy_from, dy_step, bias_to);
  }

  template <class From>
  void add_bias(int64_t pixels, int64_t width, From dy_from, int64_t dy_step, A* to) const {
    for (int64_t first = 0, count; first < width; first += count) {
      const A* dy = dy_from(first);
      count = std::min({int64_t(V::size()), width - first, kSideBySide - first % kSideBySide});
      V sum(A(0));
      for (int64_t pixel = 0; pixel < pixels; pixel++, dy += dy_step) sum = sum + V::loadu(dy, count);
      (V::loadu(to + first, count) + sum).store(to + first, count);
    }
  }

  void run_item(int64_t item, const Own& own) const {
    const int64_t i = item % split.slices, group = item / split.slices % s.groups,
                  part = item / split.slices / s.groups;
    const int64_t width = split.slice(i + 1) - split.slice(i);
    A* const to = sums + part * sums_of_part() + group * sums_of_group() + split.slice(i) * kColumns;
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
    A* const first = sums + channel / s.co * sums_of_group() + channel % s.co * kColumns;
    for (int64_t part = 1; part < split.parts; part++)
      bias_sums[channel] += bias_sums[part * s.groups * s.co + channel];
    T* const to = static_cast<T*>(p.dweight) + channel * s.ci * s.taps();
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
    if (p.dbias) static_cast<T*>(p.dbias)[channel] = T(bias_sums[channel]);
  }

  void run() {
    Arena shared = memory.shared_at(p.workspace);
    layout_shared(shared);
    std::fill_n(zeros, s.ci + kColumns, A(0));
    parallel(p.threads, [&](Team team) {
      Arena scratch = memory.own_at(p.workspace, team.rank);
      const Own own(*this, scratch);
      // Columns that fill up a panel are added up with the others, and some numbers are slow to.
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
