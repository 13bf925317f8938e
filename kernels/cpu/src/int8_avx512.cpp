#if defined(__x86_64__)
#include "int8_avx512.h"

#include "int8_impl.h"

const mixbit::Int8Kernels mixbit::avx512_int8 = {matmul, quantize};
#endif
