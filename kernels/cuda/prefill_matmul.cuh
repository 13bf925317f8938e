// The main loop of y = x W^T on tensor cores, W as a checkpoint stores it: codes are expanded to bfloat16 tiles in
// shared memory while the tensor cores work on the tile before.
//
// A block makes BM rows (tokens) by BN columns (rows of W), in steps of 64 along the depth. Of that each of its
// WARPS_M x WARPS_N warps holds 16 x 128; on Hopper four warps, a warpgroup, work as one on 64 x 128.
// STAGES tiles of activations and of codes are held, and two of expanded weights. Defined by the including text: BM, BN,
// WARPS_M, WARPS_N, STAGES.

#include "prefill_common.cuh"

constexpr int THREADS = 32 * WARPS_M * WARPS_N;
constexpr int DEPTH = 64, CHUNKS = DEPTH / 8;
constexpr int M_TILES = BM / WARPS_M / 16, N_TILES = BN / WARPS_N / 8;
constexpr int RUNS = BN * 2 / THREADS;  // of 32 weights, a thread's share of a tile
constexpr int COPIES = BM * CHUNKS / THREADS;
constexpr int AHEAD = STAGES - 1;  // steps that activations are fetched before their use
constexpr int X_BYTES = BM * DEPTH * 2, W_BYTES = BN * DEPTH * 2;
static_assert(RUNS >= 1 && COPIES >= 1 && WARPS_M % 4 == 0 && M_TILES == 1 && N_TILES == 16, "shape of the block");

// One matrix [rows, depth] of a stack; strides are those of the stored format.
struct Weights {
  const u32* codes;  // or the dense values
  const void* scales;
  const void* biases;
  int rows;
};

// How weights are stored: BITS of a code (16, 32: dense), GROUP columns for each scale, DTYPE of scales or dense values.
template <int BITS_, int GROUP_, int DTYPE_>
struct Format {
  static constexpr int BITS = BITS_, GROUP = GROUP_, DTYPE = DTYPE_;
  static constexpr bool DENSE = BITS >= 16;
  // Codes are whole numbers in bfloat16, so that its arithmetic expands them with one rounding, as float32 would.
  static constexpr bool PAIRS = !DENSE && DTYPE == BF16;
  static constexpr int VECTOR = BITS % 4 == 0 ? 16 : BITS % 2 == 0 ? 8 : 4;  // bytes of one copy
  static constexpr int VECTORS = BITS * 4 / VECTOR;                          // copies of a run
  static constexpr int RAW_BYTES = RUNS * THREADS * BITS * 4;
};

// Scales and biases of a run for two steps, an even one and the next, as they lie in memory: nothing waits for them before
// they are used. Where a step is a group, the two come in one load.
template <class F>
struct Affine {
  static constexpr bool ONE = F::PAIRS && F::GROUP == DEPTH, SAME = F::GROUP == 2 * DEPTH;
  u32 scale[ONE ? 1 : 2], bias[ONE ? 1 : 2];

  // base: index of the row's first group; column: of the run in the even step. whole: rows have an even number of groups.
  DEVICE void load(const void* scales, const void* biases, u32 base, int column, int depth, bool wanted, bool whole) {
    if constexpr (F::DENSE) return;
    const u64 at = base + column / F::GROUP;
    const bool first = wanted && column < depth, second = wanted && column + DEPTH < depth;
    if constexpr (ONE) {
      if (whole) {
        scale[0] = first ? __ldg((const u32*)((const u16*)scales + at)) : 0;
        bias[0] = first ? __ldg((const u32*)((const u16*)biases + at)) : 0;
      } else {
        scale[0] = bits(scales, at, first) | bits(scales, at + 1, second) << 16;
        bias[0] = bits(biases, at, first) | bits(biases, at + 1, second) << 16;
      }
    } else {
      scale[0] = bits(scales, at, first), bias[0] = bits(biases, at, first);
      if (SAME) return;
      scale[1] = bits(scales, at + DEPTH / F::GROUP, second), bias[1] = bits(biases, at + DEPTH / F::GROUP, second);
    }
  }
  DEVICE static u32 bits(const void* data, u64 index, bool valid) {
    if (!valid) return 0;
    return F::PAIRS ? __ldg((const u16*)data + index) : __float_as_uint(load_float(data, index, F::DTYPE));
  }
  // Of the even (0) or odd step: twice in a register for pairs of bfloat16, else as float32.
  DEVICE u32 get(const u32 (&of)[ONE ? 1 : 2], int step) const {
    if constexpr (ONE) return __byte_perm(of[0], 0, step ? 0x3232 : 0x1010);
    const u32 one = of[SAME ? 0 : step * (1 - ONE)];
    return F::PAIRS ? one * 0x10001u : one;
  }
};

