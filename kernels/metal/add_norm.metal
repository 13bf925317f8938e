#include "platform.metal"

// total = x + delta; out = total / sqrt(mean(total^2) + EPS) * weight. One threadgroup for each row.

// --- kernel ---
const uint row = threadgroup_position_in_grid.x * DIM;
const uint i0 = thread_position_in_threadgroup.x;
const uint lane = thread_index_in_simdgroup;
float square = 0;
for (uint i = i0; i < DIM; i += THREADS) {
  const T sum = T(float(x[row + i]) + float(delta[row + i]));
  total[row + i] = sum;
  square += float(sum) * float(sum);
}
SHARED(float, squares, THREADS / 32);
square = simd_sum(square);
if (lane == 0) squares[simdgroup_index_in_threadgroup] = square;
threadgroup_sync();
square = simd_sum(lane < THREADS / 32 ? squares[lane] : 0.0f);
const float factor = rsqrt(square / DIM + as_type<float>(EPS));
for (uint i = i0; i < DIM; i += THREADS) out[row + i] = T(float(total[row + i]) * factor * float(weight[i]));
