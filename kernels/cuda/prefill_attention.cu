// Causal grouped-query attention of many tokens over the paged KV cache, with an online softmax (arXiv:2307.08691).
//
// Defined by the including text: HEADS, KV_HEADS, HEAD_DIM (a multiple of 16, at most 256), HALF (pairs that RoPE rotates,
// 0: none), Q_NORM, K_NORM, GATED (0 or 1), BLOCK_SIZE of the cache, and of Q, K, V and GATE _ROW, _OFFSET, _STRIDE.
// The pools are [blocks * BLOCK_SIZE, KV_HEADS, HEAD_DIM].

#include "prefill_common.cuh"

constexpr int BQ = 128, BK = 64;  // queries and keys of a tile
constexpr int PAD = HEAD_DIM <= 64 ? 64 : HEAD_DIM <= 128 ? 128 : 256, CHUNKS = PAD / 8;
static_assert(HEAD_DIM % 16 == 0 && HEAD_DIM <= 256, "size of the heads");

// Tiles of queries: sequence, first row, rows (at most BQ), position of the first row.
typedef int4 Tile;

DEVICE u64 place_of(const int* table, int position) {
  return (u64)__ldg(table + position / BLOCK_SIZE) * BLOCK_SIZE + position % BLOCK_SIZE;
}

// Norms and RoPE; keys and values go to the pools, queries [tokens, HEADS, HEAD_DIM] aside. Grid: tiles, BQ.
extern "C" __global__ void __launch_bounds__(256)
    prefill_attention_write(const u16* q, const u16* k, const u16* v, const float* q_weight, const float* k_weight,
                            const float* inv_freq, const Tile* tiles, const int* tables, const int* table_length, u16* queries,
                            u16* keys, u16* values, float q_eps, float k_eps, float rope_scale) {
  constexpr int PAIRS = (HEAD_DIM + 63) / 64;
  __shared__ float cosines[HALF + 1], sines[HALF + 1], heads[8][HEAD_DIM];
  const Tile tile = tiles[blockIdx.x];
  if ((int)blockIdx.y >= tile.z) return;
  const u64 token = tile.y + blockIdx.y;
  const int position = tile.w + blockIdx.y, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const u64 place = place_of(tables + tile.x * *table_length, position);
  for (int i = threadIdx.x; i < HALF; i += 256) {
    float sine, cosine;
    sincosf((float)position * inv_freq[i], &sine, &cosine);
    sines[i] = sine * rope_scale, cosines[i] = cosine * rope_scale;
  }
  __syncthreads();
  for (int index = warp; index < HEADS + 2 * KV_HEADS; index += 8) {
    const int part = index < HEADS ? 0 : index < HEADS + KV_HEADS ? 1 : 2;
    const int head = part == 0 ? index : (index - HEADS) % KV_HEADS;
    const u16* from = part == 0   ? q + token * Q_ROW + Q_OFFSET + head * Q_STRIDE
                      : part == 1 ? k + token * K_ROW + K_OFFSET + head * K_STRIDE
                                  : v + token * V_ROW + V_OFFSET + head * V_STRIDE;
    u16* to = part == 0 ? queries + (token * HEADS + head) * HEAD_DIM
                        : (part == 1 ? keys : values) + (place * KV_HEADS + head) * HEAD_DIM;
    u32 x[PAIRS];
    float squares = 0;
#pragma unroll
    for (int p = 0; p < PAIRS; p++) {
      const int at = p * 64 + lane * 2;
      x[p] = at < HEAD_DIM ? __ldg((const u32*)(from + at)) : 0;
      squares += low_bf16(x[p]) * low_bf16(x[p]) + high_bf16(x[p]) * high_bf16(x[p]);
    }
    const bool normed = part == 0 ? Q_NORM : part == 1 && K_NORM, rotated = part < 2 && HALF > 0;
    if (!normed && !rotated) {
#pragma unroll
      for (int p = 0; p < PAIRS; p++)
        if (p * 64 + lane * 2 < HEAD_DIM) *(u32*)(to + p * 64 + lane * 2) = x[p];
      continue;
    }
    const float* weight = part == 0 ? q_weight : k_weight;
    const float factor = normed ? rsqrtf(warp_sum(squares) / HEAD_DIM + (part == 0 ? q_eps : k_eps)) : 1.0f;
    float* mine = heads[warp];
#pragma unroll
    for (int p = 0; p < PAIRS; p++) {
      const int at = p * 64 + lane * 2;
      if (at >= HEAD_DIM) continue;
      mine[at] = low_bf16(x[p]) * factor * (normed ? weight[at] : 1.0f);
      mine[at + 1] = high_bf16(x[p]) * factor * (normed ? weight[at + 1] : 1.0f);
    }
    __syncwarp();
#pragma unroll
    for (int p = 0; p < PAIRS; p++) {
      const int at = p * 64 + lane * 2;
      if (at >= HEAD_DIM) continue;
      float y[2];
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const int i = at + e;
        y[e] = mine[i];
        if (i < HALF) y[e] = mine[i] * cosines[i] - mine[i + HALF] * sines[i];
        else if (i < 2 * HALF) y[e] = mine[i] * cosines[i - HALF] + mine[i - HALF] * sines[i - HALF];
      }
      *(u32*)(to + at) = pack_bf16(y[0], y[1]);
    }
    __syncwarp();
  }
}

