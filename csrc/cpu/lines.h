// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
//
// The online softmax of one (request, kv head), and what each row may see. A "line" is one
// (row, q head of the kv group) pair; line = row * group size + head in group. Per line there is a
// running maximum, a running sum and the running weighted values. Scores are kept times log2(e),
// so that weights are powers of two. Compiled once per instruction set.
#pragma once

#include "../common/tree_mask.h"
#include "simd.h"
#include "tree_attention.h"

namespace echo_vllm::cpu {
namespace {

static_assert(kTaskKeys == kBitsPerWord);

// A tile of keys is what is worked on at a time; each kernel chooses how many of these.
constexpr int kMaxTileWords = 4;
constexpr int kMaxTileKeys = kMaxTileWords * kBitsPerWord;

// Numbers from one row of a [..., keys] buffer to the next: vectors that begin inside a tile may
// end behind it.
ECHO_INLINE constexpr int tile_stride(int keys) { return keys + 16; }

constexpr float kMinusInfinity = -__builtin_inff();

ECHO_INLINE int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }
ECHO_INLINE int min_int(int a, int b) { return a < b ? a : b; }
ECHO_INLINE int max_int(int a, int b) { return a > b ? a : b; }

// Hands out 64-byte aligned pieces of a scratch buffer; with a null base it only counts.
class Carver {
 public:
  explicit Carver(float* base) : base_(base) {}

  float* floats(int64_t count) {
    float* piece = base_ == nullptr ? nullptr : base_ + used_;
    used_ += (count + 15) / 16 * 16;
    return piece;
  }

  int64_t used() const { return used_; }

 private:
  float* base_;
  int64_t used_ = 0;
};

// A bit per key of a tile.
struct KeyBits {
  uint64_t words[kMaxTileWords];

  bool test(int key) const { return test_mask_bit(words, key); }

  bool none(int count) const {
    uint64_t any = 0;
    for (int w = 0; w < words_for_bits(count); ++w) any |= words[w];
    return any == 0;
  }

  bool all(int begin, int end) const {
    bool all = true;
    for (int key = begin; key < end;) {
      const int word = key / kBitsPerWord, first = key % kBitsPerWord;
      const int last = min_int(end - word * kBitsPerWord, kBitsPerWord);
      const uint64_t wanted = bit_range(first, last);
      all = all && (words[word] & wanted) == wanted;
      key = word * kBitsPerWord + last;
    }
    return all;
  }
};

class Lines {
 public:
  Lines(const TreeAttentionArgs& args, int request, int kv_head)
      : args_(args),
        first_row_(args.query_start[request]),
        first_head_(kv_head * (args.num_heads / args.num_kv_heads)),
        first_mask_row_(args.row_start[request]),
        context_(context_of(args, request)),
        group_(args.num_heads / args.num_kv_heads),
        rows_(args.row_start[request + 1] - args.row_start[request]),
        count_(rows_ * group_) {}

  void carve(Carver& carver) { carve(carver, count_); }

  // For a number of lines of the caller's choice: to find the size only.
  void carve(Carver& carver, int64_t count) {
    max_ = carver.floats(count);
    sum_ = carver.floats(count);
    // Tiles of 16 lines may reach behind the last one.
    weighted_ = carver.floats((count + 15) / 16 * 16 * args_.head_size);
  }

  int count() const { return count_; }
  int rows() const { return rows_; }
  int group() const { return group_; }

  // [count, D]: sum of weight * V.
  float* weighted(int line) { return weighted_ + static_cast<int64_t>(line) * args_.head_size; }

  template <class T>
  const T* query(int row, int head) const {
    return static_cast<const T*>(args_.query) + (first_row_ + row) * args_.query_stride_row +
           (first_head_ + head) * args_.query_stride_head;
  }

  void reset() {
    for (int line = 0; line < count_; ++line) {
      max_[line] = kMinusInfinity;
      sum_[line] = 0.0f;
    }
    std::memset(weighted_, 0, sizeof(float) * static_cast<int64_t>(count_) * args_.head_size);
  }

  // Which of the keys [begin, begin + count), count <= 64, a row may see; bit i is key begin + i.
  uint64_t visible(int row, int begin, int count) const {
    const int of_context = min_int(max_int(context_ - begin, 0), count);
    uint64_t bits = bit_range(window_begin(row, begin, of_context), of_context);
    if (of_context < count) {
      const uint64_t* words = reinterpret_cast<const uint64_t*>(args_.mask) +
                              (first_mask_row_ + row) * args_.mask_words;
      const int first = begin - context_;  // suffix row of bit 0; negative if bit 0 is context
      uint64_t suffix;
      if (first < 0) {
        suffix = words[0] << -first;
      } else {
        const int word = first / kBitsPerWord, shift = first % kBitsPerWord;
        suffix = words[word] >> shift;
        if (shift != 0 && word + 1 < args_.mask_words) {
          suffix |= words[word + 1] << (kBitsPerWord - shift);
        }
      }
      bits |= suffix & bit_range(of_context, count);
    }
    return bits;
  }

