// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
//
// sample_path: what its kernels are handed, and the arithmetic of recursive rejection that they
// share.
//
// Children x_1, x_2, ... of a row are drawn from q one after the other without replacement: x_j
// from q_j = q / Q_j on what is left, Q_j = 1 - q(x_1) - ... - q(x_(j-1)). With r_1 = p, x_j is
// accepted with probability min(1, r_j(x_j) / q_j(x_j)), and a rejection leaves r_(j+1) ~ max(r_j -
// q_j, 0). As max(max(a - b, 0) - c, 0) = max(a - b - c, 0) for b, c >= 0, and as a rejected token
// has nothing left, all residuals of a row have one form,
//
//     r_(j+1) ~ max(p - C_j q, 0),   C_j = C_(j-1) + S_j / Q_j,   C_0 = 0,
//
// where S_j is the sum of max(p - C_(j-1) q, 0). So no residual is ever stored: a token's is found
// from p, q and one number, and a rejection costs one sum over the vocabulary. docs/drawn.md has
// the proof that the rule is exact.
#pragma once

#include <cstdint>

#include "macros.h"

namespace echo_vllm {

struct SamplePathArgs {
  const void* target_logits;   // [target rows, vocab], target_stride of them from row to row
  const float* temperatures;   // [R], what logits are divided by; null: by nothing
  const int32_t* target_rows;  // [K + R]
  const float* draft_probs;    // [draft rows, draft_vocab]
  const int32_t* draft_rows;   // [K + R]
  const int32_t* draft_ids;    // [vocab], or null: the vocabularies are one
  const int32_t* rules;        // [R]
  const double* uniforms;      // [K + R]
  const int32_t* token_ids;    // [K]
  const int32_t* parents;      // [K]
  const int32_t* cu_nodes;     // [R + 1]
  int64_t target_stride, draft_stride;
  int num_requests, vocab, draft_vocab, max_depth;
  bool is_bfloat16;        // the target's logits, else float32; on a CPU alone
  int32_t* accepted_rows;  // [R, max_depth + 1]
  int32_t* num_accepted;   // [R]
  int32_t* last_tokens;    // [R]
};

// AcceptRule of echo_vllm/ops/rules.py.
constexpr int32_t kGreedy = 0, kBest = 1, kDrawn = 2;

constexpr float kLog2E = 1.44269504088896341f;

// Weights need not sum to 1: those of p sum to S_1, those of q to Q_1.
ECHO_HOST_DEVICE float residual_weight(float target, float draft, float scale) {
  const float left = target - scale * draft;
  return left > 0.0f ? left : 0.0f;
}

struct Rejection {
  double total;       // S_j
  double draft_left;  // Q_j
  float scale;        // C_(j-1)
};

// Whether a child is accepted whose token has these weights in p and q, q's positive.
ECHO_HOST_DEVICE bool accepts(const Rejection& state, float target, float draft, double uniform) {
  const double left = state.draft_left > draft ? state.draft_left : draft;
  return uniform * (draft / left) * state.total < residual_weight(target, draft, state.scale);
}

// C_j, once that child is rejected. Q_j holds q(x_j) at least, whatever rounding says.
ECHO_HOST_DEVICE float scale_after(const Rejection& state, float draft) {
  const double left = state.draft_left > draft ? state.draft_left : draft;
  return static_cast<float>(state.scale + state.total / left);
}

}  // namespace echo_vllm
