// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
//
// The tensor-core kernel of tree_attention for one head size; tree_attention_*.cu instantiate it.
//
// A block takes one tile of lines (rows x the q heads of one kv head, packed) and one split of the
// request's keys. K and V come in tiles of kKeys, copied asynchronously into one of two stages
// while the other is multiplied. Warps share the lines (kWarpsM) or the keys of a tile (kWarpsN);
// each keeps the state of its own online softmax, and the block merges them at the end.
//
// A cache of 8-bit floats arrives as it is, in half the bytes, and each tile is widened to 16 bits,
// which is exact, before it is multiplied. Its scales apply to scores and results: K's to the
// scores of context keys, V's to the result, with the suffix's weights divided by it.
//
// Memory that no line may see is not read: a tile's keys before the window, behind the last key,
// and suffix rows that no line of the tile sees are filled with zeros.
#pragma once

#include <type_traits>

#include "../common/ragged_tiles.h"
#include "../common/tree_mask.h"
#include "device.cuh"
#include "kernels.h"

namespace echo_vllm::cuda {

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kMinusInfinity = -__builtin_huge_valf();

// The state of one line's online softmax, in units of log2.
struct SoftmaxState {
  float max, sum;
};

// What a state's numbers are multiplied with when `max` becomes the maximum.
__device__ __forceinline__ float rescale(float own_max, float max) {
  return own_max == kMinusInfinity ? 0.0f : exp2_fast(own_max - max);
}

// The keys of one tile of lines, and where its rows lie.
struct TileView {
  LineTile lines;
  int kv_head, group;
  int query_row, mask_row;  // of the request's first row
  int context, num_keys;
  int first_key;  // no line of the tile sees an earlier one
  int splits;     // parts that the keys are cut into
  int first_key_tile, num_key_tiles;

