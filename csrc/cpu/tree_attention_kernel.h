// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
//
// Tree attention of one (request, kv head): all rows and all q heads of the kv group against each
// tile of keys, so that K and V are read once. The softmax is online: per row a running maximum,
// a running sum and the running weighted values. This file is compiled once per instruction set.
//
// A "line" below is one (row, q head in the kv group); line = row * group size + head in group.
#pragma once

#include "../common/tree_mask.h"
#include "gemm.h"
#include "simd.h"
#include "tree_attention.h"

namespace echo_vllm::cpu {
namespace {

static_assert(kTileKeys == kBitsPerWord);
// Lines handled per tile at a time, so that their scores stay in the L1 cache.
constexpr int kLineChunk = 48;
constexpr float kMinusInfinity = -__builtin_inff();
// From this many lines on it pays to convert a tile of 16-bit K and V to fp32 once.
constexpr int kLinesToConvert = 16;

ECHO_INLINE int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }
ECHO_INLINE int min_int(int a, int b) { return a < b ? a : b; }
ECHO_INLINE int max_int(int a, int b) { return a > b ? a : b; }
ECHO_INLINE int64_t round_up_to_cache_line(int64_t floats) { return (floats + 15) / 16 * 16; }

struct Scratch {
  float* query;    // [lines, D]
  float* weighted; // [lines, D]: sum of exp(score - max) * V
  float* row_max;  // [lines]
  float* row_sum;  // [lines]
  float* scores;   // [kLineChunk, kTileKeys]
  float* keys;     // [D, kTileKeys]: a converted tile of K, transposed
  float* values;   // [kTileKeys, D]: a converted tile of V
};

ECHO_INLINE int64_t carve(const TreeAttentionArgs& args, int64_t lines, float* base, Scratch* s) {
  int64_t used = 0;
  const auto take = [&](int64_t floats) {
    float* p = base + used;
    used += round_up_to_cache_line(floats);
    return p;
  };
  s->query = take(lines * args.head_size);
  s->weighted = take(lines * args.head_size);
  s->row_max = take(lines);
  s->row_sum = take(lines);
  s->scores = take(static_cast<int64_t>(kLineChunk) * kTileKeys);
  s->keys = take(static_cast<int64_t>(args.head_size) * kTileKeys);
  s->values = take(static_cast<int64_t>(kTileKeys) * args.head_size);
  return used;
}

int64_t scratch_size(const TreeAttentionArgs& args, int64_t lines) {
  Scratch s;
  return carve(args, lines, nullptr, &s);
}

// A run of keys of a tile that is contiguous in memory. key is the transposed K, [D, ...], with
// row stride key_stride; value is [count, D] with row stride value_stride.
template <class T>
struct Piece {
  const T* key;
  const T* value;
  int64_t key_stride, value_stride;
  int column, count;
};

template <class T>
class Worker {
 public:
  Worker(const TreeAttentionArgs& args, int request, int kv_head, float* scratch)
      : args_(args), request_(request), kv_head_(kv_head) {
    group_ = args.num_heads / args.num_kv_heads;
    first_mask_row_ = args.row_start[request];
    rows_ = args.row_start[request + 1] - first_mask_row_;
    first_row_ = args.query_start[request];
    lines_ = rows_ * group_;
    carve(args, lines_, scratch, &s_);
  }

  void run(const TreeAttentionTask& task) {
    pack_query();
    for (int i = 0; i < lines_; ++i) {
      s_.row_max[i] = kMinusInfinity;
      s_.row_sum[i] = 0.0f;
    }
    std::memset(s_.weighted, 0, sizeof(float) * static_cast<int64_t>(lines_) * args_.head_size);
    for (int begin = task.context_begin; begin < task.context_end; begin += kTileKeys) {
      context_tile(begin, min_int(begin + kTileKeys, task.context_end));
    }
    if (task.with_suffix) {
      const int length = args_.suffix_len[request_];
      for (int begin = 0; begin < length; begin += kTileKeys) {
        suffix_tile(begin, min_int(begin + kTileKeys, length));
      }
    }
    if (task.partial != nullptr) {
      std::memcpy(task.partial, s_.row_max, sizeof(float) * lines_);
      std::memcpy(task.partial + lines_, s_.row_sum, sizeof(float) * lines_);
      std::memcpy(task.partial + 2 * static_cast<int64_t>(lines_), s_.weighted,
                  sizeof(float) * static_cast<int64_t>(lines_) * args_.head_size);
    } else {
      write_output();
    }
  }

