// Max-unpooling on the CPU; ../max_unpool2d.h has the rule.
//
// A plane, or with channels_last some channels of a sample, is filled with zeros and then written in order, by one
// thread: the last value stays.
#include "../max_unpool2d.h"

#include <algorithm>
#include <cstring>

#include "output.h"
#include "parallel.h"
#include "vector.h"

namespace fastnorm::cpu::CPU_CAPABILITY {
namespace {

constexpr int64_t kChannels = 32;  // of a task

// Channels [first, end) of sample n.  Returns where the first invalid index is, or -1.
template <class T>
int64_t unpool(const MaxUnpool2d& a, int64_t n, int64_t first, int64_t end) {
  const T* const x = static_cast<const T*>(a.x);
  T* const y = static_cast<T*>(a.y) + n * a.out * a.c;
  const int64_t channels = end - first;
  if (channels == a.c)
    std::memset(static_cast<void*>(y), 0, size_t(a.out * a.c) * sizeof(T));
  else
    for (int64_t i = 0; i < a.out; i++) std::memset(static_cast<void*>(y + i * a.c + first), 0, channels * sizeof(T));
  int64_t invalid = -1;
  for (int64_t i = 0; i < a.in; i++) {
    const int64_t at = (n * a.in + i) * a.c;
    for (int64_t c = first; c < end; c++) {
      const int64_t to = a.indices[at + c];
      if (to >= 0 && to < a.out)
        y[to * a.c + c] = x[at + c];
      else if (invalid < 0)
        invalid = at + c;
    }
  }
  return invalid;
}

}  // namespace

size_t max_unpool2d_workspace(const MaxUnpool2d& a) { return size_t(a.threads) * sizeof(int64_t); }

void max_unpool2d(const MaxUnpool2d& a) {
  prefer_huge_pages(a.y, size_t(a.n * a.out * a.c * a.element_bytes));
  auto* const invalid = static_cast<int64_t*>(a.workspace);
  std::fill(invalid, invalid + a.threads, int64_t(-1));
  const int64_t parts = a.n >= a.threads ? 1 : (a.c + kChannels - 1) / kChannels, step = (a.c + parts - 1) / parts;
  parallel(a.threads, [&](Team team) {
    team.for_each(a.n * parts, [&](int64_t task) {
      const int64_t first = task % parts * step;
      with_bits(a.element_bytes, [&](auto zero) {
        const int64_t end = std::max(first, std::min(first + step, a.c));
        const int64_t at = unpool<decltype(zero)>(a, task / parts, first, end);
        int64_t& mine = invalid[team.rank];
        if (at >= 0 && (mine < 0 || at < mine)) mine = at;
      });
    });
  });
  for (int i = 0; i < a.threads; i++)
    if (invalid[i] >= 0 && (*a.invalid < 0 || invalid[i] < *a.invalid)) *a.invalid = invalid[i];
}

}  // namespace fastnorm::cpu::CPU_CAPABILITY
