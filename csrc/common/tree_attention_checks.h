// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
//
// What the attention operators demand of their tensors before anything is read from them: the part
// of the checks that holds on every device.
#pragma once

#include <algorithm>
#include <optional>

#include "checks.h"
#include "merge_attention.h"
#include "tree_attention_args.h"

namespace echo_vllm {

constexpr const char* kTreeAttentionOp = "tree_attention";
constexpr const char* kSuffixAttentionOp = "suffix_attention";
constexpr const char* kMergeAttentionOp = "merge_attention";

inline KvLayout parse_layout(const std::string& name) {
  if (name == "vec" || name == "vec16") return KvLayout::kVec;
  if (name == "amx") return KvLayout::kAmx;
  if (name == "nhd") return KvLayout::kNhd;
  fail(kTreeAttentionOp, ": layout must be one of vec, vec16, amx, nhd, got '", name, "'");
}

inline Dtype parse_dtype(const char* op, const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      fail(op, ": ", name, " must be float32, bfloat16 or float16, got ",
           torch::headeronly::toString(tensor.scalar_type()));
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
    return {cache.size(0), {stride_of(cache, 0), stride_of(cache, 2), stride_of(cache, 1)}};
  }
  check_size(kTreeAttentionOp, name, cache, 1, num_kv_heads);
  check_size(kTreeAttentionOp, name, cache, 2, block_size);
  check(cache.stride(2) == head_size, kTreeAttentionOp, ": ", name,
        " must be contiguous inside a (block, kv head), got stride ", cache.stride(2),
        " for a head size of ", head_size);
  return {cache.size(0), {cache.stride(0), cache.stride(1), 0}};
}

// A tensor of log-sum-exps: float32 [num_heads, num_tokens].
inline void check_lse(const char* op, const char* name, const Tensor& lse, int64_t num_heads,
                      int64_t num_tokens) {
  check_dim(op, name, lse, 2);
  check_dtype(op, name, lse, ScalarType::Float);
  check_size(op, name, lse, 0, num_heads);
  check_size(op, name, lse, 1, num_tokens);
  check_last_dim_contiguous(op, name, lse);
}

// What says which rows of [T, H, D] are whose.
inline void check_rows(const char* op, const Tensor& query_start, const Tensor& row_start) {
  check_index_vector(op, "query_start", query_start, ScalarType::Int);
  check_index_vector(op, "row_start", row_start, ScalarType::Int);
  check(row_start.size(0) >= 1, op, ": row_start must hold at least the row it starts with");
  check(query_start.size(0) >= row_start.size(0) - 1, op, ": ", row_start.size(0) - 1,
        " requests need as many entries of query_start, got ", query_start.size(0));
}

