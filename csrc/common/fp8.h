// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
//
// The 8-bit floats of a quantised cache, e4m3 as torch.float8_e4m3fn has it: sign, 4 bits of
// exponent (bias 7), 3 bits of mantissa, no infinity, and NaN where the other 7 bits are set.
// Shifted into place, they are floats of a wider format whose bias is wrong by a power of two, so
// that one exact product repairs zeros, subnormals and normals alike.
#pragma once

#include <cstdint>
#include <cstring>

#include "macros.h"

namespace echo_vllm {

ECHO_HOST_DEVICE float e4m3_to_float(uint8_t code) {
  constexpr float kRebias = 0x1p120f;  // from bias 127 to bias 7
  const uint32_t magnitude = code & 0x7fu;
  const uint32_t bits = magnitude << 20;
  float value;
  memcpy(&value, &bits, sizeof(value));
  value *= kRebias;
  uint32_t result;
  memcpy(&result, &value, sizeof(result));
  if (magnitude == 0x7fu) result = 0x7fc00000u;
  result |= static_cast<uint32_t>(code & 0x80u) << 24;
  memcpy(&value, &result, sizeof(value));
  return value;
}

// Two codes, each in the low byte of one half of a word, as two 16-bit floats with
// `mantissa_bits` (7: bfloat16, 10: float16) that still want the factor that repairs the bias.
ECHO_HOST_DEVICE uint32_t spread_e4m3_pair(uint32_t codes, int mantissa_bits) {
  return (codes & 0x007f007fu) << (mantissa_bits - 3) | (codes & 0x00800080u) << 8;
}

// The four codes of a word, lowest byte first, as two pairs.
ECHO_HOST_DEVICE uint32_t low_e4m3_pair(uint32_t codes) {
  return (codes & 0xffu) | (codes & 0xff00u) << 8;
}

ECHO_HOST_DEVICE uint32_t high_e4m3_pair(uint32_t codes) { return low_e4m3_pair(codes >> 16); }

// All bits but the sign in the halves whose code is NaN, to be added to the repaired pair.
ECHO_HOST_DEVICE uint32_t e4m3_pair_nan_bits(uint32_t codes) {
  const uint32_t is_nan = ((codes & 0x007f007fu) + 0x00010001u) >> 7 & 0x00010001u;
  return is_nan * 0x7fffu;
}

}  // namespace echo_vllm
