// What the prefill kernels share: number formats, tensor-core fragments, asynchronous copies. No CUDA headers are
// needed, so that the text compiles wherever NVRTC is. Needs sm_80; on sm_90a matrix products take whole warpgroups.

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

// a * b + c for a pair of bfloat16, with one rounding.
DEVICE u32 fma_bf16x2(u32 a, u32 b, u32 c) {
  u32 d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// (a & b) | c
DEVICE u32 and_or(u32 a, u32 b, u32 c) {
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

DEVICE void store_shared(u32 to, uint4 x) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}

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

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// A warpgroup's product: d [64 x 128] += a [64 x 16] b [128 x 16]^T, asynchronous. Lane and register of d are as for
// multiply_add, warp w having rows 16 w to 16 w + 15. Tiles have rows of 128 bytes (CHUNKS 8) and begin at a multiple of
// 1024; a descriptor grows by 2 for each 16 of depth.
#define WARPGROUPS 1
DEVICE u64 tile_descriptor(u32 address) {
  return (u64)((address & 0x3ffff) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;  // 8 rows to the next 1024 bytes, 128-byte swizzle
}
DEVICE void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int OUTSTANDING>
DEVICE void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(OUTSTANDING) : "memory");
}
// What this thread wrote to shared memory can be read by the tensor cores, after a barrier.
DEVICE void publish_tiles() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
DEVICE void multiply_tiles(float (&d)[16][4], u64 a, u64 b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
      "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "
      "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "
      "%62, %63}, "
      "%64, %65, 1, 1, 1, 0, 0;"
      : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]), "+f"(d[1][3]),
        "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]), "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3]),
        "+f"(d[4][0]), "+f"(d[4][1]), "+f"(d[4][2]), "+f"(d[4][3]), "+f"(d[5][0]), "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]),
        "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]), "+f"(d[7][0]), "+f"(d[7][1]), "+f"(d[7][2]), "+f"(d[7][3]),
        "+f"(d[8][0]), "+f"(d[8][1]), "+f"(d[8][2]), "+f"(d[8][3]), "+f"(d[9][0]), "+f"(d[9][1]), "+f"(d[9][2]), "+f"(d[9][3]),
        "+f"(d[10][0]), "+f"(d[10][1]), "+f"(d[10][2]), "+f"(d[10][3]), "+f"(d[11][0]), "+f"(d[11][1]), "+f"(d[11][2]), "+f"(d[11][3]),
        "+f"(d[12][0]), "+f"(d[12][1]), "+f"(d[12][2]), "+f"(d[12][3]), "+f"(d[13][0]), "+f"(d[13][1]), "+f"(d[13][2]), "+f"(d[13][3]),
        "+f"(d[14][0]), "+f"(d[14][1]), "+f"(d[14][2]), "+f"(d[14][3]), "+f"(d[15][0]), "+f"(d[15][1]), "+f"(d[15][2]), "+f"(d[15][3])
      : "l"(a), "l"(b));
}
#endif

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
