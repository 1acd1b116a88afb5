// Fresh memory costs a page fault per 4 KB, which takes longer than the kernels do: large outputs ask for huge pages.
#pragma once
#include <cstddef>
#include <cstdint>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fastnorm::cpu::CPU_CAPABILITY {

// For memory that is about to be written whole; what is mapped already is not affected.  Null is allowed.
inline void prefer_huge_pages(void* p, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = 2 << 20;
  if (!p || bytes < kHugePage) return;
  const uintptr_t data = reinterpret_cast<uintptr_t>(p);
  const uintptr_t begin = (data + kHugePage - 1) / kHugePage * kHugePage, end = (data + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: it may fail
#endif
}

}  // namespace fastnorm::cpu::CPU_CAPABILITY
