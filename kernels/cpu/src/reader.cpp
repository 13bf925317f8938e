#include "reader.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <memory>

namespace mixbit {
namespace {

constexpr std::int64_t piece_bytes = 1 << 20;
constexpr std::size_t most_at_once = 5;  // of a thread
constexpr std::size_t most_idle = 4;     // of all

constexpr std::int64_t floor_to(std::int64_t n) { return n / Reader::alignment * Reader::alignment; }
constexpr std::int64_t ceil_to(std::int64_t n) { return floor_to(n + Reader::alignment - 1); }

// Whether the file system reads past its cache; some refuse only when asked to read.
bool reads_directly([[maybe_unused]] int descriptor) {
#if defined(O_DIRECT)
  const std::unique_ptr<void, void (*)(void*)> page(std::aligned_alloc(Reader::alignment, Reader::alignment),
                                                    std::free);
  return pread(descriptor, page.get(), Reader::alignment, 0) >= 0;
#else
  return false;
#endif
}

int open_direct(const char* path) {
#if defined(O_DIRECT)
  return open(path, O_RDONLY | O_CLOEXEC | O_DIRECT);
#else
  static_cast<void>(path);
  return -1;
#endif
}

int open_buffered(const char* path, [[maybe_unused]] bool uncached) {
  const int descriptor = open(path, O_RDONLY | O_CLOEXEC);
#if defined(F_NOCACHE)
  if (descriptor >= 0 && uncached) fcntl(descriptor, F_NOCACHE, 1);
#endif
  return descriptor;
}

// What lies beside a part is not wanted.
void expect_random([[maybe_unused]] int descriptor) {
#if defined(POSIX_FADV_RANDOM)
  posix_fadvise(descriptor, 0, 0, POSIX_FADV_RANDOM);
#endif
}

std::string name_of(const std::string& path) { return path.substr(path.rfind('/') + 1); }

}  // namespace

std::int64_t Reader::pieces(const FilePart& part) {
  const std::int64_t bytes = ceil_to(part.offset + part.bytes) - floor_to(part.offset);
  return (bytes + piece_bytes - 1) / piece_bytes;
}

Reader::Reader(std::vector<std::string> paths, Access access, int threads, Done done) : done_(std::move(done)) {
  const bool direct = access == Access::direct;
  for (std::string& path : paths) {
    int descriptor = direct ? open_direct(path.c_str()) : -1;
    if (descriptor >= 0 && !reads_directly(descriptor)) {
      close(descriptor);
      descriptor = -1;
    }
    const bool past_cache = descriptor >= 0;
    if (!past_cache) descriptor = open_buffered(path.c_str(), direct);
    if (descriptor < 0) {
      const std::string why = std::strerror(errno);
      for (const File& file : files_) close(file.descriptor);
      throw ReadError(path + ": cannot be opened: " + why);
    }
    FileMap map = access == Access::mapped ? FileMap(descriptor) : FileMap();
    if (!map.data()) expect_random(descriptor);
    files_.push_back({std::move(path), descriptor, past_cache, std::move(map)});
  }
  direct_ = std::all_of(files_.begin(), files_.end(), [](const File& file) { return file.direct; });
  mapped_ = std::all_of(files_.begin(), files_.end(), [](const File& file) { return file.map.data() != nullptr; });
  for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { work(); });
}

Reader::~Reader() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (std::thread& thread : threads_) thread.join();
  for (const File& file : files_) close(file.descriptor);
}

std::int64_t Reader::size(int file) const {
  struct stat facts;
  return fstat(files_[static_cast<std::size_t>(file)].descriptor, &facts) == 0 ? facts.st_size : 0;
}

void Reader::read(const FilePart& part, std::byte* to, std::int64_t tag, bool idle) {
  const bool direct = files_.at(static_cast<std::size_t>(part.file)).direct;
  const std::int64_t begin = floor_to(part.offset), end = part.offset + part.bytes, room_end = ceil_to(end);
  std::lock_guard lock(mutex_);
  for (std::int64_t at = begin; at < room_end; at += piece_bytes) {
    const std::int64_t next = std::min(at + piece_bytes, room_end);
    const std::int64_t first = direct ? at : std::max(at, part.offset), last = std::min(next, end);
    const std::int64_t bytes = last - std::max(first, part.offset);
    std::deque<Piece>& queue = idle ? idle_ : queue_;
    queue.push_back({part.file, first, last, direct ? next : last, bytes, to + (first - begin), tag, idle});
    if (!idle || idle_.size() <= most_idle) wake_.notify_one();  // others would find that it is not their turn
  }
}

