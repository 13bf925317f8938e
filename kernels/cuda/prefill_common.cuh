// What the prefill kernels share: number formats, tensor-core fragments, asynchronous copies. No CUDA headers are
// needed, so that the text compiles wherever NVRTC is. Needs sm_90 (bfloat16 arithmetic in pairs).

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define DEVICE __device__ __forceinline__

enum { BF16 = 0, F16 = 1, F32 = 2 };  // as kernels/cuda/prefill.py numbers the dtypes

DEVICE u32 pack_bf16(float low, float high) {
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
DEVICE u16 to_bf16(float x) { return (u16)pack_bf16(x, 0.0f); }
DEVICE float from_bf16(u16 x) { return __uint_as_float((u32)x << 16); }
DEVICE float low_bf16(u32 pair) { return __uint_as_float(pair << 16); }
DEVICE float high_bf16(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
DEVICE float from_f16(u16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
}
DEVICE float load_float(const void* data, u64 index, int dtype) {
  if (dtype == F32) return __ldg((const float*)data + index);
  const u16 bits = __ldg((const u16*)data + index);
  return dtype == BF16 ? from_bf16(bits) : from_f16(bits);
}
DEVICE float sigmoid(float x) { return 1.0f / (1.0f + __expf(-x)); }
DEVICE float silu(float x) { return x / (1.0f + __expf(-x)); }

DEVICE float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

// Arithmetic on pairs of bfloat16, one rounding each.
DEVICE u32 sub_bf16x2(u32 a, u32 b) {
  u32 d;
  asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
DEVICE u32 fma_bf16x2(u32 a, u32 b, u32 c) {
  u32 d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// BYTES (4, 8 or 16) from global to shared memory; zeros where `valid` is false (the source is not read then).
template <int BYTES>
DEVICE void copy_async(u32 to, const void* from, bool valid) {
  const int size = valid ? BYTES : 0;
  if (BYTES == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(size) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(BYTES), "r"(size) : "memory");
}
DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int OUTSTANDING>
DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(OUTSTANDING) : "memory");
}

// Fragments of mma.m16n8k16: `a` is 16 x 16, `b` two 16 x 8 side by side. The lane's row address is given.
DEVICE void load_matrices(u32 (&r)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
DEVICE void load_matrices_transposed(u32 (&r)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
DEVICE void multiply_add(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Tiles in shared memory have rows of CHUNKS * 16 bytes, a power of two of at least 8; the chunks of a row are
// permuted so that the eight rows of a matrix lie in different banks.
template <int CHUNKS>
DEVICE u32 tile_offset(u32 row, u32 chunk) {
  return (row * CHUNKS + (chunk ^ (row & 7))) * 16;
}
// The lane's address for a 16 x 16 piece at (row, chunk): as the left operand, rows x depth.
template <int CHUNKS>
DEVICE u32 left_address(u32 tile, u32 row, u32 chunk, u32 lane) {
  return tile + tile_offset<CHUNKS>(row + (lane & 15), chunk + (lane >> 4));
}
// As two right operands, columns x depth: registers 0 and 1 are the first eight columns, 2 and 3 the next eight.
template <int CHUNKS>
DEVICE u32 right_address(u32 tile, u32 column, u32 chunk, u32 lane) {
  return tile + tile_offset<CHUNKS>(column + (lane & 7) + ((lane >> 4) << 3), chunk + ((lane >> 3) & 1));
}
// As two right operands stored depth x columns (to be loaded transposed).
template <int CHUNKS>
DEVICE u32 right_address_transposed(u32 tile, u32 depth, u32 chunk, u32 lane) {
  return tile + tile_offset<CHUNKS>(depth + (lane & 15), chunk + (lane >> 4));
}
// As the left operand stored depth x rows (to be loaded transposed).
template <int CHUNKS>
DEVICE u32 left_address_transposed(u32 tile, u32 depth, u32 chunk, u32 lane) {
  return tile + tile_offset<CHUNKS>(depth + (lane & 7) + ((lane >> 4) << 3), chunk + ((lane >> 3) & 1));
}
