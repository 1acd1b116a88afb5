// Fibers: stacks of their own that the program switches between, and what the sanitizers must be told of them.
#pragma once
#include <pthread.h>
#include <sys/mman.h>

#include <cstddef>
#include <new>
#include <utility>
#if !defined(__x86_64__)
#include <ucontext.h>  // some 20 times slower than the assembly, as it keeps the signal mask
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#elif defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

namespace cuda_emulator {

// ---- ThreadSanitizer's view of order --------------------------------------------------------------------------------

// An address that orders memory: all that came before a release() there comes before all that follows an acquire().
struct Order {
  char address;
#if defined(__SANITIZE_THREAD__)
  void release() { __tsan_release(&address); }
  void acquire() { __tsan_acquire(&address); }
#else
  void release() {}
  void acquire() {}
#endif
};

#if defined(__SANITIZE_THREAD__)
inline unsigned quiet_depth = 0;  // of the fiber that runs
inline void begin_quiet() {
  AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
  AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  quiet_depth++;
}
inline void end_quiet() {
  quiet_depth--;
  AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
  AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
}
#else
inline void begin_quiet() {}
inline void end_quiet() {}
#endif

// While one lives, ThreadSanitizer looks away: the emulator's own data is guarded by fibers running one at a time.
struct Quiet {
  Quiet() { begin_quiet(); }
  ~Quiet() { end_quiet(); }
  Quiet(const Quiet&) = delete;
};

// ---- Fibers ---------------------------------------------------------------------------------------------------------

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 512 << 10;  // redzones make frames large
#else
constexpr size_t kStackBytes = 128 << 10;
#endif
constexpr size_t kGuardBytes = 4096;

#if defined(__x86_64__)
// Keeps the callee's registers on the stack and the stack pointer in *save, then goes on where `load` was kept.
[[maybe_unused]] __attribute__((naked, noinline)) static void swap_stacks(void** /*save*/, void* /*load*/) {
  asm("push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
      "mov %rsp, (%rdi)\n mov %rsi, %rsp\n"
      "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret");
}
#endif

class Fiber {
 public:
  Fiber() = default;
  Fiber(const Fiber&) = delete;  // stacks live as long as the process: threads are reused

  // This fiber is the thread that calls, on the stack that it has.
  void adopt_thread() {
#if defined(__SANITIZE_ADDRESS__)
    pthread_attr_t attributes;
    pthread_getattr_np(pthread_self(), &attributes);
    void* start = nullptr;
    pthread_attr_getstack(&attributes, &start, &stack_bytes_);
    stack_ = static_cast<char*>(start);
    pthread_attr_destroy(&attributes);
#elif defined(__SANITIZE_THREAD__)
    sanitizer_ = __tsan_get_current_fiber();
#endif
  }

  // The next switch to this fiber calls entry(), which never returns.  Whatever it did before is abandoned.
  void start(void (*entry)()) {
    if (!stack_) allocate();
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack_ + kGuardBytes, stack_bytes_ - kGuardBytes);
#endif
#if defined(__x86_64__)
    void** top = reinterpret_cast<void**>(stack_ + stack_bytes_);
    *--top = nullptr;  // entry's return address
    *--top = reinterpret_cast<void*>(entry);
    stack_pointer_ = top - 6;  // the registers that swap_stacks() takes back
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_;
    context_.uc_stack.ss_size = stack_bytes_;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#endif
  }

  static void switch_over(Fiber& from, Fiber& to) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&from.sanitizer_, to.stack_, to.stack_bytes_);
#elif defined(__SANITIZE_THREAD__)
    from.quiet_depth_ = quiet_depth;
    __tsan_switch_to_fiber(to.sanitizer_, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__x86_64__)
    swap_stacks(&from.stack_pointer_, to.stack_pointer_);
#else
    swapcontext(&from.context_, &to.context_);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(from.sanitizer_, nullptr, nullptr);
#elif defined(__SANITIZE_THREAD__)
    quiet_depth = from.quiet_depth_;
#endif
  }

  // Releases to `order` what this fiber did, where it will not go on to do so itself.
  void release([[maybe_unused]] Order& order, [[maybe_unused]] Fiber& caller) {
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(sanitizer_, __tsan_switch_to_fiber_no_sync);
    order.release();
    __tsan_switch_to_fiber(caller.sanitizer_, __tsan_switch_to_fiber_no_sync);
#endif
  }

  // What entry() does first, on this fiber.
  void enter() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#elif defined(__SANITIZE_THREAD__)
    begin_quiet();
    quiet_depth = 1 + std::exchange(quiet_depth_, 0);  // it may have been abandoned in the midst of something
    for (unsigned n = quiet_depth; n > 0; n--) end_quiet();
#endif
  }

 private:
  void allocate() {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* const memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kGuardBytes, PROT_NONE) != 0) throw std::bad_alloc();
    stack_ = static_cast<char*>(memory);
    stack_bytes_ = kStackBytes;
#if defined(__SANITIZE_THREAD__)
    sanitizer_ = __tsan_create_fiber(0);
#endif
  }

#if defined(__x86_64__)
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
  char* stack_ = nullptr;
  size_t stack_bytes_ = 0;
  [[maybe_unused]] void* sanitizer_ = nullptr;  // what it keeps for this fiber
  [[maybe_unused]] unsigned quiet_depth_ = 0;   // while another one runs
};

}  // namespace cuda_emulator
