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

// C: vectors of a panel that are computed, the first ones.
template <class A, int R, int C = 2>
struct Tile {
  using V = at::vec::Vectorized<A>;
  V v[R][C];

  // Loops are unrolled everywhere, or the tile would be in memory between them.
  template <class F>
  [[gnu::always_inline]] static void each(F f) {
#pragma GCC unroll 12
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
      for (int c = 0; c < C; c++) f(r, c);
  }
  void clear() {
    each([&](int r, int c) __attribute__((always_inline)) { v[r][c] = V(A(0)); });
  }
  void load(const A* p, int64_t pitch) {
    each([&](int r, int c) __attribute__((always_inline)) { v[r][c] = V::loadu(p + r * pitch + c * V::size()); });
  }
  void add(const A* p, int64_t pitch) {
    each([&](int r, int c)
             __attribute__((always_inline)) { v[r][c] = v[r][c] + V::loadu(p + r * pitch + c * V::size()); });
  }
  void store(A* p, int64_t pitch) const {
    each([&](int r, int c) __attribute__((always_inline)) { v[r][c].store(p + r * pitch + c * V::size()); });
  }

  // rows: R pointers, each to `count` numbers.
  [[gnu::always_inline]] void multiply_add(const A* const (&rows)[R], int64_t count, const A* b) {
    for (int64_t k = 0; k < count; k++, b += kPanel<A>) {
      V columns[C];
#pragma GCC unroll 2
      for (int c = 0; c < C; c++) columns[c] = V::loadu(b + c * V::size());
#pragma GCC unroll 12
      for (int r = 0; r < R; r++) {
        const V a(rows[r][k]);
#pragma GCC unroll 2
        for (int c = 0; c < C; c++) v[r][c] = at::vec::fmadd(a, columns[c], v[r][c]);
      }
    }
  }

  // a(k): R numbers; b(k): kPanel numbers, the second half of them perhaps elsewhere.
  template <class Left, class Right>
  [[gnu::always_inline]] void outer_add(int64_t count, Left a, Right b, int64_t half = V::size()) {
    for (int64_t k = 0; k < count; k++) {
      const A* left = a(k);
      asm("" : "+r"(left));  // or each of its numbers may get a register for its place
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
// f(n as a constant) if it is one of kSome; whether it is.
template <int... kSome, class F>
[[gnu::always_inline]] inline bool with_one_of(int n, F f) {
  return ((n == kSome ? (f(std::integral_constant<int, kSome>()), true) : false) || ...);
}
template <class F>
[[gnu::always_inline]] inline void with_rows(int64_t rows, F f) {
  with_count<kTileRows>(rows, f);
}

// f(begin, end) for even shares of [0, count), of at most so many: the smallest tiles wait for their own sums.
template <class F>
[[gnu::always_inline]] inline void for_shares(int64_t count, int64_t most, F f) {
  const int64_t shares = (count + most - 1) / most;
  for (int64_t i = 0; i < shares; i++) f(count * i / shares, count * (i + 1) / shares);
}

}  // namespace fastnorm::cpu::CPU_CAPABILITY
