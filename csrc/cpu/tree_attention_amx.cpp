// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
//
// Tree attention on AMX tiles for bfloat16 caches in the amx layout, in which a tile of K or V is
// one contiguous kilobyte. Other dtypes and layouts run the AVX-512 kernel.
#include "amx.h"
#include "tree_attention_kernel.h"

namespace echo_vllm::cpu {
namespace {

// Rows of one tile register, lines per step (two registers of scores side by side, two deep), and
// the keys that one multiplication of weights and V takes.
constexpr int kTileRows16 = kRegisterRows;
constexpr int kAmxLines = 2 * kTileRows16;
constexpr int kAmxKeys = 32;
constexpr int kAmxDims = 32;

// Keys worked on at a time. During the product with their K their V is fetched, and during that
// with V the K that is read next.
constexpr int kAmxTileKeys = 256;
constexpr int kAmxTileStride = tile_stride(kAmxTileKeys);

// Tile registers: 0-3 accumulate [line half][column half], 4 and 5 hold lines, 6 and 7 K or V.
constexpr int kLineRegisters = 6;

class AmxWorker {
 public:
  AmxWorker(const TreeAttentionArgs& args, int request, int kv_head, float* scratch)
      : args_(args), request_(request), kv_head_(kv_head), lines_(args, request, kv_head) {
    Carver carver(scratch);
    carve(carver, lines_.count());
  }

  // Lays the buffers out for that many lines; with the worker's own number, they can be used.
  void carve(Carver& carver, int64_t lines) {
    const int64_t head_size = args_.head_size;
    lines_.carve(carver, lines);
    query_ = halves(carver, (lines + kTileRows16) * head_size);
    scores_ = carver.floats(kAmxLines * kAmxTileStride);
    weights_ = halves(carver, kAmxLines * kAmxTileKeys);
    keys_ = halves(carver, kAmxTileKeys * head_size);
    values_ = halves(carver, kAmxTileKeys * head_size);
  }

  void run(const TreeAttentionTask& task) {
    lines_.reset();
    pack_query();
    {
      const TileSession session(kLineRegisters, lines_.count());
      for (int begin = task.begin; begin < task.end; begin += kAmxTileKeys) {
        const int end = min_int(begin + kAmxTileKeys, task.end);
        tile(begin, end, ahead_of(task, end));
      }
    }
    if (task.partial != nullptr) {
      lines_.save(task.partial);
    } else {
      lines_.write_output<BFloat16>();
    }
  }

 private:
  // Where 32 keys are: two groups of K behind each other, and V of dim group g at
  // value + g * value_stride.
  struct Source {
    const BFloat16* key;
    const BFloat16* value;
    int64_t value_stride;
    bool is_cached;  // in the paged cache, not in a copy
  };

  // Whole groups of 32 keys of the context that are read next.
  struct Ahead {
    int request, kv_head;
    int begin, groups;
  };

  static BFloat16* halves(Carver& carver, int64_t count) {
    return reinterpret_cast<BFloat16*>(carver.floats((count + 1) / 2));
  }

  void pack_query() {
    BFloat16* target = query_;
    const size_t bytes = sizeof(BFloat16) * args_.head_size;
    for (int row = 0; row < lines_.rows(); ++row) {
      for (int head = 0; head < lines_.group(); ++head, target += args_.head_size) {
        std::memcpy(target, lines_.query<BFloat16>(row, head), bytes);
      }
    }
    // A tile reads 16 lines; what lies behind the last one stays in rows that nobody looks at.
    const int padding = round_up(lines_.count(), kTileRows16) - lines_.count();
    std::memset(target, 0, bytes * padding);
  }

  const BFloat16* key_block(int64_t block, int kv_head) const {
    return static_cast<const BFloat16*>(args_.key_cache) + block * args_.key_strides.block +
           kv_head * args_.key_strides.head;
  }

  const BFloat16* value_block(int64_t block) const {
    return static_cast<const BFloat16*>(args_.value_cache) + block * args_.value_strides.block +
           kv_head_ * args_.value_strides.head;
  }

  int64_t block_of(int request, int key) const {
    return args_.block_table[request * args_.block_table_stride + key / args_.block_size];
  }

