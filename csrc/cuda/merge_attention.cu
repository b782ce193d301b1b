// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
//
// merge_attention: a warp a (row, q head). It reads two results and writes one, a lane every 32nd
// number of the head.
#include "device.cuh"
#include "kernels.h"

namespace echo_vllm::cuda {
namespace {

constexpr int kThreads = 128;

template <class T>
__global__ void __launch_bounds__(kThreads)
    merge_attention_kernel(const __grid_constant__ MergeAttentionArgs args) {
  const int64_t line = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t row = args.row_start[0] + line / args.num_heads;
  const int head = static_cast<int>(line % args.num_heads);
  if (row >= args.row_start[args.num_requests]) return;
  const int request = request_of_row(args.row_start, args.num_requests, row);
  const int64_t token = args.query_start[request] + row - args.row_start[request];
  const AttentionPart &a = args.parts[0], &b = args.parts[1];
  const MergeWeights weights = merge_weights(
      a.lse[head * a.lse_stride_head + token], b.lse[head * b.lse_stride_head + token],
      [](float x) { return expf(x); }, [](float x) { return logf(x); });
  const T* from_a = static_cast<const T*>(a.out) + token * a.stride_row + head * a.stride_head;
  const T* from_b = static_cast<const T*>(b.out) + token * b.stride_row + head * b.stride_head;
  T* to = static_cast<T*>(args.out) + token * args.out_stride_row + head * args.out_stride_head;
  for (int dim = lane; dim < args.head_size; dim += kWarpSize) {
    float sum = 0.0f;
    if (weights.share[0] > 0.0f) sum += weights.share[0] * to_float(from_a[dim]);
    if (weights.share[1] > 0.0f) sum += weights.share[1] * to_float(from_b[dim]);
    to[dim] = from_float<T>(sum);
  }
  if (args.lse != nullptr && lane == 0) {
    args.lse[head * args.lse_stride_head + token] = weights.lse;
  }
}

template <class T>
cudaError_t launch_typed(const MergeAttentionArgs& args, cudaStream_t stream) {
  const dim3 grid(blocks_for(args.num_tokens * args.num_heads * kWarpSize, kThreads));
  return launch(merge_attention_kernel<T>, grid, dim3(kThreads), 0, stream, args);
}

}  // namespace

cudaError_t launch_merge_attention(const MergeAttentionArgs& args, cudaStream_t stream) {
  if (args.num_requests == 0) return cudaSuccess;
  switch (args.dtype) {
    case Dtype::kBFloat16:
      return launch_typed<BFloat16>(args, stream);
    case Dtype::kFloat16:
      return launch_typed<Float16>(args, stream);
    default:
      return launch_typed<Float32>(args, stream);
  }
}

}  // namespace echo_vllm::cuda
