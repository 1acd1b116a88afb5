// Convolution of and to few channels, and its gradient to the input; ../conv2d.h has the formulas.
//
// Columns of the product are neighbouring pixels of a row, read where they are; rows are channels of the result, a tile
// of them at a time: so neither few channels to read nor few to make leave lanes or registers idle, as they do where
// channels are side by side.  An image's rows are copied once, with zeros around them, planes apart, and every
// stride-th pixel together, so that what the windows of neighbouring pixels see is a run of numbers.
//
// Floor: n * pixels * co * ci * taps multiply-adds; a tile's steps read one vector pair and kTileRows numbers, from L1.
#include "conv2d_im2col.h"
#include "conv2d_problem.h"
#include "output.h"
#include "parallel.h"

namespace fastnorm::cpu::CPU_CAPABILITY {
namespace {

constexpr int64_t kPixels = 512;  // of a block: a few rows, whose windows share what they read

template <class T>
struct Direct {
  using A = Accumulate<T>;
  using V = at::vec::Vectorized<A>;
  static constexpr int64_t kColumns = kPanel<A>;

  const ConvProblem& p;
  ConvReach y, x;
  int64_t groups, terms, results, row_tiles, depth;  // depth: terms of a sum
  int64_t step;                                      // between the pixels that neighbouring results see
  int64_t run, image_row, plane;                     // of the copy: a row's every step-th pixel, a row, a channel
  ConvBlocks blocks;
  A *weights, *bias;
  int64_t* offset;  // of each term in the copy, from the first row and pixel that a result sees
  size_t shared_bytes, thread_bytes;

  explicit Direct(const ConvProblem& p)
      : p(p),
        y(p.shape.y, p.backward),
        x(p.shape.x, p.backward),
        groups(p.shape.groups),
        terms(p.backward ? p.shape.co : p.shape.ci),
        results(p.backward ? p.shape.ci : p.shape.co),
        row_tiles((results + kTileRows - 1) / kTileRows),
        depth(terms * p.shape.taps()),
        step(p.backward ? 1 : x.stride),
        run((x.end(x.out) - x.begin(0) + step - 1) / step + kColumns),
        image_row(run * step),
        blocks(p.shape.n, y.out, x.out, kPixels) {
    blocks = ConvBlocks(p.shape.n, y.out, x.out, std::min<int64_t>(kPixels, int64_t(y.out) * x.out));  // of one sample
    plane = y.span(blocks.rows) * image_row;
    ConvScratch shared{nullptr};
    layout_shared(shared), shared_bytes = shared.used;
    thread_bytes = ((terms * plane + kTileRows * kColumns) * sizeof(A) + 63) / 64 * 64;
  }

  void layout_shared(ConvScratch& s) {
    weights = s.take<A>(groups * row_tiles * depth * kTileRows);
    bias = s.take<A>(groups * row_tiles * kTileRows);
    offset = s.take<int64_t>(depth);
  }
  size_t bytes() const { return shared_bytes + p.threads * thread_bytes; }

  // weights: [group][tile][term][row of the tile], terms by tap and channel.
  void pack() const {
    const int64_t ci = p.shape.ci, co = p.shape.co, taps = p.shape.taps();
    for (int64_t k = 0; k < depth; k++) {
      const int64_t c = k / taps, tap = k % taps;
      const int64_t row = y.position(0, tap / x.kernel) - y.begin(0),
                    column = x.position(0, tap % x.kernel) - x.begin(0);
      offset[k] = c * plane + row * image_row + column % step * run + column / step;
    }
    const T* const w = static_cast<const T*>(p.weight);
    for (int64_t tile = 0; tile < groups * row_tiles; tile++)
      for (int64_t r = 0; r < kTileRows; r++) {
        const int64_t group = tile / row_tiles, j = tile % row_tiles * kTileRows + r;
        const bool inside = j < results;
        bias[tile * kTileRows + r] = inside && p.bias ? A(static_cast<const T*>(p.bias)[group * results + j]) : A(0);
        for (int64_t k = 0; k < depth; k++) {
          const int64_t c = k / taps, tap = k % taps, o = p.backward ? c : j, i = p.backward ? j : c;
          weights[(tile * depth + k) * kTileRows + r] = inside ? A(w[((group * co + o) * ci + i) * taps + tap]) : A(0);
        }
      }
  }

  // What a block of one sample sees of a group.
  void read(const ConvBlock& block, int64_t group, A* image) const {
    const int64_t channels = groups * terms, pixels = int64_t(y.in) * x.in, begin = x.begin(0);
    const T* const sample = static_cast<const T*>(p.in) + block.sample * channels * pixels;
    const int64_t pixel_step = p.shape.channels_last ? channels : 1, channel_step = p.shape.channels_last ? 1 : pixels;
    for (int64_t c = 0; c < terms; c++)
      for (int64_t row = y.begin(block.row), i = 0; row < y.end(block.row_end); row++, i++) {
        A* const to = image + c * plane + i * image_row;
        const bool inside = row >= 0 && row < y.in;
        const T* const from = sample + (group * terms + c) * channel_step + row * x.in * pixel_step;
        for (int64_t phase = 0; phase < step; phase++) {
          // The columns begin + phase + j * step that are inside of the image.
          const int64_t first = begin + phase;
          const int64_t low = std::clamp<int64_t>(first >= 0 ? 0 : (-first + step - 1) / step, 0, run);
          const int64_t high = inside ? std::clamp<int64_t>((x.in - first + step - 1) / step, low, run) : low;
          A* const line = to + phase * run;
          std::fill_n(line, low, A(0));
          const T* const at = from + (first + low * step) * pixel_step;
          if (high > low) copy_line(at, pixel_step * step, line + low, high - low);
          std::fill_n(line + high, run - high, A(0));
        }
      }
  }
  static void copy_line(const T* from, int64_t pitch, A* to, int64_t count) {
    if (pitch == 1)
      for (int64_t i = 0; i < count; i++) to[i] = A(from[i]);
    else if (pitch == 2)
      for (int64_t i = 0; i < count; i++) to[i] = A(from[2 * i]);
    else
      for (int64_t i = 0; i < count; i++) to[i] = A(from[i * pitch]);
  }