  // Which keys of the tile [begin, begin + count) any row may see.
  KeyBits seen(int begin, int count) const {
    KeyBits bits;
    for (int w = 0; w < words_for_bits(count); ++w) {
      const int first = begin + w * kBitsPerWord;
      const int keys = min_int(count - w * kBitsPerWord, kBitsPerWord);
      if (args_.sliding_window <= 0 && first + keys <= context_) {
        bits.words[w] = bit_range(0, keys);
        continue;
      }
      bits.words[w] = 0;
      for (int row = 0; row < rows_; ++row) bits.words[w] |= visible(row, first, keys);
    }
    return bits;
  }

  // Turns the scores (Q K^T, not scaled) of `lines` lines with the keys of the tile
  // [begin, begin + count) into weights relative to each line's new maximum, and rescales what the
  // line has gathered so far. Columns from `count` to the next multiple of `multiple` (of kLanes)
  // may hold rubbish on entry; their weights are zero. `scores` and `weights` may be the same
  // memory.
  template <int kDegree, class W>
  void softmax(int first_line, int lines, int begin, int count, int multiple, float* scores,
               int64_t scores_stride, W* weights, int64_t weights_stride) {
    const int padded = round_up(count, multiple);
    int row = -1;
    KeyBits bits;
    for (int i = 0; i < lines; ++i) {
      if ((first_line + i) / group_ != row) {
        row = (first_line + i) / group_;
        for (int w = 0; w < words_for_bits(padded); ++w) {
          const int keys = min_int(count - w * kBitsPerWord, kBitsPerWord);
          bits.words[w] = keys <= 0 ? 0 : visible(row, begin + w * kBitsPerWord, keys);
        }
      }
      softmax_line<kDegree>(first_line + i, scores + i * scores_stride,
                            weights + i * weights_stride, padded, bits);
    }
  }

  void save(float* partial) const {
    std::memcpy(partial, max_, sizeof(float) * count_);
    std::memcpy(partial + count_, sum_, sizeof(float) * count_);
    std::memcpy(partial + 2 * static_cast<int64_t>(count_), weighted_,
                sizeof(float) * static_cast<int64_t>(count_) * args_.head_size);
  }

  void merge(const float* partials, int64_t num_partials, int64_t stride) {
    const int head_size = args_.head_size;
    for (int line = 0; line < count_; ++line) {
      float maximum = kMinusInfinity;
      for (int64_t p = 0; p < num_partials; ++p) {
        const float m = partials[p * stride + line];
        maximum = m > maximum ? m : maximum;
      }
      float sum = 0.0f;
      for (int d = 0; d < head_size; d += kLanes) store(weighted(line) + d, Vec{});
      for (int64_t p = 0; p < num_partials; ++p) {
        const float* partial = partials + p * stride;
        if (partial[line] == kMinusInfinity) continue;
        const float factor = exp2(partial[line] - maximum);
        sum += factor * partial[count_ + line];
        const float* source =
            partial + 2 * static_cast<int64_t>(count_) + static_cast<int64_t>(line) * head_size;
        for (int d = 0; d < head_size; d += kLanes) {
          store(weighted(line) + d, load(weighted(line) + d) + load(source + d) * factor);
        }
      }
      max_[line] = maximum;
      sum_[line] = sum;
    }
  }

  // Rows that may see nothing at all (no context, empty mask) give zeros.
  template <class T>
  void write_output() {
    T* out = static_cast<T*>(args_.out);
    for (int row = 0, line = 0; row < rows_; ++row) {
      for (int head = 0; head < group_; ++head, ++line) {
        const float factor = sum_[line] > 0.0f ? 1.0f / sum_[line] : 0.0f;
        T* target = out + (first_row_ + row) * args_.out_stride_row +
                    (first_head_ + head) * args_.out_stride_head;
        for (int d = 0; d < args_.head_size; d += kLanes) {
          store(target + d, load(weighted(line) + d) * factor);
        }
      }
    }
    if (args_.lse != nullptr) write_lse();
  }

 private:
  // Natural logarithms; the maximum is in units of log2.
  void write_lse() {
    constexpr float kLn2 = 0.693147180559945309f;
    for (int row = 0, line = 0; row < rows_; ++row) {
      for (int head = 0; head < group_; ++head, ++line) {
        args_.lse[(first_head_ + head) * args_.lse_stride_head + first_row_ + row] =
            sum_[line] > 0.0f ? max_[line] * kLn2 + __builtin_logf(sum_[line]) : kMinusInfinity;
      }
    }
  }

