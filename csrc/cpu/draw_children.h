// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
//
// What the operator (draw_children.cpp) hands to a kernel. As in tree_attention.h only plain data
// crosses this border.
#pragma once

#include <cstdint>

namespace echo_vllm::cpu {

struct DrawChildrenArgs {
  const void* logits;  // [rows, vocab], float or bfloat16
  bool is_bfloat16;
  int64_t logits_stride;
  const float* temperature;  // [rows], or null: 1
  const int64_t* keys;       // [rows]
  int64_t vocab, k;
  double scale, exponent;  // of the curve; no gains where scale is 0
  int64_t* token_ids;      // [rows, k], as all that follow but probs
  float* logprobs;
  int64_t* child_keys;
  float* probs;  // [rows, vocab]
  float* gains;
  float* reaches;
};

// Rows [first, last).
using DrawChildrenKernel = void (*)(const DrawChildrenArgs& args, int64_t first, int64_t last);

DrawChildrenKernel draw_children_kernel_portable();
#if defined(__x86_64__)
DrawChildrenKernel draw_children_kernel_avx2();
DrawChildrenKernel draw_children_kernel_avx512();
#endif

}  // namespace echo_vllm::cpu
