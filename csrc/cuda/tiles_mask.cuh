// The mask that forward leaves for backward: a bit per element (an op's contract says where).  Its bytes begin where
// planes do, slots where memory is aligned, so a slot's bits may lie in two bytes, or in those of several planes.
#pragma once
#include "tiles.cuh"

namespace fastnorm {
namespace {

// Where the mask has a slot's first valid element, how many valid lanes follow, and how many of them in the same plane.
struct MaskPlace {
  unsigned lane, count, plane, element, split;
  __device__ __forceinline__ MaskPlace(const Tiles& t, const Slot& s, unsigned all) {
    lane = unsigned(max(0, -s.first));
    count = unsigned(__popc(s.valid & all));
    element = unsigned(s.first) + lane;
    plane = t.mask_plane < t.segment_length ? element / unsigned(t.mask_plane) : 0;
    element -= plane * unsigned(t.mask_plane);
    split = min(count, unsigned(t.mask_plane) - element);
  }
};
struct MaskBytes {
  unsigned here, next, other;
};

// The bytes with a slot's bits: of the plane where it begins, and of the one after.  Loads alone, so that several
// slots' can be on their way at once; mask_bits() makes bits of them.
template <class T>
__device__ __forceinline__ MaskBytes read_mask(const uint8_t* mask, const Walk<T>& walk, const Slot& s) {
  const Tiles& t = walk.t;
  const MaskPlace m(t, s, kAllLanes<T>);
  MaskBytes bytes{0, 0, 0};
  if (m.count == 0) return bytes;
  const uint8_t* plane = mask + walk.mask_start() + m.plane * t.mask_plane_bytes;
  bytes.here = plane[m.element / 8];
  if (m.element % 8 + m.split > 8) bytes.next = plane[m.element / 8 + 1];
  if (m.count > m.split) bytes.other = plane[t.mask_plane_bytes];
  return bytes;
}

template <class T>
__device__ __forceinline__ unsigned mask_bits(const uint8_t* mask, const Walk<T>& walk, const Slot& s,
                                              const MaskBytes& bytes) {
  const Tiles& t = walk.t;
  const MaskPlace m(t, s, kAllLanes<T>);
  unsigned bits = (bytes.here | bytes.next << 8) >> m.element % 8 & ((1u << m.split) - 1);
  if (t.mask_plane >= kLanes<T>) return (bits | bytes.other << m.split) << m.lane;
  // Tiny planes: there may be more than two.
  const uint8_t* plane = mask + walk.mask_start() + m.plane * t.mask_plane_bytes;
  for (unsigned have = m.split; have < m.count; have++) {
    const unsigned element = m.element + have;
    const unsigned byte =
        plane[element / unsigned(t.mask_plane) * t.mask_plane_bytes + element % unsigned(t.mask_plane) / 8];
    bits |= (byte >> element % unsigned(t.mask_plane) % 8 & 1) << have;
  }
  return bits << m.lane;
}

// Packs a bit per lane, as threads left them in shared memory slot by slot, into the mask's bytes of some of the
// block's segments.
template <class T>
__device__ void write_mask(const Tiles& t, const Place& at, int first_segment, int segments, const uint8_t* bits,
                           uint8_t* mask) {
  constexpr int V = kLanes<T>;
  const int each = t.segment_mask_bytes;
  int segment = int(threadIdx.x) / each, byte = int(threadIdx.x) - segment * each;
  const int step = int(blockDim.x) / each, step_bytes = int(blockDim.x) - step * each;
  Walk<T> walk(t, at, 0);
  walk.go(first_segment + segment);
  while (segment < segments) {
    const int plane = t.mask_plane < t.segment_length ? byte / t.mask_plane_bytes : 0;
    const int in_plane = (byte - plane * t.mask_plane_bytes) * 8;
    const int first = plane * t.mask_plane + in_plane;
    const int count = min(min(8, t.mask_plane - in_plane), walk.segment_length() - first);
    if (count > 0) {
      const int lane = first + walk.segment_misalignment();
      const uint8_t* from = bits + segment * t.slots + lane / V;
      unsigned packed = *from++ >> lane % V;
      for (int have = V - lane % V; have < count; have += V) packed |= unsigned(*from++) << have;
      mask[walk.mask_start() + byte] = uint8_t(packed & ((1u << count) - 1));
    }
    const int carry = byte + step_bytes >= each;
    byte += step_bytes - (carry ? each : 0);
    segment += step + carry;
    walk.go(step + carry);
  }
}

}  // namespace
}  // namespace fastnorm
