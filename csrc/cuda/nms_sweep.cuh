// What NMS's kernels work on, and the one that decides what is kept of a chunk; nms.cu has the plan.
#pragma once
#include "nms.cuh"

namespace fastnorm {
namespace {

using Word = unsigned long long;

constexpr int kChunk = 1024, kWord = 64, kThreads = 128, kSweep = 512, kCompact = 1024, kItems = 8;
constexpr int kMostParts = 8;
static_assert(kMostParts <= sizeof(Word), "a byte for each");
static_assert(kSweep / 32 == kChunk / kWord, "a warp for each word");

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
  Box<A>* kept_box;      // from each chunk's first place: the boxes that were kept of it
  Word* mask;            // [words][places]
  int64_t* number;       // of the box, counted through all rows
  int* offset;           // of a place in its segment
  int* left;             // places from this one to the end of its segment
  int* kept_in_chunk;    // at a chunk's first place
  int* kept_in_segment;  // at a segment's first place
  Word* dropped;         // not 0: dropped; a byte for each of the parts
  unsigned char* keep;   // by box number
};

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

// Writes down which of the 64 boxes from place q on were kept; `before` of the chunk, which begins at place `chunk`,
// were kept before them.
template <class A>
__device__ __forceinline__ void write_kept(const Work<A>& w, int64_t chunk, int64_t q, Word kept, int before,
                                           int lane) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int bit = lane + 32 * h;
    if (!(kept >> bit & 1)) continue;
    w.kept_box[chunk + before + __popcll(kept & ((Word(1) << bit) - 1))] = w.box[q + bit];
    w.keep[w.number[q + bit]] = 1;
  }
}

// Box lane + 32 * h of the 64 from place q on: whether it may still be kept, and which of the 64 overlap it.
template <class A>
__device__ __forceinline__ void load_word(const Work<A>& w, int64_t q, int size, int word, int lane, bool (&live)[2],
                                          Word (&before)[2]) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const bool there = lane + 32 * h < size;
    const int64_t p = q + lane + 32 * h;
    live[h] = there && !w.dropped[there ? p : q];
    before[h] = there ? w.mask[word * w.places + p] : 0;
  }
}

// A warp: a chunk of up to 64 boxes.
template <class A>
__device__ __forceinline__ void sweep_word(const Work<A>& w, int64_t q, int lane) {
  const int64_t first = q - w.offset[q];
  const int earlier = w.kept_in_segment[first];
  Word kept = 0;
  if (earlier < w.capacity) {
    bool live[2];
    Word before[2];
    load_word(w, q, w.left[q], 0, lane, live, before);
    kept = resolve(ballot(live[0], live[1]), before, lane);
    write_kept(w, q, q, kept, 0, lane);
  }
  __syncwarp();  // every lane has read `earlier`
  if (lane == 0) w.kept_in_chunk[q] = __popcll(kept), w.kept_in_segment[first] = earlier + __popcll(kept);
}

// The block: a larger chunk; `kept` has room for a word per warp.
template <class A>
__device__ __forceinline__ void sweep_chunk(const Work<A>& w, int64_t q, Word* kept) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int64_t first = q - w.offset[q], own = q + warp * kWord;
  const int size = w.left[q] < kChunk ? w.left[q] : kChunk, earlier = w.kept_in_segment[first];
  const int words = (size + kWord - 1) / kWord, rest = size - warp * kWord;
  bool live[2] = {};
  Word before[2] = {}, row[2] = {};  // row: which boxes of word i overlap the own ones
  if (rest > 0) load_word(w, own, rest, warp, lane, live, before);
  auto load_row = [&](int i, int h) {
    return i < warp && lane + 32 * h < rest ? w.mask[i * w.places + own + lane + 32 * h] : Word(0);
  };
  row[0] = load_row(0, 0), row[1] = load_row(0, 1);
  int count = 0, done = 0;
  while (done < words && earlier + count < w.capacity) {
    if (warp == done) {
      const Word now = resolve(ballot(live[0], live[1]), before, lane);
      if (lane == 0) kept[done] = now;
    }
    const Word next[2] = {load_row(done + 1, 0), load_row(done + 1, 1)};  // is on its way while others decide
    __syncthreads();
    const Word now = kept[done++];
    count += __popcll(now);
#pragma unroll
    for (int h = 0; h < 2; h++) live[h] = live[h] && !(row[h] & now), row[h] = next[h];
  }
  int prefix = 0;
  for (int i = 0; i < warp && i < done; i++) prefix += __popcll(kept[i]);
  if (warp < done) write_kept(w, q, own, kept[warp], prefix, lane);
  __syncthreads();  // every thread has read `earlier` and `kept`
  if (threadIdx.x == 0) w.kept_in_chunk[q] = count, w.kept_in_segment[first] = earlier + count;
}

// A block looks through 512 places for the beginnings of chunks of this number.
template <class A>
__global__ void __launch_bounds__(kSweep, 2) nms_sweep_kernel(const __grid_constant__ Work<A> w, int chunk) {
  FASTNORM_SHARED(unsigned, large, kSweep / 32);
  FASTNORM_SHARED(Word, kept, kSweep / 32);
  const int64_t block = int64_t(blockIdx.x) * kSweep, p = block + threadIdx.x;
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const bool begins = p < w.places && w.offset[p < w.places ? p : 0] == chunk * int64_t(kChunk);
  const bool is_large = begins && w.left[begins ? p : 0] > kWord;
  unsigned small = __ballot_sync(~0u, begins && !is_large);
  const unsigned larges = __ballot_sync(~0u, is_large);
  if (lane == 0) large[warp] = larges;
  for (; small; small &= small - 1) sweep_word(w, p - lane + __ffs(int(small)) - 1, lane);
  __syncthreads();
  for (int i = 0; i < kSweep / 32; i++)
    for (unsigned bits = large[i]; bits; bits &= bits - 1) sweep_chunk(w, block + 32 * i + __ffs(int(bits)) - 1, kept);
}

}  // namespace
}  // namespace fastnorm
