// What the derivatives of max-pooling and max-unpooling share.
#pragma once
#include "norm_autograd.h"

namespace fastnorm {

// t[..., indices], where both are images and the indices are positions in t's planes.
inline Tensor gather_planes(const Tensor& t, const Tensor& indices) {
  auto flat = [](const Tensor& image) {  // flatten() is not known to vmap's predecessor, which gradients still use
    auto sizes = image.sym_sizes().vec();
    const c10::SymInt width = sizes.back();
    sizes.pop_back();
    sizes.back() = sizes.back() * width;
    return image.reshape_symint(sizes);
  };
  return flat(t).gather(-1, flat(indices)).reshape_symint(indices.sym_sizes());
}

}  // namespace fastnorm
