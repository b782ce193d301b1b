// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
//
// Tree attention of one (request, kv head): all rows and all q heads of the kv group against each
// tile of keys, so that K and V are read once. Arithmetic is fp32 in every dtype and layout.
// Compiled once per instruction set.
#pragma once

#include "gemm.h"
#include "lines.h"
#include "simd.h"
#include "tree_attention.h"

namespace echo_vllm::cpu {
namespace {

// Keys per tile, and lines handled per tile at a time, so that their scores stay in the L1 cache.
constexpr int kTileKeys = 128;
constexpr int kTileStride = tile_stride(kTileKeys);
constexpr int kLineChunk = 48;
// From this many lines on it pays to convert a tile of 16-bit K and V to fp32 once.
constexpr int kLinesToConvert = 16;

// T: the numbers of Q, of the suffix and of the output. C: those of the cache, T or Float8.
template <class T, class C = T>
class Worker {
  static constexpr bool kIsScaled = sizeof(C) == 1;

 public:
  Worker(const TreeAttentionArgs& args, int request, int kv_head, float* scratch)
      : args_(args), request_(request), kv_head_(kv_head), lines_(args, request, kv_head) {
    Carver carver(scratch);
    carve(carver, lines_.count());
    converts_ = args.layout == KvLayout::kAmx || kIsScaled ||
                (sizeof(T) < sizeof(float) && lines_.count() >= kLinesToConvert);
  }

  // Lays the buffers out for that many lines; with the worker's own number, they can be used.
  void carve(Carver& carver, int64_t lines) {
    const int64_t head_size = args_.head_size;
    lines_.carve(carver, lines);
    query_ = carver.floats(lines * head_size);
    scores_ = carver.floats(static_cast<int64_t>(kLineChunk) * kTileStride);
    keys_ = carver.floats(head_size * kTileStride);
    values_ = carver.floats(kTileKeys * head_size);
  }

  void run(const TreeAttentionTask& task) {
    lines_.reset();
    pack_query();
    for (int begin = task.begin; begin < task.end; begin += kTileKeys) {
      const int end = min_int(begin + kTileKeys, task.end);
      const KeyBits seen = lines_.seen(begin, end - begin);
      if (seen.none(end - begin)) continue;
      if (converts_) {
        attend_converted(task, begin, end, seen);
      } else {
        attend_in_place(task, begin, end, seen);
      }
    }
    if (task.partial != nullptr) {
      lines_.save(task.partial);
    } else {
      lines_.template write_output<T>();
    }
  }

  void merge(const float* partials, int64_t count, int64_t stride) {
    lines_.merge(partials, count, stride);
    lines_.template write_output<T>();
  }

 private:
  // A block that is read later, and of which kv head.
  struct Ahead {
    KeyRun run;
    int kv_head;
  };

  // Where a run's K and V are. Row-major: [count, D]; else K is [D, ...] and `stride` lies between
  // its dims.
  template <class U>
  struct Source {
    const U* key;
    const U* value;
    int64_t key_stride, value_stride;
    bool key_is_row_major;
    float key_scale = 1.0f, value_scale = 1.0f;
  };

  Source<T> suffix_source(const KeyRun& run) const {
    Source<T> s;
    s.key = static_cast<const T*>(args_.suffix_key) + run.index * args_.suffix_key_stride_row +
            kv_head_ * args_.suffix_key_stride_head;
    s.value = static_cast<const T*>(args_.suffix_value) +
              run.index * args_.suffix_value_stride_row + kv_head_ * args_.suffix_value_stride_head;
    s.key_stride = args_.suffix_key_stride_row;
    s.value_stride = args_.suffix_value_stride_row;
    s.key_is_row_major = true;
    return s;
  }

