// Group norm backward on the CPU; ../group_norm.h has the formulas.
//
//   db = sum of dz, ds = sum of dz * xhat, per sample and channel;  dweight = sum of ds, dbias = sum of db over samples
//   s1 = sum of weight * db, s2 = sum of weight * ds, over the channels of a group of m elements
//   dx = dz * scale - (s1 / m + xhat * s2 / m) * rstd = dz * scale + (offset + (x - mean) * slope)
//
// As forward: a group (planes) or a sample (rows) at once, its x and dy read from memory once.  Parameter gradients are
// added up over blocks of samples in the order of the samples, then over the blocks: the partition is the shape's
// alone. Floor: 3 S (S: bytes of x), 4 S with a residual's gradient.
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

struct Sums {
  double dz = 0, dz_centered = 0;  // centered: x - mean, where mean lacks its low word

  void add(const Sums& o) { dz += o.dz, dz_centered += o.dz_centered; }
};

// Blocks of samples, and the parameters' gradients of each: double [blocks][2][c].
struct SampleBlocks {
  int64_t n, c, block, blocks;
  double* partial;

  SampleBlocks(const GroupNormBackward& a, Arena& arena)
      : n(a.n),
        c(a.c),
        block(std::max({int64_t(1), (n + 63) / 64, 16 / a.hw})),
        blocks((n + block - 1) / block),
        partial(arena.take<double>(blocks * 2 * c)) {}
  int64_t end(int64_t i) const { return std::min(n, (i + 1) * block); }
  double* dweight(int64_t sample) const { return partial + sample / block * 2 * c; }
  double* dbias(int64_t sample) const { return dweight(sample) + c; }
  void clear(int64_t i, int64_t first, int64_t last) const {
    for (double* const p : {dweight(i * block), dbias(i * block)}) std::fill(p + first, p + last, 0.0);
  }
  void write_gradients(const GroupNormBackward& a, Team team) const {
    if (!a.dweight && !a.dbias) return;
    team.for_each((c + 255) / 256, [&](int64_t part) {
      for (int64_t i = part * 256; i < std::min(c, (part + 1) * 256); i++) {
        double dweight = 0, dbias = 0;
        for (int64_t k = 0; k < blocks; k++) dweight += partial[2 * k * c + i], dbias += partial[(2 * k + 1) * c + i];
        write(a.dweight, a.param_dtype, i, dweight), write(a.dbias, a.param_dtype, i, dbias);
      }
    });
  }
};

// offset and slope of a group from sums(channel), and the channels' share in the parameters' gradients.
template <class T, class F>
void finish_group(const GroupNormBackward& a, const Parameters<T>& parameters, const SampleBlocks& blocks,
                  int64_t sample, int64_t group, Accumulate<T>* offset_and_slope, F sums) {
  using A = Accumulate<T>;
  const GroupStats<A> stats(a, sample * a.groups + group);
  const double low = double(stats.mean_low), rstd = double(stats.rstd);
  const int64_t channels = a.c / a.groups;
  double s1 = 0, s2 = 0, *const dweight = blocks.dweight(sample), *const dbias = blocks.dbias(sample);
  for (int64_t k = 0; k < channels; k++) {
    const int64_t c = group * channels + k;
    const Sums s = sums(k);
    const double ds = (s.dz_centered - low * s.dz) * rstd, w = double(parameters.weight[c]);
    s1 += w * s.dz, s2 += w * ds;
    dweight[c] += ds, dbias[c] += s.dz;
  }
  const double scale = rstd / (double(channels) * double(a.hw)), slope = -s2 * scale * rstd;
  offset_and_slope[0] = A(-s1 * scale - low * slope), offset_and_slope[1] = A(slope);
}

struct GroupGradient {
  auto operator()(const auto& g, const auto& c, int64_t i) const {
    return fmadd(g.dz, c.get(kScale, i), fmadd(g.centered, c.get(kSlope, i), c.get(kOffset, i)));
  }
};

