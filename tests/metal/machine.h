// The state of the one dispatch that runs: fibers, memory, clocks.
#pragma once

#include <stdint.h>

#include "runtime.h"

constexpr uint32_t kLanes = 32;
constexpr uint32_t kMaxThreads = 1024;
constexpr size_t kStack = 128 << 10;
constexpr size_t kGuard = 4096 << 2;
constexpr size_t kThreadgroupBytes = 32 << 10;  // what every Apple GPU offers
constexpr size_t kRedzone = 4096;
constexpr int kMaxBuffers = 128;
constexpr size_t kThreadgroupSpan = kThreadgroupBytes + (2 * kMaxBuffers + 2) * kRedzone;

enum class State { ready, simd, barrier, done };

// What a thread did last to a byte, and when (counts of the barriers that order memory).
struct Access {
  uint32_t thread = 0;  // 0: nobody, else 1 + threadgroup * kMaxThreads + thread
  uint32_t group_epoch = 0, simd_epoch = 0;
};
enum class Readers : uint8_t { one, lanes, simdgroups, threadgroups };  // who shared the last reads
struct Cell {
  Access write, read;
  Readers readers = Readers::one;
  bool written = false;
};

struct Region {  // a buffer, or a threadgroup array
  const char* name;
  uintptr_t start;
  size_t bytes;
  Cell* cells;  // null: read-only, races impossible
  bool ready;   // contents count as written from the start
};

struct Fiber {
  void* sp;
  State state;
  int operation, flags, line;
  MetalThread self;
};

struct Slot {
  alignas(16) unsigned char bytes[16];
};

struct Simdgroup {
  Slot slots[2][kLanes];
  uint32_t generation = 0, epoch[2] = {0, 0};
};

struct Machine {
  void* scheduler_sp = nullptr;
  unsigned char* stacks = nullptr;
  Fiber fibers[kMaxThreads];
  Simdgroup simdgroups[kMaxThreads / kLanes];
  Fiber* current = nullptr;
  uint32_t threads = 0, group = 0, group_epoch[2] = {0, 0};
  Region buffers[kMaxBuffers];
  int buffer_count = 0;
  unsigned char* threadgroup_memory = nullptr;
  Region arrays[kMaxBuffers];
  int array_ids[kMaxBuffers];
  int array_count = 0;
  size_t array_bytes = 0;
  MetalKernel kernel = nullptr;
  void* arguments[kMaxBuffers];
  uintptr_t image_start = 0, image_end = 0;
  char* message = nullptr;
  size_t message_size = 0;
  bool failed = false;
};

extern Machine m;

// Ends the dispatch with a message. On a fiber this does not return: nobody resumes it.
void fail(const char* format, ...);
