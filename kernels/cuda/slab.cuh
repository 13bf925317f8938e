#include "base.cuh"

// Sixteen rows of a quantized matrix times 8 * SETS activations on the tensor cores, exactly: codes are
// small integers, which bfloat16 holds; a group's sum of code * x is scaled in float:
// sum_i (s q_i + b) x_i = s sum q_i x_i + b sum x_i. Codes below 8 bits are multiplied as 2^BITS + q, whose bits are
// a shift and a mask away. A float activation is three bfloat16 that sum to it.
//
// mma.m16n8k16: lane 4 g + t has rows g and g + 8 of the matrix and column g of the activations. The order of k is
// free, so a lane takes its quarter t of each group, as it lies in memory.

#ifdef FLOAT32
constexpr int PARTS = 3;
#else
constexpr int PARTS = 1;
#endif

DEVICE void mma(float* c, const uint* a, const uint* b) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

DEVICE uint pack(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *(const uint*)&pair;
}

// Which two of a lane's codes make register h of step j: four bits come apart fastest as codes r and r + 4.
template <int BITS>
DEVICE constexpr int first_code(int j, int h) {
  return BITS == 4 ? 8 * (j / 2) + 2 * (j % 2) + h : 4 * j + 2 * h;
}
template <int BITS>
DEVICE constexpr int second_code(int j, int h) {
  return first_code<BITS>(j, h) + (BITS == 4 ? 4 : 1);
}

template <int BITS>
DEVICE uint code_at(const uint* words, int index) {
  const int word = index * BITS / 32, shift = index * BITS % 32;
  const uint bits = shift + BITS <= 32 ? words[word] >> shift : __funnelshift_r(words[word], words[word + 1], shift);
  return bits & ((1u << BITS) - 1);
}

// Register h of step j as two bfloat16. BITS 16 and 32 are dense bfloat16 and float values; PART counts the three
// bfloat16 of a float.
template <int BITS, int PART>
DEVICE uint code_pair(const uint* words, int j, int h) {
  const int first = first_code<BITS>(j, h);
  if constexpr (BITS == 4) {
    const int shift = 4 * (2 * (j % 2) + h) - 3;
    return ((shift < 0 ? words[j / 2] << 3 : words[j / 2] >> shift) & 0x00780078) | 0x41804180;
  } else if constexpr (BITS == 8) {
    const uint low = __byte_perm(words[j], 0x4b000000, 0x7440 + 2 * h), high = __byte_perm(words[j], 0x4b000000, 0x7441 + 2 * h);
    return pack(__uint_as_float(low) - 8388608.0f, __uint_as_float(high) - 8388608.0f);
  } else if constexpr (BITS == 16) {
    return words[first / 2];
  } else if constexpr (BITS == 32) {
    float low = __uint_as_float(words[first]), high = __uint_as_float(words[first + 1]);
#pragma unroll
    for (int part = 0; part < PART; part++) {
      low -= __bfloat162float(__float2bfloat16(low));
      high -= __bfloat162float(__float2bfloat16(high));
    }
    return pack(low, high);
  } else {
    constexpr uint one = (127 + BITS) << 7;
    return ((code_at<BITS>(words, first) | code_at<BITS>(words, first + 1) << 16) << (7 - BITS)) | one << 16 | one;
  }
}

// One group of 8 * SETS activations as a lane holds it, each times a weight where a norm is folded in.
template <int GROUP, int SETS>
struct Activations {
  static constexpr int STEPS = GROUP / 16;
  uint b[PARTS][SETS][STEPS][2];
  float sums[SETS][2];  // of activations 2 t and 2 t + 1: those of this lane's results

