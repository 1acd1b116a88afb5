// What batch norm and group norm do element by element, forward and backward, given coefficients per channel.  Args is
// either operator's struct of arguments: their names agree.
#pragma once
#include <algorithm>

#include "elementwise.h"
#include "output.h"
#include "vector.h"

namespace fastnorm::cpu::CPU_CAPABILITY {

// ---- Coefficients per channel ---------------------------------------------------------------------------------------

// z = (x - mean) * scale + shift; offset and slope are what dx subtracts from dz
enum Coefficient { kMean, kScale, kShift, kOffset, kSlope, kCoefficients };

template <class A>
struct Channel {
  A v[kCoefficients];

  Channel() = default;
  Channel(A mean, A mean_low, A rstd, double weight, double bias)
      : v{mean, rstd * A(weight), A(bias) - mean_low * (rstd * A(weight)), 0, 0} {}
};

// Both kinds below are passed by value: a vector store may alias whatever has an address, and these belong in
// registers.

// The same coefficients for every element, as in a plane ...
template <class A>
struct Uniform {
  A v[kCoefficients];

  explicit Uniform(const Channel<A>& c) { std::copy(c.v, c.v + kCoefficients, v); }
  Pack<A> get(Coefficient k, int64_t) const { return Pack<A>(v[k]); }
  Uniform from(int64_t) const { return *this; }
};

// ... or others for every column, as in a row: [kCoefficients][columns], padded to whole packs.
template <class A>
struct PerColumn {
  A* v;
  int64_t columns;

  Pack<A> get(Coefficient k, int64_t i) const { return load(v + k * columns + i, Full<A>()); }
  PerColumn from(int64_t column) const { return {v + column, columns}; }
  void set(const Channel<A>& c, int64_t i) const {
    for (int k = 0; k < kCoefficients; k++) v[k * columns + i] = c.v[k];
  }
};

// ---- Forward --------------------------------------------------------------------------------------------------------

// How far ahead, in elements, what will be read and written is fetched; 0: not at all.
struct Ahead {
  int64_t x, residual, output;
};

// out(i, z, count, again) for every pack of z = (x - mean) * scale + shift + residual, of len elements from `at` on, in
// x `skip` further.
template <class T, class Args, class Coefficients, class Out>
[[gnu::always_inline]] inline void for_z(const Args& a, const Coefficients c, int64_t at, int64_t skip, int64_t len,
                                         const Ahead ahead, auto with_residual, Out out) {
  const T *const x = static_cast<const T*>(a.x) + at + skip, *const residual = static_cast<const T*>(a.residual) + at;
  for_packs<T>(len, [&](int64_t i, auto count, auto again) {
    if (ahead.x) prefetch(x + i + ahead.x);
    if (with_residual && ahead.residual) prefetch(residual + i + ahead.residual);
    auto z = fmadd(load(x + i, count) - c.get(kMean, i), c.get(kScale, i), c.get(kShift, i));
    if (with_residual) z = z + load(residual + i, count);
    out(i, z, count, again);
  });
}

// y = activation(z) of spans: each(write) calls write(coefficients, at, len, mask, skip) for one after the other, of
// len elements from `at` on, whose bits are at mask, and which lie `skip` further in x.
template <class T, class Args, class F>
[[gnu::always_inline]] inline void normalize(const Args& a, const Ahead ahead, bool streaming, F each) {
  using A = Accumulate<T>;
  if (takes_strips(a.activation))
    return each([&](const auto& c, int64_t at, int64_t len, uint8_t* mask, int64_t skip = 0) {
      alignas(64) A strip[kStrip];
      for (int64_t first = 0; first < len; first += kStrip) {
        const int64_t part = std::min(kStrip, len - first);
        for_z<T>(a, c.from(first), at + first, skip, part, ahead, a.residual != nullptr,
                 [&](int64_t i, auto z, auto, auto again) { store(strip + place<T>(i, again), z, Full<A>()); });
        store_activated(a.activation, a.negative_slope, strip, static_cast<T*>(a.y) + at + first, part,
                        mask ? mask + first / 8 : nullptr, streaming);
      }
    });
  const A bound = lower_bound<A>(a.activation);
  auto with = [&](auto residual) {
    each([&](const auto& c, int64_t at, int64_t len, uint8_t* mask, int64_t skip = 0) {
      T* const y = static_cast<T*>(a.y) + at;
      for_z<T>(a, c, at, skip, len, ahead, residual, [&](int64_t i, auto z, auto count, auto again) {
        if (residual && mask) store_bits(mask, i, relu_bits(z), count, again);
        if (ahead.output && !streaming) prefetch<T, true>(y + i + ahead.output);
        Pack<A> v = raise_to(bound, z);
        if constexpr (!std::is_same_v<decltype(again), Zero>)
          if (a.x == a.y) v = select(Pack<A>::first(again), load(y + i, count), v);  // x is gone there
        store_output(y + i, v, count, again, streaming);
      });
    });
  };
  a.residual ? with(std::true_type()) : with(std::false_type());
}

// ---- Backward -------------------------------------------------------------------------------------------------------

// dz and x - mean of a pack at element `at`, which is the i-th of its span; mask: the span's bits, kept: its slopes.
template <class T, Slope slope, class Coefficients>
struct Gradient {
  using P = Pack<Accumulate<T>>;
  P dz, centered;

