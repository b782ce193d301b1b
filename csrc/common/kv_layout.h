// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
//
// Where one element of K or V lies inside a block of the paged cache. The layouts are those that
// vLLM 0.32's cpu_attn_reshape_and_cache writes: tests/ops/test_kv_layout.py compares the same
// offsets in echo_vllm/ops/reference.py with that op, element by element, and the other tests
// compare these functions with the reference.
//
//   vec, vec16   [block, kv head, ...]: K is [head_size, block_size] (column-major), V is
//                [block_size, head_size].
//   amx          bfloat16 in tiles for AMX. K: groups of 16 tokens, in each
//                [head_size / 2][16 tokens][2 dims]. V: groups of 16 dims, in each
//                [block_size / 2][16 dims][2 tokens].
//   nhd          [block, token, kv head, dim], nothing packed.
#pragma once

#include <cstdint>

#include "macros.h"

namespace echo_vllm {

enum class KvLayout : int { kVec, kAmx, kNhd };

// Tokens per K group and dims per V group of the amx layout: the columns of one AMX tile.
constexpr int kAmxTileColumns = 16;

// Offset of (token, dim) from the start of one (block, kv head) region of the vec layout.
ECHO_HOST_DEVICE int64_t vec_key_offset(int block_size, int token, int dim) {
  return static_cast<int64_t>(dim) * block_size + token;
}

ECHO_HOST_DEVICE int64_t vec_value_offset(int head_size, int token, int dim) {
  return static_cast<int64_t>(token) * head_size + dim;
}

ECHO_HOST_DEVICE int64_t amx_key_offset(int head_size, int token, int dim) {
  const int64_t group = token / kAmxTileColumns;
  return group * kAmxTileColumns * head_size +
         static_cast<int64_t>(dim / 2) * (2 * kAmxTileColumns) + (token % kAmxTileColumns) * 2 +
         dim % 2;
}

ECHO_HOST_DEVICE int64_t amx_value_offset(int block_size, int token, int dim) {
  const int64_t group = dim / kAmxTileColumns;
  return group * kAmxTileColumns * block_size +
         static_cast<int64_t>(token / 2) * (2 * kAmxTileColumns) + (dim % kAmxTileColumns) * 2 +
         token % 2;
}

// Strides are in elements. In the nhd layout a token is token_stride apart inside a block; in the
// other layouts the region of one (block, kv head) is contiguous and token_stride is not used.
struct CacheStrides {
  int64_t block;
  int64_t head;
  int64_t token;
};

ECHO_HOST_DEVICE int64_t key_offset(KvLayout layout, int block_size, int head_size, int token,
                                    int dim, int64_t token_stride) {
  switch (layout) {
    case KvLayout::kVec:
      return vec_key_offset(block_size, token, dim);
    case KvLayout::kAmx:
      return amx_key_offset(head_size, token, dim);
    default:
      return token * token_stride + dim;
  }
}

ECHO_HOST_DEVICE int64_t value_offset(KvLayout layout, int block_size, int head_size, int token,
                                      int dim, int64_t token_stride) {
  switch (layout) {
    case KvLayout::kVec:
      return vec_value_offset(head_size, token, dim);
    case KvLayout::kAmx:
      return amx_value_offset(block_size, token, dim);
    default:
      return token * token_stride + dim;
  }
}

}  // namespace echo_vllm
