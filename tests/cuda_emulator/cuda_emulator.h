// Runs CUDA kernels on the CPU, so that tests can check them on a machine without a GPU.
//
// Every CUDA thread is a fiber: it runs until a barrier, a warp intrinsic or an atomic, then another one goes on. Which
// one, and in what order blocks run, is up to the schedule, so that a missing barrier gives a wrong result in some of
// them.  Shared memory is allocated anew for each block and starts as NaN.  What each sanitizer adds:
//   AddressSanitizer  sees accesses outside of shared and global memory, and to the shared memory of a block that ended
//   ThreadSanitizer   takes a fiber for a thread and barriers for all that orders memory, so it reports data races
//                     within a block, a cluster and between blocks, in whatever order threads really ran
// A kernel that breaks a rule (a barrier not reached by all, a deadlock, too much shared memory) ends its launch with
// cudaErrorLaunchFailure, and last_error() says what happened and in which line.
//
// It knows nothing of memory fences other than __threadfence(), streams, bank conflicts, occupancy or speed.
#pragma once
#include <cuda_runtime_api.h>  // for types: nothing of the CUDA runtime is linked

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "fiber.h"

namespace cuda_emulator {

// ---- Options --------------------------------------------------------------------------------------------------------

enum class Schedule { kForward, kReverse, kRandom };

struct Options {
  Schedule schedule = Schedule::kRandom;
  uint64_t seed = 1;
  unsigned blocks_at_once = 1;  // more than one takes turns
  int sm_count = 4;             // few, so that work is split unevenly
  int compute_capability = 90;
  size_t l2_bytes = 64 << 10;  // small, so that small tests are larger than it
};
inline Options options;

inline int sm_count() { return options.sm_count; }
inline int compute_capability() { return options.compute_capability; }
inline size_t l2_bytes() { return options.l2_bytes; }
inline size_t shared_memory_limit() {  // the CUDA programming guide's table of compute capabilities
  switch (options.compute_capability) {
    case 75: return 64 << 10;
    case 80:
    case 87: return 163 << 10;
    case 86:
    case 89:
    case 120: return 99 << 10;
    default: return 227 << 10;
  }
}
constexpr size_t kStaticSharedLimit = 48 << 10;

#if defined(__SANITIZE_THREAD__)
constexpr unsigned kMaxFibers = 4096;  // ThreadSanitizer has room for about 8000
#else
constexpr unsigned kMaxFibers = 16384;
#endif

// ---- Threads, warps, blocks, clusters -------------------------------------------------------------------------------

// A place in a kernel's source: where a barrier or warp intrinsic was called from.
struct Site {
  const char* file;
  int line;
  bool operator==(const Site& other) const { return line == other.line && std::strcmp(file, other.file) == 0; }
  std::string str() const {
    const char* slash = std::strrchr(file, '/');
    return std::string(slash ? slash + 1 : file) + ":" + std::to_string(line);
  }
};
// A last parameter that takes the caller's place.
#define CUDA_EMULATOR_SITE ::cuda_emulator::Site site = {__builtin_FILE(), __builtin_LINE()}

inline std::string str(uint3 v) {
  return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}

struct Copy {  // of __pipeline_memcpy_async(): done when waited for
  char* to;
  const char* from;
  size_t bytes, zeros;
};

struct Block;

struct Thread {
  Fiber fiber;
  bool started = false;
  Block* block = nullptr;
  uint3 index{};
  unsigned warp = 0, lane = 0;
  uint64_t result = 0;                    // of the last barrier or warp intrinsic
  const char* waits = nullptr;            // in this function
  Site site{};                            // called there
  bool arrived_at_cluster = false;        // and has not waited there yet
  unsigned cluster_generation = 0;        // of the barrier that it arrived at
  std::vector<std::vector<Copy>> copies;  // committed batches, then the open one
};

struct Barrier {
  unsigned expected = 0, arrived = 0, generation = 0;
  unsigned count = 0;  // of the threads that came with a true predicate
  const char* function = nullptr;
  Site site{};  // where the first came to it
  std::vector<Thread*> waiting;
  Order order[2];
};

enum class WarpOp { kSync, kShuffle, kBallot, kMatch };

// A warp intrinsic that some lanes of its mask have come to.
struct Collective {
  unsigned mask = 0, arrived = 0;
  WarpOp op{};
  Site site{};
  uint64_t value[32];
  unsigned source[32];
};

struct Warp {
  unsigned live = 0;  // lanes that exist and have not returned
  Thread* lanes[32] = {};
  std::vector<Collective> pending;  // one for each mask in use
  Order order;
};

// A block's shared memory, or one variable of it, until the block ends.
class SharedMemory {
 public:
  explicit SharedMemory(size_t bytes) : bytes_(bytes) {
    // 16-byte aligned and no more, as on the device; exactly as large, for AddressSanitizer.
    if (posix_memalign(&memory_, 16, std::max<size_t>(bytes, 1)) != 0) throw std::bad_alloc();
    std::memset(memory_, 0xFF, bytes);
  }
  SharedMemory(SharedMemory&& other) : memory_(std::exchange(other.memory_, nullptr)), bytes_(other.bytes_) {}
  ~SharedMemory() {
#if defined(__SANITIZE_ADDRESS__)
    if (memory_) __asan_unpoison_memory_region(memory_, bytes_);
#endif
    std::free(memory_);
  }
  // The block has ended: for ThreadSanitizer a write, which races with a peer's access that no barrier comes after.
  void end() {
    std::memset(memory_, 0xFF, bytes_);
#if defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(memory_, bytes_);
#endif
  }
  char* get() const { return static_cast<char*>(memory_); }
  size_t bytes() const { return bytes_; }

