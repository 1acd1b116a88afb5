// Boxes, and many of them to compare one with.
#pragma once
#include <cstdint>
#include <limits>
#include <type_traits>

#include "vector.h"

namespace fastnorm::cpu::CPU_CAPABILITY {

template <class A>
struct Box {
  A x1, y1, x2, y2;
  A area() const { return (x2 - x1) * (y2 - y1); }
};

template <class T>
inline Box<Accumulate<T>> load_box(const T* p) {
  using A = Accumulate<T>;
  return {A(p[0]), A(p[1]), A(p[2]), A(p[3])};
}

// min and max that need not think of NaN: it makes the area NaN, which decides.
template <class A>
inline A larger(A a, A b) {
  return a > b ? a : b;
}
template <class A>
inline A smaller(A a, A b) {
  return a < b ? a : b;
}
template <class A>
inline A intersection(const Box<A>& a, const Box<A>& b) {
  return larger(smaller(a.x2, b.x2) - larger(a.x1, b.x1), A(0)) *
         larger(smaller(a.y2, b.y2) - larger(a.y1, b.y1), A(0));
}

// A bit for each lane in which a > b.
template <class A>
inline uint32_t greater(at::vec::Vectorized<A> a, at::vec::Vectorized<A> b) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<A, float>)
    return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ);
  else
    return _mm512_cmp_pd_mask(a, b, _CMP_GT_OQ);
#elif defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<A, float>)
    return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)));
  else
    return uint32_t(_mm256_movemask_pd(_mm256_cmp_pd(a, b, _CMP_GT_OQ)));
#else
  return ~uint32_t((a > b).zero_mask()) & ((1u << at::vec::Vectorized<A>::size()) - 1);
#endif
}

// Boxes in groups of a vector's lanes: x1, y1, x2, y2 and area of a group, each a vector, follow one another.
template <class A>
struct BoxGroup {
  using V = at::vec::Vectorized<A>;
  static constexpr int64_t kLanes = V::size(), kNumbers = 5 * kLanes;

  V x1, y1, x2, y2, area;

  explicit BoxGroup(const A* p)
      : x1(V::loadu(p)),
        y1(V::loadu(p + kLanes)),
        x2(V::loadu(p + 2 * kLanes)),
        y2(V::loadu(p + 3 * kLanes)),
        area(V::loadu(p + 4 * kLanes)) {}
  explicit BoxGroup(const Box<A>& b) : x1(b.x1), y1(b.y1), x2(b.x2), y2(b.y2), area(b.area()) {}

  V intersection(const BoxGroup& other) const {
    using at::vec::clamp_max;
    using at::vec::clamp_min;
    return clamp_min(clamp_max(x2, other.x2) - clamp_min(x1, other.x1), V(A(0))) *
           clamp_min(clamp_max(y2, other.y2) - clamp_min(y1, other.y1), V(A(0)));
  }

  // Whether the IoU of any of them with the other's is greater than the threshold.  Most groups do not touch a box at
  // all and are spared the division.
  bool overlap(const BoxGroup& other, A threshold) const {
    const V both = intersection(other);
    if (!(threshold < 0) && !greater(both, V(A(0)))) return false;
    return greater(both / (area + other.area - both), V(threshold)) != 0;
  }

  // What is not there overlaps nothing.
  static void clear(A* group) {
    for (int64_t i = 0; i < kNumbers; i++) group[i] = std::numeric_limits<A>::quiet_NaN();
  }
  static Box<A> get(const A* groups, int64_t i) {
    const A* const p = groups + i / kLanes * kNumbers + i % kLanes;
    return {p[0], p[kLanes], p[2 * kLanes], p[3 * kLanes]};
  }
  static void set(A* groups, int64_t i, const Box<A>& b) {
    A* const p = groups + i / kLanes * kNumbers + i % kLanes;
    p[0] = b.x1, p[kLanes] = b.y1, p[2 * kLanes] = b.x2, p[3 * kLanes] = b.y2, p[4 * kLanes] = b.area();
  }
};

// The boxes that were kept of a segment, to compare others with.
template <class A>
struct KeptBoxes {
  using Group = BoxGroup<A>;
  using V = typename Group::V;
  static constexpr int64_t kLanes = Group::kLanes, kNumbers = Group::kNumbers;

  A* groups;
  int64_t count = 0;

  explicit KeptBoxes(A* groups) : groups(groups) {}

  static constexpr int64_t kFew = 64;

  // Where segments of more than kFew boxes have their groups, apart from each other.
  static int64_t offset(int64_t first_place) { return 2 * first_place / kLanes * kNumbers; }
  static int64_t numbers(int64_t places) { return (2 * places / kLanes + 2) * kNumbers; }

  Box<A> get(int64_t i) const { return Group::get(groups, i); }
  void add(const Box<A>& b) {
    if (count % kLanes == 0) Group::clear(groups + count / kLanes * kNumbers);
    Group::set(groups, count++, b);
  }

  bool overlap(const Box<A>& b, A threshold) const {
    const Group box(b);
    for (const A* p = groups; p < groups + (count + kLanes - 1) / kLanes * kNumbers; p += kNumbers)
      if (Group(p).overlap(box, threshold)) return true;
    return false;
  }
};

}  // namespace fastnorm::cpu::CPU_CAPABILITY
