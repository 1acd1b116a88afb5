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
    case ConvAlgorithm::kWinograd:
    case ConvAlgorithm::kWinograd2x2: return is_3x3(s.y) && is_3x3(s.x) && s.dtype != DType::kFloat64;
    case ConvAlgorithm::kDirect: return pass != ConvPass::kBackwardWeight || s.ci <= kDirectTerms;
    case ConvAlgorithm::kDepthwise:
      if (s.ci != 1 || s.co != 1) return false;
      return s.channels_last || pass != ConvPass::kBackwardWeight || s.has_centred_rows();
    default: return true;
  }
}

// What a choice looks at: the pass; channels of a group that are read and made, results and their pixels; whether
// strides leave gaps in the gradient to x, which direct kernels would fill with zeros; the processor.
struct ConvMeasure {
  int64_t n, height, width, terms, made, results, pixels;
  int64_t fewest, most;  // of terms and made
  bool forward, to_weight, strides, gaps, planes;
  // What malloc() maps anew for each call: torch pays for page faults and for reading what it is going to overwrite.
  bool fresh;
  // With vectors of 16 numbers oneDNN is nearer to the peak, and a panel of 32 channels is harder to fill.
  bool wide_vectors = cpu::isa() == cpu::Isa::kAvx512;

  ConvMeasure(const ConvShape& s, ConvPass pass) {
    const bool to_input = pass == ConvPass::kBackwardInput;
    forward = pass == ConvPass::kForward, to_weight = pass == ConvPass::kBackwardWeight, planes = !s.channels_last;
    terms = to_input ? s.co : s.ci, made = to_input ? s.ci : s.co;
    fewest = std::min(terms, made), most = std::max(terms, made);
    results = to_input ? s.inputs() : s.outputs();
    n = s.n, height = to_input ? s.y.in : s.y.out, width = to_input ? s.x.in : s.x.out;
    pixels = n * height * width;
    strides = s.y.stride > 1 || s.x.stride > 1, gaps = strides && to_input;
    fresh = results * 4 > (int64_t(32) << 20);
  }
  // Winograd's tiles of edge x edge results: there are enough of them for the filters' transform to pay, each has
  // enough results, and channels fill the vectors.
  bool suits_winograd(int edge, int64_t least_tiles, int64_t results_each) const {
    const int64_t tiles = n * ((height + edge - 1) / edge) * ((width + edge - 1) / edge);
    return fewest >= 16 && tiles >= least_tiles && pixels >= results_each * tiles;
  }
  bool suits_winograd_2x2() const { return suits_winograd(2, 8, 2); }
};

// For what oneDNN does not compute: torch's own loops are 2 to 100 times as slow in 16 bits, and in float64 as fast as
// its matrix product, which ours beats by what it need not copy.
inline ConvAlgorithm choose_without_onednn(const ConvShape& s, ConvPass pass) {
  const ConvMeasure m(s, pass);
  auto takes = [&](ConvAlgorithm a, bool here) { return here && computes(a, s, pass); };
  if (takes(ConvAlgorithm::kWinograd2x2, m.suits_winograd_2x2())) return ConvAlgorithm::kWinograd2x2;
  if (takes(ConvAlgorithm::kDepthwise, true)) return ConvAlgorithm::kDepthwise;
  if (takes(ConvAlgorithm::kDirect, s.ci <= 8 && !m.gaps)) return ConvAlgorithm::kDirect;
  if (s.dtype == DType::kFloat64 && (m.to_weight || m.gaps || s.taps() == 1)) return ConvAlgorithm::kTorch;
  return ConvAlgorithm::kIm2col;
}

