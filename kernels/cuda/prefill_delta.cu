// Gated delta net over many tokens, in chunks of 64 (arXiv:2412.06464, section 3.3). With decays g in a chunk, G_t the
// sum of log g up to t, and S the memory before it, the updates u_t of the memory obey
//   u_t = beta_t (v_t - e^G_t S k_t - sum_{i<t} e^(G_t - G_i) (k_t . k_i) u_i),
// a unit lower triangular system (I + L) u = rhs. L does not depend on S: all chunks are solved at once for
// u = U - W S^T, and only short products remain in sequence, in the last but one kernel.
//
// Defined by the including text: KEY_HEADS, VALUE_HEADS, KEY_DIM, VALUE_DIM (multiples of 16), KERNEL, CONV_TYPE (of the
// convolution's state: float or u16), and for each of Q, K, V, Z, B, A its _ROW, _OFFSET, _STRIDE in values.

#include "prefill_common.cuh"

constexpr int C = 64;  // tokens of a chunk
constexpr int RATIO = VALUE_HEADS / KEY_HEADS, KEYS = KEY_HEADS * KEY_DIM;
constexpr int CHANNELS = 2 * KEYS + VALUE_HEADS * VALUE_DIM;
constexpr int KEY_PAD = KEY_DIM <= 64 ? 64 : 128, VALUE_PAD = VALUE_DIM <= 64 ? 64 : 128;
static_assert(KEY_DIM % 16 == 0 && VALUE_DIM % 16 == 0 && KEY_DIM <= 128 && VALUE_DIM <= 128, "sizes of the heads");
constexpr int KEY_CHUNKS = KEY_PAD / 8, VALUE_CHUNKS = VALUE_PAD / 8, TIME_CHUNKS = C / 8;
constexpr int PAIRS = ((KEY_DIM > VALUE_DIM ? KEY_DIM : VALUE_DIM) + 63) / 64;  // of channels, a lane's share of a head

DEVICE float load_state(const float* p) { return *p; }
DEVICE float load_state(const u16* p) { return from_bf16(*p); }
DEVICE void store_state(float* p, u16 x) { *p = from_bf16(x); }
DEVICE void store_state(u16* p, u16 x) { *p = x; }

// The chunks of a batch, one after another: sequence, first row, rows, index within the sequence.
typedef int4 Chunk;

