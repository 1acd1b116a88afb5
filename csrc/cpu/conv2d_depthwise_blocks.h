// Convolution of every channel for itself, one sample's block of channels at a time: vectors are of neighbouring
// channels, in planes too.
//
// A block's channels are copied next to each other, which turns planes round, and so are its results.  A row of results
// is worked on in pieces of up to 8, which stay in registers; a row of taps shares what it loads.  What a piece would
// see beyond the image's edges, half of all that windows of 7 see in rows of 7, and the gaps that strides leave in a
// gradient are left out when the code is made.
#pragma once
#include "conv2d_gemm.h"
#include "conv2d_problem.h"

namespace fastnorm::cpu::CPU_CAPABILITY {

// N neighbouring results of windows of K taps, as many on either side of their result's place, S pixels apart; all but
// every kGap-th pixel are gaps.  kFirst, kLast: of a row, whose last result sees the pixels before S * N - kCut.
template <int K, int S, int kGap, int N, bool kFirst, bool kLast, int kCut>
struct WindowPiece {
  static constexpr int kCount = N;
  // Of pixels, counted from the first result's place on.
  static constexpr int kBegin = kFirst ? 0 : -(K / 2), kEnd = kLast ? S * N - kCut : S * (N - 1) + K / 2 + 1;

  // f(i, j, pixel, load(pixel)) for the results i and taps j that see a pixel.
  template <class Load, class F>
  [[gnu::always_inline]] static void for_seen(Load load, F f) {
#pragma GCC unroll 24
    for (int pixel = kBegin; pixel < kEnd; pixel++) {
      if (pixel % kGap != 0) continue;
      const auto v = load(pixel);
#pragma GCC unroll 7
      for (int j = 0; j < K; j++)
        if (const int from = pixel + K / 2 - j; from >= 0 && from % S == 0 && from / S < N) f(from / S, j, pixel, v);
    }
  }
};

// The rows of a shape that has_centred_rows().
struct WindowRows {
  static constexpr int kPiece = 8;

  const ConvReach y;
  const int kernel, stride, gap;  // in a row; one of stride and gap is 1, the other 1 or 2
  const int64_t width, seen;      // of a row of results, and of what it sees with its gaps
  const int64_t pieces, smaller;  // of a row: so many of the smaller size come first
  const int piece;                // that size; the others' is a pixel and its gap more
  const bool backward;

  WindowRows(const ConvShape& s, bool backward)
      : y(s.y, backward),
        kernel(s.x.kernel),
        stride(backward ? 1 : s.x.stride),
        gap(backward ? s.x.stride : 1),
        width(backward ? s.x.in : s.x.out),
        seen((backward ? s.x.out : s.x.in) * gap),
        pieces((width + kPiece - 1) / kPiece),
        smaller(pieces - steps() % pieces),
        piece(int(steps() / pieces) * gap),
        backward(backward) {}
  int64_t steps() const { return (width + gap - 1) / gap; }

  // f(first, a WindowPiece) for the pieces of a row, each of which begins with a pixel.
  template <int K, int S, int kGap, class F>
  [[gnu::always_inline]] void for_pieces(F f) const {
    int64_t first = 0, next;
    for (int64_t i = 0; i < pieces; i++, first = next) {
      next = std::min(width, first + (i < smaller ? piece : piece + gap));
      with_count<kPiece>(next - first, [&](auto count) __attribute__((always_inline)) {
        auto last = [&](auto is_first) __attribute__((always_inline)) {
          if (S > 1 && seen < S * width)
            f(first, WindowPiece<K, S, kGap, count, is_first, true, S - 1>());
          else
            f(first, WindowPiece<K, S, kGap, count, is_first, true, 0>());
        };
        if (pieces == 1) return last(std::true_type());
        if constexpr (count > K / 2) {  // or the piece before would see beyond this one
          if (i == 0) return f(first, WindowPiece<K, S, kGap, count, true, false, 0>());
          if (i < pieces - 1) return f(first, WindowPiece<K, S, kGap, count, false, false, 0>());
          last(std::false_type());
        }
      });
    }
  }

