// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
//
// build_super_tree: one thread per mask word walks from its row's node up to the root. Nothing is
// read back, and neighbouring threads write neighbouring words.
#include "../common/tree_mask.h"
#include "device.cuh"
#include "kernels.h"

namespace echo_vllm::cuda {
namespace {

constexpr int kThreads = 256;

// The request that owns row `row`, or num_requests behind the last: its rows start at
// cu_nodes[i] + i.
__device__ int request_of_row(const ForestArgs& forest, int64_t row) {
  int low = 0, high = forest.num_requests + 1;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (int64_t{forest.cu_nodes[middle]} + middle <= row) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

__global__ void __launch_bounds__(kThreads) build_super_tree_kernel(const SuperTreeArgs args) {
  const ForestArgs& forest = args.forest;
  const int64_t item = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t row = item / args.num_words;
  const int word = static_cast<int>(item % args.num_words);
  if (row >= forest.num_nodes + forest.num_requests) return;
  const int request = request_of_row(forest, row);
  int depth = 0;
  uint64_t bits = 0;
  if (request < forest.num_requests) {
    const int first_node = forest.cu_nodes[request];
    const int node = static_cast<int>(row - request - first_node) - 1;
    bits = ancestor_word(forest.parents + first_node, node, word, &depth);
  }
  args.mask[item] = static_cast<int64_t>(bits);
  if (word == 0) args.depths[row] = depth;
}

}  // namespace

cudaError_t launch_build_super_tree(const SuperTreeArgs& args, cudaStream_t stream) {
  const int64_t words = (args.forest.num_nodes + args.forest.num_requests) * args.num_words;
  return launch(build_super_tree_kernel, dim3(blocks_for(words, kThreads)), dim3(kThreads), 0,
                stream, args);
}

}  // namespace echo_vllm::cuda
