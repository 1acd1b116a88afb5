// Convolution of planes with windows of 1x1, and its gradient to the input: a matrix product straight on the tensor.
//
// Rows of the product are result channels, columns pixels: 16 neighbours of a plane are a vector already, of the input
// and of the result, so that nothing is turned round.  Panels of pixels are copied together, [term][pixel], and weights
// as [tile][term][row of the tile]: planes lie a power of two apart and would push each other out of the caches.
//
// Floor: n * pixels * co * ci multiply-adds.  A block's pixels stay in L2, and a tile's weights in L1 for all of them;
// the lines of its results are fetched while they are computed.  Where there are few tiles, copying would take as long
// as they do: panels are read in the planes, and the next one is fetched meanwhile.
#pragma once
#include "conv2d_problem.h"

namespace fastnorm::cpu::CPU_CAPABILITY {

inline bool is_pointwise(const ConvShape& s) {
  auto is_point = [](const ConvAxis& a) { return a.kernel == 1 && a.stride == 1 && a.pad == 0; };
  return !s.channels_last && is_point(s.y) && is_point(s.x);
}

template <class T>
struct Pointwise : ConvWork<T> {
  using Work = ConvWork<T>;
  using typename Work::A, typename Work::V;
  using Work::kColumns, Work::p, Work::n, Work::groups, Work::terms, Work::results;

  static constexpr int64_t kDepth = 128;        // terms that are summed by themselves: a longer sum is less exact
  static constexpr int64_t kBytes = 256 << 10;  // of a block's pixels, which stay in L2
  static constexpr int64_t kFewTiles = 7;

  const int64_t hw, pixels, vectors;  // pixels of a plane; of all samples; vectors of those
  const int64_t block, blocks;        // vectors of a block, which are its panels
  const int64_t split;                // parts of the results that are work items of their own
  const bool in_place;                // too few results are made of pixels to copy these together
  const bool streaming;
  A* weights;
  const ConvMemory memory;

  explicit Pointwise(const ConvProblem& problem)
      : Work(problem),
        hw(Work::out_layout.pixels),
        pixels(n * hw),
        vectors((pixels + kColumns - 1) / kColumns),
        block(std::clamp<int64_t>(kBytes / (std::max<int64_t>(terms, 1) * kColumns * sizeof(A)), 1, 8)),
        blocks((vectors + block - 1) / block),
        split(split_results()),
        in_place(std::is_same_v<T, A> && results <= kFewTiles * kTileRows),
        streaming(std::is_same_v<T, A> && hw % kColumns == 0 && Work::streams_runs(kColumns)),
        memory(*this) {}

  int64_t split_results() const {
    const int64_t items = blocks * groups, wanted = 4 * p.threads;
    if (p.threads == 1 || items >= wanted) return 1;
    return std::clamp<int64_t>(results / (8 * kTileRows), 1, (wanted + items - 1) / std::max<int64_t>(items, 1));
  }
  int64_t part_begin(int64_t part) const {
    return part == split ? results : results * part / split / kTileRows * kTileRows;
  }
  void layout_shared(Arena& s) { weights = p.packed ? static_cast<A*>(p.packed) : s.take<A>(weights_size()); }

  struct Own {
    A* pixels;

    Own(const Pointwise& q, Arena& s) { pixels = s.take<A>(q.block * q.terms * kColumns); }
  };

  size_t bytes() const { return memory.bytes(p.threads); }
  int64_t weights_size() const { return groups * results * terms; }
  size_t packed_bytes() const { return weights_size() * sizeof(A); }

  // The weights of the tiles of the results [first, last), some terms after the other as lines hold several of both.
  void pack_tiles(int64_t group, int64_t first, int64_t last) const {
    constexpr int64_t kSome = 64;
    const T* const w = static_cast<const T*>(p.weight) + group * results * terms;
    const int64_t result_step = p.backward ? 1 : terms, term_step = p.backward ? results : 1;
    for (int64_t begin = 0; begin < terms; begin += kSome)
      for (int64_t c = first; c < last; c += kTileRows) {
        const int64_t rows = std::min<int64_t>(kTileRows, last - c);
        A* const to = weights + (group * results + c) * terms;
        for (int64_t k = begin; k < std::min(terms, begin + kSome); k++)
          for (int64_t r = 0; r < rows; r++) to[k * rows + r] = A(w[(c + r) * result_step + k * term_step]);
      }
  }

  // f(sample, pixel, place, count) for the runs of pixels of a plane that the places [begin, end) are.
  template <class F>
  void for_runs(int64_t begin, int64_t end, F f) const {
    for (int64_t at = begin, count; at < end; at += count) {
      count = std::min(end - at, hw - at % hw);
      f(at / hw, at % hw, at, count);
    }
  }

