// The weight's gradient as a matrix product: see conv2d_backward_weight.cu.
#pragma once
#include "conv2d_parts.cuh"
#include "conv2d_tiles.cuh"

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

// ---- Launches -------------------------------------------------------------------------------------------------------

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
cudaError_t launch_weight(const Conv2dBackwardWeight& a, cudaStream_t stream) {
  WeightProduct product{a.shape, a.x, a.dy, a.workspace, 0, 0, 0, 0};
  weight_parts<T>(a.shape, &product);
  return with_tensor_cores<T>(a.tf32, [&](auto tensor) {
    constexpr bool kTensor = decltype(tensor)::value;
    if constexpr (sizeof(T) != 8) {
      if (has_large_weight_tiles<T>(a.shape)) return launch_weight_product<T, kTensor, LargeTile>(product, stream);
    }
    return launch_weight_product<T, kTensor, SmallTile>(product, stream);
  });
}

}  // namespace
}  // namespace fastnorm
