#include "columns.cuh"

// The gated delta net: convolution, gates, recurrence, gated norm. One block for each value head (x) and sequence (y),
// which takes the sequence's new tokens one after another; the memory stays in registers between them.
// conv: [slots, KERNEL - 1, 2 * KEYS + VALUE_HEADS * VALUE_DIM]; memory: [slots, VALUE_HEADS, VALUE_DIM, KEY_DIM].
// The value heads of a key head read the same channels of conv: they are a cluster, which writes when all have read.

constexpr int THREADS = WARPS * 32, RATIO = VALUE_HEADS / KEY_HEADS, KEYS = KEY_HEADS * KEY_DIM;
constexpr int CHANNELS = 2 * KEY_DIM + VALUE_DIM, ALL = 2 * KEYS + VALUE_HEADS * VALUE_DIM;
constexpr int CHUNKS = (KEY_DIM + 127) / 128, EACH = 4 * CHUNKS, ROWS = (VALUE_DIM + WARPS - 1) / WARPS;

// Where the i-th channel of a head lies among all.
DEVICE int channel_of(int i, int head) {
  return i < 2 * KEY_DIM ? i / KEY_DIM * KEYS + head / RATIO * KEY_DIM + i % KEY_DIM
                         : 2 * KEYS + head * VALUE_DIM + i - 2 * KEY_DIM;
}

DEVICE float softplus(float x) { return fmaxf(x, 0.0f) + log1pf(power(-fabsf(x))); }

extern "C" __global__ void __cluster_dims__(RATIO, 1, 1) __launch_bounds__(THREADS)
delta(Columns q, Columns k, Columns v, Columns z, Columns b, Columns a, const float* taps, const float* rates,
      const float* dt_bias, const float* norm_weight, float norm_eps, T* conv, float* memory, T* out, Step step) {
  __shared__ float mixed[CHANNELS], reads[VALUE_DIM];
  __shared__ T history[KERNEL - 1][CHANNELS];
  let_next_start();
  const int head = blockIdx.x, sequence = blockIdx.y, key_head = head / RATIO, place = head % RATIO;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const long long slot = step.slots[sequence];
  const bool fresh = step.contexts[sequence] == 0;
  conv += slot * (KERNEL - 1) * ALL;
  memory += (slot * VALUE_HEADS + head) * VALUE_DIM * KEY_DIM;

  // No kernel of this step but this one touches the state, so it need not wait.
  float cells[ROWS][EACH];
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const int row = r * WARPS + warp;
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
      const int at = c * 128 + lane * 4;
      float4 loaded = make_float4(0, 0, 0, 0);
      if (!fresh && row < VALUE_DIM && at < KEY_DIM) loaded = *(const float4*)(memory + row * KEY_DIM + at);
      cells[r][4 * c] = loaded.x, cells[r][4 * c + 1] = loaded.y;
      cells[r][4 * c + 2] = loaded.z, cells[r][4 * c + 3] = loaded.w;
    }
  }
  for (int i = threadIdx.x; i < (KERNEL - 1) * CHANNELS; i += THREADS)
    history[i / CHANNELS][i % CHANNELS] = fresh ? from_float<T>(0) : conv[i / CHANNELS * ALL + channel_of(i % CHANNELS, head)];
  asm volatile("barrier.cluster.arrive.aligned;" ::: "memory");
  const float rate = rates[head], bias = dt_bias[head];
  wait_for_inputs();
  __syncthreads();

  for (int token = step.starts[sequence]; token < step.starts[sequence + 1]; token++) {
    for (int i = threadIdx.x; i < CHANNELS; i += THREADS) {
      const int part = i < KEY_DIM ? 0 : i < 2 * KEY_DIM ? 1 : 2, at = i - part * KEY_DIM;
      const int channel = channel_of(i, head);
      const float newest = part == 0   ? column(q, token, key_head, at)
                           : part == 1 ? column(k, token, key_head, at)
                                       : column(v, token, key_head, place * VALUE_DIM + at);
      float sum = newest * taps[channel * KERNEL + KERNEL - 1];
#pragma unroll
      for (int tap = 0; tap < KERNEL - 1; tap++) {
        sum += to_float(history[tap][i]) * taps[channel * KERNEL + tap];
        history[tap][i] = tap + 1 < KERNEL - 1 ? history[tap + 1][i] : from_float<T>(newest);
      }
      mixed[i] = silu(sum);
    }
    const float decay = power(rate * softplus(column(a, token, key_head, place) + bias));
    const float beta = sigmoid(column(b, token, key_head, place));
    __syncthreads();

    float query[EACH], key[EACH], q_square = 0, k_square = 0;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const int at = i / 4 * 128 + lane * 4 + i % 4;
      query[i] = at < KEY_DIM ? mixed[at] : 0;
      key[i] = at < KEY_DIM ? mixed[KEY_DIM + at] : 0;
      q_square += query[i] * query[i];
      k_square += key[i] * key[i];
    }
    const float q_factor = rsqrtf(warp_sum(q_square) + QK_EPS) * rsqrtf(KEY_DIM);
    const float k_factor = rsqrtf(warp_sum(k_square) + QK_EPS);
#pragma unroll
    for (int i = 0; i < EACH; i++) query[i] *= q_factor, key[i] *= k_factor;

    float recalled[ROWS], read[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      recalled[r] = 0;
#pragma unroll
      for (int i = 0; i < EACH; i++) recalled[r] += (cells[r][i] *= decay) * key[i];
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const int row = r * WARPS + warp;
      const float delta = beta * (mixed[2 * KEY_DIM + min(row, VALUE_DIM - 1)] - warp_sum(recalled[r]));
      read[r] = 0;
#pragma unroll
      for (int i = 0; i < EACH; i++) {
        cells[r][i] += delta * key[i];
        read[r] += cells[r][i] * query[i];
      }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const float sum = warp_sum(read[r]);
      if (lane == 0 && r * WARPS + warp < VALUE_DIM) reads[r * WARPS + warp] = sum;
    }
    __syncthreads();

    float square = 0;
    for (int i = lane; i < VALUE_DIM; i += 32) square += reads[i] * reads[i];
    const float factor = rsqrtf(warp_sum(square) / VALUE_DIM + norm_eps);
    for (int i = threadIdx.x; i < VALUE_DIM; i += THREADS) {
      const float gate = column(z, token, key_head, place * VALUE_DIM + i);
      out[((long long)token * VALUE_HEADS + head) * VALUE_DIM + i] =
          from_float<T>(reads[i] * factor * norm_weight[i] * silu(gate));
    }
  }

#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const int row = r * WARPS + warp;
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
      const int at = c * 128 + lane * 4;
      if (row < VALUE_DIM && at < KEY_DIM)
        *(float4*)(memory + row * KEY_DIM + at) =
            make_float4(cells[r][4 * c], cells[r][4 * c + 1], cells[r][4 * c + 2], cells[r][4 * c + 3]);
    }
  }
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
  for (int i = threadIdx.x; i < (KERNEL - 1) * CHANNELS; i += THREADS)
    if (place == 0 || i % CHANNELS >= 2 * KEY_DIM)
      conv[i / CHANNELS * ALL + channel_of(i % CHANNELS, head)] = history[i / CHANNELS][i % CHANNELS];
}
