// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
//
// The operators' schemas; they are documented in echo_vllm/ops/__init__.py.
#pragma once

#include <torch/csrc/stable/library.h>

namespace echo_vllm {

template <class Library>
void define_schemas(Library& m) {
  m.def(
      "tree_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_table, "
      "Tensor context_lens, Tensor query_start, Tensor row_start, Tensor suffix_key, "
      "Tensor suffix_value, Tensor suffix_start, Tensor suffix_len, Tensor mask, "
      "Tensor positions, float scale, float softcap, int sliding_window, str layout, "
      "Tensor(a!) out, Tensor(b!)? lse=None, float k_scale=1.0, float v_scale=1.0) -> ()");
  m.def(
      "suffix_attention(Tensor query, Tensor query_start, Tensor row_start, Tensor suffix_key, "
      "Tensor suffix_value, Tensor suffix_start, Tensor suffix_len, Tensor mask, float scale, "
      "float softcap, Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def(
      "merge_attention(Tensor prefix_out, Tensor prefix_lse, Tensor suffix_out, "
      "Tensor suffix_lse, Tensor query_start, Tensor row_start, Tensor(a!) out, "
      "Tensor(b!)? lse=None) -> ()");
  m.def(
      "commit_kv(Tensor(a!)[] kv_caches, Tensor src_slots, Tensor dst_slots, int block_size, "
      "str layout) -> ()");
  m.def(
      "build_super_tree(Tensor parents, Tensor cu_nodes, int num_words) -> "
      "(Tensor mask, Tensor depths)");
  m.def(
      "accept_path(Tensor sampled, Tensor token_ids, Tensor parents, Tensor cu_nodes, "
      "int max_depth) -> (Tensor accepted_rows, Tensor num_accepted)");
  m.def(
      "select_budget(Tensor scores, Tensor tiers, Tensor parents, int budget, "
      "int max_per_request, Tensor? limit=None) -> (Tensor columns, Tensor cu_nodes)");
  m.def(
      "sample_path(Tensor target_logits, Tensor target_rows, Tensor draft_probs, "
      "Tensor draft_rows, Tensor? draft_ids, Tensor rules, Tensor uniforms, Tensor token_ids, "
      "Tensor parents, Tensor cu_nodes, int max_depth, Tensor? temperatures=None) -> "
      "(Tensor accepted_rows, Tensor num_accepted, Tensor last_tokens)");
}

}  // namespace echo_vllm