  __device__ int row_of(int line) const { return (lines.first_line + line) / group; }
  __device__ int head_of(int line) const {
    return kv_head * group + (lines.first_line + line) % group;
  }
};

// The first context token that a row sees.
__device__ __forceinline__ int first_visible(const TreeAttentionArgs& args, int query_row,
                                             int context) {
  if (args.sliding_window <= 0) return 0;
  const int64_t first = args.positions[query_row] - args.sliding_window + 1;
  return static_cast<int>(first < 0 ? 0 : first < context ? first : context);
}

// Called by whole warps.
__device__ inline TileView view_tile(const TreeAttentionArgs& args, const AttentionPlan& plan,
                                     int tile_lines, int tile_keys, int64_t tile, int kv_head) {
  TileView view;
  view.group = args.num_heads / args.num_kv_heads;
  view.kv_head = kv_head;
  view.lines = find_tile(args.row_start, plan.num_requests, view.group, tile_lines, tile);
  if (view.lines.num_lines == 0) return view;
  const int request = view.lines.request;
  view.query_row = args.query_start[request];
  view.mask_row = args.row_start[request];
  view.context = context_of(args, request);
  view.num_keys = view.context + args.suffix_len[request];
  view.first_key = 0;
  if (args.sliding_window > 0) {
    int first = view.context;
    const int last_row = view.row_of(view.lines.num_lines - 1);
    for (int row = view.row_of(0) + static_cast<int>(threadIdx.x) % kWarpSize; row <= last_row;
         row += kWarpSize) {
      first = min(first, first_visible(args, view.query_row + row, view.context));
    }
    view.first_key = warp_min(first);
  }
  view.first_key_tile = view.first_key / tile_keys;
  view.num_key_tiles = (view.num_keys + tile_keys - 1) / tile_keys - view.first_key_tile;
  view.splits = num_splits_of(view.num_key_tiles, plan.max_splits);
  return view;
}

// Bit i: the row sees key first + i. `low` is its first visible context token.
__device__ __forceinline__ uint64_t visible_keys(const uint64_t* mask_row, int suffix_len,
                                                 int context, int low, int first) {
  const uint64_t bits = mask_word_at(mask_row, suffix_len, first - context);
  return bits | bit_range(max(0, min(kBitsPerWord, low - first)),
                          max(0, min(kBitsPerWord, context - first)));
}

// Where a line's partial result lies: [split, mask row, q head].
__device__ __forceinline__ int64_t partial_index(const AttentionPlan& plan,
                                                 const TreeAttentionArgs& args, int split,
                                                 int64_t row, int head) {
  return (split * plan.num_rows + row) * args.num_heads + head;
}

// A request whose keys were not cut goes to `out`, any other to the partial results.
// `acc` holds four neighbouring dims from `dim` on.
template <class T>
__device__ __forceinline__ void store_line(const TreeAttentionArgs& args, const AttentionPlan& plan,
                                           const TileView& view, int line, int split, int dim,
                                           const float (&acc)[4], SoftmaxState state) {
  const int row = view.row_of(line), head = view.head_of(line);
  if (view.splits > 1) {
    const int64_t index =
        partial_index(plan, args, split, view.mask_row - args.row_start[0] + row, head);
    float* to = plan.partial_out + index * args.head_size + dim;
    for (int i = 0; i < 4; ++i) to[i] = acc[i];
    if (dim == 0) {
      plan.partial_ml[2 * index] = state.max;
      plan.partial_ml[2 * index + 1] = state.sum;
    }
    return;
  }
  const float factor = state.sum > 0.0f ? 1.0f / state.sum : 0.0f;
  if (args.lse != nullptr && dim == 0) {
    constexpr float kLn2 = 0.693147180559945309f;
    args.lse[head * args.lse_stride_head + view.query_row + row] =
        state.sum > 0.0f ? state.max * kLn2 + logf(state.sum) : kMinusInfinity;
  }
  T* to = static_cast<T*>(args.out) + (view.query_row + row) * args.out_stride_row +
          head * args.out_stride_head + dim;
  for (int i = 0; i < 4; ++i) to[i] = from_float<T>(acc[i] * factor);
}

template <class T_, int kHeadSize_, int kWarpsM_, int kWarpsN_, bool kFp8_ = false>
struct MmaTraits {
  using T = T_;
  static constexpr int kHeadSize = kHeadSize_, kWarpsM = kWarpsM_, kWarpsN = kWarpsN_;
  static constexpr bool kFp8 = kFp8_;  // the cache's numbers
  static constexpr int kThreads = kWarpSize * kWarpsM * kWarpsN;
  static constexpr int kLines = 16 * kWarpsM;
  static constexpr int kKeys = kHeadSize > 128 && kWarpsN == 1 ? 32 : 64;
  static constexpr int kWarpKeys = kKeys / kWarpsN;
  // A row of K, V or Q is cut into chunks of 16 bytes, which are stored in an order that changes
  // from row to row: then eight rows of one chunk column lie in different banks.
  static constexpr int kChunks = kHeadSize / 8;
  static constexpr int kTileBytes = kKeys * kHeadSize * 2;
  static constexpr int kStageBytes = 2 * kTileBytes;  // K and V
  // Two stages; or one, and two of 8-bit numbers from which it is filled.
  static constexpr int kNarrowTileBytes = kTileBytes / 2;
  static constexpr int kStagesBytes = kFp8 ? kStageBytes + 4 * kNarrowTileBytes : 2 * kStageBytes;
  // A wide head's Q would not fit the registers beside the accumulators.
  static constexpr bool kQueryInRegisters = kHeadSize <= 128;
  static constexpr int kQueryBytes = kLines * kHeadSize * 2;
  // On its way to the registers Q lies where nothing else is yet.
  static constexpr int kQueryOffset = !kQueryInRegisters ? kStagesBytes : kFp8 ? 0 : kStageBytes;
  static constexpr int kLoopBytes = kStagesBytes + (kQueryInRegisters ? 0 : kQueryBytes);
  // The merge at the end uses the same memory: floats, padded against bank conflicts.
  static constexpr int kPitch = kHeadSize + 8;
  static constexpr int kMergeBytes = kWarpsN * kLines * (kPitch + 2) * 4;
  static constexpr int kTileSharedBytes = kLoopBytes > kMergeBytes ? kLoopBytes : kMergeBytes;
  static_assert(kQueryBytes <= kStageBytes && kWarpKeys % 16 == 0 && kChunks % 4 == 0);

