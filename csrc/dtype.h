// The element types that kernels know, without torch.
#pragma once

namespace fastnorm {

enum class DType { kFloat64, kFloat32, kFloat16, kBFloat16 };

constexpr int size_of(DType t) { return t == DType::kFloat64 ? 8 : t == DType::kFloat32 ? 4 : 2; }

// Statistics and arithmetic are in this type: float64 for float64, else float32.
constexpr DType accumulate_type(DType t) { return t == DType::kFloat64 ? t : DType::kFloat32; }

}  // namespace fastnorm
