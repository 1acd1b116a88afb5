// Pixels of an image in any layout and type, as the convolution kernels want them: one after the other, each with its
// channels side by side, in the accumulate type.
#pragma once
#include <algorithm>

#include "vector.h"

namespace fastnorm::cpu::CPU_CAPABILITY {

// One sample of a tensor: [channels][pixels], or [pixels][channels] with channels_last.
struct ImageLayout {
  int64_t channels, pixels;
  bool channels_last;
};

template <class T>
constexpr int64_t kLine = 64 / sizeof(T);

// Fetches runs of numbers to the L2 cache in shares, one in each step().
template <class T>
struct FetchAhead {
  const T* p = nullptr;
  int64_t runs = 0, length = 0, apart = 0;
  int64_t share = 0, at = 0;  // lines of a share; how far into a run

  FetchAhead() = default;
  FetchAhead(const T* p, int64_t length, int64_t shares, int64_t runs = 1, int64_t apart = 0)
      : p(p), runs(runs), length(length), apart(apart) {
    const int64_t lines = runs * ((length + kLine<T> - 1) / kLine<T>);
    share = (lines + shares - 1) / std::max<int64_t>(shares, 1);
  }
  void step() {
    for (int64_t i = 0; i < share && runs > 0; i++) {
      __builtin_prefetch(p + at, 0, 2);
      at += kLine<T>;
      if (at >= length) at = 0, p += apart, runs--;
    }
  }
};

// What read_pixels() is going to read: the channels [c0, c0 + c) of the pixels [begin, end) of a sample, or, in groups
// more than those, of all pixels of `samples`.
template <class T>
inline FetchAhead<T> fetch_pixels(const T* sample, const ImageLayout& s, int64_t c0, int64_t c, int64_t begin,
                                  int64_t end, int64_t samples, int64_t shares) {
  const T* const first = sample + (s.channels_last ? begin * s.channels + c0 : c0 * s.pixels + begin);
  if (samples > 1 || (s.channels_last && c == s.channels))
    return {first, ((samples - 1) * s.pixels + end - begin) * s.channels, shares};
  return s.channels_last ? FetchAhead<T>(first, c, shares, end - begin, s.channels)
                         : FetchAhead<T>(first, end - begin, shares, c, s.pixels);
}

namespace image {

template <class A>
using Eight [[gnu::vector_size(8 * sizeof(A)), gnu::may_alias, gnu::aligned(alignof(A))]] = A;

// to[j * to_pitch + i] = from[i * from_pitch + j] for i < rows and j < columns, neither above 8.  8 numbers are read of
// each row, and 8 are written for each column.
template <class A>
[[gnu::always_inline]] inline void transpose_block(const A* from, int64_t from_pitch, A* to, int64_t to_pitch,
                                                   int64_t rows = 8, int64_t columns = 8) {
  using V = Eight<A>;
  V r[8] = {}, s[8];
  for (int i = 0; i < 8; i++)
    if (i < rows) r[i] = *reinterpret_cast<const V*>(from + i * from_pitch);
  for (int i = 0; i < 8; i += 2) {
    s[i] = __builtin_shufflevector(r[i], r[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
    s[i + 1] = __builtin_shufflevector(r[i], r[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; j++) {
      r[i + j] = __builtin_shufflevector(s[i + j], s[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      r[i + j + 2] = __builtin_shufflevector(s[i + j], s[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  for (int i = 0; i < 4; i++) {
    s[i] = __builtin_shufflevector(r[i], r[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    s[i + 4] = __builtin_shufflevector(r[i], r[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
  for (int i = 0; i < 8; i++)
    if (i < columns) *reinterpret_cast<V*>(to + i * to_pitch) = s[i];
}

// f(i) for the first of every 8 in [0, count), what is left over together with some before it; count is at least 8.
template <class F>
inline void for_eights(int64_t count, F f) {
  for (int64_t i = 0; i < count; i += 8) f(std::min(i, count - 8));
}

// to[j * to_pitch + i] = from[i * from_pitch + j] for i < rows, j < columns.
template <class To, class From>
inline void transpose(const From* from, int64_t from_pitch, To* to, int64_t to_pitch, int64_t rows, int64_t columns) {
  int64_t first_row = 0, first_column = 0;
  if constexpr (std::is_same_v<To, From>) {
    // Of lines of `some` numbers, those that may be taken as 8: what follows belongs to the lines after them.
    auto wide = [](int64_t lines, int64_t some, int64_t pitch) { return lines - (8 - some + pitch - 1) / pitch; };
    if (rows >= 8 && columns >= 8) {
      for_eights(rows, [&](int64_t r) {
        for_eights(columns, [&](int64_t c) {
          transpose_block(from + r * from_pitch + c, from_pitch, to + c * to_pitch + r, to_pitch);
        });
      });
      return;
    }
    if (columns > 2 && columns < 8 && wide(rows, columns, from_pitch) >= 8) {
      first_row = wide(rows, columns, from_pitch);
      for_eights(first_row,
                 [&](int64_t r) { transpose_block(from + r * from_pitch, from_pitch, to + r, to_pitch, 8, columns); });
    } else if (rows > 2 && rows < 8 && to_pitch == rows && wide(columns, rows, rows) >= 8) {
      first_column = wide(columns, rows, rows);
      for_eights(first_column,
                 [&](int64_t c) { transpose_block(from + c, from_pitch, to + c * to_pitch, to_pitch, rows, 8); });
    }
  }
  auto move = [&](int64_t i, int64_t j) { to[j * to_pitch + i] = To(from[i * from_pitch + j]); };
  if (rows < columns) {  // the few side by side
    for (int64_t j = first_column; j < columns; j++)
      for (int64_t i = 0; i < rows; i++) move(i, j);
  } else {
    for (int64_t i = first_row; i < rows; i++)
      for (int64_t j = 0; j < columns; j++) move(i, j);
  }
}

}  // namespace image

// to[i * pitch + j] = channel c0 + j of pixel p0 + i, for i < pixels, j < c.
template <class T>
inline void read_pixels(const T* sample, const ImageLayout& s, int64_t c0, int64_t c, int64_t p0, int64_t pixels,
                        Accumulate<T>* to, int64_t pitch) {
  if (!s.channels_last) return image::transpose(sample + c0 * s.pixels + p0, s.pixels, to, pitch, c, pixels);
  const bool joined = c == s.channels && c == pitch;  // then all pixels are one run
  const int64_t run = joined ? pixels * c : c;
  for (int64_t i = 0; i < (joined ? 1 : pixels); i++) {
    const T* const from = sample + (p0 + i) * s.channels + c0;
    for_packs<T>(run, [&](int64_t j, auto count, auto) {
      store<Accumulate<T>>(to + i * pitch + j, load(from + j, count), count);
    });
  }
}

// The other way round.
template <class T>
inline void write_pixels(const Accumulate<T>* from, int64_t pitch, T* sample, const ImageLayout& s, int64_t c0,
                         int64_t c, int64_t p0, int64_t pixels) {
  if (!s.channels_last) return image::transpose(from, pitch, sample + c0 * s.pixels + p0, s.pixels, pixels, c);
  for (int64_t i = 0; i < pixels; i++) {
    T* const to = sample + (p0 + i) * s.channels + c0;
    for_packs<T>(c, [&](int64_t j, auto count, auto) {
      store(to + j, load<Accumulate<T>>(from + i * pitch + j, count), count);
    });
  }
}

}  // namespace fastnorm::cpu::CPU_CAPABILITY
