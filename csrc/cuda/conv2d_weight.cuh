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

// How dy and x are read: value by value, 16 bytes of neighbouring pixels (k) of dy alone or of both, or of channels.
enum class WeightLoads { kElements, kPixelsOfDy, kPixels, kChannels };

template <class T, bool kTensor, class Shape, WeightLoads kLoads>
struct WeightTraits {
  static constexpr Gather kLeft = kLoads == WeightLoads::kElements   ? Gather::kElements
                                  : kLoads == WeightLoads::kChannels ? Gather::kBlocks
                                                                     : Gather::kCopies;
  static constexpr Gather kRight = kLoads == WeightLoads::kPixelsOfDy ? Gather::kElements : kLeft;
  static constexpr int kStages = kTensor && kRight == Gather::kCopies ? 3 : 2;
  static constexpr int kTileValues = (Shape::kM + Shape::kN) * kRow<T>;
  static size_t shared() { return shared_bytes<Place>(4 * kDepth<T>) + shared_bytes<T>(kStages * kTileValues); }
};

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

// V: of the widest loads.
template <class T, bool kTensor, class Shape, WeightLoads kLoads, int V>
__global__ void __launch_bounds__(Shape::kThreads, 1) conv2d_weight_kernel(WeightProduct a) {
  using A = Accumulate<T>;
  using Traits = WeightTraits<T, kTensor, Shape, kLoads>;
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

  Gatherer<T, Shape, Shape::kM, Traits::kLeft, false> left(
      static_cast<const T*>(a.dy) + group * s.co * g.of_dy.channel, 1, 1, s.channels_last,
      [&](int m) { return first_row + m < s.co ? Place{(first_row + m) * g.of_dy.channel, 0, 0} : no_pixel(); });
  Gatherer<T, Shape, Shape::kN, Traits::kRight, true> right(
      static_cast<const T*>(a.x) + group * s.ci * g.of_x.channel, unsigned(s.y.in), unsigned(s.x.in), s.channels_last,
      [&](int n) {
        return first_column + n < columns
                   ? tap_place(g.y, g.x, g.of_x, int(s.ci), s.channels_last, int(first_column + n))
                   : no_pixel();
      });
  Products<T, Shape, kTensor> products;
  auto stage_at = [&](int stage) { return tiles + stage * Traits::kTileValues; };
  multiply_tiles<Traits::kStages>(
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

inline WeightLoads choose_loads(const WeightProduct& a, int lanes) {
  const ConvShape& s = a.shape;
  if (!is_aligned(a.dy)) return WeightLoads::kElements;
  if (s.channels_last) {
    const bool whole = is_aligned(a.x) && s.ci % lanes == 0 && s.co % lanes == 0;
    return whole ? WeightLoads::kChannels : WeightLoads::kElements;
  }
  if (int64_t(s.y.out) * s.x.out % lanes != 0) return WeightLoads::kElements;
  return is_point(s) && is_aligned(a.x) ? WeightLoads::kPixels : WeightLoads::kPixelsOfDy;
}

template <class T, bool kTensor, class Shape, WeightLoads kLoads>
cudaError_t launch_loads(const WeightProduct& a, cudaStream_t stream) {
  constexpr int V = kLoads == WeightLoads::kElements ? 1 : kLanes<T>;
  dim3 grid;
  const cudaError_t error = with_blocks(a.row_tiles * a.column_tiles * a.shape.groups * a.parts, grid);
  if (error != cudaSuccess) return error;
  return launch(conv2d_weight_kernel<T, kTensor, Shape, kLoads, V>, grid, dim3(Shape::kThreads),
                WeightTraits<T, kTensor, Shape, kLoads>::shared(), stream, a);
}

template <class T, bool kTensor, class Shape>
cudaError_t launch_weight_product(const WeightProduct& a, cudaStream_t stream) {
  if constexpr (sizeof(T) != 8) {
    switch (choose_loads(a, kLanes<T>)) {
      case WeightLoads::kPixelsOfDy: return launch_loads<T, kTensor, Shape, WeightLoads::kPixelsOfDy>(a, stream);
      case WeightLoads::kPixels: return launch_loads<T, kTensor, Shape, WeightLoads::kPixels>(a, stream);
      case WeightLoads::kChannels: return launch_loads<T, kTensor, Shape, WeightLoads::kChannels>(a, stream);
      default: break;
    }
  }
  return launch_loads<T, kTensor, Shape, WeightLoads::kElements>(a, stream);
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
