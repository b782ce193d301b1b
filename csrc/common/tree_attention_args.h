// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
//
// The arguments of tree_attention as plain data, for the kernels of every device. Only plain data
// crosses this border: the CPU kernels are compiled with other instruction sets than the rest of
// the library, and the CUDA kernels by another compiler.
//
// The keys of a request are numbered through: first the context's tokens, then its suffix rows.
// Its lines are its rows times the q heads of one kv head, row-major.
#pragma once

#include <cstdint>

#include "kv_layout.h"

namespace echo_vllm {

enum class Dtype : int { kFloat32, kBFloat16, kFloat16 };

// All strides are in elements; the last dimension of every tensor is contiguous.
struct TreeAttentionArgs {
  const void* query;  // [T, H, D]
  int64_t query_stride_row, query_stride_head;
  void* out;  // [T, H, D]
  int64_t out_stride_row, out_stride_head;
  float* lse;  // [H, T], or null
  int64_t lse_stride_head;

  const void* key_cache;
  const void* value_cache;
  CacheStrides key_strides, value_strides;
  const int32_t* block_table;  // [R, max blocks]
  int64_t block_table_stride;

  const void* suffix_key;    // [S, KVH, D]
  const void* suffix_value;  // [S, KVH, D]
  int64_t suffix_key_stride_row, suffix_key_stride_head;
  int64_t suffix_value_stride_row, suffix_value_stride_head;

  const int32_t* context_lens;  // [R]; null: no request has a context, and there is no cache
  const int32_t* query_start;   // [R]
  const int32_t* row_start;     // [R + 1]
  const int32_t* suffix_start;  // [R]
  const int32_t* suffix_len;    // [R]
  const int64_t* mask;          // [rows, words]
  int64_t mask_words;
  const int64_t* positions;  // [T]

  int num_heads, num_kv_heads, head_size, block_size;
  int sliding_window;  // <= 0: none
  float scale, softcap;
  float key_scale, value_scale;  // of the cache's numbers; the suffix has none
  KvLayout layout;
  Dtype dtype;
  bool fp8_cache;  // e4m3 in the cache; all else is `dtype`
};

ECHO_HOST_DEVICE int context_of(const TreeAttentionArgs& args, int request) {
  return args.context_lens == nullptr ? 0 : args.context_lens[request];
}

}  // namespace echo_vllm
