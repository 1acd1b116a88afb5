// Non-maximum suppression.
//
// Boxes come sorted by image, segment and score; a box's place in that order is p, its place in its segment `offset`.
// A segment is taken in chunks of 1024 boxes, all segments at the same time, and nobody asks the host how many there
// are:
//
//   prepare  a thread per place: the box in the type that is computed in, and where its segment begins and ends, by
//            binary search.
//   mask     a thread per box and 64 boxes of its chunk: a bit for each that comes before it and overlaps it.
//   sweep    a block per segment goes through the chunk, 64 boxes at a time, a warp for each 64.  The first among them
//            decide among themselves: a box is kept when all that come before and overlap it are dropped, and dropped
//            when one of them is kept.  The warps behind drop what these overlap, and so on: 16 barriers a chunk.  A
//            segment of up to 64 boxes needs but a warp.
//   push     a thread per later box and some of the kept boxes of the chunk: is it overlapped by one?
//   compact  a block per image writes what was kept, by score.
//
// Sweep and push alternate, as often as an image has chunks at most; where the next chunk is of no segment they return
// at once.  Memory is linear in the number of boxes, some 200 bytes each.  The work is 512 comparisons a box in mask
// and one with each box that is kept in an earlier chunk in push.
#include "nms_sweep.cuh"

namespace fastnorm {
namespace {

// The first place in [begin, end) whose segment is not less than (or, after, is greater than) this one.
__device__ __forceinline__ int64_t bound(const int64_t* segments, int64_t begin, int64_t end, int64_t segment,
                                         bool after) {
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (segments[middle] < segment || (after && segments[middle] == segment))
      begin = middle + 1;
    else
      end = middle;
  }
  return begin;
}

template <class A>
__global__ void __launch_bounds__(kThreads)
    nms_prepare_kernel(const __grid_constant__ Work<A> w, const void* __restrict__ boxes,
                       const void* __restrict__ scores, DType type) {
  const int64_t p = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (p >= w.places) return;
  const int64_t row = p / w.n * w.n, i = row + w.grouped[p];
  int64_t begin = row, end = row + w.n;
  if (w.segments) {
    const int64_t segment = w.segments[p];
    begin = bound(w.segments, row, p, segment, false), end = bound(w.segments, p, end, segment, true);
  }
  w.box[p] = load_box_as<A>(boxes, type, i);
  w.number[p] = i;
  w.offset[p] = int(p - begin), w.left[p] = int(end - p);
  w.kept_in_chunk[p] = w.kept_in_segment[p] = 0;
  w.dropped[p] = w.drop && !(double(read_as<A>(scores, type, i)) > w.drop_scores);
  w.keep[p] = 0;
}

template <class A>
__global__ void __launch_bounds__(kThreads) nms_mask_kernel(const __grid_constant__ Work<A> w) {
  const int64_t p = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (p >= w.places) return;
  const int before = w.offset[p] % kChunk - kWord * int(blockIdx.y);  // boxes of the chunk from this word on
  if (before < 0) return;
  const auto box = w.box[p];
  const auto* const others = w.box + (p - before);
  Word bits = 0;
#pragma unroll 4
  for (int r = 0; r < (before < kWord ? before : kWord); r++) bits |= Word(overlap(others[r], box, w.threshold)) << r;
  w.mask[int64_t(blockIdx.y) * w.places + p] = bits;
}

template <class A>
__global__ void __launch_bounds__(kThreads) nms_push_kernel(const __grid_constant__ Work<A> w, int chunk) {
  const int64_t p = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (p >= w.places) return;
  const int64_t offset = w.offset[p], first = p - offset, q = first + chunk * int64_t(kChunk);
  auto* const dropped = reinterpret_cast<unsigned char*>(w.dropped + p) + blockIdx.y;
  if (offset < (chunk + 1) * int64_t(kChunk) || *dropped || w.kept_in_segment[first] >= w.capacity) return;
  const auto box = w.box[p];
  const auto* const kept = w.kept_box + q;
  const int count = w.kept_in_chunk[q];
  for (int begin = kWord * int(blockIdx.y); begin < count; begin += kWord * w.parts) {
    const int end = begin + kWord < count ? begin + kWord : count;
    bool any = false;
#pragma unroll(sizeof(A) == 8 ? 1 : 4)
    for (int k = begin; k < end; k++) any |= overlap(kept[k], box, w.threshold);
    if (!any) continue;
    *dropped = 1;
    return;
  }
}

// The sum of v over the threads before this one, and over all; a block of kCompact.
__device__ __forceinline__ int exclusive_sum(int v, int* of_warp, int& total) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  int sum = v;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = __shfl_up_sync(~0u, sum, unsigned(distance));
    if (lane >= distance) sum += other;
  }
  if (lane == 31) of_warp[warp] = sum;
  __syncthreads();
  int earlier = 0;
  total = 0;
  for (int i = 0; i < int(blockDim.x) / 32; i++) {
    earlier += i < warp ? of_warp[i] : 0;
    total += of_warp[i];
  }
  __syncthreads();
  return earlier + sum - v;
}

