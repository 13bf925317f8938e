// Executes one Metal dispatch on the host. Every GPU thread is a fiber; a simdgroup's lanes meet at each
// simd operation, a threadgroup's threads at each barrier. Whoever does not come is an error.

#include "machine.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

Machine m;

extern "C" void metal_switch(void** save, void* load);
#if defined(__x86_64__)
asm(R"(
.globl metal_switch
metal_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");
constexpr size_t kFrame = 7 * 8;
constexpr size_t kReturn = 6 * 8;
#elif defined(__aarch64__)
#if defined(__APPLE__)
#define SYMBOL "_metal_switch"
#else
#define SYMBOL "metal_switch"
#endif
asm(".globl " SYMBOL "\n" SYMBOL R"(:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)");
constexpr size_t kFrame = 160;
constexpr size_t kReturn = 88;
#endif

namespace {

void to_scheduler() { metal_switch(&m.current->sp, m.scheduler_sp); }

}  // namespace

void fail(const char* format, ...) {
  if (m.failed) return;
  m.failed = true;
  int used = 0;
  if (m.current) {
    const MetalThread& t = m.current->self;
    used = snprintf(m.message, m.message_size, "thread (%u, %u, %u) of threadgroup (%u, %u, %u): ",
                    t.thread_position_in_threadgroup.x, t.thread_position_in_threadgroup.y,
                    t.thread_position_in_threadgroup.z, t.threadgroup_position_in_grid.x,
                    t.threadgroup_position_in_grid.y, t.threadgroup_position_in_grid.z);
  }
  va_list args;
  va_start(args, format);
  vsnprintf(m.message + used, m.message_size - used, format, args);
  va_end(args);
  if (m.current) to_scheduler();
}

namespace {

void fiber_main() {
  m.kernel(m.arguments, &m.current->self);
  m.current->state = State::done;
  to_scheduler();
}

void start(uint32_t index) {
  Fiber& fiber = m.fibers[index];
  unsigned char* top = m.stacks + (index + 1) * (kStack + kGuard) - 64;
  top -= reinterpret_cast<uintptr_t>(top) % 16;
  unsigned char* sp = top - kFrame - 8;
#if defined(__aarch64__)
  sp -= 8;
#endif
  memset(sp, 0, kFrame);
  void (*entry)() = fiber_main;
  memcpy(sp + kReturn, &entry, 8);
  fiber.sp = sp;
  fiber.state = State::ready;
}

void resume(uint32_t index) {
  m.current = &m.fibers[index];
  metal_switch(&m.scheduler_sp, m.current->sp);
  m.current = nullptr;
}

// A different, repeatable order of `count` things for every seed; seed 0 is the natural order.
void order(uint32_t* out, uint32_t count, uint64_t& seed) {
  for (uint32_t i = 0; i < count; i++) out[i] = i;
  if (!seed) return;
  for (uint32_t i = count; i > 1; i--) {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    const uint32_t j = (seed >> 33) % i, t = out[i - 1];
    out[i - 1] = out[j];
    out[j] = t;
  }
}

const char* kOperations[] = {"threadgroup_barrier", "simdgroup_barrier", "a simd operation"};

const char* whereabouts(const Fiber& fiber) {
  return fiber.state == State::done ? "has returned" : kOperations[fiber.operation];
}

// All lanes of a simdgroup have stopped. True if they were released from a simd operation.
bool release_simdgroup(uint32_t first, uint32_t last) {
  const Fiber* waits = nullptr;
  for (uint32_t i = first; i < last; i++)
    if (m.fibers[i].state == State::simd) waits = &m.fibers[i];
  if (!waits) return false;
  for (uint32_t i = first; i < last; i++) {
    const Fiber& other = m.fibers[i];
    if (other.state == State::simd && other.operation == waits->operation && other.line == waits->line) continue;
    fail("divergence: lane %u of simdgroup %u is at %s (line %d of the source), but lane %u %s (line %d)",
         waits->self.thread_index_in_simdgroup, first / kLanes, whereabouts(*waits), waits->line,
         other.self.thread_index_in_simdgroup, whereabouts(other), other.line);
    return false;
  }
  Simdgroup& simdgroup = m.simdgroups[first / kLanes];
  if (waits->operation == METAL_SIMDGROUP_BARRIER)
    for (int space = 0; space < 2; space++) simdgroup.epoch[space] += waits->flags >> space & 1;
  simdgroup.generation++;
  for (uint32_t i = first; i < last; i++) m.fibers[i].state = State::ready;
  return true;
}

// Every simdgroup has stopped. True if they were released from a barrier, false if the threadgroup is done.
bool release_threadgroup() {
  const Fiber* waits = nullptr;
  for (uint32_t i = 0; i < m.threads; i++)
    if (m.fibers[i].state == State::barrier) waits = &m.fibers[i];
  if (!waits) return false;
  for (uint32_t i = 0; i < m.threads; i++) {
    const Fiber& other = m.fibers[i];
    if (other.state == State::barrier && other.line == waits->line) continue;
    fail("divergence: thread %u is at threadgroup_barrier (line %d of the source), but thread %u %s (line %d)",
         waits->self.thread_index_in_threadgroup, waits->line, other.self.thread_index_in_threadgroup,
         whereabouts(other), other.line);
    return false;
  }
  for (int space = 0; space < 2; space++) m.group_epoch[space] += waits->flags >> space & 1;
  for (uint32_t i = 0; i < m.threads; i++) m.fibers[i].state = State::ready;
  return true;
}

void run_threadgroup(uint64_t& seed) {
  const uint32_t simdgroups = (m.threads + kLanes - 1) / kLanes;
  m.array_count = 0;
  m.array_bytes = 0;
  for (uint32_t i = 0; i < m.threads; i++) start(i);
  uint32_t simd_order[kMaxThreads / kLanes], lane_order[kLanes];
  do {
    bool moved = true;
    while (moved && !m.failed) {
      moved = false;
      order(simd_order, simdgroups, seed);
      for (uint32_t s = 0; s < simdgroups && !m.failed; s++) {
        const uint32_t first = simd_order[s] * kLanes;
        const uint32_t last = first + kLanes < m.threads ? first + kLanes : m.threads;
        order(lane_order, last - first, seed);
        for (uint32_t i = 0; i < last - first && !m.failed; i++)
          if (m.fibers[first + lane_order[i]].state == State::ready) resume(first + lane_order[i]);
        if (!m.failed && release_simdgroup(first, last)) moved = true;
      }
    }
  } while (!m.failed && release_threadgroup());
}

// Runs every threadgroup of the grid; those at its edges may be smaller.
void run_grid(const uint32_t* grid, const uint32_t* threadgroup, uint64_t seed) {
  const uint32_t tx = threadgroup[0] < grid[0] ? threadgroup[0] : grid[0];
  const uint32_t ty = threadgroup[1] < grid[1] ? threadgroup[1] : grid[1];
  const uint32_t tz = threadgroup[2] < grid[2] ? threadgroup[2] : grid[2];
  if (tx * ty * tz > kMaxThreads) return fail("threadgroup of %u threads, more than %u", tx * ty * tz, kMaxThreads);
  const MetalSize groups = {(grid[0] + tx - 1) / tx, (grid[1] + ty - 1) / ty, (grid[2] + tz - 1) / tz};
  const uint32_t count = groups.x * groups.y * groups.z;
  auto* sequence = static_cast<uint32_t*>(malloc(count * sizeof(uint32_t)));
  order(sequence, count, seed);
  for (uint32_t i = 0; i < count && !m.failed; i++) {
    m.group = sequence[i];
    const MetalSize g = {m.group % groups.x, m.group / groups.x % groups.y, m.group / groups.x / groups.y};
    const MetalSize size = {g.x * tx + tx > grid[0] ? grid[0] - g.x * tx : tx,
                            g.y * ty + ty > grid[1] ? grid[1] - g.y * ty : ty,
                            g.z * tz + tz > grid[2] ? grid[2] - g.z * tz : tz};
    m.threads = size.x * size.y * size.z;
    for (uint32_t t = 0; t < m.threads; t++) {
      const MetalSize p = {t % size.x, t / size.x % size.y, t / size.x / size.y};
      m.fibers[t].self = {{g.x * tx + p.x, g.y * ty + p.y, g.z * tz + p.z}, p, g, size, {grid[0], grid[1], grid[2]},
                          groups, t, t % kLanes, t / kLanes, (m.threads + kLanes - 1) / kLanes, kLanes};
    }
    run_threadgroup(seed);
  }
  free(sequence);
}

unsigned char* map(size_t bytes) {
  void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
  if (at == MAP_FAILED) abort();
  return static_cast<unsigned char*>(at);
}

Region place(const MetalBuffer& buffer, unsigned char* at) {
  memcpy(at, buffer.data, buffer.bytes);
  Cell* cells = nullptr;
  if (buffer.writable) cells = static_cast<Cell*>(calloc(buffer.bytes ? buffer.bytes : 1, sizeof(Cell)));
  return {buffer.name, reinterpret_cast<uintptr_t>(at), buffer.bytes, cells, buffer.ready != 0};
}

}  // namespace

extern "C" {

void* metal_threadgroup_memory(size_t bytes, int array) {
  for (int i = 0; i < m.array_count; i++)
    if (m.array_ids[i] == array) return reinterpret_cast<void*>(m.arrays[i].start);
  bytes = (bytes + 15) / 16 * 16;
  if (m.array_bytes + bytes > kThreadgroupBytes || m.array_count == kMaxBuffers)
    fail("threadgroup memory: %zu bytes, more than the %zu of every Apple GPU", m.array_bytes + bytes,
         kThreadgroupBytes);
  Region& region = m.arrays[m.array_count];
  free(region.cells);
  const size_t offset = m.array_bytes + (2 * m.array_count + 1) * kRedzone;
  region = {"threadgroup memory", reinterpret_cast<uintptr_t>(m.threadgroup_memory + offset), bytes,
            static_cast<Cell*>(calloc(bytes, sizeof(Cell))), false};
  memset(m.threadgroup_memory + offset, 0xff, bytes);
  m.array_ids[m.array_count++] = array;
  m.array_bytes += bytes;
  return reinterpret_cast<void*>(region.start);
}

void metal_barrier(int operation, int flags, int line) {
  Fiber& self = *m.current;
  self.state = operation == METAL_THREADGROUP_BARRIER ? State::barrier : State::simd;
  self.operation = operation;
  self.flags = flags;
  self.line = line;
  to_scheduler();
}

const void* metal_exchange(const void* value, size_t size, int line) {
  Fiber& self = *m.current;
  Simdgroup& simdgroup = m.simdgroups[self.self.simdgroup_index_in_threadgroup];
  // Two sets of slots: a lane that runs ahead to the next operation must not overwrite what others still read.
  Slot* slots = simdgroup.slots[simdgroup.generation % 2];
  memcpy(slots[self.self.thread_index_in_simdgroup].bytes, value, size);
  metal_barrier(METAL_SIMD_OPERATION, 0, line);
  return slots;
}

uint32_t metal_lane() { return m.current->self.thread_index_in_simdgroup; }

uint32_t metal_lanes() {
  const uint32_t rest = m.threads - m.current->self.simdgroup_index_in_threadgroup * kLanes;
  return rest < kLanes ? rest : kLanes;
}

void metal_require_lane(uint32_t lane, int line) {
  if (lane >= metal_lanes())
    fail("line %d of the source reads lane %u, which the simdgroup does not have", line, lane);
}

int metal_dispatch(MetalKernel kernel, MetalBuffer* buffers, int count, const uint32_t* grid,
                   const uint32_t* threadgroup, uint64_t seed, const void* image_start, const void* image_end,
                   char* message, size_t message_size) {
  m.message = message;
  m.message_size = message_size;
  m.failed = false;
  m.current = nullptr;
  m.kernel = kernel;
  m.image_start = reinterpret_cast<uintptr_t>(image_start);
  m.image_end = reinterpret_cast<uintptr_t>(image_end);
  if (!m.stacks) {
    m.stacks = map(kMaxThreads * (kStack + kGuard));
    for (uint32_t i = 0; i < kMaxThreads; i++) mprotect(m.stacks + i * (kStack + kGuard), kGuard, PROT_NONE);
    m.threadgroup_memory = map(kThreadgroupSpan);
  }
  size_t total = kRedzone;
  for (int i = 0; i < count; i++) total += (buffers[i].bytes / 4096 + 2) * 4096 + kRedzone;
  unsigned char* arena = map(total);
  unsigned char* at = arena + kRedzone;
  for (int i = 0; i < count; i++) {
    m.buffers[i] = place(buffers[i], at + 16);  // aligned as an allocation of MLX surely is, and no better
    m.arguments[i] = at + 16;
    at += (buffers[i].bytes / 4096 + 2) * 4096 + kRedzone;
  }
  m.buffer_count = count;
  run_grid(grid, threadgroup, seed);
  for (int i = 0; i < count; i++) {
    if (buffers[i].writable) memcpy(buffers[i].data, m.arguments[i], buffers[i].bytes);
    free(m.buffers[i].cells);
  }
  munmap(arena, total);
  return m.failed;
}

// The compiler calls this to round to bfloat (nearest, ties to even) where the processor cannot. The result is
// declared as the other 16-bit float, which travels in the same register: returning a __bf16 would call this.
_Float16 __truncsfbf2(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  const uint16_t rounded = nan ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  _Float16 out;
  memcpy(&out, &rounded, 2);
  return out;
}
}
