// Max-pooling on the CPU; ../max_pool2d.h has the rules.
#include <cmath>
#include <limits>

#include "../max_pool2d.h"
#include "output.h"
#include "parallel.h"
#include "vector.h"

namespace fastnorm::cpu::CPU_CAPABILITY {
namespace {

void write_offset(void* p, int bytes, int64_t i, int tap) {
  switch (bytes) {
    case 1: static_cast<uint8_t*>(p)[i] = uint8_t(tap); break;
    case 2: static_cast<int16_t*>(p)[i] = int16_t(tap); break;
    default: static_cast<int32_t*>(p)[i] = tap;
  }
}

int read_offset(const void* p, int bytes, int64_t i) {
  switch (bytes) {
    case 1: return static_cast<const uint8_t*>(p)[i];
    case 2: return static_cast<const int16_t*>(p)[i];
    default: return static_cast<const int32_t*>(p)[i];
  }
}

// One window of one channel.
template <class T>
void pool_window(const MaxPool2dForward& a, int64_t n, int oy, int ox, int64_t channel) {
  const PoolShape& s = a.shape;
  const T* const x = static_cast<const T*>(a.x) + n * s.y.in * s.x.in * s.c + channel;
  const int first_row = s.y.first_tap(oy), end_row = s.y.end_tap(oy);
  const int first = s.x.first_tap(ox), end = s.x.end_tap(ox);
  T max = T(-std::numeric_limits<float>::infinity());
  int row = first_row, column = first;
  for (int ky = first_row; ky < end_row; ky++)
    for (int kx = first; kx < end; kx++) {
      const int64_t at = int64_t(s.y.begin(oy) + ky * s.y.dilation) * s.x.in + s.x.begin(ox) + kx * s.x.dilation;
      const T v = x[at * s.c];
      if (v > max || std::isnan(Accumulate<T>(v))) max = v, row = ky, column = kx;
    }
  const int64_t i = ((n * s.y.out + oy) * s.x.out + ox) * s.c + channel;
  static_cast<T*>(a.y)[i] = max;
  if (a.offset) write_offset(a.offset, s.offset_bytes(), i, row * s.x.kernel + column);
  if (a.indices)
    a.indices[i] =
        int64_t(s.y.begin(oy) + row * s.y.dilation) * s.x.in + s.x.begin(ox) + column * s.x.dilation;
}

// One element of dx.
template <class T>
void gather_windows(const MaxPool2dBackward& a, int64_t n, int iy, int ix, int64_t channel) {
  const PoolShape& s = a.shape;
  Accumulate<T> sum = 0;
  for (int oy = s.y.first_window(iy); oy < s.y.end_window(iy); oy++)
    for (int ox = s.x.first_window(ix); ox < s.x.end_window(ix); ox++) {
      const int ky = iy - s.y.begin(oy), kx = ix - s.x.begin(ox);
      if (ky % s.y.dilation || kx % s.x.dilation) continue;
      const int64_t i = ((n * s.y.out + oy) * s.x.out + ox) * s.c + channel;
      if (read_offset(a.offset, s.offset_bytes(), i) == ky / s.y.dilation * s.x.kernel + kx / s.x.dilation)
        sum += Accumulate<T>(static_cast<const T*>(a.dy)[i]);
    }
  static_cast<T*>(a.dx)[((n * s.y.in + iy) * s.x.in + ix) * s.c + channel] = T(sum);
}

}  // namespace

size_t max_pool2d_forward_workspace(const MaxPool2dForward&) { return 0; }
size_t max_pool2d_backward_workspace(const MaxPool2dBackward&) { return 0; }

void max_pool2d_forward(const MaxPool2dForward& a) {
  const PoolShape& s = a.shape;
  with_type(a.dtype, [&](auto zero) {
    parallel(a.threads, [&](Team team) {
      team.for_each(s.n * s.y.out, [&](int64_t task) {
        for (int ox = 0; ox < s.x.out; ox++)
          for (int64_t c = 0; c < s.c; c++)
            pool_window<decltype(zero)>(a, task / s.y.out, int(task % s.y.out), ox, c);
      });
    });
  });
}

void max_pool2d_backward(const MaxPool2dBackward& a) {
  const PoolShape& s = a.shape;
  with_type(a.dtype, [&](auto zero) {
    parallel(a.threads, [&](Team team) {
      team.for_each(s.n * s.y.in, [&](int64_t task) {
        for (int ix = 0; ix < s.x.in; ix++)
          for (int64_t c = 0; c < s.c; c++)
            gather_windows<decltype(zero)>(a, task / s.y.in, int(task % s.y.in), ix, c);
      });
    });
  });
}

}  // namespace fastnorm::cpu::CPU_CAPABILITY
