// Convolution of and to few channels, and its gradient to the input; ../conv2d.h has the formulas.
//
// Columns of the product are neighbouring pixels of a row, or of two if one vector has all of a row, read where they
// are; rows are channels of the result, a tile of them at a time: so neither few channels to read nor few to make leave
// lanes or registers idle, as they do where channels are side by side.  An image's rows are copied once, as
// conv2d_planes.h has them.
//
// Floor: n * pixels * co * ci * taps multiply-adds; a tile's steps read one vector pair and kTileRows numbers, from L1.
#include "conv2d_planes.h"
#include "conv2d_problem.h"

namespace fastnorm::cpu::CPU_CAPABILITY {
namespace {

constexpr int64_t kPixels = 512;  // of a block: a few rows, whose windows share what they read

template <class T>
struct Direct : ConvWork<T> {
  using Work = ConvWork<T>;
  using typename Work::A, typename Work::V;
  using Work::kColumns, Work::p, Work::y, Work::x, Work::n, Work::groups, Work::terms, Work::results, Work::in_layout,
      Work::out_layout;

  const int64_t row_tiles, depth;  // depth: terms of a sum
  const ConvPlanes planes;
  const ConvBlocks blocks;        // of one sample
  const int64_t plane;            // of a block's copy: a channel
  const int64_t bundle, bundles;  // groups of a work item: in channels_last their results share cache lines
  const bool streaming;
  A *weights, *bias;
  int64_t* offset;  // of each term in the copy, from the first row and pixel that a result sees
  const ConvMemory memory;

  explicit Direct(const ConvProblem& problem)
      : Work(problem),
        row_tiles((results + kTileRows - 1) / kTileRows),
        depth(terms * p.shape.taps()),
        planes(p.shape, p.backward, kColumns),
        blocks(n, y.out, x.out, std::min(kPixels, out_layout.pixels)),
        plane(planes.plane(blocks.rows)),
        bundle(p.shape.channels_last ? std::clamp<int64_t>(64 / (results * int64_t(sizeof(T))), 1, groups) : 1),
        bundles((groups + bundle - 1) / bundle),
        streaming(!p.shape.channels_last && x.out % kColumns == 0 && this->streams_runs(x.out)),
        memory(*this) {}

  void layout_shared(Arena& s) {
    weights = s.take<A>(groups * row_tiles * depth * kTileRows);
    bias = s.take<A>(groups * row_tiles * kTileRows);
    offset = s.take<int64_t>(depth);
  }
  struct Own {
    A *image, *tile;

    Own(const Direct& q, Arena& s) {
      image = s.take<A>(q.terms * q.plane);
      tile = s.take<A>(kTileRows * kColumns);
    }
  };
  size_t bytes() const { return memory.bytes(p.threads); }

  // weights: [group][tile][term][row of the tile], terms by tap and channel.
  void pack() const {
    const int64_t ci = p.shape.ci, co = p.shape.co, taps = p.shape.taps();
    for (int64_t k = 0; k < depth; k++) {
      const int64_t tap = k % taps;
      offset[k] = k / taps * plane + planes.offset(tap / x.kernel, tap % x.kernel);
    }
    const T* const w = static_cast<const T*>(p.weight);
    for (int64_t tile = 0; tile < groups * row_tiles; tile++)
      for (int64_t r = 0; r < kTileRows; r++) {
        const int64_t group = tile / row_tiles, j = tile % row_tiles * kTileRows + r;
        const bool inside = j < results;
        bias[tile * kTileRows + r] = this->bias_of(group, j);
        for (int64_t k = 0; k < depth; k++) {
          const int64_t c = k / taps, tap = k % taps, o = p.backward ? c : j, i = p.backward ? j : c;
          weights[(tile * depth + k) * kTileRows + r] =
              inside ? A(w[(group * co + o) * ci * taps + i * p.shape.weight_input() + tap * p.shape.weight_tap()])
                     : A(0);
        }
      }
  }

  // Of a tile's rows the columns from `tile` on, to channels from `channel` on and pixels from `pixel` on.
  void write(const A* tile, int64_t sample, int64_t channel, int64_t rows, int64_t pixel, int64_t columns) const {
    const auto [channels, pixels, channels_last] = out_layout;
    T* const to = static_cast<T*>(p.out) + sample * channels * pixels;
    if (channels_last) {
      for (int64_t j = 0; j < columns; j++)
        for (int64_t r = 0; r < rows; r++) to[(pixel + j) * channels + channel + r] = T(tile[r * kColumns + j]);
      return;
    }
    for (int64_t r = 0; r < rows; r++) {
      T* const line = to + (channel + r) * pixels + pixel;
      const A* const from = tile + r * kColumns;
      columns == kColumns ? store_output<T>(line, load<A>(from, Full<A>()), Full<T>(), Zero(), streaming)
                          : store(line, load<A>(from, columns), columns);
    }
  }

