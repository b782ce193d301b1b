// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
//
// The CPU kernels behind the operators that bindings.cpp registers. Shapes, dtypes and errors are
// documented in echo_vllm/ops/__init__.py.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace echo_vllm::cpu {

using torch::stable::Tensor;

void tree_attention(const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
                    const Tensor& block_table, const Tensor& context_lens,
                    const Tensor& query_start, const Tensor& row_start, const Tensor& suffix_key,
                    const Tensor& suffix_value, const Tensor& suffix_start,
                    const Tensor& suffix_len, const Tensor& mask, const Tensor& positions,
                    double scale, double softcap, int64_t sliding_window, const std::string& layout,
                    const Tensor& out, const std::optional<Tensor>& lse, double k_scale,
                    double v_scale);

void suffix_attention(const Tensor& query, const Tensor& query_start, const Tensor& row_start,
                      const Tensor& suffix_key, const Tensor& suffix_value,
                      const Tensor& suffix_start, const Tensor& suffix_len, const Tensor& mask,
                      double scale, double softcap, const Tensor& out, const Tensor& lse);

void merge_attention(const Tensor& prefix_out, const Tensor& prefix_lse, const Tensor& suffix_out,
                     const Tensor& suffix_lse, const Tensor& query_start, const Tensor& row_start,
                     const Tensor& out, const std::optional<Tensor>& lse);

void commit_kv(const std::vector<Tensor>& kv_caches, const Tensor& src_slots,
               const Tensor& dst_slots, int64_t block_size, const std::string& layout);

std::tuple<Tensor, Tensor> build_super_tree(const Tensor& parents, const Tensor& cu_nodes,
                                            int64_t num_words);

std::tuple<Tensor, Tensor> accept_path(const Tensor& sampled, const Tensor& token_ids,
                                       const Tensor& parents, const Tensor& cu_nodes,
                                       int64_t max_depth);

std::tuple<Tensor, Tensor> select_budget(const Tensor& scores, const Tensor& tiers,
                                         const Tensor& parents, int64_t budget,
                                         int64_t max_per_request,
                                         const std::optional<Tensor>& limit);

std::tuple<Tensor, Tensor, Tensor> sample_path(
    const Tensor& target_logits, const Tensor& target_rows, const Tensor& draft_probs,
    const Tensor& draft_rows, const std::optional<Tensor>& draft_ids, const Tensor& rules,
    const Tensor& uniforms, const Tensor& token_ids, const Tensor& parents, const Tensor& cu_nodes,
    int64_t max_depth, const std::optional<Tensor>& temperatures);

Tensor pack_linear(const Tensor& weight);

Tensor packed_linear(const Tensor& x, const Tensor& packed, int64_t num_columns,
                     const std::optional<Tensor>& bias);

Tensor rms_norm(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& weight,
                double epsilon);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> draw_children(
    const Tensor& logits, const std::optional<Tensor>& temperature, const Tensor& keys, int64_t k,
    double scale, double exponent);

// The instruction sets this machine can run, slowest first, separated by commas.
std::string supported_isas_text();

}  // namespace echo_vllm::cpu
