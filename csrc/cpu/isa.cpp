// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
#include "isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <cstring>

#include "../common/checks.h"

namespace echo_vllm::cpu {
namespace {

#if defined(__x86_64__)
bool has_avx512_bf16() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax & bit_AVX512BF16) != 0;
}

// The processor has AMX, and the kernel lets this process use tiles.
bool amx_is_usable() {
#if defined(__linux__)
  unsigned eax, ebx, ecx, edx;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  const bool amx = (edx & bit_AMX_TILE) != 0 && (edx & bit_AMX_BF16) != 0;
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
  return amx && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

std::vector<Isa> detect() {
  std::vector<Isa> isas{Isa::kPortable};
#if defined(__x86_64__)
  // GCC's cpuid helper also checks that the operating system saves the wide registers.
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    isas.push_back(Isa::kAvx2);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      isas.push_back(Isa::kAvx512);
      if (has_avx512_bf16()) {
        isas.push_back(Isa::kAvx512Bf16);
        if (amx_is_usable()) isas.push_back(Isa::kAmx);
      }
    }
  }
#endif
  return isas;
}

}  // namespace

const std::vector<Isa>& supported_isas() {
  static const std::vector<Isa> isas = detect();
  return isas;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kPortable:
      return "portable";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx512Bf16:
      return "avx512_bf16";
    case Isa::kAmx:
      return "amx";
  }
  return "";
}

Isa selected_isa() {
  const std::vector<Isa>& isas = supported_isas();
  const char* forced = std::getenv("ECHO_VLLM_CPU_ISA");
  if (forced == nullptr || *forced == '\0') return isas.back();
  std::string names;
  for (const Isa isa : isas) {
    if (std::strcmp(forced, isa_name(isa)) == 0) return isa;
    names += names.empty() ? "" : ", ";
    names += isa_name(isa);
  }
  fail("ECHO_VLLM_CPU_ISA=", forced, " is not available; this machine runs ", names,
       ". Unset the variable to use the fastest");
}

}  // namespace echo_vllm::cpu
