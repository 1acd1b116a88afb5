// Batch norm on the CPU; ../batch_norm.h has the formulas.
//
// Planes ([n][c][hw]): one channel usually fits the L2 cache, so its statistics are taken and it is normalised at once:
//   one read and one write of memory.  With fewer channels than threads can share, all statistics come first.
// Rows (channels_last, [n * hw][c]): two passes, the second one backwards over blocks of 256 KB.  Several short rows
// are
//   taken for one long row whose length is a multiple of a vector, so that no channel count needs a scalar tail.
// Backward is the same twice: sums of dz and dz * (x - mean) per channel, then dx.
#include "../batch_norm.h"

#include "moments.h"
#include "output.h"
#include "parallel.h"
#include "vector.h"

namespace fastnorm::cpu::CPU_CAPABILITY {
namespace {

// ---- Coefficients per channel ---------------------------------------------------------------------------------------

// z = (x - mean) * scale + shift;  dx = (dz - offset - (x - mean) * slope) * scale
enum Coefficient { kMean, kScale, kShift, kOffset, kSlope, kCoefficients };

template <class A>
struct Channel {
  A v[kCoefficients];

  Channel() = default;
  Channel(A mean, A mean_low, A rstd, double weight, double bias)
      : v{mean, rstd * A(weight), A(bias) - mean_low * (rstd * A(weight)), 0, 0} {}
};

// The same coefficients for every element, as in a plane ...
template <class A>
struct Uniform {
  A v[kCoefficients];

  explicit Uniform(const Channel<A>& c) { std::copy(c.v, c.v + kCoefficients, v); }
  Pack<A> get(Coefficient k, int64_t) const { return Pack<A>(v[k]); }
};

// (passed by value: a vector store may alias anything that has an address, and these belong in registers)
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

// ---- Forward, elementwise -------------------------------------------------------------------------------------------

// kRelu apart from the others, which are told apart at run time: what they compute costs more than the branch.
enum class Kind { kNone, kRelu, kGeneral };

template <Kind kind, class A>
inline Pack<A> apply(const BatchNormForward& a, Pack<A> z) {
  using V = at::vec::Vectorized<A>;
  if constexpr (kind == Kind::kNone) return z;
  if constexpr (kind == Kind::kRelu) return {Math<V>::relu(z.a), Math<V>::relu(z.b)};
  const V slope(A(a.negative_slope));
  return {activate(a.activation, z.a, slope), activate(a.activation, z.b, slope)};
}

// A bit per lane: whether the slope of the activation at z is 1.
template <Kind kind, class A>
inline uint32_t slope_bits(Activation activation, Pack<A> z) {
  const Pack<A> zero(A(0));
  if constexpr (kind == Kind::kRelu) return less_equal(z, zero).unset_bits();
  if (activation == Activation::kRelu6) return (less_equal(z, zero) | less_equal(Pack<A>(A(6)), z)).unset_bits();
  return ~less(zero, z).unset_bits();
}

// y = activation((x - mean) * scale + shift + residual) over len elements from `at` on; mask: their bits.
template <class T, Kind kind, bool kResidual, class Coefficients>
inline void normalize(const BatchNormForward& a, const Coefficients c, int64_t at, int64_t len, uint8_t* mask,
                      int64_t read_ahead, int64_t write_ahead, bool streaming) {
  const T* const x = static_cast<const T*>(a.x) + at;
  const T* const residual = static_cast<const T*>(a.residual) + at;
  T* const y = static_cast<T*>(a.y) + at;
  for_packs<T>(len, [&](int64_t i, auto count, auto again) {
    if (read_ahead) prefetch(x + i + read_ahead);
    if (kResidual && read_ahead) prefetch(residual + i + read_ahead);
    if (write_ahead && !streaming) prefetch<T, true>(y + i + write_ahead);
    auto z = fmadd(load(x + i, count) - c.get(kMean, i), c.get(kScale, i), c.get(kShift, i));
    if constexpr (kResidual) z = z + load(residual + i, count);
    if constexpr (kResidual && kind != Kind::kNone)
      if (mask) store_bits(mask, i, slope_bits<kind>(a.activation, z), count, again);
    store_output(y + i, apply<kind>(a, z), count, again, streaming);
  });
}

// ---- Forward --------------------------------------------------------------------------------------------------------

constexpr int64_t kWriteAhead = 512;  // elements, where planes follow each other in memory

template <class T, Kind kind, bool kResidual>
void forward_plane(const BatchNormForward& a, const Uniform<Accumulate<T>>& coefficients, int64_t plane,
                   int64_t write_ahead, bool streaming) {
  uint8_t* const mask = a.mask ? a.mask + plane * ((a.hw + 7) / 8) : nullptr;
  normalize<T, kind, kResidual>(a, coefficients, plane * a.hw, a.hw, mask, 0, write_ahead, streaming);
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
  const int64_t size = size_of(a.dtype), touched = (a.residual ? 3 : 2) * a.n * a.c * a.hw * size;
  return streams(a.y, run * size, touched);
}

template <class T, Kind kind, bool kResidual>
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
        for (int64_t p = block * step, c = p % a.c; p < std::min(planes, (block + 1) * step); p++) {
          forward_plane<T, kind, kResidual>(a, Uniform<A>(channels[c]), p, kWriteAhead, streaming);
          c = c + 1 == a.c ? 0 : c + 1;
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
        for (int64_t n = a.n - 1; n >= 0; n--)
          for (int64_t k = 0; k < channels; k++)
            forward_plane<T, kind, kResidual>(a, Uniform<A>(coefficients[k]), n * a.c + first + k, n ? -stride : 0,
                                              streaming);
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
    team.for_each(a.n * a.c, [&](int64_t i) {
      const int64_t plane = a.n * a.c - 1 - i;
      forward_plane<T, kind, kResidual>(a, Uniform<A>(channels[plane % a.c]), plane, 0, streaming);
    });
  });
}

