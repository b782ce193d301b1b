// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
//
// The flat form of a batch's trees, checked: parents per node, and where each request's nodes
// start.
#pragma once

#include "../common/checks.h"

namespace echo_vllm::cpu {

struct Forest {
  const int32_t* parents;
  const int32_t* cu_nodes;
  int64_t num_nodes, num_requests;

  int nodes_of(int64_t request) const { return cu_nodes[request + 1] - cu_nodes[request]; }
  const int32_t* parents_of(int64_t request) const { return parents + cu_nodes[request]; }
};

inline Forest check_forest(const char* op, const Tensor& parents, const Tensor& cu_nodes) {
  check_index_vector(op, "parents", parents, ScalarType::Int);
  check_index_vector(op, "cu_nodes", cu_nodes, ScalarType::Int);
  check(cu_nodes.size(0) >= 1, op, ": cu_nodes must hold at least the 0 it starts with");
  const Forest forest{static_cast<const int32_t*>(parents.const_data_ptr()),
                      static_cast<const int32_t*>(cu_nodes.const_data_ptr()), parents.size(0),
                      cu_nodes.size(0) - 1};
  check(forest.cu_nodes[0] == 0 && forest.cu_nodes[forest.num_requests] == forest.num_nodes, op,
        ": cu_nodes must run from 0 to the ", forest.num_nodes, " nodes of parents, got ",
        forest.cu_nodes[0], " .. ", forest.cu_nodes[forest.num_requests]);
  for (int64_t r = 0; r < forest.num_requests; ++r) {
    check(forest.nodes_of(r) >= 0 && forest.cu_nodes[r + 1] <= forest.num_nodes, op,
          ": cu_nodes must not fall, got ", forest.cu_nodes[r], ", ", forest.cu_nodes[r + 1],
          " at request ", r);
    for (int node = 0; node < forest.nodes_of(r); ++node) {
      const int parent = forest.parents_of(r)[node];
      check(parent >= -1 && parent < node, op, ": the parent of node ", node, " of request ", r,
            " must be -1 (the root) or an earlier node, got ", parent);
    }
  }
  return forest;
}

}  // namespace echo_vllm::cpu
