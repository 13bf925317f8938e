#include "pool.h"

#include <chrono>

#include "cores.h"

namespace mixbit {
namespace {

using Clock = std::chrono::steady_clock;

// Longer than the serial work between two regions of a step, shorter than anyone notices as load.
constexpr std::chrono::microseconds spin_time{100};

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// Waits for `ready` with the core to itself; false if it did not come within spin_time.
template <typename Ready>
bool spin_until(const Ready& ready) {
  auto deadline = Clock::now() + spin_time;
  do {
    for (int i = 0; i < 32; ++i) {
      if (ready()) return true;
      pause();
    }
  } while (Clock::now() < deadline);
  return false;
}

}  // namespace

ThreadPool::ThreadPool(int threads) {
  int size = threads > 0 ? threads : usable_cores();
  for (int thread = 1; thread < size; ++thread) workers_.emplace_back([this, thread] { work(thread); });
}

ThreadPool::~ThreadPool() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (auto& worker : workers_) worker.join();
}

bool ThreadPool::idle() const {
  std::uint64_t ticket = ticket_.load(std::memory_order_seq_cst);  // ordered after sleeping_: no wake-up is lost
  return static_cast<std::uint32_t>(ticket) >= ticket >> 32;
}

// The look before the claim keeps idle threads from counting the low half up without end.
bool ThreadPool::claim(std::uint32_t& index) {
  if (idle()) return false;
  std::uint64_t ticket = ticket_.fetch_add(1, std::memory_order_acq_rel);
  index = static_cast<std::uint32_t>(ticket);
  return index < ticket >> 32;
}

// Runs tasks until none is left to claim; returns how many. call_ and task_ are read after each claim:
// they cannot change before the claimed task is reported done.
std::uint32_t ThreadPool::drain(int thread) {
  std::uint32_t index = 0, ran = 0;
  while (claim(index)) {
    call_.load(std::memory_order_relaxed)(task_.load(std::memory_order_relaxed), index, thread);
    ++ran;
    if (thread != 0) report();
  }
  return ran;
}

// One more task of the others is done. The caller may be asleep over it.
void ThreadPool::report() {
  done_.fetch_add(1, std::memory_order_seq_cst);
  if (!waiting_.load(std::memory_order_seq_cst)) return;
  { std::lock_guard lock(mutex_); }
  finished_.notify_one();
}

void ThreadPool::run_all(std::int64_t count, Call call, const void* task) {
  call_.store(call, std::memory_order_relaxed);
  task_.store(task, std::memory_order_relaxed);
  done_.store(0, std::memory_order_relaxed);
  ticket_.store(static_cast<std::uint64_t>(count) << 32, std::memory_order_seq_cst);
  if (sleeping_.load(std::memory_order_seq_cst) > 0) {
    { std::lock_guard lock(mutex_); }  // a worker between its last look and its sleep is let through
    wake_.notify_all();
  }
  auto others = static_cast<std::uint32_t>(count) - drain(0);
  auto finished = [&] { return done_.load(std::memory_order_seq_cst) == others; };
  if (spin_until(finished)) return;
  // Another process may have the core of a thread that is not done: an idle core draws that thread to itself.
  std::unique_lock lock(mutex_);
  waiting_.store(true, std::memory_order_seq_cst);
  finished_.wait(lock, finished);
  waiting_.store(false, std::memory_order_relaxed);
}

void ThreadPool::work(int thread) {
  auto awake = [this] { return !idle() || stop_.load(std::memory_order_relaxed); };
  while (!stop_.load(std::memory_order_relaxed)) {
    drain(thread);
    if (spin_until(awake)) continue;
    std::unique_lock lock(mutex_);
    sleeping_.fetch_add(1, std::memory_order_seq_cst);
    wake_.wait(lock, awake);
    sleeping_.fetch_sub(1, std::memory_order_relaxed);
  }
}

}  // namespace mixbit