  // Byte offset of a chunk in a tile of rows.
  __device__ static __forceinline__ int chunk_offset(int row, int chunk) {
    const int swizzled = kChunks % 8 == 0 ? chunk ^ (row & 7) : chunk ^ (row >> 1 & 3);
    return (row * kChunks + swizzled) * 16;
  }
};

// One block a multiprocessor: registers matter more here than occupancy.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    tree_attention_mma_kernel(const __grid_constant__ TreeAttentionArgs args,
                              const __grid_constant__ AttentionPlan plan) {
  using T = typename Traits::T;
  constexpr int kHeadSize = Traits::kHeadSize, kKeys = Traits::kKeys, kChunks = Traits::kChunks;
  constexpr int kThreads = Traits::kThreads, kWarpKeys = Traits::kWarpKeys;

  const TileView view = view_tile(args, plan, Traits::kLines, kKeys, blockIdx.x, blockIdx.z);
  const int split = blockIdx.y;
  if (view.lines.num_lines == 0 || split >= view.splits) return;
  const int request = view.lines.request, context = view.context;
  const int suffix_start = args.suffix_start[request], suffix_len = view.num_keys - context;
  const int begin_tile = view.first_key_tile + split_begin(view.num_key_tiles, view.splits, split);
  const int end_tile =
      view.first_key_tile + split_begin(view.num_key_tiles, view.splits, split + 1);
  const int thread = threadIdx.x, lane = thread % kWarpSize, warp = thread / kWarpSize;
  const int warp_m = warp % Traits::kWarpsM, warp_n = warp / Traits::kWarpsM;
  const uint64_t* mask = reinterpret_cast<const uint64_t*>(args.mask) +
                         static_cast<int64_t>(view.mask_row) * args.mask_words;

  unsigned char* shared = shared_memory();
  // Per suffix row, whether any line of the tile sees it.
  uint64_t* any_visible = reinterpret_cast<uint64_t*>(shared + Traits::kTileSharedBytes);
  const int words = words_for_bits(suffix_len);
  for (int word = thread; word < words; word += kThreads) any_visible[word] = 0;
  __syncthreads();
  const int first_row = view.row_of(0), num_rows = view.row_of(view.lines.num_lines - 1) + 1;
  for (int i = thread; i < (num_rows - first_row) * words; i += kThreads) {
    atomic_or_shared(any_visible + i % words,
                     mask[(first_row + i / words) * args.mask_words + i % words]);
  }

  // Q, then the first tile of K and V, in two groups of copies.
  const T* query = static_cast<const T*>(args.query);
  unsigned char* shared_query = shared + Traits::kQueryOffset;
  for (int i = thread; i < Traits::kLines * kChunks; i += kThreads) {
    const int line = i / kChunks, chunk = i % kChunks;
    const bool exists = line < view.lines.num_lines;
    const int64_t row = view.query_row + (exists ? view.row_of(line) : 0);
    const int64_t head = exists ? view.head_of(line) : 0;
    copy_async(shared_query + Traits::chunk_offset(line, chunk),
               query + row * args.query_stride_row + head * args.query_stride_head + chunk * 8,
               exists);
  }
  commit_copies();
  __syncthreads();  // any_visible is complete

  using C = std::conditional_t<Traits::kFp8, Float8, T>;
  const C* key_cache = static_cast<const C*>(args.key_cache) + view.kv_head * args.key_strides.head;
  const C* value_cache =
      static_cast<const C*>(args.value_cache) + view.kv_head * args.value_strides.head;
  const T* suffix_key =
      static_cast<const T*>(args.suffix_key) + view.kv_head * args.suffix_key_stride_head;
  const T* suffix_value =
      static_cast<const T*>(args.suffix_value) + view.kv_head * args.suffix_value_stride_head;
  const int32_t* blocks = args.block_table + request * args.block_table_stride;

  // The context's keys of a tile as they are, into one of the two stages of 8-bit numbers.
  [[maybe_unused]] const auto load_narrow_tile = [&](int tile) {
    constexpr int kNarrowChunks = kHeadSize / 16;
    unsigned char* keys =
        shared + Traits::kStageBytes + (tile - begin_tile) % 2 * (2 * Traits::kNarrowTileBytes);
    unsigned char* values = keys + Traits::kNarrowTileBytes;
#pragma unroll(kHeadSize > 128 ? 1 : 4)
    for (int i = thread; i < kKeys * kNarrowChunks; i += kThreads) {
      const int in_tile = i / kNarrowChunks, chunk = i % kNarrowChunks;
      const int key = tile * kKeys + in_tile;
      const bool exists = key >= view.first_key && key < context;
      const void *from_key = query, *from_value = query;  // not read unless `exists`
      if (exists) {
        const int64_t block = blocks[key / args.block_size];
        const int token = key % args.block_size;
        from_key = key_cache + block * args.key_strides.block + token * args.key_strides.token +
                   chunk * 16;
        from_value = value_cache + block * args.value_strides.block +
                     token * args.value_strides.token + chunk * 16;
      }
      copy_async(keys + i * 16, from_key, exists);
      copy_async(values + i * 16, from_value, exists);
    }
  };
  // Fills the stage of 16-bit numbers from it, and from the suffix, which is of 16 bits anyway.
  [[maybe_unused]] const auto widen_tile = [&](int tile) {
    const unsigned char* narrow_keys =
        shared + Traits::kStageBytes + (tile - begin_tile) % 2 * (2 * Traits::kNarrowTileBytes);
    const unsigned char* narrow_values = narrow_keys + Traits::kNarrowTileBytes;
#pragma unroll(kHeadSize > 128 ? 1 : 2)
    for (int i = thread; i < kKeys * kChunks; i += kThreads) {
      const int in_tile = i / kChunks, chunk = i % kChunks;
      const int suffix_row = tile * kKeys + in_tile - context;
      uint4 key{0, 0, 0, 0}, value{0, 0, 0, 0};
      if (suffix_row < 0) {
        key = widen_e4m3<T>(narrow_keys + i * 8);
        value = widen_e4m3<T>(narrow_values + i * 8);
      } else if (suffix_row < suffix_len && test_mask_bit(any_visible, suffix_row)) {
        const int64_t row = suffix_start + suffix_row;
        key = *reinterpret_cast<const uint4*>(suffix_key + row * args.suffix_key_stride_row +
                                              chunk * 8);
        value = *reinterpret_cast<const uint4*>(suffix_value + row * args.suffix_value_stride_row +
                                                chunk * 8);
      }
      unsigned char* to = shared + Traits::chunk_offset(in_tile, chunk);
      *reinterpret_cast<uint4*>(to) = key;
      *reinterpret_cast<uint4*>(to + Traits::kTileBytes) = value;
    }
  };
  [[maybe_unused]] const auto load_wide_tile = [&](int tile) {
    unsigned char* keys = shared + (tile - begin_tile) % 2 * Traits::kStageBytes;
    unsigned char* values = keys + Traits::kTileBytes;
    // Few copies at a time: their addresses compete with the accumulators for registers.
#pragma unroll(kHeadSize > 128 ? 1 : 4)
    for (int i = thread; i < kKeys * kChunks; i += kThreads) {
      const int in_tile = i / kChunks, chunk = i % kChunks;
      const int key = tile * kKeys + in_tile;
      const void *from_key = query, *from_value = query;  // not read unless `exists`
      bool exists = false;
      if (key < context) {
        if (key >= view.first_key) {
          const int64_t block = blocks[key / args.block_size];
          const int token = key % args.block_size;
          from_key = key_cache + block * args.key_strides.block + token * args.key_strides.token +
                     chunk * 8;
          from_value = value_cache + block * args.value_strides.block +
                       token * args.value_strides.token + chunk * 8;
          exists = true;
        }
      } else if (key < view.num_keys && test_mask_bit(any_visible, key - context)) {
        const int64_t row = suffix_start + key - context;
        from_key = suffix_key + row * args.suffix_key_stride_row + chunk * 8;
        from_value = suffix_value + row * args.suffix_value_stride_row + chunk * 8;
        exists = true;
      }
      const int offset = Traits::chunk_offset(in_tile, chunk);
      copy_async(keys + offset, from_key, exists);
      copy_async(values + offset, from_value, exists);
    }
  };
  const auto load_tile = [&](int tile) {
    if constexpr (Traits::kFp8) {
      load_narrow_tile(tile);
    } else {
      load_wide_tile(tile);
    }
  };
  if (begin_tile < end_tile) load_tile(begin_tile);
  commit_copies();

  // Row and chunk that this lane addresses in load_matrices: matrices 0, 1 are one above the other
  // for Q and V, side by side for K.
  const int upper = lane % 8 + lane / 8 % 2 * 8, upper_chunk = lane / 16;
  const int side = lane % 8 + lane / 16 * 8, side_chunk = lane / 8 % 2;
  const auto load_query = [&](uint32_t (&fragment)[4], int step) {
    load_matrices(fragment,
                  shared_query + Traits::chunk_offset(warp_m * 16 + upper, 2 * step + upper_chunk));
  };
  wait_copies<1>();
  __syncthreads();
  uint32_t held_query[Traits::kQueryInRegisters ? kHeadSize / 16 : 1][4];
  if constexpr (Traits::kQueryInRegisters) {
#pragma unroll
    for (int step = 0; step < kHeadSize / 16; ++step) load_query(held_query[step], step);
  }

  // The two lines of which this lane holds scores.
  int low[2];
  const uint64_t* mask_of_line[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int line = warp_m * 16 + lane / 4 + 8 * i;
    const int row = view.row_of(min(line, view.lines.num_lines - 1));
    low[i] = first_visible(args, view.query_row + row, context);
    mask_of_line[i] = mask + row * args.mask_words;
  }
  const bool capped = args.softcap > 0.0f;
  const float to_log2 = (capped ? args.softcap : args.scale) * kLog2E;
  const float before_cap = capped ? args.scale / args.softcap : 0.0f;

  [[maybe_unused]] const float suffix_weight = 1.0f / args.value_scale;

  float acc[kHeadSize / 8][4] = {};
  float row_max[2] = {kMinusInfinity, kMinusInfinity}, row_sum[2] = {0.0f, 0.0f};

  for (int tile = begin_tile; tile < end_tile; ++tile) {
    wait_copies<0>();
    __syncthreads();  // the tile is there, and no warp still reads the other stage
    if (tile + 1 < end_tile) load_tile(tile + 1);
    commit_copies();
    if constexpr (Traits::kFp8) {
      widen_tile(tile);
      __syncthreads();
    }
    const unsigned char* keys =
        shared + (Traits::kFp8 ? 0 : (tile - begin_tile) % 2 * Traits::kStageBytes);
    const unsigned char* values = keys + Traits::kTileBytes;

    float scores[kWarpKeys / 8][4] = {};
    // Of a wide head not all loads at once: they would wait in registers that the accumulators
    // need.
#pragma unroll(kHeadSize > 128 ? 4 : kHeadSize / 16)
    for (int step = 0; step < kHeadSize / 16; ++step) {
      uint32_t loaded[4];
      if constexpr (!Traits::kQueryInRegisters) load_query(loaded, step);
      const uint32_t (&q)[4] = Traits::kQueryInRegisters ? held_query[step] : loaded;
#pragma unroll
      for (int pair = 0; pair < kWarpKeys / 16; ++pair) {
        uint32_t k[4];
        load_matrices(k, keys + Traits::chunk_offset(warp_n * kWarpKeys + pair * 16 + side,
                                                     2 * step + side_chunk));
        multiply_add<T>(scores[2 * pair], q, k[0], k[1]);
        multiply_add<T>(scores[2 * pair + 1], q, k[2], k[3]);
      }
    }

    const int first_key = tile * kKeys + warp_n * kWarpKeys;
    const bool masked = args.sliding_window > 0 || first_key + kWarpKeys > context;
    uint64_t visible[2] = {~uint64_t{0}, ~uint64_t{0}};
    if (masked) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        visible[i] = visible_keys(mask_of_line[i], suffix_len, context, low[i], first_key);
      }
    }
    float tile_max[2] = {kMinusInfinity, kMinusInfinity};