bool streams_backward(const GroupNormBackward& a, int64_t run) {
  const int64_t size = size_of(a.dtype), bytes = a.n * a.c * a.hw * size;
  const int64_t touched = (2 + (a.dx != nullptr) + (a.dresidual != nullptr)) * bytes;
  return streams(a.dx, bytes, run * size, touched) && streams(a.dresidual, bytes, run * size, touched);
}

// ---- Planes ---------------------------------------------------------------------------------------------------------

constexpr int64_t kAhead = 512, kReadAhead = 2048;  // elements
// Bytes of x, beside which the next group is fetched; and of slopes, which are kept for the second pass.
constexpr int64_t kCachedGroup = 256 << 10;

struct GroupPlanes {
  int64_t channels, len, segments, pieces;  // channels and elements of a group; segments and pieces of a plane
  int64_t padded;                           // elements of a plane's slopes
  bool each, keeps;                         // keeps: slopes of a group for the second pass

  template <class T>
  GroupPlanes(const GroupNormBackward& a, const SampleBlocks& blocks, T)
      : channels(a.c / a.groups),
        len(channels * a.hw),
        segments((a.hw + kSegment - 1) / kSegment),
        pieces((a.hw + kPiece - 1) / kPiece),
        padded((a.hw + kLanes<T> - 1) / kLanes<T> * kLanes<T>),
        each(one_each(blocks.blocks * a.groups, a.threads)),
        keeps(slope_of(a.activation, a.mask, a.residual) == Slope::kKept && (a.dx || a.dresidual) &&
              len * int64_t(sizeof(Accumulate<T>)) <= kCachedGroup) {}
};

template <class T>
struct PlanesWorkspace {
  using A = Accumulate<T>;
  Arena arena;
  Parameters<T> parameters;
  SampleBlocks blocks;
  GroupPlanes planes;
  Sums* sums;           // [threads][channels][segments], or where groups are shared [n * c][segments]
  A* offset_and_slope;  // where groups are shared [n * groups][2]
  A* kept;              // [threads][channels][padded]

  explicit PlanesWorkspace(const GroupNormBackward& a)
      : arena(a.workspace), parameters(arena, a.c, 1), blocks(a, arena), planes(a, blocks, T()) {
    sums = arena.take<Sums>((planes.each ? a.threads * planes.channels : a.n * a.c) * planes.segments);
    offset_and_slope = arena.take<A>(planes.each ? 0 : a.n * a.groups * 2);
    kept = arena.take<A>(planes.each && planes.keeps ? a.threads * planes.channels * planes.padded : 0);
  }
};

// kept: where the slopes of the plane go, or null.
template <class T, Slope slope>
[[gnu::always_inline]] inline Sums segment_sums(const GroupNormBackward& a, const Uniform<Accumulate<T>> coefficients,
                                                int64_t plane, int64_t j, Accumulate<T>* kept) {
  using A = Accumulate<T>;
  const int64_t offset = j * kSegment, len = std::min(kSegment, a.hw - offset), at = plane * a.hw + offset;
  const uint8_t* const mask = a.mask + (a.mask ? plane * ((a.hw + 7) / 8) + offset / 8 : 0);
  const auto lanes = new_lanes<T>(len);
  alignas(64) A own[slope == Slope::kKept ? kSegment : 1];
  A* const slopes = kept ? kept + offset : own;
  if constexpr (slope == Slope::kKept) keep_slopes<T>(a, coefficients, at, len, slopes);
  Pack<A> sum(A(0)), product(A(0));
  for_packs<T>(len, [&](int64_t i, auto count, auto again) {
    prefetch(static_cast<const T*>(a.x) + at + i + kReadAhead);
    prefetch(static_cast<const T*>(a.dy) + at + i + kReadAhead);
    const Gradient<T, slope, Uniform<A>> g(a, coefficients, at + i, i, mask, slopes, count, again);
    const auto dz = keep(lanes, g.dz, count, again);
    sum = sum + dz, product = fmadd(dz, g.centered, product);
  });
  return {double(sum.sum()), double(product.sum())};
}