// Grid: heads, tiles. Dynamic shared memory: (BQ + 4 * BK) * PAD * 2. A warp has sixteen queries.
extern "C" __global__ void __launch_bounds__(256, 1)
    prefill_attention(const u16* queries, const u16* keys, const u16* values, const u16* gate, const Tile* tiles,
                      const int* tables, const int* table_length, float scale, u16* out) {
  extern __shared__ __align__(128) unsigned char memory[];
  const Tile tile = tiles[blockIdx.y];
  const int head = blockIdx.x, kv_head = head / (HEADS / KV_HEADS);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = lane / 4, column = lane % 4 * 2;
  const u32 q_tile = shared_address(memory), kv_tiles = q_tile + BQ * PAD * 2;
  const int* table = tables + tile.x * *table_length;
  const int context = tile.w + tile.z;  // keys that the last query sees

  for (int i = threadIdx.x; i < BQ * CHUNKS; i += 256) {
    const int r = i / CHUNKS, c = i % CHUNKS;
    const bool valid = r < tile.z && c * 8 < HEAD_DIM;
    copy_async<16>(q_tile + tile_offset<CHUNKS>(r, c), valid ? queries + ((u64)(tile.y + r) * HEADS + head) * HEAD_DIM + c * 8 : queries, valid);
  }
  auto fetch = [&](int n) {
    const u32 stage = kv_tiles + n % 2 * (2 * BK * PAD * 2);
#pragma unroll 4
    for (int i = threadIdx.x; i < BK * CHUNKS; i += 256) {
      const int r = i / CHUNKS, c = i % CHUNKS, position = n * BK + r;
      const bool valid = position < context && c * 8 < HEAD_DIM;
      const u64 at = valid ? (place_of(table, position) * KV_HEADS + kv_head) * HEAD_DIM + c * 8 : 0;
      copy_async<16>(stage + tile_offset<CHUNKS>(r, c), keys + at, valid);
      copy_async<16>(stage + BK * PAD * 2 + tile_offset<CHUNKS>(r, c), values + at, valid);
    }
  };

  float sum[PAD / 8][4] = {};
  float most[2] = {-1e30f, -1e30f}, total[2] = {0, 0};
  const float factor = scale * 1.4426950408889634f;
  const int count = (context + BK - 1) / BK;
  const int last = tile.w + warp * 16 + 15;  // the last position of this warp's queries
  fetch(0);
  commit_copies();
  for (int n = 0; n < count; n++) {
    if (n + 1 < count) fetch(n + 1);
    commit_copies();
    wait_copies<1>();
    __syncthreads();
    if (n * BK <= last && warp * 16 < tile.z) {
      const u32 k_tile = kv_tiles + n % 2 * (2 * BK * PAD * 2), v_tile = k_tile + BK * PAD * 2;
      float score[BK / 8][4] = {};
#pragma unroll
      for (int c = 0; c < HEAD_DIM / 16; c++) {
        u32 left[4];
        load_matrices(left, left_address<CHUNKS>(q_tile, warp * 16, c * 2, lane));
#pragma unroll
        for (int j = 0; j < BK / 16; j++) {
          u32 right[4];
          load_matrices(right, right_address<CHUNKS>(k_tile, j * 16, c * 2, lane));
          multiply_add(score[2 * j], left, right[0], right[1]);
          multiply_add(score[2 * j + 1], left, right[2], right[3]);
        }
      }
      if (n * BK + BK - 1 > tile.w + warp * 16) {
#pragma unroll
        for (int j = 0; j < BK / 8; j++)
#pragma unroll
          for (int e = 0; e < 4; e++)
            if (n * BK + j * 8 + column + e % 2 > tile.w + warp * 16 + row + e / 2 * 8) score[j][e] = -1e30f;
      }
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float highest = most[h];
#pragma unroll
        for (int j = 0; j < BK / 8; j++) highest = fmaxf(highest, fmaxf(score[j][2 * h], score[j][2 * h + 1]));
        highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 1));
        highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 2));
        const float shrink = exp2f((most[h] - highest) * factor);
        most[h] = highest;
        total[h] *= shrink;
