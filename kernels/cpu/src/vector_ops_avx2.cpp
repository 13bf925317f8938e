#if defined(__x86_64__)
#include "vector_kernels.h"

const mixbit::VectorOps mixbit::avx2_vector_ops = mixbit::table;
#endif