  void merge(const float* partials, int64_t count, int64_t stride) {
    const int head_size = args_.head_size;
    for (int line = 0; line < lines_; ++line) {
      float maximum = kMinusInfinity;
      for (int64_t p = 0; p < count; ++p) {
        const float m = partials[p * stride + line];
        maximum = m > maximum ? m : maximum;
      }
      float sum = 0.0f;
      float* weighted = s_.weighted + static_cast<int64_t>(line) * head_size;
      for (int d = 0; d < head_size; d += kLanes) store(weighted + d, Vec{});
      for (int64_t p = 0; p < count; ++p) {
        const float* partial = partials + p * stride;
        if (partial[line] == kMinusInfinity) continue;
        const float factor = exp(splat(partial[line] - maximum))[0];
        sum += factor * partial[lines_ + line];
        const float* source =
            partial + 2 * static_cast<int64_t>(lines_) + static_cast<int64_t>(line) * head_size;
        for (int d = 0; d < head_size; d += kLanes) {
          store(weighted + d, load(weighted + d) + splat(factor) * load(source + d));
        }
      }
      s_.row_sum[line] = sum;
    }
    write_output();
  }

 private:
  void pack_query() {
    const T* query = static_cast<const T*>(args_.query);
    for (int row = 0; row < rows_; ++row) {
      for (int g = 0; g < group_; ++g) {
        const T* source = query + (first_row_ + row) * args_.query_stride_row +
                          (kv_head_ * group_ + g) * args_.query_stride_head;
        float* target = s_.query + static_cast<int64_t>(row * group_ + g) * args_.head_size;
        for (int d = 0; d < args_.head_size; d += kLanes) store(target + d, load(source + d));
      }
    }
  }

  // Rows that may see nothing at all (no context, empty mask) give zeros.
  void write_output() {
    T* out = static_cast<T*>(args_.out);
    for (int row = 0; row < rows_; ++row) {
      for (int g = 0; g < group_; ++g) {
        const int line = row * group_ + g;
        const float sum = s_.row_sum[line];
        const Vec factor = splat(sum > 0.0f ? 1.0f / sum : 0.0f);
        const float* source = s_.weighted + static_cast<int64_t>(line) * args_.head_size;
        T* target = out + (first_row_ + row) * args_.out_stride_row +
                    (kv_head_ * group_ + g) * args_.out_stride_head;
        for (int d = 0; d < args_.head_size; d += kLanes) {
          store(target + d, load(source + d) * factor);
        }
      }
    }
  }

  int64_t window_begin(int row) const {
    const int64_t begin = args_.positions[first_row_ + row] - args_.sliding_window + 1;
    return begin > 0 ? begin : 0;
  }

  void context_tile(int begin, int end) {
    const int count = end - begin;
    uint64_t seen = 0;  // by any row
    for (int row = 0; row < rows_; ++row) seen |= visible_context(row, begin, count);
    if (seen == 0) return;

    Piece<T> pieces[kTileKeys];
    int num_pieces = 0;
    const int block_size = args_.block_size;
    const T* key_cache = static_cast<const T*>(args_.key_cache);
    const T* value_cache = static_cast<const T*>(args_.value_cache);
    const int32_t* blocks = args_.block_table + request_ * args_.block_table_stride;
    for (int token = begin; token < end;) {
      const int offset = token % block_size;
      const int64_t block = blocks[token / block_size];
      const int piece = min_int(end - token, block_size - offset);
      const T* key = key_cache + block * args_.key_strides.block +
                     kv_head_ * args_.key_strides.head;
      const T* value = value_cache + block * args_.value_strides.block +
                       kv_head_ * args_.value_strides.head;
      Piece<T>& p = pieces[num_pieces++];
      p.column = token - begin;
      p.count = piece;
      if (args_.layout == KvLayout::kVec) {
        p.key = key + offset;
        p.key_stride = block_size;
        p.value = value + static_cast<int64_t>(offset) * args_.head_size;
        p.value_stride = args_.head_size;
      } else if (args_.layout == KvLayout::kNhd) {
        p.value = value + offset * args_.value_strides.token;
        p.value_stride = args_.value_strides.token;
        transpose_keys(key + offset * args_.key_strides.token, args_.key_strides.token, p.column,
                       piece);
      } else {
        unpack_amx(key, value, offset, p.column, piece);
      }
      token += piece;
    }

    const auto visible = [&](int row) { return visible_context(row, begin, count); };
    const bool convert = sizeof(T) < sizeof(float) && lines_ >= kLinesToConvert;
    // Keys outside a window carry weight zero but may hold anything (their blocks may have been
    // given away), so V is read from the first visible key on.
    const int first = __builtin_ctzll(seen);
    if (args_.layout == KvLayout::kVec && !convert) {
      attend(pieces, num_pieces, first, count, visible);
      return;
    }
    if (args_.layout == KvLayout::kVec) {
      for (int i = 0; i < num_pieces; ++i) convert_keys(pieces[i]);
    }
    if (args_.layout != KvLayout::kAmx) {
      if (!convert) {
        // V is row-major: only K was rearranged.
        attend_converted_keys(pieces, num_pieces, first, count, visible);
        return;
      }
      for (int i = 0; i < num_pieces; ++i) convert_values(pieces[i], ~uint64_t{0});
    }
    attend_converted(first, count, visible);
  }

