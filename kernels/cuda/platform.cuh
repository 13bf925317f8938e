// Metal's words in CUDA, and CUDA's twin of metal/platform.metal. A simdgroup is a warp; threadgroups are flat.
// The words for address spaces are left out of the text beforehand: `device` is part of CUDA's own.

#define inline __device__ __forceinline__

#define threadgroup_position_in_grid blockIdx
#define threadgroups_per_grid gridDim
#define thread_position_in_threadgroup threadIdx
#define simdgroup_index_in_threadgroup (threadIdx.x / 32)
#define thread_index_in_simdgroup (threadIdx.x % 32)

#define SHARED(T, name, count) __shared__ T name[count]
#define threadgroup_sync() __syncthreads()

typedef unsigned int uint;
typedef unsigned short ushort;

template <typename To, typename From>
inline To as_type(From value) {
  static_assert(sizeof(To) == sizeof(From), "as_type keeps the size");
  To out;
  memcpy(&out, &value, sizeof(To));
  return out;
}

inline float simd_shuffle_xor(float x, uint mask) { return __shfl_xor_sync(0xffffffff, x, mask); }
inline uint simd_shuffle_xor(uint x, uint mask) { return __shfl_xor_sync(0xffffffff, x, mask); }
inline float simd_shuffle(float x, uint lane) { return __shfl_sync(0xffffffff, x, lane); }
inline float simd_sum(float x) {
  for (int step = 16; step > 0; step /= 2) x += simd_shuffle_xor(x, step);
  return x;
}
inline float simd_max(float x) {
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, simd_shuffle_xor(x, step));
  return x;
}

// Eight neighbouring values as float; p is aligned to them.
inline void load8(const float* p, float* out) {
  for (int part = 0; part < 2; part++) {
    const float4 a = ((const float4*)p)[part];
    out[4 * part] = a.x, out[4 * part + 1] = a.y, out[4 * part + 2] = a.z, out[4 * part + 3] = a.w;
  }
}
inline float2 pair_of(__half2 x) { return __half22float2(x); }
inline float2 pair_of(__nv_bfloat162 x) { return __bfloat1622float2(x); }
template <typename Pair>
inline void load_pairs(const void* p, float* out) {
  const uint4 words = *(const uint4*)p;
  const uint each[4] = {words.x, words.y, words.z, words.w};
  for (int i = 0; i < 4; i++) {
    const float2 pair = pair_of(as_type<Pair>(each[i]));
    out[2 * i] = pair.x, out[2 * i + 1] = pair.y;
  }
}
inline void load8(const __half* p, float* out) { load_pairs<__half2>(p, out); }
inline void load8(const __nv_bfloat16* p, float* out) { load_pairs<__nv_bfloat162>(p, out); }

inline void load4(const float* p, float* out) {
  const float4 a = *(const float4*)p;
  out[0] = a.x, out[1] = a.y, out[2] = a.z, out[3] = a.w;
}
inline void store4(float* p, const float* in) { *(float4*)p = make_float4(in[0], in[1], in[2], in[3]); }

// The low 32 bits of (high : low) >> shift, for a shift of 1 to 31.
inline uint funnel(uint low, uint high, uint shift) { return __funnelshift_r(low, high, shift); }

// Conversion from integer runs at a quarter of the rate, so a code becomes the top of a mantissa: 1 + q / 2^BITS.
template <int BITS>
inline float code(uint word, uint shift) {
  constexpr uint top = 23 - BITS;
  const uint moved = shift >= top ? word >> (shift - top) : word << (top - shift);
  return __uint_as_float((moved & (((1u << BITS) - 1) << top)) | 0x3f800000);
}
template <int BITS>
inline float sum_of_codes(float products, float sum_of_x) {
  return (products - sum_of_x) * (1 << BITS);
}

// The sum over each run of LANES neighbouring lanes (a power of two).
template <int LANES>
inline float lanes_sum(float x) {
  for (int step = LANES / 2; step > 0; step /= 2) x += simd_shuffle_xor(x, step);
  return x;
}
