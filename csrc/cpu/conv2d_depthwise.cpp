// Convolution of every channel for itself, and its gradient to the input; ../conv2d.h has the formulas.
//
// Floor: x read and y written once.  Most windows are worked on a block of channels at a time
// (conv2d_depthwise_blocks.h); here are the others.  In planes, vectors are of neighbouring pixels of a row: a
// channel's rows are copied with zeros around them (conv2d_planes.h), a tile of results stays in registers for all
// taps, and a block of results goes to memory in one piece.  In [pixels][channels], where nothing has to be copied,
// vectors are of neighbouring channels, a few pixels of which share a tap's weights in registers.  Windows of 5 or 7
// without strides load what they see once for several neighbouring pixels: loads are what they would wait for, as
// windows of 3 do for memory.
#include "conv2d_depthwise_blocks.h"
#include "conv2d_planes.h"
#include "conv2d_problem.h"

namespace fastnorm::cpu::CPU_CAPABILITY {
namespace {

// ---- Planes ---------------------------------------------------------------------------------------------------------

constexpr int64_t kPixels = 4096;  // of a block: with what they see, they stay in the caches nearby
constexpr int kTileVectors = 8;    // enough independent sums for both FMA units

template <class T>
struct DepthwisePlanes : ConvWork<T> {
  using Work = ConvWork<T>;
  using typename Work::A, typename Work::V;
  using Work::p, Work::x, Work::y, Work::n, Work::groups, Work::out_layout;
  static constexpr int64_t kLane = V::size();

  const int64_t taps;
  const int64_t vectors;  // of a row of results, the last one perhaps beyond its end
  const ConvPlanes planes;
  const ConvBlocks blocks;  // of one sample
  const bool streaming;
  A *weights, *bias;  // [channel][tap], [channel]
  int64_t* offset;    // of each tap in a plane; taps are in the order of what they see
  const ConvMemory memory;

  explicit DepthwisePlanes(const ConvProblem& problem)
      : Work(problem),
        taps(p.shape.taps()),
        vectors((x.out + kLane - 1) / kLane),
        planes(p.shape, p.backward, vectors * kLane - x.out),
        blocks(n, y.out, x.out, std::min(kPixels, out_layout.pixels)),
        streaming(this->streams_runs(blocks.rows * x.out) && out_layout.pixels * sizeof(T) % 64 == 0),
        memory(*this) {}

  void layout_shared(Arena& s) {
    weights = s.take<A>(groups * taps), bias = s.take<A>(groups), offset = s.take<int64_t>(taps);
  }
  struct Own {
    A *image, *results;

    Own(const DepthwisePlanes& q, Arena& s) {
      image = s.take<A>(q.planes.plane(q.blocks.rows));
      results = s.take<A>(q.blocks.rows * q.x.out + kTileVectors * kLane);
    }
  };
  size_t bytes() const { return memory.bytes(p.threads); }

  // R rows of N vectors of results, of which what is beyond a row's end is overwritten by the next row's.
  template <int R, int N>
  void run_tile(const A* at, int64_t channel, A* to) const {
    V sum[R][N];
    const V start(bias[channel]);
    for (auto& row : sum)
      for (auto& v : row) v = start;
    const A* const w = weights + channel * taps;
    for (int64_t k = 0; k < taps; k++) {
      const V scale(w[k]);
      const A* const from = at + offset[k];
#pragma GCC unroll 8
      for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int i = 0; i < N; i++)
          sum[r][i] = at::vec::fmadd(scale, V::loadu(from + r * planes.row_step() + i * kLane), sum[r][i]);
    }
    for (int r = 0; r < R; r++)
      for (int i = 0; i < N; i++) this->activate_simple(sum[r][i]).store(to + r * x.out + i * kLane);
  }