// How rows are taken: `columns` of them at once are `wide` channels in turn; the last wide row may be shorter.
template <class T>
struct Rows {
  int64_t c, total, columns, chunk, chunks;  // elements, but for the count of chunks

  Rows(int64_t rows, int64_t c) : c(c), total(rows * c) {
    int64_t repeat = 1;
    while (repeat * c % kLanes<T> != 0) repeat *= 2;
    while (repeat * c < 256) repeat *= 2;
    columns = std::min(repeat, rows) * c;
    const int64_t wide_rows = (total + columns - 1) / columns;
    // At most 256 chunks of at least 64k elements: enough for every thread, few enough to merge.
    const int64_t per_chunk = std::max({int64_t(1), 65536 / columns, (wide_rows + 255) / 256});
    chunk = per_chunk * columns, chunks = (wide_rows + per_chunk - 1) / per_chunk;
  }
  int64_t padded() const { return (columns + kLanes<T> - 1) / kLanes<T> * kLanes<T>; }
  int64_t chunk_end(int64_t i) const { return std::min(total, (i + 1) * chunk); }
  int64_t channel_blocks() const { return (c + 63) / 64; }
  // f(first, last) of a block of channels
  template <class F>
  void visit_channels(int64_t block, F f) const {
    f(block * 64, std::min(c, block * 64 + 64));
  }
  template <class A>
  void set(const PerColumn<A>& coefficients, int64_t channel, const Channel<A>& values) const {
    for (int64_t i = channel; i < columns; i += c) coefficients.set(values, i);
  }
};

constexpr int64_t kBlockRows = 256;  // wide rows whose sums are in the accumulate type
constexpr int64_t kRowsReadAhead = 1024;

// Workspace: doubles [chunks][2][c], coefficients [kCoefficients][padded], and per thread [3][padded].
template <class T>
struct RowsWorkspace {
  using A = Accumulate<T>;
  double* sums;
  A *coefficients, *scratch;
  int64_t padded;

  RowsWorkspace(const Rows<T>& rows, void* p)
      : sums(static_cast<double*>(p)),
        coefficients(reinterpret_cast<A*>(sums + rows.chunks * 2 * rows.c)),
        scratch(coefficients + kCoefficients * rows.padded()),
        padded(rows.padded()) {}
  static size_t bytes(const Rows<T>& rows, int threads) {
    return sizeof(double) * rows.chunks * 2 * rows.c + sizeof(A) * (kCoefficients + 3 * threads) * rows.padded();
  }
  double* chunk_sums(const Rows<T>& rows, int64_t chunk, int which) const {
    return sums + (chunk * 2 + which) * rows.c;
  }
  A* thread_scratch(int rank, int which) const { return scratch + (rank * 3 + which) * padded; }
};

