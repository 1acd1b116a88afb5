// Batch norm backward on the CPU; ../batch_norm.h has the formulas.
//
// As forward: the sums of dz and dz * (x - mean) per channel, then dx, a channel at once in planes and two passes in
// rows. With frozen statistics dx needs no sums and is written in the first pass. Floor: 3 S (S: bytes of x), 4 S with
// a residual's gradient; rows read x and dy twice where they do not stay in the caches.
#include "../batch_norm.h"
#include "batch_norm_rows.h"
#include "channel_norm.h"
#include "moments.h"
#include "output.h"
#include "parallel.h"
#include "vector.h"

namespace fastnorm::cpu::CPU_CAPABILITY {
namespace {

// Frozen statistics: dx = dz * scale needs no sums, so it is written while they are taken.
template <class T, Slope slope, class Coefficients>
inline void write_frozen(const BatchNormBackward& a, const Coefficients& c, const Gradient<T, slope, Coefficients>& g,
                         int64_t at, int64_t i, auto count) {
  if (a.dx) store(static_cast<T*>(a.dx) + at, g.dz * c.get(kScale, i), count);
  if (a.dresidual) store(static_cast<T*>(a.dresidual) + at, g.dz, count);
}

// dx = (dz - offset - (x - mean) * slope) * scale
struct TrainingGradient {
  auto operator()(const auto& g, const auto& c, int64_t i) const {
    return (g.dz - fmadd(g.centered, c.get(kSlope, i), c.get(kOffset, i))) * c.get(kScale, i);
  }
};

template <class A>
Channel<A> start_backward(const BatchNormBackward& a, int64_t c) {
  const A* const stats = static_cast<const A*>(a.stats);
  return Channel<A>(stats[c], stats[a.c + c], stats[2 * a.c + c], read(a.weight, a.param_dtype, c, 1),
                    read(a.bias, a.param_dtype, c, 0));
}

struct Sums {
  double dz = 0, dz_centered = 0;  // centered: x - mean, where mean lacks its low word

