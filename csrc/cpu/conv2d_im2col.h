// How the windows of a convolution meet an image, for the im2col kernels: columns are pointers to pixels, not copies.
#pragma once
#include "../conv2d.h"
#include "arena.h"
#include "conv2d_gemm.h"
#include "conv2d_image.h"

namespace fastnorm::cpu::CPU_CAPABILITY {

// Along one direction, which positions of the image that is read (`in`) the taps of a result's position (`out`) see: x
// for y, or for a gradient dy for dx.  There the taps that see anything depend on the result's position modulo the
// stride: its phase.
struct ConvReach {
  int in, out, kernel, stride, pad, dilation;
  bool backward;

  ConvReach(const ConvAxis& a, bool backward)
      : in(backward ? a.out : a.in),
        out(backward ? a.in : a.out),
        kernel(a.kernel),
        stride(a.stride),
        pad(a.pad),
        dilation(a.dilation),
        backward(backward) {}

  int phases() const { return backward ? stride : 1; }
  // The first result of a phase that is not before `from`; the next ones follow in steps of phases().
  int64_t first(int phase, int64_t from) const {
    return backward ? from + ((phase - from - pad) % stride + stride) % stride : from;
  }
  bool has_tap(int phase, int tap) const { return phases() == 1 || (int64_t(tap) * dilation - phase) % stride == 0; }
  int phase_of(int64_t result) const { return backward ? int((result + pad) % stride) : 0; }
  // From what a result sees to what the next one of its phase does.
  int64_t step() const { return backward ? 1 : stride; }
  int64_t position(int64_t result, int tap) const {
    const int64_t reach = int64_t(tap) * dilation;
    if (!backward) return result * stride - pad + reach;
    return stride == 1 ? result + pad - reach : (result + pad - reach) / stride;
  }
  // What the results in [from, to) see: from begin() to before end(), perhaps outside of the image.
  int64_t begin(int64_t from) const {
    if (!backward) return from * stride - pad;
    const int64_t low = from + pad - int64_t(kernel - 1) * dilation;
    return low >= 0 ? (low + stride - 1) / stride : -(-low / stride);
  }
  int64_t end(int64_t to) const {
    if (!backward) return (to - 1) * stride - pad + int64_t(kernel - 1) * dilation + 1;
    return (to - 1 + pad) / stride + 1;
  }
  // At most so many positions are seen by `results` neighbouring results.
  int64_t span(int64_t results) const {
    const int64_t reach = int64_t(kernel - 1) * dilation;
    return backward ? (results - 1 + reach) / stride + 2 : (results - 1) * stride + reach + 1;
  }
  // Whether the taps, in this order of backward's or in the other, see neighbouring positions.
  bool neighbours() const { return dilation == 1 && (!backward || stride == 1); }
};

// Results that are worked on together: rows [row, row_end) of the samples [sample, sample_end), more than one of them
// only with all rows.
struct ConvBlock {
  int64_t sample, sample_end, row, row_end;
};

struct ConvBlocks {
  int64_t samples, rows, per_sample, count;  // samples or rows of a block

  // About so many results each.
  ConvBlocks(int64_t n, int64_t height, int64_t width, int64_t pixels) {
    samples = std::clamp<int64_t>(pixels / std::max<int64_t>(height * width, 1), 1, std::max<int64_t>(n, 1));
    rows = samples > 1 ? height : std::clamp<int64_t>(pixels / std::max<int64_t>(width, 1), 1, height);
    per_sample = samples > 1 ? 1 : (height + rows - 1) / rows;
    count = samples > 1 ? (n + samples - 1) / samples : n * per_sample;
    rows = (height + per_sample - 1) / per_sample;  // of even size
    if (samples > 1) samples = (n + count - 1) / count;
  }
  ConvBlock operator()(int64_t i, int64_t n, int64_t height) const {
    if (samples > 1) return {i * samples, std::min(n, (i + 1) * samples), 0, height};
    const int64_t row = i % per_sample * rows;
    return {i / per_sample, i / per_sample + 1, row, std::min(height, row + rows)};
  }
};

// The part of an image that a block's results see, as pixels of c channels in the accumulate type: the image itself,
// with a pixel of zeros for all outside, or a copy that has zeros around it.
template <class T>
struct ConvView {
  using A = Accumulate<T>;
  const ConvReach &y, &x;
  ImageLayout layout;
  int64_t c0, c;
  bool copied;
  const T* image;
  const A* zeros;  // c of them
  A* copy;
  int64_t pitch;  // of the copy's pixels
  int64_t row_begin = 0, column_begin, width, height = 0, first_sample = 0;

