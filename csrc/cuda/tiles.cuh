// How kernels with sums per channel cut x up, on the host and in kernels.
//
// x is a number of runs, each run_stride elements after the one before.  A group of channels owns the same part of
// every run, and is the work of one block, of one cluster, or of several blocks that leave partial sums:
//
//   layout               run                      group                                    sums of
//   [n][c][hw]           a sample                 a channel: hw elements                   a channel
//   [n][c][hw], small hw a sample                 some adjacent channels, several          several channels
//   [n * hw][c]          a row, c % 8 == 0        some adjacent channels, several          several channels
//   [n * hw][c]          2, 4 or 8 rows (folded): all channels, or, where that is too      several channels, each once
//                        the least that fill      wide, a slice of this wider row          per folded row
//                        whole bytes of the mask
//
// A group's part of a run is one or more segments, and a segment is walked in slots: 16 aligned bytes of memory, of
// which the first and the last may belong to the segment in part (planes of odd hw).  A thread takes every step-th slot
// of its block.  With several channels in a group, step is a multiple of a segment's slots, so that a lane of a thread
// always meets the same channel and sums can stay in registers.
#pragma once
#include <algorithm>
#include <numeric>

#include "vector.cuh"

namespace fastnorm {
namespace {

struct Tiles {
  // Memory.
  int64_t runs, run_stride;
  int64_t total;         // elements of x
  int64_t groups;        // of channels
  int64_t group_length;  // elements of a group in a run; the last group may have fewer
  int misalignment;      // elements from a 16-byte boundary to x, and to all tensors like it
  bool scalar;           // these tensors have different ones: no 16-byte accesses
  bool partial;          // there are slots that do not belong to their segment in whole

  // Channels.
  int64_t c;
  bool several;        // channels in a group
  int group_channels;  // channels in a group
  int plane;           // consecutive elements of one channel, in a group with several
  int folds;           // how often a group meets a channel in a run
  int copies;          // in how many groups a channel is met
  int64_t channels;    // c * copies: what there are partial sums of

  // The mask, in bytes; a segment has planes of mask_plane elements, each on whole bytes.
  int64_t mask_run_stride, mask_group_stride;
  int mask_plane, mask_plane_bytes, segment_mask_bytes;

  // What split() decides.
  int64_t segments;                          // of a group
  int run_segments;                          // of a group in a run
  int segment_length;                        // elements; a run's last segment may have fewer
  int slots;                                 // of a segment
  int parts;                                 // blocks that share a group
  int block_segments;                        // segments of a block; the last ones may have fewer or none
  int threads, step;                         // threads of a block, slots that they take at once
  int step_runs, step_segments, step_slots;  // step = (step_runs * run_segments + step_segments) * slots + step_slots
  int64_t step_elements, next_segment, next_run;  // in x: of a step, and what the end of a segment or of a run adds
  int tensors;                                    // that a resident block copies to shared memory

