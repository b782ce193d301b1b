// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
//
// build_super_tree: ancestor mask and depths of every row, from the parents.
#include <cstring>

#include "../common/checks.h"
#include "../common/tree_mask.h"
#include "../ops.h"
#include "forest_checks.h"

namespace echo_vllm::cpu {

std::tuple<Tensor, Tensor> build_super_tree(const Tensor& parents, const Tensor& cu_nodes,
                                            int64_t num_words) {
  const char* op = "build_super_tree";
  const Forest forest = check_forest(op, parents, cu_nodes);
  check(num_words >= 1, op, ": num_words must be >= 1, got ", num_words);
  const int64_t num_rows = forest.num_nodes + forest.num_requests;
  Tensor mask = torch::stable::new_zeros(parents, {num_rows, num_words}, ScalarType::Long);
  Tensor depths = torch::stable::new_empty(parents, {num_rows}, ScalarType::Int);
  uint64_t* row = static_cast<uint64_t*>(mask.mutable_data_ptr());
  int32_t* depth = static_cast<int32_t*>(depths.mutable_data_ptr());
  for (int64_t r = 0; r < forest.num_requests; ++r) {
    const int nodes = forest.nodes_of(r);
    check(words_for_bits(nodes + 1) <= num_words, op, ": request ", r, " has ", nodes + 1,
          " rows, which need ", words_for_bits(nodes + 1), " words, but num_words is ", num_words);
    set_mask_bit(row, 0);
    *depth++ = 0;
    row += num_words;
    for (int node = 0; node < nodes; ++node) {
      *depth++ = write_ancestor_row(forest.parents_of(r), node, row);
      row += num_words;
    }
  }
  return {mask, depths};
}

}  // namespace echo_vllm::cpu