 private:
  void* memory_ = nullptr;
  size_t bytes_;
};

struct Cluster;

struct Block {
  uint3 index{};
  Cluster* cluster = nullptr;
  unsigned rank = 0, exited = 0, threads = 0;
  size_t shared_bytes = 0;
  Barrier barrier;
  std::vector<Warp> warps;
  std::unique_ptr<SharedMemory> dynamic_shared;
  std::map<const void*, SharedMemory> static_shared;  // by the address of its declaration's tag
  Order end;
};

struct Cluster {
  std::vector<Block*> blocks;
  unsigned exited = 0;
  Barrier barrier;
  Order leave;  // what came before a cluster_arrive_relaxed(), for the end of a block's shared memory only
};

// ---- The scheduler --------------------------------------------------------------------------------------------------

struct Engine {
  std::mutex mutex;  // one launch at a time
  dim3 grid, block;
  void (*body)(void*) = nullptr;
  void* arguments = nullptr;
  Fiber main;                                    // in launch()
  std::vector<std::unique_ptr<Thread>> threads;  // reused by later blocks
  std::deque<Thread*> ready;
  unsigned finished = 0;
  std::string error;       // of this launch
  std::string last_error;  // not taken by last_error() yet
  uint64_t random_state = 1;
  Order start, finish, fence;

