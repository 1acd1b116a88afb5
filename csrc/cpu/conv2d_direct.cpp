// Convolution of and to few channels, and its gradient to the input; ../conv2d.h has the formulas.
//
// Columns of the product are neighbouring pixels of a row, or of two where one vector has all or the last of a row,
// read where they are; rows are channels of the result, a tile of them at a time: so neither few channels to read nor
// few to make leave lanes or registers idle, as they do where channels are side by side.  An image's rows are copied
// once, as conv2d_planes.h has them.
//
// Floor: n * pixels * co * ci * taps multiply-adds; a tile's steps read one vector pair and tile_rows numbers, from L1.
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

  const int64_t row_tiles, tile_rows;  // of about one size
  const int64_t depth;                 // terms of a sum
  const int64_t last;                  // pixels of a row that are left to one vector, with the next row's
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
        tile_rows((results + row_tiles - 1) / row_tiles),
        depth(terms * p.shape.taps()),
        last(x.out % kColumns <= V::size() ? x.out % kColumns : 0),
        planes(p.shape, p.backward, std::max<int64_t>(0, (last == x.out ? V::size() : kColumns) - x.out)),
        blocks(n, y.out, x.out, std::min(kPixels, out_layout.pixels)),
        plane(planes.plane(blocks.rows)),
        bundle(p.shape.channels_last ? std::clamp<int64_t>(64 / (results * int64_t(sizeof(T))), 1, groups) : 1),
        bundles((groups + bundle - 1) / bundle),
        streaming(!p.shape.channels_last && x.out % V::size() == 0 && this->streams_runs(last ? V::size() : kColumns)),
        memory(*this) {}

  void layout_shared(Arena& s) {
    weights = s.take<A>(groups * row_tiles * depth * tile_rows);
    bias = s.take<A>(groups * row_tiles * tile_rows);
    offset = s.take<int64_t>(depth);
  }
  struct Own {
    A *image, *tile;

    Own(const Direct& q, Arena& s) {
      image = s.take<A>(q.terms * q.plane);
      tile = s.take<A>(q.tile_rows * kColumns);
    }
  };
  size_t bytes() const { return memory.bytes(p.threads); }

  // weights: [group][tile][term][row of the tile], terms by row of the window, channel and column of the window.
  void pack() const {
    const int64_t ci = p.shape.ci, co = p.shape.co, taps = p.shape.taps();
    auto tap_of = [&](int64_t k) { return k / (terms * x.kernel) * x.kernel + k % x.kernel; };
    auto term_of = [&](int64_t k) { return k / x.kernel % terms; };
    for (int64_t k = 0; k < depth; k++)
      offset[k] = term_of(k) * plane + planes.offset(tap_of(k) / x.kernel, tap_of(k) % x.kernel);
    const T* const w = static_cast<const T*>(p.weight);
    for (int64_t tile = 0; tile < groups * row_tiles; tile++)
      for (int64_t r = 0; r < tile_rows; r++) {
        const int64_t group = tile / row_tiles, j = tile % row_tiles * tile_rows + r;
        const bool inside = j < results;
        bias[tile * tile_rows + r] = this->bias_of(group, j);
        for (int64_t k = 0; k < depth; k++) {
          const int64_t c = term_of(k), tap = tap_of(k), o = p.backward ? c : j, i = p.backward ? j : c;
          weights[(tile * depth + k) * tile_rows + r] =
              inside ? A(w[(group * co + o) * ci * taps + i * p.shape.weight_input() + tap * p.shape.weight_tap()])
                     : A(0);
        }
      }
  }

  // Of a tile's rows the columns from `tile` on, to channels from `channel` on and pixels from `pixel` on.
  void write(const A* tile, int64_t sample, int64_t channel, int64_t rows, int64_t pixel, int64_t columns) const {
    const auto [channels, pixels, channels_last] = out_layout;
    T* const to = static_cast<T*>(p.out) + sample * channels * pixels;
    if (channels_last)
      return image::transpose(tile, kColumns, to + pixel * channels + channel, channels, rows, columns);
    for (int64_t r = 0; r < rows; r++) {
      T* const line = to + (channel + r) * pixels + pixel;
      const A* const from = tile + r * kColumns;
      if (columns == kColumns) {
        store_output<T>(line, load<A>(from, Full<A>()), Full<T>(), Zero(), streaming);
        continue;
      }
      if constexpr (std::is_same_v<T, A>)
        if (columns == V::size()) {
          store_vector(line, V::loadu(from), streaming);
          continue;
        }
      store(line, load<A>(from, columns), columns);
    }
  }

  // What write() is going to write, while it is computed: planes are so far apart that each line would be waited for.
  void prefetch_results(int64_t sample, int64_t channel, int64_t rows, int64_t pixel, int64_t columns) const {
    const auto [channels, pixels, channels_last] = out_layout;
    if (streaming || channels_last) return;
    const T* const to = static_cast<const T*>(p.out) + (sample * channels + channel) * pixels + pixel;
    for (int64_t r = 0; r < rows; r++) prefetch_run<true>(to + r * pixels, columns);
  }

  void run_item(int64_t item, const Own& own) const {
    const ConvBlock block = blocks(item / bundles, n, y.out);
    const int64_t first = item % bundles * bundle;
    for (int64_t group = first; group < std::min(first + bundle, groups); group++) run_group(block, group, own);
  }

  // Terms of a sum, those of some rows of the window.
  struct Terms {
    int64_t begin, end;

    // ... and others, and those between them.
    Terms operator|(const Terms& o) const { return {std::min(begin, o.begin), std::max(end, o.end)}; }
  };
  // What a row of results sees inside of the image.
  Terms terms_of(int64_t row) const {
    auto inside = [&](int ky) {
      const int64_t at = planes.y.position(row, ky);
      return at >= 0 && at < planes.y.in;
    };
    int begin = 0, end = y.kernel;
    while (begin < end && !inside(begin)) begin++;
    while (begin < end && !inside(end - 1)) end--;
    return {begin * terms * x.kernel, end * terms * x.kernel};
  }

  void run_group(const ConvBlock& block, int64_t group, const Own& own) const {
    planes.read(static_cast<const T*>(p.in) + block.sample * in_layout.channels * in_layout.pixels, in_layout,
                group * terms, terms, block.row, block.row_end, own.image, plane);
    for (int64_t row = block.row; row < block.row_end; row += 2) {
      const int64_t rows = std::min<int64_t>(2, block.row_end - row);
      for (int64_t i = row; i < row + rows; i++)
        for (int64_t column = 0; column < x.out - last; column += kColumns) {
          // The last of a row's pixels are taken together with some before them, if there are.
          const int64_t first = std::max<int64_t>(0, std::min<int64_t>(column, x.out - kColumns));
          run_strip(block, group, {i, 1, first, std::min(kColumns, x.out - first)}, own);
        }
      const int64_t first = std::max<int64_t>(0, x.out - V::size());
      if (last) run_strip(block, group, {row, rows, first, x.out - first}, own);
    }
  }

  // Columns of the product: pixels of one row, a panel, or one vector of each of two rows.
  struct Strip {
    int64_t row, rows, first, columns;
  };
  void run_strip(const ConvBlock& block, int64_t group, const Strip& s, const Own& own) const {
    const Terms seen = s.rows == 2 ? terms_of(s.row) | terms_of(s.row + 1) : terms_of(s.row);
    const A* const at = own.image + (s.row - block.row) * planes.row_step() + s.first;
    const int64_t half = s.columns > V::size() ? V::size() : s.rows == 2 ? planes.row_step() : 0;
    for (int64_t tile = 0; tile < row_tiles; tile++) {
      const int64_t channel = tile * tile_rows, channels = std::min(tile_rows, results - channel);
      for (int64_t i = 0; i < s.rows; i++)
        prefetch_results(block.sample, group * results + channel, channels, (s.row + i) * x.out + s.first, s.columns);
      run_tile(group * row_tiles + tile, channels, seen, at, half, own.tile);
      for (int64_t i = 0; i < s.rows; i++)
        write(own.tile + i * V::size(), block.sample, group * results + channel, channels,
              (s.row + i) * x.out + s.first, s.columns);
    }
  }

  // half: from the first half of the columns to the second.
  void run_tile(int64_t packed, int64_t rows, const Terms& seen, const A* at, int64_t half, A* out) const {
    const A* const w = weights + (packed * depth + seen.begin) * tile_rows;
    const int64_t* const place = offset + seen.begin;
    with_rows(rows, [&](auto row_count) {
      constexpr int R = row_count;
      Tile<A, R> tile;
#pragma GCC unroll 12
      for (int r = 0; r < R; r++) tile.v[r][0] = tile.v[r][1] = V(bias[packed * tile_rows + r]);
      tile.outer_add(
          seen.end - seen.begin, [&](int64_t k) { return w + k * tile_rows; }, [&](int64_t k) { return at + place[k]; },
          half);
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
