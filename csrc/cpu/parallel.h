// One parallel region per operator: on a shared machine a region costs up to a scheduler slice when a core is taken, so
// regions, not kernels, decide.  for_each() inside the region hands out work and ends in a barrier.
#pragma once
#include <cstdint>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "output.h"

namespace fastnorm::cpu::CPU_CAPABILITY {

struct Team {
  int rank, size;

  // body(i) for i in [0, n), each on any thread, and all done when it returns.
  template <class F>
  void for_each(int64_t n, F body) const {
    if (size == 1) {
      for (int64_t i = 0; i < n; i++) body(i);
      return;
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < n; i++) body(i);
  }
};

// body(team) on every thread of a team, and what it streamed to memory is there for all.
template <class F>
inline void parallel(int threads, F body) {
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    {
      body(Team{omp_get_thread_num(), omp_get_num_threads()});
      finish_streaming();
    }
    return;
  }
#endif
  body(Team{0, 1});
  finish_streaming();
}

}  // namespace fastnorm::cpu::CPU_CAPABILITY
