// Which algorithm a convolution takes on the CPU.  The rows come from `python -m benchmarks conv2d`, which shows every
// algorithm beside torch's oneDNN: one has to be ahead of torch's to be here.
#pragma once
#include "conv2d.h"

namespace fastnorm {

enum class ConvPass { kForward, kBackwardInput, kBackwardWeight };

// Whether there are kernels of an algorithm for this convolution and pass.
inline bool computes(ConvAlgorithm algorithm, const ConvShape& s, ConvPass pass) {
  auto is_3x3 = [](const ConvAxis& a) { return a.kernel == 3 && a.stride == 1 && a.dilation == 1 && a.pad <= 2; };
  switch (algorithm) {
    case ConvAlgorithm::kWinograd: return is_3x3(s.y) && is_3x3(s.x) && s.dtype != DType::kFloat64;
    case ConvAlgorithm::kDirect:
      return pass == ConvPass::kForward || (pass == ConvPass::kBackwardInput && s.y.stride == 1 && s.x.stride == 1);
    case ConvAlgorithm::kDepthwise: return s.ci == 1;
    default: return true;
  }
}

// approximate: whether errors of 1e-5 of the largest result are accepted for speed.
inline ConvAlgorithm choose(const ConvShape& s, ConvPass pass, bool approximate) {
#ifdef FASTNORM_X86
  if (cpu::isa() == cpu::Isa::kDefault) return ConvAlgorithm::kTorch;  // its kernels have vectors there too
#else
  return ConvAlgorithm::kTorch;
#endif
  if (s.dtype != DType::kFloat32) return ConvAlgorithm::kTorch;
  (void)pass, (void)approximate;
  return ConvAlgorithm::kTorch;
}

}  // namespace fastnorm
