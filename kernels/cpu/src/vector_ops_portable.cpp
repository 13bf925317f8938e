#include "vector_kernels.h"

const mixbit::VectorOps mixbit::portable_vector_ops = mixbit::table;
