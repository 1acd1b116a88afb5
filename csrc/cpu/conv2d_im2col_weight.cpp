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

constexpr int64_t kPixels = 128;      // of a block
constexpr int64_t kFewChannels = 64;  // so many side by side are no trouble for the L1 cache

template <class T>
struct WeightGradient : ConvWeightWork<T> {
  using Work = ConvWeightWork<T>;
  using typename Work::A, typename Work::V;
  using Work::kColumns, Work::p, Work::s, Work::y, Work::x, Work::x_layout, Work::dy_layout;

  const ConvBlocks blocks;
  const bool plain, copied, merged;
  const int64_t x_pitch;                   // of copied pixels
  const int64_t runs, run_length, panels;  // a run: the columns that follow each other in memory; panels of each
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
        runs(merged ? y.kernel : s.taps()),
        run_length(merged ? x.kernel * s.ci : s.ci),
        panels((run_length + kColumns - 1) / kColumns),
        split(sums_of_part() * int64_t(sizeof(A)), blocks.count, s.groups, s.co, p.threads),
        memory(*this) {}

  // A pitch of copied pixels for which a column of them does not fall into few sets of the L1 cache.
  static int64_t spread(int64_t channels) {
    return channels < kFewChannels ? channels : (channels + 31) / 32 * 32 + 16;
  }

  int64_t pitch() const { return runs * panels * kColumns; }  // from one channel of dy to the next
  int64_t sums_of_part() const { return s.groups * s.co * pitch(); }

  void layout_shared(Arena& scratch) {
    sums = scratch.take<A>(split.parts * sums_of_part());
    bias_sums = scratch.take<A>(split.parts * s.groups * s.co);
    zeros = scratch.take<A>(s.ci + kColumns);
  }

  struct Own {
    A *image, *dy, *bias;
    const A **x_rows, **dy_rows;  // [run][pixel] and [pixel]

    Own(const WeightGradient& q, Arena& scratch) {
      const int64_t pixels = q.blocks.samples * q.blocks.rows * q.x.out;
      image = scratch.take<A>(q.copied ? ConvView<T>::elements(q.y, q.x, q.blocks, q.x_pitch) : 0);
      dy = scratch.take<A>(q.plain ? 0 : pixels * spread(q.split.widest()));
      bias = scratch.take<A>(q.split.widest());
      x_rows = scratch.take<const A*>(pixels * q.runs);
      dy_rows = scratch.take<const A*>(pixels);
    }
  };
  size_t bytes() const { return memory.bytes(p.threads); }

  // Where a panel of a run begins: the last one ends with the run if that has a whole panel, and else with a copy's
  // end.
  int64_t panel_begin(int64_t panel) const {
    return copied ? panel * kColumns : std::min(panel * kColumns, run_length - kColumns);
  }

  void add_block(const ConvBlock& block, int64_t group, int64_t slice_begin, int64_t slice_end, const Own& own, A* to,
                 A* bias_to) const {
    ConvView<T> view(y, x, x_layout, group * s.ci, s.ci, copied, p.x, zeros, own.image, x_pitch);
    view.read(block);
    const int64_t rows = block.row_end - block.row, per_sample = rows * x.out, width = slice_end - slice_begin,
                  dy_pitch = spread(width);
    const int64_t pixels = (block.sample_end - block.sample) * per_sample, channel = group * s.co + slice_begin;
    for (int64_t n = block.sample; n < block.sample_end; n++) {
      const int64_t first = (n - block.sample) * per_sample, at = block.row * x.out;
      const T* const sample = this->dy_of(n);
      if (!plain)
        read_pixels<T>(sample, dy_layout, channel, width, at, per_sample, own.dy + first * dy_pitch, dy_pitch);
      for (int64_t i = 0; i < per_sample; i++)
        if constexpr (std::is_same_v<T, A>)
          own.dy_rows[first + i] =
              plain ? sample + (at + i) * dy_layout.channels + channel : own.dy + (first + i) * dy_pitch;
        else
          own.dy_rows[first + i] = own.dy + (first + i) * dy_pitch;
    }
    const A** x_row = own.x_rows;
    for (int64_t run = 0; run < runs; run++) {
      const int ky = merged ? run : run / x.kernel, kx = merged ? 0 : run % x.kernel;
      for (int64_t n = block.sample; n < block.sample_end; n++)
        for (int64_t row = block.row; row < block.row_end; row++)
          for (int64_t column = 0; column < x.out; column++)
            *x_row++ = view.pixel(n, y.position(row, ky), x.position(column, kx));
    }
    for (int64_t run = 0; run < runs; run++)
      for (int64_t panel = 0; panel < panels; panel++) {
        const int64_t begin = panel_begin(panel);
        const A* const* const x_rows = own.x_rows + run * pixels;
        A* const panel_to = to + (run * panels + panel) * kColumns;
        for (int64_t o = 0; o < width; o += kTileRows)
          with_rows(std::min<int64_t>(kTileRows, width - o), [&](auto row_count) {
            constexpr int R = row_count;
            Tile<A, R> tile;
            tile.load(panel_to + o * pitch(), pitch());
            tile.outer_add(
                pixels, [&](int64_t i) { return own.dy_rows[i] + o; }, [&](int64_t i) { return x_rows[i] + begin; });
            tile.store(panel_to + o * pitch(), pitch());
          });
      }
    if (!p.dbias) return;
    for_packs<A>(width, [&](int64_t o, auto count, auto) {
      Pack<A> sum(A(0));
      for (int64_t i = 0; i < pixels; i++) sum = sum + load(own.dy_rows[i] + o, count);
      store(own.bias + o, sum, count);
    });
    for (int64_t o = 0; o < width; o++) bias_to[o] += own.bias[o];
  }

  void run_item(int64_t item, const Own& own) const {
    const int64_t i = item % split.slices, group = item / split.slices % s.groups,
                  part = item / split.slices / s.groups;
    A* const to = sums + part * sums_of_part() + (group * s.co + split.slice(i)) * pitch();
    A* const bias_to = bias_sums + (part * s.groups + group) * s.co + split.slice(i);
    std::fill_n(to, (split.slice(i + 1) - split.slice(i)) * pitch(), A(0));
    std::fill_n(bias_to, split.slice(i + 1) - split.slice(i), A(0));
    for (int64_t b = blocks.count * part / split.parts; b < blocks.count * (part + 1) / split.parts; b++)
      add_block(blocks(b, s.n, y.out), group, split.slice(i), split.slice(i + 1), own, to, bias_to);
  }

  // One channel of dy, all parts.
  void finish(int64_t channel) const {
    A* const first = sums + channel * pitch();
    for (int64_t part = 1; part < split.parts; part++) {
      const A* const other = first + part * sums_of_part();
      for (int64_t i = 0; i < pitch(); i += kColumns)
        store<A>(first + i, load<A>(first + i, Full<A>()) + load<A>(other + i, Full<A>()), Full<A>());
      bias_sums[channel] += bias_sums[part * s.groups * s.co + channel];
    }
    T* const to = static_cast<T*>(p.dweight) + channel * s.ci * s.taps();
    for (int64_t run = 0; run < runs; run++)
      for (int64_t panel = 0; panel < panels; panel++) {
        const A* const from = first + (run * panels + panel) * kColumns;
        const int64_t begin = panel_begin(panel), end = std::min(begin + kColumns, run_length);
        for (int64_t j = begin; j < end; j++) {
          const int64_t tap = merged ? run * x.kernel + j / s.ci : run;
          to[j % s.ci * s.weight_input() + tap * s.weight_tap()] = T(from[j - begin]);
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
