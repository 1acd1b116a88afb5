// The activations of the norms on strips; elementwise.h says why.
#include "elementwise.h"

#include "output.h"

namespace fastnorm::cpu::CPU_CAPABILITY {
namespace {

// f(integral_constant<Activation>), but for none.
template <class F>
void with_activation(Activation activation, F f) {
  using enum Activation;
  switch (activation) {
    case kNone: return;
    case kRelu: return f(std::integral_constant<Activation, kRelu>());
    case kRelu6: return f(std::integral_constant<Activation, kRelu6>());
    case kLeakyRelu: return f(std::integral_constant<Activation, kLeakyRelu>());
    case kElu: return f(std::integral_constant<Activation, kElu>());
    case kSigmoid: return f(std::integral_constant<Activation, kSigmoid>());
    case kTanh: return f(std::integral_constant<Activation, kTanh>());
    case kSilu: return f(std::integral_constant<Activation, kSilu>());
    case kGelu: return f(std::integral_constant<Activation, kGelu>());
    case kGeluTanh: return f(std::integral_constant<Activation, kGeluTanh>());
    case kHardswish: return f(std::integral_constant<Activation, kHardswish>());
  }
}

// A bit per lane: whether the slope of the activation at z is 1.
template <class A>
uint32_t slope_bits(Activation activation, Pack<A> z) {
  const Pack<A> zero(A(0));
  if (activation == Activation::kRelu6) return (less_equal(z, zero) | less_equal(Pack<A>(A(6)), z)).unset_bits();
  return activation == Activation::kRelu ? relu_bits(z) : ~less(zero, z).unset_bits();
}

// z = f(z) of a strip, to the end of its last pack, vector by vector: the formulas' constants fill the registers for
// one already.
template <class A, class F>
void for_vectors(A* z, int64_t len, F f) {
  using V = at::vec::Vectorized<A>;
  const int64_t end = (len + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
  for (int64_t i = 0; i < end; i += V::size()) f(V::loadu(z + i)).store(z + i);
}

}  // namespace

template <class T>
void store_activated(Activation activation, double negative_slope, Accumulate<T>* z, T* y, int64_t len, uint8_t* mask,
                     bool streaming) {
  using A = Accumulate<T>;
  using V = at::vec::Vectorized<A>;
  constexpr int64_t W = kLanes<T>;
  if (mask)
    for_packs<T>(len, [&](int64_t i, auto count, auto again) {
      store_bits(mask, i, slope_bits(activation, load(z + place<T>(i, again), Full<T>())), count, again);
    });
  const V slope{A(negative_slope)};
  with_activation(activation,
                  [&](auto constant) { for_vectors(z, len, [&](V v) { return activate(constant.value, v, slope); }); });
  for (int64_t i = 0; i < len; i += W) {
    const Pack<A> v = load(z + i, Full<T>());
    if (len - i >= W)
      store_output(y + i, v, Full<T>(), Zero(), streaming);
    else
      len < W ? store(y, v, len) : store(y + len - W, v, Full<T>());
  }
}

template <class A>
void to_slopes(Activation activation, double negative_slope, A* z, int64_t len) {
  using V = at::vec::Vectorized<A>;
  const V slope{A(negative_slope)};
  with_activation(activation, [&](auto constant) {
    for_vectors(z, len, [&](V v) { return activation_gradient(constant.value, v, slope); });
  });
}

template void store_activated(Activation, double, double*, double*, int64_t, uint8_t*, bool);
template void store_activated(Activation, double, float*, float*, int64_t, uint8_t*, bool);
template void store_activated(Activation, double, float*, c10::Half*, int64_t, uint8_t*, bool);
template void store_activated(Activation, double, float*, c10::BFloat16*, int64_t, uint8_t*, bool);
template void to_slopes(Activation, double, double*, int64_t);
template void to_slopes(Activation, double, float*, int64_t);

}  // namespace fastnorm::cpu::CPU_CAPABILITY