  void run_tiles(int64_t rows, int64_t channel, const Own& own) const {
    // Rows from left to right: a tile's last vector may reach into the next row, which is written later.
    const int64_t pieces = (vectors + kTileVectors - 1) / kTileVectors, piece = (vectors + pieces - 1) / pieces;
    auto run_rows = [&](auto row_count, int64_t row) {
      constexpr int R = row_count;
      for (int64_t first = 0; first < vectors; first += piece)
        with_count<kTileVectors / R>(std::min(piece, vectors - first), [&](auto count) {
          const A* const at = own.image + row * planes.row_step() + first * kLane;
          this->template run_tile<R, count>(at, channel, own.results + row * x.out + first * kLane);
        });
    };
    int64_t row = 0;
    auto run_all = [&](auto row_count) {
      for (; row + row_count <= rows; row += row_count) run_rows(row_count, row);
    };
    if (piece == 1) run_all(std::integral_constant<int, 8>());
    if (piece <= 2) run_all(std::integral_constant<int, 4>());
    if (piece <= 4) run_all(std::integral_constant<int, 2>());
    run_all(std::integral_constant<int, 1>());
  }

  void run_item(int64_t item, const Own& own) const {
    const int64_t channel = item % groups;
    const ConvBlock block = blocks(item / groups, n, y.out);
    const int64_t rows = block.row_end - block.row;
    planes.read(static_cast<const T*>(p.in) + block.sample * this->in_layout.channels * this->in_layout.pixels,
                this->in_layout, channel, 1, block.row, block.row_end, own.image, 0);
    run_tiles(rows, channel, own);
    if (!this->simple_activation()) this->activate_all(own.results, rows * x.out);
    T* const to = static_cast<T*>(p.out) + (block.sample * groups + channel) * out_layout.pixels + block.row * x.out;
    for_packs<T>(rows * x.out, [&](int64_t i, auto count, auto again) {
      store_output<T>(to + i, load<A>(own.results + i, count), count, again, streaming);
    });
  }

  void run() {
    Arena shared = memory.shared_at(p.workspace);
    layout_shared(shared);
    for (int64_t c = 0; c < groups; c++) bias[c] = this->bias_of(c, 0);
    for (int64_t k = 0; k < taps; k++) {
      const int64_t tap = p.backward ? taps - 1 - k : k;
      offset[k] = planes.offset(tap / x.kernel, tap % x.kernel);
      for (int64_t c = 0; c < groups; c++) weights[c * taps + k] = A(static_cast<const T*>(p.weight)[c * taps + tap]);
    }
    prefer_huge_pages(p.out, this->out_bytes());
    parallel(p.threads, [&](Team team) {
      Arena scratch = memory.own_at(p.workspace, team.rank);
      const Own own(*this, scratch);
      std::fill_n(own.image, planes.plane(blocks.rows), A(0));
      team.for_each(blocks.count * groups, [&](int64_t item) { run_item(item, own); });
    });
  }
};

// ---- Pixels of channels ---------------------------------------------------------------------------------------------

constexpr int64_t kTogether = 4;  // pixels
constexpr int64_t kRows = 4;      // of a work item
#ifdef CPU_CAPABILITY_AVX512
constexpr int kWindowPixels = 8;
#else
constexpr int kWindowPixels = 6;
#endif

template <class T>
struct DepthwisePixels : ConvWork<T> {
  using Work = ConvWork<T>;
  using typename Work::A, typename Work::V;
  using Work::p, Work::y, Work::x, Work::n;

  const int64_t channels, taps;
  const bool streaming;
  A *weights, *bias;  // [tap][channel], [channel]
  T* zeros;           // a pixel
  const ConvMemory memory;

  explicit DepthwisePixels(const ConvProblem& problem)
      : Work(problem),
        channels(Work::groups),
        taps(p.shape.taps()),
        streaming(this->simple_activation() && this->streams_runs(channels)),
        memory(*this) {}

  void layout_shared(Arena& s) {
    weights = s.take<A>(taps * channels), bias = s.take<A>(channels), zeros = s.take<T>(channels);
  }
  // What the taps of some pixels see: either of all of them in even steps, or of each by itself.
  struct Seen {
    const T** at;  // [tap] or [tap][kTogether]
    int64_t* tap;  // its number
    int64_t count;
  };
  struct Own {
    Seen even, each;

