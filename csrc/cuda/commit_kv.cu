// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
//
// commit_kv: all layers in one launch. A block owns one slice of the 16-byte units of a (layer, kv
// head) for ALL moves: it reads every source of its slice into registers, meets at a barrier, and
// writes every destination. No other block touches the slice, so the moves happen at once whatever
// the order of the blocks.
#include <algorithm>

#include "device.cuh"
#include "kernels.h"

namespace echo_vllm::cuda {
namespace {

__device__ char* slot_address(const CommitLayer& layer, int64_t slot, int block_size, int head) {
  return layer.base + slot / block_size * layer.block_stride + head * layer.head_stride +
         slot % block_size * layer.token_stride;
}

__global__ void __launch_bounds__(kCommitThreads)
    commit_kv_kernel(const __grid_constant__ CommitArgs args, int slice_units) {
  const CommitLayer& layer = args.layers[blockIdx.z];
  const int head = blockIdx.y;
  const int first_unit = blockIdx.x * slice_units;
  const int units = min(slice_units, args.units - first_unit);
  const int num_items = args.num_moves * units;
  // Both loops work out the addresses: held, they would not fit the registers beside the data.
  uint4 held[kCommitItems];
  // Both rounds work out the addresses: they would not fit the registers beside the data.
  const auto for_each_item = [&](const auto& visit) {
#pragma unroll
    for (int i = 0; i < kCommitItems; ++i) {
      const int item = i * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
      if (item >= num_items) break;
      const int64_t src = args.src_slots[item / units], dst = args.dst_slots[item / units];
      if (src < 0 || dst < 0 || src == dst) continue;
      visit(held[i], src, dst, (first_unit + item % units) * int64_t{sizeof(uint4)});
    }
  };
  for_each_item([&](uint4& data, int64_t src, int64_t, int64_t offset) {
    data =
        *reinterpret_cast<const uint4*>(slot_address(layer, src, args.block_size, head) + offset);
  });
  __syncthreads();
  for_each_item([&](const uint4& data, int64_t, int64_t dst, int64_t offset) {
    *reinterpret_cast<uint4*>(slot_address(layer, dst, args.block_size, head) + offset) = data;
  });
}

}  // namespace

cudaError_t launch_commit_kv(const CommitArgs& args, cudaStream_t stream) {
  if (args.num_moves == 0 || args.num_layers == 0) return cudaSuccess;
  // As many units a slice as a block can hold for all moves.
  const int slice_units = std::min(args.units, static_cast<int>(kMaxCommitMoves / args.num_moves));
  const int items = args.num_moves * slice_units;
  int threads = kWarpSize;
  while (threads < items && threads < kCommitThreads) threads *= 2;
  const dim3 grid(blocks_for(args.units, slice_units), args.num_kv_heads, args.num_layers);
  return launch(commit_kv_kernel, grid, dim3(threads), 0, stream, args, slice_units);
}

}  // namespace echo_vllm::cuda