// The rows and their suffix: all that suffix_attention has.
inline TreeAttentionArgs check_suffix_attention(
    const char* op, const Tensor& query, const Tensor& query_start, const Tensor& row_start,
    const Tensor& suffix_key, const Tensor& suffix_value, const Tensor& suffix_start,
    const Tensor& suffix_len, const Tensor& mask, double scale, double softcap, const Tensor& out,
    const std::optional<Tensor>& lse) {
  TreeAttentionArgs args{};
  args.dtype = parse_dtype(op, "query", query);
  const ScalarType dtype = query.scalar_type();

  check_dim(op, "query", query, 3);
  check_last_dim_contiguous(op, "query", query);
  const int64_t num_tokens = query.size(0), num_heads = query.size(1), head_size = query.size(2);
  check(head_size > 0 && head_size % 16 == 0, op, ": the head size must be a multiple of 16, got ",
        head_size);
  check_dim(op, "out", out, 3);
  check_dtype(op, "out", out, dtype);
  check_last_dim_contiguous(op, "out", out);
  for (int64_t dim = 0; dim < 3; ++dim) check_size(op, "out", out, dim, query.size(dim));
  if (lse) check_lse(op, "lse", *lse, num_heads, num_tokens);

  check_dim(op, "suffix_key", suffix_key, 3);
  check_dim(op, "suffix_value", suffix_value, 3);
  check_dtype(op, "suffix_key", suffix_key, dtype);
  check_dtype(op, "suffix_value", suffix_value, dtype);
  check_last_dim_contiguous(op, "suffix_key", suffix_key);
  check_last_dim_contiguous(op, "suffix_value", suffix_value);
  const int64_t num_kv_heads = suffix_key.size(1);
  check_size(op, "suffix_key", suffix_key, 2, head_size);
  for (int64_t dim = 0; dim < 3; ++dim) {
    check_size(op, "suffix_value", suffix_value, dim, suffix_key.size(dim));
  }
  check(num_kv_heads > 0 && num_heads % num_kv_heads == 0, op, ": ", num_heads,
        " q heads are not a multiple of ", num_kv_heads, " kv heads");

  check_rows(op, query_start, row_start);
  check_index_vector(op, "suffix_start", suffix_start, ScalarType::Int);
  check_index_vector(op, "suffix_len", suffix_len, ScalarType::Int);
  const int64_t num_requests = suffix_len.size(0);
  check_size(op, "row_start", row_start, 0, num_requests + 1);
  check_size(op, "suffix_start", suffix_start, 0, num_requests);
  check_dim(op, "mask", mask, 2);
  check_dtype(op, "mask", mask, ScalarType::Long);
  check(mask.is_contiguous(), op, ": mask must be contiguous");

  args.query = query.const_data_ptr();
  args.query_stride_row = stride_of(query, 0);
  args.query_stride_head = stride_of(query, 1);
  args.out = out.mutable_data_ptr();
  args.out_stride_row = stride_of(out, 0);
  args.out_stride_head = stride_of(out, 1);
  if (lse) {
    args.lse = static_cast<float*>(lse->mutable_data_ptr());
    args.lse_stride_head = lse->stride(0);
  }
  args.suffix_key = suffix_key.const_data_ptr();
  args.suffix_value = suffix_value.const_data_ptr();
  args.suffix_key_stride_row = stride_of(suffix_key, 0);
  args.suffix_key_stride_head = stride_of(suffix_key, 1);
  args.suffix_value_stride_row = stride_of(suffix_value, 0);
  args.suffix_value_stride_head = stride_of(suffix_value, 1);
  args.query_start = static_cast<const int32_t*>(query_start.const_data_ptr());
  args.row_start = static_cast<const int32_t*>(row_start.const_data_ptr());
  args.suffix_start = static_cast<const int32_t*>(suffix_start.const_data_ptr());
  args.suffix_len = static_cast<const int32_t*>(suffix_len.const_data_ptr());
  args.mask = static_cast<const int64_t*>(mask.const_data_ptr());
  args.mask_words = mask.size(1);
  args.num_heads = static_cast<int>(num_heads);
  args.num_kv_heads = static_cast<int>(num_kv_heads);
  args.head_size = static_cast<int>(head_size);
  args.block_size = 1;
  args.sliding_window = -1;
  args.scale = static_cast<float>(scale);
  args.softcap = static_cast<float>(softcap);
  args.key_scale = args.value_scale = 1.0f;
  args.layout = KvLayout::kNhd;
  return args;
}

