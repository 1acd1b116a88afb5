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
};

// ... or others for every column, as in a row: [kCoefficients][columns], padded to whole packs.
template <class A>
struct PerColumn {
  A* v;
  int64_t columns;

  Pack<A> get(Coefficient k, int64_t i) const { return load(v + k * columns + i, Full<A>()); }
  void set(const Channel<A>& c, int64_t i) const {
    for (int k = 0; k < kCoefficients; k++) v[k * columns + i] = c.v[k];
  }
};

// ---- Forward --------------------------------------------------------------------------------------------------------

// How far ahead, in elements, what will be read and written is fetched; 0: not at all.
struct Ahead {
  int64_t x, residual, output;
};

// y = activation((x - mean) * scale + shift + residual) over len elements from `at` on; mask: their bits.
template <class T, Kind kind, bool kResidual, class Args, class Coefficients>
[[gnu::always_inline]] inline void normalize(const Args& a, const Coefficients c, int64_t at, int64_t len,
                                             uint8_t* mask, const Ahead ahead, bool streaming) {
  const T* const x = static_cast<const T*>(a.x) + at;
  const T* const residual = static_cast<const T*>(a.residual) + at;
  T* const y = static_cast<T*>(a.y) + at;
  using A = Accumulate<T>;
  for_packs<T>(len, [&](int64_t i, auto count, auto again) {
    if (ahead.x) prefetch(x + i + ahead.x);
    if (kResidual && ahead.residual) prefetch(residual + i + ahead.residual);
    if (ahead.output && !streaming) prefetch<T, true>(y + i + ahead.output);
    auto z = fmadd(load(x + i, count) - c.get(kMean, i), c.get(kScale, i), c.get(kShift, i));
    if constexpr (kResidual) z = z + load(residual + i, count);
    if constexpr (kResidual && kind != Kind::kNone && kind != Kind::kSilu)
      if (mask) store_bits(mask, i, slope_bits<kind>(a.activation, z), count, again);
    store_output(y + i, apply<kind>(a.activation, A(a.negative_slope), z), count, again, streaming);
  });
}

// f(kind, residual) with the Kind and whether there is a residual as constants.
template <class Args, class F>
inline void with_kind_and_residual(const Args& a, F f) {
  with_kind(a.activation, [&](auto kind) { a.residual ? f(kind, std::true_type()) : f(kind, std::false_type()); });
}

// ---- Backward -------------------------------------------------------------------------------------------------------

// dz and x - mean of a pack at element `at`, which is the i-th of its span; mask: the span's bits.
template <class T, Slope slope, class Coefficients>
struct Gradient {
  using P = Pack<Accumulate<T>>;
  P dz, centered;

  template <class Args>
  Gradient(const Args& a, const Coefficients& c, int64_t at, int64_t i, const uint8_t* mask, auto count, auto again) {
    centered = load(static_cast<const T*>(a.x) + at, count) - c.get(kMean, i);
    P z = centered;
    if constexpr (needs_z(slope)) z = fmadd(centered, c.get(kScale, i), c.get(kShift, i));
    dz =
        slope_times<slope>(a.activation, Accumulate<T>(a.negative_slope), load(static_cast<const T*>(a.dy) + at, count),
                           z, static_cast<const T*>(a.residual) + at, mask, i, count, again);
  }
  // dz: as another pass kept it.
  template <class Args>
  Gradient(const Args& a, const Coefficients& c, int64_t at, int64_t i, const Accumulate<T>* dz, auto count)
      : dz(load(dz, count)), centered(load(static_cast<const T*>(a.x) + at, count) - c.get(kMean, i)) {}
};

// dx and dresidual of len elements from `at` on; dx_of(gradient, i) is the dx of a pack.  kept: dz of the span, where
// its slope is costly and another pass kept it, or null.
template <class T, Slope slope, class Args, class Coefficients, class F>
[[gnu::always_inline]] inline void backward_span(const Args& a, const Coefficients c, int64_t at, int64_t len,
                                                 const uint8_t* mask, int64_t read_ahead, int64_t write_ahead,
                                                 bool streaming, F dx_of, const Accumulate<T>* kept = nullptr) {
  T *const dx = static_cast<T*>(a.dx), *const dresidual = static_cast<T*>(a.dresidual);
  for_packs<T>(len, [&](int64_t i, auto count, auto again) {
    if (read_ahead) {
      prefetch(static_cast<const T*>(a.x) + at + i + read_ahead);
      prefetch(static_cast<const T*>(a.dy) + at + i + read_ahead);
    }
    using G = Gradient<T, slope, Coefficients>;
    const G g = is_costly(slope) && kept ? G(a, c, at + i, i, kept + i, count) : G(a, c, at + i, i, mask, count, again);
    if (dresidual) {
      if (!streaming) prefetch<T, true>(dresidual + at + i + write_ahead);
      store_output(dresidual + at + i, g.dz, count, again, streaming);
    }
    if (dx) {
      if (!streaming) prefetch<T, true>(dx + at + i + write_ahead);
      store_output(dx + at + i, dx_of(g, c, i), count, again, streaming);
    }
  });
}

}  // namespace fastnorm::cpu::CPU_CAPABILITY
