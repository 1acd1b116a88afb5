// A workspace in pieces, every one of them on a cache line of its own.
#pragma once
#include <cstddef>
#include <cstdint>

namespace fastnorm::cpu::CPU_CAPABILITY {

// From null it only counts bytes, and every piece is null.
struct Arena {
  char* begin;
  size_t used = 0;

  Arena(void* p) : begin(static_cast<char*>(p)) {}
  template <class T>
  T* take(int64_t count) {
    const size_t at = used;
    used += (size_t(count) * sizeof(T) + 63) / 64 * 64;
    return begin ? reinterpret_cast<T*>(begin + at) : nullptr;
  }
};

}  // namespace fastnorm::cpu::CPU_CAPABILITY
