// Windows over images, for every pooling: where they begin, and what images are in memory.  No torch here.
#pragma once
#include <cstddef>
#include <cstdint>

#include "activation.h"
#include "cpu/isa.h"
#include "dtype.h"
#ifdef FASTNORM_CUDA
#include <cuda_runtime_api.h>
#endif

namespace fastnorm {

// The windows along one direction.
struct PoolAxis {
  int in, out, kernel, stride, pad, dilation;

  // Where the window of output o begins; negative in the padding.
  FASTNORM_HOST_DEVICE int begin(int o) const { return o * stride - pad; }
  // The first tap of a window that is not in the padding before x, and one past the last that is not behind x: there is
  // no tap inside if that is not larger.
  FASTNORM_HOST_DEVICE int first_tap(int o) const {
    const int b = begin(o);
    return b < 0 ? (dilation - 1 - b) / dilation : 0;
  }
  FASTNORM_HOST_DEVICE int end_tap(int o) const {
    const int left = in - begin(o);
    return left > (kernel - 1) * int64_t(dilation) ? kernel : (left + dilation - 1) / dilation;
  }
  // The windows that may have a tap at position i: from the first to before the end.
  FASTNORM_HOST_DEVICE int first_window(int i) const {
    const int64_t b = i + int64_t(pad) - int64_t(kernel - 1) * dilation;
    return b <= 0 ? 0 : int((b + stride - 1) / stride);
  }
  FASTNORM_HOST_DEVICE int end_window(int i) const {
    const int64_t last = (i + int64_t(pad)) / stride;
    return last < out ? int(last) + 1 : out;
  }
};

// In memory x is [n][y.in][x.in][c]; y, its offsets and indices are [n][y.out][x.out][c].  Planes ([samples][channels]
// [height][width]) have n = samples * channels and c = 1.
struct PoolShape {
  int64_t n, c;
  PoolAxis y, x;

  FASTNORM_HOST_DEVICE int64_t inputs() const { return n * y.in * x.in * c; }
  FASTNORM_HOST_DEVICE int64_t outputs() const { return n * y.out * x.out * c; }
  // As cpu/isa.h has it; results are the same to the bit.
  bool narrow_will_do() const { return inputs() <= 1 << 14; }
  // Bytes of one offset: uint8, int16 or int32.
  FASTNORM_HOST_DEVICE int offset_bytes() const {
    const int64_t taps = int64_t(y.kernel) * x.kernel;
    return taps <= 256 ? 1 : taps <= 32768 ? 2 : 4;
  }
};

}  // namespace fastnorm