// Convolution and SiLU; q and k over their norms. Grid: chunks, heads of q, k and v. mixed: [tokens, CHANNELS].
extern "C" __global__ void __launch_bounds__(128)
    prefill_delta_mix(const u16* q, const u16* k, const u16* v, const float* taps, const CONV_TYPE* state, const Chunk* chunks,
                      const int* contexts, const int* slots, u16* mixed) {
  const Chunk chunk = chunks[blockIdx.x];
  const int lane = threadIdx.x % 32, start = threadIdx.x / 32 * 16;  // this warp's first token in the chunk
  const int rows = min(16, chunk.z - start);
  if (rows <= 0) return;
  const int head = blockIdx.y < 2 * KEY_HEADS ? blockIdx.y % KEY_HEADS : blockIdx.y - 2 * KEY_HEADS;
  const int part = blockIdx.y < KEY_HEADS ? 0 : blockIdx.y < 2 * KEY_HEADS ? 1 : 2;
  const int dim = part == 2 ? VALUE_DIM : KEY_DIM;
  const int channel = part == 2 ? 2 * KEYS + head * VALUE_DIM : part * KEYS + head * KEY_DIM;
  const u16* from = part == 0   ? q + Q_OFFSET + head * Q_STRIDE
                    : part == 1 ? k + K_OFFSET + head * K_STRIDE
                                : v + V_OFFSET + head / RATIO * V_STRIDE + head % RATIO * VALUE_DIM;
  const u64 row_length = part == 0 ? Q_ROW : part == 1 ? K_ROW : V_ROW;
  const int first = chunk.y + start, before = chunk.w * C + start;  // tokens of the step before this warp's
  from += first * row_length;

  u32 window[KERNEL - 1 + 16][PAIRS];
#pragma unroll
  for (int t = 0; t < KERNEL - 1 + 16; t++)
#pragma unroll
    for (int p = 0; p < PAIRS; p++) {
      const int at = p * 64 + lane * 2, offset = t - (KERNEL - 1);
      u32 pair = 0;
      if (at < dim && offset < rows) {
        if (before + offset >= 0) {
          pair = __ldg((const u32*)(from + offset * (long long)row_length + at));
        } else if (contexts[chunk.x] > 0) {
          const CONV_TYPE* old = state + ((u64)slots[chunk.x] * (KERNEL - 1) + KERNEL - 1 + before + offset) * CHANNELS + channel + at;
          pair = pack_bf16(load_state(old), load_state(old + 1));
        }
      }
      window[t][p] = pair;
    }
  float weight[PAIRS][KERNEL][2];
#pragma unroll
  for (int p = 0; p < PAIRS; p++)
#pragma unroll
    for (int tap = 0; tap < KERNEL; tap++)
#pragma unroll
      for (int i = 0; i < 2; i++)
        weight[p][tap][i] = p * 64 + lane * 2 < dim ? __ldg(taps + (channel + p * 64 + lane * 2 + i) * KERNEL + tap) : 0.0f;
#pragma unroll
  for (int t = 0; t < 16; t++) {
    if (t >= rows) break;
    float y[PAIRS][2], squares = 0;
#pragma unroll
    for (int p = 0; p < PAIRS; p++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        float sum = 0;
#pragma unroll
        for (int tap = 0; tap < KERNEL; tap++)
          sum = fmaf(i ? high_bf16(window[t + tap][p]) : low_bf16(window[t + tap][p]), weight[p][tap][i], sum);
        y[p][i] = silu(sum);
        squares = fmaf(y[p][i], y[p][i], squares);
      }
    float factor = 1;
    if (part < 2) factor = rsqrtf(warp_sum(squares) + 1e-6f) * (part == 0 ? rsqrtf((float)KEY_DIM) : 1.0f);
#pragma unroll
    for (int p = 0; p < PAIRS; p++)
      if (p * 64 + lane * 2 < dim)
        *(u32*)(mixed + (u64)(first + t) * CHANNELS + channel + p * 64 + lane * 2) = pack_bf16(y[p][0] * factor, y[p][1] * factor);
  }
}

// The last KERNEL - 1 inputs of each sequence, after the mix has read the old ones. Grid: channels by 256, sequences.
extern "C" __global__ void __launch_bounds__(256)
    prefill_delta_tail(const u16* q, const u16* k, const u16* v, CONV_TYPE* state, const int* starts, const int* contexts,
                       const int* slots) {
  const int channel = blockIdx.x * 256 + threadIdx.x, sequence = blockIdx.y;
  if (channel >= CHANNELS) return;
  const int part = min(channel / KEYS, 2), place = channel - part * KEYS;
  const int dim = part == 2 ? VALUE_DIM : KEY_DIM, head = place / dim, at = place % dim;
  const u16* from = part == 0   ? q + Q_OFFSET + head * Q_STRIDE
                    : part == 1 ? k + K_OFFSET + head * K_STRIDE
                                : v + V_OFFSET + head / RATIO * V_STRIDE + head % RATIO * VALUE_DIM;
  const u64 row_length = part == 0 ? Q_ROW : part == 1 ? K_ROW : V_ROW;
  const int end = starts[sequence + 1], rows = end - starts[sequence];
  CONV_TYPE* mine = state + (u64)slots[sequence] * (KERNEL - 1) * CHANNELS + channel;
#pragma unroll
  for (int tap = 0; tap < KERNEL - 1; tap++) {
    const int offset = tap - (KERNEL - 1);
    if (rows + offset >= 0) store_state(mine + tap * CHANNELS, from[(end + offset) * row_length + at]);
    else if (contexts[sequence] > 0) mine[tap * CHANNELS] = mine[(tap + rows) * CHANNELS];
    else mine[tap * CHANNELS] = 0;
  }
}