// The gradient to the weight of what is not in groups and has no far strides: oneDNN converts planes to layouts of its
// own, and turns channels_last weights' gradients round.  With few channels it is behind, but where they fill neither
// its vectors nor ours.
inline ConvAlgorithm choose_to_weight(const ConvShape& s, const ConvMeasure& m) {
  const bool planes = m.planes, wide_vectors = m.wide_vectors;
  constexpr auto kTorch = ConvAlgorithm::kTorch, kIm2col = ConvAlgorithm::kIm2col, kDirect = ConvAlgorithm::kDirect;
  const int taps = s.taps(), panel = wide_vectors ? 32 : 16;
  const bool point = taps == 1, large_window = taps > 9, largest_window = taps > 25, long_rows = m.width >= 14;
  // dy's channels fill panels: x's need not, which favours small windows.
  const bool whole = s.co % panel == 0;
  if (whole && (s.ci < 16 || (s.ci == 16 && wide_vectors && !large_window))) {
    const bool behind = largest_window ? s.ci > 1 && m.width < 56 : wide_vectors ? s.ci > 8 : s.ci > 3 && long_rows;
    return !planes && large_window && behind ? kTorch : kIm2col;
  }
  if (s.ci == 1) {
    const bool behind =
        wide_vectors ? (large_window ? s.co > 8 : !planes && s.co >= 48) : !planes && largest_window && s.co > 8;
    return behind ? kTorch : kDirect;
  }
  if (s.ci < 16 && planes) {
    if (!wide_vectors) return s.co <= 8 || (s.ci <= 3 && !large_window) ? kDirect : kIm2col;
    if (s.co <= 8 && s.ci <= 6) return kDirect;
    if (s.ci <= 3) return large_window || (s.co >= 48 && !point) ? kTorch : kDirect;
    return large_window && s.co < 32 ? kTorch : kIm2col;
  }
  if (s.ci < 16) {
    const bool behind = wide_vectors   ? s.co >= 48 || s.ci <= 4 || (s.co > 8 && long_rows)
                        : large_window ? s.ci > 3 && long_rows
                                       : s.co > 6 && s.co < 32;
    return point || behind ? kTorch : kIm2col;
  }
  if (point && m.pixels < 256) return kTorch;
  if (wide_vectors && std::max(s.y.dilation, s.x.dilation) > 1 && s.ci >= 128) return kTorch;
  if (planes && wide_vectors && s.ci < 24 && s.co < 32 && !point) return kTorch;
  if (planes) {
    const bool part = wide_vectors ? s.ci >= 24 && s.ci < 64 && s.ci % 16 != 0 : s.ci < 24;  // of oneDNN's vectors
    return !large_window || part ? kIm2col : kTorch;
  }
  if (wide_vectors) {
    // x is copied, which few channels of dy do not pay for; but oneDNN waits for it where it comes from memory.
    const bool for_few = s.ci >= 64 && s.co <= 96 && s.inputs() * 4 <= int64_t(32) << 20;
    return large_window || m.fewest < 24 || (point && (m.strides || for_few)) ? kTorch : kIm2col;
  }
  return large_window && s.ci < 32 ? kTorch : kIm2col;
}

// So few channels' transforms take longer than their products with the fastest of the others.
inline bool winograd_pays(const ConvShape& s, const ConvMeasure& m) {
  if (m.fewest >= 24) return true;
  if (s.groups > 1) return !m.wide_vectors && (m.forward || m.to_weight);
  if (m.to_weight) return !m.wide_vectors || m.planes || m.most >= 24;
  return !m.wide_vectors || m.most >= 32;
}
inline bool winograd_2x2_pays(const ConvShape& s, const ConvMeasure& m) {
  if (m.to_weight) return m.fewest >= 24 || !m.wide_vectors || (s.groups == 1 && m.planes && s.ci >= 24);
  if (s.groups > 1) return m.fewest >= 48 || (m.planes && m.fewest >= 24 && m.width >= 14);
  if (m.most > 24) return m.fewest >= 24 || !m.wide_vectors;
  return m.fewest >= 24 && m.forward && m.wide_vectors && !m.planes;
}