  // The first of `count` context tokens from `begin` on that the row's window leaves visible.
  int window_begin(int row, int begin, int count) const {
    if (args_.sliding_window <= 0) return 0;
    const int64_t hidden = args_.positions[first_row_ + row] - args_.sliding_window + 1 - begin;
    return hidden <= 0 ? 0 : hidden >= count ? count : static_cast<int>(hidden);
  }

  template <bool kAllVisible>
  ECHO_INLINE_MEMBER Vec scale_scores(float* scores, int columns, uint64_t bits, Vec maximum) {
    const bool capped = args_.softcap > 0.0f;
    const float factor = capped ? args_.scale / args_.softcap : args_.scale * kLog2E;
    for (int c = 0; c < columns; c += kLanes) {
      Vec score = load(scores + c) * factor;
      if (capped) score = tanh(score) * (args_.softcap * kLog2E);
      if (!kAllVisible) score = select(bits, c, score, splat(kMinusInfinity));
      store(scores + c, score);
      maximum = max(score, maximum);
    }
    return maximum;
  }

  template <int kDegree, bool kAllVisible, class W>
  ECHO_INLINE_MEMBER Vec weigh_scores(const float* scores, W* weights, int columns, uint64_t bits,
                                      float maximum, Vec sum) {
    for (int c = 0; c < columns; c += kLanes) {
      Vec weight = exp2<kDegree>(load(scores + c) - maximum);
      if (!kAllVisible) weight = select(bits, c, weight, Vec{});
      store(weights + c, weight);
      sum += weight;
    }
    return sum;
  }

  template <int kDegree, class W>
  void softmax_line(int line, float* scores, W* weights, int padded, const KeyBits& bits) {
    Vec maximum = splat(kMinusInfinity);
    for (int begin = 0; begin < padded; begin += kBitsPerWord) {
      const int columns = min_int(padded - begin, kBitsPerWord);
      const uint64_t word = bits.words[begin / kBitsPerWord];
      if (word == bit_range(0, columns)) {
        maximum = scale_scores<true>(scores + begin, columns, word, maximum);
      } else if (word != 0) {
        maximum = scale_scores<false>(scores + begin, columns, word, maximum);
      }
    }
    const float old_max = max_[line];
    const float tile_max = horizontal_max(maximum);
    const float new_max = tile_max > old_max ? tile_max : old_max;
    Vec sum = Vec{};
    for (int begin = 0; begin < padded; begin += kBitsPerWord) {
      const int columns = min_int(padded - begin, kBitsPerWord);
      const uint64_t word = bits.words[begin / kBitsPerWord];
      if (word == bit_range(0, columns)) {
        sum = weigh_scores<kDegree, true>(scores + begin, weights + begin, columns, word, new_max,
                                          sum);
      } else if (word != 0) {
        sum = weigh_scores<kDegree, false>(scores + begin, weights + begin, columns, word, new_max,
                                           sum);
      } else {
        for (int c = 0; c < columns; c += kLanes) store(weights + begin + c, Vec{});
      }
    }
    if (new_max == old_max) {
      sum_[line] += horizontal_sum(sum);
      return;
    }
    max_[line] = new_max;
    if (old_max == kMinusInfinity) {
      sum_[line] = horizontal_sum(sum);  // and nothing has been gathered yet
      return;
    }
    const float shrink = exp2(old_max - new_max);
    sum_[line] = sum_[line] * shrink + horizontal_sum(sum);
    for (int d = 0; d < args_.head_size; d += kLanes) {
      store(weighted(line) + d, load(weighted(line) + d) * shrink);
    }
  }

  const TreeAttentionArgs& args_;
  const int64_t first_row_, first_head_, first_mask_row_;
  const int context_, group_, rows_, count_;
  float *max_ = nullptr, *sum_ = nullptr, *weighted_ = nullptr;
};

// A run of consecutive keys inside one block, or suffix rows.
struct KeyRun {
  int column;  // of the tile
  int count;
  bool is_suffix;
  int64_t index;  // of the block, or of the suffix row
  int offset;     // in the block
};

// Cuts the keys [begin, end) into runs and calls f(run) for each, in order.
template <class F>
ECHO_INLINE void for_each_run(const TreeAttentionArgs& args, int request, int begin, int end,
                              const F& f) {
  const int context = context_of(args, request);
  const int32_t* blocks = args.block_table + request * args.block_table_stride;
  int key = begin;
  while (key < min_int(end, context)) {
    const int offset = key % args.block_size;
    const int count = min_int(min_int(end, context) - key, args.block_size - offset);
    f(KeyRun{key - begin, count, false, blocks[key / args.block_size], offset});
    key += count;
  }
  if (key < end) {
    f(KeyRun{key - begin, end - key, true, args.suffix_start[request] + key - context, 0});
  }
}

}  // namespace
}  // namespace echo_vllm::cpu
