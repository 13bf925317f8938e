#include "int8_portable.h"

#include "int8_impl.h"

const mixbit::Int8Kernels mixbit::portable_int8 = {matmul, quantize};
