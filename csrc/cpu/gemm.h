// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
//
// C[m, n] (+)= A[m, k] B[k, n] for the small products of attention: A and C in fp32, B in the
// cache's type and read straight from it. A register tile holds kRows x kVecs accumulators.
#pragma once

#include "simd.h"

namespace echo_vllm::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kTileRows = 6, kTileVecs = 4;  // 24 of 32 registers accumulate
#else
constexpr int kTileRows = 4, kTileVecs = 2;  // 8 of 16
#endif

// Memory that is read after a product and fetched during it: so many lines a step of the depth. The
// product itself takes about as long as its operand takes to come.
struct Fetch {
  const char* at = nullptr;
  const char* end = nullptr;
  int lines = 0;

  // Spread over that many steps.
  static Fetch of(const void* begin, int64_t bytes, int steps) {
    const char* first = static_cast<const char*>(begin);
    const int64_t lines = (bytes + kLineBytes - 1) / kLineBytes;
    return {first, first + bytes, static_cast<int>((lines + steps - 1) / steps)};
  }

  ECHO_INLINE_MEMBER void step() {
    for (int line = 0; line < lines && at < end; ++line, at += kLineBytes) {
      __builtin_prefetch(at, 0, 2);
    }
  }
};

template <int kRows, int kVecs, bool kAccumulate, class T>
ECHO_INLINE void gemm_tile(const float* a, int64_t lda, const T* b, int64_t ldb, float* c,
                           int64_t ldc, int depth, Fetch& fetch) {
  Vec acc[kRows][kVecs];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j) {
      acc[i][j] = kAccumulate ? load(c + i * ldc + j * kLanes) : Vec{};
    }
  }
  for (int k = 0; k < depth; ++k) {
    fetch.step();
    Vec row[kVecs];
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j) row[j] = load(b + k * ldb + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Vec factor = splat(a[i * lda + k]);
#pragma GCC unroll 8
      for (int j = 0; j < kVecs; ++j) acc[i][j] += factor * row[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j) store(c + i * ldc + j * kLanes, acc[i][j]);
  }
}

template <int kVecs, bool kAccumulate, class T>
ECHO_INLINE void gemm_strip(const float* a, int64_t lda, const T* b, int64_t ldb, float* c,
                            int64_t ldc, int rows, int depth, Fetch& fetch) {
  int i = 0;
  for (; i + kTileRows <= rows; i += kTileRows) {
    gemm_tile<kTileRows, kVecs, kAccumulate>(a + i * lda, lda, b, ldb, c + i * ldc, ldc, depth,
                                             fetch);
  }
  a += i * lda;
  c += i * ldc;
  switch (rows - i) {
    case 5:
      gemm_tile < kTileRows<6 ? 1 : 5, kVecs, kAccumulate>(a, lda, b, ldb, c, ldc, depth, fetch);
      break;
    case 4:
      gemm_tile < kTileRows<6 ? 1 : 4, kVecs, kAccumulate>(a, lda, b, ldb, c, ldc, depth, fetch);
      break;
    case 3:
      gemm_tile<3, kVecs, kAccumulate>(a, lda, b, ldb, c, ldc, depth, fetch);
      break;
    case 2:
      gemm_tile<2, kVecs, kAccumulate>(a, lda, b, ldb, c, ldc, depth, fetch);
      break;
    case 1:
      gemm_tile<1, kVecs, kAccumulate>(a, lda, b, ldb, c, ldc, depth, fetch);
      break;
    default:
      break;
  }
}

// `columns` is a multiple of kLanes.
template <bool kAccumulate, class T>
void gemm(const float* a, int64_t lda, const T* b, int64_t ldb, float* c, int64_t ldc, int rows,
          int columns, int depth, Fetch fetch = {}) {
  int j = 0;
  for (; j + kTileVecs * kLanes <= columns; j += kTileVecs * kLanes) {
    gemm_strip<kTileVecs, kAccumulate>(a, lda, b + j, ldb, c + j, ldc, rows, depth, fetch);
  }
  for (; j < columns; j += kLanes) {
    gemm_strip<1, kAccumulate>(a, lda, b + j, ldb, c + j, ldc, rows, depth, fetch);
  }
}

}  // namespace
}  // namespace echo_vllm::cpu
