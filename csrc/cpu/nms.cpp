// Non-maximum suppression.
//
// Boxes are sorted once by score and, where there are segments, stably by segment (radix sort: a few linear passes).
// Then each box is compared with those that were kept before, a vector of them at a time, until one overlaps it: with
// all of them in a small segment, in a large one with those that are near it.  Segments are shared among the threads.
#include "nms.h"

#include "nms_grid.h"
#include "parallel.h"
#include "vector.h"

namespace fastnorm::cpu::CPU_CAPABILITY {
namespace {

// ---- Sorting --------------------------------------------------------------------------------------------------------

template <class Key>
struct Item {
  Key key;
  uint32_t box;
};

// Ascending keys are descending scores: NaN first, -0 like 0.
inline uint32_t key_of(float score) {
  score += 0.f;
  uint32_t bits;
  std::memcpy(&bits, &score, 4);
  return score != score ? 0 : bits >> 31 ? bits : ~(bits | 0x80000000u);
}
inline uint64_t key_of(double score) {
  score += 0.0;
  uint64_t bits;
  std::memcpy(&bits, &score, 8);
  return score != score ? 0 : bits >> 63 ? bits : ~(bits | uint64_t(1) << 63);
}

// Stable.  Sorts items by key, a byte at a time, skipping bytes that are the same in all; returns where they ended up,
// in items or in spare.
template <class Key>
inline Item<Key>* radix_sort(Item<Key>* items, Item<Key>* spare, int64_t n) {
  Key differs = 0;
  for (int64_t i = 1; i < n; i++) differs |= items[i].key ^ items[0].key;
  for (int shift = 0; shift < int(8 * sizeof(Key)); shift += 8) {
    if ((differs >> shift & 0xFF) == 0) continue;
    uint32_t at[256] = {};
    for (int64_t i = 0; i < n; i++) at[items[i].key >> shift & 0xFF]++;
    uint32_t sum = 0;
    for (uint32_t& count : at) {
      const uint32_t before = sum;
      sum += count, count = before;
    }
    for (int64_t i = 0; i < n; i++) spare[at[items[i].key >> shift & 0xFF]++] = items[i];
    Item<Key>* const sorted = spare;
    spare = items, items = sorted;
  }
  return items;
}

// ---- The workspace --------------------------------------------------------------------------------------------------

template <class T>
struct Work {
  using A = Accumulate<T>;
  using ScoreItem = Item<decltype(key_of(A()))>;
  using SegmentItem = Item<uint64_t>;
  struct Segment {
    int64_t begin, end;  // places
    int64_t row;
  };
  ScoreItem* by_score;      // [2][rows * n]
  SegmentItem* by_segment;  // [2][rows * n], if there are segments
  uint32_t* order;          // [rows * n]: a row's boxes by score
  uint32_t* grouped;        // [rows * n]: the same, by segment; or it is order
  uint8_t* keep;            // [rows * n], by box
  int64_t* size;            // [rows]: how many boxes a row has after the score threshold
  int64_t* segments;        // [rows]: how many segments
  Segment* segment;         // [rows * n]: a row's begin at its first place; then all of them
  A* kept;                  // vectors of kept boxes, see nms_boxes.h
  typename BoxGrid<A>::Memory grid;
  size_t bytes;