  void suffix_tile(int begin, int end) {
    const int count = end - begin;
    uint64_t seen = 0;
    for (int row = 0; row < rows_; ++row) seen |= visible_suffix(row, begin, count);
    if (seen == 0) return;
    const int64_t row = args_.suffix_start[request_] + begin;
    const T* key = static_cast<const T*>(args_.suffix_key) + row * args_.suffix_key_stride_row +
                   kv_head_ * args_.suffix_key_stride_head;
    transpose_keys(key, args_.suffix_key_stride_row, 0, count);
    Piece<T> piece;
    piece.value = static_cast<const T*>(args_.suffix_value) +
                  row * args_.suffix_value_stride_row + kv_head_ * args_.suffix_value_stride_head;
    piece.value_stride = args_.suffix_value_stride_row;
    piece.column = 0;
    piece.count = count;
    // Suffix rows that nobody may see can be unwritten memory: they enter as zeros.
    convert_values(piece, seen);
    attend_converted(0, count, [&](int r) { return visible_suffix(r, begin, count); });
  }

  uint64_t visible_context(int row, int begin, int count) const {
    if (args_.sliding_window <= 0) return bit_range(0, count);
    const int64_t hidden = window_begin(row) - begin;
    return bit_range(hidden <= 0 ? 0 : hidden >= count ? count : static_cast<int>(hidden), count);
  }

  uint64_t visible_suffix(int row, int begin, int count) const {
    const int64_t* words = args_.mask + (first_mask_row_ + row) * args_.mask_words;
    return static_cast<uint64_t>(words[begin / kBitsPerWord]) & bit_range(0, count);
  }

  // ---- bringing tiles into fp32 [D, kTileKeys] and [kTileKeys, D] ----

  void transpose_keys(const T* source, int64_t stride, int column, int count) {
    // Leftovers in the padding do not show in the result, but denormal numbers among them would
    // make the product many times slower.
    const int padded = round_up(column + count, kLanes);
    for (int t = column + count; t < padded; ++t) {
      for (int d = 0; d < args_.head_size; ++d) s_.keys[d * kTileKeys + t] = 0.0f;
    }
    for (int t = 0; t < count; ++t) {
      const T* from = source + t * stride;
      float* to = s_.keys + column + t;
      for (int d = 0; d < args_.head_size; ++d) to[d * kTileKeys] = to_float(from[d]);
    }
  }

  // Reads whole vectors: vec blocks hold a multiple of 16 tokens and tiles start at one.
  void convert_keys(const Piece<T>& piece) {
    for (int d = 0; d < args_.head_size; ++d) {
      for (int t = 0; t < piece.count; t += kLanes) {
        store(s_.keys + d * kTileKeys + piece.column + t, load(piece.key + d * piece.key_stride + t));
      }
    }
  }

  void convert_values(const Piece<T>& piece, uint64_t wanted) {
    for (int t = 0; t < piece.count; ++t) {
      float* to = s_.values + static_cast<int64_t>(piece.column + t) * args_.head_size;
      if ((wanted & bit_in_word(piece.column + t)) == 0) {
        for (int d = 0; d < args_.head_size; d += kLanes) store(to + d, Vec{});
        continue;
      }
      const T* from = piece.value + t * piece.value_stride;
      for (int d = 0; d < args_.head_size; d += kLanes) store(to + d, load(from + d));
    }
  }

