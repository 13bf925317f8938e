// Threads that stay hot between the ops of a step: whoever waits spins briefly, then sleeps.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace mixbit {

class ThreadPool {
 public:
  explicit ThreadPool(int threads);  // 0: one for each core this process may use
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return size_; }

  // The first of a thread's share of `count` tasks.
  std::int64_t first(std::int64_t count, int thread) const { return count * thread / size_; }

  // Calls task(i, thread) for i in [0, count). Each thread has a run of them as its share, so that it reads on where it
  // stopped; who is done takes the last of another's share, so a thread that is held up by another process does not hold
  // up the rest. Returns when all are done.
  // thread is in [0, size()). The calling thread takes part. Tasks do not throw. One caller at a time.
  template <typename Task>
  void run(std::int64_t count, const Task& task) {
    if (count <= 1 || size_ == 1) {
      for (std::int64_t i = 0; i < count; ++i) task(i, 0);
      return;
    }
    run_all(
        count, [](const void* t, std::int64_t i, int thread) { (*static_cast<const Task*>(t))(i, thread); }, &task);
  }

  // Calls task(begin, end, thread) on ranges of at most `grain` that cover [0, count).
  template <typename Task>
  void run_ranges(std::int64_t count, std::int64_t grain, const Task& task) {
    run((count + grain - 1) / grain, [&](std::int64_t i, int thread) {
      task(i * grain, i * grain + grain < count ? i * grain + grain : count, thread);
    });
  }

 private:
  using Call = void (*)(const void* task, std::int64_t i, int thread);

  void run_all(std::int64_t count, Call call, const void* task);
  void work(int thread);
  bool claim(int thread, int& from, std::uint32_t& index);
  std::uint32_t drain(int thread);
  void report();

  // What is left of a thread's share: its first task (high half) and the one after its last (low half), in one word. A
  // claim is a change of that word, so it always belongs to the job that is in it: a thread that comes late takes from the
  // present job or finds nothing.
  struct alignas(64) Share {
    std::atomic<std::uint64_t> left{0};
  };

  int size_;
  std::unique_ptr<Share[]> shares_;
  alignas(64) std::atomic<std::uint32_t> jobs_{0};  // begun so far
  alignas(64) std::atomic<std::uint32_t> done_{0};
  alignas(64) std::atomic<Call> call_{nullptr};
  std::atomic<const void*> task_{nullptr};
  std::atomic<int> sleeping_{0};
  std::atomic<bool> waiting_{false};
  std::atomic<bool> stop_{false};
  std::mutex mutex_;
  std::condition_variable wake_, finished_;
  std::vector<std::thread> workers_;
};

}  // namespace mixbit
