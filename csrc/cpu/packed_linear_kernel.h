// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
//
// x W^T for a few rows of x and a packed W (packed_linear.h). A register tile of up to kTileRows
// rows and one panel walks down the depth; the panel, read from memory by the first tile, is in the
// cache for the next ones. Whatever the number of rows, an output is the sum over ranges of
// kRangeDepth of chains of multiply-adds: a row's result does not depend on the others in the
// batch, to the last bit. oneDNN cuts the depth at the same places, so with AVX2 its results are
// the same.
#pragma once

#include "packed_linear.h"
#include "simd.h"

namespace echo_vllm::cpu {
namespace {

constexpr int kPanel = 2 * kLanes;
constexpr int64_t kRangeDepth = 1024;
#if defined(__AVX512F__)
constexpr int kTileRows = 12;  // 24 of 32 registers accumulate
#elif defined(__AVX2__)
constexpr int kTileRows = 6;  // 12 of 16
#else
constexpr int kTileRows = 4;
#endif

// The two vectors of a panel at one k.
ECHO_INLINE void load_panel(const float* p, Vec& low, Vec& high) {
  low = load(p);
  high = load(p + kLanes);
}

ECHO_INLINE void load_panel(const BFloat16* p, Vec& low, Vec& high) {
  UintVec pairs;
  std::memcpy(&pairs, p, sizeof(pairs));
  low = reinterpret_cast<Vec>(pairs << 16);
  high = reinterpret_cast<Vec>(pairs & 0xffff0000u);
}

// Adds `count` numbers at `from`, at most kPanel, to the two vectors.
ECHO_INLINE void add_columns(const float* from, int64_t count, Vec& low, Vec& high) {
  float both[kPanel] = {};
  if (count < kPanel) {
    std::memcpy(both, from, count * sizeof(float));
    from = both;
  }
  low += load(from);
  high += load(from + kLanes);
}

ECHO_INLINE void store_columns(float* to, int64_t count, Vec low, Vec high) {
  if (count >= kPanel) {
    store(to, low);
    store(to + kLanes, high);
    return;
  }
  float both[kPanel];
  store(both, low);
  store(both + kLanes, high);
  std::memcpy(to, both, count * sizeof(float));
}

// kRows rows of one panel over the depth [begin, end).
template <int kRows, class T>
ECHO_INLINE void linear_tile(const PackedLinearArgs& args, int64_t row, int64_t panel,
                             int64_t begin, int64_t end) {
  const T* weight = static_cast<const T*>(args.packed) + panel * args.depth * kPanel;
  const float* x = args.x + row * args.x_stride;
  Vec low[kRows], high[kRows];
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) low[i] = high[i] = Vec{};
  for (int64_t k = begin; k < end; ++k) {
    Vec a, b;
    load_panel(weight + k * kPanel, a, b);
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
      const Vec factor = splat(x[i * args.x_stride + k]);
      low[i] += factor * a;
      high[i] += factor * b;
    }
  }
  const int64_t column = panel * kPanel, count = args.columns - column;
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) {
    float* out = args.out + (row + i) * args.columns + column;
    if (begin > 0) add_columns(out, count, low[i], high[i]);
    if (args.bias != nullptr && end == args.depth) {
      add_columns(args.bias + column, count, low[i], high[i]);
    }
    store_columns(out, count, low[i], high[i]);
  }
}

template <class T, int kRows = kTileRows>
ECHO_INLINE void linear_rows(const PackedLinearArgs& args, int64_t rows, int64_t row, int64_t panel,
                             int64_t begin, int64_t end) {
  if constexpr (kRows > 0) {
    if (rows == kRows) {
      linear_tile<kRows, T>(args, row, panel, begin, end);
    } else {
      linear_rows<T, kRows - 1>(args, rows, row, panel, begin, end);
    }
  }
}

template <class T>
void linear_panels(const PackedLinearArgs& args, int64_t first_row, int64_t last_row,
                   int64_t first_panel, int64_t last_panel) {
  const int64_t rows = last_row - first_row;
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;  // of nearly equal heights
  for (int64_t panel = first_panel; panel < last_panel; ++panel) {
    for (int64_t begin = 0; begin < args.depth; begin += kRangeDepth) {
      const int64_t left = args.depth - begin;
      const int64_t end = left > kRangeDepth ? begin + kRangeDepth : args.depth;
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t top = rows * tile / tiles, bottom = rows * (tile + 1) / tiles;
        linear_rows<T>(args, bottom - top, first_row + top, panel, begin, end);
      }
    }
  }
}

void run_packed_linear(const PackedLinearArgs& args, int64_t first_row, int64_t last_row,
                       int64_t first_panel, int64_t last_panel) {
  if (args.is_bfloat16) {
    linear_panels<BFloat16>(args, first_row, last_row, first_panel, last_panel);
  } else {
    linear_panels<float>(args, first_row, last_row, first_panel, last_panel);
  }
}

}  // namespace
}  // namespace echo_vllm::cpu
