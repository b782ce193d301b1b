// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
//
// x + residual, normed, in the roundings of torch's operators one by one, so that the bits are
// those of vLLM's own layers. Compiled without contraction: a square is rounded before it is added.
#pragma once

#include <cmath>
#include <type_traits>
#include <vector>

#include "rms_norm.h"
#include "simd.h"

namespace echo_vllm::cpu {
namespace {

// torch adds a row up in this many chains, in vectors of eight, whatever the instruction set;
// after every kCascade steps a chain's sum moves one level up.
constexpr int kSumLanes = 8, kChains = 4, kLevels = 4, kCascade = 16;

typedef float SumVec __attribute__((vector_size(kSumLanes * 4)));

ECHO_INLINE SumVec load_sum(const float* p) {
  SumVec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

ECHO_INLINE float sum_as_torch(const float* numbers, int64_t count) {
  const int64_t vectors = count / kSumLanes, steps = vectors / kChains;
  SumVec sums[kLevels][kChains] = {};
  int64_t step = 0;
  const auto add_steps = [&](int64_t last) {
    for (; step < last; ++step) {
      for (int c = 0; c < kChains; ++c) {
        sums[0][c] += load_sum(numbers + (step * kChains + c) * kSumLanes);
      }
    }
  };
  while (step + kCascade <= steps) {
    add_steps(step + kCascade);
    int64_t period = kCascade;
    for (int level = 1; level < kLevels; ++level) {
      for (int c = 0; c < kChains; ++c) {
        sums[level][c] += sums[level - 1][c];
        sums[level - 1][c] = SumVec{};
      }
      period *= kCascade;
      if (step % period != 0) break;
    }
  }
  add_steps(steps);
  for (int level = 1; level < kLevels; ++level) {
    for (int c = 0; c < kChains; ++c) sums[0][c] += sums[level][c];
  }
  for (int64_t v = steps * kChains; v < vectors; ++v) {
    sums[0][0] += load_sum(numbers + v * kSumLanes);
  }
  for (int c = 1; c < kChains; ++c) sums[0][0] += sums[0][c];
  float sum = 0;
  for (int64_t i = vectors * kSumLanes; i < count; ++i) sum += numbers[i];
  for (int lane = 0; lane < kSumLanes; ++lane) sum += sums[0][0][lane];
  return sum;
}

ECHO_INLINE void store_one(float* to, float x) { *to = x; }

ECHO_INLINE void store_one(BFloat16* to, float x) {
  to->bits = static_cast<uint16_t>(round_to_bfloat16(splat(x))[0]);
}

template <class T>
ECHO_INLINE Vec rounded(Vec v) {
  if constexpr (std::is_same_v<T, float>) {
    return v;
  } else {
    return reinterpret_cast<Vec>(round_to_bfloat16(v) << 16);
  }
}

template <class T>
void norm_rows(const RmsNormArgs& args, int64_t first, int64_t last) {
  const int64_t size = args.size, whole = size / kLanes * kLanes;
  static thread_local std::vector<float> buffer;
  if (buffer.size() < static_cast<size_t>(2 * size)) buffer.resize(2 * size);
  float* const added = buffer.data();
  float* const squares = added + size;
  const T* weight = static_cast<const T*>(args.weight);
  for (int64_t row = first; row < last; ++row) {
    const T* x = static_cast<const T*>(args.x) + row * size;
    T* out = static_cast<T*>(args.out) + row * size;
    T* residual = args.residual == nullptr ? nullptr : static_cast<T*>(args.residual) + row * size;
    for (int64_t i = 0; i < whole; i += kLanes) {
      Vec v = load(x + i);
      if (residual != nullptr) {
        v += load(residual + i);
        store(residual + i, v);
      }
      store(added + i, v);
      store(squares + i, v * v);
    }
    for (int64_t i = whole; i < size; ++i) {
      float v = to_float(x[i]);
      if (residual != nullptr) {
        v += to_float(residual[i]);
        store_one(residual + i, v);
      }
      added[i] = v;
      squares[i] = v * v;
    }
    const float mean = sum_as_torch(squares, size) / static_cast<float>(size);
    const float factor = 1.0f / std::sqrt(mean + args.epsilon);
    for (int64_t i = 0; i < whole; i += kLanes) {
      store(out + i, rounded<T>(load(added + i) * splat(factor)) * load(weight + i));
    }
    for (int64_t i = whole; i < size; ++i) {
      store_one(out + i, rounded<T>(splat(added[i] * factor))[0] * to_float(weight[i]));
    }
  }
}

void run_rms_norm(const RmsNormArgs& args, int64_t first, int64_t last) {
  if (args.is_bfloat16) {
    norm_rows<BFloat16>(args, first, last);
  } else {
    norm_rows<float>(args, first, last);
  }
}

}  // namespace
}  // namespace echo_vllm::cpu
