// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
//
// accept_path: descend from the root along the tokens that the target sampled.
#include <algorithm>

#include "../common/checks.h"
#include "../common/tree_mask.h"
#include "../ops.h"
#include "forest_checks.h"

namespace echo_vllm::cpu {
namespace {

template <class Token>
void accept_all(const Forest& forest, const int64_t* sampled, const Token* token_ids,
                int64_t max_depth, int32_t* accepted_rows, int32_t* num_accepted) {
  for (int64_t r = 0; r < forest.num_requests; ++r) {
    const int64_t first_node = forest.cu_nodes[r];
    const int64_t* request_sampled = sampled + first_node + r;
    int32_t* path = accepted_rows + r * (max_depth + 1);
    std::fill(path, path + max_depth + 1, -1);
    path[0] = 0;
    int depth = 0;
    while (depth < max_depth) {
      const int row = path[depth];
      const int child = find_child_row(forest.parents_of(r), forest.nodes_of(r), row,
                                       request_sampled[row], token_ids + first_node);
      if (child < 0) break;
      path[++depth] = child;
    }
    num_accepted[r] = depth;
  }
}

}  // namespace

std::tuple<Tensor, Tensor> accept_path(const Tensor& sampled, const Tensor& token_ids,
                                       const Tensor& parents, const Tensor& cu_nodes,
                                       int64_t max_depth) {
  const char* op = "accept_path";
  const Forest forest = check_forest(op, parents, cu_nodes);
  check(max_depth >= 0, op, ": max_depth must be >= 0, got ", max_depth);
  check_index_vector(op, "sampled", sampled, ScalarType::Long);
  check_size(op, "sampled", sampled, 0, forest.num_nodes + forest.num_requests);
  const bool wide = token_ids.scalar_type() == ScalarType::Long;
  check_index_vector(op, "token_ids", token_ids, wide ? ScalarType::Long : ScalarType::Int);
  check_size(op, "token_ids", token_ids, 0, forest.num_nodes);

  Tensor rows =
      torch::stable::new_empty(parents, {forest.num_requests, max_depth + 1}, ScalarType::Int);
  Tensor counts = torch::stable::new_empty(parents, {forest.num_requests}, ScalarType::Int);
  const int64_t* targets = static_cast<const int64_t*>(sampled.const_data_ptr());
  int32_t* path = static_cast<int32_t*>(rows.mutable_data_ptr());
  int32_t* count = static_cast<int32_t*>(counts.mutable_data_ptr());
  if (wide) {
    accept_all(forest, targets, static_cast<const int64_t*>(token_ids.const_data_ptr()), max_depth,
               path, count);
  } else {
    accept_all(forest, targets, static_cast<const int32_t*>(token_ids.const_data_ptr()), max_depth,
               path, count);
  }
  return {rows, counts};
}

}  // namespace echo_vllm::cpu