  // Column `set` * 8 + g: the row at x [LENGTH], or zeros if it is null. squares: sums of squares so far, for keep().
  template <int BITS, int LENGTH>
  DEVICE void put(Activations& self, int set, const T* x, const T* weights, int group, int lane, float* squares) {
    const int at = group * GROUP + lane % 4 * (GROUP / 4);
    const bool whole = at + GROUP / 4 <= LENGTH && LENGTH % GROUP == 0;
#ifdef FLOAT32
    float values[GROUP / 4];
#pragma unroll
    for (int i = 0; i < GROUP / 4; i++) {
      values[i] = x != nullptr && at + i < LENGTH ? x[at + i] : 0;
      squares[0] += values[i] * values[i];
      if (weights != nullptr && at + i < LENGTH) values[i] *= weights[at + i];
    }
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
#pragma unroll
      for (int j = 0; j < STEPS; j++)
#pragma unroll
        for (int h = 0; h < 2; h++)
          self.b[part][set][j][h] = pack(values[first_code<BITS>(j, h)], values[second_code<BITS>(j, h)]);
#pragma unroll
      for (int i = 0; i < GROUP / 4; i++) values[i] -= __bfloat162float(__float2bfloat16(values[i]));
    }
#else
    alignas(16) uint words[GROUP / 8];
    read<LENGTH>(x, at, whole, words);
    if (weights != nullptr) {
      alignas(16) uint scales[GROUP / 8];
      read<LENGTH>(weights, at, whole, scales);
#pragma unroll
      for (int j = 0; j < STEPS; j++) {  // the diagonal of x x^T
        const uint a[4] = {words[2 * j], 0, words[2 * j + 1], 0};
        mma(squares, a, words + 2 * j);
      }
#pragma unroll
      for (int i = 0; i < GROUP / 8; i++) {
        const __nv_bfloat162 product = __hmul2(*(const __nv_bfloat162*)(words + i), *(const __nv_bfloat162*)(scales + i));
        words[i] = *(const uint*)&product;
      }
    }
#pragma unroll
    for (int j = 0; j < STEPS; j++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int r = first_code<BITS>(j, h);
        self.b[0][set][j][h] =
            BITS == 4 ? __byte_perm(words[r / 2], words[r / 2 + 2], r % 2 ? 0x7632 : 0x5410) : words[r / 2];
      }
#endif
    const uint ones[4] = {0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80};
    float sum[4] = {};
#pragma unroll
    for (int part = 0; part < PARTS; part++)
#pragma unroll
      for (int j = 0; j < STEPS; j++) mma(sum, ones, self.b[part][set][j]);
    self.sums[set][0] = sum[0], self.sums[set][1] = sum[1];
  }

#ifndef FLOAT32
  template <int LENGTH>
  DEVICE void read(const T* row, int at, bool whole, uint* words) {
    if (LENGTH % GROUP == 0) {
      const uint4* from = (const uint4*)(row + at);
      if (row == nullptr || !whole) {
#pragma unroll
        for (int i = 0; i < GROUP / 8; i++) words[i] = 0;
      } else if constexpr (GROUP % 32 == 0) {
#pragma unroll
        for (int i = 0; i < GROUP / 32; i++) ((uint4*)words)[i] = from[i];
      } else {
        *(uint2*)words = *(const uint2*)from;
      }
    } else {
#pragma unroll
      for (int i = 0; i < GROUP / 4; i++)
        ((T*)words)[i] = row != nullptr && at + i < LENGTH ? row[at + i] : __float2bfloat16(0);
    }
  }
#endif
};

// The sums of squares of a warp's share of eight activations.
DEVICE void keep(float* kept, const float* squares, int lane) {
#ifdef FLOAT32
  float sum = squares[0];
  sum += __shfl_xor_sync(~0u, sum, 1);
  sum += __shfl_xor_sync(~0u, sum, 2);
  if (lane % 4 == 0) kept[lane / 4] = sum;
#else
  if (lane % 4 == lane / 8) kept[lane / 4] = lane / 4 % 2 ? squares[1] : squares[0];
#endif
}

// COUNT neighbouring groups of rows g and g + 8 of sixteen.
template <int BITS, int GROUP, int COUNT, typename S>
struct Slab {
  static constexpr int BYTES = GROUP * BITS / 32;  // of a lane, in one group
  static constexpr int WORDS = (BYTES + 3) / 4;
  alignas(16) uint words[COUNT][2][WORDS];
  alignas(16) S scales[2][COUNT], biases[2][COUNT];

