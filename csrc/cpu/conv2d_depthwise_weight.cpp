// The gradient of a convolution of every channel for itself to its weights and bias; ../conv2d.h has the formulas.
//
// Planes, and short rows in [pixels][channels], are worked on a block of channels at a time (conv2d_depthwise_blocks.h;
// planes that do not suit it by conv2d_direct_weight.cpp); here are the others in [pixels][channels].  Vectors are of
// neighbouring channels.  The sums of some taps stay in registers for a row of dy, which stays in the caches for all
// taps.  The rows go to a fixed number of parts, whose sums are added in order.
//
// Floor: x and dy read once.
#include "conv2d_depthwise_blocks.h"
#include "conv2d_planes.h"
#include "conv2d_problem.h"

namespace fastnorm::cpu::CPU_CAPABILITY {
namespace {

#ifdef CPU_CAPABILITY_AVX512
constexpr int kTileTaps = 12;
#else
constexpr int kTileTaps = 6;
#endif

template <class T>
struct DepthwiseWeight : ConvWeightWork<T> {
  using Work = ConvWeightWork<T>;
  using typename Work::A;
  using Work::p, Work::s, Work::y, Work::x;

  const int64_t channels, taps, rows;
  const ConvParts split;
  A *sums, *bias_sums;  // [part][tap][channel], [part][channel]
  const ConvMemory memory;

  explicit DepthwiseWeight(const Conv2dBackwardWeight& a)
      : Work(a),
        channels(s.groups),
        taps(s.taps()),
        rows(s.n * s.y.out),
        split(taps * channels * int64_t(sizeof(A)), rows, 1, channels, p.threads),
        memory(*this) {}

  void layout_shared(Arena& scratch) {
    sums = scratch.take<A>(split.parts * taps * channels);
    bias_sums = scratch.take<A>(split.parts * channels);
  }
  // A tap that sees something of a row: dy's pixels [begin, end), of which the first one's is at x.
  struct Seen {
    int64_t tap, begin, end;
    const T* x;
  };
  struct Own {
    Seen* seen;

    Own(const DepthwiseWeight& q, Arena& scratch) { seen = scratch.take<Seen>(q.taps); }
  };
  size_t bytes() const { return memory.bytes(p.threads); }

  int64_t see(int64_t row, Seen* seen) const {
    const int64_t n = row / s.y.out;
    int64_t count = 0;
    for (int ky = 0; ky < s.y.kernel; ky++) {
      const int64_t at_y = s.y.position(row % s.y.out, ky);
      if (at_y < 0 || at_y >= s.y.in) continue;
      for (int kx = 0; kx < s.x.kernel; kx++) {
        const int64_t first = s.x.position(0, kx), stride = s.x.stride;
        const int64_t begin = first < 0 ? (-first + stride - 1) / stride : 0;
        const int64_t end = first < s.x.in ? std::min<int64_t>(s.x.out, (s.x.in - 1 - first) / stride + 1) : 0;
        if (begin >= end) continue;
        const int64_t pixel = (n * s.y.in + at_y) * s.x.in + first + begin * stride;
        seen[count++] = {int64_t(ky) * s.x.kernel + kx, begin, end, static_cast<const T*>(p.x) + pixel * channels};
      }
    }
    return count;
  }

  // K taps' sums over a row, of a pack of channels that begins `c` after those of dy, x and to; `lanes` of them are
  // new.
  template <int K, class Count, class Again>
  void add_tile(const Seen* seen, const T* dy, int64_t c, A* to, Count count, Again again, Pack<A> lanes) const {
    const int64_t step = s.x.stride * channels;
    Pack<A> sum[K], before[K];
    int64_t begin = 0, end = s.x.out;  // what all of them see
    const T* x[K];
    for (int k = 0; k < K; k++) {
      sum[k] = before[k] = load<A>(to + seen[k].tap * channels, count);
      begin = std::max(begin, seen[k].begin), end = std::min(end, seen[k].end);
    }
    begin = std::min(begin, end);
    for (int k = 0; k < K; k++) x[k] = seen[k].x + (begin - seen[k].begin) * step + c;
    const T* d = dy + begin * channels;
    for (int64_t i = begin; i < end; i++, d += channels) {
      const Pack<A> v = load(d, count);
#pragma GCC unroll 12
      for (int k = 0; k < K; k++) sum[k] = fmadd(v, load(x[k], count), sum[k]), x[k] += step;
    }
    for (int k = 0; k < K; k++) {
      auto one = [&](int64_t from, int64_t to) {
        for (int64_t i = from; i < to; i++)
          sum[k] =
              fmadd(load(dy + i * channels, count), load(seen[k].x + (i - seen[k].begin) * step + c, count), sum[k]);
      };
      one(seen[k].begin, std::min(begin, seen[k].end)), one(std::max(end, seen[k].begin), seen[k].end);
      if constexpr (std::is_same_v<Again, int64_t>) sum[k] = select(lanes, sum[k], before[k]);
      store<A>(to + seen[k].tap * channels, sum[k], count);
    }
  }

