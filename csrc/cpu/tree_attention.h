// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
//
// What the operator (tree_attention.cpp) hands to a kernel, and the table of kernels, one per
// instruction set. Only plain data crosses this border: the kernels are compiled with other
// instruction sets than the rest of the library and must not share inline library code with it.
#pragma once

#include <cstdint>

#include "../common/tree_attention_args.h"

namespace echo_vllm::cpu {

// Tasks begin at a multiple of this many keys: one mask word.
constexpr int kTaskKeys = 64;

// One unit of work: the rows and q heads of one (request, kv head) against a range of its keys.
struct TreeAttentionTask {
  int request;
  int kv_head;
  int begin, end;  // keys; begin is a multiple of kTaskKeys
  // Null: the task covers all keys and writes the output. Else the state of the online softmax
  // goes here, for merge().
  float* partial;
  // What the same thread is likely to do next, null if nothing: its first keys are fetched early.
  const TreeAttentionTask* next;
};

// Floats of one partial state: per line (row x q head) the maximum, the sum, the weighted values.
ECHO_HOST_DEVICE int64_t partial_size(int64_t lines, int head_size) {
  return lines * (2 + static_cast<int64_t>(head_size));
}

struct TreeAttentionKernel {
  // Floats of scratch memory (64-byte aligned) for tasks of at most `lines` rows x q heads.
  int64_t (*scratch_size)(const TreeAttentionArgs& args, int64_t lines);
  void (*run)(const TreeAttentionArgs& args, const TreeAttentionTask& task, float* scratch);
  // Merges `count` partial states, `stride` floats apart, and writes the output rows.
  void (*merge)(const TreeAttentionArgs& args, int request, int kv_head, const float* partials,
                int64_t count, int64_t stride, float* scratch);
};

const TreeAttentionKernel& tree_attention_kernel_portable();
#if defined(__x86_64__)
const TreeAttentionKernel& tree_attention_kernel_avx2();
const TreeAttentionKernel& tree_attention_kernel_avx512();
const TreeAttentionKernel& tree_attention_kernel_amx();
#endif

}  // namespace echo_vllm::cpu