  // rows: this lane's two, which may lie far apart. GROUPS: in a row; those beyond it are read as its last.
  template <int GROUPS>
  DEVICE void load(Slab& self, const void* codes, const void* scales, const void* biases, const ulong* rows, int first,
                   int lane) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const uchar* row = (const uchar*)codes + rows[r] * (ulong)(GROUPS * 4 * BYTES) + (lane % 4) * BYTES;
#pragma unroll
      for (int i = 0; i < COUNT; i++) {
        const int group = GROUPS % COUNT == 0 ? first + i : min(first + i, GROUPS - 1);
        load_bytes<BYTES>(row + group * (4 * BYTES), self.words[i][r]);
      }
      if constexpr (BITS <= 8) {
        const S* s = (const S*)scales + rows[r] * GROUPS;
        const S* b = (const S*)biases + rows[r] * GROUPS;
        if constexpr (GROUPS % COUNT == 0 && (COUNT & (COUNT - 1)) == 0) {
          load_bytes<COUNT * sizeof(S)>(s + first, self.scales[r]);
          load_bytes<COUNT * sizeof(S)>(b + first, self.biases[r]);
        } else {
#pragma unroll
          for (int i = 0; i < COUNT; i++) {
            self.scales[r][i] = s[min(first + i, GROUPS - 1)];
            self.biases[r][i] = b[min(first + i, GROUPS - 1)];
          }
        }
      }
    }
  }

  // sums[set][...] += weight * group i of the rows times x, in the layout of mma's results.
  template <int SETS>
  DEVICE void multiply(const Slab& self, int i, const Activations<GROUP, SETS>& x, float (*sums)[4], float weight) {
    constexpr int MATRIX_PARTS = BITS == 32 ? 3 : 1;
    {
      float products[SETS][4];
#pragma unroll
      for (int c = 0; c < SETS; c++) products[c][0] = products[c][1] = products[c][2] = products[c][3] = 0;
#pragma unroll
      for (int j = 0; j < GROUP / 16; j++) {
        uint a[MATRIX_PARTS][4];
#pragma unroll
        for (int h = 0; h < 4; h++) {  // rows g, g + 8 for register 0; the same for register 1
          a[0][h] = code_pair<BITS, 0>(self.words[i][h % 2], j, h / 2);
          if constexpr (MATRIX_PARTS == 3) {
            a[1][h] = code_pair<BITS, 1>(self.words[i][h % 2], j, h / 2);
            a[2][h] = code_pair<BITS, 2>(self.words[i][h % 2], j, h / 2);
          }
        }
#pragma unroll
        for (int c = 0; c < SETS; c++) {
#pragma unroll
          for (int m = 0; m < MATRIX_PARTS; m++) {
#pragma unroll
            for (int p = 0; p < PARTS; p++)
              if (m + p < 3) mma(products[c], a[m], x.b[p][c][j]);
          }
        }
      }
#pragma unroll
      for (int c = 0; c < SETS; c++) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
          if constexpr (BITS <= 8) {
            const float s = to_float(self.scales[r][i]) * weight;
            const float b = to_float(self.biases[r][i]) * weight - (BITS < 8 ? (1 << BITS) * s : 0);
            sums[c][2 * r] += s * products[c][2 * r] + b * x.sums[c][0];
            sums[c][2 * r + 1] += s * products[c][2 * r + 1] + b * x.sums[c][1];
          } else {
            sums[c][2 * r] += weight * products[c][2 * r];
            sums[c][2 * r + 1] += weight * products[c][2 * r + 1];
          }
        }
      }
    }
  }
};

// Where the result for row r of sixteen and activation n of eight lies among a warp's: lane, then register.
DEVICE int result_lane(int r, int n) { return r % 8 * 4 + n / 2; }
DEVICE int result_register(int r, int n) { return r / 8 * 2 + n % 2; }
