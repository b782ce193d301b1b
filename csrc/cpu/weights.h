// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
//
// A row of logits as weights that are not normalised. Compiled once per instruction set.
#pragma once

#include "simd.h"

namespace echo_vllm::cpu {
namespace {

ECHO_INLINE float max_of(const float* x, int n) {
  Vec top = splat(-__builtin_inff());
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) top = max(load(x + i), top);
  float result = horizontal_max(top);
  for (; i < n; ++i) result = x[i] > result ? x[i] : result;
  return result;
}

// exp((x - top) / temperature), exactly 0 where it is below 2^-124. `top` is finite; `out` may be
// x.
ECHO_INLINE void exponentials(const float* x, int n, float top, float* out,
                              float temperature = 1.0f) {
  constexpr float kLowest = -124.0f;
  const float sharpness = kLog2E / temperature;
  const auto weigh = [&](Vec v) {
    const Vec power = (v - top) * sharpness;
    return power > kLowest ? exp2<5>(power) : Vec{};
  };
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, weigh(load(x + i)));
  for (; i < n; ++i) out[i] = weigh(splat(x[i]))[0];
}

}  // namespace
}  // namespace echo_vllm::cpu
