// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
//
// Which instruction set the CPU kernels use.
#pragma once

#include <string>
#include <vector>

namespace echo_vllm::cpu {

// kAvx512Bf16 is kAvx512 with products of bfloat16 pairs in linear layers, kAmx that with AMX tiles
// where the cache has the amx layout.
enum class Isa : int { kPortable, kAvx2, kAvx512, kAvx512Bf16, kAmx };

// What this machine and this build can run, slowest first; never empty.
const std::vector<Isa>& supported_isas();

const char* isa_name(Isa isa);

// The fastest supported one, or the one that ECHO_VLLM_CPU_ISA names. The variable is read on
// every call, so that a test can go through all of them. Throws if it names another.
Isa selected_isa();

}  // namespace echo_vllm::cpu