// Rows [row, row + C) of a [tokens, CHANNELS] array at `channel`, DIM wide, as a tile; zeros outside. By THREADS threads.
template <int DIM, int ROW_CHUNKS, int THREADS>
DEVICE void fetch_tile(u32 tile, const u16* mixed, int row, int rows, int channel, int thread) {
#pragma unroll 4
  for (int i = thread; i < C * ROW_CHUNKS; i += THREADS) {
    const int t = i / ROW_CHUNKS, c = i % ROW_CHUNKS;
    const bool valid = t < rows && c * 8 < DIM;
    copy_async<16>(tile + tile_offset<ROW_CHUNKS>(t, c), valid ? mixed + (u64)(row + t) * CHANNELS + channel + c * 8 : mixed, valid);
  }
}

// --- all chunks at once ---

// Bytes of what a chunk and value head hand on: U^T [VALUE_DIM, C], -W [C, KEY_PAD] and the masked q k^T [C, C], all
// bfloat16, then float32 e^G [C] and e^(G_end - G) [C].
constexpr int UPDATE_BYTES = VALUE_DIM * C * 2, READ_BYTES = C * KEY_PAD * 2, WITHIN_BYTES = C * C * 2;
constexpr int PIECE_BYTES = UPDATE_BYTES + READ_BYTES + WITHIN_BYTES + 2 * C * 4;

constexpr int PITCH = 68;  // floats of a row of the triangular matrix

// to = sign * left right, all SIZE x SIZE, for COUNT such triples of addresses; by 128 threads.
template <int SIZE, int COUNT, class Left, class Right, class To>
DEVICE void small_products(Left left, Right right, To to, float sign) {
  constexpr int QUADS = COUNT * SIZE * SIZE / 4;
  for (int quad = threadIdx.x; quad < QUADS; quad += 128) {
    const int which = quad / (SIZE * SIZE / 4), i = quad / (SIZE / 4) % SIZE, j = quad % (SIZE / 4) * 4;
    const float *a = left(which) + i * PITCH, *b = right(which) + j;
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
    for (int k = 0; k < SIZE; k++) {
      const float x = a[k];
      const float4 y = *(const float4*)(b + k * PITCH);
      sum.x = fmaf(x, y.x, sum.x), sum.y = fmaf(x, y.y, sum.y), sum.z = fmaf(x, y.z, sum.z), sum.w = fmaf(x, y.w, sum.w);
    }
    *(float4*)(to(which) + i * PITCH + j) = make_float4(sign * sum.x, sign * sum.y, sign * sum.z, sign * sum.w);
  }
  __syncthreads();
}

// (I + L)^-1 in place of the strictly lower triangular L [C, C]; spare: [C / 2, PITCH]. Blocks of 16 by substitution,
// then doubled: the inverse of [[A, 0], [B, D]] has -D^-1 B A^-1 in place of B.
DEVICE void invert_unit_lower(float* matrix, float* spare) {
  if (threadIdx.x < C) {
    const int block = threadIdx.x / 16 * 16, column = threadIdx.x % 16;
    float* at = matrix + block * PITCH + block;
    float x[16];
#pragma unroll
    for (int i = 0; i < 16; i++) {
      float sum = i == column ? 1.0f : 0.0f;
#pragma unroll
      for (int j = 0; j < i; j++) sum = fmaf(-at[i * PITCH + j], x[j], sum);
      x[i] = sum;
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 16; i++) at[i * PITCH + column] = x[i];
  }
  __syncthreads();
  auto lower = [&](int which) { return matrix + (which * 32 + 16) * PITCH + which * 32; };
  small_products<16, 2>(lower, [&](int which) { return matrix + which * 32 * PITCH + which * 32; },
                        [&](int which) { return spare + which * 16 * PITCH; }, 1);
  small_products<16, 2>([&](int which) { return matrix + (which * 32 + 16) * PITCH + which * 32 + 16; },
                        [&](int which) { return spare + which * 16 * PITCH; }, lower, -1);
  auto corner = [&](int) { return matrix + 32 * PITCH; };
  small_products<32, 1>(corner, [&](int) { return matrix; }, [&](int) { return spare; }, 1);
  small_products<32, 1>([&](int) { return matrix + 32 * PITCH + 32; }, [&](int) { return spare; }, corner, -1);
}

