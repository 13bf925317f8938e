#include "isa.h"

#include <initializer_list>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace mixbit {
namespace {

struct Features {
  bool avx2 = false;
  bool avx512 = false;
  bool amx = false;
  bool neon = false;
};

#if defined(__x86_64__)

constexpr bool bit(unsigned word, int i) { return (word >> i & 1) != 0; }

// The registers the operating system saves on a context switch (XCR0).
unsigned saved_registers() {
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

// Asks for the state of tile registers, for this process from now on.
bool tiles_allowed() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int request_state = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM of Linux 5.16
  return syscall(SYS_arch_prctl, request_state, tile_data) == 0;
#else
  return false;
#endif
}

Features detect() {
  Features found;
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return found;
  const bool osxsave = bit(c, 27), avx = bit(c, 28), fma = bit(c, 12), f16c = bit(c, 29);
  if (!osxsave || !avx || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return found;
  const unsigned saved = saved_registers();
  const bool ymm = (saved & 0x06) == 0x06;  // SSE, AVX
  const bool zmm = (saved & 0xe6) == 0xe6;  // and opmask, both parts of ZMM
  found.avx2 = ymm && bit(b, 5) && fma && f16c;
  const bool f = bit(b, 16), dq = bit(b, 17), bw = bit(b, 30), vl = bit(b, 31);
  const bool vbmi = bit(c, 1), vnni = bit(c, 11);
  found.avx512 = found.avx2 && zmm && f && dq && bw && vl && vbmi && vnni;
  const bool tiles = (saved & 0x60000) == 0x60000 && bit(d, 22) && bit(d, 24);  // with products of bfloat16
  const bool bf16 = __get_cpuid_count(7, 1, &a, &b, &c, &d) && bit(a, 5);        // in AVX-512
  found.amx = found.avx512 && bf16 && tiles && tiles_allowed();
  return found;
}

#elif defined(__aarch64__) && defined(__linux__)

Features detect() {
  constexpr unsigned long asimddp = 1ul << 20;  // HWCAP_ASIMDDP
  Features found;
  found.neon = (getauxval(AT_HWCAP) & asimddp) != 0;
  return found;
}

#elif defined(__aarch64__) && defined(__APPLE__)

Features detect() {
  Features found;
  int value = 0;
  size_t size = sizeof value;
  found.neon = sysctlbyname("hw.optional.arm.FEAT_DotProd", &value, &size, nullptr, 0) == 0 && value != 0;
  return found;
}

#else

Features detect() { return {}; }

#endif

const Features& features() {
  static const Features found = detect();
  return found;
}

}  // namespace

const char* name(Isa isa) {
  switch (isa) {
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
    case Isa::amx: return "amx";
    case Isa::neon: return "neon";
    case Isa::portable: break;
  }
  return "portable";
}

bool supported(Isa isa) {
  switch (isa) {
    case Isa::avx2: return features().avx2;
    case Isa::avx512: return features().avx512;
    case Isa::amx: return features().amx;
    case Isa::neon: return features().neon;
    case Isa::portable: break;
  }
  return true;
}

Isa best_isa() {
  for (Isa isa : {Isa::amx, Isa::avx512, Isa::avx2, Isa::neon})
    if (supported(isa)) return isa;
  return Isa::portable;
}

Isa isa_named(const std::string& wanted) {
  std::string known;
  for (Isa isa : all_isas) {
    if (!supported(isa)) continue;
    if (wanted == name(isa)) return isa;
    known += (known.empty() ? "" : ", ") + std::string(name(isa));
  }
  throw std::invalid_argument("instruction set '" + wanted + "' cannot run here; this machine and build run: " + known);
}

}  // namespace mixbit