  // f(kernel, stride, gap) as constants.
  template <class F>
  void with_sizes(F f) const {
    auto with_steps = [&](auto k) {
      constexpr std::integral_constant<int, 1> one;
      constexpr std::integral_constant<int, 2> two;
      stride == 2 ? f(k, two, one) : gap == 2 ? f(k, one, two) : f(k, one, one);
    };
    with_one_of<3, 5, 7>(kernel, with_steps);
  }
};

// Whether a block at a time is the faster way: in [pixels][channels] nothing has to be turned round, which the copies
// have to make up for by what they leave out.
inline bool in_blocks(const ConvShape& s) {
  return s.has_centred_rows() && (!s.channels_last || (s.x.out <= WindowRows::kPiece && s.x.kernel >= 5));
}

// ---- Results --------------------------------------------------------------------------------------------------------

// The rows [row, row_end) of results of a vector of channels, which are `pitch` from pixel to pixel and from tap to
// tap. image: from the row `begin` on.
template <int K, int S, int kGap, class A>
void run_windows(const WindowRows& rows, int64_t row, int64_t row_end, const A* image, int64_t begin, const A* weights,
                 at::vec::Vectorized<A> start, bool relu, A* to, int64_t pitch) {
  using V = at::vec::Vectorized<A>;
  const ConvReach& y = rows.y;
  for (; row < row_end; row++, to += rows.width * pitch) {
    struct {
      const A *image, *weights;
    } seen[ConvShape::kMostCentredTaps];
    int count = 0;
    const int phase = y.phase_of(row);
    for (int tap = 0; tap < y.kernel; tap++)
      if (const int64_t at = y.position(row, tap); y.has_tap(phase, tap) && at >= 0 && at < y.in)
        seen[count++] = {image + (at - begin) * rows.seen * pitch,
                         weights + (rows.backward ? y.kernel - 1 - tap : tap) * K * pitch};
    rows.for_pieces<K, S, kGap>([&](int64_t first, auto piece) __attribute__((always_inline)) {
      constexpr int N = piece.kCount;
      V sum[N];
#pragma GCC unroll 8
      for (auto& v : sum) v = start;
      for (int i = 0; i < count; i++) {
        V scale[K];
#pragma GCC unroll 7
        for (int j = 0; j < K; j++) scale[j] = V::loadu(seen[i].weights + j * pitch);
        const A* const at = seen[i].image + S * first * pitch;
        piece.for_seen([&](int pixel) __attribute__((always_inline)) { return V::loadu(at + pixel * pitch); },
                       [&](int r, int j, int, V v)
                           __attribute__((always_inline)) { sum[r] = at::vec::fmadd(scale[j], v, sum[r]); });
      }
#pragma GCC unroll 8
      for (int r = 0; r < N; r++) (relu ? Math<V>::relu(sum[r]) : sum[r]).store(to + (first + r) * pitch);
    });
  }
}

// Floor: x read and y written once; the multiply-adds of what is inside of the image.
template <class T>
struct DepthwiseBlocks : ConvWork<T> {
  using Work = ConvWork<T>;
  using typename Work::A, typename Work::V;
  using Work::p, Work::x, Work::y, Work::n, Work::groups, Work::in_layout, Work::out_layout;
  static constexpr int64_t kLane = V::size();
  static constexpr int64_t kPixels = 4096;  // of a block, which with what they see stay in the L2 cache

  const WindowRows rows;
  const ConvBlocks parts;  // of a sample
  const int64_t taps;
  const int64_t width, blocks;  // of a block's channels; how many there are
  A *weights, *bias;            // [block][tap][channel], [block][channel]
  const ConvMemory memory;

  explicit DepthwiseBlocks(const ConvProblem& problem)
      : Work(problem),
        rows(p.shape, p.backward),
        parts(n, y.out, x.out, std::min(kPixels, out_layout.pixels)),
        taps(p.shape.taps()),
        width(p.shape.channels_last ? 2 * kLane : kLane),  // there neighbours come together
        blocks((groups + width - 1) / width),
        memory(*this) {}

  void layout_shared(Arena& s) { weights = s.take<A>(blocks * taps * width), bias = s.take<A>(blocks * width); }
  struct Own {
    A *image, *results;  // [pixel][channel]; the image with its gaps

    Own(const DepthwiseBlocks& q, Arena& s) {
      image = s.take<A>(q.image_size()), results = s.take<A>(q.parts.rows * q.x.out * q.width);
    }
  };
  int64_t image_size() const { return std::min<int64_t>(y.span(parts.rows), y.in) * rows.seen * width; }
  size_t bytes() const { return memory.bytes(p.threads); }

