// The extension module: importing it registers the operators; isa() says which CPU kernels run.
#include <ATen/Version.h>
#include <pybind11/pybind11.h>

#include <string>

#include "cpu/isa.h"

namespace fastnorm::cpu {

Isa isa() {
  static const Isa chosen = [] {
    const std::string name = at::get_cpu_capability();
    return name == "AVX512" ? Isa::kAvx512 : name == "AVX2" ? Isa::kAvx2 : Isa::kDefault;
  }();
  return chosen;
}

}  // namespace fastnorm::cpu

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastnorm's compiled operators (torch.ops.fastnorm).";
  m.def("isa", [] {
#ifdef FASTNORM_X86
    const char* const names[] = {"DEFAULT", "AVX2", "AVX512"};
    return std::string(names[int(fastnorm::cpu::isa())]);
#else
    return std::string("DEFAULT");
#endif
  });
}