  uint64_t random() {  // xorshift
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    return random_state ^= random_state << 17;
  }
};
inline Engine& engine = *new Engine;  // never destroyed: fibers that were abandoned still refer to it
inline Thread* current = nullptr;     // null in launch()

// Goes on with a thread that is ready, or with launch() when there is none.
inline void switch_away() {
  auto& ready = engine.ready;
  Thread *const from = current, *to = nullptr;
  if (!ready.empty() && engine.error.empty()) {
    // Mostly the thread made ready last, so that some warps run far ahead of others: a uniform choice finds less.
    if (options.schedule == Schedule::kRandom && engine.random() % 16 == 0)
      std::swap(ready[engine.random() % ready.size()], ready.back());
    if (options.schedule == Schedule::kForward) {
      to = ready.front();
      ready.pop_front();
    } else {
      to = ready.back();
      ready.pop_back();
    }
  }
  current = to;
  if (from != to) Fiber::switch_over(from ? from->fiber : engine.main, to ? to->fiber : engine.main);
}

// Ends the launch with this error; all threads are abandoned where they are.
[[noreturn]] inline void fail(Site site, const std::string& what) {
  Quiet quiet;
  const Thread& thread = *current;
  engine.error = site.str() + ": " + what + ", block " + str(thread.block->index) + ", thread " + str(thread.index);
  switch_away();
  std::abort();
}

inline void wait(const char* function, Site site) {
  Thread& thread = *current;
  thread.waits = function;
  thread.site = site;
  switch_away();
  thread.waits = nullptr;
}

// Where any thread may come before this one, at random some do.
inline void let_others_go_first() {
  if (options.schedule != Schedule::kRandom) return;
  Quiet quiet;
  engine.ready.push_back(current);
  switch_away();
}

// Comes to the barrier; the last thread opens it.  Returns which generation of it this is, for pass().
inline unsigned arrive(Barrier& barrier, unsigned exited, const char* function, Site site, bool predicate = false) {
  Quiet quiet;
  if (exited) fail(site, std::string(function) + " not reached by all threads, as one returned before");
  if (barrier.arrived && (!(barrier.site == site) || barrier.function != function))
    fail(site, std::string(function) + " while other threads are in " + barrier.function + " at " + barrier.site.str());
  barrier.function = function;
  barrier.site = site;
  barrier.count += predicate;
  if (++barrier.arrived < barrier.expected) return barrier.generation;
  current->result = barrier.count;
  for (Thread* other : barrier.waiting) {
    other->result = barrier.count;
    engine.ready.push_back(other);
  }
  barrier.waiting.clear();
  barrier.count = barrier.arrived = 0;
  return barrier.generation++;
}

// Waits until all have come.
inline void pass(Barrier& barrier, unsigned generation, const char* function, Site site) {
  Quiet quiet;
  if (barrier.generation == generation) {
    barrier.waiting.push_back(current);
    wait(function, site);
  } else {
    let_others_go_first();
  }
}

// Returns how many threads came with a true predicate.
inline unsigned synchronize(Barrier& barrier, unsigned exited, const char* function, Site site,
                            bool predicate = false) {
  Order& order = barrier.order[barrier.generation % 2];  // a fast thread may already release the next one
  order.release();
  pass(barrier, arrive(barrier, exited, function, site, predicate), function, site);
  order.acquire();
  return unsigned(current->result);
}

// All live lanes of the mask have come: gives each its result.
inline void complete(Warp& warp, Collective& c) {
  for (unsigned lane = 0; lane < 32; lane++) {
    if (!(c.arrived >> lane & 1)) continue;
    uint64_t result = ~uint64_t(0);  // of a shuffle from a lane that takes no part: undefined, here a NaN
    if (c.op == WarpOp::kShuffle) {
      if (c.arrived >> c.source[lane] & 1) result = c.value[c.source[lane]];
    } else if (c.op != WarpOp::kSync) {
      result = 0;
      for (unsigned l = 0; l < 32; l++) {
        const bool set = c.op == WarpOp::kBallot ? c.value[l] != 0 : c.value[l] == c.value[lane];
        result |= uint64_t((c.arrived >> l & 1) && set) << l;
      }
    }
    warp.lanes[lane]->result = result;
    if (warp.lanes[lane] != current) engine.ready.push_back(warp.lanes[lane]);
  }
  c.mask = c.arrived = 0;
}

inline uint64_t warp_collective(WarpOp op, const char* function, unsigned mask, uint64_t value, unsigned source,
                                Site site) {
  Quiet quiet;
  Thread& thread = *current;
  Warp& warp = thread.block->warps[thread.warp];
  if (!(mask >> thread.lane & 1)) fail(site, std::string(function) + " with a mask that lacks the calling lane");
  auto with_mask = [&](unsigned m) {
    return std::find_if(warp.pending.begin(), warp.pending.end(), [m](const Collective& c) { return c.mask == m; });
  };
  auto c = with_mask(mask);
  if (c == warp.pending.end()) c = with_mask(0);
  if (c == warp.pending.end()) c = warp.pending.emplace(c);
  if (c->mask && (c->op != op || !(c->site == site)))
    fail(site, std::string(function) + " while other lanes of its mask are in another at " + c->site.str());
  c->mask = mask;
  c->op = op;
  c->site = site;
  c->arrived |= 1u << thread.lane;
  c->value[thread.lane] = value;
  c->source[thread.lane] = source;
  if (c->arrived == (mask & warp.live)) {
    complete(warp, *c);
    let_others_go_first();
  } else {
    wait(function, site);
  }
  return thread.result;
}

// A thread has returned.
inline void exit_thread() {
  Quiet quiet;
  Block& block = *current->block;
  Cluster& cluster = *block.cluster;
  Warp& warp = block.warps[current->warp];
  if (current->arrived_at_cluster) fail(current->site, "cluster_arrive_relaxed() without a cluster_wait()");
  for (const Barrier* barrier : {&block.barrier, &cluster.barrier})
    if (barrier->arrived)
      fail(barrier->site, std::string(barrier->function) + " not reached by all threads, as one returned");
  block.exited++;
  cluster.exited++;
  engine.finished++;
  warp.live &= ~(1u << current->lane);
  for (Collective& c : warp.pending)
    if (c.mask && c.arrived == (c.mask & warp.live)) complete(warp, c);
}

inline void fiber_main() {
  current->fiber.enter();
  for (;;) {  // a fiber serves one thread after another
    engine.start.acquire();
    engine.body(engine.arguments);
    Block& block = *current->block;
    block.end.release();
    exit_thread();
    if (block.exited == block.threads) {
      block.end.acquire();
      block.cluster->leave.acquire();
      if (block.dynamic_shared) block.dynamic_shared->end();
      for (auto& [tag, memory] : block.static_shared) memory.end();
    }
    engine.finish.release();
    Quiet quiet;
    switch_away();
  }
}

inline std::string describe_deadlock() {
  std::map<std::string, unsigned> places;
  for (const auto& thread : engine.threads)
    if (thread->waits) places[std::string(thread->waits) + " at " + thread->site.str()]++;
  std::string text = "deadlock:";
  for (const auto& [place, count] : places)
    text += (text.back() == ':' ? " " : ", ") + std::to_string(count) + " threads wait in " + place;
  return text;
}

// Runs these blocks at the same time, to their end; all blocks of a cluster are among them.
inline void run_blocks(std::vector<Block>& blocks, size_t shared_bytes, unsigned first_fiber) {
  const dim3 dim = engine.block;
  const unsigned per_block = dim.x * dim.y * dim.z, total = unsigned(per_block * blocks.size());
  // To ThreadSanitizer a fiber's past comes before its future, so a block takes other fibers than the one before.
  const unsigned fibers = total + 32;
  while (engine.threads.size() < fibers) engine.threads.push_back(std::make_unique<Thread>());
  engine.finished = 0;
  for (unsigned i = 0; i < total; i++) {
    Block& block = blocks[i / per_block];
    Thread& thread = *engine.threads[(i + first_fiber) % fibers];
    const unsigned in_block = i % per_block;
    if (in_block == 0) {
      block.threads = block.barrier.expected = per_block;
      block.cluster->barrier.expected += per_block;
      block.warps.resize((per_block + 31) / 32);
      block.dynamic_shared = std::make_unique<SharedMemory>(shared_bytes);
      block.shared_bytes = shared_bytes;
    }
    thread.block = &block;
    thread.index.x = in_block % dim.x;
    thread.index.y = in_block / dim.x % dim.y;
    thread.index.z = in_block / dim.x / dim.y;
    thread.warp = in_block / 32;
    thread.lane = in_block % 32;
    thread.copies.clear();
    thread.arrived_at_cluster = false;
    block.warps[thread.warp].lanes[thread.lane] = &thread;
    block.warps[thread.warp].live |= 1u << thread.lane;
    if (!thread.started) thread.fiber.start(fiber_main);
    thread.started = true;
    engine.ready.push_back(&thread);
    if (options.schedule == Schedule::kRandom)
      std::swap(engine.ready.back(), engine.ready[engine.random() % engine.ready.size()]);
  }
  switch_away();
  if (engine.finished == total) return;
  if (engine.error.empty()) engine.error = describe_deadlock();
  for (auto& thread : engine.threads) {
    if (thread->started) thread->fiber.release(engine.finish, engine.main);
    thread->started = false;
    thread->waits = nullptr;
  }
  engine.ready.clear();
}

// ---- Launches -------------------------------------------------------------------------------------------------------

inline std::string why_invalid(dim3 grid, dim3 block, unsigned cluster, size_t shared_bytes) {
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  const std::string shape = "grid " + str({grid.x, grid.y, grid.z}) + ", block " + str({block.x, block.y, block.z});
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535)
    return "invalid grid: " + shape;
  if (!threads || threads > 1024 || block.x > 1024 || block.y > 1024 || block.z > 64) return "invalid block: " + shape;
  if (shared_bytes > shared_memory_limit())
    return std::to_string(shared_bytes) + " bytes of shared memory, more than " + std::to_string(shared_memory_limit());
  if (cluster > 1 && options.compute_capability < 90) return "clusters need compute capability 90";
  if (cluster == 0 || cluster > 16 || grid.x % cluster || cluster * threads > kMaxFibers)
    return "invalid cluster of " + std::to_string(cluster) + " blocks: " + shape;
  return "";
}

