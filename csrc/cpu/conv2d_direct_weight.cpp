// The gradient of a convolution of few channels to its weights and bias; ../conv2d.h has the formulas.
//
// Vectors run along the pixels of a row: a sum per lane for each weight, and the lanes are added up in the end.  So
// neither few channels nor few taps leave lanes idle, as they do in a matrix product.  A tile of weights, some channels
// of dy times some taps and channels of x, stays in registers for a block of pixels.  The blocks go to a fixed number
// of parts, whose sums are added in order.
//
// Floor: n * pixels * co * ci * taps multiply-adds; a tile's step reads a vector for each of its channels and taps.
#include "conv2d_planes.h"
#include "conv2d_problem.h"

namespace fastnorm::cpu::CPU_CAPABILITY {
namespace {

constexpr int64_t kPixels = 512;  // of a block

#ifdef CPU_CAPABILITY_AVX512
constexpr int kTileSums = 24, kTileChannels = 4;
#else
constexpr int kTileSums = 12, kTileChannels = 3;
#endif
// At most so many terms for the channels of a tile.
constexpr int tile_terms(int channels) { return std::min(kTileSums / channels, 9); }

template <class T>
struct DirectWeight : ConvWeightWork<T> {
  using Work = ConvWeightWork<T>;
  using typename Work::A, typename Work::V;
  using Work::p, Work::s, Work::x_layout, Work::dy_layout;
  static constexpr int64_t kLane = V::size();

  const ConvPlanes planes;
  const ConvBlocks blocks;
  const int64_t bundle, bundles;  // groups that are read together: in channels_last their numbers share cache lines
  const int64_t depth;            // weights of a channel of dy
  const int64_t line;             // of dy's copy: a row
  const int64_t plane, x_plane, dy_plane;  // a sample's channel of x, and a channel of a block's samples
  const ConvParts split;
  A *sums, *bias_sums;  // [part][channel of dy][weight][lane]
  int64_t* offset;      // of each weight's numbers in the planes
  const ConvMemory memory;

  explicit DirectWeight(const Conv2dBackwardWeight& a)
      : Work(a),
        planes(s, false, (kLane - s.x.out % kLane) % kLane),
        blocks(s.n, s.y.out, s.x.out, kPixels),
        bundle(s.channels_last ? std::clamp<int64_t>(16 / std::min(s.ci, s.co), 1, s.groups) : 1),
        bundles((s.groups + bundle - 1) / bundle),
        depth(s.ci * s.taps()),
        line((s.x.out + kLane - 1) / kLane * kLane),
        plane(planes.plane(blocks.rows)),
        x_plane(blocks.samples * plane),
        dy_plane(blocks.samples * blocks.rows * line),
        split(sums_of_part() * int64_t(sizeof(A)), blocks.count, bundles, s.co, p.threads),
        memory(*this) {}

  int64_t channels() const { return s.groups * s.co; }
  int64_t sums_of_part() const { return channels() * depth * kLane; }

  void layout_shared(Arena& scratch) {
    sums = scratch.take<A>(split.parts * sums_of_part());
    bias_sums = scratch.take<A>(split.parts * channels() * kLane);
    offset = scratch.take<int64_t>(depth);
  }
  struct Own {
    A *x, *dy;  // planes of a bundle

    Own(const DirectWeight& q, Arena& scratch) {
      x = scratch.take<A>(q.bundle * q.s.ci * q.x_plane);
      dy = scratch.take<A>(q.bundle * q.split.widest() * q.dy_plane);
    }
  };
  size_t bytes() const { return memory.bytes(p.threads); }

  // Channels of dy from c0 on, as lines with zeros at their ends.
  void read_dy(const T* sample, int64_t c0, int64_t count, int64_t row, int64_t row_end, A* to) const {
    for (; row < row_end; row++, to += line) {
      const int64_t pixel = row * s.x.out;
      if (s.channels_last)
        image::transpose(sample + pixel * dy_layout.channels + c0, dy_layout.channels, to, dy_plane, s.x.out, count);
      else
        for (int64_t c = 0; c < count; c++) {
          const T* const from = sample + (c0 + c) * dy_layout.pixels + pixel;
          prefetch_run(from + count * dy_layout.pixels, s.x.out);
          ConvPlanes::copy(from, 1, to + c * dy_plane, 1, s.x.out);
        }
    }
  }