    Own(const DepthwisePixels& q, Arena& s) {
      even = {s.take<const T*>(q.taps), s.take<int64_t>(q.taps), 0};
      each = {s.take<const T*>(q.taps * kTogether), s.take<int64_t>(q.taps), 0};
    }
  };
  size_t bytes() const { return memory.bytes(p.threads); }

  template <class Count>
  void finish(T* to, Pack<A> v, Count count) const {
    if (this->simple_activation()) {
      v = {this->activate_simple(v.a), this->activate_simple(v.b)};
    } else {
      A values[Pack<A>::kLanes];
      store<A>(values, v, Full<A>());
      this->activate_all(values, Pack<A>::kLanes);
      v = load<A>(values, Full<A>());
    }
    store_output<T>(to, v, count, Zero(), streaming);
  }

  // P pixels, `step` apart in x (if that is even) and to_step in y.
  template <int P, bool kEven>
  void run_pixels(const Seen& seen, int64_t shift, int64_t step, T* to, int64_t to_step) const {
    for_packs<T>(channels, [&](int64_t c, auto count, auto) {
      Pack<A> sum[P];
      const Pack<A> start = load<A>(bias + c, count);
      for (auto& s : sum) s = start;
      for (int64_t k = 0; k < seen.count; k++) {
        const Pack<A> w = load<A>(weights + seen.tap[k] * channels + c, count);
        const T* const first = kEven ? seen.at[k] + shift + c : nullptr;
#pragma GCC unroll 4
        for (int i = 0; i < P; i++) {
          const T* const from = kEven ? first + i * step : seen.at[k * kTogether + i] + c;
          sum[i] = fmadd(w, load(from, count), sum[i]);
        }
      }
      for (int i = 0; i < P; i++) finish(to + i * to_step + c, sum[i], count);
    });
  }

  // The pixels [from, end) of those from `first` on, `apart` of each other, which are worked on one by one.
  void run_edge(const Own& own, int64_t n, int64_t row, int phase_y, int phase_x, int64_t from, int64_t end,
                T* to) const {
    const int64_t first = x.first(phase_x, 0), apart = x.phases();
    for (int64_t i = from; i < end; i += kTogether) {
      const int64_t pixels = std::min(kTogether, end - i);
      Seen seen = own.each;
      for (int ky = 0; ky < y.kernel; ky++) {
        const int64_t at_y = y.position(row, ky);
        if (!y.has_tap(phase_y, ky) || at_y < 0 || at_y >= y.in) continue;
        for (int kx = 0; kx < x.kernel; kx++) {
          if (!x.has_tap(phase_x, kx)) continue;
          bool any = false;
          for (int64_t j = 0; j < pixels; j++) {
            const int64_t at_x = x.position(first + (i + j) * apart, kx);
            const bool inside = at_x >= 0 && at_x < x.in;
            seen.at[seen.count * kTogether + j] = inside ? pixel(n, at_y, at_x) : zeros;
            any |= inside;
          }
          if (any) seen.tap[seen.count++] = int64_t(ky) * x.kernel + kx;
        }
      }
      T* const results = to + (first + i * apart) * channels;
      with_count<kTogether>(
          pixels, [&](auto count) { this->template run_pixels<count, false>(seen, 0, 0, results, apart * channels); });
    }
  }
  const T* pixel(int64_t n, int64_t row, int64_t column) const {
    return static_cast<const T*>(p.in) + ((n * y.in + row) * x.in + column) * channels;
  }

  // The taps in the order of what they see in memory.
  static int in_order(const ConvReach& a, int i) { return a.backward ? a.kernel - 1 - i : i; }

  // Pixels that no row of results has seen before the one after `row`.
  void prefetch_next(int64_t n, int64_t row, int64_t column, int64_t pixels) const {
    const int64_t end = std::min<int64_t>(y.end(row + 2), y.in);
    const int64_t begin = std::clamp<int64_t>(column, 0, x.in), count = std::min(pixels, x.in - begin) * channels;
    for (int64_t at = std::max<int64_t>(0, y.end(row + 1)); at < end; at++) prefetch_run(pixel(n, at, begin), count);
  }

