// A file in the address space.
#pragma once

#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>

namespace mixbit {

// Read-only, and the system's own copy: what the page cache holds is there without one more.
class FileMap {
 public:
  FileMap() = default;

  // All that the file has now. Maps nothing where a map cannot be filled on demand: whether bytes can be read is then only
  // known by touching them, which kills the process if they cannot.
  explicit FileMap([[maybe_unused]] int descriptor) {
#if defined(MADV_POPULATE_READ)
    struct stat facts;
    if (fstat(descriptor, &facts) != 0 || facts.st_size == 0) return;
    const auto bytes = static_cast<std::size_t>(facts.st_size);
    void* data = mmap(nullptr, bytes, PROT_READ, MAP_SHARED, descriptor, 0);
    if (data == MAP_FAILED) return;
    if (madvise(data, 1, MADV_POPULATE_READ) != 0) {  // Linux before 5.14
      munmap(data, bytes);
      return;
    }
    data_ = static_cast<std::byte*>(data);
    bytes_ = facts.st_size;
#endif
  }
  ~FileMap() {
    if (data_) munmap(data_, static_cast<std::size_t>(bytes_));
  }
  FileMap(FileMap&& other) noexcept : data_(other.data_), bytes_(other.bytes_) { other.data_ = nullptr; }
  FileMap(const FileMap&) = delete;
  FileMap& operator=(const FileMap&) = delete;

  const std::byte* data() const { return data_; }  // null if there is no map

  // Brings bytes [begin, end) into memory, together if from disk. False if that cannot be, which a read of them explains.
  bool bring([[maybe_unused]] std::int64_t begin, [[maybe_unused]] std::int64_t end) const {
#if defined(MADV_POPULATE_READ)
    if (end > bytes_) return false;
    static const std::int64_t page = sysconf(_SC_PAGESIZE);
    const std::int64_t first = begin / page * page;
    const auto bytes = static_cast<std::size_t>(end - first);
    madvise(data_ + first, bytes, MADV_WILLNEED);  // faults would read page by page
    return madvise(data_ + first, bytes, MADV_POPULATE_READ) == 0;
#else
    return false;
#endif
  }

 private:
  std::byte* data_ = nullptr;
  std::int64_t bytes_ = 0;
};

}  // namespace mixbit