#pragma unroll
        for (int j = 0; j < BK / 8; j++)
#pragma unroll
          for (int e = 0; e < 2; e++) {
            float& s = score[j][2 * h + e];
            s = exp2f((s - highest) * factor);
            total[h] += s;
          }
#pragma unroll
        for (int j = 0; j < PAD / 8; j++) sum[j][2 * h] *= shrink, sum[j][2 * h + 1] *= shrink;
      }
#pragma unroll
      for (int s = 0; s < BK / 16; s++) {
        const u32 left[4] = {pack_bf16(score[2 * s][0], score[2 * s][1]), pack_bf16(score[2 * s][2], score[2 * s][3]),
                             pack_bf16(score[2 * s + 1][0], score[2 * s + 1][1]), pack_bf16(score[2 * s + 1][2], score[2 * s + 1][3])};
#pragma unroll
        for (int j = 0; j < HEAD_DIM / 16; j++) {
          u32 right[4];
          load_matrices_transposed(right, right_address_transposed<CHUNKS>(v_tile, s * 16, j * 2, lane));
          multiply_add(sum[2 * j], left, right[0], right[1]);
          multiply_add(sum[2 * j + 1], left, right[2], right[3]);
        }
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float all = total[h];
    all += __shfl_xor_sync(0xffffffffu, all, 1);
    all += __shfl_xor_sync(0xffffffffu, all, 2);
    const int r = warp * 16 + row + h * 8;
    if (r >= tile.z) continue;
    const float inverse = 1.0f / all;
    const u64 token = tile.y + r;
#pragma unroll
    for (int j = 0; j < HEAD_DIM / 8; j++) {
      float low = sum[j][2 * h] * inverse, high = sum[j][2 * h + 1] * inverse;
      const int at = j * 8 + column;
      if (GATED) {
        const u32 g = __ldg((const u32*)(gate + token * GATE_ROW + GATE_OFFSET + head * GATE_STRIDE + at));
        low *= sigmoid(low_bf16(g)), high *= sigmoid(high_bf16(g));
      }
      *(u32*)(out + (token * HEADS + head) * HEAD_DIM + at) = pack_bf16(low, high);
    }
  }
}
