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

// Of `spans` runs of `len` elements, `stride` apart.  Shifted by the mean of the first pack: were that one far off the
// others, then it would itself make the variance large, so the relative error stays below kSegment / kLanes roundings.
// `ahead(j)` is how far from span j lies what will be read some time later: fetched now, since the hardware's prefetcher
// stops at 4 KB.
template <class T, class Ahead>
inline Moments shifted_moments(const T* x, int64_t spans, int64_t stride, int64_t len, Ahead ahead_of) {
  using A = Accumulate<T>;
  using P = Pack<A>;
  constexpr int64_t W = kLanes<T>;
  const int64_t head = std::min(len, W);
  const A k = load(x, head).sum() / A(head);
  const P shift(k);
  // The lanes that count of what is left after the last full pack: a short load, or a full one that begins earlier.
  const P tail = len < W ? P::first(len) : P::after(W - len % W);
  P s0(A(0)), s1(A(0)), q0(A(0)), q1(A(0));
  auto add = [&](P d) { s0 = s0 + d, q0 = fmadd(d, d, q0); };
  for (int64_t j = 0; j < spans; j++, x += stride) {
    const T* const ahead = x + ahead_of(j);
    int64_t i = 0;
    for (; i + 2 * W <= len; i += 2 * W) {
      prefetch(ahead + i), prefetch(ahead + i + W);
      const P d0 = load(x + i, Full<T>()) - shift, d1 = load(x + i + W, Full<T>()) - shift;
      s0 = s0 + d0, s1 = s1 + d1;
      q0 = fmadd(d0, d0, q0), q1 = fmadd(d1, d1, q1);
    }
    for (; i + W <= len; i += W) add(load(x + i, Full<T>()) - shift);
    if (i == len) continue;
    prefetch(ahead + i);
    if (len < W) add((load(x, len) - shift) & tail);
    else add((load(x + len - W, Full<T>()) - shift) & tail);
  }
  const double n = double(spans) * len, s = (s0 + s1).sum(), q = (q0 + q1).sum();
  return {n, double(k) + s / n, std::max(q - s * s / n, 0.0)};
}

// The same in double throughout, for what overflowed above (|x| > 1e18 in float32) and to tell it from true Inf and NaN.
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

// The distance from plane n of a channel to the plane some 4 KB later that is worth fetching, of this channel or the next.
struct PlanesAhead {
  int64_t n, hw, stride, distance;

  PlanesAhead(int64_t n, int64_t c, int64_t hw)
      : n(n), hw(hw), stride(c * hw), distance(std::min(n, std::max<int64_t>(1, 1024 / hw))) {}
  int64_t forward(int64_t plane) const {
    return plane + distance < n ? distance * stride : (distance - n) * stride + hw;
  }
  int64_t backward(int64_t plane) const { return plane >= distance ? -distance * stride : 0; }
};

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