// Mean and m2 of every channel over one chunk.  The shift of a block is its first row.
template <class T>
void chunk_moments(const T* x, const Rows<T>& rows, int64_t begin, int64_t end, double* mean, double* m2,
                   Accumulate<T>* k, Accumulate<T>* s, Accumulate<T>* q) {
  using A = Accumulate<T>;
  constexpr int kUnroll = 4;
  const int64_t columns = rows.columns, c = rows.c;
  std::fill(mean, mean + c, 0.0), std::fill(m2, m2 + c, 0.0);
  double seen = 0;
  for (int64_t block = begin; block < end; block += kBlockRows * columns) {
    const int64_t block_end = std::min(end, block + kBlockRows * columns);
    for (int64_t i = 0; i < c; i++) k[i] = A(x[block + i]);
    for (int64_t i = c; i < columns; i++) k[i] = k[i - c];
    std::fill(s, s + columns, A(0)), std::fill(q, q + columns, A(0));
    int64_t row = block;
    for (; row + kUnroll * columns <= block_end; row += kUnroll * columns) {
      const auto lanes = new_lanes<T>(columns);
      for_packs<T>(columns, [&](int64_t i, auto count, auto again) {
        const auto shift = load(k + i, Full<A>());
        auto sum = load(s + i, Full<A>()), square = load(q + i, Full<A>());
        for (int u = 0; u < kUnroll; u++) {
          const T* const p = x + row + u * columns + i;
          prefetch(p + kRowsReadAhead * kUnroll);
          const auto d = keep(lanes, load(p, count) - shift, count, again);
          sum = sum + d, square = fmadd(d, d, square);
        }
        store(s + i, sum, Full<A>()), store(q + i, square, Full<A>());
      });
    }
    for (; row < block_end; row += columns) {
      const int64_t len = std::min(columns, block_end - row);
      const auto lanes = new_lanes<T>(len);
      for_packs<T>(len, [&](int64_t i, auto count, auto again) {
        const auto d = keep(lanes, load(x + row + i, count) - load(k + i, Full<A>()), count, again);
        store(s + i, load(s + i, Full<A>()) + d, Full<A>());
        store(q + i, fmadd(d, d, load(q + i, Full<A>())), Full<A>());
      });
    }
    const double n = double(block_end - block) / c, part = n / (seen + n), inv = 1 / n;
    for (int64_t i = 0; i < c; i++) {
      double sum = 0, square = 0;
      for (int64_t j = i; j < columns; j += c) sum += double(s[j]), square += double(q[j]);
      const double d = double(k[i]) + sum * inv - mean[i];
      mean[i] += d * part;
      m2[i] += std::max(square - sum * sum * inv, 0.0) + d * d * seen * part;
    }
    seen += n;
  }
}

template <class T, Kind kind, bool kResidual>
void forward_rows(const BatchNormForward& a) {
  using A = Accumulate<T>;
  const Rows<T> rows(a.n * a.hw, a.c);
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
        // Merges chunk after chunk into the first one's numbers.
        double *const mean = work.chunk_sums(rows, 0, 0), *const m2 = work.chunk_sums(rows, 0, 1);
        for (int64_t i = 1; a.training && i < rows.chunks; i++) {
          const double n = double(rows.chunk_end(i) - i * rows.chunk), seen = double(i * rows.chunk);
          const double part = n / (seen + n);
          const double *const other = work.chunk_sums(rows, i, 0), *const other_m2 = work.chunk_sums(rows, i, 1);
          for (int64_t c = first; c < last; c++) {
            const double d = other[c] - mean[c];
            mean[c] += d * part, m2[c] += other_m2[c] + d * d * (seen / rows.c) * part;
          }
        }
        for (int64_t c = first; c < last; c++) {
          Moments m{double(a.n * a.hw), a.training ? mean[c] : 0, a.training ? m2[c] : 0};
          if (!m.finite()) m = wide_moments(x + c, a.n * a.hw, a.c, 1);
          rows.set(coefficients, c, finish_forward<A>(a, c, a.training ? &m : nullptr));
        }
      });
    });
    team.for_each(rows.chunks, [&](int64_t j) {
      const int64_t i = rows.chunks - 1 - j;
      for (int64_t at = i * rows.chunk; at < rows.chunk_end(i); at += rows.columns)
        normalize<T, kind, kResidual>(a, coefficients, at, std::min(rows.columns, rows.total - at),
                                      a.mask ? a.mask + at / 8 : nullptr, kRowsReadAhead, kRowsReadAhead, streaming);
    });
  });
}

