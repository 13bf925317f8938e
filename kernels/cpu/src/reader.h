// Brings parts of files into memory, several at once, by threads that do nothing else.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "async_reads.h"
#include "file_map.h"

namespace mixbit {

// A file could not be opened or read: which, where, why, and what to do.
class ReadError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// direct: past the page cache, where the file system allows. cached: copied out of it. mapped: where the page cache has them,
// without a copy; on systems that cannot fill a map on demand, as cached.
enum class Access : std::uint8_t { direct, cached, mapped };

// Bytes [offset, offset + bytes) of a file.
struct FilePart {
  int file;
  std::int64_t offset, bytes;
};

class Reader {
 public:
  // Direct reads go past the page cache: they begin and end at multiples of this, in the file and in memory.
  static constexpr std::int64_t alignment = 4096;

  // Bytes of memory, aligned so, that a part of `bytes` may need; its first byte comes to lie at `lead`.
  static constexpr std::int64_t room(std::int64_t bytes) {
    return (bytes + alignment - 1) / alignment * alignment + alignment;
  }
  static constexpr std::int64_t lead(std::int64_t offset) { return offset % alignment; }

  // Pieces in which a part is read: long ones are shared by the threads.
  static std::int64_t pieces(const FilePart& part);

  // Called by a reading thread for each piece. bytes: of those that were asked for; error: null, or which file could not
  // be read, where, and why.
  using Done = std::function<void(std::int64_t tag, std::int64_t bytes, const std::string* error)>;

  // Throws ReadError for a file that cannot be opened.
  Reader(std::vector<std::string> paths, Access access, int threads, Done done);
  ~Reader();
  Reader(const Reader&) = delete;
  Reader& operator=(const Reader&) = delete;

  // Whether parts are brought to where they are mapped, not to memory of the caller's.
  bool mapped() const { return mapped_; }

  // Where a byte of a file is mapped.
  const std::byte* at(int file, std::int64_t offset) const {
    return files_[static_cast<std::size_t>(file)].map.data() + offset;
  }

  // Bytes that a file has now.
  std::int64_t size(int file) const;

  // Reads `part` to `to`, which has room for it unless `mapped`, after what was asked for before. idle: while nothing else
  // is asked for, and few at once, so that what is asked for then hardly waits.
  void read(const FilePart& part, std::byte* to, std::int64_t tag, bool idle = false);

  // Idle reads that have not begun and whose tag is not `wanted` do not begin. Returns their tags, one for each piece.
  std::vector<std::int64_t> drop_idle(const std::function<bool(std::int64_t tag)>& wanted);

  // The idle reads that are left are asked for.
  void hasten_idle();

 private:
  struct File {
    std::string path;
    int descriptor;
    bool direct;
    FileMap map;
  };
  // `end`: of what is wanted, `room_end`: of what may be read, both places in the file. bytes: wanted.
  struct Piece {
    int file;
    std::int64_t begin, end, room_end, bytes;
    std::byte* to;
    std::int64_t tag;
    bool idle;
  };

  void work();
  void take(std::size_t most, std::vector<Piece>& taken);  // needs the mutex
  int begin(AsyncReads& reads, const Piece& piece) const;
  void end(const Piece& piece, const std::string& error);
  std::string run(const Piece& piece) const;
  std::string bring(const Piece& piece) const;

  std::vector<File> files_;
  bool direct_, mapped_;
  Done done_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<Piece> queue_, idle_;
  std::size_t idle_running_ = 0;
  bool stop_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace mixbit
