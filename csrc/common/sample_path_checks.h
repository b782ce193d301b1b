// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
//
// The arguments of sample_path: shapes and dtypes, on every device.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>

#include "checks.h"
#include "rejection.h"

namespace echo_vllm {

constexpr const char* kSamplePathOp = "sample_path";

struct SampledPath {
  Tensor accepted_rows, num_accepted, last_tokens;
};

inline SamplePathArgs check_sample_path(const Tensor& target_logits, const Tensor& target_rows,
                                        const Tensor& draft_probs, const Tensor& draft_rows,
                                        const std::optional<Tensor>& draft_ids, const Tensor& rules,
                                        const Tensor& uniforms, const Tensor& token_ids,
                                        const Tensor& parents, const Tensor& cu_nodes,
                                        int64_t max_depth,
                                        const std::optional<Tensor>& temperatures,
                                        bool takes_bfloat16, SampledPath* out) {
  const char* op = kSamplePathOp;
  for (const auto& [name, tensor] :
       {std::tuple{"target_logits", &target_logits}, std::tuple{"draft_probs", &draft_probs}}) {
    check_dim(op, name, *tensor, 2);
    check_last_dim_contiguous(op, name, *tensor);
  }
  const bool is_bfloat16 = takes_bfloat16 && target_logits.scalar_type() == ScalarType::BFloat16;
  if (!is_bfloat16) check_dtype(op, "target_logits", target_logits, ScalarType::Float);
  check_dtype(op, "draft_probs", draft_probs, ScalarType::Float);
  const int64_t vocab = target_logits.size(1), draft_vocab = draft_probs.size(1);
  check(vocab > 0, op, ": target_logits must have columns, got shape ", ShapeOf{target_logits});
  check_index_vector(op, "parents", parents, ScalarType::Int);
  check_index_vector(op, "cu_nodes", cu_nodes, ScalarType::Int);
  check(cu_nodes.size(0) >= 1, op, ": cu_nodes must hold at least the 0 it starts with");
  const int64_t num_nodes = parents.size(0), num_requests = cu_nodes.size(0) - 1;
  for (const auto& [name, tensor, dtype, size] :
       {std::tuple{"target_rows", &target_rows, ScalarType::Int, num_nodes + num_requests},
        std::tuple{"draft_rows", &draft_rows, ScalarType::Int, num_nodes + num_requests},
        std::tuple{"rules", &rules, ScalarType::Int, num_requests},
        std::tuple{"uniforms", &uniforms, ScalarType::Double, num_nodes + num_requests},
        std::tuple{"token_ids", &token_ids, ScalarType::Int, num_nodes}}) {
    check_index_vector(op, name, *tensor, dtype);
    check_size(op, name, *tensor, 0, size);
  }
  if (draft_ids) {
    check_index_vector(op, "draft_ids", *draft_ids, ScalarType::Int);
    check_size(op, "draft_ids", *draft_ids, 0, vocab);
  } else {
    check(draft_probs.size(0) == 0 || draft_vocab == vocab, op,
          ": without draft_ids the vocabularies must be one, got ", draft_vocab,
          " columns of draft_probs for ", vocab, " of target_logits");
  }
  if (temperatures) {
    check_index_vector(op, "temperatures", *temperatures, ScalarType::Float);
    check_size(op, "temperatures", *temperatures, 0, num_requests);
  }
  check(max_depth >= 0, op, ": max_depth must be >= 0, got ", max_depth);
  out->accepted_rows =
      torch::stable::new_empty(parents, {num_requests, max_depth + 1}, ScalarType::Int);
  out->num_accepted = torch::stable::new_empty(parents, {num_requests}, ScalarType::Int);
  out->last_tokens = torch::stable::new_empty(parents, {num_requests}, ScalarType::Int);
  const auto int32 = [](const Tensor& t) {
    return static_cast<const int32_t*>(t.const_data_ptr());
  };
  const auto result = [](Tensor& t) { return static_cast<int32_t*>(t.mutable_data_ptr()); };
  SamplePathArgs args{};
  args.target_logits = target_logits.const_data_ptr();
  args.is_bfloat16 = is_bfloat16;
  args.temperatures =
      temperatures ? static_cast<const float*>(temperatures->const_data_ptr()) : nullptr;
  args.target_rows = int32(target_rows);
  args.draft_probs = static_cast<const float*>(draft_probs.const_data_ptr());
  args.draft_rows = int32(draft_rows);
  args.draft_ids = draft_ids ? int32(*draft_ids) : nullptr;
  args.rules = int32(rules);
  args.uniforms = static_cast<const double*>(uniforms.const_data_ptr());
  args.token_ids = int32(token_ids);
  args.parents = int32(parents);
  args.cu_nodes = int32(cu_nodes);
  args.target_stride = stride_of(target_logits, 0);
  args.draft_stride = stride_of(draft_probs, 0);
  args.num_requests = static_cast<int>(num_requests);
  args.vocab = static_cast<int>(vocab);
  args.draft_vocab = static_cast<int>(draft_vocab);
  args.max_depth = static_cast<int>(max_depth);
  args.accepted_rows = result(out->accepted_rows);
  args.num_accepted = result(out->num_accepted);
  args.last_tokens = result(out->last_tokens);
  return args;
}

}  // namespace echo_vllm