  // Two bfloat16 of the amx layout, as 32-bit words: the even one is the low half.
  ECHO_INLINE void split_pairs(const T* pairs, float* even, float* odd) {
    UintVec bits;
    std::memcpy(&bits, pairs, sizeof(bits));
    store(even, reinterpret_cast<Vec>(bits << 16));
    store(odd, reinterpret_cast<Vec>(bits & 0xffff0000u));
  }

  // Unpacks whole groups: offset is a multiple of 16, and a block holds a multiple of 32 tokens.
  void unpack_amx(const T* key, const T* value, int offset, int column, int count) {
    const int head_size = args_.head_size;
    const int padded = round_up(count, kAmxTileColumns);
    for (int t = 0; t < padded; t += kAmxTileColumns) {
      for (int d = 0; d < head_size; d += 2) {
        const T* pairs = key + amx_key_offset(head_size, offset + t, d);
        float* even = s_.keys + d * kTileKeys + column + t;
        for (int i = 0; i < kAmxTileColumns; i += kLanes) {
          split_pairs(pairs + 2 * i, even + i, even + kTileKeys + i);
        }
      }
      for (int d = 0; d < head_size; d += kAmxTileColumns) {
        for (int u = t; u < t + kAmxTileColumns; u += 2) {
          const T* pairs = value + amx_value_offset(args_.block_size, offset + u, d);
          float* even = s_.values + static_cast<int64_t>(column + u) * head_size + d;
          for (int i = 0; i < kAmxTileColumns; i += kLanes) {
            split_pairs(pairs + 2 * i, even + i, even + head_size + i);
          }
        }
      }
    }
  }

  // ---- scores, softmax, weighted values ----

  template <class Visible>
  void attend(const Piece<T>* pieces, int num_pieces, int first, int count,
              const Visible& visible) {
    for (int line = 0; line < lines_; line += kLineChunk) {
      const int lines = min_int(kLineChunk, lines_ - line);
      const float* query = s_.query + static_cast<int64_t>(line) * args_.head_size;
      for (int i = 0; i < num_pieces; ++i) {
        const Piece<T>& p = pieces[i];
        gemm<false>(query, args_.head_size, p.key, p.key_stride, s_.scores + p.column, kTileKeys,
                    lines, round_up(p.count, kLanes), args_.head_size);
      }
      softmax(line, lines, count, visible);
      weigh(pieces, num_pieces, line, lines, first);
    }
  }

  template <class Visible>
  void attend_converted_keys(const Piece<T>* pieces, int num_pieces, int first, int count,
                             const Visible& visible) {
    for (int line = 0; line < lines_; line += kLineChunk) {
      const int lines = min_int(kLineChunk, lines_ - line);
      const float* query = s_.query + static_cast<int64_t>(line) * args_.head_size;
      gemm<false>(query, args_.head_size, s_.keys, kTileKeys, s_.scores, kTileKeys, lines,
                  round_up(count, kLanes), args_.head_size);
      softmax(line, lines, count, visible);
      weigh(pieces, num_pieces, line, lines, first);
    }
  }

  template <class Visible>
  void attend_converted(int first, int count, const Visible& visible) {
    for (int line = 0; line < lines_; line += kLineChunk) {
      const int lines = min_int(kLineChunk, lines_ - line);
      const int64_t offset = static_cast<int64_t>(line) * args_.head_size;
      gemm<false>(s_.query + offset, args_.head_size, s_.keys, kTileKeys, s_.scores, kTileKeys,
                  lines, round_up(count, kLanes), args_.head_size);
      softmax(line, lines, count, visible);
      gemm<true>(s_.scores + first, kTileKeys,
                 s_.values + static_cast<int64_t>(first) * args_.head_size, args_.head_size,
                 s_.weighted + offset, args_.head_size, lines, args_.head_size, count - first);
    }
  }

  void weigh(const Piece<T>* pieces, int num_pieces, int line, int lines, int first) {
    float* weighted = s_.weighted + static_cast<int64_t>(line) * args_.head_size;
    for (int i = 0; i < num_pieces; ++i) {
      const Piece<T>& p = pieces[i];
      const int skip = max_int(0, first - p.column);
      if (skip >= p.count) continue;
      gemm<true>(s_.scores + p.column + skip, kTileKeys, p.value + skip * p.value_stride,
                 p.value_stride, weighted, args_.head_size, lines, args_.head_size,
                 p.count - skip);
    }
  }

