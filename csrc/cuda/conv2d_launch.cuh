// What the launchers of the convolution kernels share.
#pragma once
#include "conv2d.cuh"

namespace fastnorm {
namespace {

inline bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Whether each pixel of y is from the one pixel of x at the same place.
inline bool is_point(const ConvShape& s) {
  auto is_one = [](const ConvAxis& axis) { return axis.kernel == 1 && axis.stride == 1 && axis.pad == 0; };
  return is_one(s.y) && is_one(s.x);
}

// What 32-bit coordinates and numbers of taps can hold.
inline bool is_possible(const ConvShape& s) {
  auto fits = [](const ConvAxis& a) {
    return a.in <= kMaxExtent && a.out <= kMaxExtent && a.pad <= kMaxExtent && a.stride <= kMaxExtent &&
           int64_t(a.kernel) * a.dilation <= kMaxExtent;
  };
  constexpr int64_t kMaxDepth = INT32_MAX - 1024;
  return fits(s.y) && fits(s.x) && s.ci * s.taps() <= kMaxDepth && s.co * s.taps() <= kMaxDepth;
}

// As a grid; more than a launch can have is an error of the launch.
inline cudaError_t with_blocks(int64_t blocks, dim3& grid) {
  if (blocks <= 0 || blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  grid = dim3(unsigned(blocks));
  return cudaSuccess;
}

// Whether products of the type run on tensor cores where there are some.
template <class T>
bool uses_tensor_cores(bool allow_tf32) {
#ifdef FASTNORM_CUDA_EMULATION
  if (compute_capability() < 80) return false;
#endif
  return sizeof(T) == 2 || (sizeof(T) == 4 && allow_tf32);
}

// f(std::bool_constant<kTensor>()); of 16-bit types there is one kind, which Products chooses by architecture.
template <class T, class F>
cudaError_t with_tensor_cores(bool allow_tf32, F f) {
#ifdef FASTNORM_CUDA_EMULATION
  constexpr bool kChoice = sizeof(T) != 8;
#else
  constexpr bool kChoice = sizeof(T) == 4;
  if constexpr (sizeof(T) == 2) return f(std::true_type());
#endif
  if constexpr (kChoice) {
    if (uses_tensor_cores<T>(allow_tf32)) return f(std::true_type());
  }
  if constexpr (kChoice || sizeof(T) == 8) return f(std::false_type());
}

}  // namespace
}  // namespace fastnorm
