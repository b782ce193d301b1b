// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
//
// x W^T for a few rows of x and a packed W (packed_linear.h). A register tile of up to kTileRows
// rows and one panel walks down the depth, several tiles piece by piece: what was fetched during
// one piece is in the cache for all tiles of the next. Whatever the number of rows, an output is
// the sum over ranges of the depth of chains of multiply-adds: a row's result does not depend on
// the others in the batch, to the last bit. The depth is cut where oneDNN cuts it, so its results
// are the same.
#pragma once

#include "packed_linear.h"
#include "simd.h"

namespace echo_vllm::cpu {
namespace {

ECHO_INLINE int64_t range_depth_of([[maybe_unused]] int64_t depth) {
#if defined(__AVX512F__)
  return depth > 1024 ? 1024 : 512;
#else
  return 1024;
#endif
}

// A format says what a panel holds at a step of the depth, and what a row multiplies it with:
//   X, kSteps       the type of x, and how many numbers of a row a step takes
//   kVecs, kTileRows  vectors of a panel, and rows of a tile: the accumulators, with a step's
//                   vectors and a row's factor, fit the registers
//   kStepBytes      of a panel
//   load, factor, add

// A vector per kLanes columns: float32 x and weights.
template <class T>
struct FloatFormat {
  using X = float;
  static constexpr int kSteps = 1;
#if defined(__AVX512F__)
  static constexpr int kVecs = 4, kTileRows = 6;  // 24 of 32 registers accumulate
#elif defined(__AVX2__)
  static constexpr int kVecs = 2, kTileRows = 6;  // 12 of 16
#else
  static constexpr int kVecs = 2, kTileRows = 4;
#endif
  static constexpr int kStepBytes = kVecs * kLanes * sizeof(T);
  using Weights = Vec;

  static ECHO_INLINE_MEMBER void load_step(const void* from, Vec* to) {
    const T* p = static_cast<const T*>(from);
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; v += 2) load_two(p + v * kLanes, to[v], to[v + 1]);
  }
  static ECHO_INLINE_MEMBER Vec factor(const float* x, int) { return splat(*x); }
  static ECHO_INLINE_MEMBER Vec add(Vec sum, Vec factor, Vec weights) {
    return sum + factor * weights;
  }

 private:
  static ECHO_INLINE_MEMBER void load_two(const float* p, Vec& low, Vec& high) {
    low = cpu::load(p);
    high = cpu::load(p + kLanes);
  }
  static ECHO_INLINE_MEMBER void load_two(const BFloat16* p, Vec& low, Vec& high) {
    UintVec pairs;
    std::memcpy(&pairs, p, sizeof(pairs));
    low = reinterpret_cast<Vec>(pairs << 16);
    high = reinterpret_cast<Vec>(pairs & 0xffff0000u);
  }
};

// Columns beyond the last are zeros.
template <class T>
ECHO_INLINE Vec load_columns(const T* from, int64_t count) {
  if (count >= kLanes) return load(from);
  T all[kLanes] = {};
  std::memcpy(all, from, count * sizeof(T));
  return load(all);
}

template <class T>
ECHO_INLINE void store_columns(T* to, int64_t count, Vec sum) {
  if (count >= kLanes) {
    store(to, sum);
    return;
  }
  T all[kLanes];
  store(all, sum);
  std::memcpy(to, all, count * sizeof(T));
}

// Weights are read once a forward and would push everything else out of the caches, the interpreter
// first: they are fetched past them. One tile fetches so far ahead of itself; several share pieces
// of so many steps, one at work and one on its way, which fit the smallest cache.
constexpr int kAheadBytes = 3072;
constexpr int64_t kPieceSteps = 64;

// A panel, a range of the depth, whose sums are its own, and the piece of it that a tile walks
// down.
struct Range {
  int64_t panel, begin, end, piece_begin, piece_end;
};

// Of a part: so that the sums that are put aside fit a thread's stack and its caches.
constexpr int64_t kMaxPartRows = 96;

// What a tile leaves to the next piece and the next range, both [kRows, panel].
struct Sums {
  float* of_pieces;
  float* of_ranges;
};

// kRows rows of one panel over a piece of the depth. Meanwhile `num_lines` cache lines of what
// begins at `fetched` are fetched at each step.
template <class Format, int kRows>
ECHO_INLINE void linear_tile(const PackedLinearArgs& args, int64_t row, const Range& range,
                             const Sums& kept, const char* fetched, int num_lines) {
  using X = typename Format::X;
  constexpr int kVecs = Format::kVecs;
  const int64_t steps = (args.depth + Format::kSteps - 1) / Format::kSteps;
  const char* weight =
      static_cast<const char*>(args.packed) + range.panel * steps * Format::kStepBytes;
  const X* x = static_cast<const X*>(args.x) + row * args.x_stride;
  Vec sums[kRows][kVecs];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      const bool begins = range.piece_begin == range.begin;
      sums[i][v] = begins ? Vec{} : load(kept.of_pieces + (i * kVecs + v) * kLanes);
    }
  }
  const auto step = [&](int64_t k, int count) __attribute__((always_inline)) {
    typename Format::Weights weights[kVecs];
    Format::load_step(weight + k / Format::kSteps * Format::kStepBytes, weights);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const auto factor = Format::factor(x + i * args.x_stride + k, count);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) sums[i][v] = Format::add(sums[i][v], factor, weights[v]);
    }
  };
  int64_t k = range.piece_begin;
  for (; k + Format::kSteps <= range.piece_end; k += Format::kSteps) {
    for (int line = 0; line < num_lines; ++line, fetched += kLineBytes) {
      __builtin_prefetch(fetched, 0, 0);
    }
    step(k, Format::kSteps);
  }
  if (k < range.piece_end) step(k, static_cast<int>(range.piece_end - k));
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    X* out = static_cast<X*>(args.out) + (row + i) * args.columns;
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      Vec sum = sums[i][v];
      if (range.piece_end < range.end) {
        store(kept.of_pieces + (i * kVecs + v) * kLanes, sum);
        continue;
      }
      float* before = kept.of_ranges + (i * kVecs + v) * kLanes;
      if (range.begin > 0) sum += load(before);
      if (range.end < args.depth) {
        store(before, sum);
        continue;
      }
      const int64_t column = (range.panel * kVecs + v) * kLanes, count = args.columns - column;
      if (count <= 0) break;
      if (args.bias != nullptr) {
        sum += load_columns(static_cast<const X*>(args.bias) + column, count);
      }
      store_columns(out + column, count, sum);
    }
  }
}