// Convolutions in groups that Winograd's does not take.  Groups of few channels leave the lanes of a matrix product
// empty; pixels fill them.  oneDNN is ahead where a group's channels fill its vectors, or half of them, but behind in
// windows of 1x1, and where planes have strides.
inline ConvAlgorithm choose_grouped(const ConvShape& s, const ConvMeasure& m, ConvPass pass) {
  constexpr auto kTorch = ConvAlgorithm::kTorch, kIm2col = ConvAlgorithm::kIm2col, kDirect = ConvAlgorithm::kDirect,
                 kDepthwise = ConvAlgorithm::kDepthwise;
  const bool planes = m.planes, wide_vectors = m.wide_vectors, to_weight = m.to_weight;
  const bool small = s.taps() <= 9;
  if (s.ci == 1 && s.co == 1) {
    // In channels_last torch's kernels are ahead in the arithmetic of small windows, and behind where they pay for
    // fresh pages in every call, in short rows of what stays in the caches, and in gradients to larger windows.
    const int width = std::min(s.x.in, s.x.out);
    const bool wide = width >= 20, shortest = width <= 8 && !small && !m.strides, cached = m.results <= 1 << 19;
    if (planes && to_weight) {
      const bool in_blocks =
          computes(kDepthwise, s, pass) && int64_t(s.y.in) * s.x.in <= 1 << 14;  // they are copied whole
      return in_blocks ? kDepthwise : width >= 12 ? kDirect : kTorch;
    }
    if (planes || m.fresh) return kDepthwise;
    const bool ahead = to_weight   ? !small || width >= 12
                       : m.forward ? (wide ? s.taps() >= 49 && !wide_vectors : cached && (small || shortest))
                       : m.strides ? small && !wide && m.results <= 1 << 21
                                   : shortest || (wide_vectors && (!small || (!wide && cached)));
    return ahead ? kDepthwise : kTorch;
  }
  if (s.taps() == 1) return !to_weight || wide_vectors || m.width >= 20 ? kIm2col : kTorch;
  if (to_weight) {
    if (s.ci < 8 && (planes || s.ci <= 4)) return kDirect;
    if (!planes) return s.ci <= 8 && small && (wide_vectors || m.width >= 40) ? kDirect : kTorch;
    if (s.ci == 8 && small != wide_vectors) return kDirect;
    if (s.ci == 8) return small ? kIm2col : kTorch;
    return s.ci < 16 || (s.ci <= 24 && small && m.strides) ? kIm2col : kTorch;
  }
  if (!planes) {
    if (m.made > 1 && m.made <= 4 && !m.strides && !wide_vectors) return kDirect;
    return m.fewest > 8 && m.fewest % 8 != 0 && !m.strides ? kIm2col : kTorch;
  }
  if (m.gaps) return m.fewest < 16 || (m.fewest == 16 && wide_vectors) ? kTorch : kIm2col;
  if (m.made < 16) return kDirect;
  return wide_vectors ? (m.strides || m.fewest % 16 != 0 ? kIm2col : kTorch) : (small ? kIm2col : kTorch);
}

