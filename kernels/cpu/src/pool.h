// Threads that stay hot between the ops of a step: they spin briefly, then sleep.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

namespace mixbit {

class ThreadPool {
 public:
  explicit ThreadPool(int threads);  // 0: one for each core this process may use
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const;

  // Calls task(i, thread) for i in [0, count); threads claim the next i as they become free, so a
  // thread that is held up by another process does not hold up the rest. Returns when all are done.
  // thread is in [0, size()). The calling thread takes part.
  void run(std::int64_t count, const std::function<void(std::int64_t, int)>& task);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace mixbit