  Source<C> context_source(const KeyRun& run, int kv_head) const {
    Source<C> s;
    s.key_scale = args_.key_scale;
    s.value_scale = args_.value_scale;
    s.key = static_cast<const C*>(args_.key_cache) + run.index * args_.key_strides.block +
            kv_head * args_.key_strides.head;
    s.value = static_cast<const C*>(args_.value_cache) + run.index * args_.value_strides.block +
              kv_head * args_.value_strides.head;
    if (args_.layout == KvLayout::kNhd) {
      s.key += run.offset * args_.key_strides.token;
      s.value += run.offset * args_.value_strides.token;
      s.key_stride = args_.key_strides.token;
      s.value_stride = args_.value_strides.token;
      s.key_is_row_major = true;
    } else {
      s.key += run.offset;
      s.value += static_cast<int64_t>(run.offset) * args_.head_size;
      s.key_stride = args_.block_size;
      s.value_stride = args_.head_size;
      s.key_is_row_major = false;
    }
    return s;
  }

  void pack_query() {
    float* target = query_;
    for (int row = 0; row < lines_.rows(); ++row) {
      for (int head = 0; head < lines_.group(); ++head, target += args_.head_size) {
        const T* source = lines_.template query<T>(row, head);
        for (int d = 0; d < args_.head_size; d += kLanes) store(target + d, load(source + d));
      }
    }
  }

  // K and V of the tile go to fp32 first: K to [D, kTileStride], V to [kTileKeys, D].
  void attend_converted(const TreeAttentionTask& task, int begin, int end, const KeyBits& seen) {
    const int count = end - begin;
    for_each_run(args_, request_, begin, end, [&](const KeyRun& run) {
      if (run.is_suffix) {
        convert_run(suffix_source(run), run, seen);
      } else if (args_.layout == KvLayout::kAmx) {
        unpack_amx(run, seen);
      } else {
        convert_run(context_source(run, kv_head_), run, seen);
      }
    });
    if (count % kLanes != 0) clear_padding(keys_, count);
    const Ahead ahead = ahead_of(task, end);
    for (int line = 0; line < lines_.count(); line += kLineChunk) {
      const int lines = min_int(kLineChunk, lines_.count() - line);
      gemm<false>(query_of(line), args_.head_size, keys_, kTileStride, scores_, kTileStride, lines,
                  round_up(count, kLanes), args_.head_size,
                  line == 0 ? fetch_keys(ahead, args_.head_size) : Fetch{});
      lines_.template softmax<5>(line, lines, begin, count, kLanes, scores_, kTileStride, scores_,
                                 kTileStride);
      gemm<true>(
          scores_, kTileStride, values_, args_.head_size, lines_.weighted(line), args_.head_size,
          lines, args_.head_size, count,
          line == 0 ? fetch_values(context_source(ahead.run, ahead.kv_head), ahead.run) : Fetch{});
    }
  }

  template <class U>
  void convert_run(const Source<U>& s, const KeyRun& run, const KeyBits& seen) {
    if (s.key_is_row_major) {
      transpose_keys(s, run, keys_);
    } else {
      for (int d = 0; d < args_.head_size; ++d) {
        // Whole vectors: a block holds a multiple of 16 tokens and tiles start at one.
        for (int t = 0; t < run.count; t += kLanes) {
          store(keys_ + d * kTileStride + run.column + t,
                scaled(load(s.key + d * s.key_stride + t), s.key_scale));
        }
      }
    }
    copy_values(s, run, seen, values_);
  }

  static Vec scaled(Vec numbers, float scale) { return kIsScaled ? numbers * scale : numbers; }