  // Rows [0, rows) of a tile, columns [skip, count), to channels from `channel` on and pixels from `pixel` on.
  void write(const A* tile, int64_t sample, int64_t channel, int64_t rows, int64_t pixel, int64_t skip,
             int64_t count) const {
    const int64_t channels = groups * results, pixels = int64_t(y.out) * x.out;
    T* const to = static_cast<T*>(p.out) + sample * channels * pixels;
    if (p.shape.channels_last) {
      for (int64_t j = skip; j < count; j++)
        for (int64_t r = 0; r < rows; r++) to[(pixel + j) * channels + channel + r] = T(tile[r * kColumns + j]);
      return;
    }
    for (int64_t r = 0; r < rows; r++) {
      T* const line = to + (channel + r) * pixels + pixel;
      if (count == kColumns)
        store(line, load<A>(tile + r * kColumns, Full<A>()), Full<T>());
      else
        for (int64_t j = skip; j < count; j++) line[j] = T(tile[r * kColumns + j]);
    }
  }

  void run_item(int64_t item, A* image) const {
    const int64_t group = item % groups;
    const ConvBlock block = blocks(item / groups, p.shape.n, y.out);
    A* const out = image + terms * plane;
    for (ConvBlock b = block; b.sample < block.sample_end; b.sample++) {
      read(b, group, image);
      for (int64_t row = b.row; row < b.row_end; row++)
        for (int64_t column = 0; column < x.out; column += kColumns) {
          // The last pixels of a row are taken together with some before them, if there are.
          const int64_t first = std::max<int64_t>(0, std::min<int64_t>(column, x.out - kColumns));
          const int64_t count = std::min<int64_t>(kColumns, x.out - first);
          const A* const at = image + (y.begin(row) - y.begin(b.row)) * image_row + first;
          for (int64_t tile = 0; tile < row_tiles; tile++)
            run_tile(group * row_tiles + tile, at, out, b.sample, group * results + tile * kTileRows,
                     std::min<int64_t>(kTileRows, results - tile * kTileRows), row * x.out + first, count);
        }
    }
  }

  void run_tile(int64_t packed, const A* at, A* out, int64_t sample, int64_t channel, int64_t rows, int64_t pixel,
                int64_t count) const {
    const A* const w = weights + packed * depth * kTileRows;
    with_rows(rows, [&](auto row_count) {
      constexpr int R = row_count;
      Tile<A, R> tile;
      for (int r = 0; r < R; r++) tile.v[r][0] = tile.v[r][1] = V(bias[packed * kTileRows + r]);
      tile.outer_add(depth, [&](int64_t k) { return w + k * kTileRows; }, [&](int64_t k) { return at + offset[k]; });
      tile.store(out, kColumns);
    });
    if (p.activation != Activation::kNone) activate_rows(out, rows * kColumns);
    write(out, sample, channel, rows, pixel, 0, count);
  }
  [[gnu::noinline]] void activate_rows(A* values, int64_t count) const {
    for (int64_t i = 0; i < count; i += V::size())
      activate(p.activation, V::loadu(values + i), V(A(p.slope))).store(values + i);
  }

  void run_all() {
    ConvScratch shared{static_cast<char*>(p.workspace)};
    layout_shared(shared);
    pack();
    prefer_huge_pages(p.out, p.shape.n * groups * results * y.out * x.out * sizeof(T));
    parallel(p.threads, [&](Team team) {
      A* const image = reinterpret_cast<A*>(static_cast<char*>(p.workspace) + shared_bytes + team.rank * thread_bytes);
      team.for_each(blocks.count * groups, [&](int64_t item) { run_item(item, image); });
    });
  }
};

template <class Args>
size_t workspace_bytes(const Args& a) {
  size_t bytes = 0;
  const ConvProblem p = problem(a);
  with_type(a.shape.dtype, [&](auto zero) { bytes = Direct<decltype(zero)>(p).bytes(); });
  return bytes;
}
template <class Args>
void convolve(const Args& a) {
  const ConvProblem p = problem(a);
  with_type(a.shape.dtype, [&](auto zero) { Direct<decltype(zero)>(p).run_all(); });
}

}  // namespace

size_t conv2d_direct_forward_workspace(const Conv2dForward& a) { return workspace_bytes(a); }
void conv2d_direct_forward(const Conv2dForward& a) { convolve(a); }
size_t conv2d_direct_backward_input_workspace(const Conv2dBackwardInput& a) { return workspace_bytes(a); }
void conv2d_direct_backward_input(const Conv2dBackwardInput& a) { convolve(a); }

}  // namespace fastnorm::cpu::CPU_CAPABILITY
