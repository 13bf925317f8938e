#include "base.cuh"

// Where the vectors of each head lie within the rows of a value: mixbit.kernels.ops.Columns.
struct Columns {
  const T* values;
  int row, offset, stride;
};

DEVICE float column(const Columns& c, int row, int head, int i) {
  return to_float(c.values[(long long)row * c.row + c.offset + head * c.stride + i]);
}

// The batch, as kernels/cuda/step.py lays it out.
struct Step {
  const int *tokens, *positions, *sequences;  // [rows]
  const int *starts, *contexts, *slots;       // [sequences + 1], [sequences], [sequences]
  const int *tables;                          // [sequences][*width]
  const int* width;
};