// ---- Backward, elementwise ------------------------------------------------------------------------------------------

// How dz comes from dy: as it is, by relu's or any activation's slope at z(x), at z(x) + residual, or by the mask.
enum class Slope { kOne, kRelu, kGeneral, kGeneralResidual, kMask };

template <class T, Slope slope, class P>
inline P slope_times(const BatchNormBackward& a, P dy, P z, int64_t at, int64_t i, const uint8_t* mask, auto count,
                     auto again) {
  using A = Accumulate<T>;
  using V = at::vec::Vectorized<A>;
  const V s(A(a.negative_slope));
  if constexpr (slope == Slope::kOne) return dy;
  if constexpr (slope == Slope::kRelu) return select(less_equal(z, P(A(0))), P(A(0)), dy);
  if constexpr (slope == Slope::kMask) {
    const P other = a.activation == Activation::kLeakyRelu ? dy * P(A(a.negative_slope)) : P(A(0));
    return select_bits(load_bits(mask, i, count, again), dy, other);
  }
  if constexpr (slope == Slope::kGeneralResidual) z = z + load(static_cast<const T*>(a.residual) + at, count);
  return {dy.a * activation_gradient(a.activation, z.a, s), dy.b * activation_gradient(a.activation, z.b, s)};
}

// dz and x - mean of a pack at element `at`, which is the i-th of its span; mask: the span's bits.
template <class T, Slope slope, class Coefficients>
struct Gradient {
  using P = Pack<Accumulate<T>>;
  P dz, centered;

  Gradient(const BatchNormBackward& a, const Coefficients& c, int64_t at, int64_t i, const uint8_t* mask, auto count,
           auto again) {
    centered = load(static_cast<const T*>(a.x) + at, count) - c.get(kMean, i);
    P z = centered;
    if constexpr (slope == Slope::kRelu || slope == Slope::kGeneral || slope == Slope::kGeneralResidual)
      z = fmadd(centered, c.get(kScale, i), c.get(kShift, i));
    dz = slope_times<T, slope>(a, load(static_cast<const T*>(a.dy) + at, count), z, at, i, mask, count, again);
  }
};

// Frozen statistics: dx = dz * scale needs no sums, so it is written while they are taken.
template <class T, Slope slope, class Coefficients>
inline void write_frozen(const BatchNormBackward& a, const Coefficients& c, const Gradient<T, slope, Coefficients>& g,
                         int64_t at, int64_t i, auto count) {
  if (a.dx) store(static_cast<T*>(a.dx) + at, g.dz * c.get(kScale, i), count);
  if (a.dresidual) store(static_cast<T*>(a.dresidual) + at, g.dz, count);
}

// dx and dresidual of len elements from `at` on.
template <class T, Slope slope, class Coefficients>
inline void backward_span(const BatchNormBackward& a, const Coefficients c, int64_t at, int64_t len,
                          const uint8_t* mask, int64_t read_ahead, int64_t write_ahead, bool streaming) {
  T *const dx = static_cast<T*>(a.dx), *const dresidual = static_cast<T*>(a.dresidual);
  for_packs<T>(len, [&](int64_t i, auto count, auto again) {
    if (read_ahead) {
      prefetch(static_cast<const T*>(a.x) + at + i + read_ahead);
      prefetch(static_cast<const T*>(a.dy) + at + i + read_ahead);
    }
    const Gradient<T, slope, Coefficients> g(a, c, at + i, i, mask, count, again);
    if (dresidual) {
      if (!streaming) prefetch<T, true>(dresidual + at + i + write_ahead);
      store_output(dresidual + at + i, g.dz, count, again, streaming);
    }
    if (dx) {
      if (!streaming) prefetch<T, true>(dx + at + i + write_ahead);
      const auto inner = g.dz - fmadd(g.centered, c.get(kSlope, i), c.get(kOffset, i));
      store_output(dx + at + i, inner * c.get(kScale, i), count, again, streaming);
    }
  });
}