  void add(const Sums& o) { dz += o.dz, dz_centered += o.dz_centered; }
};

template <class A>
Channel<A> finish_backward(const BatchNormBackward& a, int64_t c, const Sums& sums) {
  const A* const stats = static_cast<const A*>(a.stats);
  const double low = double(stats[a.c + c]), rstd = double(stats[2 * a.c + c]);
  const double sum_dz_xhat = (sums.dz_centered - low * sums.dz) * rstd, n = double(a.n) * double(a.hw);
  write(a.dweight, a.param_dtype, c, sum_dz_xhat);
  write(a.dbias, a.param_dtype, c, sums.dz);
  Channel<A> channel = start_backward<A>(a, c);
  if (a.training) {
    const double mean_dz = a.means ? a.means[c] : sums.dz / n;
    const double slope = (a.means ? a.means[a.c + c] : sum_dz_xhat / n) * rstd;
    channel.v[kSlope] = A(slope), channel.v[kOffset] = A(mean_dz - low * slope);
  }
  return channel;
}

// Adds segment j of `channels` channels from c on to their sums.
template <class T, Slope slope>
[[gnu::noinline]] void add_segment(const BatchNormBackward& a, const Segments& segments,
                                   const Channel<Accumulate<T>>* coefficients, int64_t c, int64_t channels, int64_t j,
                                   Sums* sums) {
  using A = Accumulate<T>;
  using P = Pack<A>;
  segments.visit(j, [&](int64_t first, int64_t planes, int64_t offset, int64_t len) {
    const int64_t stride = a.c * a.hw;
    const bool frozen = !a.training;
    const P lanes = new_lanes<T>(len);
    P sum[kMaxGroup], product[kMaxGroup];
    for (int64_t k = 0; k < channels; k++) sum[k] = product[k] = P(A(0));
    alignas(64) A kept[slope == Slope::kKept ? kSegment : 1];
    for (int64_t n = first; n < first + planes; n++) {
      const int64_t ahead = offset + len < a.hw ? len
                            : n + 1 < a.n       ? stride - offset
                                                : channels * a.hw - n * stride - offset;
      for (int64_t k = 0; k < channels; k++) {
        const int64_t plane = n * a.c + c + k, at = plane * a.hw + offset;
        const uint8_t* const mask = a.mask + (a.mask ? plane * ((a.hw + 7) / 8) + offset / 8 : 0);
        const Uniform<A> uniform(coefficients[k]);
        if constexpr (slope == Slope::kKept) keep_slopes<T>(a, uniform, at, len, kept);
        P s = sum[k], p = product[k];
        for_packs<T>(len, [&](int64_t i, auto count, auto again) {
          prefetch(static_cast<const T*>(a.x) + at + i + ahead), prefetch(static_cast<const T*>(a.dy) + at + i + ahead);
          const Gradient<T, slope, Uniform<A>> g(a, uniform, at + i, i, mask, kept, count, again);
          if (frozen) write_frozen<T, slope>(a, uniform, g, at + i, i, count);
          const P dz = keep(lanes, g.dz, count, again);
          s = s + dz, p = fmadd(dz, g.centered, p);
        });
        sum[k] = s, product[k] = p;
      }
    }
    for (int64_t k = 0; k < channels; k++) sums[k].add({double(sum[k].sum()), double(product[k].sum())});
  });
}

bool streams_backward(const BatchNormBackward& a, int64_t run) {
  const int64_t size = size_of(a.dtype), bytes = a.n * a.c * a.hw * size;
  const int64_t touched = (2 + (a.dx != nullptr) + (a.dresidual != nullptr)) * bytes;
  return a.dx != a.dy && streams(a.dx, bytes, run * size, touched) && streams(a.dresidual, bytes, run * size, touched);
}

// dx and dresidual of planes that follow each other, and their channels.
template <class T>
[[gnu::noinline]] void write_planes(const BatchNormBackward& a, const Channel<Accumulate<T>>* channels, int64_t first,
                                    int64_t planes, int64_t write_ahead, bool streaming) {
  backward_spans<T>(a, write_ahead, streaming, TrainingGradient(), [&](auto write) {
    for (int64_t i = 0; i < planes; i++)
      write(Uniform<Accumulate<T>>(channels[i]), (first + i) * a.hw, a.hw,
            a.mask ? a.mask + (first + i) * ((a.hw + 7) / 8) : nullptr, nullptr, 0);
  });
}

template <class T>
void backward_planes(const BatchNormBackward& a) {
  using A = Accumulate<T>;
  const Segments segments(a.n, a.hw);
  auto add = [&](const Channel<A>* coefficients, int64_t c, int64_t channels, int64_t j, Sums* sums) {
    with_slope(slope_of(a.activation, a.mask, a.residual),
               [&](auto slope) { add_segment<T, slope>(a, segments, coefficients, c, channels, j, sums); });
  };
  const bool second_pass = a.training && (a.dx || a.dresidual), streaming = streams_backward(a, a.hw);
  if (a.threads == 1 || a.c >= 4 * a.threads) {
    const int64_t group = channel_group(a.n, a.c, a.hw, 2 * sizeof(T), a.threads);
    parallel(a.threads, [&](Team team) {
      team.for_each((a.c + group - 1) / group, [&](int64_t g) {
        const int64_t first = g * group, channels = std::min(group, a.c - first);
        Sums sums[kMaxGroup];
        Channel<A> coefficients[kMaxGroup];
        for (int64_t k = 0; k < channels; k++) coefficients[k] = start_backward<A>(a, first + k);
        for (int64_t j = 0; !a.means && j < segments.count(); j++) add(coefficients, first, channels, j, sums);
        for (int64_t k = 0; k < channels; k++) coefficients[k] = finish_backward<A>(a, first + k, sums[k]);
        for (int64_t n = a.n - 1; second_pass && n >= 0; n--)
          write_planes<T>(a, coefficients, n * a.c + first, channels, n ? -a.c * a.hw : 0, streaming);
      });
    });
    return;
  }
  auto* const partial = static_cast<Sums*>(a.workspace);  // [c][segments]
  auto* const channels = reinterpret_cast<Channel<A>*>(partial + a.c * segments.count());
  parallel(a.threads, [&](Team team) {
    team.for_each(a.c * segments.count(), [&](int64_t i) {
      const int64_t c = i / segments.count();
      const Channel<A> coefficients = start_backward<A>(a, c);
      partial[i] = Sums{};
      if (!a.means) add(&coefficients, c, 1, i % segments.count(), &partial[i]);
    });
    team.for_each(a.c, [&](int64_t c) {
      Sums sums;
      for (int64_t j = 0; j < segments.count(); j++) sums.add(partial[c * segments.count() + j]);
      channels[c] = finish_backward<A>(a, c, sums);
    });
    if (second_pass)
      team.for_each(a.n * a.c, [&](int64_t i) {
        const int64_t plane = a.n * a.c - 1 - i;
        write_planes<T>(a, channels + plane % a.c, plane, 1, 0, streaming);
      });
  });
}

template <class T>
void backward_rows(const BatchNormBackward& a) {
  using A = Accumulate<T>;
  const Rows<T> rows(a.n * a.hw, a.c);
  const RowsWorkspace<T> work(rows, a.workspace);
  const PerColumn<A> coefficients{work.coefficients, rows.padded()};
  const bool streaming = streams_backward(a, rows.columns), frozen = !a.training;
  parallel(a.threads, [&](Team team) {
    team.for_each(rows.channel_blocks(), [&](int64_t block) {
      rows.visit_channels(block, [&](int64_t first, int64_t last) {
        for (int64_t c = first; c < last; c++) rows.set(coefficients, c, start_backward<A>(a, c));
      });
    });
    team.for_each(a.means ? 0 : rows.chunks, [&](int64_t i) {
      with_slope(slope_of(a.activation, a.mask, a.residual), [&](auto slope) {
        chunk_sums<T, slope>(a, rows, coefficients, i * rows.chunk, rows.chunk_end(i), work.chunk_sums(rows, i, 0),
                             work.chunk_sums(rows, i, 1), work.thread_scratch(team.rank, 0),
                             work.thread_scratch(team.rank, 1),
                             [&a, coefficients, frozen, slope](const auto& g, int64_t at, int64_t i, auto count) {
                               if (frozen) write_frozen<T, slope>(a, coefficients, g, at, i, count);
                             });
      });
    });
    team.for_each(rows.channel_blocks(), [&](int64_t block) {
      rows.visit_channels(block, [&](int64_t first, int64_t last) {
        double *const dz = work.chunk_sums(rows, 0, 0), *const dz_centered = work.chunk_sums(rows, 0, 1);
        for (int64_t i = 1; !a.means && i < rows.chunks; i++)
          for (int64_t c = first; c < last; c++)
            dz[c] += work.chunk_sums(rows, i, 0)[c], dz_centered[c] += work.chunk_sums(rows, i, 1)[c];
        for (int64_t c = first; c < last; c++)
          rows.set(coefficients, c, finish_backward<A>(a, c, a.means ? Sums{} : Sums{dz[c], dz_centered[c]}));
      });
    });
    if (!a.training || !(a.dx || a.dresidual)) return;
    team.for_each(rows.chunks, [&](int64_t j) {
      const int64_t i = rows.chunks - 1 - j;
      backward_chunk(a, rows, coefficients, i, kRowsAhead, streaming, TrainingGradient());
    });
  });
}

}  // namespace

size_t batch_norm_backward_workspace(const BatchNormBackward& a) {
  size_t bytes = 0;
  with_type(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (a.channels_last)
      bytes = RowsWorkspace<T>::bytes(Rows<T>(a.n * a.hw, a.c), a.threads);
    else if (a.threads > 1 && a.c < 4 * a.threads)
      bytes = a.c * (Segments(a.n, a.hw).count() * sizeof(Sums) + sizeof(Channel<Accumulate<T>>));
  });
  return bytes;
}

void batch_norm_backward(const BatchNormBackward& a) {
  prefer_huge_pages(a.dx, a.n * a.c * a.hw * size_of(a.dtype));
  prefer_huge_pages(a.dresidual, a.n * a.c * a.hw * size_of(a.dtype));
  with_type(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    a.channels_last ? backward_rows<T>(a) : backward_planes<T>(a);
  });
}

}  // namespace fastnorm::cpu::CPU_CAPABILITY
