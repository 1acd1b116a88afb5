// What the forward and the backward kernels of batch norm share for rows.
#pragma once
#include "rows.h"

namespace fastnorm::cpu::CPU_CAPABILITY {

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