  // A tile's sums over a block, from its first channel's and first weight's on.  Where a row's last vector reaches
  // beyond the results, dy is 0, and x is what other windows see: of infinite numbers the product would be NaN.
  template <int O, int K>
  void add_tile(const ConvBlock& block, const A* x, const A* dy, const int64_t* offsets, A* to) const {
    if (add_rows<O, K, false>(block, x, dy, offsets, to)) return;
    for (int k = 0; k < K; k++) add_rows<O, 1, true>(block, x, dy, offsets + k, to + k * kLane);
  }
  // kMasked: x as 0 beyond the results; otherwise sums that are not finite are left as they were, and the answer is no.
  template <int O, int K, bool kMasked>
  bool add_rows(const ConvBlock& block, const A* x, const A* dy, const int64_t* offsets, A* to) const {
    V sum[O][K];
    int64_t reach[K];
    auto for_sums = [&](auto f) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int o = 0; o < O; o++)
#pragma GCC unroll 9
        for (int k = 0; k < K; k++) f(sum[o][k], o, to + (o * depth + k) * kLane);
    };
    for_sums([](V& v, int, const A* from) __attribute__((always_inline)) { v = V::loadu(from); });
#pragma GCC unroll 9
    for (int k = 0; k < K; k++) reach[k] = offsets[k];
    const int64_t rows = block.row_end - block.row, whole = s.x.out / kLane * kLane, x_step = planes.row_step();
    const V inside = V::arange(A(0), A(1)) < V(A(s.x.out - whole));
    const A* dy_row = dy;
    for (int64_t n = 0; n < block.sample_end - block.sample; n++) {
      const A* x_row = x + n * plane;
      for (int64_t row = 0; row < rows; row++, x_row += x_step, dy_row += line)
        for (int64_t i = 0; i < line; i += kLane) {
          V d[O];
#pragma GCC unroll 4
          for (int o = 0; o < O; o++) d[o] = V::loadu(dy_row + o * dy_plane + i);
#pragma GCC unroll 9
          for (int k = 0; k < K; k++) {
            V v = V::loadu(x_row + reach[k] + i);
            if (kMasked && i == whole) v = v & inside;
#pragma GCC unroll 4
            for (int o = 0; o < O; o++) sum[o][k] = at::vec::fmadd(d[o], v, sum[o][k]);
          }
        }
    }
    if (!kMasked && whole < s.x.out) {
      FiniteCheck<V> finite[O], all;  // not one long chain
      for_sums([&](V v, int o, const A*) __attribute__((always_inline)) { finite[o].see(v); });
      for (const auto& f : finite) all.see(f.sum);
      if (!all.all()) return false;
    }
    for_sums([](V v, int, A* place) __attribute__((always_inline)) { v.store(place); });
    return true;
  }

  void add_group(const ConvBlock& block, const A* x, const A* dy, int64_t width, A* to) const {
    for_shares(width, kTileChannels, [&](int64_t o, int64_t o_end) {
      with_count<kTileChannels>(o_end - o, [&](auto channels) {
        constexpr int kMost = tile_terms(channels);
        for_shares(depth, kMost, [&](int64_t k, int64_t k_end) {
          with_count<kMost>(k_end - k, [&](auto terms) {
            this->template add_tile<channels, terms>(block, x, dy + o * dy_plane, offset + k,
                                                     to + (o * depth + k) * kLane);
          });
        });
      });
    });
  }