  ConvView(const ConvReach& y, const ConvReach& x, ImageLayout layout, int64_t c0, int64_t c, bool copied,
           const void* image, const A* zeros, A* copy, int64_t pitch)
      : y(y),
        x(x),
        layout(layout),
        c0(c0),
        c(c),
        copied(copied),
        image(static_cast<const T*>(image)),
        zeros(zeros),
        copy(copy),
        pitch(pitch),
        column_begin(x.begin(0)),
        width(x.end(x.out) - x.begin(0)) {}

  static int64_t elements(const ConvReach& y, const ConvReach& x, const ConvBlocks& blocks, int64_t pitch) {
    return blocks.samples * y.span(blocks.rows) * (x.end(x.out) - x.begin(0)) * pitch + kPanel<A>;
  }

  void read(const ConvBlock& block) {
    first_sample = block.sample, row_begin = y.begin(block.row), height = y.end(block.row_end) - row_begin;
    if (!copied) return;
    const int64_t left = std::clamp<int64_t>(-column_begin, 0, width);
    const int64_t inside = std::clamp<int64_t>(std::min<int64_t>(x.in - column_begin, width) - left, 0, width);
    A* to = copy;
    for (int64_t n = block.sample; n < block.sample_end; n++)
      for (int64_t row = row_begin; row < row_begin + height; row++, to += width * pitch) {
        if (row < 0 || row >= y.in || inside == 0) {
          std::fill_n(to, width * pitch, A(0));
          continue;
        }
        std::fill_n(to, left * pitch, A(0));
        prefetch_row(n, row + 1, column_begin + left, inside);
        read_pixels<T>(image + n * layout.channels * layout.pixels, layout, c0, c, row * x.in + column_begin + left,
                       inside, to + left * pitch, pitch);
        std::fill_n(to + (left + inside) * pitch, (width - left - inside) * pitch, A(0));
      }
    std::fill_n(to, kPanel<A>, A(0));  // which the last pixel's panels may read
  }
  // Planes' rows are too short for the hardware to see what comes next.
  void prefetch_row(int64_t n, int64_t row, int64_t column, int64_t pixels) const {
    if (layout.channels_last || row >= y.in) return;
    const T* from = image + (n * layout.channels + c0) * layout.pixels + row * x.in + column;
    for (int64_t i = 0; i < c; i++, from += layout.pixels) prefetch_run(from, pixels);
  }
  const A* pixel(int64_t sample, int64_t row, int64_t column) const {
    const A* found = zeros;
    pixels(sample, row, column, 0, 1, &found);
    return found;
  }
  // Pointers to pixels of a row, from `column` on in steps.
  void pixels(int64_t sample, int64_t row, int64_t column, int64_t step, int64_t count, const A** to) const {
    if (copied) {
      const A* at =
          copy + (((sample - first_sample) * height + row - row_begin) * width + column - column_begin) * pitch;
      for (int64_t i = 0; i < count; i++, at += step * pitch) to[i] = at;
    } else if constexpr (std::is_same_v<T, A>) {
      const bool inside = row >= 0 && row < y.in;
      int64_t at = ((sample * y.in + row) * x.in + column) * layout.channels + c0;
      for (int64_t i = 0; i < count; i++, column += step, at += step * layout.channels)
        to[i] = inside && column >= 0 && column < x.in ? image + at : zeros;
    }
  }
  // ... and zeros outside of what was read.
  const A* pixel_or_zeros(int64_t sample, int64_t row, int64_t column) const {
    if (copied &&
        (row < row_begin || row >= row_begin + height || column < column_begin || column >= column_begin + width))
      return zeros;
    return pixel(sample, row, column);
  }
};

}  // namespace fastnorm::cpu::CPU_CAPABILITY
