// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
//
// What tree_attention demands of its tensors before anything is read from them: the part of the
// checks that holds on every device.
#pragma once

#include <algorithm>

#include "checks.h"
#include "tree_attention_args.h"

namespace echo_vllm {

constexpr const char* kTreeAttentionOp = "tree_attention";

inline KvLayout parse_layout(const std::string& name) {
  if (name == "vec" || name == "vec16") return KvLayout::kVec;
  if (name == "amx") return KvLayout::kAmx;
  if (name == "nhd") return KvLayout::kNhd;
  fail(kTreeAttentionOp, ": layout must be one of vec, vec16, amx, nhd, got '", name, "'");
}

inline Dtype parse_dtype(const Tensor& query) {
  switch (query.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      fail(kTreeAttentionOp, ": query must be float32, bfloat16 or float16, got ",
           torch::headeronly::toString(query.scalar_type()));
  }
}

struct CacheView {
  int64_t num_blocks;
  CacheStrides strides;
};

inline CacheView check_cache(const char* name, const Tensor& cache, KvLayout layout,
                             int64_t block_size, int64_t num_kv_heads, int64_t head_size) {
  check_dim(kTreeAttentionOp, name, cache, 4);
  check_last_dim_contiguous(kTreeAttentionOp, name, cache);
  check_size(kTreeAttentionOp, name, cache, 3, head_size);
  if (layout == KvLayout::kNhd) {
    check_size(kTreeAttentionOp, name, cache, 1, block_size);
    check_size(kTreeAttentionOp, name, cache, 2, num_kv_heads);
    return {cache.size(0), {cache.stride(0), cache.stride(2), cache.stride(1)}};
  }
  check_size(kTreeAttentionOp, name, cache, 1, num_kv_heads);
  check_size(kTreeAttentionOp, name, cache, 2, block_size);
  check(cache.stride(2) == head_size, kTreeAttentionOp, ": ", name,
        " must be contiguous inside a (block, kv head), got stride ", cache.stride(2),
        " for a head size of ", head_size);
  return {cache.size(0), {cache.stride(0), cache.stride(1), 0}};
}

// Shapes, dtypes and strides, and the arguments as plain data.
inline TreeAttentionArgs check_tree_attention(const Tensor& query, const Tensor& key_cache,
                                              const Tensor& value_cache, const Tensor& block_table,
                                              const Tensor& context_lens, const Tensor& query_start,
                                              const Tensor& row_start, const Tensor& suffix_key,
                                              const Tensor& suffix_value,
                                              const Tensor& suffix_start, const Tensor& suffix_len,
                                              const Tensor& mask, const Tensor& positions,
                                              double scale, double softcap, int64_t sliding_window,
                                              const std::string& layout_name, const Tensor& out) {
  const KvLayout layout = parse_layout(layout_name);
  TreeAttentionArgs args{};
  args.dtype = parse_dtype(query);
  const ScalarType dtype = query.scalar_type();

  check_dim(kTreeAttentionOp, "query", query, 3);
  check_last_dim_contiguous(kTreeAttentionOp, "query", query);
  const int64_t num_tokens = query.size(0), num_heads = query.size(1), head_size = query.size(2);
  check(head_size > 0 && head_size % 16 == 0, kTreeAttentionOp,
        ": the head size must be a multiple of 16, got ", head_size);
  check_dim(kTreeAttentionOp, "out", out, 3);
  check_dtype(kTreeAttentionOp, "out", out, dtype);
  check_last_dim_contiguous(kTreeAttentionOp, "out", out);
  for (int64_t dim = 0; dim < 3; ++dim)
    check_size(kTreeAttentionOp, "out", out, dim, query.size(dim));

  check_dim(kTreeAttentionOp, "suffix_key", suffix_key, 3);
  check_dim(kTreeAttentionOp, "suffix_value", suffix_value, 3);
  check_dtype(kTreeAttentionOp, "suffix_key", suffix_key, dtype);
  check_dtype(kTreeAttentionOp, "suffix_value", suffix_value, dtype);
  check_last_dim_contiguous(kTreeAttentionOp, "suffix_key", suffix_key);
  check_last_dim_contiguous(kTreeAttentionOp, "suffix_value", suffix_value);
  const int64_t num_kv_heads = suffix_key.size(1);
  check_size(kTreeAttentionOp, "suffix_key", suffix_key, 2, head_size);
  for (int64_t dim = 0; dim < 3; ++dim) {
    check_size(kTreeAttentionOp, "suffix_value", suffix_value, dim, suffix_key.size(dim));
  }
  check(num_kv_heads > 0 && num_heads % num_kv_heads == 0, kTreeAttentionOp, ": ", num_heads,
        " q heads are not a multiple of ", num_kv_heads, " kv heads");

  check_dim(kTreeAttentionOp, "key_cache", key_cache, 4);
  check_dtype(kTreeAttentionOp, "key_cache", key_cache, dtype);
  check_dtype(kTreeAttentionOp, "value_cache", value_cache, dtype);
  const int64_t block_size = key_cache.size(layout == KvLayout::kNhd ? 1 : 2);
  const CacheView keys =
      check_cache("key_cache", key_cache, layout, block_size, num_kv_heads, head_size);
  const CacheView values =
      check_cache("value_cache", value_cache, layout, block_size, num_kv_heads, head_size);
  check(keys.num_blocks == values.num_blocks, kTreeAttentionOp, ": key_cache has ", keys.num_blocks,
        " blocks, value_cache ", values.num_blocks);
  check(block_size > 0 && (layout != KvLayout::kVec || block_size % 16 == 0), kTreeAttentionOp,
        ": the block size of the ", layout_name, " layout must be a multiple of 16, got ",
        block_size);
  if (layout == KvLayout::kAmx) {
    check(
        dtype == ScalarType::BFloat16 && head_size % 32 == 0 && block_size % 32 == 0,
        kTreeAttentionOp,
        ": the amx layout holds bfloat16 with head and block sizes that are multiples of 32, got ",
        torch::headeronly::toString(dtype), ", ", head_size, ", ", block_size);
  }

  check_index_vector(kTreeAttentionOp, "context_lens", context_lens, ScalarType::Int);
  check_index_vector(kTreeAttentionOp, "query_start", query_start, ScalarType::Int);
  check_index_vector(kTreeAttentionOp, "row_start", row_start, ScalarType::Int);
  check_index_vector(kTreeAttentionOp, "suffix_start", suffix_start, ScalarType::Int);
  check_index_vector(kTreeAttentionOp, "suffix_len", suffix_len, ScalarType::Int);
  check_index_vector(kTreeAttentionOp, "positions", positions, ScalarType::Long);
  check_dim(kTreeAttentionOp, "block_table", block_table, 2);
  check_dtype(kTreeAttentionOp, "block_table", block_table, ScalarType::Int);
  check_last_dim_contiguous(kTreeAttentionOp, "block_table", block_table);
  check_dim(kTreeAttentionOp, "mask", mask, 2);
  check_dtype(kTreeAttentionOp, "mask", mask, ScalarType::Long);
  check(mask.is_contiguous(), kTreeAttentionOp, ": mask must be contiguous");
  const int64_t num_requests = context_lens.size(0);
  check_size(kTreeAttentionOp, "row_start", row_start, 0, num_requests + 1);
  check_size(kTreeAttentionOp, "suffix_start", suffix_start, 0, num_requests);
  check_size(kTreeAttentionOp, "suffix_len", suffix_len, 0, num_requests);
  check_size(kTreeAttentionOp, "positions", positions, 0, num_tokens);
  check(query_start.size(0) >= num_requests && block_table.size(0) >= num_requests,
        kTreeAttentionOp, ": ", num_requests,
        " requests need as many entries of query_start and block_table, got ", query_start.size(0),
        " and ", block_table.size(0));

  args.query = query.const_data_ptr();
  args.query_stride_row = query.stride(0);
  args.query_stride_head = query.stride(1);
  args.out = out.mutable_data_ptr();
  args.out_stride_row = out.stride(0);
  args.out_stride_head = out.stride(1);
  args.key_cache = key_cache.const_data_ptr();
  args.value_cache = value_cache.const_data_ptr();
  args.key_strides = keys.strides;
  args.value_strides = values.strides;
  args.block_table = static_cast<const int32_t*>(block_table.const_data_ptr());
  args.block_table_stride = block_table.stride(0);
  args.suffix_key = suffix_key.const_data_ptr();
  args.suffix_value = suffix_value.const_data_ptr();
  args.suffix_key_stride_row = suffix_key.stride(0);
  args.suffix_key_stride_head = suffix_key.stride(1);
  args.suffix_value_stride_row = suffix_value.stride(0);
  args.suffix_value_stride_head = suffix_value.stride(1);
  args.context_lens = static_cast<const int32_t*>(context_lens.const_data_ptr());
  args.query_start = static_cast<const int32_t*>(query_start.const_data_ptr());
  args.row_start = static_cast<const int32_t*>(row_start.const_data_ptr());
  args.suffix_start = static_cast<const int32_t*>(suffix_start.const_data_ptr());
  args.suffix_len = static_cast<const int32_t*>(suffix_len.const_data_ptr());
  args.mask = static_cast<const int64_t*>(mask.const_data_ptr());
  args.mask_words = mask.size(1);
  args.positions = static_cast<const int64_t*>(positions.const_data_ptr());
  args.num_heads = static_cast<int>(num_heads);
  args.num_kv_heads = static_cast<int>(num_kv_heads);
  args.head_size = static_cast<int>(head_size);
  args.block_size = static_cast<int>(block_size);
  args.sliding_window = static_cast<int>(std::clamp<int64_t>(sliding_window, -1, INT32_MAX));
  args.scale = static_cast<float>(scale);
  args.softcap = static_cast<float>(softcap);
  args.layout = layout;
  return args;
}

}  // namespace echo_vllm