// Grid: value heads, chunks. Dynamic shared memory: tiles of k, of q (or two of [C, C], if that is more) and of v, the
// triangular matrix and half as much to spare.
extern "C" __global__ void __launch_bounds__(128)
    prefill_delta_solve(const u16* mixed, const u16* b, const u16* a, const float* rate, const float* dt_bias, const Chunk* chunks,
                        unsigned char* pieces) {
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ float total[C], beta[C];
  const Chunk chunk = chunks[blockIdx.y];
  const int head = blockIdx.x, key_head = head / RATIO;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, row = lane / 4, column = lane % 4 * 2;
  constexpr int QUERY_BYTES = KEY_PAD > 2 * C ? C * KEY_PAD * 2 : 2 * C * C * 2;
  const u32 keys = shared_address(memory), queries = keys + C * KEY_PAD * 2, values = queries + QUERY_BYTES;
  float* matrix = (float*)(memory + C * KEY_PAD * 2 + QUERY_BYTES + C * VALUE_PAD * 2);
  float* spare = matrix + C * PITCH;
  // The inverse, scaled for V and for K, takes the place of the queries.
  unsigned char* scaled = memory + C * KEY_PAD * 2;
  const u32 for_values = queries, for_keys = queries + C * C * 2;
  unsigned char* piece = pieces + ((u64)blockIdx.y * VALUE_HEADS + head) * PIECE_BYTES;

  fetch_tile<KEY_DIM, KEY_CHUNKS, 128>(keys, mixed, chunk.y, chunk.z, KEYS + key_head * KEY_DIM, thread);
  fetch_tile<KEY_DIM, KEY_CHUNKS, 128>(queries, mixed, chunk.y, chunk.z, key_head * KEY_DIM, thread);
  fetch_tile<VALUE_DIM, VALUE_CHUNKS, 128>(values, mixed, chunk.y, chunk.z, 2 * KEYS + head * VALUE_DIM, thread);
  commit_copies();
  if (warp == 0) {
    // Each lane has tokens 2 * lane and 2 * lane + 1. Rows past the end: no decay, beta 0.
    float log_decay[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int t = lane * 2 + i;
      float strength = 0;
      if (t < chunk.z) {
        const u64 token = chunk.y + t;
        const float x = from_bf16(a[token * A_ROW + A_OFFSET + key_head * A_STRIDE + head % RATIO]) + dt_bias[head];
        log_decay[i] = rate[head] * (fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))));
        strength = sigmoid(from_bf16(b[token * B_ROW + B_OFFSET + key_head * B_STRIDE + head % RATIO]));
      }
      beta[t] = strength;
    }
    float sum = log_decay[0] + log_decay[1];
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const float other = __shfl_up_sync(0xffffffffu, sum, step);
      if (lane >= step) sum += other;
    }
    total[lane * 2] = sum - log_decay[1], total[lane * 2 + 1] = sum;
  }
  wait_copies<0>();
  __syncthreads();

  if (thread < C) {
    float* factors = (float*)(piece + UPDATE_BYTES + READ_BYTES + WITHIN_BYTES);
    factors[thread] = __expf(total[thread]), factors[C + thread] = __expf(total[C - 1] - total[thread]);
  }
  float kk[C / 8][4] = {}, qk[C / 8][4] = {};
