// Threads that stay hot between the ops of a step: whoever waits spins briefly, then sleeps.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
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

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls task(i, thread) for i in [0, count); threads claim the next i as they become free, so a
  // thread that is held up by another process does not hold up the rest. Returns when all are done.
  // thread is in [0, size()). The calling thread takes part. Tasks do not throw. One caller at a time.
  template <typename Task>
  void run(std::int64_t count, const Task& task) {
    if (count <= 1 || workers_.empty()) {
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
  bool claim(std::uint32_t& index);
  std::uint32_t drain(int thread);
  void report();
  bool idle() const;

  // The job: the number of tasks (high half) and the next to be claimed (low half), in one word, so that a
  // claim always belongs to the job whose tasks it counts. A thread that comes late finds nothing left
  // and touches nothing else.
  alignas(64) std::atomic<std::uint64_t> ticket_{0};
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