// Calls body() as each thread of the grid.
template <class F>
cudaError_t run(dim3 grid, dim3 block, unsigned cluster, size_t shared_bytes, F body) {
  const std::lock_guard<std::mutex> lock(engine.mutex);
  if (!engine.last_error.empty()) {  // as on the device, an error that nobody took goes on
    if (engine.last_error.find("ignored") == std::string::npos) engine.last_error += " (ignored by the launch code)";
    return cudaErrorLaunchFailure;
  }
  if (std::string why = why_invalid(grid, block, cluster, shared_bytes); !why.empty()) {
    engine.last_error = "CUDA emulator: " + why;
    return cudaErrorInvalidConfiguration;
  }
  engine.grid = grid;
  engine.block = block;
  engine.arguments = &body;
  engine.body = [](void* f) { (*static_cast<F*>(f))(); };
  engine.random_state = options.seed * 0x9E3779B97F4A7C15u | 1;
  engine.main.adopt_thread();
  engine.start.release();
  {
    Quiet quiet;
    const uint64_t clusters = uint64_t(grid.x) * grid.y * grid.z / cluster;
    std::vector<uint64_t> order(clusters);
    std::iota(order.begin(), order.end(), 0);
    if (options.schedule == Schedule::kReverse) std::reverse(order.begin(), order.end());
    for (uint64_t i = clusters; options.schedule == Schedule::kRandom && i > 1; i--)
      std::swap(order[i - 1], order[engine.random() % i]);
    const uint64_t fit = std::max(1u, kMaxFibers / (block.x * block.y * block.z * cluster));
    const uint64_t at_once = std::min<uint64_t>(fit, (std::max(options.blocks_at_once, 1u) + cluster - 1) / cluster);
    for (uint64_t first = 0; first < clusters && engine.error.empty(); first += at_once) {
      const uint64_t n = std::min(at_once, clusters - first);
      std::vector<Cluster> running(n);
      std::vector<Block> blocks(n * cluster);
      for (uint64_t i = 0; i < n * cluster; i++) {
        Block& b = blocks[i];
        const uint64_t number = order[first + i / cluster] * cluster + i % cluster;
        b.index.x = unsigned(number % grid.x);
        b.index.y = unsigned(number / grid.x % grid.y);
        b.index.z = unsigned(number / grid.x / grid.y);
        b.cluster = &running[i / cluster];
        b.rank = unsigned(i % cluster);
        b.cluster->blocks.push_back(&b);
      }
      run_blocks(blocks, shared_bytes, unsigned(first * 7));
    }
  }
  engine.finish.acquire();
  if (engine.error.empty()) return cudaSuccess;
  engine.last_error = "CUDA emulator: " + std::exchange(engine.error, "");
  return cudaErrorLaunchFailure;
}