  void run_item(int64_t item, const Own& own) const {
    const int64_t c0 = item % blocks * width, count = std::min(width, groups - c0);
    const ConvBlock part = parts(item / blocks, n, y.out);
    const int64_t begin = std::clamp<int64_t>(y.begin(part.row), 0, y.in);
    const int64_t end = std::clamp<int64_t>(y.end(part.row_end), begin, y.in);
    auto sample = [&](auto* tensor, const ImageLayout& layout) {
      return tensor + part.sample * layout.channels * layout.pixels;
    };
    read_pixels(sample(static_cast<const T*>(p.in), in_layout), in_layout, c0, count, begin * x.in,
                (end - begin) * x.in, own.image, rows.gap * width);
    rows.with_sizes([&](auto k, auto stride, auto gap) {
      for (int64_t c = 0; c < count; c += kLane)
        run_windows<k, stride, gap>(rows, part.row, part.row_end, own.image + c, begin, weights + c0 * taps + c,
                                    V::loadu(bias + c0 + c), p.activation == Activation::kRelu, own.results + c, width);
    });
    const int64_t pixels = (part.row_end - part.row) * x.out;
    if (!this->simple_activation()) this->activate_all(own.results, pixels * width);
    write_pixels(own.results, width, sample(static_cast<T*>(p.out), out_layout), out_layout, c0, count,
                 part.row * x.out, pixels);
  }

  void run() {
    Arena shared = memory.shared_at(p.workspace);
    layout_shared(shared);
    for (int64_t c = 0; c < blocks * width; c++) bias[c] = c < groups ? this->bias_of(c, 0) : A(0);
    if (groups % width) std::fill_n(weights + (blocks - 1) * taps * width, taps * width, A(0));
    for (int64_t c = 0; c < groups; c += width) {
      A* const to = weights + c * taps;  // a gradient's taps see in the other order
      image::transpose(static_cast<const T*>(p.weight) + c * taps, taps, p.backward ? to + (taps - 1) * width : to,
                       p.backward ? -width : width, std::min(width, groups - c), taps);
    }
    prefer_huge_pages(p.out, this->out_bytes());
    parallel(p.threads, [&](Team team) {
      Arena scratch = memory.own_at(p.workspace, team.rank);
      const Own own(*this, scratch);
      if (groups % width) std::fill_n(own.image, image_size(), A(0));  // what is no channel is computed with the others
      const int64_t items = parts.count * blocks;
      // Neighbours go to the same thread, or what it read and wrote in the last call is in another's cache now.
      const int64_t some = std::clamp<int64_t>(items / (8 * p.threads), 1, 16);
      team.for_each((items + some - 1) / some, [&](int64_t i) {
        for (int64_t item = i * some; item < std::min(items, (i + 1) * some); item++) run_item(item, own);
      });
    });
  }
};

// ---- Gradient to the weight -----------------------------------------------------------------------------------------

// Adds up a row of taps' gradients over a sample's rows, of a vector of channels; some rows by themselves, as a long
// chain of additions would be less exact.
template <int K, int S, class A>
void add_taps(const WindowRows& rows, int tap, const A* image, const A* dy, A* to, int64_t pitch) {
  using V = at::vec::Vectorized<A>;
#ifdef CPU_CAPABILITY_AVX512
  constexpr int kSets = 2;
#else
  constexpr int kSets = K == 3 ? 2 : 1;  // that registers have room for
#endif
  constexpr int64_t kSome = 16;
  for (int64_t begin = 0; begin < rows.y.out; begin += kSome) {
    V sum[kSets][K];  // pixels take turns: few sums would wait for themselves
    for (auto& set : sum)
      for (auto& v : set) v = V(A(0));
    for (int64_t row = begin; row < std::min<int64_t>(begin + kSome, rows.y.out); row++) {
      const int64_t at = rows.y.position(row, tap);
      if (at < 0 || at >= rows.y.in) continue;
      rows.for_pieces<K, S, 1>([&](int64_t first, auto piece) __attribute__((always_inline)) {
        constexpr int N = piece.kCount;
        V d[N];
#pragma GCC unroll 8
        for (int i = 0; i < N; i++) d[i] = V::loadu(dy + (row * rows.width + first + i) * pitch);
        const A* const from = image + (at * rows.seen + S * first) * pitch;
        piece.for_seen([&](int pixel) __attribute__((always_inline)) { return V::loadu(from + pixel * pitch); },
                       [&](int i, int j, int pixel, V v) __attribute__((always_inline)) {
                         V& s = sum[(pixel + K) % kSets][j];
                         s = at::vec::fmadd(d[i], v, s);
                       });
      });
    }
    for (int j = 0; j < K; j++) {
      V total = V::loadu(to + j * pitch) + sum[0][j];
      if constexpr (kSets == 2) total = total + sum[1][j];
      total.store(to + j * pitch);
    }
  }
}

// Samples go to a fixed number of parts, whose sums are added in order; those of a sample are added up by themselves.
//
// Floor: x and dy read once; the multiply-adds of what is inside of the image.
template <class T>
struct DepthwiseWeightBlocks : ConvWeightWork<T> {
  using Work = ConvWeightWork<T>;
  using typename Work::A, typename Work::V;
  using Work::p, Work::s, Work::y, Work::x, Work::x_layout, Work::dy_layout;
  static constexpr int64_t kLane = V::size();