// Shapes, dtypes and strides, and the arguments as plain data.
inline TreeAttentionArgs check_tree_attention(
    const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
    const Tensor& block_table, const Tensor& context_lens, const Tensor& query_start,
    const Tensor& row_start, const Tensor& suffix_key, const Tensor& suffix_value,
    const Tensor& suffix_start, const Tensor& suffix_len, const Tensor& mask,
    const Tensor& positions, double scale, double softcap, int64_t sliding_window,
    const std::string& layout_name, const Tensor& out, const std::optional<Tensor>& lse,
    double k_scale, double v_scale) {
  const char* op = kTreeAttentionOp;
  const KvLayout layout = parse_layout(layout_name);
  TreeAttentionArgs args =
      check_suffix_attention(op, query, query_start, row_start, suffix_key, suffix_value,
                             suffix_start, suffix_len, mask, scale, softcap, out, lse);
  const ScalarType dtype = query.scalar_type();
  const int64_t head_size = args.head_size, num_requests = suffix_len.size(0);

  check_dim(op, "key_cache", key_cache, 4);
  args.fp8_cache = key_cache.scalar_type() == ScalarType::Float8_e4m3fn;
  if (!args.fp8_cache) check_dtype(op, "key_cache", key_cache, dtype);
  check_dtype(op, "value_cache", value_cache, key_cache.scalar_type());
  check(args.fp8_cache || (k_scale == 1.0 && v_scale == 1.0), op,
        ": k_scale and v_scale must be 1 unless the cache is Float8_e4m3fn, got ", k_scale, " and ",
        v_scale);
  check(k_scale > 0.0 && v_scale > 0.0, op, ": k_scale and v_scale must be positive, got ", k_scale,
        " and ", v_scale);
  const int64_t block_size = key_cache.size(layout == KvLayout::kNhd ? 1 : 2);
  const CacheView keys =
      check_cache("key_cache", key_cache, layout, block_size, args.num_kv_heads, head_size);
  const CacheView values =
      check_cache("value_cache", value_cache, layout, block_size, args.num_kv_heads, head_size);
  check(keys.num_blocks == values.num_blocks, op, ": key_cache has ", keys.num_blocks,
        " blocks, value_cache ", values.num_blocks);
  check(block_size > 0 && (layout != KvLayout::kVec || block_size % 16 == 0), op,
        ": the block size of the ", layout_name, " layout must be a multiple of 16, got ",
        block_size);
  if (layout == KvLayout::kAmx) {
    check(key_cache.scalar_type() == ScalarType::BFloat16 && head_size % 32 == 0 &&
              block_size % 32 == 0,
          op,
          ": the amx layout holds bfloat16 with head and block sizes that are multiples of 32, "
          "got ",
          torch::headeronly::toString(key_cache.scalar_type()), ", ", head_size, ", ", block_size);
  }

  check_index_vector(op, "context_lens", context_lens, ScalarType::Int);
  check_size(op, "context_lens", context_lens, 0, num_requests);
  check_index_vector(op, "positions", positions, ScalarType::Long);
  check_size(op, "positions", positions, 0, query.size(0));
  check_dim(op, "block_table", block_table, 2);
  check_dtype(op, "block_table", block_table, ScalarType::Int);
  check_last_dim_contiguous(op, "block_table", block_table);
  check(block_table.size(0) >= num_requests, op, ": ", num_requests,
        " requests need as many entries of block_table, got ", block_table.size(0));

  args.key_cache = key_cache.const_data_ptr();
  args.value_cache = value_cache.const_data_ptr();
  args.key_strides = keys.strides;
  args.value_strides = values.strides;
  args.block_table = static_cast<const int32_t*>(block_table.const_data_ptr());
  args.block_table_stride = block_table.stride(0);
  args.context_lens = static_cast<const int32_t*>(context_lens.const_data_ptr());
  args.positions = static_cast<const int64_t*>(positions.const_data_ptr());
  args.block_size = static_cast<int>(block_size);
  args.sliding_window = static_cast<int>(std::clamp<int64_t>(sliding_window, -1, INT32_MAX));
  args.key_scale = static_cast<float>(k_scale);
  args.value_scale = static_cast<float>(v_scale);
  args.layout = layout;
  return args;
}

// What merge_attention demands; plain data in MergeAttentionArgs.
inline MergeAttentionArgs check_merge_attention(const Tensor& prefix_out, const Tensor& prefix_lse,
                                                const Tensor& suffix_out, const Tensor& suffix_lse,
                                                const Tensor& query_start, const Tensor& row_start,
                                                const Tensor& out,
                                                const std::optional<Tensor>& lse) {
  const char* op = kMergeAttentionOp;
  MergeAttentionArgs args{};
  args.dtype = parse_dtype(op, "out", out);
  check_dim(op, "out", out, 3);
  check_last_dim_contiguous(op, "out", out);
  const int64_t num_tokens = out.size(0), num_heads = out.size(1);
  check(out.size(2) % 16 == 0, op, ": the head size must be a multiple of 16, got ", out.size(2));
  const auto part = [&](const char* name, const Tensor& tensor, const char* lse_name,
                        const Tensor& lse_of_part) {
    check_dim(op, name, tensor, 3);
    check_dtype(op, name, tensor, out.scalar_type());
    check_last_dim_contiguous(op, name, tensor);
    for (int64_t dim = 0; dim < 3; ++dim) check_size(op, name, tensor, dim, out.size(dim));
    check_lse(op, lse_name, lse_of_part, num_heads, num_tokens);
    return AttentionPart{tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1),
                         static_cast<const float*>(lse_of_part.const_data_ptr()),
                         lse_of_part.stride(0)};
  };
  args.parts[0] = part("prefix_out", prefix_out, "prefix_lse", prefix_lse);
  args.parts[1] = part("suffix_out", suffix_out, "suffix_lse", suffix_lse);
  check_rows(op, query_start, row_start);
  args.query_start = static_cast<const int32_t*>(query_start.const_data_ptr());
  args.row_start = static_cast<const int32_t*>(row_start.const_data_ptr());
  args.out = out.mutable_data_ptr();
  args.out_stride_row = stride_of(out, 0);
  args.out_stride_head = stride_of(out, 1);
  if (lse) {
    check_lse(op, "lse", *lse, num_heads, num_tokens);
    args.lse = static_cast<float*>(lse->mutable_data_ptr());
    args.lse_stride_head = lse->stride(0);
  }
  args.num_tokens = num_tokens;
  args.num_requests = static_cast<int>(row_start.size(0) - 1);
  args.num_heads = static_cast<int>(num_heads);
  args.head_size = static_cast<int>(out.size(2));
  return args;
}

}  // namespace echo_vllm
