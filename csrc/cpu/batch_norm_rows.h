// What the forward and the backward kernels of batch norm share: coefficients per channel, and how rows are taken.
#pragma once
#include "../batch_norm.h"
#include "vector.h"

namespace fastnorm::cpu::CPU_CAPABILITY {

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

// ---- Rows -----------------------------------------------------------------------------------------------------------

// Several rows at once are one wide row of `columns` elements; the last wide row may be shorter.
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

}  // namespace fastnorm::cpu::CPU_CAPABILITY