  // K and V are read where they are; row-major K is transposed first, in its own type.
  void attend_in_place(const TreeAttentionTask& task, int begin, int end, const KeyBits& seen) {
    const int count = end - begin;
    Source<T> sources[kTileKeys];
    KeyRun runs[kTileKeys];
    int num_runs = 0;
    bool transposes = false;
    T* keys = reinterpret_cast<T*>(keys_);
    T* values = reinterpret_cast<T*>(values_);
    for_each_run(args_, request_, begin, end, [&](const KeyRun& run) {
      Source<T> s;
      if constexpr (kIsScaled) {
        s = suffix_source(run);  // and never called: a scaled cache is converted
      } else {
        s = run.is_suffix ? suffix_source(run) : context_source(run, kv_head_);
      }
      if (s.key_is_row_major) {
        transpose_keys(s, run, keys);
        s.key = keys + run.column;
        s.key_stride = kTileStride;
        transposes = true;
      }
      // V of unseen keys counts zero times, but may be unwritten memory or somebody else's block.
      if (!seen.all(run.column, run.column + run.count)) {
        copy_values(s, run, seen, values);
        s.value = values + static_cast<int64_t>(run.column) * args_.head_size;
        s.value_stride = args_.head_size;
      }
      runs[num_runs] = run;
      sources[num_runs++] = s;
    });
    if (transposes) clear_padding(keys, count);
    const Ahead ahead = ahead_of(task, end);
    for (int line = 0; line < lines_.count(); line += kLineChunk) {
      const int lines = min_int(kLineChunk, lines_.count() - line);
      // A run's last vector may reach into the columns of the next run, which then overwrites them.
      for (int i = 0; i < num_runs; ++i) {
        gemm<false>(query_of(line), args_.head_size, sources[i].key, sources[i].key_stride,
                    scores_ + runs[i].column, kTileStride, lines, round_up(runs[i].count, kLanes),
                    args_.head_size, line == 0 ? fetch_values(sources[i], runs[i]) : Fetch{});
      }
      lines_.template softmax<5>(line, lines, begin, count, kLanes, scores_, kTileStride, scores_,
                                 kTileStride);
      for (int i = 0; i < num_runs; ++i) {
        gemm<true>(scores_ + runs[i].column, kTileStride, sources[i].value, sources[i].value_stride,
                   lines_.weighted(line), args_.head_size, lines, args_.head_size, runs[i].count,
                   line == 0 && i == 0 ? fetch_keys(ahead, runs[i].count) : Fetch{});
      }
    }
  }

  // V of a run, during the product of the lines with its K.
  template <class U>
  Fetch fetch_values(const Source<U>& s, const KeyRun& run) const {
    if (run.count == 0 || run.is_suffix || args_.layout != KvLayout::kVec) return {};
    const int strips = max_int(1, run.count / (kTileVecs * kLanes));
    return Fetch::of(s.value, sizeof(U) * run.count * args_.head_size, strips * args_.head_size);
  }

  // The block that is read after the tile that ends at `end`; without keys if there is none, or not
  // of a layout that is fetched.
  Ahead ahead_of(const TreeAttentionTask& task, int end) const {
    if (args_.layout != KvLayout::kVec || kIsScaled) return {};
    if (end < task.end) return first_block(task, end);
    return task.next == nullptr ? Ahead{} : first_block(*task.next, task.next->begin);
  }

  Ahead first_block(const TreeAttentionTask& task, int key) const {
    const int block_end = (key / args_.block_size + 1) * args_.block_size;
    const int stop = min_int(min_int(key + kTileKeys, task.end),
                             min_int(context_of(args_, task.request), block_end));
    Ahead ahead{};
    if (key >= stop) return ahead;
    for_each_run(args_, task.request, key, stop,
                 [&](const KeyRun& run) { ahead = {run, task.kv_head}; });
    return ahead;
  }

  // Its K, during a product of `steps` steps, if most of the block belongs to the tile: K is read
  // by dimension, so all of it is fetched.
  Fetch fetch_keys(const Ahead& ahead, int steps) const {
    if (2 * ahead.run.count <= args_.block_size) return {};
    return Fetch::of(context_source(ahead.run, ahead.kv_head).key,
                     sizeof(C) * args_.head_size * static_cast<int64_t>(args_.block_size), steps);
  }

  const float* query_of(int line) const {
    return query_ + static_cast<int64_t>(line) * args_.head_size;
  }

  template <class From, class U>
  void transpose_keys(const Source<From>& s, const KeyRun& run, U* keys) {
    for (int t = 0; t < run.count; ++t) {
      const From* from = s.key + t * s.key_stride;
      U* to = keys + run.column + t;
      if constexpr (kIsScaled && sizeof(U) == sizeof(float)) {
        for (int d = 0; d < args_.head_size; ++d) {
          to[d * kTileStride] = to_float(from[d]) * s.key_scale;
        }
      } else {
        for (int d = 0; d < args_.head_size; ++d) convert(from[d], &to[d * kTileStride]);
      }
    }
  }

