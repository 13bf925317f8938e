// The int8 kernels, written once over the vector type `V` that the including int8_*.cpp defines before:
//
//   lanes                     parts of 128 bits in a register, L
//   tokens, tiles             tokens that the micro-kernel takes at a time, and tiles of 4 L rows, 1 or 2
//   sums_wait                 whether its sums of groups leave no registers for those over groups: then these are in memory
//   Bytes, Int, Float         registers: of 16 L codes, of 4 L int32, of 4 L float32
//   codes<bits>(p, n, a, b)   32 columns a lane, the first n lanes' at p (the rest: anything): even columns in a and
//                             odd ones in b where interleaved(bits), else the first and the last 16
//   packed(p, n), split(v, a, b)   codes<4> in two steps, the second bytewise
//   dot<bits>(s, a, b, x, y)  s + a * x + b * y, in each int32 the sum over its four codes
//   offset<bits>              what codes<bits> subtracts, for instruction sets that want signed codes
//   add4<bits>(a, b, c, d)    in each lane: the four sums of the lane's four values, each a dot<bits> of 8 columns
//   add_lanes(a, b)           lanes of a, then of b, neighbours added
//   transpose4(m)             in each lane, 4 x 4; transpose(m): all 4 L x 4 L
//   strided(a)                value 4 q + j becomes value j L + q
//   spread(p), fold(a, out)   value q to all of lane q; ((lane 0 + lane 1) + ...), four values
//   narrow(a, p)              low byte of each value; narrow_pairs(a, p, q): of even values to p, of odd ones to q
//   masks, load_first<type>(p, n, more)   whether a part of a register can be read, and that of f32, f16 or bf16; more: as
//                             many as make it whole lie before p
//   load set zero floats bits convert mul fma from_f16 from_bf16 ...
//
//   narrow_sums               whether sums of several products are kept in fewer bits for a while: then Partial<bits>,
//                             with the interface of Direct below, tells how many steps they hold
//
// Whatever the number of tokens, a product is the same sum in the same order: within a chunk of columns, group g
// goes to partial sum g % L, its rest to another; both are added, then partial sums in order, then chunks. A token
// without a rest where another has one adds zeros. So a token's result does not depend on its company.
#include "int8_few.h"
#include "int8_many.h"
#include "int8_quantize.h"

namespace mixbit {
namespace {

template <int bits, int G>
void matmul_of(const Int8Args& args) {
  switch (args.count) {
    case 1: return few<bits, G, 1>(args);
    case 2: return few<bits, G, 2>(args);
    case 3: return few<bits, G, 3>(args);
    default: return many<bits, G>(args);
  }
}

}  // namespace
}  // namespace mixbit

#include "product_dispatch.h"
