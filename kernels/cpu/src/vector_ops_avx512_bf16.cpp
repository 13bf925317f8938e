#if defined(__x86_64__)
#include "vector_kernels.h"

const mixbit::VectorOps mixbit::avx512_bf16_vector_ops = mixbit::table;
#endif