// What the last launch that failed did wrong; asking clears it.
inline std::string last_error() {
  const std::lock_guard<std::mutex> lock(engine.mutex);
  return std::exchange(engine.last_error, "");
}

template <class T>
struct Identity {
  using type = T;
};

template <class... P>
cudaError_t launch_cluster(void (*kernel)(P...), dim3 grid, dim3 block, unsigned cluster, size_t shared_bytes,
                           cudaStream_t /*stream*/, typename Identity<P>::type... args) {
  return run(grid, block, cluster, shared_bytes, [&] { kernel(args...); });
}

template <class... P>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t /*stream*/,
                   typename Identity<P>::type... args) {
  return run(grid, block, 1, shared_bytes, [&] { kernel(args...); });
}

template <class... P>
int active_clusters(void (*)(P...), dim3 block, unsigned cluster, size_t shared_bytes) {
  if (options.compute_capability < 90 || !why_invalid(dim3(cluster), block, cluster, shared_bytes).empty()) return 0;
  return std::max(1, options.sm_count / int(cluster));
}

// ---- Shared memory and clusters, in kernels -------------------------------------------------------------------------

// The block's variable that this tag stands for.
inline SharedMemory& static_shared(Block& block, const void* tag, size_t bytes, Site site) {
  Quiet quiet;
  const auto known = block.static_shared.find(tag);
  if (known != block.static_shared.end()) return known->second;
  block.shared_bytes += bytes;
  if (block.shared_bytes - block.dynamic_shared->bytes() > kStaticSharedLimit)
    fail(site, "more than 48 KB of static shared memory");
  if (block.shared_bytes > shared_memory_limit())
    fail(site, std::to_string(block.shared_bytes) + " bytes of shared memory, static and dynamic, more than " +
                   std::to_string(shared_memory_limit()));
  return block.static_shared.try_emplace(tag, bytes).first->second;
}

