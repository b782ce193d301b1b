// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
//
// The order in which candidates get their share of a budget: tier ascending, score descending,
// then request and column ascending. Tier and score are packed into one unsigned word, so that
// comparing, sorting and radix passes all see plain integers.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "macros.h"

namespace echo_vllm {

// Whether there is a candidate at all: -inf marks an empty column, and NaN is no score.
constexpr float kNoCandidate = -std::numeric_limits<float>::infinity();

ECHO_HOST_DEVICE bool is_candidate(float score) { return score > kNoCandidate; }

// Smaller is better. Both zeros are the same score.
ECHO_HOST_DEVICE uint64_t rank_key(int32_t tier, float score) {
  constexpr uint32_t kSign = 0x80000000u;
  const float unsigned_zero = score + 0.0f;
  uint32_t bits;
  memcpy(&bits, &unsigned_zero, sizeof(bits));
  // The bits of floats, read as integers, ascend for positive and descend for negative numbers.
  const uint32_t ascending = (bits & kSign) != 0 ? ~bits : bits | kSign;
  return uint64_t{static_cast<uint32_t>(tier) ^ kSign} << 32 | static_cast<uint32_t>(~ascending);
}

struct RankedCandidate {
  uint64_t key;
  int64_t index;  // request * columns + column
};

ECHO_HOST_DEVICE bool ranks_before(const RankedCandidate& a, const RankedCandidate& b) {
  return a.key != b.key ? a.key < b.key : a.index < b.index;
}

}  // namespace echo_vllm
