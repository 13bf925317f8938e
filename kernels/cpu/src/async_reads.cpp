#include "async_reads.h"

#if defined(__linux__)
#include <linux/aio_abi.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <vector>

namespace mixbit {

struct AsyncReads::State {
  aio_context_t context = 0;
  std::vector<iocb> reads;
  std::vector<int> free;
  std::vector<io_event> events;
};

AsyncReads::AsyncReads(std::size_t most) {
  auto state = std::make_unique<State>();
  if (most == 0 || syscall(SYS_io_setup, most, &state->context) != 0) return;
  state->reads.resize(most);
  state->events.resize(most);
  for (std::size_t place = 0; place < most; ++place) state->free.push_back(static_cast<int>(place));
  state_ = std::move(state);
}

AsyncReads::~AsyncReads() {
  if (state_) syscall(SYS_io_destroy, state_->context);
}

std::size_t AsyncReads::room() const { return state_ ? state_->free.size() : 0; }

bool AsyncReads::idle() const { return !state_ || state_->free.size() == state_->reads.size(); }

int AsyncReads::begin(int descriptor, std::int64_t offset, std::size_t bytes, std::byte* to) {
  const int place = state_->free.back();
  iocb& read = state_->reads[static_cast<std::size_t>(place)];
  read = {};
  read.aio_data = static_cast<std::uint64_t>(place);
  read.aio_lio_opcode = IOCB_CMD_PREAD;
  read.aio_fildes = static_cast<std::uint32_t>(descriptor);
  read.aio_buf = reinterpret_cast<std::uint64_t>(to);
  read.aio_nbytes = bytes;
  read.aio_offset = offset;
  iocb* one = &read;
  if (syscall(SYS_io_submit, state_->context, 1L, &one) != 1) return -1;
  state_->free.pop_back();
  return place;
}

void AsyncReads::wait(const std::function<void(int place, std::int64_t bytes)>& ended) {
  const auto most = static_cast<long>(state_->events.size());
  long count;
  do {
    count = syscall(SYS_io_getevents, state_->context, 1L, most, state_->events.data(), nullptr);
  } while (count < 0 && errno == EINTR);
  for (long i = 0; i < count; ++i) {
    const io_event& event = state_->events[static_cast<std::size_t>(i)];
    const int place = static_cast<int>(event.data);
    state_->free.push_back(place);
    ended(place, event.res);
  }
}

}  // namespace mixbit

#else

namespace mixbit {

struct AsyncReads::State {};

AsyncReads::AsyncReads(std::size_t) {}
AsyncReads::~AsyncReads() = default;
std::size_t AsyncReads::room() const { return 0; }
bool AsyncReads::idle() const { return true; }
int AsyncReads::begin(int, std::int64_t, std::size_t, std::byte*) { return -1; }
void AsyncReads::wait(const std::function<void(int, std::int64_t)>&) {}

}  // namespace mixbit

#endif