// The sums of `channels` planes of a group from `plane` on, in the segments [first, last) of each.
template <class T>
[[gnu::noinline]] void add_planes(const GroupNormBackward& a, const PlanesWorkspace<T>& work, int64_t plane,
                                  int64_t channels, int64_t first, int64_t last, Accumulate<T>* kept, Sums* sums) {
  using A = Accumulate<T>;
  const GroupStats<A> stats(a, plane / work.planes.channels);
  const A *const w = work.parameters.weight + plane % a.c, *const b = work.parameters.bias + plane % a.c;
  with_slope(slope_of(a.activation, a.mask, a.residual), [&](auto slope) {
    for (int64_t k = 0; k < channels; k++) {
      const Uniform<A> coefficients(stats.channel(w[k], b[k]));
      for (int64_t j = first; j < last; j++)
        *sums++ = segment_sums<T, slope>(a, coefficients, plane + k, j, kept ? kept + k * work.planes.padded : nullptr);
    }
  });
}

// dx and dresidual of such planes, in the pieces [first, last) of each; backwards, as what was read last is the
// hottest.
template <class T>
[[gnu::noinline]] void write_planes(const GroupNormBackward& a, const PlanesWorkspace<T>& work, int64_t plane,
                                    int64_t channels, int64_t first, int64_t last,
                                    const Accumulate<T>* offset_and_slope, const Accumulate<T>* kept, bool backwards,
                                    int64_t read_ahead, bool streaming) {
  using A = Accumulate<T>;
  const GroupStats<A> stats(a, plane / work.planes.channels);
  const A *const w = work.parameters.weight + plane % a.c, *const b = work.parameters.bias + plane % a.c;
  backward_spans<T>(a, kAhead, streaming, GroupGradient(), [&](auto write) {
    for (int64_t i = 0; i < channels; i++) {
      const int64_t k = backwards ? channels - 1 - i : i;
      const Uniform<A> coefficients(stats.channel(w[k], b[k], offset_and_slope));
      for (int64_t piece = last - 1; piece >= first; piece--) {
        const int64_t at = piece * kPiece;
        write(coefficients, (plane + k) * a.hw + at, std::min(kPiece, a.hw - at),
              a.mask ? a.mask + (plane + k) * ((a.hw + 7) / 8) + at / 8 : nullptr,
              kept ? kept + k * work.planes.padded + at : nullptr, read_ahead);
      }
    }
  });
}

template <class T>
void finish_planes(const GroupNormBackward& a, const PlanesWorkspace<T>& work, int64_t group, const Sums* sums,
                   Accumulate<T>* offset_and_slope) {
  finish_group(a, work.parameters, work.blocks, group / a.groups, group % a.groups, offset_and_slope, [&](int64_t k) {
    Sums s;
    for (int64_t j = 0; j < work.planes.segments; j++) s.add(sums[k * work.planes.segments + j]);
    return s;
  });
}

// A group at once, by one thread.
template <class T>
void backward_group(const GroupNormBackward& a, const PlanesWorkspace<T>& work, int64_t group, int rank,
                    bool second_pass, bool streaming) {
  using A = Accumulate<T>;
  const GroupPlanes& planes = work.planes;
  const int64_t plane = group * planes.channels;
  A* const kept = planes.keeps ? work.kept + rank * planes.channels * planes.padded : nullptr;
  const bool cached = second_pass && planes.len * int64_t(sizeof(T)) <= kCachedGroup;
  Sums* const sums = work.sums + rank * planes.channels * planes.segments;
  add_planes(a, work, plane, planes.channels, 0, planes.segments, kept, sums);
  A offset_and_slope[2];
  finish_planes(a, work, group, sums, offset_and_slope);
  if (second_pass)
    write_planes(a, work, plane, planes.channels, 0, planes.pieces, offset_and_slope, kept, !cached,
                 cached ? planes.len : kReadAhead, streaming);
}

