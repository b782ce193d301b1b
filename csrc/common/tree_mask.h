// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
//
// The ancestor mask of a tree: one row of 64-bit words per row of a request. Row 0 is the root
// (the last sampled token), row 1 + i is node i. Bit j of a row says that the row may attend to
// row j: itself, its ancestors and the root.
#pragma once

#include <cstdint>

#include "macros.h"

namespace echo_vllm {

constexpr int kBitsPerWord = 64;

ECHO_HOST_DEVICE int words_for_bits(int bits) { return (bits + kBitsPerWord - 1) / kBitsPerWord; }

ECHO_HOST_DEVICE uint64_t bit_in_word(int bit) { return uint64_t{1} << (bit & (kBitsPerWord - 1)); }

ECHO_HOST_DEVICE void set_mask_bit(uint64_t* row, int bit) {
  row[bit / kBitsPerWord] |= bit_in_word(bit);
}

ECHO_HOST_DEVICE bool test_mask_bit(const uint64_t* row, int bit) {
  return (row[bit / kBitsPerWord] & bit_in_word(bit)) != 0;
}

// A word whose bits [begin, end) are set; 0 <= begin, end <= 64.
ECHO_HOST_DEVICE uint64_t bit_range(int begin, int end) {
  if (begin >= end) return 0;
  const uint64_t below_end = end >= kBitsPerWord ? ~uint64_t{0} : (uint64_t{1} << end) - 1;
  return below_end & ~((uint64_t{1} << begin) - 1);
}

// Writes the mask row of one node by walking up to the root and returns the node's depth (>= 1).
// `parents` belongs to one request; -1 is the root. The row must be zero on entry and hold
// node + 2 bits at least.
ECHO_HOST_DEVICE int write_ancestor_row(const int32_t* parents, int node, uint64_t* row) {
  int depth = 0;
  for (int ancestor = node; ancestor >= 0; ancestor = parents[ancestor]) {
    set_mask_bit(row, ancestor + 1);
    ++depth;
  }
  set_mask_bit(row, 0);
  return depth;
}

// One word of a node's mask row, for kernels in which each thread writes a word; node -1 is the
// root. `depth` becomes the node's depth. A parent that does not precede its child ends the walk.
ECHO_HOST_DEVICE uint64_t ancestor_word(const int32_t* parents, int node, int word, int* depth) {
  uint64_t bits = word == 0 ? 1 : 0;
  *depth = 0;
  while (node >= 0) {
    if ((node + 1) / kBitsPerWord == word) bits |= bit_in_word(node + 1);
    ++*depth;
    const int parent = parents[node];
    node = parent < node ? parent : -1;
  }
  return bits;
}

// Bits [first, first + 64) of a mask row of `length` bits as one word. Bits before the first one
// (`first` may be negative) and behind the last are 0; no word behind the last bit's is read.
ECHO_HOST_DEVICE uint64_t mask_word_at(const uint64_t* row, int length, int first) {
  if (length <= 0 || first >= length || first <= -kBitsPerWord) return 0;
  uint64_t bits;
  if (first < 0) {
    bits = row[0] << -first;
  } else {
    const int word = first / kBitsPerWord, shift = first & (kBitsPerWord - 1);
    bits = row[word] >> shift;
    if (shift != 0 && (word + 1) * kBitsPerWord < length) {
      bits |= row[word + 1] << (kBitsPerWord - shift);
    }
  }
  const int left = length - first;
  return left < kBitsPerWord ? bits & bit_range(0, left) : bits;
}

// The child of `row` (a row index: 0 = root) that holds `token`, as a row index, or -1.
// Parents precede children, so the search starts behind the parent.
template <class Token>
ECHO_HOST_DEVICE int find_child_row(const int32_t* parents, int num_nodes, int row, int64_t token,
                                    const Token* token_ids) {
  for (int node = row; node < num_nodes; ++node) {
    if (parents[node] == row - 1 && token_ids[node] == token) return node + 1;
  }
  return -1;
}

}  // namespace echo_vllm