  // Turns the scores of `count` keys into weights relative to each line's new maximum, and
  // rescales what the line has gathered so far. Columns from `count` to the next multiple of
  // kLanes hold rubbish on entry and zero on return.
  template <class Visible>
  void softmax(int first_line, int lines, int count, const Visible& visible) {
    const int padded = round_up(count, kLanes);
    const uint64_t all = bit_range(0, padded);
    int row = first_line / group_;
    int head = first_line % group_;
    uint64_t bits = visible(row);
    for (int i = 0; i < lines; ++i) {
      float* scores = s_.scores + static_cast<int64_t>(i) * kTileKeys;
      softmax_line(first_line + i, scores, padded, bits, bits == all);
      if (++head == group_ && i + 1 < lines) {
        head = 0;
        bits = visible(++row);
      }
    }
  }

  ECHO_INLINE IntVec lanes_of(uint64_t bits, int column) {
    const UintVec word = splat_bits(static_cast<uint32_t>(bits >> column));
    const UintVec one_bit = splat_bits(1) << reinterpret_cast<UintVec>(lane_index());
    return reinterpret_cast<IntVec>((word & one_bit) != 0);
  }

  void softmax_line(int line, float* scores, int padded, uint64_t bits, bool all_visible) {
    const bool capped = args_.softcap > 0.0f;
    Vec maximum = splat(kMinusInfinity);
    for (int c = 0; c < padded; c += kLanes) {
      Vec score = load(scores + c) * args_.scale;
      if (capped) score = tanh(score / args_.softcap) * args_.softcap;
      if (!all_visible) score = select(lanes_of(bits, c), score, splat(kMinusInfinity));
      store(scores + c, score);
      maximum = max(score, maximum);
    }
    const float old_max = s_.row_max[line];
    const float tile_max = horizontal_max(maximum);
    const float new_max = tile_max > old_max ? tile_max : old_max;
    if (tile_max == kMinusInfinity) {
      for (int c = 0; c < padded; c += kLanes) store(scores + c, Vec{});
      return;
    }
    Vec sum = Vec{};
    for (int c = 0; c < padded; c += kLanes) {
      Vec weight = exp(load(scores + c) - new_max);
      if (!all_visible) weight = select(lanes_of(bits, c), weight, Vec{});
      store(scores + c, weight);
      sum += weight;
    }
    if (new_max == old_max) {
      s_.row_sum[line] += horizontal_sum(sum);
      return;
    }
    const float factor = old_max == kMinusInfinity ? 0.0f : exp(splat(old_max - new_max))[0];
    s_.row_max[line] = new_max;
    s_.row_sum[line] = s_.row_sum[line] * factor + horizontal_sum(sum);
    float* weighted = s_.weighted + static_cast<int64_t>(line) * args_.head_size;
    for (int d = 0; d < args_.head_size; d += kLanes) {
      store(weighted + d, load(weighted + d) * factor);
    }
  }

  const TreeAttentionArgs& args_;
  const int request_, kv_head_;
  int group_, rows_, lines_;
  int64_t first_mask_row_, first_row_;
  Scratch s_;
};

template <class T>
void run_typed(const TreeAttentionArgs& args, const TreeAttentionTask& task, float* scratch) {
  Worker<T>(args, task.request, task.kv_head, scratch).run(task);
}

template <class T>
void merge_typed(const TreeAttentionArgs& args, int request, int kv_head, const float* partials,
                 int64_t count, int64_t stride, float* scratch) {
  Worker<T>(args, request, kv_head, scratch).merge(partials, count, stride);
}

void run(const TreeAttentionArgs& args, const TreeAttentionTask& task, float* scratch) {
  switch (args.dtype) {
    case Dtype::kFloat32:
      return run_typed<float>(args, task, scratch);
    case Dtype::kBFloat16:
      return run_typed<BFloat16>(args, task, scratch);
    case Dtype::kFloat16:
      return run_typed<Float16>(args, task, scratch);
  }
}

void merge(const TreeAttentionArgs& args, int request, int kv_head, const float* partials,
           int64_t count, int64_t stride, float* scratch) {
  switch (args.dtype) {
    case Dtype::kFloat32:
      return merge_typed<float>(args, request, kv_head, partials, count, stride, scratch);
    case Dtype::kBFloat16:
      return merge_typed<BFloat16>(args, request, kv_head, partials, count, stride, scratch);
    case Dtype::kFloat16:
      return merge_typed<Float16>(args, request, kv_head, partials, count, stride, scratch);
  }
}

constexpr TreeAttentionKernel kKernel{scratch_size, run, merge};

}  // namespace
}  // namespace echo_vllm::cpu
