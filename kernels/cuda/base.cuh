// What every kernel of this folder needs. FLOAT32 makes activations float, else they are bfloat16.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

typedef unsigned int uint;
typedef unsigned short ushort;
typedef unsigned char uchar;
typedef unsigned long long ulong;
typedef __nv_bfloat16 bfloat;
#ifdef FLOAT32
typedef float T;
#else
typedef bfloat T;
#endif

#define DEVICE static __device__ __forceinline__

// Programmatic dependent launch: the next kernel may start, and what the one before wrote may be read. Without the
// launch attribute both do nothing. Every thread of every kernel waits, so that one wait covers all kernels before.
DEVICE void let_next_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
DEVICE void wait_for_inputs() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Bring what no kernel writes nearer before the wait.
DEVICE void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

DEVICE void prefetch_run(const void* p, uint bytes) {  // a multiple of 16, as the address
#if __CUDA_ARCH__ >= 900
  if (bytes > 0) asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(bytes));
#endif
}

DEVICE float to_float(float x) { return x; }
DEVICE float to_float(bfloat x) { return __bfloat162float(x); }
DEVICE float to_float(__half x) { return __half2float(x); }
template <typename To>
DEVICE To from_float(float x) {
  if constexpr (sizeof(To) == 4) return x;
  else return __float2bfloat16(x);
}

DEVICE float power(float x) {  // of e
#ifdef FLOAT32
  return expf(x);
#else
  return __expf(x);
#endif
}
DEVICE float silu(float x) { return x / (1 + power(-x)); }
DEVICE float sigmoid(float x) { return 1 / (1 + power(-x)); }

DEVICE float warp_sum(float x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

// N bytes from an address that N's powers of two divide.
template <int N>
DEVICE void load_bytes(const void* from, void* to) {
  const uchar* p = (const uchar*)from;
  uchar* q = (uchar*)to;
  if constexpr (N % 16 == 0) {
#pragma unroll
    for (int i = 0; i < N; i += 16) *(uint4*)(q + i) = __ldg((const uint4*)(p + i));
  } else if constexpr (N % 8 == 0) {
#pragma unroll
    for (int i = 0; i < N; i += 8) *(uint2*)(q + i) = __ldg((const uint2*)(p + i));
  } else if constexpr (N % 4 == 0) {
#pragma unroll
    for (int i = 0; i < N; i += 4) *(uint*)(q + i) = __ldg((const uint*)(p + i));
  } else if constexpr (N % 2 == 0) {
#pragma unroll
    for (int i = 0; i < N; i += 2) *(ushort*)(q + i) = __ldg((const ushort*)(p + i));
  } else {
#pragma unroll
    for (int i = 0; i < N; i++) q[i] = __ldg(p + i);
  }
}

// COUNT neighbouring activations as float, written before by another kernel (so not through the read-only cache).
template <int COUNT, typename Stored>
DEVICE void load_values(const Stored* p, float* out) {
  constexpr int BYTES = COUNT * sizeof(Stored);
  if constexpr (BYTES % 16 == 0) {
#pragma unroll
    for (int i = 0; i < BYTES / 16; i++) {
      const uint4 a = *((const uint4*)p + i);
      const Stored* values = (const Stored*)&a;
#pragma unroll
      for (int j = 0; j < 16 / (int)sizeof(Stored); j++) out[i * (16 / sizeof(Stored)) + j] = to_float(values[j]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; i++) out[i] = to_float(p[i]);
  }
}