std::vector<std::int64_t> Reader::drop_idle(const std::function<bool(std::int64_t)>& wanted) {
  std::vector<std::int64_t> dropped;
  std::lock_guard lock(mutex_);
  std::erase_if(idle_, [&](const Piece& piece) {
    if (wanted(piece.tag)) return false;
    dropped.push_back(piece.tag);
    return true;
  });
  return dropped;
}

void Reader::hasten_idle() {
  std::lock_guard lock(mutex_);
  for (const Piece& piece : idle_) {
    queue_.push_back(piece);
    queue_.back().idle = false;
    wake_.notify_one();
  }
  idle_.clear();
}

void Reader::work() {
  AsyncReads reads(direct_ ? most_at_once : 0);
  std::vector<Piece> taken, under_way(most_at_once);
  std::unique_lock lock(mutex_);
  while (true) {
    if (reads.idle()) {
      wake_.wait(lock, [&] { return stop_ || !queue_.empty() || (!idle_.empty() && idle_running_ < most_idle); });
    }
    if (stop_) return;
    take(reads.idle() ? std::max<std::size_t>(1, reads.room()) : reads.room(), taken);
    lock.unlock();
    for (const Piece& piece : taken) {
      const int place = reads.room() > 0 ? begin(reads, piece) : -1;
      if (place >= 0) {
        under_way[static_cast<std::size_t>(place)] = piece;
      } else {
        end(piece, mapped_ ? bring(piece) : run(piece));
      }
    }
    if (!reads.idle()) {
      reads.wait([&](int place, std::int64_t bytes) {
        const Piece& piece = under_way[static_cast<std::size_t>(place)];
        // One that fell short is read once more, to the end or to what is wrong.
        end(piece, piece.begin + bytes >= piece.end ? std::string() : run(piece));
      });
    }
    lock.lock();
  }
}

void Reader::take(std::size_t most, std::vector<Piece>& taken) {
  taken.clear();
  while (taken.size() < most) {
    const bool idle = queue_.empty();
    if (idle && (idle_.empty() || idle_running_ >= most_idle)) return;
    std::deque<Piece>& from = idle ? idle_ : queue_;
    taken.push_back(from.front());
    from.pop_front();
    idle_running_ += idle;
  }
}

int Reader::begin(AsyncReads& reads, const Piece& piece) const {
  const int descriptor = files_[static_cast<std::size_t>(piece.file)].descriptor;
  return reads.begin(descriptor, piece.begin, static_cast<std::size_t>(piece.room_end - piece.begin), piece.to);
}

void Reader::end(const Piece& piece, const std::string& error) {
  done_(piece.tag, piece.bytes, error.empty() ? nullptr : &error);
  std::lock_guard lock(mutex_);
  idle_running_ -= piece.idle;
}

// As `run`, to where it is mapped.
std::string Reader::bring(const Piece& piece) const {
  const File& file = files_[static_cast<std::size_t>(piece.file)];
  if (file.map.bring(piece.begin, piece.end)) return {};
  std::vector<std::byte> aside(static_cast<std::size_t>(piece.end - piece.begin));
  Piece copied = piece;
  copied.to = aside.data();
  if (std::string error = run(copied); !error.empty()) return error;
  if (file.map.bring(piece.begin, piece.end)) return {};
  return name_of(file.path) + ": cannot be mapped at byte " + std::to_string(piece.begin) + "; restart";
}

// Empty, or what went wrong.
std::string Reader::run(const Piece& piece) const {
  const File& file = files_[static_cast<std::size_t>(piece.file)];
  std::int64_t at = piece.begin;
  while (true) {
    const ssize_t count = pread(file.descriptor, piece.to + (at - piece.begin),
                                static_cast<std::size_t>(piece.room_end - at), static_cast<off_t>(at));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) {
      return name_of(file.path) + ": cannot be read at byte " + std::to_string(at) + ": " + std::strerror(errno) +
             "; check the disk, then download the file again and restart";
    }
    const std::int64_t got = at + count;
    if (got >= piece.end) return {};
    const std::int64_t next = file.direct ? floor_to(got) : got;  // a short read goes on at a multiple
    if (next <= at) {
      return name_of(file.path) + ": ends at byte " + std::to_string(got) + ", before byte " +
             std::to_string(piece.end) + " that a weight reaches to: it was truncated while in use; download it again "
             "and restart";
    }
    at = next;
  }
}

}  // namespace mixbit