  // What the next row is the first to need, a share of it for each pack.
  void prefetch_next(int64_t row, const T* dy, int64_t c, int64_t width) const {
    auto share = [&](const T* first, int64_t pixels) {
      const int64_t count = pixels * channels, from = count * c / width / 64 * 64;
      prefetch_run(first + from, std::min(count - from, count * kLanes<T> / width + 64));
    };
    share(dy + s.x.out * channels, s.x.out);
    const int64_t n = row / s.y.out, at = row % s.y.out, end = std::min<int64_t>(y.end(at + 2), s.y.in);
    for (int64_t i = std::max<int64_t>(0, y.end(at + 1)); i < end; i++)
      share(static_cast<const T*>(p.x) + (n * s.y.in + i) * s.x.in * channels, s.x.in);
  }

  void add_row(int64_t row, int64_t begin, int64_t width, Seen* seen, A* to, A* bias_to) const {
    const int64_t count_seen = see(row, seen);
    const T* const dy = static_cast<const T*>(p.dy) + row * s.x.out * channels + begin;
    const Pack<A> lanes = new_lanes<T>(width);
    for_packs<T>(width, [&](int64_t c, auto count, auto again) {
      prefetch_next(row, dy, c, width);
      for (int64_t i = 0; i < count_seen; i += kTileTaps)
        with_count<kTileTaps>(std::min<int64_t>(kTileTaps, count_seen - i), [&](auto k) {
          this->template add_tile<k>(seen + i, dy + c, begin + c, to + begin + c, count, again, lanes);
        });
      if (!p.dbias) return;
      const Pack<A> before = load<A>(bias_to + begin + c, count);
      Pack<A> sum = before;
      for (int64_t i = 0; i < s.x.out; i++) sum = sum + load(dy + c + i * channels, count);
      if constexpr (std::is_same_v<decltype(again), int64_t>) sum = select(lanes, sum, before);
      store<A>(bias_to + begin + c, sum, count);
    });
  }

  void run_item(int64_t item, const Own& own) const {
    const int64_t slice = item % split.slices, part = item / split.slices, begin = split.slice(slice);
    const int64_t width = split.slice(slice + 1) - begin;
    A* const to = sums + part * taps * channels;
    A* const bias_to = bias_sums + part * channels;
    for (int64_t t = 0; t < taps; t++) std::fill_n(to + t * channels + begin, width, A(0));
    std::fill_n(bias_to + begin, width, A(0));
    for (int64_t row = rows * part / split.parts; row < rows * (part + 1) / split.parts; row++)
      add_row(row, begin, width, own.seen, to, bias_to);
  }

  void finish() const {
    for (int64_t c = 0; c < channels; c++) {
      auto total = [&](const A* first, int64_t part_size) {
        A sum = first[c];
        for (int64_t part = 1; part < split.parts; part++) sum += first[part * part_size + c];
        return T(sum);
      };
      for (int64_t t = 0; t < taps; t++)
        static_cast<T*>(p.dweight)[c * taps + t] = total(sums + t * channels, taps * channels);
      if (p.dbias) static_cast<T*>(p.dbias)[c] = total(bias_sums, channels);
    }
  }

  void run() {
    Arena shared = memory.shared_at(p.workspace);
    layout_shared(shared);
    parallel(p.threads, [&](Team team) {
      Arena scratch = memory.own_at(p.workspace, team.rank);
      const Own own(*this, scratch);
      team.for_each(split.parts * split.slices, [&](int64_t item) { run_item(item, own); });
    });
    finish();
  }
};

// For planes there is no other kernel here.
bool takes_blocks(const ConvShape& s) { return !s.channels_last || in_blocks(s); }

}  // namespace

size_t conv2d_depthwise_backward_weight_workspace(const Conv2dBackwardWeight& a) {
  return takes_blocks(a.shape) ? conv_workspace<DepthwiseWeightBlocks>(a) : conv_workspace<DepthwiseWeight>(a);
}
void conv2d_depthwise_backward_weight(const Conv2dBackwardWeight& a) {
  takes_blocks(a.shape) ? conv_run<DepthwiseWeightBlocks>(a) : conv_run<DepthwiseWeight>(a);
}

}  // namespace fastnorm::cpu::CPU_CAPABILITY
