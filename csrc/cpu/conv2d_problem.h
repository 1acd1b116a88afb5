// What the CPU kernels of convolution share, whatever the algorithm: a forward convolution and a gradient to the input
// as the same problem, its sizes, the activation at the end; parts of a gradient to the weight; the workspace.
#pragma once
#include "conv2d_im2col.h"
#include "output.h"
#include "parallel.h"

namespace fastnorm::cpu::CPU_CAPABILITY {

struct ConvProblem {
  ConvShape shape;
  bool backward;
  const void *in, *weight, *bias;
  void* out;
  Activation activation;
  double slope;
  void* packed;
  bool is_packed;
  void* workspace;
  int threads;
  bool* all_finite;
};

inline ConvProblem problem(const Conv2dForward& a) {
  return {a.shape,          false,    a.x,         a.weight,    a.bias,    a.y,         a.activation,
          a.negative_slope, a.packed, a.is_packed, a.workspace, a.threads, a.all_finite};
}
inline ConvProblem problem(const Conv2dBackwardInput& a) {
  return {a.shape, true,    a.dy,  a.weight,    nullptr,   a.dx,        Activation::kNone,
          0,       nullptr, false, a.workspace, a.threads, a.all_finite};
}
inline Conv2dBackwardWeight problem(const Conv2dBackwardWeight& a) { return a; }

// The sizes of a problem.  A kernel of it is a class template over the element type that derives from this.
template <class T>
struct ConvWork {
  using A = Accumulate<T>;
  using V = at::vec::Vectorized<A>;
  static constexpr int64_t kColumns = kPanel<A>;

  const ConvProblem p;
  const ConvReach y, x;
  const int64_t n, groups, terms, results;  // terms, results: channels of a group that are read and made
  const int64_t panels;                     // of a group's results
  const bool plain;                         // the image is [pixels][channels] in the accumulate type
  const ImageLayout in_layout, out_layout;

  explicit ConvWork(const ConvProblem& p)
      : p(p),
        y(p.shape.y, p.backward),
        x(p.shape.x, p.backward),
        n(p.shape.n),
        groups(p.shape.groups),
        terms(p.backward ? p.shape.co : p.shape.ci),
        results(p.backward ? p.shape.ci : p.shape.co),
        panels((results + kColumns - 1) / kColumns),
        plain(p.shape.channels_last && std::is_same_v<T, A>),
        in_layout{groups * terms, int64_t(y.in) * x.in, p.shape.channels_last},
        out_layout{groups * results, int64_t(y.out) * x.out, p.shape.channels_last} {}

  int64_t out_bytes() const { return n * out_layout.channels * out_layout.pixels * int64_t(sizeof(T)); }
  // Whether results go past the caches, in runs of so many.
  bool streams_runs(int64_t run) const {
    const int64_t in_turn = p.shape.channels_last ? 0 : out_bytes() / std::max<int64_t>(n, 1);
    return streams(p.out, out_bytes(), run * sizeof(T), out_bytes(), in_turn);
  }
  // ... in panels.
  bool streaming() const { return plain && results % kColumns == 0 && streams_runs(kColumns); }
  // In how many parts the panels are work items of their own, where there are too few others.
  int64_t split_panels(int64_t items) const {
    const int64_t wanted = 4 * p.threads;
    return p.threads == 1 || items >= wanted ? 1 : std::min(panels, (wanted + items - 1) / std::max<int64_t>(items, 1));
  }
  // Of one of a group's results; 0 for those that fill up a panel.
  A bias_of(int64_t group, int64_t result) const {
    return p.bias && result < results ? A(static_cast<const T*>(p.bias)[group * results + result]) : A(0);
  }
  // put(k, tap, count, rows) for the terms k in [begin, end): rows[count][kColumns] are the weights of term k and of
  // `count` taps, from `tap` on, to the results of a group from `first` on, with zeros for those that fill up a panel.
  template <class Put>
  void read_weights(int64_t group, int64_t first, int64_t begin, int64_t end, Put put) const {
    constexpr int64_t kTerms = 8, kTaps = 16;  // of a block, which stays in the L1 cache
    const ConvShape& s = p.shape;
    const int64_t taps = s.taps(), width = std::min(kColumns, results - first), output = s.ci * taps;
    const int64_t term_step = p.backward ? output : s.weight_input(), step = p.backward ? s.weight_input() : output;
    const T* const w = static_cast<const T*>(p.weight) + group * s.co * output + first * step;
    alignas(64) A rows[kTerms][kTaps][kColumns] = {};
    for (int64_t tap = 0; tap < taps; tap += kTaps)
      for (int64_t k = begin; k < end; k += kTerms) {
        const int64_t count = std::min(kTaps, taps - tap), some = std::min(kTerms, end - k);
        const T* const from = w + k * term_step + tap * s.weight_tap();
        auto at = [&](int64_t i, int64_t t) { return from + i * term_step + t * s.weight_tap(); };
        // Along what is one run in memory.
        if (step == 1) {
          for (int64_t i = 0; i < some; i++)
            for (int64_t t = 0; t < count; t++) {
              prefetch_run(at(i + kTerms, t), width);
              std::copy_n(at(i, t), width, rows[i][t]);
            }
        } else if (term_step == 1) {
          for (int64_t t = 0; t < count; t++) {
            for (int64_t j = 0; j < width; j++) prefetch_run(at(kTerms, t) + j * step, 1);
            image::transpose(at(0, t), step, rows[0][t], kTaps * kColumns, width, some);
          }
        } else {
          for (int64_t i = 0; i < some; i++) {
            for (int64_t j = 0; j < width; j++) prefetch_run(at(i + kTerms / 2, 0) + j * step, 1);
            image::transpose(at(i, 0), step, rows[i][0], kColumns, width, count);
          }
        }
        for (int64_t i = 0; i < some; i++) put(k + i, tap, count, rows[i]);
      }
  }
  // Whether it is cheap enough to be applied in registers wherever results are.
  bool simple_activation() const { return p.activation == Activation::kNone || p.activation == Activation::kRelu; }
  V activate_simple(V v) const { return p.activation == Activation::kRelu ? Math<V>::relu(v) : v; }
  // The others, to whole vectors of results in memory.
  [[gnu::noinline]] void activate_all(A* values, int64_t count) const {
    for (int64_t i = 0; i < count; i += V::size())
      activate(p.activation, V::loadu(values + i), V(A(p.slope))).store(values + i);
  }
};

// The sizes of a gradient to the weight, whose kernels derive from this.
template <class T>
struct ConvWeightWork {
  using A = Accumulate<T>;
  using V = at::vec::Vectorized<A>;
  static constexpr int64_t kColumns = kPanel<A>;