__global__ void __launch_bounds__(kCompact)
    nms_compact_kernel(const int64_t* __restrict__ order, const unsigned char* __restrict__ keep,
                       int64_t* __restrict__ indices, int64_t* __restrict__ count, int64_t n, int64_t capacity) {
  FASTNORM_SHARED(int, of_warp, kCompact / 32);
  order += blockIdx.x * n, keep += blockIdx.x * n, indices += blockIdx.x * capacity;
  int64_t written = 0;
  for (int64_t begin = 0; begin < n && written < capacity; begin += int64_t(blockDim.x) * kItems) {
    const int64_t own = begin + int64_t(threadIdx.x) * kItems;
    int64_t item[kItems];
    unsigned kept = 0;
#pragma unroll
    for (int k = 0; k < kItems; k++) {
      item[k] = own + k < n ? order[own + k] : 0;
      kept |= unsigned(own + k < n && keep[item[k]]) << k;
    }
    int total;
    int64_t at = written + exclusive_sum(__popc(kept), of_warp, total);
#pragma unroll
    for (int k = 0; k < kItems; k++) {
      if (!(kept >> k & 1)) continue;
      if (at < capacity) indices[at] = item[k];
      at++;
    }
    written += total;
  }
  if (written > capacity) written = capacity;
  for (int64_t i = written + threadIdx.x; i < capacity; i += blockDim.x) indices[i] = -1;
  if (threadIdx.x == 0) count[blockIdx.x] = written;
}

// The kernels' argument; returns the size of the workspace too, which may be null as long as only that is wanted.
template <class A>
Work<A> make_work(const Nms& a, size_t& bytes) {
  Work<A> w{};
  w.rows = a.rows, w.n = a.n, w.capacity = a.capacity, w.places = a.rows * a.n;
  w.words = int((a.n < kChunk ? a.n : kChunk) + kWord - 1) / kWord;
  // Push has enough threads for the device, or shares a chunk's kept boxes among several.
  w.parts = 1;
  while (w.n > kChunk && w.parts < kMostParts && w.places * w.parts < int64_t(sm_count()) * 1024) w.parts *= 2;
  w.threshold = round_down<A>(a.threshold), w.drop = a.drop, w.drop_scores = a.drop_scores;
  w.order = a.order, w.grouped = a.grouped, w.segments = a.grouped_segments;
  auto* const begin = static_cast<unsigned char*>(a.workspace);
  unsigned char* at = begin;
  auto take = [&](auto*& pointer, int64_t number) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(at);
    at += (number * int64_t(sizeof(*pointer)) + 15) / 16 * 16;
  };
  take(w.box, w.places), take(w.kept_box, w.places), take(w.mask, w.words * w.places);
  take(w.number, w.places);
  take(w.offset, w.places), take(w.left, w.places), take(w.kept_in_chunk, w.places), take(w.kept_in_segment, w.places);
  take(w.dropped, w.places), take(w.keep, w.places);
  bytes = size_t(at - begin);
  return w;
}

template <class A>
cudaError_t run(const Nms& a, cudaStream_t stream) {
  size_t bytes;
  const Work<A> w = make_work<A>(a, bytes);
  const dim3 blocks(unsigned((w.places + kThreads - 1) / kThreads)), threads(kThreads);
  const dim3 sweep_blocks(unsigned((w.places + kSweep - 1) / kSweep));
  cudaError_t error = launch(nms_prepare_kernel<A>, blocks, threads, 0, stream, w, a.boxes, a.scores, a.dtype);
  if (error == cudaSuccess)
    error = launch(nms_mask_kernel<A>, dim3(blocks.x, unsigned(w.words)), threads, 0, stream, w);
  const int chunks = int((w.n + kChunk - 1) / kChunk);
  for (int chunk = 0; chunk < chunks && error == cudaSuccess; chunk++) {
    error = launch(nms_sweep_kernel<A>, sweep_blocks, dim3(kSweep), 0, stream, w, chunk);
    if (error == cudaSuccess && chunk + 1 < chunks)
      error = launch(nms_push_kernel<A>, dim3(blocks.x, unsigned(w.parts)), threads, 0, stream, w, chunk);
  }
  if (error != cudaSuccess) return error;
  const int64_t wanted = (w.n + kItems * 32 - 1) / (kItems * 32) * 32;  // whole warps
  return launch(nms_compact_kernel, dim3(unsigned(w.rows)), dim3(unsigned(wanted < kCompact ? wanted : kCompact)), 0,
                stream, w.order, w.keep, a.indices, a.count, w.n, w.capacity);
}

}  // namespace

namespace cuda {

size_t nms_workspace(const Nms& a) {
  return with_accumulate(a.dtype, [&](auto type) {
    size_t bytes;
    make_work<decltype(type)>(a, bytes);
    return bytes;
  });
}

cudaError_t nms(const Nms& a, cudaStream_t stream) {
  return with_accumulate(a.dtype, [&](auto type) { return run<decltype(type)>(a, stream); });
}

}  // namespace cuda
}  // namespace fastnorm