  template <class Args>
  Gradient(const Args& a, const Coefficients& c, int64_t at, int64_t i, const uint8_t* mask, const Accumulate<T>* kept,
           auto count, auto again) {
    centered = load(static_cast<const T*>(a.x) + at, count) - c.get(kMean, i);
    P z = centered;
    if constexpr (slope == Slope::kRelu) z = fmadd(centered, c.get(kScale, i), c.get(kShift, i));
    dz = slope_times<slope>(a.activation, a.negative_slope, load(static_cast<const T*>(a.dy) + at, count), z, mask,
                            kept, i, count, again);
  }
};

// The slopes of len elements from `at` on.
template <class T, class Args, class Coefficients>
[[gnu::noinline]] void keep_slopes(const Args& a, const Coefficients c, int64_t at, int64_t len, Accumulate<T>* kept) {
  for_z<T>(a, c, at, 0, len, {}, a.residual != nullptr,
           [&](int64_t i, auto z, auto, auto again) { store(kept + place<T>(i, again), z, Full<Accumulate<T>>()); });
  to_slopes(a.activation, a.negative_slope, kept, len);
}

// dx and dresidual of len elements from `at` on; dx_of(gradient, i) is the dx of a pack.
template <class T, Slope slope, class Args, class Coefficients, class F>
[[gnu::always_inline]] inline void backward_span(const Args& a, const Coefficients c, int64_t at, int64_t len,
                                                 const uint8_t* mask, const Accumulate<T>* kept, int64_t read_ahead,
                                                 int64_t write_ahead, bool streaming, F dx_of) {
  T *const dx = static_cast<T*>(a.dx), *const dresidual = static_cast<T*>(a.dresidual);
  for_packs<T>(len, [&](int64_t i, auto count, auto again) {
    if (read_ahead) {
      prefetch(static_cast<const T*>(a.x) + at + i + read_ahead);
      prefetch(static_cast<const T*>(a.dy) + at + i + read_ahead);
    }
    const Gradient<T, slope, Coefficients> g(a, c, at + i, i, mask, kept, count, again);
    auto put = [&](T* to, auto v) {
      if (!streaming) prefetch<T, true>(to + write_ahead);
      if constexpr (!std::is_same_v<decltype(again), Zero>)
        if (a.dx == a.dy) v = select(Pack<Accumulate<T>>::first(again), load(to, count), v);  // dy is gone there
      store_output(to, v, count, again, streaming);
    };
    if (dresidual) put(dresidual + at + i, g.dz);
    if (dx) put(dx + at + i, dx_of(g, c, i));
  });
}

// The same for spans: each(write) calls write(coefficients, at, len, mask, kept, read_ahead) for one after the other.
// kept: its slopes, or null where no other pass kept them.
template <class T, class Args, class F, class Each>
[[gnu::always_inline]] inline void backward_spans(const Args& a, int64_t write_ahead, bool streaming, F dx_of,
                                                  Each each) {
  with_slope(slope_of(a.activation, a.mask, a.residual), [&](auto slope) {
    each([&](const auto& c, int64_t at, int64_t len, const uint8_t* mask, const Accumulate<T>* kept,
             int64_t read_ahead) {
      const bool in_strips = slope == Slope::kKept && !kept;
      const int64_t step = in_strips ? kStrip : len;
      alignas(64) Accumulate<T> strip[slope == Slope::kKept ? kStrip : 1];
      for (int64_t first = 0; first < len; first += step) {
        const int64_t part = std::min(step, len - first);
        if (in_strips) keep_slopes<T>(a, c.from(first), at + first, part, strip);
        backward_span<T, slope>(a, c.from(first), at + first, part, mask ? mask + first / 8 : nullptr,
                                in_strips ? strip : kept, read_ahead, write_ahead, streaming, dx_of);
      }
    });
  });
}

}  // namespace fastnorm::cpu::CPU_CAPABILITY
