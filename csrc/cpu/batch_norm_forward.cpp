// Batch norm forward on the CPU; ../batch_norm.h has the formulas.
//
// Planes ([n][c][hw]): a channel usually fits the L2 cache, so its statistics are taken and it is normalised at once:
// one
//   read and one write of memory.  With too few channels for the threads to share, all statistics come first.
// Rows (channels_last, [n * hw][c]): two passes, the second one backwards over chunks of 256 KB.  Several short rows
// are
//   one wide row whose length is a multiple of a vector, so that no channel count needs a scalar tail.
// Floor: 2 S (S: bytes of x), 3 S with a residual; rows read x twice where it does not stay in the caches.
#include "../batch_norm.h"
#include "batch_norm_rows.h"
#include "channel_norm.h"
#include "moments.h"
#include "output.h"
#include "parallel.h"
#include "vector.h"

namespace fastnorm::cpu::CPU_CAPABILITY {
namespace {

template <class A>
Channel<A> finish_forward(const BatchNormForward& a, int64_t c, const Moments* batch) {
  double mean, var;
  if (batch) {
    mean = batch->mean, var = batch->m2 / batch->n;
    if (a.running_mean) {
      const double m = a.cumulative ? 1.0 / double(*a.num_batches_tracked) : a.momentum;
      const double unbiased = batch->m2 / (batch->n - 1);
      write(a.running_mean, a.running_dtype, c, m * mean + (1 - m) * read(a.running_mean, a.running_dtype, c, 0));
      write(a.running_var, a.running_dtype, c, m * unbiased + (1 - m) * read(a.running_var, a.running_dtype, c, 0));
    }
  } else {
    mean = read(a.running_mean, a.running_dtype, c, 0), var = read(a.running_var, a.running_dtype, c, 0);
  }
  A* const stats = static_cast<A*>(a.stats);
  stats[c] = A(mean), stats[a.c + c] = A(mean - double(A(mean))), stats[2 * a.c + c] = A(1 / std::sqrt(var + a.eps));
  return Channel<A>(stats[c], stats[a.c + c], stats[2 * a.c + c], read(a.weight, a.param_dtype, c, 1),
                    read(a.bias, a.param_dtype, c, 0));
}

// ---- Forward --------------------------------------------------------------------------------------------------------

constexpr int64_t kWriteAhead = 512;  // elements, where planes follow each other in memory

// Planes of a sample that follow each other, and their channels.
template <class T>
[[gnu::noinline]] void write_planes(const BatchNormForward& a, const Channel<Accumulate<T>>* channels, int64_t first,
                                    int64_t planes, int64_t write_ahead, bool streaming) {
  normalize<T>(a, {0, 0, write_ahead}, streaming, [&](auto write) {
    for (int64_t i = 0; i < planes; i++)
      write(Uniform<Accumulate<T>>(channels[i]), (first + i) * a.hw, a.hw,
            a.mask ? a.mask + (first + i) * ((a.hw + 7) / 8) : nullptr, first / a.c * a.x_gap);
  });
}

// Merges segment j of `channels` channels from c on into their moments.
template <class T>
void add_segment(const BatchNormForward& a, const Segments& segments, int64_t c, int64_t channels, int64_t j,
                 Moments* moments) {
  segments.visit(j, [&](int64_t plane, int64_t planes, int64_t offset, int64_t len) {
    const T* const x = static_cast<const T*>(a.x) + c * a.hw + offset;
    const int64_t stride = a.c * a.hw;
    const auto lanes = new_lanes<T>(len);
    ShiftedSums<T> sums[kMaxGroup];
    for (int64_t k = 0; k < channels; k++) sums[k] = ShiftedSums<T>(x + plane * stride + k * a.hw, len);
    for (int64_t n = plane; n < plane + planes; n++) {
      const int64_t ahead = offset + len < a.hw ? len
                            : n + 1 < a.n       ? stride - offset
                                                : channels * a.hw - n * stride - offset;
      for (int64_t k = 0; k < channels; k++) sums[k].add(x + n * stride + k * a.hw, len, lanes, ahead);
    }
    for (int64_t k = 0; k < channels; k++) moments[k].merge(sums[k].moments(double(planes) * len));
  });
}

bool streams_forward(const BatchNormForward& a, int64_t run) {
  const int64_t size = size_of(a.dtype), bytes = a.n * a.c * a.hw * size;
  return a.y != a.x && streams(a.y, bytes, run * size, (a.residual ? 3 : 2) * bytes);
}

template <class T>
void forward_planes(const BatchNormForward& a) {
  using A = Accumulate<T>;
  const int64_t stride = a.c * a.hw;
  const bool streaming = streams_forward(a, a.hw);
  if (!a.training) {
    auto* const channels = static_cast<Channel<A>*>(a.workspace);
    for (int64_t c = 0; c < a.c; c++) channels[c] = finish_forward<A>(a, c, nullptr);
    const int64_t planes = a.n * a.c, step = std::max<int64_t>(1, 65536 / a.hw);
    parallel(a.threads, [&](Team team) {
      team.for_each((planes + step - 1) / step, [&](int64_t block) {
        const int64_t end = std::min(planes, (block + 1) * step);
        for (int64_t p = block * step, run; p < end; p += run) {
          run = std::min(end - p, a.c - p % a.c);
          write_planes<T>(a, channels + p % a.c, p, run, kWriteAhead, streaming);
        }
      });
    });
    return;
  }
  const Segments segments(a.n, a.hw);
  auto finish = [&](int64_t c, Moments m) {
    if (!m.finite()) m = wide_moments(static_cast<const T*>(a.x) + c * a.hw, a.n, stride, a.hw);
    return finish_forward<A>(a, c, &m);
  };
  if (a.threads == 1 || a.c >= 4 * a.threads) {
    const int64_t group = channel_group(a.n, a.c, a.hw, sizeof(T), a.threads);
    parallel(a.threads, [&](Team team) {
      team.for_each((a.c + group - 1) / group, [&](int64_t g) {
        const int64_t first = g * group, channels = std::min(group, a.c - first);
        Moments moments[kMaxGroup];
        Channel<A> coefficients[kMaxGroup];
        for (int64_t j = 0; j < segments.count(); j++) add_segment<T>(a, segments, first, channels, j, moments);
        for (int64_t k = 0; k < channels; k++) coefficients[k] = finish(first + k, moments[k]);
        // Backwards: the planes read last are the hottest.
        for (int64_t n = a.n - 1; a.y && n >= 0; n--)
          write_planes<T>(a, coefficients, n * a.c + first, channels, n ? -stride : 0, streaming);
      });
    });
    return;
  }
  auto* const partial = static_cast<Moments*>(a.workspace);  // [c][segments]
  auto* const channels = reinterpret_cast<Channel<A>*>(partial + a.c * segments.count());
  parallel(a.threads, [&](Team team) {
    team.for_each(a.c * segments.count(), [&](int64_t i) {
      const int64_t c = i / segments.count(), j = i % segments.count();
      partial[i] = Moments{};
      add_segment<T>(a, segments, c, 1, j, &partial[i]);
    });
    team.for_each(a.c, [&](int64_t c) {
      Moments m;
      for (int64_t j = 0; j < segments.count(); j++) m.merge(partial[c * segments.count() + j]);
      channels[c] = finish(c, m);
    });
    if (!a.y) return;
    team.for_each(a.n * a.c, [&](int64_t i) {
      const int64_t plane = a.n * a.c - 1 - i;
      write_planes<T>(a, channels + plane % a.c, plane, 1, 0, streaming);
    });
  });
}

template <class T>
Rows<T> rows_of(const BatchNormForward& a) {
  return Rows<T>(a.n * a.hw, a.c, a.x_gap != 0);
}

template <class T>
void forward_rows(const BatchNormForward& a) {
  using A = Accumulate<T>;
  const Rows<T> rows = rows_of<T>(a);
  const RowsWorkspace<T> work(rows, a.workspace);
  const PerColumn<A> coefficients{work.coefficients, rows.padded()};
  const T* const x = static_cast<const T*>(a.x);
  const bool streaming = streams_forward(a, rows.columns);
  parallel(a.threads, [&](Team team) {
    if (a.training)
      team.for_each(rows.chunks, [&](int64_t i) {
        chunk_moments(x, rows, i * rows.chunk, rows.chunk_end(i), work.chunk_sums(rows, i, 0),
                      work.chunk_sums(rows, i, 1), work.thread_scratch(team.rank, 0), work.thread_scratch(team.rank, 1),
                      work.thread_scratch(team.rank, 2));
      });
    team.for_each(rows.channel_blocks(), [&](int64_t block) {
      rows.visit_channels(block, [&](int64_t first, int64_t last) {
        double *const mean = work.chunk_sums(rows, 0, 0), *const m2 = work.chunk_sums(rows, 0, 1);
        if (a.training)
          merge_chunk_moments(rows, first, last, [&](int64_t i, int which) { return work.chunk_sums(rows, i, which); });
        for (int64_t c = first; c < last; c++) {
          Moments m{double(a.n * a.hw), a.training ? mean[c] : 0, a.training ? m2[c] : 0};
          if (!m.finite()) m = wide_moments(x + c, a.n * a.hw, a.c, 1);
          rows.set(coefficients, c, finish_forward<A>(a, c, a.training ? &m : nullptr));
        }
      });
    });
    if (!a.y) return;
    team.for_each(rows.chunks, [&](int64_t j) {
      const int64_t i = rows.chunks - 1 - j;
      normalize_chunk(a, rows, coefficients, i, kRowsAhead, streaming, a.x_gap);
    });
  });
}

}  // namespace

size_t batch_norm_forward_workspace(const BatchNormForward& a) {
  size_t bytes = 0;
  with_type(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (a.channels_last)
      bytes = RowsWorkspace<T>::bytes(rows_of<T>(a), a.threads);
    else if (!a.training)
      bytes = a.c * sizeof(Channel<Accumulate<T>>);
    else if (a.threads > 1 && a.c < 4 * a.threads)
      bytes = a.c * (Segments(a.n, a.hw).count() * sizeof(Moments) + sizeof(Channel<Accumulate<T>>));
  });
  return bytes;
}

void batch_norm_forward(const BatchNormForward& a) {
  prefer_huge_pages(a.y, a.n * a.c * a.hw * size_of(a.dtype));
  if (a.training && a.num_batches_tracked) ++*a.num_batches_tracked;
  with_type(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    a.channels_last ? forward_rows<T>(a) : forward_planes<T>(a);
  });
}

}  // namespace fastnorm::cpu::CPU_CAPABILITY
