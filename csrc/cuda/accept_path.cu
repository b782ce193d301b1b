// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
//
// accept_path: one warp a request; its lanes look at 32 nodes at a time for the child that holds
// the sampled token.
#include "device.cuh"
#include "kernels.h"

namespace echo_vllm::cuda {
namespace {

constexpr int kThreads = 128;

// The child of `row` (0 = root) that holds `token`, as a row, or -1; the same in every lane.
template <class Token>
__device__ int find_child(const int32_t* parents, const Token* token_ids, int num_nodes, int row,
                          int64_t token) {
  const int lane = threadIdx.x % kWarpSize;
  for (int first = row; first < num_nodes; first += kWarpSize) {
    const int node = first + lane;
    const unsigned found =
        ballot(node < num_nodes && parents[node] == row - 1 && token_ids[node] == token);
    if (found != 0) return first + __ffs(static_cast<int>(found));
  }
  return -1;
}

template <class Token>
__global__ void __launch_bounds__(kThreads) accept_path_kernel(const AcceptPathArgs args) {
  const int request = (blockIdx.x * kThreads + threadIdx.x) / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  if (request >= args.forest.num_requests) return;
  const int first_node = args.forest.cu_nodes[request];
  const int num_nodes = args.forest.cu_nodes[request + 1] - first_node;
  const int32_t* parents = args.forest.parents + first_node;
  const Token* token_ids = static_cast<const Token*>(args.token_ids) + first_node;
  const int64_t* sampled = args.sampled + first_node + request;
  int32_t* path = args.accepted_rows + int64_t{request} * (args.max_depth + 1);
  int row = 0, depth = 0;
  if (lane == 0) path[0] = 0;
  while (depth < args.max_depth) {
    row = find_child(parents, token_ids, num_nodes, row, sampled[row]);
    if (row < 0) break;
    ++depth;
    if (lane == 0) path[depth] = row;
  }
  for (int i = depth + 1 + lane; i <= args.max_depth; i += kWarpSize) path[i] = -1;
  if (lane == 0) args.num_accepted[request] = depth;
}

}  // namespace

cudaError_t launch_accept_path(const AcceptPathArgs& args, cudaStream_t stream) {
  const dim3 grid(blocks_for(int64_t{args.forest.num_requests} * kWarpSize, kThreads));
  return args.wide_tokens
             ? launch(accept_path_kernel<int64_t>, grid, dim3(kThreads), 0, stream, args)
             : launch(accept_path_kernel<int32_t>, grid, dim3(kThreads), 0, stream, args);
}

}  // namespace echo_vllm::cuda