  // kWindowPixels results, for each of which a row's K taps see one pixel on; rows: of the image, as far as they are
  // inside; kEven: its pixels follow `first`, else they are where `pixels` says.
  template <int K, bool kEven>
  void run_window(const Seen& rows, int64_t first, const A* const* pixels, A* to) const {
    constexpr int kSeen = kWindowPixels + K - 1;
    for (int64_t next = 0; next < channels; next += V::size()) {
      const int64_t c = std::min(next, channels - V::size());
      V sum[kWindowPixels];
      for (auto& v : sum) v = V::loadu(bias + c);
      for (int64_t k = 0; k < rows.count; k++) {
        V w[K];
        for (int j = 0; j < K; j++) w[j] = V::loadu(weights + (rows.tap[k] + in_order(x, j)) * channels + c);
        const A* const row = reinterpret_cast<const A*>(rows.at[k]) + first * channels + c;
#pragma GCC unroll 14
        for (int i = 0; i < kSeen; i++) {
          const V v = V::loadu(kEven ? row + i * channels : pixels[k * kSeen + i] + c);
#pragma GCC unroll 7
          for (int j = 0; j < K; j++)
            if (i - j >= 0 && i - j < kWindowPixels) sum[i - j] = at::vec::fmadd(w[j], v, sum[i - j]);
        }
      }
      for (int i = 0; i < kWindowPixels; i++) {
        A* const result = to + i * channels + c;
        store_vector(result, this->activate_simple(sum[i]), streaming);
        if (!this->simple_activation()) this->activate_all(result, V::size());
      }
    }
  }
  template <int K>
  void run_windows(const Own& own, int64_t n, int64_t row, A* to) const {
    constexpr int kSeen = kWindowPixels + K - 1;
    Seen rows = own.even;
    for (int i = 0; i < y.kernel; i++) {
      const int ky = in_order(y, i);
      if (const int64_t at = y.position(row, ky); at >= 0 && at < y.in)
        rows.at[rows.count] = pixel(n, at, 0), rows.tap[rows.count++] = int64_t(ky) * K;
    }
    const A** const pixels = reinterpret_cast<const A**>(own.each.at);
    for (int64_t next = 0; next < x.out; next += kWindowPixels) {
      const int64_t i = std::min<int64_t>(next, x.out - kWindowPixels);  // the last ones with some before them
      const int64_t first = x.position(i, in_order(x, 0));
      prefetch_next(n, row, first, kWindowPixels);
      if (first >= 0 && first + kSeen <= x.in) {
        run_window<K, true>(rows, first, nullptr, to + i * channels);
        continue;
      }
      for (int64_t k = 0; k < rows.count; k++)
        for (int64_t j = 0; j < kSeen; j++) {
          const bool inside = first + j >= 0 && first + j < x.in;
          pixels[k * kSeen + j] = reinterpret_cast<const A*>(inside ? rows.at[k] + (first + j) * channels : zeros);
        }
      run_window<K, false>(rows, 0, pixels, to + i * channels);
    }
  }