// Eight weights, the `chunk`-th of a run whose words, scale and bias are given, as bfloat16.
template <class F>
DEVICE uint4 expand(const u32* words, int chunk, u32 scale, u32 bias) {
  u32 out[4];
  constexpr u32 MASK = (1u << (F::BITS & 15)) - 1;
  u32 magic;
  asm("mov.b32 %0, 0x43004300;" : "=r"(magic));  // 128 and 128; a register, so that one instruction masks and sets
  if constexpr (F::PAIRS && F::BITS == 4) {
    // Four shifts give the pairs (0, 4), (1, 5), (2, 6), (3, 7).
    u32 pairs[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const u32 code = and_or(words[chunk] >> (4 * i), 0x000f000fu, magic);  // 128 + code
      pairs[i] = fma_bf16x2(fma_bf16x2(code, 0x3f803f80u, 0xc300c300u), scale, bias);
    }
    out[0] = __byte_perm(pairs[0], pairs[1], 0x5410);
    out[1] = __byte_perm(pairs[2], pairs[3], 0x5410);
    out[2] = __byte_perm(pairs[0], pairs[1], 0x7632);
    out[3] = __byte_perm(pairs[2], pairs[3], 0x7632);
  } else if constexpr (F::PAIRS && F::BITS == 8) {
    // 128 + the low seven bits is the code itself where its high bit is set, and 128 too much where it is not.
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const u32 two = __byte_perm(words[chunk * 2 + i / 2], 0, i % 2 ? 0x4342 : 0x4140);
      const u32 excess = (~two & 0x00800080u) * (0xc300 / 0x80);
      out[i] = fma_bf16x2(fma_bf16x2((two & 0x007f007fu) | 0x43004300u, 0x3f803f80u, excess), scale, bias);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int bit = (chunk * 8 + 2 * i) * F::BITS, word = bit / 32, shift = bit % 32;
      u32 two = words[word];
      if (shift) two = shift + 2 * F::BITS > 32 ? __funnelshift_r(words[word], words[word + 1], shift) : two >> shift;
      if (F::PAIRS) {
        const u32 code = (two & MASK) | ((two << (16 - F::BITS)) & (MASK << 16)) | 0x43004300u;
        out[i] = fma_bf16x2(fma_bf16x2(code, 0x3f803f80u, 0xc300c300u), scale, bias);
      } else {
        const float factor = __uint_as_float(scale), offset = __uint_as_float(bias);
        const float low = __uint_as_float(0x4b000000u | (two & MASK)) - 8388608.0f;
        const float high = __uint_as_float(0x4b000000u | ((two >> F::BITS) & MASK)) - 8388608.0f;
        out[i] = pack_bf16(fmaf(low, factor, offset), fmaf(high, factor, offset));
      }
    }
  }
  return make_uint4(out[0], out[1], out[2], out[3]);
}

// Eight dense weights from the words of their chunk.
template <class F>
DEVICE uint4 convert(const u32* words) {
  u32 out[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if (F::BITS == 32) out[i] = pack_bf16(__uint_as_float(words[2 * i]), __uint_as_float(words[2 * i + 1]));
    else if (F::DTYPE == F16) out[i] = pack_bf16(from_f16(words[i] & 0xffff), from_f16(words[i] >> 16));
    else out[i] = words[i];
  }
  return make_uint4(out[0], out[1], out[2], out[3]);
}