  const WindowRows rows;
  const int64_t channels, taps;
  const int64_t width, blocks;  // of a block's channels; how many there are
  const ConvParts split;
  A *sums, *bias_sums;  // [part][block][tap][channel], [part][block][channel]
  const ConvMemory memory;

  explicit DepthwiseWeightBlocks(const Conv2dBackwardWeight& a)
      : Work(a),
        rows(s, false),
        channels(s.groups),
        taps(s.taps()),
        width(s.channels_last ? 2 * kLane : kLane),
        blocks((channels + width - 1) / width),
        split(blocks * width * taps * int64_t(sizeof(A)), s.n, blocks, 1, 1),
        memory(*this) {}

  void layout_shared(Arena& scratch) {
    sums = scratch.take<A>(split.parts * blocks * taps * width);
    bias_sums = scratch.take<A>(split.parts * blocks * width);
  }
  struct Own {
    A *x, *dy;  // [pixel][channel]

    Own(const DepthwiseWeightBlocks& q, Arena& scratch) {
      x = scratch.take<A>(q.x_layout.pixels * q.width), dy = scratch.take<A>(q.dy_layout.pixels * q.width);
    }
  };
  size_t bytes() const { return memory.bytes(p.threads); }

  void run_item(int64_t item, const Own& own) const {
    const int64_t block = item % blocks, part = item / blocks;
    const int64_t c0 = block * width, count = std::min(width, channels - c0);
    A* const to = sums + item_place(part, block) * taps;
    A* const bias_to = bias_sums + item_place(part, block);
    std::fill_n(to, taps * width, A(0)), std::fill_n(bias_to, width, A(0));
    for (int64_t n = s.n * part / split.parts; n < s.n * (part + 1) / split.parts; n++) {
      read_pixels(this->x_of(n), x_layout, c0, count, 0, x_layout.pixels, own.x, width);
      read_pixels(this->dy_of(n), dy_layout, c0, count, 0, dy_layout.pixels, own.dy, width);
      for (int64_t c = 0; c < count; c += kLane) {
        rows.with_sizes([&](auto k, auto stride, auto) {
          for (int tap = 0; tap < y.kernel; tap++)
            add_taps<k, stride>(rows, tap, own.x + c, own.dy + c, to + tap * k * width + c, width);
        });
        if (!p.dbias) continue;
        V sum = V::loadu(bias_to + c);
        for (int64_t row = 0; row < y.out; row++) {  // by rows: a long chain of additions would be less exact
          V of_row(A(0));
          for (int64_t i = 0; i < x.out; i++) of_row = of_row + V::loadu(own.dy + (row * x.out + i) * width + c);
          sum = sum + of_row;
        }
        sum.store(bias_to + c);
      }
    }
  }
  int64_t item_place(int64_t part, int64_t block) const { return (part * blocks + block) * width; }

  void finish(int64_t block) const {
    const int64_t c0 = block * width, count = std::min(width, channels - c0);
    auto total = [&](A* all, int64_t size) {
      A* const to = all + block * size;
      for (int64_t part = 1; part < split.parts; part++)
        for (int64_t i = 0; i < size; i += kLane)
          (V::loadu(to + i) + V::loadu(to + part * blocks * size + i)).store(to + i);
      return to;
    };
    image::transpose(total(sums, taps * width), width, static_cast<T*>(p.dweight) + c0 * taps, taps, taps, count);
    if (p.dbias) image::transpose(total(bias_sums, width), width, static_cast<T*>(p.dbias) + c0, 1, 1, count);
  }

  void run() {
    Arena shared = memory.shared_at(p.workspace);
    layout_shared(shared);
    parallel(p.threads, [&](Team team) {
      Arena scratch = memory.own_at(p.workspace, team.rank);
      const Own own(*this, scratch);
      if (channels % width)  // what is no channel is computed with the others
        std::fill_n(own.x, x_layout.pixels * width, A(0)), std::fill_n(own.dy, dy_layout.pixels * width, A(0));
      team.for_each(split.parts * blocks, [&](int64_t item) { run_item(item, own); });
      team.for_each(blocks, [&](int64_t block) { finish(block); });
    });
  }
};

}  // namespace fastnorm::cpu::CPU_CAPABILITY
