// Convolution as a matrix product, and its gradient to the input, which is one too; ../conv2d.h has the formulas.
//
// Rows of the product are pixels of the result, columns its channels, and the sum runs over the taps and the channels
// that are read.  The columns of im2col are never copied together: a row is a pointer per tap into the image.  Images
// that are not [pixels][channels] in the accumulate type are first copied to that, a few rows at a time, with zeros
// around them: on such a copy neighbouring taps of a row are one run of numbers.  The weights are packed once per call,
// in panels of result channels.
//
// Floor: n * pixels * co * ci * taps multiply-adds, of which the registers' tile does 2 vectors a cycle.  A panel's
// kDepth numbers stay in the L1 cache for all of a block's pixels, and these in L2 for all panels.
#include "conv2d_pointwise.h"
#include "conv2d_problem.h"

namespace fastnorm::cpu::CPU_CAPABILITY {
namespace {

constexpr int64_t kPixels = 192;  // of a block
constexpr int64_t kDepth = 256;   // terms of the sum between two visits of a tile to memory

template <class T>
struct Product : ConvWork<T> {
  using Work = ConvWork<T>;
  using typename Work::A, typename Work::V;
  using Work::kColumns, Work::p, Work::y, Work::x, Work::n, Work::groups, Work::terms, Work::results, Work::panels,
      Work::plain, Work::in_layout, Work::out_layout;

  const bool copied, merged;       // merged: a row's taps on a copy are one run
  const int64_t runs, run_length;  // a run: the terms that follow each other in memory
  const bool streaming;
  const ConvBlocks blocks;
  const int64_t split;  // parts of the panels that are work items of their own
  A *weights, *bias, *zeros;
  const ConvMemory memory;

  explicit Product(const ConvProblem& problem)
      : Work(problem),
        copied(!plain || (terms < 16 && x.neighbours() && x.kernel > 1)),
        merged(copied && x.neighbours()),
        runs(merged ? y.kernel : p.shape.taps()),
        run_length(merged ? x.kernel * terms : terms),
        streaming(Work::streaming()),
        blocks(n, y.out, x.out, kPixels),
        split(Work::split_panels(blocks.count * groups)),
        memory(*this) {}

  void layout_shared(Arena& s) {
    weights = p.packed ? static_cast<A*>(p.packed) : s.take<A>(weights_size());
    bias = s.take<A>(groups * panels * kColumns);
    zeros = s.take<A>(terms + kColumns);
  }

  // The results of a block whose taps see the same things, and what these are.
  struct Phase {
    int64_t pixels, runs;
    int64_t* place;   // of each pixel in the block
    int64_t* packed;  // where each run's weights are in a panel
    const A** rows;   // [run][pixel]
  };

  // What a thread has for itself.
  struct Own {
    A *image, *sums, *results;
    const A** rows;
    int64_t *place, *packed;
    Phase* phase;

    Own(const Product& q, Arena& s) {
      const int64_t pixels = q.blocks.samples * q.blocks.rows * q.x.out;
      image = s.take<A>(q.copied ? ConvView<T>::elements(q.y, q.x, q.blocks, q.terms) : 0);
      sums = s.take<A>(pixels * kColumns);
      results = s.take<A>(q.plain ? 0 : pixels * kColumns);
      rows = s.take<const A*>(pixels * q.runs);
      place = s.take<int64_t>(pixels);
      packed = s.take<int64_t>(q.runs);
      phase = s.take<Phase>(int64_t(q.y.phases()) * q.x.phases());
    }
  };

  size_t bytes() const { return memory.bytes(p.threads); }
  int64_t weights_size() const { return groups * panels * runs * run_length * kColumns; }
  size_t packed_bytes() const { return weights_size() * sizeof(A); }

  // ---- Packing ------------------------------------------------------------------------------------------------------

