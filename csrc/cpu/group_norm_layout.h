// What the forward and the backward kernels of group norm share: parameters, how samples and groups are handed out, and
// the workspace.
#pragma once
#include <algorithm>

#include "../group_norm.h"
#include "arena.h"
#include "channel_norm.h"
#include "rows.h"
#include "vector.h"

namespace fastnorm::cpu::CPU_CAPABILITY {

// Planes below kPiece elements, or pieces of that size of larger ones, are what threads share a group by.
constexpr int64_t kPiece = 65536;

// Whether every thread works on a sample or group of its own, which then stays in its cache; else all share each.
inline bool one_each(int64_t tasks, int threads) {
  return threads == 1 || tasks % threads == 0 || tasks >= 4 * threads;
}

// weight and bias in the accumulate type, each value `repeat` times, and padded to whole packs.
template <class T>
struct Parameters {
  using A = Accumulate<T>;
  int64_t c, repeat;
  A *weight, *bias;

  Parameters(Arena& arena, int64_t c, int64_t repeat)
      : c(c),
        repeat(repeat),
        weight(arena.take<A>(c * repeat + kLanes<T>)),
        bias(arena.take<A>(c * repeat + kLanes<T>)) {}

  template <class Args>
  void read_from(const Args& a) const {
    fill(a.weight, a.param_dtype, A(1), weight), fill(a.bias, a.param_dtype, A(0), bias);
  }

 private:
  void fill(const void* from, DType dtype, A missing, A* to) const {
    std::fill(to, to + c * repeat + kLanes<T>, missing);
    if (!from) return;
    with_type(dtype, [&](auto zero) {
      const auto* const values = static_cast<const decltype(zero)*>(from);
      for (int64_t i = 0; i < c; i++) std::fill(to + i * repeat, to + (i + 1) * repeat, A(values[i]));
    });
  }
};

// mean, mean_low and rstd of group i of all n * groups.
template <class A>
struct GroupStats {
  A mean, mean_low, rstd;

  template <class Args>
  GroupStats(const Args& a, int64_t i) {
    const A* const stats = static_cast<const A*>(a.stats);
    const int64_t all = a.n * a.groups;
    mean = stats[i], mean_low = stats[all + i], rstd = stats[2 * all + i];
  }
  Channel<A> channel(A weight, A bias, const A* offset_and_slope = nullptr) const {
    Channel<A> channel(mean, mean_low, rstd, weight, bias);
    if (offset_and_slope) channel.v[kOffset] = offset_and_slope[0], channel.v[kSlope] = offset_and_slope[1];
    return channel;
  }
};

// channels_last: the rows of one sample after the other.  A slot is what one sample needs in the workspace; there is
// one per thread where every thread has a sample of its own, else one per sample.
template <class T>
struct SampleRows {
  using A = Accumulate<T>;
  Rows<T> rows;
  int64_t c, hw, groups;
  Parameters<T> parameters;
  double* sums;               // [slots][chunks][2][c]
  A *coefficients, *scratch;  // [slots][kCoefficients][padded], [threads][3][padded]

  template <class Args>
  SampleRows(const Args& a, Arena& arena, bool each)
      : rows(a.hw, a.c), c(a.c), hw(a.hw), groups(a.groups), parameters(arena, a.c, 1) {
    const int64_t slots = each ? a.threads : a.n;
    sums = arena.take<double>(slots * rows.chunks * 2 * c);
    coefficients = arena.take<A>(slots * kCoefficients * rows.padded());
    scratch = arena.take<A>(a.threads * 3 * rows.padded());
  }

  double* chunk_sums(int64_t slot, int64_t chunk, int which) const {
    return sums + ((slot * rows.chunks + chunk) * 2 + which) * c;
  }
  PerColumn<A> columns(int64_t slot) const {
    return {coefficients + slot * kCoefficients * rows.padded(), rows.padded()};
  }
  A* thread_scratch(int rank, int which) const { return scratch + (rank * 3 + which) * rows.padded(); }

  // Coefficients of a sample's columns; a group's offset and slope are offset_and_slope[2 * group] and the next.
  template <class Args>
  void set_columns(const Args& a, int64_t sample, int64_t slot, const A* offset_and_slope) const {
    const int64_t size = c / groups, stride = rows.padded();
    A* const to = columns(slot).v;
    for (int64_t g = 0; g < groups; g++) {
      const GroupStats<A> stats(a, sample * groups + g);
      const A offset = offset_and_slope ? offset_and_slope[2 * g] : A(0),
              slope = offset_and_slope ? offset_and_slope[2 * g + 1] : A(0);
      for (int64_t i = g * size; i < (g + 1) * size; i++) {
        const Channel<A> channel = stats.channel(parameters.weight[i], parameters.bias[i]);
        for (int k = 0; k < kOffset; k++) to[k * stride + i] = channel.v[k];
        to[kOffset * stride + i] = offset, to[kSlope * stride + i] = slope;
      }
    }
    for (int k = 0; k < kCoefficients; k++)
      for (int64_t i = c; i < rows.columns; i += c) std::copy_n(to + k * stride, c, to + k * stride + i);
  }
};

// The arguments as one sample alone would have them, but for stats.
inline GroupNormForward sample_of(GroupNormForward a, int64_t sample) {
  const int64_t bytes = sample * a.c * a.hw * size_of(a.dtype);
  auto move = [&](const void* p) { return p ? static_cast<const char*>(p) + bytes : nullptr; };
  a.x = move(a.x), a.residual = move(a.residual), a.y = const_cast<char*>(move(a.y));
  if (a.mask) a.mask += sample * ((a.hw * a.c + 7) / 8);
  return a;
}

inline GroupNormBackward sample_of(GroupNormBackward a, int64_t sample) {
  const int64_t bytes = sample * a.c * a.hw * size_of(a.dtype);
  auto move = [&](const void* p) { return p ? static_cast<const char*>(p) + bytes : nullptr; };
  a.dy = move(a.dy), a.x = move(a.x), a.residual = move(a.residual);
  a.dx = const_cast<char*>(move(a.dx)), a.dresidual = const_cast<char*>(move(a.dresidual));
  if (a.mask) a.mask += sample * ((a.hw * a.c + 7) / 8);
  return a;
}

}  // namespace fastnorm::cpu::CPU_CAPABILITY