  const Conv2dBackwardWeight p;
  const ConvShape& s = p.shape;
  const ConvReach y, x;
  const ImageLayout x_layout, dy_layout;

  explicit ConvWeightWork(const Conv2dBackwardWeight& a)
      : p(a),
        y(s.y, false),
        x(s.x, false),
        x_layout{s.groups * s.ci, int64_t(y.in) * x.in, s.channels_last},
        dy_layout{s.groups * s.co, int64_t(y.out) * x.out, s.channels_last} {}

  // A sample of x and of dy.
  const T* x_of(int64_t n) const { return static_cast<const T*>(p.x) + n * x_layout.channels * x_layout.pixels; }
  const T* dy_of(int64_t n) const { return static_cast<const T*>(p.dy) + n * dy_layout.channels * dy_layout.pixels; }
};

// How a gradient to the weight is summed up: blocks of the images go to parts, whose sums are added in order, so that
// bits depend on the shape alone; slices of dy's channels are work items of their own, which changes no sum.
struct ConvParts {
  int64_t co, unit, parts, slices;

  // unit: of so many channels each slice has some.
  ConvParts(int64_t part_bytes, int64_t blocks, int64_t groups, int64_t co, int threads, int64_t unit = 1)
      : co(co), unit(unit) {
    constexpr int64_t kBytes = int64_t(4) << 20, kParts = 8;  // of all parts together; at most
    parts = std::clamp<int64_t>(kBytes / std::max<int64_t>(part_bytes, 1), 1, kParts);
    parts = std::max<int64_t>(1, std::min(parts, blocks / 4));
    const int64_t wanted = threads == 1 ? 1 : (2 * threads + parts * groups - 1) / (parts * groups);
    slices = std::max<int64_t>(1, std::min(wanted, co / (4 * kTileRows)));  // each reads the images once more
  }
  int64_t slice(int64_t i) const { return co / unit * i / slices * unit; }
  int64_t widest() const { return (co / unit + slices - 1) / slices * unit; }
};

// Whether all numbers that it has seen are finite.
template <class V>
struct FiniteCheck {
  V sum{0};  // zeros, or NaN

  void see(V v) { sum = at::vec::fmadd(v, V(0), sum); }
  bool all() const {
    typename V::value_type lanes[V::size()];
    sum.store(lanes);
    return std::all_of(lanes, lanes + V::size(), [](auto lane) { return lane == 0; });
  }
};

// A kernel's workspace: what kernel.layout_shared() takes, and for each thread what a Kernel::Own takes.
struct ConvMemory {
  size_t shared = 0, own = 0;

  template <class Kernel>
  explicit ConvMemory(Kernel& kernel) {
    Arena scratch{nullptr};
    kernel.layout_shared(scratch), shared = scratch.used;
    Arena of_thread{nullptr};
    typename Kernel::Own(kernel, of_thread), own = of_thread.used;
  }
  size_t bytes(int threads) const { return shared + threads * own; }
  Arena shared_at(void* workspace) const { return {workspace}; }
  Arena own_at(void* workspace, int rank) const { return {static_cast<char*>(workspace) + shared + rank * own}; }
};

// ---- Entries --------------------------------------------------------------------------------------------------------

// f(the kernel) for the element type; float64 only where the kernel has it.
template <template <class> class Kernel, bool kFloat64, class Args, class F>
inline void with_kernel(const Args& a, F f) {
  with_type(a.shape.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (kFloat64 || !std::is_same_v<T, double>) {
      Kernel<T> kernel(problem(a));
      f(kernel);
    }
  });
}
template <template <class> class Kernel, bool kFloat64, class Args, class F>
inline size_t conv_bytes(const Args& a, F of) {
  size_t bytes = 0;
  with_kernel<Kernel, kFloat64>(a, [&](auto& kernel) { bytes = size_t(of(kernel)); });
  return bytes;
}
template <template <class> class Kernel, bool kFloat64 = true, class Args>
inline size_t conv_workspace(const Args& a) {
  return conv_bytes<Kernel, kFloat64>(a, [](auto& kernel) { return kernel.bytes(); });
}
template <template <class> class Kernel, bool kFloat64 = true>
inline size_t conv_packed(const Conv2dForward& a) {
  return conv_bytes<Kernel, kFloat64>(a, [](auto& kernel) { return kernel.packed_bytes(); });
}
template <template <class> class Kernel, bool kFloat64 = true, class Args>
inline void conv_run(const Args& a) {
  with_kernel<Kernel, kFloat64>(a, [&](auto& kernel) {
    prefer_huge_pages(a.workspace, kernel.bytes());
    kernel.run();
  });
}

}  // namespace fastnorm::cpu::CPU_CAPABILITY
