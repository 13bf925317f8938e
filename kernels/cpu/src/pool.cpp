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

std::uint64_t pack(std::int64_t first, std::int64_t end) {
  return static_cast<std::uint64_t>(first) << 32 | static_cast<std::uint32_t>(end);
}

}  // namespace

ThreadPool::ThreadPool(int threads)
    : size_(threads > 0 ? threads : usable_cores()), shares_(std::make_unique<Share[]>(static_cast<std::size_t>(size_))) {
  for (int thread = 1; thread < size_; ++thread) workers_.emplace_back([this, thread] { work(thread); });
}

ThreadPool::~ThreadPool() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (auto& worker : workers_) worker.join();
}

// Takes the next of the thread's own share, or the last of another's; from counts the shares found empty.
bool ThreadPool::claim(int thread, int& from, std::uint32_t& index) {
  for (; from < size(); ++from) {
    std::atomic<std::uint64_t>& share = shares_[static_cast<std::size_t>((thread + from) % size())].left;
    std::uint64_t left = share.load(std::memory_order_acquire), after;
    do {
      const auto first = static_cast<std::uint32_t>(left >> 32), end = static_cast<std::uint32_t>(left);
      if (first >= end) break;
      index = from == 0 ? first : end - 1;
      after = from == 0 ? pack(first + 1, end) : pack(first, end - 1);
      if (share.compare_exchange_weak(left, after, std::memory_order_acq_rel, std::memory_order_acquire)) return true;
    } while (true);
  }
  return false;
}

// Runs tasks until none is left to claim; returns how many. call_ and task_ are read after each claim:
// they cannot change before the claimed task is reported done.
std::uint32_t ThreadPool::drain(int thread) {
  std::uint32_t index = 0, ran = 0;
  for (int from = 0; claim(thread, from, index);) {
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
  for (int t = 0; t < size(); ++t) {
    shares_[static_cast<std::size_t>(t)].left.store(pack(first(count, t), first(count, t + 1)), std::memory_order_release);
  }
  jobs_.fetch_add(1, std::memory_order_seq_cst);  // ordered before sleeping_: no wake-up is lost
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
  while (!stop_.load(std::memory_order_relaxed)) {
    const std::uint32_t seen = jobs_.load(std::memory_order_seq_cst);
    const auto awake = [&] {
      return jobs_.load(std::memory_order_seq_cst) != seen || stop_.load(std::memory_order_relaxed);
    };
    drain(thread);
    if (spin_until(awake)) continue;
    std::unique_lock lock(mutex_);
    sleeping_.fetch_add(1, std::memory_order_seq_cst);
    wake_.wait(lock, awake);
    sleeping_.fetch_sub(1, std::memory_order_relaxed);
  }
}

}  // namespace mixbit
