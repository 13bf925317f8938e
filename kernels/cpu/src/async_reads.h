// Reads past the page cache that one thread has under way at once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>

namespace mixbit {

// A disk is asked for more at once, and by fewer threads, than if each read had one. Linux's own system calls: io_uring is
// refused in many containers, and these serve reads past the page cache as well.
class AsyncReads {
 public:
  // most: that can be under way. Does nothing where the system has no such reads.
  explicit AsyncReads(std::size_t most);
  ~AsyncReads();  // waits for those under way
  AsyncReads(const AsyncReads&) = delete;
  AsyncReads& operator=(const AsyncReads&) = delete;

  std::size_t room() const;
  bool idle() const;

  // The place of a read that `wait` will tell the end of; negative if the system refuses it. `room` must not be 0.
  int begin(int descriptor, std::int64_t offset, std::size_t bytes, std::byte* to);

  // Waits for one read at least, and tells the place and the bytes read of each that has ended: negative for an error.
  void wait(const std::function<void(int place, std::int64_t bytes)>& ended);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace mixbit
