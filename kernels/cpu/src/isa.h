// The instruction sets this module has kernels for, and which of them the processor can run.
#pragma once

#include <cstdint>
#include <string>

namespace mixbit {

// avx2 includes FMA and F16C; avx512 is F, BW, DQ, VL, VNNI and VBMI (Ice Lake, Zen 4 and later); amx is
// that with bfloat16, also in tile registers (Sapphire Rapids and later, Linux);
// neon includes the dot product of Armv8.2. Processors with less run the portable kernels, which
// the compiler turns into SSE2 or plain NEON.
enum class Isa : std::uint8_t { portable, avx2, avx512, amx, neon };

inline constexpr Isa all_isas[] = {Isa::portable, Isa::avx2, Isa::avx512, Isa::amx, Isa::neon};

const char* name(Isa isa);
bool supported(Isa isa);  // by this build, this processor and its operating system
Isa best_isa();
Isa isa_named(const std::string& wanted);  // throws std::invalid_argument unless it is supported

}  // namespace mixbit