  explicit Work(const Nms& a) {
    auto* at = static_cast<unsigned char*>(a.workspace);
    const auto* const begin = at;
    const int64_t places = a.rows * a.n;
    auto take = [&](auto*& pointer, int64_t number) {
      pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(at);
      at += (number * int64_t(sizeof(*pointer)) + 63) / 64 * 64;
    };
    take(kept, KeptBoxes<A>::numbers(places));
    take(grid.groups, places * BoxGrid<A>::kGroupsABox * BoxGrid<A>::kNumbers);
    take(grid.next, places * BoxGrid<A>::kGroupsABox);
    take(grid.head, places / BoxGrid<A>::kBoxesACell), take(grid.count, places / BoxGrid<A>::kBoxesACell);
    take(by_score, 2 * places), take(order, places), take(keep, places);
    take(size, a.rows), take(segments, a.rows), take(segment, a.segments ? places : a.rows);
    take(by_segment, a.segments ? 2 * places : 0), take(grouped, a.segments ? places : 0);
    if (!a.segments) grouped = order;
    bytes = size_t(at - begin);
  }
};

// ---- One row, one segment -------------------------------------------------------------------------------------------

// Sorts a row and finds its segments.
template <class T>
void sort_row(const Nms& a, const Work<T>& w, int64_t row) {
  using A = Accumulate<T>;
  const int64_t first = row * a.n, places = a.rows * a.n;
  const T* const scores = static_cast<const T*>(a.scores) + first;
  auto* items = w.by_score + first;
  int64_t size = 0;
  for (int64_t i = 0; i < a.n; i++) {
    const A score = A(scores[i]);
    items[size] = {key_of(score), uint32_t(i)};
    size += !a.drop || double(score) > a.drop_scores;
  }
  items = radix_sort(items, w.by_score + places + first, size);
  uint32_t* const order = w.order + first;
  for (int64_t i = 0; i < size; i++) order[i] = items[i].box;
  std::memset(w.keep + first, 0, size_t(a.n));
  w.size[row] = size;
  auto* const segment = w.segment + (a.segments ? first : row);
  if (!a.segments) {
    segment[0] = {first, first + size, row};
    w.segments[row] = size > 0;
    return;
  }
  auto* grouped = w.by_segment + first;
  for (int64_t i = 0; i < size; i++) grouped[i] = {uint64_t(a.segments[first + order[i]]), order[i]};
  grouped = radix_sort(grouped, w.by_segment + places + first, size);
  int64_t segments = 0;
  for (int64_t i = 0, begin = 0; i < size; i++) {
    w.grouped[first + i] = grouped[i].box;
    if (i + 1 < size && grouped[i + 1].key == grouped[i].key) continue;
    segment[segments++] = {first + begin, first + i + 1, row};
    begin = i + 1;
  }
  w.segments[row] = segments;
}

// Moves the segments of all rows together; returns how many there are.
template <class T>
int64_t gather_segments(const Nms& a, const Work<T>& w) {
  int64_t total = 0;
  for (int64_t row = 0; row < a.rows; row++)
    for (int64_t i = 0; i < w.segments[row]; i++) w.segment[total++] = w.segment[row * (a.segments ? a.n : 1) + i];
  return total;
}

template <class T>
void suppress(const Nms& a, const Work<T>& w, const typename Work<T>::Segment& s) {
  using A = Accumulate<T>;
  const T* const boxes = static_cast<const T*>(a.boxes) + 4 * s.row * a.n;
  uint8_t* const keep = w.keep + s.row * a.n;
  const uint32_t* const numbers = w.grouped + s.begin;
  const A threshold = round_down<A>(a.threshold);
  const int64_t size = s.end - s.begin;
  const bool by_cells = threshold >= 0 && size > 4 * KeptBoxes<A>::kFew;  // else a grid does not pay
  auto box_at = [&](int64_t i) { return load_box(boxes + 4 * int64_t(numbers[i])); };
  // One after the other, as long as they are few.
  A few[KeptBoxes<A>::kFew / KeptBoxes<A>::kLanes * KeptBoxes<A>::kNumbers];
  KeptBoxes<A> list(size <= KeptBoxes<A>::kFew || by_cells ? few : w.kept + KeptBoxes<A>::offset(s.begin));
  int64_t i = 0;
  for (; i < size && list.count < (by_cells ? std::min(a.capacity, KeptBoxes<A>::kFew) : a.capacity); i++) {
    const Box<A> box = box_at(i);
    if (list.overlap(box, threshold)) continue;
    list.add(box);
    keep[numbers[i]] = 1;
  }
  int64_t count = list.count;
  if (i == size || count == a.capacity) return;
  BoxGrid<A> grid(w.grid, w.kept + KeptBoxes<A>::offset(s.begin), s.begin, size, threshold, box_at);
  for (int64_t k = 0; k < list.count; k++) grid.add(list.get(k));
  for (; i < size && count < a.capacity; i++) {
    const Box<A> box = box_at(i);
    if (grid.overlap(box, threshold)) continue;
    grid.add(box);
    keep[numbers[i]] = 1, count++;
  }
}

template <class T>
void compact(const Nms& a, const Work<T>& w, int64_t row) {
  const int64_t first = row * a.n;
  int64_t *const indices = a.indices + row * a.capacity, count = 0;
  for (int64_t i = 0; i < w.size[row] && count < a.capacity; i++) {
    const uint32_t box = w.order[first + i];
    indices[count] = box;
    count += w.keep[first + box];
  }
  a.count[row] = count;
  for (; count < a.capacity; count++) indices[count] = -1;
}

}  // namespace

size_t nms_workspace(const Nms& a) {
  size_t bytes = 0;
  with_type(a.dtype, [&](auto zero) { bytes = Work<decltype(zero)>(a).bytes; });
  return bytes;
}

void nms(const Nms& a) {
  with_type(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    const Work<T> w(a);
    // A region only where there is something to share: one image is sorted and one segment gone through by one thread.
    auto each = [&](int64_t n, auto body) {
      parallel(int(std::min<int64_t>(a.threads, n)), [&](const Team& team) { team.for_each(n, body); });
    };
    each(a.rows, [&](int64_t row) { sort_row(a, w, row); });
    const int64_t segments = gather_segments(a, w);
    each(segments, [&](int64_t i) { suppress(a, w, w.segment[i]); });
    each(a.rows, [&](int64_t row) { compact(a, w, row); });
  });
}

}  // namespace fastnorm::cpu::CPU_CAPABILITY