#pragma unroll
    for (int n = 0; n < kWarpKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float score = scores[n][i];
        if constexpr (Traits::kFp8) {
          if (first_key + n * 8 + lane % 4 * 2 + i % 2 < context) score *= args.key_scale;
        }
        if (capped) score = tanhf(score * before_cap);
        score *= to_log2;
        if (masked && (visible[i / 2] >> (n * 8 + lane % 4 * 2 + i % 2) & 1) == 0) {
          score = kMinusInfinity;
        }
        scores[n][i] = score;
        tile_max[i / 2] = fmaxf(tile_max[i / 2], score);
      }
    }
    float shift[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float max = fmaxf(row_max[i], tile_max[i]);
      max = fmaxf(max, shuffle_xor(max, 1));
      max = fmaxf(max, shuffle_xor(max, 2));
      const float factor = rescale(row_max[i], max);
      row_max[i] = max;
      row_sum[i] *= factor;
      shift[i] = max == kMinusInfinity ? 0.0f : max;
#pragma unroll
      for (int n = 0; n < kHeadSize / 8; ++n) {
        acc[n][2 * i] *= factor;
        acc[n][2 * i + 1] *= factor;
      }
    }
#pragma unroll
    for (int step = 0; step < kWarpKeys / 16; ++step) {
      // The accumulators of two neighbouring score tiles are the A operand of the next product.
      uint32_t p[4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float (&s)[4] = scores[2 * step + half];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          s[i] = exp2_fast(s[i] - shift[i / 2]);
          row_sum[i / 2] += s[i];
          if constexpr (Traits::kFp8) {
            const int key = first_key + (2 * step + half) * 8 + lane % 4 * 2 + i % 2;
            if (key >= context) s[i] *= suffix_weight;
          }
        }
        p[2 * half] = pack<T>(s[0], s[1]);
        p[2 * half + 1] = pack<T>(s[2], s[3]);
      }
