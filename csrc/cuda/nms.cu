// Non-maximum suppression.
//
// Boxes come sorted by image, segment and score; a box's place in that order is p, its place in its segment `offset`.
// A segment is taken in chunks of 1024 boxes, all segments at the same time, and nobody asks the host how many there
// are:
//
//   prepare  a thread per place: the box in the type that is computed in, and where its segment begins and ends, by
//            binary search.
//   mask     a thread per box and 64 boxes of its chunk: a bit for each that comes before it and overlaps it.
//   sweep    a warp per segment goes through the chunk, 64 boxes at a time.  What was kept before is known, so one pass
//            over the masks drops what that overlaps; the 64 then decide among themselves: a box is kept when all that
//            it overlaps with are dropped, and dropped when one of them is kept.  There is no barrier in it.
//   push     a thread per later box and some of the kept boxes of the chunk: is it overlapped by one?
//   compact  a block per image writes what was kept, by score.
//
// Sweep and push alternate, as often as an image has chunks at most; where the next chunk is of no segment they return
// at once.  Memory is linear in the number of boxes, some 200 bytes each, and so is the work where few are kept: n *
// 512 comparisons in mask and one with each kept box in push.
#include "nms.cuh"

namespace fastnorm {
namespace {

using Word = unsigned long long;

constexpr int kChunk = 1024, kWord = 64, kThreads = 128, kCompact = 1024, kItems = 8;

template <class A>
struct Work {
  int64_t rows, n, capacity, places;  // places: rows * n
  int words, parts;                   // of a chunk's masks; how many threads in push share the work on a box
  A threshold;
  bool drop;
  double drop_scores;
  const int64_t* order;
  const int64_t* grouped;
  const int64_t* segments;  // of places, or null
  // The workspace.  [places] where nothing else is said.
  Box<A>* box;
  Box<A>* kept_box;        // from each chunk's first place: the boxes that were kept of it
  Word* mask;              // [words][places]
  int64_t* number;         // of the box, counted through all rows
  int* offset;             // of a place in its segment
  int* left;               // places from this one to the end of its segment
  int* kept_in_chunk;      // at a chunk's first place
  int* kept_in_segment;    // at a segment's first place
  unsigned char* dropped;  // [parts][places]
  unsigned char* keep;     // by box number
};

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
  for (int part = 1; part < w.parts; part++) w.dropped[part * w.places + p] = 0;
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

// One bit for each of 64 boxes, of which a lane has two.
__device__ __forceinline__ Word ballot(bool low, bool high) {
  const unsigned a = __ballot_sync(~0u, low), b = __ballot_sync(~0u, high);
  return Word(b) << 32 | a;
}

// Which of the live boxes are kept, where before[h] has the earlier ones that overlap box lane + 32 * h.
__device__ __forceinline__ Word resolve(Word live, const Word (&before)[2], int lane) {
  Word kept = 0;
  while (live) {  // neither kept nor dropped yet; the first of them is kept in any case
    const Word in_doubt = live | kept;
    kept |= ballot((live >> lane & 1) && !(before[0] & in_doubt), (live >> (lane + 32) & 1) && !(before[1] & in_doubt));
    live &= ~kept;
    live &= ballot((live >> lane & 1) && !(before[0] & kept), (live >> (lane + 32) & 1) && !(before[1] & kept));
  }
  return kept;
}

template <class A>
__device__ __forceinline__ bool is_dropped(const Work<A>& w, int64_t p) {
  unsigned char any = 0;
  for (int part = 0; part < w.parts; part++) any |= w.dropped[part * w.places + p];
  return any;
}

// A warp: the chunk that begins at place q.
template <class A>
__device__ __forceinline__ void sweep(const Work<A>& w, int64_t q, int lane) {
  const int64_t first = q - w.offset[q];
  const int size = w.left[q] < kChunk ? w.left[q] : kChunk, earlier = w.kept_in_segment[first];
  int count = 0;
  Word kept = 0;  // lane i has it of boxes 64 * i and on
  for (int d = 0; d * kWord < size && earlier + count < w.capacity; d++) {
    bool live[2];
    Word before[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int c = d * kWord + 32 * h + lane;
      live[h] = c < size && !is_dropped(w, q + c);
      before[h] = live[h] ? w.mask[d * w.places + q + c] : 0;
    }
#pragma unroll 4
    for (int i = 0; i < d; i++) {
      const Word word = __shfl_sync(~0u, kept, i);
#pragma unroll
      for (int h = 0; h < 2; h++)
        if (live[h] && (w.mask[i * w.places + q + d * kWord + 32 * h + lane] & word)) live[h] = false;
    }
    const Word now = resolve(ballot(live[0], live[1]), before, lane);
    if (lane == d) kept = now;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int bit = lane + 32 * h;
      if (!(now >> bit & 1)) continue;
      const int64_t p = q + d * kWord + bit;
      w.kept_box[q + count + __popcll(now & ((Word(1) << bit) - 1))] = w.box[p];
      w.keep[w.number[p]] = 1;
    }
    count += __popcll(now);
  }
  __syncwarp();  // every lane has read `earlier`
  if (lane == 0) w.kept_in_chunk[q] = count, w.kept_in_segment[first] = earlier + count;
}

// A warp looks through 32 places for the beginnings of chunks of this number.
template <class A>
__global__ void __launch_bounds__(kThreads, 4) nms_sweep_kernel(const __grid_constant__ Work<A> w, int chunk) {
  const int64_t p = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int lane = int(threadIdx.x) % 32;
  unsigned begins = __ballot_sync(~0u, p < w.places && w.offset[p < w.places ? p : 0] == chunk * int64_t(kChunk));
  for (; begins; begins &= begins - 1) sweep(w, p - lane + __ffs(int(begins)) - 1, lane);
}

template <class A>
__global__ void __launch_bounds__(kThreads) nms_push_kernel(const __grid_constant__ Work<A> w, int chunk) {
  const int64_t p = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (p >= w.places) return;
  const int64_t offset = w.offset[p], first = p - offset, q = first + chunk * int64_t(kChunk);
  unsigned char* const dropped = w.dropped + (blockIdx.y * w.places + p);
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
  while (w.n > kChunk && w.parts < 8 && w.places * w.parts < int64_t(sm_count()) * 1024) w.parts *= 2;
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
  take(w.dropped, w.parts * w.places), take(w.keep, w.places);
  bytes = size_t(at - begin);
  return w;
}

template <class A>
cudaError_t run(const Nms& a, cudaStream_t stream) {
  size_t bytes;
  const Work<A> w = make_work<A>(a, bytes);
  const dim3 blocks(unsigned((w.places + kThreads - 1) / kThreads)), threads(kThreads);
  cudaError_t error = launch(nms_prepare_kernel<A>, blocks, threads, 0, stream, w, a.boxes, a.scores, a.dtype);
  if (error == cudaSuccess)
    error = launch(nms_mask_kernel<A>, dim3(blocks.x, unsigned(w.words)), threads, 0, stream, w);
  const int chunks = int((w.n + kChunk - 1) / kChunk);
  for (int chunk = 0; chunk < chunks && error == cudaSuccess; chunk++) {
    error = launch(nms_sweep_kernel<A>, blocks, threads, 0, stream, w, chunk);
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
