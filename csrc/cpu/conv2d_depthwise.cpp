// Convolution of every channel for itself in [pixels][channels], and its gradient to the input; ../conv2d.h has the
// formulas.  Vectors are of neighbouring channels.
//
// Floor: x read and y written once; a row's taps read what the row before them brought into the cache.  kTogether
// pixels share a tap's weights in registers; where windows reach outside of the image, or strides leave gaps, pixels go
// one by one.
#include "conv2d_problem.h"

namespace fastnorm::cpu::CPU_CAPABILITY {
namespace {

constexpr int kTogether = 4;

template <class T>
struct Depthwise : ConvWork<T> {
  using Work = ConvWork<T>;
  using typename Work::A, typename Work::V;
  using Work::p, Work::y, Work::x, Work::n;

  const int64_t channels, taps;
  A *weights, *bias;  // [tap][channel], [channel]
  const ConvMemory memory;

  explicit Depthwise(const ConvProblem& problem)
      : Work(problem), channels(Work::groups), taps(p.shape.taps()), memory(*this) {}

  void layout_shared(ConvScratch& s) { weights = s.take<A>(taps * channels), bias = s.take<A>(channels); }
  struct Own {
    Own(const Depthwise&, ConvScratch&) {}
  };
  size_t bytes() const { return memory.bytes(p.threads); }

  void pack() const {
    for (int64_t c = 0; c < channels; c++) {
      for (int64_t t = 0; t < taps; t++) weights[t * channels + c] = A(static_cast<const T*>(p.weight)[c * taps + t]);
      bias[c] = this->bias_of(c, 0);
    }
  }

  template <class Count>
  void finish(T* to, Pack<A> v, Count count) const {
    if (this->simple_activation()) return store(to, {this->activate_simple(v.a), this->activate_simple(v.b)}, count);
    A values[Pack<A>::kLanes];
    store<A>(values, v, Full<A>());
    this->activate_all(values, Pack<A>::kLanes);
    store(to, load<A>(values, Full<A>()), count);
  }

  // P pixels from `column` on, all of whose taps within [first, end) rows of taps are inside.
  template <int P, class Count>
  void run_pixels(const T* sample, T* to, int64_t row, int64_t column, int first, int end, int64_t c,
                  Count count) const {
    Pack<A> sum[P];
    const Pack<A> start = load<A>(bias + c, count);
    for (auto& s : sum) s = start;
    for (int ky = first; ky < end; ky++)
      for (int kx = 0; kx < x.kernel; kx++) {
        const Pack<A> w = load<A>(weights + (int64_t(ky) * x.kernel + kx) * channels + c, count);
        const T* const at = sample + (y.position(row, ky) * x.in + x.position(column, kx)) * channels + c;
        const int64_t step = (p.backward ? 1 : x.stride) * channels;
#pragma GCC unroll 4
        for (int i = 0; i < P; i++) sum[i] = fmadd(w, load(at + i * step, count), sum[i]);
      }
    for (int i = 0; i < P; i++) finish(to + (column + i) * channels + c, sum[i], count);
  }

  // One pixel, any taps.
  template <class Count>
  void run_pixel(const T* sample, T* to, int64_t row, int64_t column, int64_t c, Count count) const {
    Pack<A> sum = load<A>(bias + c, count);
    for (int ky = 0; ky < y.kernel; ky++)
      for (int kx = 0; kx < x.kernel; kx++) {
        if (!sees(y, row, ky) || !sees(x, column, kx)) continue;
        const T* const at = sample + (y.position(row, ky) * x.in + x.position(column, kx)) * channels + c;
        sum = fmadd(load<A>(weights + (int64_t(ky) * x.kernel + kx) * channels + c, count), load(at, count), sum);
      }
    finish(to + column * channels + c, sum, count);
  }
  static bool sees(const ConvReach& a, int64_t result, int tap) {
    if (a.backward && (result + a.pad - int64_t(tap) * a.dilation) % a.stride != 0) return false;
    const int64_t at = a.position(result, tap);
    return at >= 0 && at < a.in;
  }

  void run_row(int64_t n, int64_t row) const {
    const T* const sample = static_cast<const T*>(p.in) + n * y.in * x.in * channels;
    T* const to = static_cast<T*>(p.out) + (n * y.out + row) * x.out * channels;
    const bool gaps = p.backward && (x.stride > 1 || y.stride > 1);
    // The rows of taps, and the columns, whose windows are inside.
    int first = 0, end = y.kernel;
    while (first < end && !sees(y, row, first)) first++;
    while (end > first && !sees(y, row, end - 1)) end--;
    int64_t low = 0, high = x.out;
    auto whole = [&](int64_t column) { return sees(x, column, 0) && sees(x, column, x.kernel - 1); };
    while (low < high && !whole(low)) low++;
    while (high > low && !whole(high - 1)) high--;
    if (gaps) low = high = 0;
    auto one = [&](int64_t column) {
      for_packs<T>(channels, [&](int64_t c, auto count, auto) { run_pixel(sample, to, row, column, c, count); });
    };
    int64_t column = 0;
    for (; column < low; column++) one(column);
    for (; column + kTogether <= high; column += kTogether)
      for_packs<T>(channels, [&](int64_t c, auto count, auto) {
        run_pixels<kTogether>(sample, to, row, column, first, end, c, count);
      });
    for (; column < x.out; column++) one(column);
  }

  void run() {
    ConvScratch shared = memory.shared_at(p.workspace);
    layout_shared(shared);
    pack();
    prefer_huge_pages(p.out, this->out_bytes());
    constexpr int64_t kRows = 4;  // of a work item
    const int64_t per_sample = (y.out + kRows - 1) / kRows;
    parallel(p.threads, [&](Team team) {
      team.for_each(n * per_sample, [&](int64_t i) {
        const int64_t begin = i % per_sample * kRows;
        for (int64_t row = begin; row < std::min<int64_t>(begin + kRows, y.out); row++) run_row(i / per_sample, row);
      });
    });
  }
};

}  // namespace

size_t conv2d_depthwise_forward_workspace(const Conv2dForward& a) { return conv_workspace<Depthwise>(a); }
void conv2d_depthwise_forward(const Conv2dForward& a) { conv_run<Depthwise>(a); }
size_t conv2d_depthwise_backward_input_workspace(const Conv2dBackwardInput& a) { return conv_workspace<Depthwise>(a); }
void conv2d_depthwise_backward_input(const Conv2dBackwardInput& a) { conv_run<Depthwise>(a); }

}  // namespace fastnorm::cpu::CPU_CAPABILITY