template <class T>
void backward_planes(const GroupNormBackward& a) {
  const PlanesWorkspace<T> work(a);
  const GroupPlanes& planes = work.planes;
  const SampleBlocks& blocks = work.blocks;
  work.parameters.read_from(a);
  const bool second_pass = a.dx || a.dresidual, streaming = streams_backward(a, a.hw);
  parallel(a.threads, [&](Team team) {
    if (planes.each) {
      const int64_t ranges = a.threads == 1 ? 1 : std::clamp<int64_t>(4 * a.threads / blocks.blocks, 1, a.groups);
      team.for_each(blocks.blocks * ranges, [&](int64_t task) {
        const int64_t block = task / ranges, first = task % ranges * a.groups / ranges,
                      last = (task % ranges + 1) * a.groups / ranges;
        blocks.clear(block, first * planes.channels, last * planes.channels);
        for (int64_t sample = block * blocks.block; sample < blocks.end(block); sample++)
          for (int64_t g = first; g < last; g++)
            backward_group(a, work, sample * a.groups + g, team.rank, second_pass, streaming);
      });
    } else {
      const int64_t segments = a.n * a.c * planes.segments, pieces = a.n * a.c * planes.pieces;
      team.for_each(segments, [&](int64_t i) {
        const int64_t j = i % planes.segments;
        add_planes<T>(a, work, i / planes.segments, 1, j, j + 1, nullptr, work.sums + i);
      });
      team.for_each(blocks.blocks, [&](int64_t block) {
        blocks.clear(block, 0, a.c);
        for (int64_t i = block * blocks.block * a.groups; i < blocks.end(block) * a.groups; i++)
          finish_planes(a, work, i, work.sums + i * planes.channels * planes.segments, work.offset_and_slope + 2 * i);
      });
      if (second_pass)
        team.for_each(pieces, [&](int64_t j) {
          const int64_t i = pieces - 1 - j, plane = i / planes.pieces, piece = i % planes.pieces;
          write_planes<T>(a, work, plane, 1, piece, piece + 1, work.offset_and_slope + plane / planes.channels * 2,
                          nullptr, true, 0, streaming);
        });
    }
    blocks.write_gradients(a, team);
  });
}

// ---- Rows -----------------------------------------------------------------------------------------------------------

template <class T>
struct RowsWorkspace {
  Arena arena;
  SampleBlocks blocks;
  bool each;
  SampleRows<T> rows;
  Accumulate<T>* offset_and_slope;  // [slots][groups][2]

  explicit RowsWorkspace(const GroupNormBackward& a)
      : arena(a.workspace), blocks(a, arena), each(one_each(blocks.blocks, a.threads)), rows(a, arena, each) {
    offset_and_slope = arena.take<Accumulate<T>>((each ? a.threads : a.n) * a.groups * 2);
  }
};

template <class T>
void finish_sample(const GroupNormBackward& a, const RowsWorkspace<T>& work, int64_t sample, int64_t slot) {
  double *const dz = work.rows.chunk_sums(slot, 0, 0), *const dz_centered = work.rows.chunk_sums(slot, 0, 1);
  for (int64_t i = 1; i < work.rows.rows.chunks; i++) {
    const double *const other = work.rows.chunk_sums(slot, i, 0), *const other_centered = other + a.c;
    for (int64_t c = 0; c < a.c; c++) dz[c] += other[c], dz_centered[c] += other_centered[c];
  }
  auto* const offset_and_slope = work.offset_and_slope + slot * a.groups * 2;
  for (int64_t g = 0; g < a.groups; g++) {
    const int64_t first = g * (a.c / a.groups);
    finish_group(a, work.rows.parameters, work.blocks, sample, g, offset_and_slope + 2 * g,
                 [&](int64_t k) { return Sums{dz[first + k], dz_centered[first + k]}; });
  }
  work.rows.set_columns(a, sample, slot, offset_and_slope);
}