#pragma unroll
  for (int c = 0; c < KEY_CHUNKS; c += 2) {
    u32 key[4], query[4];
    load_matrices(key, left_address<KEY_CHUNKS>(keys, warp * 16, c, lane));
    load_matrices(query, left_address<KEY_CHUNKS>(queries, warp * 16, c, lane));
#pragma unroll
    for (int j = 0; j < C / 16; j++) {
      u32 right[4];
      load_matrices(right, right_address<KEY_CHUNKS>(keys, j * 16, c, lane));
#pragma unroll
      for (int n = 0; n < 2; n++) {
        multiply_add(kk[2 * j + n], key, right[2 * n], right[2 * n + 1]);
        multiply_add(qk[2 * j + n], query, right[2 * n], right[2 * n + 1]);
      }
    }
  }
  u16* within = (u16*)(piece + UPDATE_BYTES + READ_BYTES);
#pragma unroll
  for (int j = 0; j < C / 8; j++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int t = warp * 16 + h * 8 + row, s = j * 8 + column;
      float seen[2];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const float kept = t >= s + i ? __expf(total[t] - total[s + i]) : 0.0f;
        seen[i] = kept * qk[j][h * 2 + i];
        matrix[t * PITCH + s + i] = t > s + i ? beta[t] * kept * kk[j][h * 2 + i] : 0.0f;
      }
      *(u32*)(within + t * C + s) = pack_bf16(seen[0], seen[1]);
    }
  __syncthreads();
  invert_unit_lower(matrix, spare);

  // The inverse times beta, and times -beta e^G.
  for (int i = thread; i < C * TIME_CHUNKS; i += 128) {
    const int t = i / TIME_CHUNKS, c = i % TIME_CHUNKS;
    u32 plain[4], decayed[4];
#pragma unroll
    for (int p = 0; p < 4; p++) {
      float x[2], y[2];
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const int s = c * 8 + p * 2 + e;
        x[e] = matrix[t * PITCH + s] * beta[s], y[e] = -x[e] * __expf(total[s]);
      }
      plain[p] = pack_bf16(x[0], x[1]), decayed[p] = pack_bf16(y[0], y[1]);
    }
    const u32 at = tile_offset<TIME_CHUNKS>(t, c);
    *(uint4*)(scaled + at) = make_uint4(plain[0], plain[1], plain[2], plain[3]);
    *(uint4*)(scaled + C * C * 2 + at) = make_uint4(decayed[0], decayed[1], decayed[2], decayed[3]);
  }
  __syncthreads();

  // U^T = V^T (inverse beta)^T, sixteen value columns at a time.
  for (int m = warp; m < VALUE_DIM / 16; m += 4) {
    float sum[C / 8][4] = {};
#pragma unroll
    for (int s = 0; s < C / 16; s++) {
      u32 left[4];
      load_matrices_transposed(left, left_address_transposed<VALUE_CHUNKS>(values, s * 16, m * 2, lane));
#pragma unroll
      for (int j = 0; j < C / 16; j++) {
        u32 right[4];
        load_matrices(right, right_address<TIME_CHUNKS>(for_values, j * 16, s * 2, lane));
        multiply_add(sum[2 * j], left, right[0], right[1]);
        multiply_add(sum[2 * j + 1], left, right[2], right[3]);
      }
    }
    u16* update = (u16*)piece + (m * 16 + row) * C + column;
#pragma unroll
    for (int j = 0; j < C / 8; j++) {
      *(u32*)(update + j * 8) = pack_bf16(sum[j][0], sum[j][1]);
      *(u32*)(update + 8 * C + j * 8) = pack_bf16(sum[j][2], sum[j][3]);
    }
  }
  // -W = -(inverse beta e^G) K, sixteen tokens a warp.
  float sum[KEY_PAD / 8][4] = {};
