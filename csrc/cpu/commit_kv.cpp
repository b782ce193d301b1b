// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
//
// Moves the K and V of accepted nodes to the slots where the context continues, in every layer.
#include <cstring>
#include <vector>

#include "../common/checks.h"
#include "../common/kv_layout.h"
#include "../ops.h"
#include "threads.h"

namespace echo_vllm::cpu {
namespace {

constexpr const char* kOp = "commit_kv";

// Fewer elements than this are moved faster by one thread than it takes to wake the others.
constexpr int64_t kMinParallelElements = 1 << 15;

struct Move {
  int64_t src_block, dst_block;
  int src_token, dst_token;
};

struct LayerShape {
  int64_t num_blocks, num_kv_heads;
  int block_size, head_size;
  int64_t token_stride;
};

LayerShape check_layer(const Tensor& cache, int64_t layer, int64_t block_size, KvLayout layout) {
  check(cache.dim() == 4 && cache.size(2) == block_size && cache.size(3) % 2 == 0, kOp,
        ": kv_caches[", layer, "] must be [num_blocks, num_kv_heads, ", block_size,
        ", 2 * head_size], got ", ShapeOf{cache});
  const int64_t row = cache.size(3);
  check(cache.stride(3) == 1 && (cache.stride(2) == row || layout == KvLayout::kNhd), kOp,
        ": kv_caches[", layer, "] must be contiguous inside a ",
        layout == KvLayout::kNhd ? "token" : "(block, kv head)");
  const size_t size = cache.element_size();
  check(size == 1 || size == 2 || size == 4, kOp, ": kv_caches[", layer,
        "] must have elements of 1, 2 or 4 bytes, got ", size);
  check(layout != KvLayout::kAmx || (row / 2 % 32 == 0 && block_size % 32 == 0), kOp,
        ": the amx layout needs head and block sizes that are multiples of 32, got ", row / 2,
        " and ", block_size);
  return {cache.size(0), cache.size(1), static_cast<int>(block_size), static_cast<int>(row / 2),
          cache.stride(2)};
}

// Calls f(offset in K, offset in V, dim) for every element of a token. The layout is a template
// argument so that the offsets become strides.
template <KvLayout kLayout, class F>
void for_each_element(const LayerShape& shape, int token, const F& f) {
  const int head_size = shape.head_size, block_size = shape.block_size;
  for (int d = 0; d < head_size; ++d) {
    f(key_offset(kLayout, block_size, head_size, token, d, shape.token_stride),
      value_offset(kLayout, block_size, head_size, token, d, shape.token_stride), d);
  }
}

// Moves one kv head of one layer. `held` takes K and V of every moved token in between.
template <KvLayout kLayout, class T>
void move_head(T* head_base, int64_t block_stride, const LayerShape& shape,
               const std::vector<Move>& moves, T* held) {
  const int head_size = shape.head_size;
  // K and V are two regions of a (block, kv head), or in the nhd layout two halves of a token.
  const int64_t value_region =
      kLayout == KvLayout::kNhd ? head_size : static_cast<int64_t>(shape.block_size) * head_size;
  T* token_held = held;
  for (const Move& m : moves) {
    const T* keys = head_base + m.src_block * block_stride;
    const T* values = keys + value_region;
    for_each_element<kLayout>(shape, m.src_token, [&](int64_t key, int64_t value, int d) {
      token_held[d] = keys[key];
      token_held[head_size + d] = values[value];
    });
    token_held += 2 * head_size;
  }
  token_held = held;
  for (const Move& m : moves) {
    T* keys = head_base + m.dst_block * block_stride;
    T* values = keys + value_region;
    for_each_element<kLayout>(shape, m.dst_token, [&](int64_t key, int64_t value, int d) {
      keys[key] = token_held[d];
      values[value] = token_held[head_size + d];
    });
    token_held += 2 * head_size;
  }
}

template <class T>
void move_head_of(const Tensor& cache, int64_t head, const LayerShape& shape, KvLayout layout,
                  const std::vector<Move>& moves) {
  // Kept from task to task: a step commits in every (layer, kv head).
  static thread_local std::vector<T> held;
  held.resize(moves.size() * 2 * shape.head_size);
  T* base = static_cast<T*>(cache.mutable_data_ptr()) + head * cache.stride(1);
  if (layout == KvLayout::kAmx) {
    move_head<KvLayout::kAmx>(base, cache.stride(0), shape, moves, held.data());
  } else if (layout == KvLayout::kNhd) {
    move_head<KvLayout::kNhd>(base, cache.stride(0), shape, moves, held.data());
  } else {
    move_head<KvLayout::kVec>(base, cache.stride(0), shape, moves, held.data());
  }
}

}  // namespace

void commit_kv(const std::vector<Tensor>& kv_caches, const Tensor& src_slots,
               const Tensor& dst_slots, int64_t block_size, const std::string& layout_name) {
  const bool strided = layout_name == "nhd" || layout_name == "hnd";
  check(strided || layout_name == "vec" || layout_name == "vec16" || layout_name == "amx", kOp,
        ": layout must be one of vec, vec16, amx, nhd, hnd, got '", layout_name, "'");
  const KvLayout layout = strided                ? KvLayout::kNhd
                          : layout_name == "amx" ? KvLayout::kAmx
                                                 : KvLayout::kVec;
  check(block_size > 0, kOp, ": block_size must be positive, got ", block_size);
  check_index_vector(kOp, "src_slots", src_slots, ScalarType::Long);
  check_index_vector(kOp, "dst_slots", dst_slots, ScalarType::Long);
  check_size(kOp, "dst_slots", dst_slots, 0, src_slots.size(0));
  if (kv_caches.empty()) return;

  std::vector<LayerShape> shapes;
  int64_t fewest_blocks = INT64_MAX;
  // One task per (layer, kv head).
  std::vector<std::pair<int64_t, int64_t>> tasks;
  int64_t elements_per_move = 0;
  for (size_t layer = 0; layer < kv_caches.size(); ++layer) {
    shapes.push_back(
        check_layer(kv_caches[layer], static_cast<int64_t>(layer), block_size, layout));
    const LayerShape& shape = shapes.back();
    fewest_blocks = std::min(fewest_blocks, shape.num_blocks);
    elements_per_move += 2 * shape.num_kv_heads * shape.head_size;
    for (int64_t head = 0; head < shape.num_kv_heads; ++head) {
      tasks.emplace_back(static_cast<int64_t>(layer), head);
    }
  }

  const int64_t* src = static_cast<const int64_t*>(src_slots.const_data_ptr());
  const int64_t* dst = static_cast<const int64_t*>(dst_slots.const_data_ptr());
  const int64_t num_slots = fewest_blocks * block_size;
  std::vector<Move> moves;
  for (int64_t j = 0; j < src_slots.size(0); ++j) {
    if (src[j] < 0 || dst[j] < 0) continue;
    check(src[j] < num_slots && dst[j] < num_slots, kOp, ": move ", j, " from slot ", src[j],
          " to slot ", dst[j], " is outside the ", num_slots, " slots of the cache");
    if (src[j] == dst[j]) continue;
    moves.push_back({src[j] / block_size, dst[j] / block_size,
                     static_cast<int>(src[j] % block_size), static_cast<int>(dst[j] % block_size)});
  }
  if (moves.empty()) return;

  const int64_t elements = elements_per_move * static_cast<int64_t>(moves.size());
  for_each_task(static_cast<int64_t>(tasks.size()), elements >= kMinParallelElements,
                [&](int64_t t) {
                  const auto [layer, head] = tasks[t];
                  const Tensor& cache = kv_caches[layer];
                  switch (cache.element_size()) {
                    case 1:
                      return move_head_of<uint8_t>(cache, head, shapes[layer], layout, moves);
                    case 2:
                      return move_head_of<uint16_t>(cache, head, shapes[layer], layout, moves);
                    default:
                      return move_head_of<uint32_t>(cache, head, shapes[layer], layout, moves);
                  }
                });
}

}  // namespace echo_vllm::cpu
