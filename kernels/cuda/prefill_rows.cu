// Row by row: norms and the embedding. DIM, a multiple of 8, is defined by the including text.

#include "prefill_common.cuh"

constexpr int THREADS = 256, EACH = (DIM / 8 + THREADS - 1) / THREADS;  // runs of eight values of a thread

// total = x + delta where delta is given; out = total / sqrt(mean(total^2) + eps) * weight. One block a row.
// The sum is rounded to bfloat16 before it is normed, as the next layer reads it.
extern "C" __global__ void __launch_bounds__(256)
    prefill_norm(const u16* x, const u16* delta, const float* weight, u16* total, u16* out, float eps) {
  __shared__ float partial[THREADS / 32];
  const u64 start = (u64)blockIdx.x * DIM;
  uint4 row[EACH];
  float squares = 0;
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const int at = (i * THREADS + threadIdx.x) * 8;
    if (at >= DIM) continue;
    uint4 words = *(const uint4*)(x + start + at);
    u32* pairs = (u32*)&words;
    if (delta != nullptr) {
      const uint4 added = *(const uint4*)(delta + start + at);
      const u32* more = (const u32*)&added;
#pragma unroll
      for (int p = 0; p < 4; p++)
        pairs[p] = pack_bf16(low_bf16(pairs[p]) + low_bf16(more[p]), high_bf16(pairs[p]) + high_bf16(more[p]));
      *(uint4*)(total + start + at) = words;
    }
#pragma unroll
    for (int p = 0; p < 4; p++) squares += low_bf16(pairs[p]) * low_bf16(pairs[p]) + high_bf16(pairs[p]) * high_bf16(pairs[p]);
    row[i] = words;
  }
  squares = warp_sum(squares);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = squares;
  __syncthreads();
  squares = 0;
#pragma unroll
  for (int w = 0; w < THREADS / 32; w++) squares += partial[w];
  const float factor = rsqrtf(squares / DIM + eps);
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const int at = (i * THREADS + threadIdx.x) * 8;
    if (at >= DIM) continue;
    u32* pairs = (u32*)&row[i];
#pragma unroll
    for (int p = 0; p < 4; p++)
      pairs[p] = pack_bf16(low_bf16(pairs[p]) * factor * __ldg(weight + at + 2 * p), high_bf16(pairs[p]) * factor * __ldg(weight + at + 2 * p + 1));
    *(uint4*)(out + start + at) = row[i];
  }
}

// out[t] = x[rows[t]]. One block a row.
extern "C" __global__ void __launch_bounds__(256) prefill_select(const u16* x, const int* rows, u16* out) {
  const u64 from = (u64)rows[blockIdx.x] * DIM, to = (u64)blockIdx.x * DIM;
  for (int at = threadIdx.x * 8; at < DIM; at += THREADS * 8) *(uint4*)(out + to + at) = *(const uint4*)(x + from + at);
}
