// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
//
// sample_path: checks, and a request a task. The arithmetic is in sample_path_kernel.h.
#include "sample_path.h"

#include <vector>

#include "../common/sample_path_checks.h"
#include "../ops.h"
#include "forest_checks.h"
#include "isa.h"
#include "threads.h"

namespace echo_vllm::cpu {
namespace {

// Fewer logits than this are walked faster by one thread than it takes to wake the others.
constexpr int64_t kMinParallelLogits = 1 << 15;

SamplePathKernel kernel_for(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx2) return sample_path_kernel_avx2();
  if (isa >= Isa::kAvx512) return sample_path_kernel_avx512();
#endif
  static_cast<void>(isa);
  return sample_path_kernel_portable();
}

void check_values(const SamplePathArgs& args, int64_t num_target_rows, int64_t num_draft_rows) {
  const char* op = kSamplePathOp;
  const int num_nodes = args.cu_nodes[args.num_requests];
  for (int r = 0; r < args.num_requests; ++r) {
    check(args.rules[r] >= kGreedy && args.rules[r] <= kDrawn, op, ": the rule of request ", r,
          " must be 0 (greedy), 1 (best) or 2 (drawn), got ", args.rules[r]);
  }
  for (int row = 0; row < num_nodes + args.num_requests; ++row) {
    check(args.target_rows[row] >= -1 && args.target_rows[row] < num_target_rows, op,
          ": target_rows must be -1 or a row of the ", num_target_rows, " of target_logits, got ",
          args.target_rows[row], " at row ", row);
    check(args.draft_rows[row] >= -1 && args.draft_rows[row] < num_draft_rows, op,
          ": draft_rows must be -1 or a row of the ", num_draft_rows, " of draft_probs, got ",
          args.draft_rows[row], " at row ", row);
  }
  for (int node = 0; node < num_nodes; ++node) {
    check(args.token_ids[node] >= 0 && args.token_ids[node] < args.vocab, op,
          ": token_ids must be below the ", args.vocab, " columns of target_logits, got ",
          args.token_ids[node], " at node ", node);
  }
  if (args.draft_ids == nullptr) return;
  int greatest = -1;
  for (int t = 0; t < args.vocab; ++t) {
    greatest = args.draft_ids[t] > greatest ? args.draft_ids[t] : greatest;
  }
  check(greatest < args.draft_vocab || num_draft_rows == 0, op, ": draft_ids must be below the ",
        args.draft_vocab, " columns of draft_probs, got ", greatest);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> sample_path(
    const Tensor& target_logits, const Tensor& target_rows, const Tensor& draft_probs,
    const Tensor& draft_rows, const std::optional<Tensor>& draft_ids, const Tensor& rules,
    const Tensor& uniforms, const Tensor& token_ids, const Tensor& parents, const Tensor& cu_nodes,
    int64_t max_depth, const std::optional<Tensor>& temperatures) {
  check_forest(kSamplePathOp, parents, cu_nodes);
  SampledPath out{parents, parents, parents};
  const SamplePathArgs args = check_sample_path(target_logits, target_rows, draft_probs, draft_rows,
                                                draft_ids, rules, uniforms, token_ids, parents,
                                                cu_nodes, max_depth, temperatures, true, &out);
  check_values(args, target_logits.size(0), draft_probs.size(0));
  const SamplePathKernel kernel = kernel_for(selected_isa());
  const bool parallel = int64_t{args.num_requests} * args.vocab >= kMinParallelLogits;
  for_each_task(args.num_requests, parallel, [&](int64_t request) {
    thread_local std::vector<float> scratch;
    scratch.resize(2 * static_cast<size_t>(args.vocab));
    kernel(args, static_cast<int>(request), scratch.data());
  });
  return {out.accepted_rows, out.num_accepted, out.last_tokens};
}

}  // namespace echo_vllm::cpu
