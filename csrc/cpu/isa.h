// The CPU kernels are compiled once per instruction set, each time in a namespace of its own; which one runs is chosen
// from what torch found on this processor (ATEN_CPU_CAPABILITY overrides).
#pragma once

namespace fastnorm::cpu {

enum class Isa { kDefault, kAvx2, kAvx512 };

// The chosen one; in library.cpp.  512-bit vectors lower the clock of all that runs on the core for a while, by a tenth
// on Intel's Sapphire Rapids: narrow_will_do is for calls that are so short that the interpreter around them would lose
// more than the kernel wins.
Isa isa(bool narrow_will_do = false);

template <class Args>
Isa isa_for(const Args& args) {
  if constexpr (requires { args.narrow_will_do(); })
    return isa(args.narrow_will_do());
  else
    return isa();
}

}  // namespace fastnorm::cpu

// Declares name(const Args&) for every instruction set, and the function that calls the chosen one.
#ifdef FASTNORM_X86
#define FASTNORM_CPU_KERNEL(Result, name, Args)     \
  namespace DEFAULT {                               \
  Result name(const Args&);                         \
  }                                                 \
  namespace AVX2 {                                  \
  Result name(const Args&);                         \
  }                                                 \
  namespace AVX512 {                                \
  Result name(const Args&);                         \
  }                                                 \
  inline Result name(const Args& args) {            \
    switch (isa_for(args)) {                        \
      case Isa::kAvx512: return AVX512::name(args); \
      case Isa::kAvx2: return AVX2::name(args);     \
      default: return DEFAULT::name(args);          \
    }                                               \
  }
#else
#define FASTNORM_CPU_KERNEL(Result, name, Args) \
  namespace DEFAULT {                           \
  Result name(const Args&);                     \
  }                                             \
  inline Result name(const Args& args) { return DEFAULT::name(args); }
#endif
