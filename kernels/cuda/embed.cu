#include "base.cuh"

// out[row] = table[tokens[row]], a matrix of BITS-wide codes or dense values of DIM columns (STORED, PITCH words a
// row). Blocks: x counts rows.

extern "C" __global__ void embed(const uint* codes, const SCALE* scales, const SCALE* biases, const int* tokens, T* out) {
  let_next_start();
  wait_for_inputs();
  const long long token = tokens[blockIdx.x];
  T* to = out + (long long)blockIdx.x * DIM;
  for (int i = threadIdx.x; i < DIM; i += blockDim.x) {
#if BITS <= 8
    const uchar* row = (const uchar*)codes + token * (DIM / 8 * BITS);
    const int bit = i * BITS, byte = bit / 8;
    uint word = row[byte];
    if (bit % 8 + BITS > 8) word |= (uint)row[byte + 1] << 8;
    const float code = (word >> bit % 8) & ((1 << BITS) - 1);
    const long long group = token * (DIM / GROUP) + i / GROUP;
    to[i] = from_float<T>(to_float(scales[group]) * code + to_float(biases[group]));
#else
    to[i] = from_float<T>(to_float(((const SCALE*)codes)[token * PITCH + i]));
#endif
  }
}