  // The panel's weights as [run][term][column].
  void pack_panel(int64_t item) const {
    const int64_t group = item / panels, first = item % panels * kColumns, window = x.kernel;
    A* const to = weights + item * runs * run_length * kColumns;
    if (!p.is_packed)
      this->read_weights(group, first, 0, terms, [&](int64_t k, int64_t tap, int64_t count, const A(*rows)[kColumns]) {
        for (int64_t end = tap + count; tap < end; tap++, rows++) {
          const int64_t ky = tap / window, kx = tap % window;
          // In a merged run the taps are in the order of the positions that they see.
          const int64_t at = merged ? ky * run_length + (p.backward ? window - 1 - kx : kx) * terms : tap * run_length;
          std::copy_n(*rows, kColumns, to + (at + k) * kColumns);
        }
      });
    for (int64_t j = 0; j < kColumns; j++) bias[item * kColumns + j] = this->bias_of(group, first + j);
  }

  // ---- Product ------------------------------------------------------------------------------------------------------

  // Where a block's results go to: a panel of them, or of the image itself.
  struct Target {
    A* first;
    int64_t pitch, count;  // count: of the panel's columns
    bool streaming;

    void put(const Phase& f, int64_t m, Pack<A> v) const {
      A* const to = first + f.place[m] * pitch;
      count == kColumns ? store_output<A>(to, v, Full<A>(), Zero(), streaming) : store<A>(to, v, count);
    }
  };

  // Results = what they start from + the products of all runs, kDepth of the terms after the other, which pass through
  // sums.  vectors: of the panel that have results.
  void multiply_panel(const Phase& f, A* sums, const A* panel, const A* start, int64_t vectors,
                      const Target& target) const {
    const int64_t length = std::min(run_length, kDepth), together = std::max<int64_t>(1, kDepth / run_length);
    auto add = [&](bool first, bool last, int64_t run, int64_t end_run, int64_t term, int64_t count) {
      const bool done = last && this->simple_activation();
      for (int64_t m = 0; m < f.pixels; m += kTileRows)
        with_rows(std::min<int64_t>(kTileRows, f.pixels - m), [&](auto row_count) {
          with_count<2>(vectors, [&](auto vector_count) {
            constexpr int R = row_count, C = vector_count;
            Tile<A, R, C> tile;
            first ? tile.load(start, 0) : tile.clear();
            for (int64_t i = run; i < end_run; i++) {
              const A* rows[R];
#pragma GCC unroll 12
              for (int r = 0; r < R; r++) rows[r] = f.rows[i * f.pixels + m + r] + term;
              tile.multiply_add(rows, count, panel + (f.packed[i] + term) * kColumns);
            }
            if (!first) tile.add(sums + m * kColumns, kColumns);  // sums of their own: a longer one is less exact
            if (!done) return tile.store(sums + m * kColumns, kColumns);
#pragma GCC unroll 12
            for (int r = 0; r < R; r++) {
              const V high = C == 1 ? V(A(0)) : this->activate_simple(tile.v[r][C - 1]);
              target.put(f, m + r, {this->activate_simple(tile.v[r][0]), high});
            }
          });
        });
      if (last && !done) finish_panel(f, sums, target);
    };
    if (f.runs == 0) return add(true, true, 0, 0, 0, 0);
    for (int64_t run = 0; run < f.runs; run += together)
      for (int64_t term = 0; term < run_length; term += length)
        add(run == 0 && term == 0, run + together >= f.runs && term + length >= run_length, run,
            std::min(run + together, f.runs), term, std::min(length, run_length - term));
  }

  void finish_panel(const Phase& f, A* sums, const Target& target) const {
    this->activate_all(sums, f.pixels * kColumns);
    for (int64_t m = 0; m < f.pixels; m++) target.put(f, m, load<A>(sums + m * kColumns, Full<A>()));
  }

  // The pixels of each phase and what their taps see.
  void collect(const Own& own, const ConvView<T>& view, const ConvBlock& block) const {
    const A** rows = own.rows;
    int64_t *place = own.place, *packed = own.packed;
    for (int i = 0; i < y.phases() * x.phases(); i++) {
      const int phase_y = i / x.phases(), phase_x = i % x.phases();
      const int64_t column = x.first(phase_x, 0), columns = (x.out - column + x.phases() - 1) / x.phases();
      auto for_rows = [&](auto f) {
        for (int64_t s = block.sample; s < block.sample_end; s++)
          for (int64_t row = y.first(phase_y, block.row); row < block.row_end; row += y.phases()) f(s, row);
      };
      Phase& f = own.phase[i] = {0, 0, place, packed, rows};
      for_rows([&](int64_t s, int64_t row) {
        const int64_t first = ((s - block.sample) * (block.row_end - block.row) + row - block.row) * x.out + column;
        for (int64_t j = 0; j < columns; j++) *place++ = first + j * x.phases();
      });
      f.pixels = place - f.place;
      for (int ky = 0; ky < y.kernel; ky++)
        for (int kx = 0; kx < (merged ? 1 : x.kernel); kx++) {
          if (!y.has_tap(phase_y, ky) || !x.has_tap(phase_x, kx)) continue;
          const int tap = merged && p.backward ? x.kernel - 1 : kx;  // the one that sees the first position
          *packed++ = (merged ? ky : ky * x.kernel + kx) * run_length;
          for_rows([&](int64_t s, int64_t row) {
            view.pixels(s, y.position(row, ky), x.position(column, tap), x.step(), columns, rows), rows += columns;
          });
        }
      f.runs = packed - f.packed;
    }
  }