#pragma unroll
      for (int pair = 0; pair < kHeadSize / 16; ++pair) {
        uint32_t v[4];
        load_matrices_transposed(
            v, values + Traits::chunk_offset(warp_n * kWarpKeys + step * 16 + upper,
                                             2 * pair + upper_chunk));
        multiply_add<T>(acc[2 * pair], p, v[0], v[1]);
        multiply_add<T>(acc[2 * pair + 1], p, v[2], v[3]);
      }
    }
  }

  // Each warp lays down its part; then the block merges line by line.
  wait_copies<0>();
  __syncthreads();
  float* parts = reinterpret_cast<float*>(shared);  // [kWarpsN, kLines, kPitch]
  float* states = parts + Traits::kWarpsN * Traits::kLines * Traits::kPitch;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float sum = row_sum[i];
    sum += shuffle_xor(sum, 1);
    sum += shuffle_xor(sum, 2);
    const int line = warp_n * Traits::kLines + warp_m * 16 + lane / 4 + 8 * i;
    if (lane % 4 == 0) {
      states[2 * line] = row_max[i];
      states[2 * line + 1] = sum;
    }
#pragma unroll
    for (int n = 0; n < kHeadSize / 8; ++n) {
      float* to = parts + line * Traits::kPitch + n * 8 + lane % 4 * 2;
      const float unit = Traits::kFp8 ? args.value_scale : 1.0f;
      to[0] = acc[n][2 * i] * unit;
      to[1] = acc[n][2 * i + 1] * unit;
    }
  }
  __syncthreads();
  for (int i = thread; i < view.lines.num_lines * (kHeadSize / 4); i += kThreads) {
    const int line = i / (kHeadSize / 4), dim = i % (kHeadSize / 4) * 4;
    SoftmaxState merged{kMinusInfinity, 0.0f};
#pragma unroll
    for (int part = 0; part < Traits::kWarpsN; ++part) {
      merged.max = fmaxf(merged.max, states[2 * (part * Traits::kLines + line)]);
    }
    float sums[4] = {};
#pragma unroll
    for (int part = 0; part < Traits::kWarpsN; ++part) {
      const int from = part * Traits::kLines + line;
      const float factor = rescale(states[2 * from], merged.max);
      merged.sum += factor * states[2 * from + 1];
      for (int d = 0; d < 4; ++d) sums[d] += factor * parts[from * Traits::kPitch + dim + d];
    }
    store_line<T>(args, plan, view, line, split, dim, sums, merged);
  }
}