  __host__ __device__ int block_slots() const { return block_segments * slots; }
};

// A slot: its first element in x and in its segment, and which of its lanes belong to the segment.
struct Slot {
  int64_t offset;
  int first;
  unsigned valid;
};

// A block's share: its group and part, and the segments of the part, which begin in this run with this segment.
struct Place {
  int64_t group, run;
  int part, segment, segments;
};
__device__ __forceinline__ Place place_of(const Tiles& t, unsigned block) {
  const unsigned group = block / unsigned(t.parts);
  Place at{group, 0, int(block - group * unsigned(t.parts)), 0, 0};
  const int64_t first = int64_t(at.part) * t.block_segments;
  at.run = first;
  if (t.run_segments > 1) {
    at.run = first / t.run_segments;
    at.segment = int(first - at.run * t.run_segments);
  }
  at.segments = int(max(int64_t(0), min(int64_t(t.block_segments), t.segments - first)));
  return at;
}

__device__ __forceinline__ Place place(const Tiles& t, bool reverse = false) {
  return place_of(t, reverse ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
}

// Goes through the slots of a block that one thread takes.
template <class T>
struct Walk {
  static constexpr int V = kLanes<T>;
  const Tiles& t;
  int64_t group, run;
  int segment, slot;  // in the run, in the segment
  int64_t element;    // in x: of the slot, were its segment aligned

  // From slot number i of the block on.
  __device__ __forceinline__ Walk(const Tiles& tiles, const Place& at, int i)
      : t(tiles), group(at.group), run(at.run), segment(at.segment) {
    const int segments = i / t.slots;
    slot = i - segments * t.slots;
    go(segments);
  }
  __device__ __forceinline__ void go(int segments) {
    if (t.run_segments == 1) {
      run += segments;
    } else {
      segment += segments;
      const int runs = segment / t.run_segments;
      run += runs;
      segment -= runs * t.run_segments;
    }
    element = run * t.run_stride + group * t.group_length + int64_t(segment) * t.segment_length + slot * V;
  }
  __device__ __forceinline__ void advance() {
    slot += t.step_slots;
    segment += t.step_segments;
    run += t.step_runs;
    element += t.step_elements;
    if (slot >= t.slots) slot -= t.slots, segment++, element += t.next_segment;
    if (segment >= t.run_segments) segment -= t.run_segments, run++, element += t.next_run;
  }
  __device__ __forceinline__ int64_t segment_start() const { return element - slot * V; }
  // Elements of this segment.
  __device__ __forceinline__ int segment_length() const {
    int64_t length = min(t.group_length, t.run_stride - group * t.group_length) - int64_t(segment) * t.segment_length;
    length = min(length, t.total - segment_start());
    return int(max(int64_t(0), min(length, int64_t(t.segment_length))));
  }
  // Elements from a 16-byte boundary to this segment.
  __device__ __forceinline__ int segment_misalignment() const {
    return t.scalar ? 0 : int((t.misalignment + segment_start()) & (V - 1));
  }
  __device__ __forceinline__ Slot operator*() const {
    Slot s{segment_start(), slot * V, kAllLanes<T>};
    if (t.partial) {
      s.first -= segment_misalignment();
      const int begin = max(0, -s.first), end = min(V, segment_length() - s.first);
      s.valid = end > begin ? (1u << end) - (1u << begin) : 0;
      if (t.scalar) s.valid |= 1u << V;  // so that it is not kAllLanes
    }
    s.offset += s.first;
    return s;
  }
  // The same; kWhole: where tiles are not partial.
  template <bool kWhole>
  __device__ __forceinline__ Slot get() const {
    if constexpr (kWhole) return {element, slot * V, kAllLanes<T>};
    return **this;
  }
  // Where the mask of this segment begins.
  __device__ __forceinline__ int64_t mask_start() const {
    return run * t.mask_run_stride + group * t.mask_group_stride + int64_t(segment) * (t.segment_length / 8);
  }
};

// ---- On the host: the choice of groups and segments -----------------------------------------------------------------

constexpr int kSeveralThreads = 192;  // at most, where a group has several channels

// Groups: a run's bytes of a group are about `width`, where a group's width is free, and hold a multiple of `unit`
// channels (itself a multiple of 8) in channels_last runs of one row.
template <class T>
Tiles make_groups(int64_t n, int64_t c, int64_t hw, bool channels_last, int misalignment, bool scalar, int width,
                  int64_t unit = 8) {
  constexpr int V = kLanes<T>;
  Tiles t{};
  t.total = n * c * hw;
  t.c = t.channels = c;
  t.copies = t.folds = t.plane = t.group_channels = t.tensors = 1;
  t.misalignment = misalignment;
  t.scalar = scalar;
  if (channels_last) {
    const int fold = int(8 / std::gcd(c, int64_t(8)));
    const int64_t row = fold * c;
    t.several = true;
    if (misalignment) t.misalignment = 0, t.scalar = true;
    t.run_stride = row;
    t.runs = (n * hw + fold - 1) / fold;
    int64_t length = std::max<int64_t>(width / int(sizeof(T)), 8);
    length = std::min<int64_t>(row, (length + unit - 8) / unit * unit);
    if (fold > 1 && row <= V * kSeveralThreads) {
      length = row;
      t.folds = fold;
      t.group_channels = int(c);
    } else {
      const int64_t least = std::max<int64_t>(length / 2, unit);
      for (int64_t l = length / unit * unit; l >= least; l -= unit)  // all groups alike, if that can be
        if (row % l == 0) {
          length = l;
          break;
        }
      t.channels = row;
      t.copies = fold;
      t.group_channels = int(length);
    }
    t.group_length = length;
    t.groups = (row + length - 1) / length;
    t.mask_run_stride = row / 8;
    t.mask_group_stride = length / 8;
    t.mask_plane = int(length);
    t.mask_plane_bytes = t.segment_mask_bytes = int((length + 7) / 8);
    t.partial = t.scalar || length % V || row % length || t.total % row;
  } else {
    t.run_stride = c * hw;
    t.runs = n;
    t.group_length = hw;
    t.groups = c;
    t.mask_group_stride = (hw + 7) / 8;
    t.mask_run_stride = c * t.mask_group_stride;
    t.partial = t.scalar || misalignment || hw % V;
    // As many channels as make 128 bytes of whole slots, where a channel alone does not.
    int64_t g = V / std::gcd(hw, int64_t(V));
    g *= std::max<int64_t>(1, 128 / std::min<int64_t>(128, g * hw * int64_t(sizeof(T))));
    g = std::min(g, c);
    if (g > 1 && g * hw <= V * kSeveralThreads && c * hw % V == 0 && !misalignment) {
      t.several = true;
      t.plane = int(hw);
      t.group_channels = int(g);
      t.group_length = g * hw;
      t.groups = (c + g - 1) / g;
      t.mask_plane = int(hw);
      t.mask_plane_bytes = int(t.mask_group_stride);
      t.segment_mask_bytes = int(g * t.mask_group_stride);
      t.mask_group_stride = t.segment_mask_bytes;
      t.partial = t.scalar || t.group_length % V || c % g;
    }
  }
  return t;
}

// Segments, shared out to `parts` blocks for each group, and threads, max_threads at most.
template <class T>
Tiles split(Tiles t, int64_t parts, int max_threads) {
  constexpr int V = kLanes<T>;
  t.run_segments = 1;
  t.segment_length = int(t.group_length);
  if (!t.several) {
    // Segments of at most 32 KB, such that no block has much more to do than the others.
    constexpr int64_t kLongest = (32 << 10) / sizeof(T), kShortest = 512 / sizeof(T);
    const int64_t hw = t.group_length, fewest = (hw + kLongest - 1) / kLongest;
    double best = 0;
    for (int64_t count = fewest; count < fewest + 64; count++) {
      const int64_t length = count == 1 ? hw : ((hw + count - 1) / count + 7) / 8 * 8;
      if (count > fewest && length < kShortest) break;
      const int64_t used = (hw + length - 1) / length, segments = t.runs * used;
      double balance =
          double(t.runs) * double(hw) / (double((segments + parts - 1) / parts) * double(length) * double(parts));
      if (hw % V == 0 && hw % length) balance *= 0.9;  // a shorter last segment makes every slot's bounds a question
      if (balance <= best) continue;
      best = balance;
      t.run_segments = int(used);
      t.segment_length = int(length);
      if (best > 0.88) break;
    }
    t.mask_plane = t.segment_length;
    t.mask_plane_bytes = t.segment_mask_bytes = (t.segment_length + 7) / 8;
    t.partial |= hw % t.segment_length != 0;
  }
  t.segments = t.runs * t.run_segments;
  const bool shifted = !t.scalar && !t.several && (t.misalignment || t.group_length % V);
  t.slots = shifted ? (t.segment_length + V - 2) / V + 1 : (t.segment_length + V - 1) / V;
  parts = std::min(std::max(parts, (t.segments * t.slots + (1 << 30) - 1) >> 30), t.segments);
  t.block_segments = int((t.segments + parts - 1) / parts);
  t.parts = int(parts);
  if (t.several) {
    t.step = t.slots * std::max(1, std::min(std::min(max_threads, kSeveralThreads) / t.slots, t.block_segments));
    t.threads = (t.step + 31) / 32 * 32;
  } else {
    t.threads = 64;
    while (t.threads < max_threads && t.threads * 4 < t.block_slots()) t.threads *= 2;
    t.threads = std::min(t.threads, t.block_slots() > 4096 ? max_threads : std::min(max_threads, 256));
    t.step = t.threads;
  }
  t.step_slots = t.step % t.slots;
  t.step_segments = t.step / t.slots % t.run_segments;
  t.step_runs = t.step / t.slots / t.run_segments;
  t.step_elements = t.step_runs * t.run_stride + int64_t(t.step_segments) * t.segment_length + t.step_slots * V;
  t.next_segment = t.segment_length - int64_t(t.slots) * V;
  t.next_run = t.run_stride - int64_t(t.run_segments) * t.segment_length;
  return t;
}

}  // namespace
}  // namespace fastnorm
