// Soft non-maximum suppression.
//
// A round compares the selected box with all others, a vector at a time.  Few of them touch it: their scores are
// lowered one by one.  The next box is the first with the highest score.
#include <cmath>

#include "nms.h"
#include "nms_boxes.h"

namespace fastnorm::cpu::CPU_CAPABILITY {
namespace {

template <class T>
struct Work {
  using A = Accumulate<T>;
  static constexpr int64_t kLanes = BoxGroup<A>::kLanes;
  int64_t groups;
  A* boxes;
  A* scores;  // -inf for what was selected or dropped

  explicit Work(const SoftNms& a) : groups((a.n + kLanes - 1) / kLanes) {
    boxes = static_cast<A*>(a.workspace);
    scores = boxes + groups * BoxGroup<A>::kNumbers;
  }
  size_t bytes() const { return size_t(groups * (BoxGroup<A>::kNumbers + kLanes)) * sizeof(A); }
};

template <class A>
constexpr A kNone = -std::numeric_limits<A>::infinity();

// The first box with this score, which is the highest.
template <class T>
int64_t find(const Work<T>& w, Accumulate<T> score) {
  using V = at::vec::Vectorized<Accumulate<T>>;
  constexpr int64_t kLanes = Work<T>::kLanes;
  for (int64_t g = 0;; g++) {
    const uint32_t less = greater<Accumulate<T>>(V(score), V::loadu(w.scores + g * kLanes));
    if (const uint32_t found = ~less & ((1u << kLanes) - 1)) return g * kLanes + __builtin_ctz(found);
  }
}

// Lowers the scores of what overlaps the chosen box; returns the highest of all.
template <class T>
Accumulate<T> decay(const SoftNms& a, const Work<T>& w, int64_t chosen) {
  using A = Accumulate<T>;
  using V = at::vec::Vectorized<A>;
  constexpr int64_t kLanes = Work<T>::kLanes;
  const T* const boxes = static_cast<const T*>(a.boxes);
  const A drop = A(a.drop_scores), threshold = A(a.threshold), sigma = A(a.sigma);
  const Box<A> box = load_box(boxes + 4 * chosen);
  const BoxGroup<A> one(box);
  V highest(kNone<A>);
  for (int64_t g = 0; g < w.groups; g++) {
    const V both = BoxGroup<A>(w.boxes + g * BoxGroup<A>::kNumbers).intersection(one);
    for (uint32_t touching = greater(both, V(A(0))); touching; touching &= touching - 1) {
      const int64_t i = g * kLanes + __builtin_ctz(touching);
      if (w.scores[i] == kNone<A> || (a.segments && a.segments[i] != a.segments[chosen])) continue;
      const Box<A> other = load_box(boxes + 4 * i);
      const A common = intersection(box, other), iou = common / (box.area() + other.area() - common);
      if (!(iou > 0) || !(a.gaussian || iou >= threshold)) continue;
      const A score = w.scores[i] * (a.gaussian ? std::exp(-(iou * iou) / sigma) : A(1) - iou);
      w.scores[i] = score > drop ? score : kNone<A>;
    }
    highest = at::vec::maximum(highest, V::loadu(w.scores + g * kLanes));
  }
  return at::vec::vec_reduce_all<A>([](V x, V y) { return at::vec::maximum(x, y); }, highest);
}

template <class T>
void select(const SoftNms& a, const Work<T>& w) {
  using A = Accumulate<T>;
  const T *const boxes = static_cast<const T*>(a.boxes), *const scores = static_cast<const T*>(a.scores);
  A highest = kNone<A>;
  for (int64_t i = 0; i < w.groups * Work<T>::kLanes; i++) {
    const A score = i < a.n ? A(scores[i]) : kNone<A>;
    w.scores[i] = score > A(a.drop_scores) ? score : kNone<A>;
    highest = larger(highest, w.scores[i]);
    BoxGroup<A>::set(w.boxes, i, i < a.n ? load_box(boxes + 4 * i) : Box<A>{});
  }
  int64_t count = 0;
  for (; count < a.capacity && highest > kNone<A>; count++) {
    const int64_t chosen = find(w, highest);
    a.indices[count] = chosen;
    static_cast<T*>(a.updated)[count] = T(highest);
    w.scores[chosen] = kNone<A>;
    highest = decay(a, w, chosen);
  }
  *a.count = count;
}

}  // namespace

size_t soft_nms_workspace(const SoftNms& a) {
  size_t bytes = 0;
  with_type(a.dtype, [&](auto zero) { bytes = Work<decltype(zero)>(a).bytes(); });
  return bytes;
}

void soft_nms(const SoftNms& a) {
  with_type(a.dtype, [&](auto zero) { select(a, Work<decltype(zero)>(a)); });
}

}  // namespace fastnorm::cpu::CPU_CAPABILITY