// ---- Backward -------------------------------------------------------------------------------------------------------

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
    const double slope = sum_dz_xhat / n * rstd;
    channel.v[kSlope] = A(slope), channel.v[kOffset] = A(sums.dz / n - low * slope);
  }
  return channel;
}

// Adds segment j of `channels` channels from c on to their sums.
template <class T, Slope slope, bool kFrozen>
void add_segment(const BatchNormBackward& a, const Segments& segments, const Channel<Accumulate<T>>* coefficients,
                 int64_t c, int64_t channels, int64_t j, Sums* sums) {
  using A = Accumulate<T>;
  using P = Pack<A>;
  segments.visit(j, [&](int64_t first, int64_t planes, int64_t offset, int64_t len) {
    const int64_t stride = a.c * a.hw;
    const P lanes = new_lanes<T>(len);
    P sum[kMaxGroup], product[kMaxGroup];
    for (int64_t k = 0; k < channels; k++) sum[k] = product[k] = P(A(0));
    for (int64_t n = first; n < first + planes; n++) {
      const int64_t ahead = offset + len < a.hw ? len
                            : n + 1 < a.n       ? stride - offset
                                                : channels * a.hw - n * stride - offset;
      for (int64_t k = 0; k < channels; k++) {
        const int64_t plane = n * a.c + c + k, at = plane * a.hw + offset;
        const uint8_t* const mask = a.mask + (a.mask ? plane * ((a.hw + 7) / 8) + offset / 8 : 0);
        const Uniform<A> uniform(coefficients[k]);
        P s = sum[k], p = product[k];
        for_packs<T>(len, [&](int64_t i, auto count, auto again) {
          prefetch(static_cast<const T*>(a.x) + at + i + ahead), prefetch(static_cast<const T*>(a.dy) + at + i + ahead);
          const Gradient<T, slope, Uniform<A>> g(a, uniform, at + i, i, mask, count, again);
          if constexpr (kFrozen) write_frozen<T, slope>(a, uniform, g, at + i, i, count);
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
  const int64_t size = size_of(a.dtype),
                touched = (2 + (a.dx != nullptr) + (a.dresidual != nullptr)) * a.n * a.c * a.hw * size;
  return streams(a.dx, run * size, touched) && streams(a.dresidual, run * size, touched);
}

template <class T, Slope slope>
void backward_planes(const BatchNormBackward& a) {
  using A = Accumulate<T>;
  const Segments segments(a.n, a.hw);
  auto add = [&](const Channel<A>* coefficients, int64_t c, int64_t channels, int64_t j, Sums* sums) {
    a.training ? add_segment<T, slope, false>(a, segments, coefficients, c, channels, j, sums)
               : add_segment<T, slope, true>(a, segments, coefficients, c, channels, j, sums);
  };
  const bool second_pass = a.training && (a.dx || a.dresidual), streaming = streams_backward(a, a.hw);
  auto plane_gradient = [&](const Uniform<A>& coefficients, int64_t plane, int64_t write_ahead) {
    const uint8_t* const mask = a.mask ? a.mask + plane * ((a.hw + 7) / 8) : nullptr;
    backward_span<T, slope>(a, coefficients, plane * a.hw, a.hw, mask, 0, write_ahead, streaming);
  };
  if (a.threads == 1 || a.c >= 4 * a.threads) {
    const int64_t group = channel_group(a.n, a.c, a.hw, 2 * sizeof(T), a.threads);
    parallel(a.threads, [&](Team team) {
      team.for_each((a.c + group - 1) / group, [&](int64_t g) {
        const int64_t first = g * group, channels = std::min(group, a.c - first);
        Sums sums[kMaxGroup];
        Channel<A> coefficients[kMaxGroup];
        for (int64_t k = 0; k < channels; k++) coefficients[k] = start_backward<A>(a, first + k);
        for (int64_t j = 0; j < segments.count(); j++) add(coefficients, first, channels, j, sums);
        for (int64_t k = 0; k < channels; k++) coefficients[k] = finish_backward<A>(a, first + k, sums[k]);
        for (int64_t n = a.n - 1; second_pass && n >= 0; n--)
          for (int64_t k = 0; k < channels; k++)
            plane_gradient(Uniform<A>(coefficients[k]), n * a.c + first + k, n ? -a.c * a.hw : 0);
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
      add(&coefficients, c, 1, i % segments.count(), &partial[i]);
    });
    team.for_each(a.c, [&](int64_t c) {
      Sums sums;
      for (int64_t j = 0; j < segments.count(); j++) sums.add(partial[c * segments.count() + j]);
      channels[c] = finish_backward<A>(a, c, sums);
    });
    if (second_pass)
      team.for_each(a.n * a.c, [&](int64_t i) {
        const int64_t plane = a.n * a.c - 1 - i;
        plane_gradient(Uniform<A>(channels[plane % a.c]), plane, 0);
      });
  });
}

template <class T, Slope slope, bool kFrozen>
void chunk_sums(const BatchNormBackward& a, const Rows<T>& rows, const PerColumn<Accumulate<T>>& coefficients,
                int64_t begin, int64_t end, double* sum_dz, double* sum_dz_centered, Accumulate<T>* s,
                Accumulate<T>* q) {
  using A = Accumulate<T>;
  using G = Gradient<T, slope, PerColumn<A>>;
  const int64_t columns = rows.columns, c = rows.c;
  std::fill(sum_dz, sum_dz + c, 0.0), std::fill(sum_dz_centered, sum_dz_centered + c, 0.0);
  for (int64_t block = begin; block < end; block += kBlockRows * columns) {
    const int64_t block_end = std::min(end, block + kBlockRows * columns);
    std::fill(s, s + columns, A(0)), std::fill(q, q + columns, A(0));
    auto add_rows = [&](int64_t row, int64_t len, auto unroll) {
      const auto lanes = new_lanes<T>(len);
      for_packs<T>(len, [&](int64_t i, auto count, auto again) {
        auto sum = load(s + i, Full<A>()), product = load(q + i, Full<A>());
        for (int u = 0; u < unroll; u++) {
          const int64_t at = row + u * columns + i;
          prefetch(static_cast<const T*>(a.x) + at + 2 * kRowsReadAhead);
          prefetch(static_cast<const T*>(a.dy) + at + 2 * kRowsReadAhead);
          const G g(a, coefficients, at, i, a.mask + (a.mask ? (row + u * columns) / 8 : 0), count, again);
          const auto dz = keep(lanes, g.dz, count, again);
          sum = sum + dz, product = fmadd(dz, g.centered, product);
          if constexpr (kFrozen) write_frozen<T, slope>(a, coefficients, g, at, i, count);
        }
        store(s + i, sum, Full<A>()), store(q + i, product, Full<A>());
      });
    };
    int64_t row = block;
    for (; row + 2 * columns <= block_end; row += 2 * columns) add_rows(row, columns, std::integral_constant<int, 2>());
    for (; row < block_end; row += columns)
      add_rows(row, std::min(columns, block_end - row), std::integral_constant<int, 1>());
    for (int64_t i = 0; i < c; i++)
      for (int64_t j = i; j < columns; j += c) sum_dz[i] += double(s[j]), sum_dz_centered[i] += double(q[j]);
  }
}

template <class T, Slope slope>
void backward_rows(const BatchNormBackward& a) {
  using A = Accumulate<T>;
  const Rows<T> rows(a.n * a.hw, a.c);
  const RowsWorkspace<T> work(rows, a.workspace);
  const PerColumn<A> coefficients{work.coefficients, rows.padded()};
  const bool streaming = streams_backward(a, rows.columns);
  parallel(a.threads, [&](Team team) {
    team.for_each(rows.channel_blocks(), [&](int64_t block) {
      rows.visit_channels(block, [&](int64_t first, int64_t last) {
        for (int64_t c = first; c < last; c++) rows.set(coefficients, c, start_backward<A>(a, c));
      });
    });
    team.for_each(rows.chunks, [&](int64_t i) {
      const auto sums = a.training ? chunk_sums<T, slope, false> : chunk_sums<T, slope, true>;
      sums(a, rows, coefficients, i * rows.chunk, rows.chunk_end(i), work.chunk_sums(rows, i, 0),
           work.chunk_sums(rows, i, 1), work.thread_scratch(team.rank, 0), work.thread_scratch(team.rank, 1));
    });
    team.for_each(rows.channel_blocks(), [&](int64_t block) {
      rows.visit_channels(block, [&](int64_t first, int64_t last) {
        double *const dz = work.chunk_sums(rows, 0, 0), *const dz_centered = work.chunk_sums(rows, 0, 1);
        for (int64_t i = 1; i < rows.chunks; i++)
          for (int64_t c = first; c < last; c++)
            dz[c] += work.chunk_sums(rows, i, 0)[c], dz_centered[c] += work.chunk_sums(rows, i, 1)[c];
        for (int64_t c = first; c < last; c++)
          rows.set(coefficients, c, finish_backward<A>(a, c, Sums{dz[c], dz_centered[c]}));
      });
    });
    if (!a.training || !(a.dx || a.dresidual)) return;
    team.for_each(rows.chunks, [&](int64_t j) {
      const int64_t i = rows.chunks - 1 - j;
      for (int64_t at = i * rows.chunk; at < rows.chunk_end(i); at += rows.columns)
        backward_span<T, slope>(a, coefficients, at, std::min(rows.columns, rows.total - at),
                                a.mask ? a.mask + at / 8 : nullptr, kRowsReadAhead, kRowsReadAhead, streaming);
    });
  });
}

// ---- Choice of the variant ------------------------------------------------------------------------------------------

template <class T, Kind kind, bool kResidual>
void forward(const BatchNormForward& a) {
  a.channels_last ? forward_rows<T, kind, kResidual>(a) : forward_planes<T, kind, kResidual>(a);
}

template <class T, Slope slope>
void backward(const BatchNormBackward& a) {
  a.channels_last ? backward_rows<T, slope>(a) : backward_planes<T, slope>(a);
}

}  // namespace

size_t batch_norm_forward_workspace(const BatchNormForward& a) {
  size_t bytes = 0;
  with_type(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (a.channels_last)
      bytes = RowsWorkspace<T>::bytes(Rows<T>(a.n * a.hw, a.c), a.threads);
    else if (!a.training)
      bytes = a.c * sizeof(Channel<Accumulate<T>>);
    else if (a.threads > 1 && a.c < 4 * a.threads)
      bytes = a.c * (Segments(a.n, a.hw).count() * sizeof(Moments) + sizeof(Channel<Accumulate<T>>));
  });
  return bytes;
}

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

void batch_norm_forward(const BatchNormForward& a) {
  prefer_huge_pages(a.y, a.n * a.c * a.hw * size_of(a.dtype));
  if (a.training && a.num_batches_tracked) ++*a.num_batches_tracked;
  with_type(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    auto with_residual = [&](auto kind) {
      a.residual ? forward<T, kind.value, true>(a) : forward<T, kind.value, false>(a);
    };
    switch (a.activation) {
      case Activation::kNone: return with_residual(std::integral_constant<Kind, Kind::kNone>());
      case Activation::kRelu: return with_residual(std::integral_constant<Kind, Kind::kRelu>());
      default: return with_residual(std::integral_constant<Kind, Kind::kGeneral>());
    }
  });
}

void batch_norm_backward(const BatchNormBackward& a) {
  prefer_huge_pages(a.dx, a.n * a.c * a.hw * size_of(a.dtype));
  prefer_huge_pages(a.dresidual, a.n * a.c * a.hw * size_of(a.dtype));
  with_type(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (a.activation == Activation::kNone) return backward<T, Slope::kOne>(a);
    if (a.mask) return backward<T, Slope::kMask>(a);
    if (a.residual) return backward<T, Slope::kGeneralResidual>(a);
    if (a.activation == Activation::kRelu) return backward<T, Slope::kRelu>(a);
    return backward<T, Slope::kGeneral>(a);
  });
}

}  // namespace fastnorm::cpu::CPU_CAPABILITY
