// Group norm forward on the CPU; ../group_norm.h has the formulas.
//
// Planes ([n][c][hw]): a group is contiguous.  Its moments are taken and it is normalised while it is in the cache; the
//   next group is fetched meanwhile.  Planes shorter than a vector are taken together, with coefficients per element.
// Rows (channels_last, [n][hw][c]): per sample the moments of every channel, merged over the channels of a group in
//   double; then its rows backwards over chunks of 256 KB, which the caches still hold.  Narrow rows are widened.
// Fewer groups or samples than threads: all threads share each of them, with the same partition and the same results.
// Floor: 2 S (S: bytes of x), 3 S with a residual.
#include <numeric>

#include "../group_norm.h"
#include "channel_norm.h"
#include "group_norm_layout.h"
#include "moments.h"
#include "output.h"
#include "parallel.h"
#include "rows.h"
#include "vector.h"

namespace fastnorm::cpu::CPU_CAPABILITY {
namespace {

template <class A>
void set_stats(const GroupNormForward& a, int64_t group, const Moments& m) {
  A* const stats = static_cast<A*>(a.stats);
  const int64_t all = a.n * a.groups;
  const double var = m.m2 / m.n;
  stats[group] = A(m.mean), stats[all + group] = A(m.mean - double(A(m.mean)));
  stats[2 * all + group] = A(1 / std::sqrt(var + a.eps)), stats[3 * all + group] = A(var);
}

bool streams_forward(const GroupNormForward& a, int64_t run) {
  const int64_t size = size_of(a.dtype), bytes = a.n * a.c * a.hw * size;
  return streams(a.y, bytes, run * size, (a.residual ? 3 : 2) * bytes);
}

// ---- Planes ---------------------------------------------------------------------------------------------------------

constexpr int64_t kAhead = 512;        // elements
constexpr int64_t kLarge = 512 << 10;  // bytes; a larger group leaves the L2 cache before its second pass

// Coefficients of short planes' elements, from parameters that are repeated for each.
template <class T>
struct PerElement {
  using A = Accumulate<T>;
  A mean, mean_low, rstd;
  const A *weight, *bias;

  Pack<A> get(Coefficient k, int64_t i) const {
    if (k == kMean) return Pack<A>(mean);
    const Pack<A> scale = Pack<A>(rstd) * load(weight + i, Full<A>());
    return k == kScale ? scale : load(bias + i, Full<A>()) - Pack<A>(mean_low) * scale;
  }
  PerElement from(int64_t i) const { return {mean, mean_low, rstd, weight + i, bias + i}; }
};

struct GroupPlanes {
  int64_t channels, len, segments, pieces;  // of a group; pieces of a plane
  int64_t ahead;                            // to the next group, where that fits the cache beside this one
  bool together;                            // planes shorter than a vector; their bits each begin a byte, though

