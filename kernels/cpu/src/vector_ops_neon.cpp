#if defined(__aarch64__)
#include "vector_kernels.h"

const mixbit::VectorOps mixbit::neon_vector_ops = mixbit::table;
#endif