  template <class From, class U>
  void copy_values(const Source<From>& s, const KeyRun& run, const KeyBits& seen, U* values) {
    for (int t = 0; t < run.count; ++t) {
      const From* from = s.value + t * s.value_stride;
      U* to = values + static_cast<int64_t>(run.column + t) * args_.head_size;
      const bool is_seen = seen.test(run.column + t);
      for (int d = 0; d < args_.head_size; d += kLanes) {
        store(to + d, is_seen ? scaled(load(from + d), s.value_scale) : Vec{});
      }
    }
  }

  // Leftovers behind the last key do not show in the result, but denormal numbers among them would
  // make the product many times slower.
  template <class U>
  void clear_padding(U* keys, int count) {
    for (int d = 0; d < args_.head_size; ++d) {
      for (int t = count; t < count + kLanes; ++t) keys[d * kTileStride + t] = U{};
    }
  }

  // Two bfloat16 of the amx layout as one 32-bit word: the even one is the low half.
  ECHO_INLINE_MEMBER void split_pairs(const T* pairs, float* even, float* odd) {
    UintVec bits;
    std::memcpy(&bits, pairs, sizeof(bits));
    store(even, reinterpret_cast<Vec>(bits << 16));
    store(odd, reinterpret_cast<Vec>(bits & 0xffff0000u));
  }

  // Unpacks whole groups: tiles start at a multiple of 16, and a block holds a multiple of 32.
  void unpack_amx(const KeyRun& run, const KeyBits& seen) {
    const int head_size = args_.head_size;
    const T* key = static_cast<const T*>(args_.key_cache) + run.index * args_.key_strides.block +
                   kv_head_ * args_.key_strides.head;
    const T* value = static_cast<const T*>(args_.value_cache) +
                     run.index * args_.value_strides.block + kv_head_ * args_.value_strides.head;
    for (int t = 0; t < run.count; t += kAmxTileColumns) {
      for (int d = 0; d < head_size; d += 2) {
        const T* pairs = key + amx_key_offset(head_size, run.offset + t, d);
        float* even = keys_ + d * kTileStride + run.column + t;
        for (int i = 0; i < kAmxTileColumns; i += kLanes) {
          split_pairs(pairs + 2 * i, even + i, even + kTileStride + i);
        }
      }
    }
    for (int t = 0; t < run.count; t += 2) {
      float* even = values_ + static_cast<int64_t>(run.column + t) * head_size;
      for (int d = 0; d < head_size; d += kAmxTileColumns) {
        const T* pairs = value + amx_value_offset(args_.block_size, run.offset + t, d);
        for (int i = 0; i < kAmxTileColumns; i += kLanes) {
          split_pairs(pairs + 2 * i, even + d + i, even + head_size + d + i);
        }
      }
    }
    for (int t = run.column; t < run.column + run.count; ++t) {
      if (seen.test(t)) continue;
      std::memset(values_ + static_cast<int64_t>(t) * head_size, 0, sizeof(float) * head_size);
    }
  }

  const TreeAttentionArgs& args_;
  const int request_, kv_head_;
  Lines lines_;
  float* query_;   // [lines, D]
  float* scores_;  // [kLineChunk, kTileStride]
  float* keys_;    // [D, kTileStride]: a transposed tile of K
  float* values_;  // [kTileKeys, D]: a tile of V
  bool converts_;
};

template <class T>
void run_typed(const TreeAttentionArgs& args, const TreeAttentionTask& task, float* scratch) {
  if (args.fp8_cache) {
    Worker<T, Float8>(args, task.request, task.kv_head, scratch).run(task);
  } else {
    Worker<T>(args, task.request, task.kv_head, scratch).run(task);
  }
}

template <class T>
void merge_typed(const TreeAttentionArgs& args, int request, int kv_head, const float* partials,
                 int64_t count, int64_t stride, float* scratch) {
  Worker<T>(args, request, kv_head, scratch).merge(partials, count, stride);
}

int64_t scratch_size(const TreeAttentionArgs& args, int64_t lines) {
  Carver counter(nullptr);
  Worker<float>(args, 0, 0, nullptr).carve(counter, lines);
  return counter.used();
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

}  // namespace
}  // namespace echo_vllm::cpu