  void run_item(int64_t item, const Own& own) const {
    const int64_t slice = item % split.slices, part = item / split.slices / bundles;
    const int64_t first = item / split.slices % bundles * bundle, last = std::min(first + bundle, s.groups);
    const int64_t begin = split.slice(slice), width = split.slice(slice + 1) - begin;
    auto channel = [&](int64_t group) { return part * channels() + group * s.co + begin; };
    for (int64_t group = first; group < last; group++) {
      std::fill_n(sums + channel(group) * depth * kLane, width * depth * kLane, A(0));
      std::fill_n(bias_sums + channel(group) * kLane, width * kLane, A(0));
    }
    for (int64_t b = blocks.count * part / split.parts; b < blocks.count * (part + 1) / split.parts; b++) {
      const ConvBlock block = blocks(b, s.n, s.y.out);
      const int64_t rows = block.row_end - block.row;
      for (int64_t n = block.sample; n < block.sample_end; n++) {
        const int64_t i = n - block.sample;
        planes.read(this->x_of(n), x_layout, first * s.ci, (last - first) * s.ci, block.row, block.row_end,
                    own.x + i * plane, x_plane);
        const T* const dy = this->dy_of(n);
        A* const to = own.dy + i * rows * line;
        if (split.slices == 1) {
          read_dy(dy, first * s.co, (last - first) * s.co, block.row, block.row_end, to);
        } else {
          for (int64_t group = first; group < last; group++)
            read_dy(dy, group * s.co + begin, width, block.row, block.row_end, to + (group - first) * width * dy_plane);
        }
      }
      for (int64_t group = first; group < last; group++) {
        const A* const dy = own.dy + (group - first) * width * dy_plane;
        add_group(block, own.x + (group - first) * s.ci * x_plane, dy, width, sums + channel(group) * depth * kLane);
        if (p.dbias) add_bias(block, dy, width, bias_sums + channel(group) * kLane);
      }
    }
  }

  void add_bias(const ConvBlock& block, const A* dy, int64_t width, A* to) const {
    const int64_t count = (block.sample_end - block.sample) * (block.row_end - block.row) * line;
    for (int64_t o = 0; o < width; o++) {
      V sum(A(0));
      for (int64_t i = 0; i < count; i += kLane) sum = sum + V::loadu(dy + o * dy_plane + i);
      (V::loadu(to + o * kLane) + sum).store(to + o * kLane);
    }
  }

  // Of a weight or bias: the sum of all parts and lanes.
  A total(const A* first, int64_t part_size) const {
    V sum = V::loadu(first);
    for (int64_t part = 1; part < split.parts; part++) sum = sum + V::loadu(first + part * part_size);
    return at::vec::vec_reduce_all<A>([](V a, V b) { return a + b; }, sum);
  }
  void finish(int64_t channel) const {
    T* const to = static_cast<T*>(p.dweight) + channel * depth;
    for (int64_t k = 0; k < depth; k++)
      to[k / s.taps() * s.weight_input() + k % s.taps() * s.weight_tap()] =
          T(total(sums + (channel * depth + k) * kLane, sums_of_part()));
    if (p.dbias) static_cast<T*>(p.dbias)[channel] = T(total(bias_sums + channel * kLane, channels() * kLane));
  }

  void run() {
    Arena shared = memory.shared_at(p.workspace);
    layout_shared(shared);
    for (int64_t k = 0; k < depth; k++) {
      const int64_t tap = k % s.taps();
      offset[k] = k / s.taps() * x_plane + planes.offset(tap / s.x.kernel, tap % s.x.kernel);
    }
    parallel(p.threads, [&](Team team) {
      Arena scratch = memory.own_at(p.workspace, team.rank);
      const Own own(*this, scratch);
      std::fill_n(own.x, bundle * s.ci * x_plane, A(0));
      std::fill_n(own.dy, bundle * split.widest() * dy_plane, A(0));
      team.for_each(split.parts * bundles * split.slices, [&](int64_t item) { run_item(item, own); });
      team.for_each(channels(), [&](int64_t channel) { finish(channel); });
    });
  }
};

}  // namespace

size_t conv2d_direct_backward_weight_workspace(const Conv2dBackwardWeight& a) {
  return conv_workspace<DirectWeight>(a);
}
void conv2d_direct_backward_weight(const Conv2dBackwardWeight& a) { conv_run<DirectWeight>(a); }

}  // namespace fastnorm::cpu::CPU_CAPABILITY
