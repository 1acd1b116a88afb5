// The extension module: importing it registers the operators; its functions say what was built.
#include <ATen/Version.h>
#include <pybind11/pybind11.h>
#include <torch/version.h>

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
#ifdef FASTNORM_CUDA
  m.attr("cuda_archs") = FASTNORM_CUDA_ARCHS;
#else
  m.attr("cuda_archs") = "";
#endif
  m.attr("torch_version") = TORCH_VERSION;
  m.attr("compiler") = __VERSION__;
}
