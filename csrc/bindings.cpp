// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
//
// Schemas and CPU registrations, through torch's stable ABI: one library serves every torch from
// 2.11 on and every Python.
#include <torch/csrc/stable/library.h>

#include "ops.h"

STABLE_TORCH_LIBRARY(echo_vllm, m) {
  m.def(
      "tree_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_table, "
      "Tensor context_lens, Tensor query_start, Tensor row_start, Tensor suffix_key, "
      "Tensor suffix_value, Tensor suffix_start, Tensor suffix_len, Tensor mask, "
      "Tensor positions, float scale, float softcap, int sliding_window, str layout, "
      "Tensor(a!) out) -> ()");
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
      "int max_per_request) -> (Tensor columns, Tensor cu_nodes)");
  m.def("supported_cpu_isas() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(echo_vllm, CPU, m) {
  m.impl("tree_attention", TORCH_BOX(&echo_vllm::cpu::tree_attention));
  m.impl("commit_kv", TORCH_BOX(&echo_vllm::cpu::commit_kv));
  m.impl("build_super_tree", TORCH_BOX(&echo_vllm::cpu::build_super_tree));
  m.impl("accept_path", TORCH_BOX(&echo_vllm::cpu::accept_path));
  m.impl("select_budget", TORCH_BOX(&echo_vllm::cpu::select_budget));
}

STABLE_TORCH_LIBRARY_IMPL(echo_vllm, CompositeExplicitAutograd, m) {
  m.impl("supported_cpu_isas", TORCH_BOX(&echo_vllm::cpu::supported_isas_text));
}