  // K of 32 keys of one block.
  const BFloat16* keys_of(int request, int kv_head, int begin) const {
    return key_block(block_of(request, begin), kv_head) +
           int64_t{begin % args_.block_size} * args_.head_size;
  }

  // What is read after the tile that ends at `end`.
  Ahead ahead_of(const TreeAttentionTask& task, int end) const {
    const TreeAttentionTask* next = end < task.end ? &task : task.next;
    if (next == nullptr) return {};
    const int begin = next == &task ? end : next->begin;
    const int stop =
        min_int(min_int(begin + kAmxTileKeys, next->end), context_of(args_, next->request));
    return {next->request, next->kv_head, begin, max_int(0, stop - begin) / kAmxKeys};
  }

  static void fetch(const BFloat16* from, int64_t count) {
    const char* at = reinterpret_cast<const char*>(from);
    for (const char* end = at + count * sizeof(BFloat16); at < end; at += kLineBytes) {
      __builtin_prefetch(at, 0, 2);
    }
  }

  void fetch_values(const Source& source) const {
    if (!source.is_cached) return;
    for (int d = 0; d < args_.head_size; d += kAmxTileColumns) {
      fetch(source.value + d / kAmxTileColumns * source.value_stride, kAmxKeys * kAmxTileColumns);
    }
  }

  // What step `step` of `steps` fetches during the part of the product with V that begins at `d`.
  void fetch_keys(const Ahead& ahead, int step, int steps, int d) const {
    for (int group = step; group < ahead.groups; group += steps) {
      fetch(keys_of(ahead.request, ahead.kv_head, ahead.begin + group * kAmxKeys) + d * kAmxKeys,
            kAmxKeys * kAmxDims);
    }
  }

  void tile(int begin, int end, const Ahead& ahead) {
    const int count = end - begin;
    const KeyBits seen = lines_.seen(begin, count);
    if (seen.none(count)) return;
    const int steps = (count + kAmxKeys - 1) / kAmxKeys;
    for (int step = 0; step < steps; ++step) {
      const int first = step * kAmxKeys;
      const int step_end = min_int(begin + first + kAmxKeys, end);
      const uint64_t step_seen =
          seen.words[first / kBitsPerWord] >> first % kBitsPerWord & bit_range(0, kAmxKeys);
      if (step_seen == bit_range(0, kAmxKeys) && step_end <= context_of(args_, request_)) {
        sources_[step] = in_place(begin + first);
      } else {
        sources_[step] = copied(begin + first, step_end, step, step_seen);
      }
    }
    for (int line = 0; line < lines_.count(); line += kAmxLines) {
      const int lines = min_int(kAmxLines, lines_.count() - line);
      if (lines > kTileRows16) {
        attend<true>(line, lines, begin, count, steps, ahead);
      } else {
        attend<false>(line, lines, begin, count, steps, ahead);
      }
    }
  }

  template <bool kTwoHalves>
  ECHO_INLINE_MEMBER void attend(int line, int lines, int begin, int count, int steps,
                                 const Ahead& ahead) {
    score<kTwoHalves>(line, steps);
    lines_.softmax<3>(line, lines, begin, count, kAmxKeys, scores_, kAmxTileStride, weights_,
                      kAmxTileKeys);
    weigh<kTwoHalves>(line, steps, line == 0 ? ahead : Ahead{});
  }