  // A group's first plane of the input.
  const T* in_plane(int64_t sample, int64_t group) const {
    return static_cast<const T*>(p.in) + (sample * groups + group) * terms * hw;
  }
  // The pixels of a block as [panel][term][pixel].
  void read(int64_t group, int64_t begin, int64_t end, A* to) const {
    for_runs(begin, end, [&](int64_t sample, int64_t pixel, int64_t place, int64_t count) {
      const T* from = in_plane(sample, group) + pixel;
      for (int64_t k = 0; k < terms; k++, from += hw)
        for (int64_t i = 0, some; i < count; i += some) {
          const int64_t at = place - begin + i, lane = at % kColumns;
          some = std::min(kColumns - lane, count - i);
          A* const panel = to + (at / kColumns * terms + k) * kColumns + lane;
          if (some == kColumns)
            store<A>(panel, load(from + i, Full<T>()), Full<A>());
          else
            for (int64_t j = 0; j < some; j++) panel[j] = A(from[i + j]);
        }
    });
    const int64_t count = end - begin, rest = (kColumns - count % kColumns) % kColumns;
    for (int64_t k = 0; rest && k < terms; k++)
      std::fill_n(to + (count / kColumns * terms + k + 1) * kColumns - rest, rest, A(0));
  }

  bool in_one_plane(int64_t begin) const { return begin % hw + kColumns <= hw; }
  T* plane(int64_t sample, int64_t group, int64_t result) const {
    return static_cast<T*>(p.out) + ((sample * groups + group) * results + result) * hw;
  }
  // Results of pixels of several planes.
  void write_across(int64_t group, int64_t result, int64_t begin, const A* from) const {
    for_runs(begin, std::min(begin + kColumns, pixels),
             [&](int64_t sample, int64_t pixel, int64_t place, int64_t count) {
               std::copy_n(from + place - begin, count, plane(sample, group, result) + pixel);
             });
  }

  // The results [first, last) of the panels of pixels [begin, end), which follow each other in memory; pitch: from one
  // term of a panel to the next.  In place, the first tile fetches the next panel's, as planes are far apart.
  void multiply(int64_t group, int64_t first, int64_t last, int64_t begin, int64_t end, const A* pixels,
                int64_t pitch) const {
    for (int64_t c = first; c < last; c += kTileRows)
      with_rows(std::min<int64_t>(kTileRows, last - c), [&](auto row_count) {
        for (int64_t panel = begin; panel < end; panel++)
          multiply_tile<row_count>(group, c, pixels + (panel - begin) * terms * kColumns, pitch, panel * kColumns,
                                   in_place && c == first);
      });
  }
  // The same with pixels in the planes, but for a panel that is in several.
  void multiply_in_place(int64_t group, int64_t first, int64_t last, int64_t begin, int64_t end, A* copy) const {
    if constexpr (std::is_same_v<T, A>)
      for (int64_t panel = begin, at = begin * kColumns; panel < end; panel++, at += kColumns) {
        const bool whole = in_one_plane(at);
        if (!whole) read(group, at, std::min(pixels, at + kColumns), copy);
        multiply(group, first, last, panel, panel + 1, whole ? in_plane(at / hw, group) + at % hw : copy,
                 whole ? hw : kColumns);
      }
  }
  template <int R>
  void multiply_tile(int64_t group, int64_t c, const A* pixels, int64_t pitch, int64_t begin, bool fetches) const {
    const A* const w = weights + (group * results + c) * terms;
    T* const to = in_one_plane(begin) ? plane(begin / hw, group, c) + begin % hw : nullptr;
    for (int r = 0; to && !streaming && r < R; r++) prefetch_run<true>(to + r * hw, kColumns);
    alignas(64) A sums[R * kColumns];
    for (int r = 0; r < R; r++) store(sums + r * kColumns, Pack<A>(this->bias_of(group, c + r)), Full<A>());
    for (int64_t k = 0; k < terms; k += kDepth) {
      Tile<A, R> tile;
      tile.clear();
      tile.outer_add(
          std::min(kDepth, terms - k), [&](int64_t i) { return w + (k + i) * R; },
          [&](int64_t i) {
            const A* const at = pixels + (k + i) * pitch;
            if (fetches) prefetch_run(at + kColumns, kColumns);
            return at;
          });
      tile.add(sums, kColumns);
      tile.store(sums, kColumns);
    }
    if (p.activation != Activation::kNone) this->activate_all(sums, R * kColumns);
    for (int r = 0; r < R; r++) {
      const A* const from = sums + r * kColumns;
      to ? store_output(to + r * hw, load<A>(from, Full<A>()), Full<T>(), Zero(), streaming)
         : write_across(group, c + r, begin, from);
    }
  }

  void run() {
    Arena shared = memory.shared_at(p.workspace);
    layout_shared(shared);
    prefer_huge_pages(p.out, this->out_bytes());
    parallel(p.threads, [&](Team team) {
      constexpr int64_t kTogether = 8 * kTileRows;
      const int64_t slices = (results + kTogether - 1) / kTogether;
      if (!p.is_packed)
        team.for_each(groups * slices, [&](int64_t item) {
          const int64_t first = item % slices * kTogether;
          pack_tiles(item / slices, first, std::min(results, first + kTogether));
        });
      Arena scratch = memory.own_at(p.workspace, team.rank);
      const Own own(*this, scratch);
      team.for_each(blocks * groups * split, [&](int64_t item) {
        const int64_t part = item % split, group = item / split % groups, first = item / split / groups * block;
        const int64_t last = std::min(vectors, first + block);
        if (in_place) return multiply_in_place(group, part_begin(part), part_begin(part + 1), first, last, own.pixels);
        read(group, first * kColumns, std::min(pixels, last * kColumns), own.pixels);
        multiply(group, part_begin(part), part_begin(part + 1), first, last, own.pixels, kColumns);
      });
    });
  }
};

}  // namespace fastnorm::cpu::CPU_CAPABILITY
