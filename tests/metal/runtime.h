// What a kernel compiled for the host shares with the runtime that executes it.
#pragma once

#include <stddef.h>
#include <stdint.h>

struct MetalSize {
  uint32_t x, y, z;
};

// The values of Metal's attributes for one thread.
struct MetalThread {
  MetalSize thread_position_in_grid, thread_position_in_threadgroup, threadgroup_position_in_grid;
  MetalSize threads_per_threadgroup, threads_per_grid, threadgroups_per_grid;
  uint32_t thread_index_in_threadgroup, thread_index_in_simdgroup, simdgroup_index_in_threadgroup;
  uint32_t simdgroups_per_threadgroup, threads_per_simdgroup;
};

struct MetalBuffer {
  const char* name;
  void* data;
  size_t bytes;
  int32_t writable;  // 0: a store into it is an error
  int32_t ready;     // 1: its contents may be read before the kernel has written them
};

typedef void (*MetalKernel)(void** arguments, const MetalThread* thread);

enum { METAL_DEVICE = 0, METAL_THREADGROUP = 1 };  // kinds of memory
enum { METAL_THREADGROUP_BARRIER, METAL_SIMDGROUP_BARRIER, METAL_SIMD_OPERATION };

extern "C" {
// Runs the kernel over a grid of `grid` threads. Returns 0, or 1 with the reason in `message`.
// `seed` 0 runs threads in their natural order, another value in one of many others.
int metal_dispatch(MetalKernel kernel, MetalBuffer* buffers, int count, const uint32_t* grid, const uint32_t* threadgroup,
                   uint64_t seed, const void* image_start, const void* image_end, char* message, size_t message_size);

// Called by the kernel's text, through metal.h. `line`, `array`: tell one place in the source from another.
void* metal_threadgroup_memory(size_t bytes, int array);
void metal_barrier(int operation, int flags, int line);
const void* metal_exchange(const void* value, size_t size, int line);  // 32 slots of 16 bytes, one a lane
uint32_t metal_lane(void);   // the caller's index in its simdgroup
uint32_t metal_lanes(void);  // how many threads its simdgroup has
void metal_require_lane(uint32_t lane, int line);  // fails unless the simdgroup has such a lane
}