#pragma unroll
  for (int s = 0; s < C / 16; s++) {
    u32 left[4];
    load_matrices(left, left_address<TIME_CHUNKS>(for_keys, warp * 16, s * 2, lane));
#pragma unroll
    for (int j = 0; j < KEY_PAD / 16; j++) {
      u32 right[4];
      load_matrices_transposed(right, right_address_transposed<KEY_CHUNKS>(keys, s * 16, j * 2, lane));
      multiply_add(sum[2 * j], left, right[0], right[1]);
      multiply_add(sum[2 * j + 1], left, right[2], right[3]);
    }
  }
  u16* read = (u16*)(piece + UPDATE_BYTES) + (warp * 16 + row) * KEY_PAD + column;
#pragma unroll
  for (int j = 0; j < KEY_PAD / 8; j++) {
    *(u32*)(read + j * 8) = pack_bf16(sum[j][0], sum[j][1]);
    *(u32*)(read + 8 * KEY_PAD + j * 8) = pack_bf16(sum[j][2], sum[j][3]);
  }
}

// --- chunk after chunk ---

constexpr int WARPS = VALUE_DIM % 32 == 0 ? 2 : 1;  // each holds sixteen rows of the memory in its registers
constexpr int FETCHERS = 64;                        // threads beside them that fetch the next chunk
constexpr int STAGE_BYTES = 3 * C * KEY_PAD * 2 + C * C * 2 + 2 * C * 4;

