// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
//
// Schemas and CPU registrations (the CUDA ones are in cuda/ops.cpp), through torch's stable ABI:
// one library serves every torch from 2.11 on and every Python.
#include <torch/csrc/stable/library.h>

#include "ops.h"
#include "schemas.h"

STABLE_TORCH_LIBRARY(echo_vllm, m) {
  echo_vllm::define_schemas(m);
  m.def("pack_linear(Tensor weight) -> Tensor");
  m.def("packed_linear(Tensor x, Tensor packed, int num_columns, Tensor? bias=None) -> Tensor");
  m.def("rms_norm(Tensor x, Tensor(a!)? residual, Tensor weight, float epsilon) -> Tensor");
  m.def(
      "draw_children(Tensor logits, Tensor? temperature, Tensor keys, int k, float scale, "
      "float exponent) -> (Tensor token_ids, Tensor logprobs, Tensor child_keys, Tensor probs, "
      "Tensor gains, Tensor reaches)");
  m.def("supported_cpu_isas() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(echo_vllm, CPU, m) {
  m.impl("tree_attention", TORCH_BOX(&echo_vllm::cpu::tree_attention));
  m.impl("suffix_attention", TORCH_BOX(&echo_vllm::cpu::suffix_attention));
  m.impl("merge_attention", TORCH_BOX(&echo_vllm::cpu::merge_attention));
  m.impl("commit_kv", TORCH_BOX(&echo_vllm::cpu::commit_kv));
  m.impl("build_super_tree", TORCH_BOX(&echo_vllm::cpu::build_super_tree));
  m.impl("accept_path", TORCH_BOX(&echo_vllm::cpu::accept_path));
  m.impl("select_budget", TORCH_BOX(&echo_vllm::cpu::select_budget));
  m.impl("sample_path", TORCH_BOX(&echo_vllm::cpu::sample_path));
  m.impl("pack_linear", TORCH_BOX(&echo_vllm::cpu::pack_linear));
  m.impl("packed_linear", TORCH_BOX(&echo_vllm::cpu::packed_linear));
  m.impl("draw_children", TORCH_BOX(&echo_vllm::cpu::draw_children));
  m.impl("rms_norm", TORCH_BOX(&echo_vllm::cpu::rms_norm));
}

STABLE_TORCH_LIBRARY_IMPL(echo_vllm, CompositeExplicitAutograd, m) {
  m.impl("supported_cpu_isas", TORCH_BOX(&echo_vllm::cpu::supported_isas_text));
}
