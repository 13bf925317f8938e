// What the kernels need of Metal beyond the language they share with CUDA; cuda/platform.cuh is its twin.

#define SHARED(T, name, count) threadgroup T name[count]
#define threadgroup_sync() threadgroup_barrier(mem_flags::mem_threadgroup)

// Eight neighbouring values as float; p is aligned to them.
template <typename T>
inline void load8(const device T* p, thread float* out) {
  for (int part = 0; part < 2; part++) {
    const vec<T, 4> a = ((const device vec<T, 4>*)p)[part];
    for (int i = 0; i < 4; i++) out[4 * part + i] = float(a[i]);
  }
}

inline void load4(const device float* p, thread float* out) {
  const float4 a = *(const device float4*)p;
  for (int i = 0; i < 4; i++) out[i] = a[i];
}

inline void store4(device float* p, const thread float* in) {
  float4 a;
  for (int i = 0; i < 4; i++) a[i] = in[i];
  *(device float4*)p = a;
}

// The low 32 bits of (high : low) >> shift, for a shift of 1 to 31.
inline uint funnel(uint low, uint high, uint shift) { return (low >> shift) | (high << (32 - shift)); }

// A code as the number that is multiplied, and what makes the sum over codes of a sum of such products.
template <int BITS>
inline float code(uint word, uint shift) {
  return float(extract_bits(word, shift, BITS));
}
template <int BITS>
inline float sum_of_codes(float products, float sum_of_x) {
  return products;
}

// The sum over each run of LANES neighbouring lanes (a power of two).
template <int LANES>
inline float lanes_sum(float x) {
  if (LANES == 32) return simd_sum(x);
  for (ushort step = LANES / 2; step > 0; step /= 2) x += simd_shuffle_xor(x, step);
  return x;
}
