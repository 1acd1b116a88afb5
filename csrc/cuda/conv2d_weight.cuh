// The weight's and the bias's gradients: see conv2d_backward_weight.cu.
#pragma once
#include "conv2d_launch.cuh"
#include "conv2d_tiles.cuh"
#include "reduce.cuh"

namespace fastnorm {
namespace {

struct WeightProduct {
  ConvShape shape;
  const void *x, *dy;
  void* partial;  // [parts][groups * co][k], k in the order of Depth
  int64_t row_tiles, column_tiles, parts, part_pixels;
};

template <class T, class Shape>
size_t weight_shared() {
  return shared_bytes<Place>(4 * kDepth<T>) + shared_bytes<T>(2 * (Shape::kM + Shape::kN) * kRow<T>);
}

// A block has it in shared memory, as in registers it would take the room of the sums.
struct WeightGeometry {
  GatherAxis y, x;
  Strides of_x, of_dy;
};

// The places of the pixels q0 .. of dy and of x; none from `end` on.
template <class T>
__device__ __forceinline__ void tabulate_pixels(const WeightGeometry& g, int64_t q0, int64_t end, Place* table) {
  if (int(threadIdx.x) >= kDepth<T>) return;
  int64_t q = q0 + threadIdx.x;
  Place in_dy = no_tap(), in_x = no_tap();
  if (q < end) {
    const int qx = split(q, g.x.pixels), qy = split(q, g.y.pixels);
    in_dy = {q * g.of_dy.image + qy * g.of_dy.row + qx * g.of_dy.pixel, 0, 0};
    in_x = place_at(g.of_x, q * g.of_x.image, int64_t(qy) * g.y.step + g.y.origin, int64_t(qx) * g.x.step + g.x.origin);
  }
  table[threadIdx.x] = in_dy;
  table[kDepth<T> + threadIdx.x] = in_x;
}

// kLanes<T> for 16-byte loads of channels of dy and x, or 1.
template <class T, bool kTensor, class Shape, int V>
__global__ void __launch_bounds__(Shape::kThreads) conv2d_weight_kernel(WeightProduct a) {
  using A = Accumulate<T>;
  constexpr Gather kGather = V == 1 ? Gather::kElements : Gather::kBlocks;
  constexpr int kTileValues = (Shape::kM + Shape::kN) * kRow<T>;
  FASTNORM_DYNAMIC_SHARED(unsigned char, memory);
  Shared shared{memory};
  Place* const table = shared.take<Place>(4 * kDepth<T>);
  T* const tiles = shared.take<T>(0);

  const ConvShape& s = a.shape;
  int64_t block = blockIdx.x;
  const int64_t first_row = split(block, a.row_tiles) * int64_t(Shape::kM);
  const int64_t first_column = split(block, a.column_tiles) * int64_t(Shape::kN), group = split(block, s.groups);
  const int64_t first_pixel = block * a.part_pixels, pixels = s.n * s.y.out * s.x.out;
  const int64_t end_pixel = first_pixel + a.part_pixels < pixels ? first_pixel + a.part_pixels : pixels;
  const int64_t columns = s.ci * s.taps();
  FASTNORM_SHARED(WeightGeometry, geometry, 1);
  if (threadIdx.x == 0)
    geometry[0] = {forward_axis(s.y), forward_axis(s.x),
                   image_strides(s.channels_last, s.groups * s.ci, s.y.in, s.x.in),
                   image_strides(s.channels_last, s.groups * s.co, s.y.out, s.x.out)};
  __syncthreads();
  const WeightGeometry& g = geometry[0];

  Gatherer<T, Shape, Shape::kM, kGather, false> left(
      static_cast<const T*>(a.dy) + group * s.co * g.of_dy.channel, 1, 1, s.channels_last,
      [&](int m) { return first_row + m < s.co ? Place{(first_row + m) * g.of_dy.channel, 0, 0} : no_pixel(); });
  Gatherer<T, Shape, Shape::kN, kGather, true> right(static_cast<const T*>(a.x) + group * s.ci * g.of_x.channel,
                                                     unsigned(s.y.in), unsigned(s.x.in), s.channels_last, [&](int n) {
                                                       return first_column + n < columns
                                                                  ? tap_place(g.y, g.x, g.of_x, int(s.ci),
                                                                              s.channels_last, int(first_column + n))
                                                                  : no_pixel();
                                                     });
  Products<T, Shape, kTensor> products;
  auto stage_at = [&](int stage) { return tiles + stage * kTileValues; };
  multiply_tiles<2>(
      end_pixel > first_pixel ? int((end_pixel - first_pixel + kDepth<T> - 1) / kDepth<T>) : 0,
      [&](int tile) {
        tabulate_pixels<T>(g, first_pixel + int64_t(tile) * kDepth<T>, end_pixel, table + tile % 2 * 2 * kDepth<T>);
      },
      [&](int tile, int stage) {
        const Place* const columns_of_dy = table + tile % 2 * 2 * kDepth<T>;
        left.fetch(stage_at(stage), columns_of_dy);
        right.fetch(stage_at(stage) + Shape::kM * kRow<T>, columns_of_dy + kDepth<T>);
      },
      [&](int stage) {
        left.put(stage_at(stage));
        right.put(stage_at(stage) + Shape::kM * kRow<T>);
      },
      [&](int stage) { products.multiply(stage_at(stage), stage_at(stage) + Shape::kM * kRow<T>); });

  A* const partial =
      static_cast<A*>(a.partial) + ((block * s.groups + group) * s.co + first_row) * columns + first_column;
  products.each([&](int m, int n, A v) {
    if (first_row + m < s.co && first_column + n < columns) partial[m * columns + n] = v;
  });
}

// ---- Sums of parts --------------------------------------------------------------------------------------------------

constexpr int kSumThreads = 256;

// result[o][c][t] = the sum of its parts, which are in the order of Depth; with one tap of one channel, result[o].
template <class T, int V>
__global__ void __launch_bounds__(kSumThreads)
    conv2d_parts_kernel(const Accumulate<T>* partial, T* result, int64_t parts, int64_t items, int channels, int taps_y,
                        int taps_x, bool channels_last) {
  using A = Accumulate<T>;
  const int64_t item = int64_t(blockIdx.x) * kSumThreads + threadIdx.x;
  if (item >= items) return;
  A sum = 0;
  for (int64_t part = 0; part < parts; part++) sum += partial[part * items + item];
  int64_t output = item;
  const int taps = taps_y * taps_x, k = split(output, int64_t(channels) * taps);
  const Depth d(k, channels, taps_y, taps_x, channels_last);
  result[(output * channels + d.channel) * taps + d.ky * taps_x + d.kx] = narrow<T>(sum);
}

template <class T>
cudaError_t launch_sum(const Accumulate<T>* partial, void* result, int64_t parts, const ConvShape& s, bool weight,
                       cudaStream_t stream) {
  const int64_t items = weight ? s.weights() : s.groups * s.co;
  dim3 grid;
  if (const cudaError_t error = with_blocks((items + kSumThreads - 1) / kSumThreads, grid); error != cudaSuccess)
    return error;
  return launch(conv2d_parts_kernel<T, 1>, grid, dim3(kSumThreads), 0, stream, partial, static_cast<T*>(result), parts,
                items, weight ? int(s.ci) : 1, weight ? s.y.kernel : 1, weight ? s.x.kernel : 1, s.channels_last);
}

// ---- The bias's gradient --------------------------------------------------------------------------------------------

struct BiasSum {
  const void* dy;
  void* partial;  // [parts][channels]
  Strides strides;
  int64_t n, pixels, channels;  // pixels of an image
  int64_t parts, part_pixels;
  bool channels_last;
};

constexpr int kBiasThreads = 256;

// A block has kChannels channels, and for each 256 / kChannels threads of which each takes every so-many-th pixel.
template <class T, int kChannels, int V>
__global__ void __launch_bounds__(kBiasThreads) conv2d_bias_kernel(BiasSum a) {
  using A = Accumulate<T>;
  constexpr int kRows = kBiasThreads / kChannels;
  FASTNORM_SHARED(A, sums, kBiasThreads);
  int64_t part = blockIdx.x;
  const int lane = threadIdx.x % kChannels, row = threadIdx.x / kChannels;
  const int64_t channel = split(part, (a.channels + kChannels - 1) / kChannels) * int64_t(kChannels) + lane;
  const int64_t begin = part * a.part_pixels, all = a.n * a.pixels;
  const int64_t end = begin + a.part_pixels < all ? begin + a.part_pixels : all;
  A sum = 0;
  if (channel < a.channels) {
    const T* const dy = static_cast<const T*>(a.dy) + channel * a.strides.channel;
    for (int64_t i = begin + row; i < end; i += kRows) {
      int64_t image = i;
      const int pixel = split(image, a.pixels);
      sum += widen(dy[image * a.strides.image + pixel * a.strides.pixel]);
    }
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
#pragma unroll
  for (int half = kRows / 2; half > 0; half /= 2) {
    if (row < half) sums[threadIdx.x] += sums[threadIdx.x + half * kChannels];
    __syncthreads();
  }
  if (row == 0 && channel < a.channels) static_cast<A*>(a.partial)[part * a.channels + channel] = sums[lane];
}

// ---- Launches -------------------------------------------------------------------------------------------------------

// In how many parts the pixels are summed: enough blocks for the device, each with some work.
struct Parts {
  int64_t parts, pixels;
  Parts(int64_t all, int64_t blocks, int64_t least, int multiple) {
    const int64_t wanted = (4 * int64_t(sm_count()) + blocks - 1) / blocks, most = (all + least - 1) / least;
    const int64_t some = wanted < most ? wanted : most > 0 ? most : 1;
    pixels = (all + some - 1) / some;
    pixels = (pixels + multiple - 1) / multiple * multiple;
    parts = pixels > 0 ? (all + pixels - 1) / pixels : 1;
  }
};

template <class T>
bool has_large_weight_tiles(const ConvShape& s) {
  return sizeof(T) != 8 && s.co > LargeTile::kM / 2 && s.ci * s.taps() > LargeTile::kN / 2;
}

template <class T>
Parts weight_parts(const ConvShape& s, WeightProduct* product = nullptr) {
  const int m = has_large_weight_tiles<T>(s) ? LargeTile::kM : SmallTile::kM;
  const int64_t rows = (s.co + m - 1) / m, columns = (s.ci * s.taps() + m - 1) / m;
  const Parts parts(s.n * s.y.out * s.x.out, rows * columns * s.groups, 16 * kDepth<T>, kDepth<T>);
  if (product) {
    product->row_tiles = rows, product->column_tiles = columns;
    product->parts = parts.parts, product->part_pixels = parts.pixels;
  }
  return parts;
}

template <class T>
Parts bias_parts(const ConvShape& s) {
  const int64_t channels = s.groups * s.co;
  return Parts(s.n * s.y.out * s.x.out, s.channels_last ? (channels + 31) / 32 : channels, 2048, 1);
}

template <class T>
size_t weight_workspace(const Conv2dBackwardWeight& a) {
  const ConvShape& s = a.shape;
  if (s.weights() == 0) return 0;
  return shared_bytes<Accumulate<T>>(weight_parts<T>(s).parts * s.weights()) +
         shared_bytes<Accumulate<T>>(bias_parts<T>(s).parts * s.groups * s.co);
}

template <class T, bool kTensor, class Shape>
cudaError_t launch_weight_product(const WeightProduct& a, cudaStream_t stream) {
  const ConvShape& s = a.shape;
  dim3 grid;
  const cudaError_t error = with_blocks(a.row_tiles * a.column_tiles * s.groups * a.parts, grid);
  if (error != cudaSuccess) return error;
  if constexpr (sizeof(T) != 8) {
    constexpr int V = kLanes<T>;
    if (s.channels_last && is_aligned(a.x) && is_aligned(a.dy) && s.ci % V == 0 && s.co % V == 0)
      return launch(conv2d_weight_kernel<T, kTensor, Shape, V>, grid, dim3(Shape::kThreads), weight_shared<T, Shape>(),
                    stream, a);
  }
  return launch(conv2d_weight_kernel<T, kTensor, Shape, 1>, grid, dim3(Shape::kThreads), weight_shared<T, Shape>(),
                stream, a);
}

template <class T>
cudaError_t launch_bias(const Conv2dBackwardWeight& a, void* partial, cudaStream_t stream) {
  const ConvShape& s = a.shape;
  const Parts parts = bias_parts<T>(s);
  const int64_t channels = s.groups * s.co, pixels = int64_t(s.y.out) * s.x.out;
  const BiasSum sum{a.dy,        partial,      image_strides(s.channels_last, channels, s.y.out, s.x.out),
                    s.n,         pixels,       channels,
                    parts.parts, parts.pixels, s.channels_last};
  dim3 grid;
  cudaError_t error = with_blocks((s.channels_last ? (channels + 31) / 32 : channels) * parts.parts, grid);
  if (error != cudaSuccess) return error;
  error = s.channels_last ? launch(conv2d_bias_kernel<T, 32, 1>, grid, dim3(kBiasThreads), 0, stream, sum)
                          : launch(conv2d_bias_kernel<T, 1, 1>, grid, dim3(kBiasThreads), 0, stream, sum);
  if (error != cudaSuccess) return error;
  return launch_sum<T>(static_cast<const Accumulate<T>*>(partial), a.dbias, parts.parts, s, false, stream);
}

template <class T>
cudaError_t launch_backward_weight(const Conv2dBackwardWeight& a, cudaStream_t stream) {
  using A = Accumulate<T>;
  const ConvShape& s = a.shape;
  if (s.weights() == 0) return cudaSuccess;
  WeightProduct product{s, a.x, a.dy, a.workspace, 0, 0, 0, 0};
  weight_parts<T>(s, &product);
  cudaError_t error = with_tensor_cores<T>(a.tf32, [&](auto tensor) {
    constexpr bool kTensor = decltype(tensor)::value;
    if constexpr (sizeof(T) != 8) {
      if (has_large_weight_tiles<T>(s)) return launch_weight_product<T, kTensor, LargeTile>(product, stream);
    }
    return launch_weight_product<T, kTensor, SmallTile>(product, stream);
  });
  if (error != cudaSuccess) return error;
  error = launch_sum<T>(static_cast<const A*>(a.workspace), a.dweight, product.parts, s, true, stream);
  if (error != cudaSuccess || !a.dbias) return error;
  char* const rest = static_cast<char*>(a.workspace) + shared_bytes<A>(product.parts * s.weights());
  return launch_bias<T>(a, rest, stream);
}

}  // namespace
}  // namespace fastnorm