  // scores_[lines, 32 * steps] = Q K^T
  template <bool kTwoHalves>
  void score(int line, int steps) {
    const int head_size = args_.head_size;
    const int query_bytes = head_size * static_cast<int>(sizeof(BFloat16));
    constexpr int kScoreBytes = kAmxTileStride * sizeof(float);
    const BFloat16* query = query_ + int64_t{line} * head_size;
    memory_barrier();
    for (int step = 0; step < steps; ++step) {
      if (line == 0) fetch_values(sources_[step]);
      const BFloat16* left = sources_[step].key;
      const BFloat16* right = left + int64_t{kAmxTileColumns} * head_size;
      _tile_zero(0);
      _tile_zero(1);
      if (kTwoHalves) {
        _tile_zero(2);
        _tile_zero(3);
      }
      for (int d = 0; d < head_size; d += kAmxDims) {
        _tile_loadd(6, left + d * kAmxTileColumns, 64);
        _tile_loadd(7, right + d * kAmxTileColumns, 64);
        _tile_loadd(4, query + d, query_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (kTwoHalves) {
          _tile_loadd(5, query + kTileRows16 * head_size + d, query_bytes);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
      }
      float* scores = scores_ + step * kAmxKeys;
      _tile_stored(0, scores, kScoreBytes);
      _tile_stored(1, scores + kAmxTileColumns, kScoreBytes);
      if (kTwoHalves) {
        _tile_stored(2, scores + kTileRows16 * kAmxTileStride, kScoreBytes);
        _tile_stored(3, scores + kTileRows16 * kAmxTileStride + kAmxTileColumns, kScoreBytes);
      }
    }
    memory_barrier();
  }

  // weighted[lines, D] += weights_[lines, 32 * steps] V
  template <bool kTwoHalves>
  void weigh(int line, int steps, const Ahead& ahead) {
    const int head_size = args_.head_size;
    const int weighted_bytes = head_size * static_cast<int>(sizeof(float));
    constexpr int kWeightBytes = kAmxTileKeys * sizeof(BFloat16);
    memory_barrier();
    for (int d = 0; d < head_size; d += 2 * kAmxTileColumns) {
      float* weighted = lines_.weighted(line) + d;
      float* second_half = weighted + kTileRows16 * head_size;
      _tile_loadd(0, weighted, weighted_bytes);
      _tile_loadd(1, weighted + kAmxTileColumns, weighted_bytes);
      if (kTwoHalves) {
        _tile_loadd(2, second_half, weighted_bytes);
        _tile_loadd(3, second_half + kAmxTileColumns, weighted_bytes);
      }
      for (int step = 0; step < steps; ++step) {
        const Source& source = sources_[step];
        fetch_keys(ahead, step, steps, d);
        const BFloat16* left = source.value + d / kAmxTileColumns * source.value_stride;
        _tile_loadd(6, left, 64);
        _tile_loadd(7, left + source.value_stride, 64);
        _tile_loadd(4, weights_ + step * kAmxKeys, kWeightBytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (kTwoHalves) {
          _tile_loadd(5, weights_ + kTileRows16 * kAmxTileKeys + step * kAmxKeys, kWeightBytes);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
      }
      _tile_stored(0, weighted, weighted_bytes);
      _tile_stored(1, weighted + kAmxTileColumns, weighted_bytes);
      if (kTwoHalves) {
        _tile_stored(2, second_half, weighted_bytes);
        _tile_stored(3, second_half + kAmxTileColumns, weighted_bytes);
      }
    }
    memory_barrier();
  }

  // 32 keys of one cache block: a block holds a multiple of 32.
  Source in_place(int begin) const {
    const int64_t offset = begin % args_.block_size;
    return {keys_of(request_, kv_head_, begin),
            value_block(block_of(request_, begin)) + offset * kAmxTileColumns,
            int64_t{args_.block_size} * kAmxTileColumns, true};
  }

  // Copies up to 32 keys that the cache does not hold as the tiles need them (suffix rows, the end
  // of the context, keys behind a window) into a block of 32 tokens in the same layout.
  Source copied(int begin, int end, int step, uint64_t seen) {
    const int head_size = args_.head_size, count = end - begin;
    BFloat16* keys = keys_ + int64_t{step} * kAmxKeys * head_size;
    BFloat16* values = values_ + int64_t{step} * kAmxKeys * head_size;
    // Weights of padding and of unseen keys are zero, but their V may be anything, NaN too.
    const int first_padding = count / 2 * 2;
    for (int d = 0; d < head_size; d += kAmxTileColumns) {
      std::memset(values + amx_value_offset(kAmxKeys, first_padding, d), 0,
                  sizeof(BFloat16) * (kAmxKeys - first_padding) * kAmxTileColumns);
    }
    for_each_run(args_, request_, begin, end, [&](const KeyRun& run) {
      if (run.is_suffix) {
        copy_suffix(run, keys, values);
        return;
      }
      // Groups of 16 tokens of K and pairs of tokens of V: what is copied too much at the end of
      // the context is overwritten or never counts.
      std::memcpy(keys + int64_t{run.column} * head_size,
                  key_block(run.index, kv_head_) + int64_t{run.offset} * head_size,
                  sizeof(BFloat16) * round_up(run.count, kAmxTileColumns) * head_size);
      const BFloat16* value = value_block(run.index);
      for (int d = 0; d < head_size; d += kAmxTileColumns) {
        std::memcpy(values + amx_value_offset(kAmxKeys, run.column, d),
                    value + amx_value_offset(args_.block_size, run.offset, d),
                    sizeof(BFloat16) * round_up(run.count, 2) * kAmxTileColumns);
      }
    });
    const uint64_t touched = bit_range(0, round_up(count, 2));
    for (uint64_t hidden = touched & ~seen; hidden != 0; hidden &= hidden - 1) {
      const int token = __builtin_ctzll(hidden);
      for (int d = 0; d < head_size; ++d) values[amx_value_offset(kAmxKeys, token, d)] = {};
    }
    return {keys, values, int64_t{kAmxKeys} * kAmxTileColumns, false};
  }

  void copy_suffix(const KeyRun& run, BFloat16* keys, BFloat16* values) {
    const int head_size = args_.head_size;
    for (int t = 0; t < run.count; ++t) {
      const int token = run.column + t;
      const BFloat16* key = static_cast<const BFloat16*>(args_.suffix_key) +
                            (run.index + t) * args_.suffix_key_stride_row +
                            kv_head_ * args_.suffix_key_stride_head;
      BFloat16* to = keys + amx_key_offset(head_size, token, 0);
      for (int d = 0; d < head_size; d += 2, to += 2 * kAmxTileColumns) {
        std::memcpy(to, key + d, 2 * sizeof(BFloat16));
      }
      const BFloat16* value = static_cast<const BFloat16*>(args_.suffix_value) +
                              (run.index + t) * args_.suffix_value_stride_row +
                              kv_head_ * args_.suffix_value_stride_head;
      for (int d = 0; d < head_size; d += kAmxTileColumns) {
        to = values + amx_value_offset(kAmxKeys, token, d);
        for (int i = 0; i < kAmxTileColumns; ++i) to[2 * i] = value[d + i];
      }
    }
  }

  const TreeAttentionArgs& args_;
  const int request_, kv_head_;
  Lines lines_;
  Source sources_[kAmxTileKeys / kAmxKeys];
  BFloat16* query_;    // [lines, D]
  float* scores_;      // [kAmxLines, kAmxTileStride]
  BFloat16* weights_;  // [kAmxLines, kAmxTileKeys]
  BFloat16* keys_;     // blocks of kAmxKeys tokens, one per step
  BFloat16* values_;
};

int64_t scratch_size_amx(const TreeAttentionArgs& args, int64_t lines) {
  if (args.layout != KvLayout::kAmx) return scratch_size(args, lines);
  Carver counter(nullptr);
  AmxWorker(args, 0, 0, nullptr).carve(counter, lines);
  return counter.used();
}

void run_amx(const TreeAttentionArgs& args, const TreeAttentionTask& task, float* scratch) {
  if (args.layout == KvLayout::kAmx) {
    AmxWorker(args, task.request, task.kv_head, scratch).run(task);
  } else {
    run(args, task, scratch);
  }
}

void merge_amx(const TreeAttentionArgs& args, int request, int kv_head, const float* partials,
               int64_t count, int64_t stride, float* scratch) {
  if (args.layout != KvLayout::kAmx) {
    merge(args, request, kv_head, partials, count, stride, scratch);
    return;
  }
  Lines lines(args, request, kv_head);
  Carver carver(scratch);
  lines.carve(carver);
  lines.merge(partials, count, stride);
  lines.write_output<BFloat16>();
}

}  // namespace

const TreeAttentionKernel& tree_attention_kernel_amx() {
  static constexpr TreeAttentionKernel kKernel{scratch_size_amx, run_amx, merge_amx};
  return kKernel;
}

}  // namespace echo_vllm::cpu
