#include "base.cuh"

// Small kernels on rows of activations. Blocks: x counts rows.

DEVICE float block_sum(float x) {
  __shared__ float sums[32];
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();
  return warp_sum(threadIdx.x % 32 < blockDim.x / 32 ? sums[threadIdx.x % 32] : 0.0f);
}

// out = x / sqrt(mean(x^2) + eps) * weight; with delta, of total = x + delta, which is kept. Rows of x are `index`ed
// where that is given.
extern "C" __global__ void rms_norm(const T* x, const T* delta, const float* weight, float eps, T* total, T* out, int dim) {
  let_next_start();
  wait_for_inputs();
  const long long row = (long long)blockIdx.x * dim;
  float square = 0;
  for (int i = threadIdx.x; i < dim; i += blockDim.x) {
    T sum = x[row + i];
    if (delta != nullptr) total[row + i] = sum = from_float<T>(to_float(sum) + to_float(delta[row + i]));
    square += to_float(sum) * to_float(sum);
  }
  const float factor = rsqrtf(block_sum(square) / dim + eps);
  const T* source = delta == nullptr ? x : total;
  for (int i = threadIdx.x; i < dim; i += blockDim.x)
    out[row + i] = from_float<T>(to_float(source[row + i]) * factor * weight[i]);
}

extern "C" __global__ void add(const T* x, const T* delta, T* total, int dim) {
  let_next_start();
  wait_for_inputs();
  const long long row = (long long)blockIdx.x * dim;
  for (int i = threadIdx.x; i < dim; i += blockDim.x)
    total[row + i] = from_float<T>(to_float(x[row + i]) + to_float(delta[row + i]));
}

extern "C" __global__ void select(const T* x, const int* index, T* out, int dim) {
  let_next_start();
  wait_for_inputs();
  const long long from = (long long)index[blockIdx.x] * dim, to = (long long)blockIdx.x * dim;
  for (int i = threadIdx.x; i < dim; i += blockDim.x) out[to + i] = x[from + i];
}

extern "C" __global__ void to_logits(const T* x, float* out, int dim) {
  let_next_start();
  wait_for_inputs();
  const long long row = (long long)blockIdx.x * dim;
  for (int i = threadIdx.x; i < dim; i += blockDim.x) out[row + i] = to_float(x[row + i]);
}
