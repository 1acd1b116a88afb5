// Max-pooling on the CPU; ../max_pool2d.h has the rules.
#include <cmath>
#include <limits>

#include "../max_pool2d.h"
#include "output.h"
#include "parallel.h"
#include "vector.h"

namespace fastnorm::cpu::CPU_CAPABILITY {
namespace {

int read_offset(const void* p, int bytes, int64_t i) {
  switch (bytes) {
    case 1: return static_cast<const uint8_t*>(p)[i];
    case 2: return static_cast<const int16_t*>(p)[i];
    default: return static_cast<const int32_t*>(p)[i];
  }
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

size_t max_pool2d_backward_workspace(const MaxPool2dBackward&) { return 0; }

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
