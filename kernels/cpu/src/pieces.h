// What the pools of all layers hold under one number, block or slot, as bytes: for copying, and for keeping elsewhere.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace mixbit {

class Pieces {
 public:
  Pieces(const char* what, std::int64_t count) : what_(what), count_(count) {}

  // An array of `count` parts of `bytes` each, that lives as long as this.
  void add(void* data, std::int64_t bytes) {
    parts_.push_back({static_cast<char*>(data), static_cast<std::size_t>(bytes)});
    bytes_ += static_cast<std::size_t>(bytes);
  }

  std::size_t bytes() const { return bytes_; }  // of one piece

  // All throw std::out_of_range for a number that no pool has.
  void copy(std::int64_t source, std::int64_t target) const {
    check(source), check(target);
    if (source == target) return;
    for (const Part& p : parts_) std::memcpy(p.at(target), p.at(source), p.bytes);
  }

  void read(std::int64_t number, char* out) const {
    check(number);
    for (const Part& p : parts_) out = static_cast<char*>(std::memcpy(out, p.at(number), p.bytes)) + p.bytes;
  }

  void write(std::int64_t number, const char* in, std::size_t size) const {
    check(number);
    if (size != bytes_) {
      throw std::invalid_argument(std::string(what_) + ": " + std::to_string(size) + " bytes, expected " +
                                  std::to_string(bytes_));
    }
    for (const Part& p : parts_) {
      std::memcpy(p.at(number), in, p.bytes);
      in += p.bytes;
    }
  }

 private:
  struct Part {
    char* data;
    std::size_t bytes;
    char* at(std::int64_t number) const { return data + static_cast<std::size_t>(number) * bytes; }
  };

  void check(std::int64_t number) const {
    if (number < 0 || number >= count_) {
      throw std::out_of_range(std::string(what_) + " " + std::to_string(number) + " of " + std::to_string(count_));
    }
  }

  const char* what_;
  std::int64_t count_;
  std::size_t bytes_ = 0;
  std::vector<Part> parts_;
};

}  // namespace mixbit
