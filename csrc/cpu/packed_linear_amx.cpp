// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
//
// x and weights in bfloat16 on AMX tiles. 16 pairs of the depth and 16 columns of a panel are a
// tile register as they lie there. Up to 32 rows walk down a panel at a time, while what comes
// behind it is fetched; the next rows find it in the cache. Whatever the number of rows, an output
// is one sum over the whole depth: a row's result does not depend on the others in the batch, to
// the last bit.
#include "amx.h"
#include "packed_linear_kernel.h"

namespace echo_vllm::cpu {
namespace {

// A product takes so many numbers of a row, and columns.
constexpr int kProductDepth = 32;
constexpr int kProductColumns = 16;
constexpr int kPanelVecs = 2;
constexpr int kPanelColumns = kPanelVecs * kProductColumns;
constexpr int kPairBytes = kPanelColumns * 2 * sizeof(BFloat16);
constexpr int kProductBytes = kProductDepth / 2 * kPairBytes;
constexpr int kColumnBytes = kProductColumns * sizeof(float);

// Ahead of where a panel is read, into the second cache: the first one has too few lines on their
// way at a time for all that memory gives.
constexpr int kAmxAheadBytes = 8192;

// Of one part: rows and what they read of x stay in the second cache.
constexpr int64_t kAmxPartRows = 256;

// Registers 0-3 sum [tile of rows][vector of columns], 4 and 5 hold rows, 6 and 7 weights.
constexpr int kRowRegisters = 6;

// The first is of 16 rows or fewer, as the session says, and so is the second, if there is one.
struct Rows {
  const char* first;
  const char* second;
  int64_t stride;  // in bytes
};

template <bool kTwo>
ECHO_INLINE void multiply(const Rows& rows, const char* weights) {
  _tile_loadd(6, weights, kPairBytes);
  _tile_loadd(4, rows.first, rows.stride);
  _tile_loadd(7, weights + kColumnBytes, kPairBytes);
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  if constexpr (kTwo) {
    _tile_loadd(5, rows.second, rows.stride);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

class AmxLinear {
 public:
  AmxLinear(const PackedLinearArgs& args, const PackedLinearPart& part)
      : args_(args),
        part_(part),
        pairs_((args.depth + 1) / 2),
        rows_(part.last_row - part.first_row),
        tiles_((rows_ + kRegisterRows - 1) / kRegisterRows),
        height_((rows_ + tiles_ - 1) / tiles_) {}

  void run() {
    const TileSession session(kRowRegisters, static_cast<int>(height_));
    for (int64_t panel = part_.first_panel; panel < part_.last_panel; ++panel) {
      for (int64_t tile = 0; tile < tiles_; tile += 2) {
        if (tile + 1 < tiles_) {
          rows_of_panel<true>(panel, tile);
        } else {
          rows_of_panel<false>(panel, tile);
        }
      }
    }
  }

 private:
  // Tiles have one height: where that does not divide the rows, the last two share some, which come
  // out the same twice.
  int64_t first_row(int64_t tile) const {
    const int64_t first = tile * height_, last = rows_ - height_;
    return part_.first_row + (first < last ? first : last);
  }

  const char* row(int64_t index) const {
    return static_cast<const char*>(args_.x) + index * args_.x_stride * sizeof(BFloat16);
  }

  template <bool kTwo>
  void rows_of_panel(int64_t panel, int64_t tile) {
    const int64_t first = first_row(tile), second = kTwo ? first_row(tile + 1) : first;
    const char* weights = static_cast<const char*>(args_.packed) + panel * pairs_ * kPairBytes;
    Rows rows{row(first), row(second), args_.x_stride * static_cast<int64_t>(sizeof(BFloat16))};
    memory_barrier();
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kTwo) {
      _tile_zero(2);
      _tile_zero(3);
    }
    const int64_t whole = args_.depth / kProductDepth;
    for (int64_t k = 0; k < whole; ++k) {
      if (tile == 0) {
        for (int at = 0; at < kProductBytes; at += kLineBytes) {
          __builtin_prefetch(weights + kAmxAheadBytes + at, 0, 2);
        }
      }
      multiply<kTwo>(rows, weights);
      rows.first += kProductDepth * sizeof(BFloat16);
      rows.second += kProductDepth * sizeof(BFloat16);
      weights += kProductBytes;
    }
    const int left = static_cast<int>(args_.depth % kProductDepth);
    if (left > 0) {
      const Rows padded = padded_rows<kTwo>(rows, left);
      std::memset(weights_, 0, sizeof(weights_));
      std::memcpy(weights_, weights, (left + 1) / 2 * kPairBytes);
      memory_barrier();
      multiply<kTwo>(padded, weights_);
    }
    constexpr int kSumBytes = kPanelColumns * sizeof(float);
    _tile_stored(0, sums_, kSumBytes);
    _tile_stored(1, sums_ + kProductColumns, kSumBytes);
    if constexpr (kTwo) {
      float* of_second = sums_ + kRegisterRows * kPanelColumns;
      _tile_stored(2, of_second, kSumBytes);
      _tile_stored(3, of_second + kProductColumns, kSumBytes);
    }
    memory_barrier();
    write(panel, first, sums_);
    if constexpr (kTwo) write(panel, second, sums_ + kRegisterRows * kPanelColumns);
  }

  // Copies of the last `left` numbers of each row, with zeros behind them.
  template <bool kTwo>
  Rows padded_rows(const Rows& rows, int left) {
    constexpr int kRowBytes = kProductDepth * sizeof(BFloat16);
    char* second = ends_ + kRegisterRows * kRowBytes;
    std::memset(ends_, 0, sizeof(ends_));
    for (int64_t i = 0; i < height_; ++i) {
      std::memcpy(ends_ + i * kRowBytes, rows.first + i * rows.stride, left * sizeof(BFloat16));
      if (!kTwo) continue;
      std::memcpy(second + i * kRowBytes, rows.second + i * rows.stride, left * sizeof(BFloat16));
    }
    return {ends_, second, kRowBytes};
  }

  void write(int64_t panel, int64_t first, const float* sums) const {
    for (int64_t i = 0; i < height_; ++i) {
      BFloat16* out = static_cast<BFloat16*>(args_.out) + (first + i) * args_.columns;
      for (int v = 0; v < kPanelVecs; ++v) {
        const int64_t column = panel * kPanelColumns + v * kProductColumns;
        const int64_t count = args_.columns - column;
        if (count <= 0) break;
        Vec sum = load(sums + i * kPanelColumns + v * kProductColumns);
        if (args_.bias != nullptr) {
          sum += load_columns(static_cast<const BFloat16*>(args_.bias) + column, count);
        }
        store_columns(out + column, count, sum);
      }
    }
  }

  const PackedLinearArgs& args_;
  const PackedLinearPart& part_;
  const int64_t pairs_, rows_, tiles_, height_;
  alignas(64) float sums_[2 * kRegisterRows * kPanelColumns];
  alignas(64) char ends_[2 * kRegisterRows * kProductDepth * sizeof(BFloat16)];
  alignas(64) char weights_[kProductBytes];
};

void run(const PackedLinearArgs& args, const PackedLinearPart& part) {
  AmxLinear(args, part).run();
}

}  // namespace

const PackedLinearKernel& packed_linear_kernel_amx() {
  static constexpr PackedLinearKernel kKernel{kPanelColumns, kLanes, kAmxPartRows, run};
  return kKernel;
}

}  // namespace echo_vllm::cpu