// Grid: VALUE_DIM / (16 * WARPS), value heads, sequences. memories: float32 [slots, VALUE_HEADS, VALUE_DIM, KEY_DIM].
// out: [tokens, VALUE_HEADS * VALUE_DIM]. first_chunks: [sequences]. Dynamic shared memory: 2 * STAGE_BYTES.
extern "C" __global__ void __launch_bounds__(32 * WARPS + FETCHERS, 1)
    prefill_delta_advance(const u16* mixed, const unsigned char* pieces, float* memories, const int* starts, const int* contexts,
                          const int* slots, const int* first_chunks, u16* out) {
  extern __shared__ __align__(128) unsigned char memory[];
  const int head = blockIdx.y, key_head = head / RATIO, sequence = blockIdx.z;
  const int start = starts[sequence], rows = starts[sequence + 1] - start;
  const int first = first_chunks[sequence], count = (rows + C - 1) / C;
  auto piece_of = [&](int n) { return pieces + ((u64)(first + n) * VALUE_HEADS + head) * PIECE_BYTES; };

  if (threadIdx.x >= 32 * WARPS) {
    const u32 tiles = shared_address(memory);
    const int thread = threadIdx.x - 32 * WARPS;
    for (int n = 0; n <= count; n++) {
      // The chunk before, in the other stage, is complete once all have come to the barrier; so is the work on this stage.
      wait_copies<0>();
      if (n > 0) __syncthreads();
      if (n == count) return;
      const u32 stage = tiles + n % 2 * STAGE_BYTES;
      const unsigned char* piece = piece_of(n);
      const int left = min(C, rows - n * C), row = start + n * C;
      fetch_tile<KEY_DIM, KEY_CHUNKS, FETCHERS>(stage, mixed, row, left, key_head * KEY_DIM, thread);
      fetch_tile<KEY_DIM, KEY_CHUNKS, FETCHERS>(stage + C * KEY_PAD * 2, mixed, row, left, KEYS + key_head * KEY_DIM, thread);
      const u32 reads = stage + 2 * C * KEY_PAD * 2, within = reads + C * KEY_PAD * 2, factors = within + C * C * 2;
#pragma unroll 4
      for (int i = thread; i < C * KEY_CHUNKS; i += FETCHERS)
        copy_async<16>(reads + tile_offset<KEY_CHUNKS>(i / KEY_CHUNKS, i % KEY_CHUNKS), piece + UPDATE_BYTES + i * 16, true);
#pragma unroll 4
      for (int i = thread; i < C * TIME_CHUNKS; i += FETCHERS)
        copy_async<16>(within + tile_offset<TIME_CHUNKS>(i / TIME_CHUNKS, i % TIME_CHUNKS), piece + UPDATE_BYTES + READ_BYTES + i * 16, true);
      for (int i = thread; i < 2 * C * 4 / 16; i += FETCHERS)
        copy_async<16>(factors + i * 16, piece + UPDATE_BYTES + READ_BYTES + WITHIN_BYTES + i * 16, true);
      commit_copies();
    }
    return;
  }

  const int lane = threadIdx.x % 32, row = lane / 4, column = lane % 4 * 2;
  const int value = (blockIdx.x * WARPS + threadIdx.x / 32) * 16 + row;  // this lane's rows: value, value + 8
  const u32 tiles = shared_address(memory);
  float* const slot = memories + (((u64)slots[sequence] * VALUE_HEADS + head) * VALUE_DIM + value) * KEY_DIM + column;

  // The memory's rows in accumulator layout.
  float state[KEY_PAD / 8][4] = {};
  if (contexts[sequence] > 0) {
#pragma unroll
    for (int j = 0; j < KEY_DIM / 8; j++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const float2 two = *(const float2*)(slot + h * 8 * KEY_DIM + j * 8);
        state[j][h * 2] = two.x, state[j][h * 2 + 1] = two.y;
      }
  }

  u32 fresh[C / 8][2];
  auto fetch_fresh = [&](int n) {
    const u16* update = (const u16*)piece_of(n) + value * C + column;
#pragma unroll
    for (int j = 0; j < C / 8; j++) {
      fresh[j][0] = __ldg((const u32*)(update + j * 8));
      fresh[j][1] = __ldg((const u32*)(update + 8 * C + j * 8));
    }
  };

  fetch_fresh(0);
  for (int n = 0; n < count; n++) {
    float update[C / 8][4], read[C / 8][4] = {};
#pragma unroll
    for (int j = 0; j < C / 8; j++)
#pragma unroll
      for (int h = 0; h < 2; h++) update[j][h * 2] = low_bf16(fresh[j][h]), update[j][h * 2 + 1] = high_bf16(fresh[j][h]);
    if (n + 1 < count) fetch_fresh(n + 1);
    __syncthreads();
    const u32 queries = tiles + n % 2 * STAGE_BYTES, keys = queries + C * KEY_PAD * 2, reads = keys + C * KEY_PAD * 2;
    const u32 within = reads + C * KEY_PAD * 2;
    const float* factors = (const float*)(memory + n % 2 * STAGE_BYTES + 3 * C * KEY_PAD * 2 + C * C * 2);

    // update -= S W^T and read = S q^T, with the memory's rows as the left operand.
#pragma unroll
    for (int c = 0; c < KEY_PAD / 16; c++) {
      const u32 left[4] = {pack_bf16(state[2 * c][0], state[2 * c][1]), pack_bf16(state[2 * c][2], state[2 * c][3]),
                           pack_bf16(state[2 * c + 1][0], state[2 * c + 1][1]), pack_bf16(state[2 * c + 1][2], state[2 * c + 1][3])};
#pragma unroll
      for (int j = 0; j < C / 16; j++) {
        u32 right[4];
        load_matrices(right, right_address<KEY_CHUNKS>(reads, j * 16, c * 2, lane));
        multiply_add(update[2 * j], left, right[0], right[1]);
        multiply_add(update[2 * j + 1], left, right[2], right[3]);
        load_matrices(right, right_address<KEY_CHUNKS>(queries, j * 16, c * 2, lane));
        multiply_add(read[2 * j], left, right[0], right[1]);
        multiply_add(read[2 * j + 1], left, right[2], right[3]);
      }
    }
    const float kept = factors[C - 1];
#pragma unroll
    for (int j = 0; j < KEY_PAD / 8; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) state[j][e] *= kept;
#pragma unroll
    for (int j = 0; j < C / 8; j++) {
      const float2 since = *(const float2*)(factors + j * 8 + column);
      read[j][0] *= since.x, read[j][1] *= since.y, read[j][2] *= since.x, read[j][3] *= since.y;
    }
    // read += update (q k^T)^T within the chunk, and S = kept S + (decayed update) K.
#pragma unroll
    for (int s = 0; s < C / 16; s++) {
      u32 plain[4], decayed[4];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        float(&u)[4] = update[2 * s + i];
        const float2 until = *(const float2*)(factors + C + (2 * s + i) * 8 + column);
        plain[2 * i] = pack_bf16(u[0], u[1]), plain[2 * i + 1] = pack_bf16(u[2], u[3]);
        decayed[2 * i] = pack_bf16(u[0] * until.x, u[1] * until.y), decayed[2 * i + 1] = pack_bf16(u[2] * until.x, u[3] * until.y);
      }
#pragma unroll
      for (int j = 0; j < C / 16; j++) {
        u32 right[4];
        load_matrices(right, right_address<TIME_CHUNKS>(within, j * 16, s * 2, lane));
        multiply_add(read[2 * j], plain, right[0], right[1]);
        multiply_add(read[2 * j + 1], plain, right[2], right[3]);
      }
#pragma unroll
      for (int j = 0; j < KEY_PAD / 16; j++) {
        u32 right[4];
        load_matrices_transposed(right, right_address_transposed<KEY_CHUNKS>(keys, s * 16, j * 2, lane));
        multiply_add(state[2 * j], decayed, right[0], right[1]);
        multiply_add(state[2 * j + 1], decayed, right[2], right[3]);
      }
    }
    const int left = min(C, rows - n * C);
    u16* to = out + ((u64)(start + n * C) * VALUE_HEADS + head) * VALUE_DIM + value;
#pragma unroll
    for (int j = 0; j < C / 8; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int t = j * 8 + column + e % 2;
        if (t < left) to[(u64)t * VALUE_HEADS * VALUE_DIM + e / 2 * 8] = to_bf16(read[j][e]);
      }
  }