template <class Format, int kRows = Format::kTileRows>
ECHO_INLINE void linear_rows(const PackedLinearArgs& args, int64_t rows, int64_t row,
                             const Range& range, const Sums& kept, const char* fetched,
                             int num_lines) {
  if constexpr (kRows > 0) {
    if (rows == kRows) {
      linear_tile<Format, kRows>(args, row, range, kept, fetched, num_lines);
    } else {
      linear_rows<Format, kRows - 1>(args, rows, row, range, kept, fetched, num_lines);
    }
  }
}

template <class Format>
void linear_panels(const PackedLinearArgs& args, const PackedLinearPart& part) {
  constexpr int kLines = Format::kStepBytes / kLineBytes;
  constexpr int kPanel = Format::kVecs * kLanes;
  const int64_t rows = part.last_row - part.first_row;
  // Of nearly equal heights; each fetches its share.
  const int64_t tiles = (rows + Format::kTileRows - 1) / Format::kTileRows;
  const int64_t share = (kLines + tiles - 1) / tiles;
  const int64_t steps = (args.depth + Format::kSteps - 1) / Format::kSteps;
  const int64_t range_depth = range_depth_of(args.depth);
  const int64_t piece_depth = tiles > 1 ? kPieceSteps * Format::kSteps : range_depth;
  alignas(64) float of_pieces[kMaxPartRows * kPanel], of_ranges[kMaxPartRows * kPanel];
  for (int64_t panel = part.first_panel; panel < part.last_panel; ++panel) {
    const char* weights =
        static_cast<const char*>(args.packed) + panel * steps * Format::kStepBytes;
    Range range{panel, 0, 0, 0, 0};
    while (range.piece_end < args.depth) {
      if (range.piece_end == range.end) {
        range.begin = range.end;
        range.end =
            args.depth - range.begin <= range_depth ? args.depth : range.begin + range_depth;
      }
      range.piece_begin = range.piece_end;
      range.piece_end = range.end - range.piece_begin <= piece_depth
                            ? range.end
                            : range.piece_begin + piece_depth;
      const int64_t first = range.piece_begin / Format::kSteps;
      const int64_t last = (range.piece_end + Format::kSteps - 1) / Format::kSteps;
      // What follows is the next piece, be it of the next panel.
      const char* next = weights + last * Format::kStepBytes;
      if (tiles == 1) next = weights + first * Format::kStepBytes + kAheadBytes;
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t top = rows * tile / tiles, bottom = rows * (tile + 1) / tiles;
        const int num_lines = static_cast<int>(tile * share < kLines ? share : 0);
        linear_rows<Format>(args, bottom - top, part.first_row + top, range,
                            {of_pieces + top * kPanel, of_ranges + top * kPanel},
                            next + tile * share * (last - first) * kLineBytes, num_lines);
      }
    }
  }
}

[[maybe_unused]] void run_packed_linear(const PackedLinearArgs& args,
                                        const PackedLinearPart& part) {
  if (args.is_bfloat16) {
    linear_panels<FloatFormat<BFloat16>>(args, part);
  } else {
    linear_panels<FloatFormat<float>>(args, part);
  }
}

constexpr int kFloatPanel = FloatFormat<float>::kVecs * kLanes;

}  // namespace
}  // namespace echo_vllm::cpu
