// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
//
// merge_attention: the attention to two disjoint sets of keys, each normalised by itself, as the
// attention to both (FlashAttention's and vLLM's merge_attn_states do the same). The arguments as
// plain data, and what each part counts for.
#pragma once

#include <cstdint>

#include "macros.h"
#include "tree_attention_args.h"

namespace echo_vllm {

struct AttentionPart {
  const void* out;  // [T, H, D]
  int64_t stride_row, stride_head;
  const float* lse;  // [H, T]
  int64_t lse_stride_head;
};

struct MergeAttentionArgs {
  AttentionPart parts[2];
  void* out;  // [T, H, D]
  int64_t out_stride_row, out_stride_head;
  float* lse;  // [H, T], or null
  int64_t lse_stride_head;
  const int32_t* query_start;  // [R]
  const int32_t* row_start;    // [R + 1]
  int64_t num_tokens;
  int num_requests, num_heads, head_size;
  Dtype dtype;
};

// The shares of the two parts, and the LSE of both. A part with a share of 0 must not be read.
struct MergeWeights {
  float share[2];
  float lse;
};

// `exp` and `log` are the natural ones of the device that calls. A part that saw no key has an LSE
// of -inf, or of +inf (what FlashAttention 2 writes).
template <class Exp, class Log>
ECHO_HOST_DEVICE MergeWeights merge_weights(float lse_a, float lse_b, const Exp& exp,
                                            const Log& log) {
  const float infinity = __builtin_huge_valf();
  if (lse_a == infinity) lse_a = -infinity;
  if (lse_b == infinity) lse_b = -infinity;
  const float top = lse_a > lse_b ? lse_a : lse_b;
  if (top == -infinity) return {{0.0f, 0.0f}, -infinity};
  const float a = exp(lse_a - top), b = exp(lse_b - top);
  return {{a / (a + b), b / (a + b)}, top + log(a + b)};
}

// The request that owns row `row` of [row_start[0], row_start[num_requests]): the last that starts
// at or before it.
ECHO_HOST_DEVICE int request_of_row(const int32_t* row_start, int num_requests, int64_t row) {
  int low = 0, high = num_requests;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (row_start[middle] <= row) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

}  // namespace echo_vllm