  void run_row(const Own& own, int64_t n, int64_t row) const {
    if constexpr (std::is_same_v<T, A>) {
      const bool follow = x.stride == 1 && x.dilation == 1 && (!p.backward || y.stride == 1);
      A* const to = static_cast<A*>(p.out) + (n * y.out + row) * x.out * channels;
      auto in_windows = [&](auto k) { this->template run_windows<k>(own, n, row, to); };
      if (follow && channels >= V::size() && x.out >= kWindowPixels && with_one_of<5, 7>(x.kernel, in_windows)) return;
    }
    T* const to = static_cast<T*>(p.out) + (n * y.out + row) * x.out * channels;
    const int phase_y = y.phase_of(row);
    for (int phase_x = 0; phase_x < x.phases(); phase_x++) {
      // This phase's pixels are first + i * apart; one pixel on in i is `step` pixels on in x.
      const int64_t first = x.first(phase_x, 0), apart = x.phases(), step = p.backward ? 1 : x.stride;
      const int64_t count = first < x.out ? (x.out - first - 1) / apart + 1 : 0;
      // Those in [low, high) see all of the phase's taps inside of the image.
      int64_t low = 0, high = count;
      Seen seen = own.even;
      for (int kx = 0; kx < x.kernel; kx++) {
        if (!x.has_tap(phase_x, kx)) continue;
        const int64_t at = x.position(first, kx);
        if (at < 0) low = std::max(low, (-at + step - 1) / step);
        high = std::min(high, at < x.in ? (x.in - 1 - at) / step + 1 : 0);
      }
      if (high - low < kTogether) low = high = count;
      for (int i = 0; i < y.kernel; i++) {
        const int ky = in_order(y, i);
        const int64_t at_y = y.position(row, ky);
        if (low == count || !y.has_tap(phase_y, ky) || at_y < 0 || at_y >= y.in) continue;
        for (int j = 0; j < x.kernel; j++)
          if (const int kx = in_order(x, j); x.has_tap(phase_x, kx)) {
            seen.at[seen.count] = pixel(n, at_y, x.position(first + low * apart, kx));
            seen.tap[seen.count++] = int64_t(ky) * x.kernel + kx;
          }
      }
      run_edge(own, n, row, phase_y, phase_x, 0, std::min(low, count), to);
      for (int64_t i = low; i < high; i += kTogether) {
        const int64_t from = std::min(i, high - kTogether);  // the last ones together with some before them
        prefetch_next(n, row, x.position(first + from * apart, 0), kTogether * step);
        run_pixels<kTogether, true>(seen, (from - low) * step * channels, step * channels,
                                    to + (first + from * apart) * channels, apart * channels);
      }
      run_edge(own, n, row, phase_y, phase_x, high, count, to);
    }
  }

  void run() {
    Arena shared = memory.shared_at(p.workspace);
    layout_shared(shared);
    std::fill_n(zeros, channels, T(0));
    for (int64_t c = 0; c < channels; c++) {
      for (int64_t t = 0; t < taps; t++) weights[t * channels + c] = A(static_cast<const T*>(p.weight)[c * taps + t]);
      bias[c] = this->bias_of(c, 0);
    }
    prefer_huge_pages(p.out, this->out_bytes());
    const int64_t per_sample = (y.out + kRows - 1) / kRows;
    parallel(p.threads, [&](Team team) {
      Arena scratch = memory.own_at(p.workspace, team.rank);
      const Own own(*this, scratch);
      team.for_each(n * per_sample, [&](int64_t i) {
        const int64_t begin = i % per_sample * kRows;
        for (int64_t row = begin; row < std::min<int64_t>(begin + kRows, y.out); row++)
          run_row(own, i / per_sample, row);
      });
    });
  }
};

template <class Args>
size_t workspace(const Args& a) {
  if (in_blocks(a.shape)) return conv_workspace<DepthwiseBlocks>(a);
  return a.shape.channels_last ? conv_workspace<DepthwisePixels>(a) : conv_workspace<DepthwisePlanes>(a);
}
template <class Args>
void run(const Args& a) {
  if (in_blocks(a.shape)) return conv_run<DepthwiseBlocks>(a);
  a.shape.channels_last ? conv_run<DepthwisePixels>(a) : conv_run<DepthwisePlanes>(a);
}

}  // namespace

size_t conv2d_depthwise_forward_workspace(const Conv2dForward& a) { return workspace(a); }
void conv2d_depthwise_forward(const Conv2dForward& a) { run(a); }
size_t conv2d_depthwise_backward_input_workspace(const Conv2dBackwardInput& a) { return workspace(a); }
void conv2d_depthwise_backward_input(const Conv2dBackwardInput& a) { run(a); }

}  // namespace fastnorm::cpu::CPU_CAPABILITY