template <class Traits>
cudaError_t launch_mma(const TreeAttentionArgs& args, const AttentionPlan& plan,
                       cudaStream_t stream) {
  const int group = args.num_heads / args.num_kv_heads;
  const dim3 grid(
      static_cast<unsigned>(max_tiles(plan.num_rows, plan.num_requests, group, Traits::kLines)),
      plan.max_splits, args.num_kv_heads);
  const size_t bytes = Traits::kTileSharedBytes + args.mask_words * sizeof(uint64_t);
  return launch(tree_attention_mma_kernel<Traits>, grid, dim3(Traits::kThreads), bytes, stream,
                args, plan);
}

template <class T, int kHeadSize, bool kFp8>
cudaError_t launch_mma_of_dtype(const TreeAttentionArgs& args, const AttentionPlan& plan,
                                cudaStream_t stream) {
  return plan.kernel == AttentionKernel::kFewLines
             ? launch_mma<MmaTraits<T, kHeadSize, 1, 4, kFp8>>(args, plan, stream)
             : launch_mma<MmaTraits<T, kHeadSize, 4, 1, kFp8>>(args, plan, stream);
}

template <int kHeadSize, bool kFp8>
cudaError_t launch_mma_of_head_size(const TreeAttentionArgs& args, const AttentionPlan& plan,
                                    cudaStream_t stream) {
  return args.dtype == Dtype::kBFloat16
             ? launch_mma_of_dtype<BFloat16, kHeadSize, kFp8>(args, plan, stream)
             : launch_mma_of_dtype<Float16, kHeadSize, kFp8>(args, plan, stream);
}

// One instantiation a file, so that they compile side by side.
#define ECHO_MMA_OF_HEAD_SIZE(kHeadSize, kFp8)                   \
  template cudaError_t launch_mma_of_head_size<kHeadSize, kFp8>( \
      const TreeAttentionArgs&, const AttentionPlan&, cudaStream_t)

extern ECHO_MMA_OF_HEAD_SIZE(64, false);
extern ECHO_MMA_OF_HEAD_SIZE(96, false);
extern ECHO_MMA_OF_HEAD_SIZE(128, false);
extern ECHO_MMA_OF_HEAD_SIZE(256, false);
extern ECHO_MMA_OF_HEAD_SIZE(64, true);
extern ECHO_MMA_OF_HEAD_SIZE(128, true);
extern ECHO_MMA_OF_HEAD_SIZE(256, true);

}  // namespace echo_vllm::cuda