#pragma unroll
  for (int j = 0; j < KEY_DIM / 8; j++)
#pragma unroll
    for (int h = 0; h < 2; h++) *(float2*)(slot + h * 8 * KEY_DIM + j * 8) = make_float2(state[j][h * 2], state[j][h * 2 + 1]);
}

// out = rms_norm(read) * weight * silu(z), head by head, in place of `read` if out is the same. One warp a head.
extern "C" __global__ void __launch_bounds__(128)
    prefill_delta_norm(const u16* read, const u16* z, const float* weight, u16* out, int tokens, float eps) {
  const u64 index = (u64)blockIdx.x * 4 + threadIdx.x / 32;
  const int lane = threadIdx.x % 32, head = index % VALUE_HEADS;
  const u64 token = index / VALUE_HEADS;
  if (token >= tokens) return;
  const u16* from = read + index * VALUE_DIM;
  const u16* gate = z + token * Z_ROW + Z_OFFSET + head / RATIO * Z_STRIDE + head % RATIO * VALUE_DIM;
  u32 x[PAIRS];
  float squares = 0;
#pragma unroll
  for (int p = 0; p < PAIRS; p++) {
    const int at = p * 64 + lane * 2;
    x[p] = at < VALUE_DIM ? *(const u32*)(from + at) : 0;
    squares += low_bf16(x[p]) * low_bf16(x[p]) + high_bf16(x[p]) * high_bf16(x[p]);
  }
  const float factor = rsqrtf(warp_sum(squares) / VALUE_DIM + eps);
#pragma unroll
  for (int p = 0; p < PAIRS; p++) {
    const int at = p * 64 + lane * 2;
    if (at >= VALUE_DIM) continue;
    const u32 g = __ldg((const u32*)(gate + at));
    *(u32*)(out + index * VALUE_DIM + at) = pack_bf16(low_bf16(x[p]) * factor * weight[at] * silu(low_bf16(g)),
                                                      high_bf16(x[p]) * factor * weight[at + 1] * silu(high_bf16(g)));
  }
}