// acc = x rows times the columns [first, first + BN) of the matrix. With PAIRED, tiles of eight columns alternate
// between `matrix` and `pair` (gate and up), BN / 2 columns of each. Row r of the block is row source(r) of x; rows >= count
// are not read.
template <class F, bool PAIRED, class Source>
DEVICE void multiply(float (&acc)[M_TILES][N_TILES][4], unsigned char* memory, const Weights& matrix, const Weights& pair,
                     int first, const u16* x, int count, int depth, Source source) {
  const u32 thread = threadIdx.x, warp = thread / 32;
  const u32 warp_m = warp % WARPS_M, warp_n = warp / WARPS_M;
  const u32 x_tiles = shared_address(memory), w_tiles = x_tiles + STAGES * X_BYTES, raw = w_tiles + 2 * W_BYTES;
  const unsigned char* raw_memory = memory + STAGES * X_BYTES + 2 * W_BYTES;
  const int steps = (depth + DEPTH - 1) / DEPTH;

  // This thread's share of the activations: one chunk of COPIES rows.
  const u32 x_chunk = thread % CHUNKS, x_row = thread / CHUNKS;
  const u16* x_from[COPIES];
#pragma unroll
  for (int i = 0; i < COPIES; i++) {
    const int row = x_row + i * (THREADS / CHUNKS);
    x_from[i] = x + (u64)source(min(row, count - 1)) * depth + x_chunk * 8;
  }

  const u32 x_place = tile_offset<CHUNKS>(x_row, x_chunk);

  // And of the weights: half a row of the tile for each run.
  const u32 half = thread % 2;
  const bool second = PAIRED && thread / 16 % 2;
  const void* scales = second ? pair.scales : matrix.scales;
  const void* biases = second ? pair.biases : matrix.biases;
  const unsigned char* codes[RUNS];
  u32 group_base[RUNS];
  bool wanted[RUNS];  // rows past the matrix are not read: their columns come out as anything, and are not stored
#pragma unroll
  for (int r = 0; r < RUNS; r++) {
    const int row = (thread + r * THREADS) / 2;
    const int column = first + (PAIRED ? row / 16 * 8 + row % 8 : row);
    wanted[r] = column < matrix.rows;
    codes[r] = (const unsigned char*)(second ? pair.codes : matrix.codes) + ((u64)column * depth + half * 32) / 8 * F::BITS;
    group_base[r] = column * (depth / F::GROUP);
  }

  const u32 w_place = w_tiles + tile_offset<CHUNKS>(thread / 2, half * 4);

  auto fetch_x = [&](int step) {
    const u32 tile = x_tiles + step % STAGES * X_BYTES;
    const bool inside = step * DEPTH + (int)x_chunk * 8 < depth;
#pragma unroll
    for (int i = 0; i < COPIES; i++) {
      const int row = x_row + i * (THREADS / CHUNKS);  // eight rows further lie the same within a tile
      copy_async<16>(tile + x_place + i * (THREADS / CHUNKS * 128), x_from[i] + step * DEPTH, inside && row < count);
    }
  };
  auto fetch_codes = [&](int step) {
    const bool inside = step * DEPTH + (int)half * 32 < depth;
    if (!inside) return;
#pragma unroll
    for (int r = 0; r < RUNS; r++) {
      if (!wanted[r]) continue;
#pragma unroll
      for (int v = 0; v < F::VECTORS; v++)
        copy_async<F::VECTOR>(raw + step % STAGES * F::RAW_BYTES + ((r * F::VECTORS + v) * THREADS + thread) * F::VECTOR,
                              codes[r] + (u64)step * (DEPTH / 8 * F::BITS) + v * F::VECTOR, true);
    }
  };
  // Where copies are VECTOR bytes wide, word w of a run is in vector w * 4 / VECTOR.
  auto read_words = [&](u32* words, int step, int r, int from, int n) {
    const unsigned char* at = raw_memory + step % STAGES * F::RAW_BYTES + thread * F::VECTOR;
    constexpr int EACH = F::VECTOR / 4;
#pragma unroll
    for (int w = 0; w < n; w += EACH) {
      const unsigned char* place = at + (r * F::VECTORS + (from + w) / EACH) * THREADS * F::VECTOR;
      if (EACH == 4) *(uint4*)(words + w) = *(const uint4*)place;
      else if (EACH == 2) *(uint2*)(words + w) = *(const uint2*)place;
      else words[w] = *(const u32*)place;
    }
  };
  Affine<F> current[RUNS], next[RUNS];
  const bool whole = depth / F::GROUP % 2 == 0;
  auto fetch_affine = [&](Affine<F>* to, int step) {
#pragma unroll
    for (int r = 0; r < RUNS; r++)
      to[r].load(scales, biases, group_base[r], step * DEPTH + half * 32, depth, wanted[r], whole);
  };
  constexpr int WORDS = F::DENSE ? F::BITS / 4 : F::BITS;
  alignas(16) u32 words[RUNS][WORDS];
  auto read_run = [&](int step) {
    if (F::DENSE) return;
#pragma unroll
    for (int r = 0; r < RUNS; r++) read_words(words[r], step, r, 0, WORDS);
  };
  // Chunk c (of 4) of this thread's runs of tile `step`, which is odd or not, expanded into the tile's buffer.
  auto expand_chunk = [&](int step, int c, const Affine<F>* affine, int odd) {
#pragma unroll
    for (int r = 0; r < RUNS; r++) {
      uint4 eight;
      if constexpr (F::DENSE) {
        read_words(words[r], step, r, c * WORDS, WORDS);
        eight = convert<F>(words[r]);
        if (step * DEPTH + (int)half * 32 >= depth) eight = make_uint4(0, 0, 0, 0);
      } else {
        eight = expand<F>(words[r], c, affine[r].get(affine[r].scale, odd), affine[r].get(affine[r].bias, odd));
      }
      store_shared((w_place + step % 2 * W_BYTES + r * (THREADS / 2 * 128)) ^ (c * 16), eight);
    }
  };

#pragma unroll
  for (int i = 0; i < M_TILES; i++)
#pragma unroll
    for (int j = 0; j < N_TILES; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) acc[i][j][e] = 0;

  fetch_codes(0);
#pragma unroll
  for (int s = 0; s < AHEAD; s++) {
    if (s < steps) fetch_x(s);
    if (s + 1 < steps) fetch_codes(s + 1);
    commit_copies();
  }
  fetch_affine(current, 0);
  wait_copies<AHEAD - 1>();
  read_run(0);
#pragma unroll
  for (int c = 0; c < 4; c++) expand_chunk(0, c, current, 0);

  auto advance = [&](int step, const Affine<F>* affine, int odd) {
    wait_copies<AHEAD - 1>();
    const u32 x_tile = x_tiles + step % STAGES * X_BYTES, w_tile = w_tiles + step % 2 * W_BYTES;
#ifdef WARPGROUPS
    wait_products<0>();
    publish_tiles();
    __syncthreads();
    const u64 left = tile_descriptor(x_tile + warp_m / 4 * 64 * 128), right = tile_descriptor(w_tile + warp_n * 128 * 128);
    begin_products();
#pragma unroll
    for (int c = 0; c < 4; c++) multiply_tiles(acc[0], left + 2 * c, right + 2 * c);
    commit_products();
#else
    __syncthreads();
#endif
    if (odd) fetch_affine(next, step + 2);  // early: the fence of the next step waits for every load before it
    read_run(step + 1);
    if (step + AHEAD < steps) fetch_x(step + AHEAD);
    if (step + AHEAD + 1 < steps) fetch_codes(step + AHEAD + 1);
    commit_copies();
#pragma unroll
    for (int c = 0; c < 4; c++) {
      expand_chunk(step + 1, c, affine, odd);
#ifndef WARPGROUPS
      const u32 lane = thread % 32;
      u32 left[4];
      load_matrices(left, left_address<CHUNKS>(x_tile, warp_m * 16, c * 2, lane));
#pragma unroll
      for (int j = 0; j < N_TILES / 2; j++) {
        u32 right[4];
        load_matrices(right, right_address<CHUNKS>(w_tile, warp_n * 128 + j * 16, c * 2, lane));
        multiply_add(acc[0][2 * j], left, right[0], right[1]);
        multiply_add(acc[0][2 * j + 1], left, right[2], right[3]);
      }
#endif
    }
  };
  // A step expands the tile of the next one.
  for (int step = 0; step < steps; step += 2) {
    advance(step, current, 1);
    if (step + 1 < steps) advance(step + 1, next, 0);
#pragma unroll
    for (int r = 0; r < RUNS; r++) current[r] = next[r];
  }
#ifdef WARPGROUPS
  wait_products<0>();
#endif
}
