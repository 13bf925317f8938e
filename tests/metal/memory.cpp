// Checks every load and store of a kernel; the compiler calls the functions at the end
// (-fsanitize-coverage=trace-loads,trace-stores). Bounds, alignment, read-only buffers, reads of
// unwritten memory and data races are found exactly, whatever order the fibers happen to run in.

#include "machine.h"

namespace {

uint32_t thread_number(const Fiber* fiber) { return 1 + m.group * kMaxThreads + (fiber - m.fibers); }

struct Now {
  uint32_t thread, group_epoch, simd_epoch;
};

bool same_group(uint32_t a, uint32_t b) { return (a - 1) / kMaxThreads == (b - 1) / kMaxThreads; }
bool same_simdgroup(uint32_t a, uint32_t b) { return (a - 1) / kLanes == (b - 1) / kLanes; }

// Whether a barrier lies between what `past` records and now.
bool ordered(const Access& past, const Now& now) {
  if (past.thread == 0 || past.thread == now.thread) return true;
  if (!same_group(past.thread, now.thread)) return false;
  if (past.group_epoch != now.group_epoch) return true;
  return same_simdgroup(past.thread, now.thread) && past.simd_epoch != now.simd_epoch;
}

bool reads_ordered(const Cell& cell, const Now& now) {
  switch (cell.readers) {
    case Readers::one: return ordered(cell.read, now);
    case Readers::lanes: {
      if (!same_group(cell.read.thread, now.thread)) return false;
      if (cell.read.group_epoch != now.group_epoch) return true;
      return same_simdgroup(cell.read.thread, now.thread) && cell.read.simd_epoch != now.simd_epoch;
    }
    case Readers::simdgroups:
      return same_group(cell.read.thread, now.thread) && cell.read.group_epoch != now.group_epoch;
    case Readers::threadgroups: return false;
  }
  return false;
}

void note_read(Cell& cell, const Now& now) {
  const Access past = cell.read;
  cell.read = {now.thread, now.group_epoch, now.simd_epoch};
  if (past.thread == 0 || cell.readers == Readers::threadgroups) return;
  if (!same_group(past.thread, now.thread)) {
    cell.readers = Readers::threadgroups;
  } else if (past.group_epoch != now.group_epoch) {
    cell.readers = Readers::one;
  } else if (!same_simdgroup(past.thread, now.thread)) {
    cell.readers = Readers::simdgroups;
  } else if (cell.readers != Readers::simdgroups) {
    if (past.simd_epoch != now.simd_epoch) cell.readers = Readers::one;
    else if (past.thread != now.thread) cell.readers = Readers::lanes;
  }
}

void check_race(const Region& region, size_t offset, size_t size, bool write, int space) {
  const Now now = {thread_number(m.current), m.group_epoch[space],
                   m.simdgroups[m.current->self.simdgroup_index_in_threadgroup].epoch[space]};
  for (size_t i = offset; i < offset + size; i++) {
    Cell& cell = region.cells[i];
    if (!write && !cell.written && !region.ready)
      return fail("reads byte %zu of %s, which nothing has written", i, region.name);
    if (!ordered(cell.write, now))
      return fail("race: %s byte %zu of %s, which thread %u of threadgroup %u wrote with no barrier between",
                  write ? "writes" : "reads", i, region.name, (cell.write.thread - 1) % kMaxThreads,
                  (cell.write.thread - 1) / kMaxThreads);
    if (!write) {
      note_read(cell, now);
      continue;
    }
    if (!reads_ordered(cell, now))
      return fail("race: writes byte %zu of %s, which another thread reads with no barrier between", i, region.name);
    cell.write = {now.thread, now.group_epoch, now.simd_epoch};
    cell.written = true;
  }
}

const Region* find(const Region* regions, int count, uintptr_t address) {
  for (int i = 0; i < count; i++)
    if (address >= regions[i].start - kRedzone && address < regions[i].start + regions[i].bytes + kRedzone)
      return &regions[i];
  return nullptr;
}

const Region* nearest(uintptr_t address, int* space) {
  *space = METAL_DEVICE;
  const auto base = reinterpret_cast<uintptr_t>(m.threadgroup_memory);
  if (address < base || address >= base + kThreadgroupSpan)
    return find(m.buffers, m.buffer_count, address);
  *space = METAL_THREADGROUP;
  return find(m.arrays, m.array_count, address);
}

void check(const void* pointer, size_t size, bool write) {
  if (!m.current) return;
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  const auto stack = reinterpret_cast<uintptr_t>(m.stacks + (m.current - m.fibers) * (kStack + kGuard));
  if (address >= stack && address < stack + kStack + kGuard) return;
  int space;
  const Region* region = nearest(address, &space);
  if (!region) {
    const auto runtime = reinterpret_cast<uintptr_t>(&m);  // a thread's indices, what other lanes hand over
    if (!write && address >= runtime && address < runtime + sizeof m) return;
    if (!write && address >= m.image_start && address < m.image_end) return;  // constants of the program
    return fail("%s %zu bytes at an address outside of every buffer", write ? "writes" : "reads", size);
  }
  const auto offset = static_cast<intptr_t>(address - region->start);
  if (offset < 0 || offset + size > region->bytes)
    return fail("out of bounds: %s %zu bytes at byte %td of %s, which has %zu", write ? "writes" : "reads", size,
                offset, region->name, region->bytes);
  if (address % size) return fail("misaligned: %zu bytes at byte %td of %s", size, offset, region->name);
  if (write && !region->cells) return fail("writes to %s, which is read-only", region->name);
  if (region->cells) check_race(*region, offset, size, write, space);
}

}  // namespace

extern "C" {
#define TRACE(size)                                                                       \
  void __sanitizer_cov_load##size(void* address) { check(address, size, false); } \
  void __sanitizer_cov_store##size(void* address) { check(address, size, true); }
TRACE(1)
TRACE(2)
TRACE(4)
TRACE(8)
TRACE(16)

}