template <class T>
void backward_rows(const GroupNormBackward& a) {
  const RowsWorkspace<T> work(a);
  const Rows<T>& rows = work.rows.rows;
  const SampleBlocks& blocks = work.blocks;
  work.rows.parameters.read_from(a);
  const bool second_pass = a.dx || a.dresidual, streaming = streams_backward(a, std::gcd(rows.columns, rows.total));
  auto sums = [&](int64_t sample, int64_t slot, int64_t i, int rank) {
    with_slope(slope_of(a.activation, a.mask, a.residual), [&](auto slope) {
      chunk_sums<T, slope>(sample_of(a, sample), rows, work.rows.columns(slot), i * rows.chunk, rows.chunk_end(i),
                           work.rows.chunk_sums(slot, i, 0), work.rows.chunk_sums(slot, i, 1),
                           work.rows.thread_scratch(rank, 0), work.rows.thread_scratch(rank, 1), [](const auto&...) {});
    });
  };
  auto write_chunk = [&](int64_t sample, int64_t slot, int64_t i, int64_t read_ahead) {
    backward_chunk(sample_of(a, sample), rows, work.rows.columns(slot), i, read_ahead, streaming, GroupGradient());
  };
  parallel(a.threads, [&](Team team) {
    if (work.each) {
      team.for_each(blocks.blocks, [&](int64_t block) {
        blocks.clear(block, 0, a.c);
        for (int64_t s = block * blocks.block; s < blocks.end(block); s++) {
          work.rows.set_columns(a, s, team.rank, nullptr);
          for (int64_t i = 0; i < rows.chunks; i++) sums(s, team.rank, i, team.rank);
          finish_sample(a, work, s, team.rank);
          for (int64_t i = rows.chunks - 1; second_pass && i >= 0; i--)
            write_chunk(s, team.rank, i, rows.total + (rows.chunks - 1 - 2 * i) * rows.chunk);
        }
      });
    } else {
      const int64_t chunks = a.n * rows.chunks;
      team.for_each(a.n, [&](int64_t s) { work.rows.set_columns(a, s, s, nullptr); });
      team.for_each(chunks, [&](int64_t i) { sums(i / rows.chunks, i / rows.chunks, i % rows.chunks, team.rank); });
      team.for_each(blocks.blocks, [&](int64_t block) {
        blocks.clear(block, 0, a.c);
        for (int64_t s = block * blocks.block; s < blocks.end(block); s++) finish_sample(a, work, s, s);
      });
      if (second_pass)
        team.for_each(chunks, [&](int64_t j) {
          const int64_t i = chunks - 1 - j;
          write_chunk(i / rows.chunks, i / rows.chunks, i % rows.chunks, kRowsAhead);
        });
    }
    blocks.write_gradients(a, team);
  });
}

}  // namespace

size_t group_norm_backward_workspace(const GroupNormBackward& a) {
  size_t bytes = 0;
  GroupNormBackward none = a;
  none.workspace = nullptr;
  with_type(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    bytes = a.channels_last ? RowsWorkspace<T>(none).arena.used : PlanesWorkspace<T>(none).arena.used;
  });
  return bytes;
}

void group_norm_backward(const GroupNormBackward& a) {
  prefer_huge_pages(a.dx, a.n * a.c * a.hw * size_of(a.dtype));
  prefer_huge_pages(a.dresidual, a.n * a.c * a.hw * size_of(a.dtype));
  with_type(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    a.channels_last ? backward_rows<T>(a) : backward_planes<T>(a);
  });
}

}  // namespace fastnorm::cpu::CPU_CAPABILITY