  template <class T>
  GroupPlanes(const GroupNormForward& a, T)
      : channels(a.c / a.groups),
        len(channels * a.hw),
        segments((len + kSegment - 1) / kSegment),
        pieces((a.hw + kPiece - 1) / kPiece),
        ahead(len * int64_t(sizeof(T)) <= kLarge ? len : 0),
        together(a.hw < kLanes<T> && !a.mask) {}
  bool each(const GroupNormForward& a) const { return together || one_each(a.n * a.groups, a.threads); }
};

template <class T>
Moments segment_moments(const GroupNormForward& a, const GroupPlanes& planes, int64_t group, int64_t j) {
  const T* const x = static_cast<const T*>(a.x) + group * planes.len + j * kSegment;
  const int64_t len = std::min(kSegment, planes.len - j * kSegment);
  const int64_t ahead = 2048;
  ShiftedSums<T> sums(x, len);
  sums.add(x, len, new_lanes<T>(len), ahead);
  return sums.moments(double(len));
}

template <class T>
void finish_group(const GroupNormForward& a, const GroupPlanes& planes, int64_t group, Moments m) {
  if (!m.finite()) m = wide_moments(static_cast<const T*>(a.x) + group * planes.len, 1, 0, planes.len);
  set_stats<Accumulate<T>>(a, group, m);
}

// `count` pieces of a group.
template <class T>
[[gnu::noinline]] void normalize_pieces(const GroupNormForward& a, const GroupPlanes& planes,
                                        const Parameters<T>& parameters, int64_t group, int64_t first, int64_t count,
                                        bool backwards, bool streaming) {
  using A = Accumulate<T>;
  const GroupStats<A> stats(a, group);
  const int64_t c = group % a.groups * planes.channels;
  normalize<T>(a, {planes.ahead, kAhead, kAhead}, streaming, [&](auto write) {
    for (int64_t i = 0; i < count; i++) {
      const int64_t piece = first + (backwards ? count - 1 - i : i), k = piece / planes.pieces,
                    plane = group * planes.channels + k, at = piece % planes.pieces * kPiece;
      write(Uniform<A>(stats.channel(parameters.weight[c + k], parameters.bias[c + k])), plane * a.hw + at,
            std::min(kPiece, a.hw - at), a.mask ? a.mask + plane * ((a.hw + 7) / 8) + at / 8 : nullptr);
    }
  });
}

template <class T>
[[gnu::noinline]] void normalize_together(const GroupNormForward& a, const GroupPlanes& planes,
                                          const Parameters<T>& parameters, int64_t group, bool streaming) {
  const GroupStats<Accumulate<T>> stats(a, group);
  const int64_t at = group % a.groups * planes.len;
  const PerElement<T> coefficients{stats.mean, stats.mean_low, stats.rstd, parameters.weight + at,
                                   parameters.bias + at};
  normalize<T>(a, {planes.ahead, kAhead, kAhead}, streaming,
               [&](auto write) { write(coefficients, group * planes.len, planes.len, nullptr); });
}

template <class T>
void normalize_group(const GroupNormForward& a, const GroupPlanes& planes, const Parameters<T>& parameters,
                     int64_t group, bool streaming) {
  if (planes.together) return normalize_together(a, planes, parameters, group, streaming);
  const bool backwards = planes.len * int64_t(sizeof(T)) > kLarge;  // what was read last is the hottest
  normalize_pieces(a, planes, parameters, group, 0, planes.channels * planes.pieces, backwards, streaming);
}

template <class T>
void forward_planes(const GroupNormForward& a) {
  const GroupPlanes planes(a, T());
  const int64_t groups = a.n * a.groups;
  Arena arena(a.workspace);
  const Parameters<T> parameters(arena, a.c, planes.together ? a.hw : 1);
  parameters.read_from(a);
  const bool streaming = streams_forward(a, planes.together ? planes.len : a.hw);
  if (planes.each(a)) {
    const int64_t step = std::max<int64_t>(1, std::min(kPiece / planes.len, groups / (4 * a.threads)));
    parallel(a.threads, [&](Team team) {
      team.for_each((groups + step - 1) / step, [&](int64_t task) {
        for (int64_t g = task * step; g < std::min(groups, (task + 1) * step); g++) {
          Moments m;
          for (int64_t j = 0; j < planes.segments; j++) m.merge(segment_moments<T>(a, planes, g, j));
          finish_group<T>(a, planes, g, m);
          normalize_group(a, planes, parameters, g, streaming);
        }
      });
    });
    return;
  }
  auto* const partial = arena.take<Moments>(groups * planes.segments);
  parallel(a.threads, [&](Team team) {
    team.for_each(groups * planes.segments, [&](int64_t i) {
      partial[i] = segment_moments<T>(a, planes, i / planes.segments, i % planes.segments);
    });
    team.for_each(groups, [&](int64_t g) {
      Moments m;
      for (int64_t j = 0; j < planes.segments; j++) m.merge(partial[g * planes.segments + j]);
      finish_group<T>(a, planes, g, m);
    });
    const int64_t pieces = planes.channels * planes.pieces;
    team.for_each(groups * pieces, [&](int64_t j) {
      const int64_t i = groups * pieces - 1 - j;
      normalize_pieces(a, planes, parameters, i / pieces, i % pieces, 1, false, streaming);
    });
  });
}

// ---- Rows -----------------------------------------------------------------------------------------------------------

// Merges a sample's chunks, then each group's channels.
template <class T>
void finish_sample(const GroupNormForward& a, const SampleRows<T>& work, int64_t sample, int64_t slot) {
  merge_chunk_moments(work.rows, 0, a.c, [&](int64_t i, int which) { return work.chunk_sums(slot, i, which); });
  const double *const mean = work.chunk_sums(slot, 0, 0), *const m2 = work.chunk_sums(slot, 0, 1);
  const int64_t channels = a.c / a.groups;
  for (int64_t g = 0; g < a.groups; g++) {
    Moments m{double(channels) * double(a.hw), 0, 0};
    for (int64_t c = g * channels; c < (g + 1) * channels; c++) m.mean += mean[c];
    m.mean /= double(channels);
    for (int64_t c = g * channels; c < (g + 1) * channels; c++)
      m.m2 += m2[c] + double(a.hw) * (mean[c] - m.mean) * (mean[c] - m.mean);
    if (!m.finite())
      m = wide_moments(static_cast<const T*>(a.x) + sample * a.hw * a.c + g * channels, a.hw, a.c, channels);
    set_stats<Accumulate<T>>(a, sample * a.groups + g, m);
  }
  work.set_columns(a, sample, slot, nullptr);
}

template <class T>
void forward_rows(const GroupNormForward& a) {
  const bool each = one_each(a.n, a.threads);
  Arena arena(a.workspace);
  const SampleRows<T> work(a, arena, each);
  work.parameters.read_from(a);
  const Rows<T>& rows = work.rows;
  const bool streaming = streams_forward(a, std::gcd(rows.columns, rows.total));
  auto moments = [&](int64_t sample, int64_t slot, int64_t i, int rank) {
    chunk_moments(static_cast<const T*>(a.x) + sample * rows.total, rows, i * rows.chunk, rows.chunk_end(i),
                  work.chunk_sums(slot, i, 0), work.chunk_sums(slot, i, 1), work.thread_scratch(rank, 0),
                  work.thread_scratch(rank, 1), work.thread_scratch(rank, 2));
  };
  auto write = [&](int64_t sample, int64_t slot, int64_t i, int64_t x_ahead) {
    normalize_chunk(sample_of(a, sample), rows, work.columns(slot), i, x_ahead, streaming);
  };
  parallel(a.threads, [&](Team team) {
    if (each) {
      const int64_t step = std::max<int64_t>(1, std::min(kPiece / rows.total, a.n / (4 * a.threads)));
      team.for_each((a.n + step - 1) / step, [&](int64_t task) {
        for (int64_t s = task * step; s < std::min(a.n, (task + 1) * step); s++) {
          for (int64_t i = 0; i < rows.chunks; i++) moments(s, team.rank, i, team.rank);
          finish_sample(a, work, s, team.rank);
          for (int64_t i = rows.chunks - 1; i >= 0; i--)
            write(s, team.rank, i, rows.total + (rows.chunks - 1 - 2 * i) * rows.chunk);
        }
      });
      return;
    }
    const int64_t chunks = a.n * rows.chunks;
    team.for_each(chunks, [&](int64_t i) { moments(i / rows.chunks, i / rows.chunks, i % rows.chunks, team.rank); });
    team.for_each(a.n, [&](int64_t s) { finish_sample(a, work, s, s); });
    team.for_each(chunks, [&](int64_t j) {
      const int64_t i = chunks - 1 - j;
      write(i / rows.chunks, i / rows.chunks, i % rows.chunks, kRowsAhead);
    });
  });
}

}  // namespace

size_t group_norm_forward_workspace(const GroupNormForward& a) {
  Arena arena(nullptr);
  with_type(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (a.channels_last) {
      SampleRows<T>(a, arena, one_each(a.n, a.threads));
    } else {
      const GroupPlanes planes(a, zero);
      Parameters<T>(arena, a.c, planes.together ? a.hw : 1);
      if (!planes.each(a)) arena.take<Moments>(a.n * a.groups * planes.segments);
    }
  });
  return arena.used;
}

void group_norm_forward(const GroupNormForward& a) {
  prefer_huge_pages(a.y, a.n * a.c * a.hw * size_of(a.dtype));
  with_type(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    a.channels_last ? forward_rows<T>(a) : forward_planes<T>(a);
  });
}

}  // namespace fastnorm::cpu::CPU_CAPABILITY