// A row: an algorithm, where it is taken, and why.  The first that fits counts.  onednn: whether torch's convolution is
// that library's for this dtype.
inline ConvAlgorithm choose(const ConvShape& s, ConvPass pass, bool approximate, bool onednn) {
  // Torch has vectors where ours are compiled without, on Arm among others.
  if (cpu::isa() == cpu::Isa::kDefault) return ConvAlgorithm::kTorch;
  if (!onednn) return choose_without_onednn(s, pass);
  if (s.dtype != DType::kFloat32) return ConvAlgorithm::kTorch;  // 16-bit products, which ours do not use
  const ConvMeasure m(s, pass);
  const bool planes = m.planes, forward = m.forward, strides = m.strides, wide_vectors = m.wide_vectors;
  auto takes = [&](ConvAlgorithm a, bool here) {
    return here && computes(a, s, pass) && !(a == ConvAlgorithm::kDirect && m.gaps);
  };

  // A quarter of the multiplications, where the error is allowed, or 4/9 with less of it than torch's own sums have.
  if (takes(ConvAlgorithm::kWinograd,
            approximate && m.suits_winograd(4, m.to_weight ? 48 : 16, 10) && winograd_pays(s, m)))
    return ConvAlgorithm::kWinograd;
  if (takes(ConvAlgorithm::kWinograd2x2, m.suits_winograd_2x2() && winograd_2x2_pays(s, m)))
    return ConvAlgorithm::kWinograd2x2;
  if (s.groups > 1) return choose_grouped(s, m, pass);
  // First layers leave the lanes of a matrix product empty, and so do LeNet's; pixels fill them.  Far strides leave
  // little of a line that a vector could read.
  const bool point = s.taps() == 1;
  if (std::max(s.y.stride, s.x.stride) > 2) {
    // Patches are copied once, and then a product.
    const bool patches = s.y.kernel <= s.y.stride && s.x.kernel <= s.x.stride;
    if (patches && s.ci < 16) {
      const bool behind = m.to_weight
                              ? planes && s.taps() > 49 && m.pixels < 2000  // sums of few pixels for many weights
                              : m.gaps || (!planes && wide_vectors && s.taps() <= 16 && !m.fresh);
      return behind ? ConvAlgorithm::kTorch : ConvAlgorithm::kIm2col;
    }
    return forward && s.ci < 16 && s.taps() > 49 && !wide_vectors ? ConvAlgorithm::kIm2col : ConvAlgorithm::kTorch;
  }
  if (m.to_weight) return choose_to_weight(s, m);
  const bool small = m.terms * m.made <= 128 && m.width >= 28;
  if (takes(ConvAlgorithm::kDirect, planes && (m.terms <= 4 || m.made <= 4 || small))) return ConvAlgorithm::kDirect;
  if (!planes && m.terms <= 4 && !m.gaps) {
    if (m.made <= (wide_vectors ? 8 : 6)) return ConvAlgorithm::kDirect;
    if (m.fresh || (!wide_vectors && s.taps() * m.terms >= 75)) return ConvAlgorithm::kIm2col;
  }
  const int64_t most = wide_vectors && small ? 8 : 6;
  if (takes(ConvAlgorithm::kDirect, m.terms <= (m.made <= 4 ? 32 : 16) && m.made <= most))
    return ConvAlgorithm::kDirect;
  if (forward && planes && m.terms < 16 && (m.made >= 48 || !wide_vectors)) return ConvAlgorithm::kIm2col;
  // Rows shorter than a vector, as LeNet's second layer has them.
  if (forward && !planes && m.terms < 16 && s.taps() > 9 && m.width < 14) return ConvAlgorithm::kIm2col;
  // Windows of 1x1 over planes are a product straight on the tensor, which oneDNN turns round.
  if (planes && point && !strides && s.y.pad == 0 && s.x.pad == 0 && m.fewest >= 16)
    return m.pixels >= 256 ? ConvAlgorithm::kIm2col : ConvAlgorithm::kTorch;
  // Too few channels for Winograd's.
  if (s.taps() == 9 && !strides && m.fewest >= 16 && (m.fewest < 24 || m.most <= 24)) {
    const bool long_rows = m.width >= 28 && m.made <= 24 && m.terms <= 32;
    if (planes) return long_rows ? ConvAlgorithm::kDirect : ConvAlgorithm::kIm2col;
    if (!wide_vectors && m.most < 24) return ConvAlgorithm::kIm2col;
  }
  // oneDNN converts planes to layouts of its own and back, which shows in the smaller windows.
  const bool ahead = planes ? (strides ? m.fewest >= 16 && s.taps() <= 9 : m.fewest >= 32 && s.taps() < 9)
                            : point && (strides ? m.fewest >= 64 : m.fresh);
  return ahead ? ConvAlgorithm::kIm2col : ConvAlgorithm::kTorch;
}

}  // namespace fastnorm