inline unsigned cluster_rank() { return current->block->rank; }
inline unsigned cluster_size() { return unsigned(current->block->cluster->blocks.size()); }

inline void check_cluster_device(Site site) {
  if (options.compute_capability < 90) fail(site, "a cluster function before compute capability 90");
}

inline void cluster_sync(CUDA_EMULATOR_SITE) {
  check_cluster_device(site);
  Cluster& cluster = *current->block->cluster;
  if (current->arrived_at_cluster) fail(site, "cluster_sync() between cluster_arrive_relaxed() and cluster_wait()");
  synchronize(cluster.barrier, cluster.exited, "cluster_sync()", site);
}

inline void cluster_arrive_relaxed(CUDA_EMULATOR_SITE) {
  check_cluster_device(site);
  Cluster& cluster = *current->block->cluster;
  cluster.leave.release();
  Quiet quiet;
  if (std::exchange(current->arrived_at_cluster, true)) fail(site, "cluster_arrive_relaxed() twice");
  current->site = site;
  current->cluster_generation = arrive(cluster.barrier, cluster.exited, "cluster_arrive_relaxed()", site);
}

inline void cluster_wait(CUDA_EMULATOR_SITE) {
  check_cluster_device(site);
  Quiet quiet;
  if (!std::exchange(current->arrived_at_cluster, false)) fail(site, "cluster_wait() without an arrival");
  pass(current->block->cluster->barrier, current->cluster_generation, "cluster_wait()", site);
}

inline char* cluster_shared_bytes(const char* p, unsigned rank, Site site) {
  Quiet quiet;
  check_cluster_device(site);
  Block& block = *current->block;
  Cluster& cluster = *block.cluster;
  if (rank >= cluster.blocks.size()) fail(site, "cluster_shared() of rank " + std::to_string(rank));
  Block& peer = *cluster.blocks[rank];
  if (&peer != &block && cluster.barrier.generation == 0)
    fail(site, "cluster_shared() before a first cluster_sync(): the other block may not run yet");
  if (peer.exited == peer.threads) fail(site, "cluster_shared() of a block that has ended");
  auto holds = [p](const SharedMemory& m) { return p >= m.get() && p < m.get() + std::max<size_t>(m.bytes(), 1); };
  if (holds(*block.dynamic_shared)) return peer.dynamic_shared->get() + (p - block.dynamic_shared->get());
  for (auto& [tag, memory] : block.static_shared)
    if (holds(memory)) return static_shared(peer, tag, memory.bytes(), site).get() + (p - memory.get());
  fail(site, "cluster_shared() of an address that is not in this block's shared memory");
}

template <class T>
T* cluster_shared(T* p, unsigned rank, CUDA_EMULATOR_SITE) {
  return reinterpret_cast<T*>(cluster_shared_bytes(reinterpret_cast<const char*>(p), rank, site));
}

}  // namespace cuda_emulator

// What tests set; schedule is 0 forward, 1 reverse, 2 random.
extern "C" __attribute__((used, visibility("default"))) inline void fastnorm_emulator_configure(
    int schedule, uint64_t seed, unsigned blocks_at_once, int sm_count, int compute_capability, size_t l2_bytes) {
  const std::lock_guard<std::mutex> lock(cuda_emulator::engine.mutex);
  cuda_emulator::options = {
      static_cast<cuda_emulator::Schedule>(schedule), seed, blocks_at_once, sm_count, compute_capability, l2_bytes};
}
