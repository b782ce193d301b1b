// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
//
// What the operator (rms_norm.cpp) hands to a kernel. As in tree_attention.h only plain data
// crosses this border.
#pragma once

#include <cstdint>

namespace echo_vllm::cpu {

struct RmsNormArgs {
  const void* x;       // [rows, size]
  void* residual;      // [rows, size], x is added to it; or null
  const void* weight;  // [size]
  void* out;           // [rows, size]
  int64_t size;
  float epsilon;
  bool is_bfloat16;  // all of them; fp32 otherwise
};

// Rows [first, last).
using RmsNormKernel = void (*)(const RmsNormArgs& args, int64_t first, int64_t last);

RmsNormKernel rms_norm_kernel_portable();
#if defined(__x86_64__)
RmsNormKernel rms_norm_kernel_avx2();
RmsNormKernel rms_norm_kernel_avx512();
#endif

}  // namespace echo_vllm::cpu