  void run_item(int64_t item, const Own& own) const {
    const int64_t part = item % split, group = item / split % groups;
    const ConvBlock block = blocks(item / split / groups, n, y.out);
    ConvView<T> view(y, x, in_layout, group * terms, terms, copied, p.in, zeros, own.image, terms);
    view.read(block);
    collect(own, view, block);
    const int64_t pixels = (block.row_end - block.row) * x.out;
    for (int64_t panel = panels * part / split; panel < panels * (part + 1) / split; panel++) {
      const int64_t packed = group * panels + panel, channel = group * results + panel * kColumns;
      const int64_t count = std::min(kColumns, results - panel * kColumns);
      Target target{own.results, kColumns, kColumns, false};
      if (plain) {
        const int64_t first = block.sample * out_layout.pixels + block.row * x.out;
        target = {static_cast<A*>(p.out) + first * out_layout.channels + channel, out_layout.channels, count,
                  streaming};
      }
      for (int i = 0; i < y.phases() * x.phases(); i++) {
        const Phase& f = own.phase[i];
        multiply_panel(f, own.sums, weights + packed * runs * run_length * kColumns, bias + packed * kColumns,
                       count <= V::size() ? 1 : 2, target);
      }
      if (plain) continue;
      for (int64_t s = block.sample; s < block.sample_end; s++)
        write_pixels<T>(own.results + (s - block.sample) * pixels * kColumns, kColumns,
                        static_cast<T*>(p.out) + s * out_layout.channels * out_layout.pixels, out_layout, channel,
                        count, block.row * x.out, pixels);
    }
  }

  void run() {
    Arena shared = memory.shared_at(p.workspace);
    layout_shared(shared);
    std::fill_n(zeros, terms + kColumns, A(0));
    prefer_huge_pages(p.out, this->out_bytes());
    parallel(p.threads, [&](Team team) {
      team.for_each(groups * panels, [&](int64_t item) { pack_panel(item); });
      Arena scratch = memory.own_at(p.workspace, team.rank);
      const Own own(*this, scratch);
      std::fill_n(own.sums, blocks.samples * blocks.rows * x.out * kColumns, A(0));  // half a panel leaves the other
      team.for_each(blocks.count * groups * split, [&](int64_t item) { run_item(item, own); });
    });
  }
};

}  // namespace

// Windows of 1x1 over planes have a kernel of their own.
size_t conv2d_im2col_packed(const Conv2dForward& a) {
  return is_pointwise(a.shape) ? conv_packed<Pointwise>(a) : conv_packed<Product>(a);
}
size_t conv2d_im2col_forward_workspace(const Conv2dForward& a) {
  return is_pointwise(a.shape) ? conv_workspace<Pointwise>(a) : conv_workspace<Product>(a);
}
void conv2d_im2col_forward(const Conv2dForward& a) {
  is_pointwise(a.shape) ? conv_run<Pointwise>(a) : conv_run<Product>(a);
}
size_t conv2d_im2col_backward_input_workspace(const Conv2dBackwardInput& a) {
  return is_pointwise(a.shape) ? conv_workspace<Pointwise>(a) : conv_workspace<Product>(a);
}
void conv2d_im2col_backward_input(const Conv2dBackwardInput& a) {
  is_pointwise(a.shape) ? conv_run<Pointwise>(a) : conv_run<Product>(a);
}

}  // namespace fastnorm::cpu::CPU_CAPABILITY
