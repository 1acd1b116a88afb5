// Mean and variance: shifted sums in the accumulate type over at most kSegment elements, merged in double and always in
// the same order (Chan, Golub, LeVeque 1983), so that the result depends neither on mean / std nor on the threads.
#pragma once
#include <algorithm>
#include <cmath>

#include "vector.h"

namespace fastnorm::cpu::CPU_CAPABILITY {

constexpr int64_t kSegment = 4096;

struct Moments {
  double n = 0, mean = 0, m2 = 0;  // m2: the sum of squared deviations from the mean

  void merge(const Moments& o) {
    const double total = n + o.n, part = o.n / total, d = o.mean - mean;
    mean += d * part;
    m2 += o.m2 + d * d * n * part;
    n = total;
  }
  bool finite() const { return std::isfinite(m2) && std::isfinite(mean); }
};

// Sums over at most kSegment elements, shifted by the mean of the first pack: were that one far off the others, then it
// would itself make the variance large, so the relative error stays below kSegment / kLanes roundings.
template <class T>
struct ShiftedSums {
  using A = Accumulate<T>;
  using P = Pack<A>;
  A shift;
  P sum{A(0)}, square{A(0)};

  ShiftedSums() = default;
  ShiftedSums(const T* x, int64_t len) {
    const int64_t head = std::min(len, kLanes<T>);
    shift = load(x, head).sum() / A(head);
  }
  // lanes: new_lanes(len).  ahead: how far from x lies what will be read some 8 KB later, and is fetched now.
  void add(const T* x, int64_t len, P lanes, int64_t ahead) {
    const P k(shift);
    P s = sum, q = square;
    for_packs<T>(len, [&](int64_t i, auto count, auto again) {
      prefetch(x + i + ahead);
      const P d = keep(lanes, load(x + i, count) - k, count, again);
      s = s + d, q = fmadd(d, d, q);
    });
    sum = s, square = q;
  }
  Moments moments(double n) const {
    const double s = sum.sum(), q = square.sum();
    return {n, double(shift) + s / n, std::max(q - s * s / n, 0.0)};
  }
};

// The same in double throughout, for what overflowed above (|x| > 1e18 in float32) and to tell it from true Inf and
// NaN.
template <class T>
inline Moments wide_moments(const T* x, int64_t spans, int64_t stride, int64_t len) {
  const double n = double(spans) * len;
  double mean = 0, m2 = 0;
  for (int64_t j = 0; j < spans; j++)
    for (int64_t i = 0; i < len; i++) mean += double(x[j * stride + i]) / n;
  for (int64_t j = 0; j < spans; j++)
    for (int64_t i = 0; i < len; i++) m2 += (double(x[j * stride + i]) - mean) * (double(x[j * stride + i]) - mean);
  return {n, mean, m2};
}

// Neighbouring small channels are taken together, so that memory is read and written in runs of some 8 KB; what they
// have in x and dy stays in the L2 cache meanwhile.
constexpr int64_t kMaxGroup = 32;

inline int64_t channel_group(int64_t n, int64_t c, int64_t hw, int64_t element, int threads) {
  const int64_t run = 8192 / (hw * element), cached = (512 << 10) / (n * hw * element), share = c / (4 * threads);
  return std::clamp<int64_t>(std::min({run, cached, share}), 1, kMaxGroup);
}

// How a channel of n planes of hw elements is cut into segments: whole small planes together, or pieces of a large one.
struct Segments {
  int64_t n, hw, planes, chunks;  // planes of a segment; or segments of a plane

  Segments(int64_t n, int64_t hw)
      : n(n), hw(hw), planes(std::max<int64_t>(1, kSegment / hw)), chunks((hw + kSegment - 1) / kSegment) {}
  int64_t count() const { return (n + planes - 1) / planes * chunks; }
  // f(first plane, planes, offset in the plane, elements)
  template <class F>
  auto visit(int64_t j, F f) const {
    const int64_t first = j / chunks * planes, offset = j % chunks * kSegment;
    return f(first, std::min(planes, n - first), offset, std::min(kSegment, hw - offset));
  }
};

}  // namespace fastnorm::cpu::CPU_CAPABILITY
