// Convolution as a product of the weight's matrix and of pixels, forward (y from x) and backward (dx from dy).
//
//   result[row][q] = sum over k of weight[row][k] * source[place of pixel q + place of k]
//
// A block has kM rows (channels of the result, of one group) by kN pixels, and goes over k, all channels and taps.  The
// weight is copied to the workspace first where its rows aren't in the order of k (see Depth) or not whole 16-byte
// pieces.  dx with a stride: one product for each class of pixels that meet the same taps (see backward_axis()).
#pragma once
#include "conv2d_launch.cuh"
#include "conv2d_tiles.cuh"

namespace fastnorm {
namespace {

struct PixelProduct {
  ConvShape shape;
  int classes_y, classes_x, divisor_y, divisor_x;  // backward
  const void *source, *weight, *bias;
  void* result;
  int64_t weight_row, weight_class;  // how many values a row of the weight's matrix and all rows of a class have
  int64_t row_tiles, pixel_tiles;
  bool wide_stores;
  Activation activation;
  double negative_slope;
};

template <bool kBackward>
struct Sides {
  const ConvShape& s;
  __host__ __device__ int64_t rows() const { return kBackward ? s.ci : s.co; }
  __host__ __device__ int64_t depth() const { return kBackward ? s.co : s.ci; }
  __host__ __device__ Strides source() const {
    return kBackward ? image_strides(s.channels_last, s.groups * s.co, s.y.out, s.x.out)
                     : image_strides(s.channels_last, s.groups * s.ci, s.y.in, s.x.in);
  }
  __host__ __device__ Strides result() const { return Sides<!kBackward>{s}.source(); }
};

// Of one class of pixels.  A block has it in shared memory, as in registers it would take the room of the sums.
struct Geometry {
  GatherAxis y, x;
  Strides source, result;
};

template <bool kBackward>
__device__ __forceinline__ Geometry make_geometry(const PixelProduct& a, int number) {
  const ConvShape& s = a.shape;
  const Sides<kBackward> sides{s};
  return {kBackward ? backward_axis(s.y, a.divisor_y, number / a.classes_x) : forward_axis(s.y),
          kBackward ? backward_axis(s.x, a.divisor_x, number % a.classes_x) : forward_axis(s.x), sides.source(),
          sides.result()};
}

// ---- The weight's matrix --------------------------------------------------------------------------------------------

constexpr int kPackThreads = 256;

// Values of [class][group][row][k], with zeros after the last k.
template <class T, bool kBackward, int V>
__global__ void __launch_bounds__(kPackThreads) conv2d_pack_kernel(PixelProduct a, T* packed, int64_t items) {
  int64_t item = int64_t(blockIdx.x) * kPackThreads + threadIdx.x;
  if (item >= items) return;
  T* const to = packed + item;
  const ConvShape& s = a.shape;
  const Sides<kBackward> sides{s};
  const int k = split(item, a.weight_row), row = split(item, sides.rows()), group = split(item, s.groups);
  const Geometry g = make_geometry<kBackward>(a, int(item));
  const GatherAxis &y = g.y, &x = g.x;
  T value = narrow<T>(0);
  if (k < sides.depth() * y.taps * x.taps) {
    const Depth d(k, int(sides.depth()), y.taps, x.taps, s.channels_last);
    const int64_t output = kBackward ? d.channel : row, input = kBackward ? row : d.channel;
    const int64_t tap = int64_t(d.ky * y.tap_spacing + y.tap_first) * s.x.kernel + d.kx * x.tap_spacing + x.tap_first;
    value = static_cast<const T*>(a.weight)[((group * s.co + output) * s.ci + input) * s.taps() + tap];
  }
  *to = value;
}

// ---- The product ----------------------------------------------------------------------------------------------------

constexpr int kStagedRows = 64;  // of the result in shared memory at a time

template <class T, bool kTensor, class Shape, Gather kGather>
struct ProductTraits {
  static constexpr int kStages = kTensor && kGather == Gather::kCopies ? 3 : 2;
  static constexpr int kTileValues = (Shape::kM + Shape::kN) * kRow<T>;
  static constexpr int kStagedRow = Shape::kN + 1;
  static size_t shared() {
    const size_t tiles = shared_bytes<T>(kStages * kTileValues);
    const size_t staged = shared_bytes<Accumulate<T>>(kStagedRows * kStagedRow);
    return shared_bytes<Place>(2 * kDepth<T>) + shared_bytes<int64_t>(Shape::kN) +
           shared_bytes<Accumulate<T>>(Shape::kM) + (tiles > staged ? tiles : staged);
  }
};

// Rows m0 .. of the block's result, at `staged`, to global memory.  at: where each pixel is, or -1.
template <class T, class Shape>
__device__ __forceinline__ void store_rows(const PixelProduct& a, T* result, int64_t channel,
                                           const Accumulate<T>* staged, const int64_t* at, int64_t rows) {
  constexpr int V = kLanes<T>, kStagedRow = Shape::kN + 1;
  const bool last = a.shape.channels_last;
  const int width = a.wide_stores ? V : 1, inner = (last ? kStagedRows : Shape::kN) / width;
  for (int i = threadIdx.x; i < kStagedRows * Shape::kN / width; i += Shape::kThreads) {
    const int major = i / inner, minor = (i - major * inner) * width;
    const int m = last ? minor : major, n = last ? major : minor;
    if (m >= rows || at[n] < 0) continue;
    T* const to = result + at[n] + m * channel;
    const Accumulate<T>* const from = staged + m * kStagedRow + n;
    if (a.wide_stores) {
      Accumulate<T> value[V];
#pragma unroll
      for (int v = 0; v < V; v++) value[v] = from[v * (last ? kStagedRow : 1)];
      store(to, narrow<T>(value));
    } else {
      *to = narrow<T>(*from);
    }
  }
}

// z = activation(z) for the rows in shared memory.  A function of its own: inlined, it would be half of every kernel.
template <class Shape, class A>
__device__ __noinline__ void activate_rows(Activation activation, A negative_slope, A* staged) {
#pragma unroll 1
  for (int i = threadIdx.x; i < kStagedRows * Shape::kN; i += Shape::kThreads) {
    A& z = staged[i / Shape::kN * (Shape::kN + 1) + i % Shape::kN];
    z = activate(activation, z, negative_slope);
  }
}

// Two large tiles at a time where their registers allow it.
template <class T, bool kTensor, Gather kGather>
constexpr int kLargeTilesAtOnce = kTensor && sizeof(T) == 2 && kGather == Gather::kCopies ? 2 : 1;
template <class T, bool kTensor, class Shape, Gather kGather>
constexpr int kBlocksOf = kBlocksAtOnce<kLargeTilesAtOnce<T, kTensor, kGather> * 256 / Shape::kThreads>;

template <class T, bool kBackward, bool kTensor, class Shape, Gather kGather>
__global__ void __launch_bounds__(Shape::kThreads, (kBlocksOf<T, kTensor, Shape, kGather>))
    conv2d_pixels_kernel(PixelProduct a) {
  using A = Accumulate<T>;
  using Traits = ProductTraits<T, kTensor, Shape, kGather>;
  FASTNORM_DYNAMIC_SHARED(unsigned char, memory);
  Shared shared{memory};
  Place* const table = shared.take<Place>(2 * kDepth<T>);
  int64_t* const at = shared.take<int64_t>(Shape::kN);
  A* const bias = shared.take<A>(Shape::kM);
  T* const tiles = shared.take<T>(0);
  A* const staged = shared.take<A>(0);

  const ConvShape& s = a.shape;
  const Sides<kBackward> sides{s};
  int64_t block = blockIdx.x;
  const int64_t first_row = split(block, a.row_tiles) * int64_t(Shape::kM);
  const int64_t first_pixel = split(block, a.pixel_tiles) * int64_t(Shape::kN), group = split(block, s.groups);
  FASTNORM_SHARED(Geometry, geometry, 1);
  if (threadIdx.x == 0) geometry[0] = make_geometry<kBackward>(a, int(block));
  __syncthreads();
  const Geometry& g = geometry[0];
  const GatherAxis &y = g.y, &x = g.x;
  const int64_t pixels = s.n * y.pixels * x.pixels;
  if (first_pixel >= pixels) return;
  const int depth = int(sides.depth()) * y.taps * x.taps;
  const Strides &from = g.source, &to = g.result;

  for (int n = threadIdx.x; n < Shape::kN; n += Shape::kThreads) {
    int64_t q = first_pixel + n;
    const bool valid = q < pixels;
    const int64_t qx = split(q, x.pixels) * int64_t(x.spacing) + x.first;
    const int64_t qy = split(q, y.pixels) * int64_t(y.spacing) + y.first;
    at[n] = valid ? q * to.image + qy * to.row + qx * to.pixel : -1;
  }
  for (int m = threadIdx.x; m < Shape::kM; m += Shape::kThreads)
    bias[m] = a.bias && first_row + m < sides.rows()
                  ? A(widen(static_cast<const T*>(a.bias)[group * sides.rows() + first_row + m]))
                  : A(0);

  const T* const weight =
      static_cast<const T*>(a.weight) + block * a.weight_class + group * sides.rows() * a.weight_row;
  const WeightRows<T, Shape, Shape::kM> left{weight, first_row, sides.rows(), a.weight_row};
  Gatherer<T, Shape, Shape::kN, kGather, false> right(
      static_cast<const T*>(a.source) + group * sides.depth() * from.channel, unsigned(y.source), unsigned(x.source),
      !s.channels_last,
      [&](int n) { return first_pixel + n < pixels ? pixel_place(y, x, from, first_pixel + n) : no_pixel(); });
  Products<T, Shape, kTensor> products;
  auto stage_at = [&](int stage) { return tiles + stage * Traits::kTileValues; };
  multiply_tiles<Traits::kStages>(
      (depth + kDepth<T> - 1) / kDepth<T>,
      [&](int tile) {
        const int k = tile * kDepth<T> + int(threadIdx.x);
        if (int(threadIdx.x) < kDepth<T>)
          table[tile % 2 * kDepth<T> + threadIdx.x] =
              k < depth ? tap_place(y, x, from, int(sides.depth()), s.channels_last, k) : no_tap();
      },
      [&](int tile, int stage) {
        left.fetch(stage_at(stage), int64_t(tile) * kDepth<T>);
        right.fetch(stage_at(stage) + Shape::kM * kRow<T>, table + tile % 2 * kDepth<T>);
      },
      [&](int stage) { right.put(stage_at(stage) + Shape::kM * kRow<T>); },
      [&](int stage) { products.multiply(stage_at(stage), stage_at(stage) + Shape::kM * kRow<T>); });

  const bool relu = a.activation == Activation::kRelu;
  [[maybe_unused]] const bool simple = relu || a.activation == Activation::kNone;
  T* const result = static_cast<T*>(a.result) + (group * sides.rows() + first_row) * to.channel;
  for (int m0 = 0; m0 < Shape::kM; m0 += kStagedRows) {
    __syncthreads();
    products.each([&](int m, int n, A v) {
      if (m < m0 || m >= m0 + kStagedRows) return;
      v += bias[m];
      staged[(m - m0) * Traits::kStagedRow + n] = relu && v <= 0 ? A(0) : v;
    });
    __syncthreads();
    if constexpr (!kBackward) {
      if (!simple) {
        activate_rows<Shape>(a.activation, A(a.negative_slope), staged);
        __syncthreads();
      }
    }
    store_rows<T, Shape>(a, result + m0 * to.channel, to.channel, staged, at, sides.rows() - first_row - m0);
  }
}

// ---- Launches -------------------------------------------------------------------------------------------------------

// Sizes of the weight's matrix, which don't depend on where tensors are.
template <bool kBackward>
void set_matrix(PixelProduct& a) {
  const ConvShape& s = a.shape;
  int taps = s.taps();
  a.classes_y = a.classes_x = a.divisor_y = a.divisor_x = 1;
  if (kBackward) {
    a.classes_y = tap_classes(s.y), a.classes_x = tap_classes(s.x);
    a.divisor_y = common_divisor(s.y.stride, s.y.dilation), a.divisor_x = common_divisor(s.x.stride, s.x.dilation);
    taps = backward_axis(s.y, a.divisor_y, 0).taps * backward_axis(s.x, a.divisor_x, 0).taps;
  }
  const Sides<kBackward> sides{s};
  const int64_t lanes = 16 / size_of(s.dtype);
  a.weight_row = (sides.depth() * taps + lanes - 1) / lanes * lanes;
  a.weight_class = s.groups * sides.rows() * a.weight_row;
}

template <bool kBackward>
size_t packed_bytes(const ConvShape& s) {
  PixelProduct a{};
  a.shape = s;
  set_matrix<kBackward>(a);
  return size_t(a.classes_y * int64_t(a.classes_x) * a.weight_class) * size_t(size_of(s.dtype));
}

// Whether the weight is its matrix already.
template <bool kBackward>
bool is_matrix(const PixelProduct& a) {
  const ConvShape& s = a.shape;
  return !kBackward && s.ci * s.taps() == a.weight_row && is_aligned(a.weight) && (!s.channels_last || s.taps() == 1);
}

template <bool kBackward>
Gather choose_gather(const PixelProduct& a, int lanes) {
  const ConvShape& s = a.shape;
  const Strides source = Sides<kBackward>{s}.source();
  if (!is_aligned(a.source)) return Gather::kElements;
  if (s.channels_last) return Sides<kBackward>{s}.depth() % lanes == 0 ? Gather::kCopies : Gather::kElements;
  return is_point(s) && source.channel % lanes == 0 ? Gather::kBlocks : Gather::kElements;
}

template <bool kBackward>
bool has_wide_stores(const PixelProduct& a, int lanes) {
  const ConvShape& s = a.shape;
  if (!is_aligned(a.result)) return false;
  if (s.channels_last) return Sides<kBackward>{s}.rows() % lanes == 0;
  return (!kBackward || (s.y.stride == 1 && s.x.stride == 1)) && Sides<kBackward>{s}.result().channel % lanes == 0;
}

template <class T, bool kBackward, bool kTensor, class Shape, Gather kGather>
cudaError_t launch_product(PixelProduct a, cudaStream_t stream) {
  const ConvShape& s = a.shape;
  const int64_t pixels = kBackward
                             ? s.n * ((s.y.in + s.y.stride - 1) / s.y.stride) * ((s.x.in + s.x.stride - 1) / s.x.stride)
                             : s.n * s.y.out * s.x.out;
  a.row_tiles = (Sides<kBackward>{s}.rows() + Shape::kM - 1) / Shape::kM;
  a.pixel_tiles = (pixels + Shape::kN - 1) / Shape::kN;
  dim3 grid;
  const int64_t blocks = a.row_tiles * a.pixel_tiles * s.groups * a.classes_y * a.classes_x;
  if (const cudaError_t error = with_blocks(blocks, grid); error != cudaSuccess) return error;
  return launch(conv2d_pixels_kernel<T, kBackward, kTensor, Shape, kGather>, grid, dim3(Shape::kThreads),
                ProductTraits<T, kTensor, Shape, kGather>::shared(), stream, a);
}

template <class T, bool kBackward, bool kTensor, class Shape>
cudaError_t launch_gather(const PixelProduct& a, cudaStream_t stream) {
  if constexpr (sizeof(T) != 8) {
    switch (choose_gather<kBackward>(a, kLanes<T>)) {
      case Gather::kCopies: return launch_product<T, kBackward, kTensor, Shape, Gather::kCopies>(a, stream);
      case Gather::kBlocks: return launch_product<T, kBackward, kTensor, Shape, Gather::kBlocks>(a, stream);
      default: break;
    }
  }
  return launch_product<T, kBackward, kTensor, Shape, Gather::kElements>(a, stream);
}

// Large tiles where they fill the device, but not where half of one would be empty.
template <class T, bool kBackward, bool kTensor>
cudaError_t launch_shape(const PixelProduct& a, cudaStream_t stream) {
  if constexpr (sizeof(T) != 8) {
    const ConvShape& s = a.shape;
    const int64_t rows = Sides<kBackward>{s}.rows(), values = kBackward ? s.inputs() : s.outputs();
    if (rows > LargeTile::kM / 2 && values / (LargeTile::kM * LargeTile::kN) >= sm_count())
      return launch_gather<T, kBackward, kTensor, LargeTile>(a, stream);
  }
  return launch_gather<T, kBackward, kTensor, SmallTile>(a, stream);
}

template <class T, bool kBackward>
cudaError_t launch_pixels(PixelProduct a, void* workspace, bool tf32, cudaStream_t stream) {
  set_matrix<kBackward>(a);
  if (!is_matrix<kBackward>(a)) {
    const int64_t items = a.classes_y * int64_t(a.classes_x) * a.weight_class;
    if (items > 0) {
      dim3 grid;
      cudaError_t error = with_blocks((items + kPackThreads - 1) / kPackThreads, grid);
      if (error != cudaSuccess) return error;
      error = launch(conv2d_pack_kernel<T, kBackward, 1>, grid, dim3(kPackThreads), 0, stream, a,
                     static_cast<T*>(workspace), items);
      if (error != cudaSuccess) return error;
    }
    a.weight = workspace;
  }
  a.wide_stores = has_wide_stores<kBackward>(a, kLanes<T>);
  return with_tensor_cores<T>(
      tf32, [&](auto tensor) { return launch_shape<T, kBackward, decltype(tensor)::value>(a, stream); });
}

}  // namespace
}  // namespace fastnorm