  void run_item(int64_t item, const Own& own) const {
    const ConvBlock block = blocks(item / bundles, n, y.out);
    const int64_t first = item % bundles * bundle;
    for (int64_t group = first; group < std::min(first + bundle, groups); group++) run_group(block, group, own);
  }

  void run_group(const ConvBlock& block, int64_t group, const Own& own) const {
    planes.read(static_cast<const T*>(p.in) + block.sample * in_layout.channels * in_layout.pixels, in_layout,
                group * terms, terms, block.row, block.row_end, own.image, plane);
    if (x.out <= V::size()) return run_rows(block, group, own);
    for (int64_t row = block.row; row < block.row_end; row++)
      for (int64_t column = 0; column < x.out; column += kColumns) {
        // The last pixels of a row are taken together with some before them, if there are.
        const int64_t first = std::max<int64_t>(0, std::min<int64_t>(column, x.out - kColumns));
        const int64_t columns = std::min<int64_t>(kColumns, x.out - first);
        const A* const at = own.image + (row - block.row) * planes.row_step() + first;
        for (int64_t tile = 0; tile < row_tiles; tile++) {
          const int64_t rows = std::min<int64_t>(kTileRows, results - tile * kTileRows);
          run_tile(group * row_tiles + tile, rows, at, V::size(), own.tile);
          write(own.tile, block.sample, group * results + tile * kTileRows, rows, row * x.out + first, columns);
        }
      }
  }

  // Two rows at a time, one vector of each.
  void run_rows(const ConvBlock& block, int64_t group, const Own& own) const {
    for (int64_t row = block.row; row < block.row_end; row += 2) {
      const bool both = row + 1 < block.row_end;
      const A* const at = own.image + (row - block.row) * planes.row_step();
      for (int64_t tile = 0; tile < row_tiles; tile++) {
        const int64_t first = tile * kTileRows, rows = std::min<int64_t>(kTileRows, results - first);
        run_tile(group * row_tiles + tile, rows, at, both ? planes.row_step() : 0, own.tile);
        for (int64_t i = 0; i <= both; i++)
          write(own.tile + i * V::size(), block.sample, group * results + first, rows, (row + i) * x.out, x.out);
      }
    }
  }

  // half: from the first half of the columns to the second.
  void run_tile(int64_t packed, int64_t rows, const A* at, int64_t half, A* out) const {
    const A* const w = weights + packed * depth * kTileRows;
    with_rows(rows, [&](auto row_count) {
      constexpr int R = row_count;
      Tile<A, R> tile;
      for (int r = 0; r < R; r++) tile.v[r][0] = tile.v[r][1] = V(bias[packed * kTileRows + r]);
      tile.outer_add(
          depth, [&](int64_t k) { return w + k * kTileRows; }, [&](int64_t k) { return at + offset[k]; }, half);
      tile.store(out, kColumns);
    });
    if (p.activation != Activation::kNone) this->activate_all(out, rows * kColumns);
  }

  void run() {
    Arena shared = memory.shared_at(p.workspace);
    layout_shared(shared);
    pack();
    prefer_huge_pages(p.out, this->out_bytes());
    parallel(p.threads, [&](Team team) {
      Arena scratch = memory.own_at(p.workspace, team.rank);
      const Own own(*this, scratch);
      std::fill_n(own.image, terms * plane, A(0));
      team.for_each(blocks.count * bundles, [&](int64_t item) { run_item(item, own); });
    });
  }
};

}  // namespace

size_t conv2d_direct_forward_workspace(const Conv2dForward& a) { return conv_workspace<Direct>(a); }
void conv2d_direct_forward(const Conv2dForward& a) { conv_run<Direct>(a); }
size_t conv2d_direct_backward_input_workspace(const Conv2dBackwardInput& a) { return conv_workspace<Direct>(a); }
void conv2d_direct_backward_input(const Conv2dBackwardInput& a) { conv_run<Direct>(a); }

}  // namespace fastnorm::cpu::CPU_CAPABILITY
