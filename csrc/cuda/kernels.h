// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
//
// What the operators (ops.cpp, the host compiler, torch) hand to the launchers (*.cu, nvcc, no
// torch). Only plain data crosses this border. A launcher puts kernels on `stream` and returns the
// launch's error; it neither waits nor allocates.
#pragma once

#include <cstdint>

#include "../common/merge_attention.h"
#include "../common/rejection.h"
#include "../common/tree_attention_args.h"

#if defined(ECHO_EMULATE_CUDA)
#include "cuda_emulator.h"
#else
#include <cuda_runtime_api.h>
#endif

namespace echo_vllm::cuda {

struct ForestArgs {
  const int32_t* parents;   // [K]
  const int32_t* cu_nodes;  // [R + 1]
  int64_t num_nodes;        // K
  int num_requests;         // R
};

struct SuperTreeArgs {
  ForestArgs forest;
  int64_t* mask;    // [K + R, W]
  int32_t* depths;  // [K + R]
  int num_words;
};

cudaError_t launch_build_super_tree(const SuperTreeArgs& args, cudaStream_t stream);

struct AcceptPathArgs {
  ForestArgs forest;
  const int64_t* sampled;  // [K + R]
  const void* token_ids;   // [K]
  bool wide_tokens;        // int64 rather than int32
  int max_depth;
  int32_t* accepted_rows;  // [R, max_depth + 1]
  int32_t* num_accepted;   // [R]
};

cudaError_t launch_accept_path(const AcceptPathArgs& args, cudaStream_t stream);

// The widest pool that a block can sort.
constexpr int kMaxSelectColumns = 4096;

struct SelectBudgetArgs {
  const float* scores;     // [R, P]
  const int32_t* tiers;    // [R, P]
  const int64_t* parents;  // [R, P], not read
  int64_t scores_stride, tiers_stride;
  int num_requests, num_columns;
  int list_size;  // min(max_per_request, P): the most columns of one request
  int64_t budget;
  const int32_t* limit;  // [1], the budget if it is less; null: `budget` is all there is

  uint64_t* sorted_keys;    // [R, list_size] scratch
  int32_t* sorted_columns;  // [R, list_size] scratch
  int32_t* windows;         // [3, R] scratch: begin and end of a range of the list, its size
  int64_t* columns;         // [num_slots]
  int64_t num_slots;
  int32_t* cu_nodes;  // [R + 1]
};

cudaError_t launch_select_budget(const SelectBudgetArgs& args, cudaStream_t stream);

cudaError_t launch_sample_path(const SamplePathArgs& args, cudaStream_t stream);

// As many as fit the parameters of one kernel (CUDA 12.1 and later: 32 KB).
constexpr int kMaxCommitLayers = 512;
constexpr int kCommitThreads = 512;
constexpr int kCommitItems = 16;
// The moves of one launch: each block holds a slice of all of them in registers.
constexpr int64_t kMaxCommitMoves = static_cast<int64_t>(kCommitThreads) * kCommitItems;

struct CommitLayer {
  char* base;
  int64_t block_stride, head_stride, token_stride;  // bytes
};

struct CommitArgs {
  CommitLayer layers[kMaxCommitLayers];
  const int64_t* src_slots;  // [M]
  const int64_t* dst_slots;  // [M]
  int num_moves, num_layers, num_kv_heads, block_size;
  int units;  // 16-byte units of K and V of one token and kv head
};

cudaError_t launch_commit_kv(const CommitArgs& args, cudaStream_t stream);

// Which kernel takes a call. The tensor-core kernel has two forms: 64 lines a tile, or 16 lines
// whose keys the warps share.
enum class AttentionKernel : int { kPlain, kManyLines, kFewLines };

struct AttentionPlan {
  int num_requests;
  int64_t num_rows;    // the most rows that row_start can cover
  int max_splits;      // 1: no partial results
  float* partial_out;  // [max_splits, num_rows, H, D]
  float* partial_ml;   // [max_splits, num_rows, H, 2]: maximum and sum
  AttentionKernel kernel;
};

// The best kernel that takes these head size, dtypes and alignment, and whose shared memory a block
// of this device may have. `few_lines`: the requests have few lines each.
AttentionKernel choose_attention_kernel(const TreeAttentionArgs& args, bool few_lines,
                                        int64_t max_shared_bytes);

// Lines and keys of one tile.
int attention_tile_lines(AttentionKernel kernel);
int attention_tile_keys(const TreeAttentionArgs& args, AttentionKernel kernel);

cudaError_t launch_tree_attention(const TreeAttentionArgs& args, const AttentionPlan& plan,
                                  cudaStream_t stream);

cudaError_t launch_merge_attention(const MergeAttentionArgs& args, cudaStream_t stream);

}  // namespace echo_vllm::cuda
