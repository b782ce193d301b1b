// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
//
// sample_path for one request: only rows on the walked path are read. A row's exponentials stand in
// the scratch memory, and where a child was rejected the draft's weights, spread over the target's
// vocabulary. Sums are taken in blocks: floats inside a block, doubles over blocks; sampling looks
// for the block first, so that it agrees with the sum to the last bit.
#pragma once

#include <cfloat>

#include "sample_path.h"
#include "weights.h"

namespace echo_vllm::cpu {
namespace {

constexpr int kBlock = 512;

ECHO_INLINE int end_of_block(int begin, int n) { return n - begin < kBlock ? n : begin + kBlock; }

// One row's residual: max(target - scale * draft, 0); `draft` is not read where scale is 0.
struct Residual {
  const float* target;
  const float* draft;
  float scale;

  float at(int t) const {
    return scale > 0.0f ? residual_weight(target[t], draft[t], scale) : target[t];
  }

  double sum(int begin, int end) const {
    Vec total{};
    int i = begin;
    if (scale > 0.0f) {
      for (; i + kLanes <= end; i += kLanes) {
        total += max(load(target + i) - scale * load(draft + i), Vec{});
      }
    } else {
      for (; i + kLanes <= end; i += kLanes) total += load(target + i);
    }
    double result = horizontal_sum(total);
    for (; i < end; ++i) result += at(i);
    return result;
  }

  double total(int n) const {
    double result = 0.0;
    for (int begin = 0; begin < n; begin += kBlock) result += sum(begin, end_of_block(begin, n));
    return result;
  }

  // The first token at which the sum from the left passes `place`; the last one that has any weight
  // where rounding leaves none; 0 where nothing has.
  int sample(int n, double place) const {
    int chosen = 0;
    double before = 0.0, through = 0.0;
    for (int begin = 0; begin < n; begin += kBlock) {
      const double part = sum(begin, end_of_block(begin, n));
      if (part <= 0.0) continue;
      chosen = begin;
      before = through;
      through += part;
      if (place < through) break;
    }
    int token = chosen;
    for (int t = chosen, end = end_of_block(chosen, n); t < end; ++t) {
      const float weight = at(t);
      if (weight <= 0.0f) continue;
      token = t;
      before += weight;
      if (place < before) break;
    }
    return token;
  }
};

// One request's tree, and the row that the walk stands at.
struct Walk {
  const SamplePathArgs& args;
  const int32_t* parents;
  const int32_t* token_ids;
  const double* uniforms;
  int first_row, num_nodes;
  float* target;
  float* draft;
  float temperature;
  int row = 0;

  // Logits as floats: those of the caller, or in `target`.
  const float* target_row(int index) const {
    const int64_t offset = index * args.target_stride;
    if (!args.is_bfloat16) return static_cast<const float*>(args.target_logits) + offset;
    const BFloat16* halves = static_cast<const BFloat16*>(args.target_logits) + offset;
    int t = 0;
    for (; t + kLanes <= args.vocab; t += kLanes) store(target + t, load(halves + t));
    for (; t < args.vocab; ++t) target[t] = to_float(halves[t]);
    return target;
  }

  const float* draft_row() const {
    const int index = args.draft_rows[first_row + row];
    return index < 0 ? nullptr : args.draft_probs + index * args.draft_stride;
  }

  float draft_weight(const float* probs, int token) const {
    const int id = args.draft_ids == nullptr ? token : args.draft_ids[token];
    return id < 0 ? 0.0f : probs[id];
  }

  // q over the target's vocabulary.
  const float* spread(const float* probs) const {
    if (args.draft_ids == nullptr) return probs;
    for (int t = 0; t < args.vocab; ++t) {
      const int id = args.draft_ids[t];
      draft[t] = id < 0 ? 0.0f : probs[id];
    }
    return draft;
  }

  // The child that this row accepts, as a row, or -1 and the last token.
  int step(int32_t rule, bool may_descend, int* last_token) {
    const int index = args.target_rows[first_row + row];
    *last_token = -1;
    if (index < 0) return -1;
    const float* logits = target_row(index);
    const int vocab = args.vocab;
    const float top = max_of(logits, vocab);
    if (rule == kGreedy || !(top > -__builtin_inff() && top < __builtin_inff())) {
      *last_token = 0;
      for (int t = 0; t < vocab; ++t) {
        if (logits[t] == top) {
          *last_token = t;
          break;
        }
      }
      return may_descend ? child_with(*last_token) : -1;
    }
    exponentials(logits, vocab, top, target, temperature);
    Residual residual{target, nullptr, 0.0f};
    Rejection state{residual.total(vocab), 0.0, 0.0f};
    if (rule == kBest) {
      *last_token = residual.sample(vocab, uniforms[row] * state.total);
      return may_descend ? child_with(*last_token) : -1;
    }
    const float* probs = may_descend ? draft_row() : nullptr;
    if (probs != nullptr) {
      for (int node = row; node < num_nodes; ++node) {
        if (parents[node] != row - 1) continue;
        const float weight = draft_weight(probs, token_ids[node]);
        if (!(weight > 0.0f)) continue;  // q cannot have drawn it
        if (state.draft_left == 0.0) {
          state.draft_left = Residual{probs, nullptr, 0.0f}.total(args.draft_vocab);
        }
        if (accepts(state, target[token_ids[node]], weight, uniforms[node + 1])) return node + 1;
        if (residual.draft == nullptr) residual.draft = spread(probs);
        const Residual before = residual;
        residual.scale = scale_after(state, weight);
        const double left = residual.total(vocab);
        if (!(left > 0.0)) {  // r_j and q_j differ by rounding only
          residual = before;
          break;
        }
        // Above 0, which says that q is not summed up yet.
        const double draft_left = state.draft_left - weight;
        state = {left, draft_left > DBL_MIN ? draft_left : DBL_MIN, residual.scale};
      }
    }
    *last_token = residual.sample(vocab, uniforms[0] * state.total);
    return -1;
  }

  int child_with(int token) const {
    for (int node = row; node < num_nodes; ++node) {
      if (parents[node] == row - 1 && token_ids[node] == token) return node + 1;
    }
    return -1;
  }
};

void run_sample_path(const SamplePathArgs& args, int request, float* scratch) {
  const int first_node = args.cu_nodes[request], first_row = first_node + request;
  Walk walk{args,
            args.parents + first_node,
            args.token_ids + first_node,
            args.uniforms + first_row,
            first_row,
            args.cu_nodes[request + 1] - first_node,
            scratch,
            scratch + args.vocab,
            args.temperatures == nullptr ? 1.0f : args.temperatures[request]};
  int32_t* path = args.accepted_rows + int64_t{request} * (args.max_depth + 1);
  path[0] = 0;
  for (int i = 1; i <= args.max_depth; ++i) path[i] = -1;
  int depth = 0, last_token = -1;
  for (int child;
       (child = walk.step(args.rules[request], depth < args.max_depth, &last_token)) > 0;) {
    walk.row = path[++depth] = child;
  }
  args.num_accepted[request] = depth;
  args.last_tokens[request] = last_token;
}

}  // namespace
}  // namespace echo_vllm::cpu
