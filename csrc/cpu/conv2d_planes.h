// Part of an image as planes of lines in the accumulate type, for the kernels whose vectors run along the pixels of a
// row: zeros around it, and every step-th pixel together, so that what the windows of neighbouring results see is a run
// of numbers.
#pragma once
#include "conv2d_im2col.h"

namespace fastnorm::cpu::CPU_CAPABILITY {

// For a gradient to the input with strides, the image is taken as one whose pixels have gaps of zeros between them.
struct ConvPlanes {
  const int gap_y, gap_x;
  const ConvReach y, x;    // of results to the image with its gaps
  const int64_t step;      // between the pixels that neighbouring results see
  const int64_t line;      // of every step-th pixel, and as many more as kernels read beyond their results
  const int64_t row_size;  // of the `step` lines of a row

  ConvPlanes(const ConvShape& s, bool backward, int64_t beyond)
      : gap_y(backward ? s.y.stride : 1),
        gap_x(backward ? s.x.stride : 1),
        y(spread(s.y, backward), backward),
        x(spread(s.x, backward), backward),
        step(backward ? 1 : x.stride),
        line((x.end(x.out) - x.begin(0) + step - 1) / step + beyond),
        row_size(line * step) {}

  static ConvAxis spread(ConvAxis a, bool backward) {
    if (backward) a.out = (a.out - 1) * a.stride + 1, a.stride = 1;
    return a;
  }

  // What so many rows of results see of a channel.
  int64_t plane(int64_t rows) const { return y.span(rows) * row_size; }
  // From what tap (0, 0) of the first result sees to what another tap does; results follow each other in a line.
  int64_t offset(int ky, int kx) const {
    const int64_t row = y.position(0, ky) - y.begin(0), column = x.position(0, kx) - x.begin(0);
    return row * row_size + column % step * line + column / step;
  }
  // From one row of results to the next.
  int64_t row_step() const { return y.stride * row_size; }

  // What the results' rows [row, row_end) see of the channels [c0, c0 + count) of a sample, a plane each.  The planes
  // have to be all zeros before the first use: what is outside of the image along a row is the same in every row.
  template <class T, class A>
  void read(const T* sample, const ImageLayout& in, int64_t c0, int64_t count, int64_t row, int64_t row_end, A* planes,
            int64_t plane) const {
    const int64_t begin = y.begin(row), end = y.end(row_end), width = (x.in - 1) / gap_x + 1;
    for (int64_t phase = 0; phase < step; phase++) {
      // The line's numbers from low on, in steps of gap_x, are the row's pixels from `from` on, in steps of step.
      const int64_t first = x.begin(0) + phase;
      int64_t low = first >= 0 ? 0 : (-first + step - 1) / step;
      while ((first + low * step) % gap_x != 0) low++;
      const int64_t from = (first + low * step) / gap_x;
      const int64_t pixels = std::min((width - from + step - 1) / step, (line - low + gap_x - 1) / gap_x);
      A* to = planes + phase * line;
      for (int64_t at = begin; at < end; at++, to += row_size)
        if (at < 0 || at >= y.in || at % gap_y != 0)
          for (int64_t c = 0; c < count; c++) std::fill_n(to + c * plane, line, A(0));
        else if (pixels > 0)
          read_line(sample, in, c0, count, at / gap_y * width, from, pixels, to + low, plane, phase == 0);
    }
  }

  // `pixels` of a row that begins with first_pixel, from its pixel `from` on.
  template <class T, class A>
  void read_line(const T* sample, const ImageLayout& in, int64_t c0, int64_t count, int64_t first_pixel, int64_t from,
                 int64_t pixels, A* to, int64_t plane, bool fetches) const {
    if (!in.channels_last) {
      const T* const row = sample + c0 * in.pixels + first_pixel;
      for (int64_t c = 0; c < count; c++) {
        // The next channels' rows come next: too short for the processor to see that by itself.
        if (fetches) prefetch_run(row + (c + count) * in.pixels, (x.in - 1) / gap_x + 1);
        copy(row + from + c * in.pixels, step, to + c * plane, gap_x, pixels);
      }
      return;
    }
    const T* const pixel = sample + (first_pixel + from) * in.channels + c0;
    if (gap_x == 1) return image::transpose(pixel, step * in.channels, to, plane, pixels, count);
    for (int64_t c = 0; c < count; c++) copy(pixel + c, step * in.channels, to + c * plane, gap_x, pixels);
  }

  template <class T, class A>
  static void copy(const T* from, int64_t from_step, A* to, int64_t to_step, int64_t count) {
    if (from_step == 1 && to_step == 1) {
      for_packs<T>(count, [&](int64_t i, auto lanes, auto) { store<A>(to + i, load(from + i, lanes), lanes); });
    } else if (from_step == 2 && to_step == 1) {  // which the compiler makes vectors of
      for (int64_t i = 0; i < count; i++) to[i] = A(from[2 * i]);
    } else {
      for (int64_t i = 0; i < count; i++) to[i * to_step] = A(from[i * from_step]);
    }
  }
};

}  // namespace fastnorm::cpu::CPU_CAPABILITY
