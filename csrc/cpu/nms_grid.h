// The boxes that were kept of a large segment, by where they are.
//
// The plane is divided into cells about the size of a box.  A kept box is put into every cell that it touches, or on a
// list of its own kind if these are many.  A box whose IoU with it is greater than a threshold t >= 0 has more than t
// of its width and of its height in common with it, so the kept box touches one of the cells that are left when t of
// the box is cut off on each side: for t >= 0.5 mostly a single one.  Coordinates are rounded to cells by a monotonic
// function, so touching survives it.
#pragma once
#include <algorithm>
#include <cmath>

#include "nms_boxes.h"

namespace fastnorm::cpu::CPU_CAPABILITY {

template <class A>
struct BoxGrid {
  using Group = BoxGroup<A>;
  static constexpr int64_t kLanes = Group::kLanes, kNumbers = Group::kNumbers;
  static constexpr int64_t kBoxesACell = 4;  // at least, on average
  static constexpr int64_t kMostCells = 6;   // that a box is put into
  static constexpr int64_t kGroupsABox = kMostCells / kLanes + 1;
  static_assert(kMostCells * kBoxesACell + kLanes <=
                kGroupsABox * kBoxesACell * kLanes);  // every cell has one not full
  static constexpr uint32_t kNone = ~uint32_t(0);

  // Of all segments: each has the part that begins with its first place.
  struct Memory {
    A* groups;        // [places * kGroupsABox][kNumbers]
    uint32_t* next;   // [places * kGroupsABox]: another group of the same cell
    uint32_t* head;   // [places / kBoxesACell]: a cell's group that has room
    uint32_t* count;  // [places / kBoxesACell]: boxes in the cell
  };

  Memory memory;
  KeptBoxes<A> large;  // boxes that touch many cells
  uint32_t groups = 0;
  int64_t columns = 1, rows = 1;
  A x0 = 0, y0 = 0, per_x = 0, per_y = 0, cut;

  // Whether a box may overlap another at all: those without a positive, finite area have an IoU of 0 or NaN.
  static bool solid(const Box<A>& b) {
    return b.x2 > b.x1 && b.y2 > b.y1 && b.area() < std::numeric_limits<A>::infinity();
  }

  // box(i) for i in [0, n) are the boxes that will come.
  template <class F>
  BoxGrid(Memory all, A* list, int64_t first_place, int64_t n, A threshold, F box)
      : memory(all), large(list), cut(A(0.9) * std::min(threshold, A(0.5))) {
    memory.groups += first_place * kGroupsABox * kNumbers, memory.next += first_place * kGroupsABox;
    memory.head += first_place / kBoxesACell, memory.count += first_place / kBoxesACell;
    constexpr A kFar = std::numeric_limits<A>::max();
    Box<A> hull{kFar, kFar, -kFar, -kFar};
    double width = 0, height = 0, number = 1e-9;
    for (int64_t i = 0; i < n; i++) {
      const Box<A> b = box(i);
      if (!solid(b)) continue;
      hull.x1 = smaller(hull.x1, b.x1), hull.y1 = smaller(hull.y1, b.y1);
      hull.x2 = larger(hull.x2, b.x2), hull.y2 = larger(hull.y2, b.y2);
      width += b.x2 - b.x1, height += b.y2 - b.y1, number++;
    }
    divide(hull, width / number, height / number, double(n / kBoxesACell));
    std::fill_n(memory.head, columns * rows, kNone);
    std::fill_n(memory.count, columns * rows, 0);
  }

  void add(const Box<A>& b) {
    if (!solid(b)) return;
    const Cells c = cells(b.x1, b.y1, b.x2, b.y2);
    if ((c.x2 - c.x1 + 1) * (c.y2 - c.y1 + 1) > kMostCells) return large.add(b);
    for (int64_t y = c.y1; y <= c.y2; y++)
      for (int64_t x = c.x1; x <= c.x2; x++) add_to(y * columns + x, b);
  }

  bool overlap(const Box<A>& b, A threshold) const {
    if (!solid(b)) return false;
    if (large.count && large.overlap(b, threshold)) return true;
    const A dx = cut * (b.x2 - b.x1), dy = cut * (b.y2 - b.y1);
    const Cells c = cells(b.x1 + dx, b.y1 + dy, b.x2 - dx, b.y2 - dy);
    const Group box(b);
    for (int64_t y = c.y1; y <= c.y2; y++)
      for (int64_t x = c.x1; x <= c.x2; x++)
        for (uint32_t g = memory.head[y * columns + x]; g != kNone; g = memory.next[g])
          if (Group(memory.groups + g * kNumbers).overlap(box, threshold)) return true;
    return false;
  }

 private:
  struct Cells {
    int64_t x1, y1, x2, y2;
  };

  // At most `most` cells, no smaller than width x height.
  void divide(const Box<A>& hull, double width, double height, double most) {
    const double across = double(hull.x2) - hull.x1, down = double(hull.y2) - hull.y1;
    if (!(across > 0) || !(down > 0) || !(hull.x2 - hull.x1 < std::numeric_limits<A>::infinity()) ||
        !(hull.y2 - hull.y1 < std::numeric_limits<A>::infinity()))
      return;
    const double x = std::max(across / width, 1.0), y = std::max(down / height, 1.0);
    const double shrink = std::sqrt(std::min(1.0, most / (x * y)));
    columns = int64_t(std::clamp(x * shrink, 1.0, most));
    rows = int64_t(std::clamp(y * shrink, 1.0, most / double(columns)));
    x0 = hull.x1, y0 = hull.y1, per_x = A(double(columns) / across), per_y = A(double(rows) / down);
  }

  static int64_t cell(A distance, int64_t number) { return int64_t(smaller(larger(distance, A(0)), A(number - 1))); }
  Cells cells(A x1, A y1, A x2, A y2) const {
    return {cell((x1 - x0) * per_x, columns), cell((y1 - y0) * per_y, rows), cell((x2 - x0) * per_x, columns),
            cell((y2 - y0) * per_y, rows)};
  }

  void add_to(int64_t cell, const Box<A>& b) {
    const uint32_t place = memory.count[cell]++ % kLanes;
    if (place == 0) {
      memory.next[groups] = memory.head[cell];
      memory.head[cell] = groups++;
    }
    A* const group = memory.groups + memory.head[cell] * kNumbers;
    if (place == 0) Group::clear(group);
    Group::set(group, place, b);
  }
};

}  // namespace fastnorm::cpu::CPU_CAPABILITY
