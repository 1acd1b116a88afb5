// The two products that convolutions consist of, in registers.  A tile is R rows by one panel of kPanel columns.
//
//   multiply_add   tile[r][j] += sum over k of rows[r][k] * b[k][j]            b packed: [k][kPanel]
//   outer_add      tile[r][j] += sum over k of a[k][r] * b[k][j]               a and b by rows of pointers
//
// A step of k loads a panel of b and a number for each row, and does 2 R fused multiply-adds of vectors: on x86 both
// FMA units are busy from R = 6 (16 registers) and R = 12 (32 registers) on, whatever the pointers point to in the L1
// cache.  So rows come from anywhere in an image, and columns need not be copied together.
#pragma once
#include <utility>

#include "vector.h"

namespace fastnorm::cpu::CPU_CAPABILITY {

template <class A>
constexpr int64_t kPanel = Pack<A>::kLanes;

#ifdef CPU_CAPABILITY_AVX512
constexpr int kTileRows = 12;
#else
constexpr int kTileRows = 6;
#endif

template <class A, int R>
struct Tile {
  using V = at::vec::Vectorized<A>;
  V v[R][2];

  void clear() {
    for (auto& row : v) row[0] = row[1] = V(A(0));
  }
  void load(const A* p, int64_t pitch) {
    for (int r = 0; r < R; r++) v[r][0] = V::loadu(p + r * pitch), v[r][1] = V::loadu(p + r * pitch + V::size());
  }
  void add(const A* p, int64_t pitch) {
    for (int r = 0; r < R; r++)
      v[r][0] = v[r][0] + V::loadu(p + r * pitch), v[r][1] = v[r][1] + V::loadu(p + r * pitch + V::size());
  }
  void store(A* p, int64_t pitch) const {
    for (int r = 0; r < R; r++) v[r][0].store(p + r * pitch), v[r][1].store(p + r * pitch + V::size());
  }

  // rows: R pointers, each to `count` numbers.
  [[gnu::always_inline]] void multiply_add(const A* const (&rows)[R], int64_t count, const A* b) {
    for (int64_t k = 0; k < count; k++, b += kPanel<A>) {
      const V b0 = V::loadu(b), b1 = V::loadu(b + V::size());
#pragma GCC unroll 12
      for (int r = 0; r < R; r++) {
        const V a(rows[r][k]);
        v[r][0] = at::vec::fmadd(a, b0, v[r][0]);
        v[r][1] = at::vec::fmadd(a, b1, v[r][1]);
      }
    }
  }

  // a(k): R numbers; b(k): kPanel numbers, the second half of them perhaps elsewhere.
  template <class Left, class Right>
  [[gnu::always_inline]] void outer_add(int64_t count, Left a, Right b, int64_t half = V::size()) {
    for (int64_t k = 0; k < count; k++) {
      const A* const left = a(k);
      const A* const right = b(k);
      const V b0 = V::loadu(right), b1 = V::loadu(right + half);
#pragma GCC unroll 12
      for (int r = 0; r < R; r++) {
        const V scale(left[r]);
        v[r][0] = at::vec::fmadd(scale, b0, v[r][0]);
        v[r][1] = at::vec::fmadd(scale, b1, v[r][1]);
      }
    }
  }
};

// f(the number as a constant) for 1 <= n <= kMost.
template <int kMost, class F>
[[gnu::always_inline]] inline void with_count(int64_t n, F f) {
  [&]<int... I>(std::integer_sequence<int, I...>) {
    ((n == I + 1 ? f(std::integral_constant<int, I + 1>()) : void()), ...);
  }(std::make_integer_sequence<int, kMost>());
}
template <class F>
[[gnu::always_inline]] inline void with_rows(int64_t rows, F f) {
  with_count<kTileRows>(rows, f);
}

}  // namespace fastnorm::cpu::CPU_CAPABILITY
