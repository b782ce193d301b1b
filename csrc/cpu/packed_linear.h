// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
//
// What the operator (packed_linear.cpp) hands to a kernel, and the table of kernels, one per
// instruction set. As in tree_attention.h only plain data crosses this border.
//
// A packed weight holds in a panel some columns of the transposed weight (rows of the weight),
// zeros beyond the last; a panel's width says which kernel reads it.
//
// For float32 x it is [panels, K, kPanel], an even number of the instruction set's vectors. Numbers
// are fp32, or bfloat16 where that loses nothing; then, of each two vectors, the 32-bit lane i
// holds column i in its low half and column i + kLanes in its high half, so that a load, a shift
// and a mask give both.
//
// For bfloat16 x it is [panels, ceil(K / 2), 2 * kPanel]: the two numbers of a column, of every two
// steps of the depth, next to each other.
#pragma once

#include <cstdint>

namespace echo_vllm::cpu {

struct PackedLinearArgs {
  const void* x;  // [rows, depth] fp32 or bfloat16, x_stride numbers from row to row
  const void* packed;
  const void* bias;  // [columns] of the type of x, or null
  void* out;         // [rows, columns] of the type of x
  int64_t x_stride;
  int64_t rows, columns, depth;
  bool is_bfloat16;  // the packed weight of fp32 x
};

// Rows [first_row, last_row), as many as the kernel takes at most, columns
// [first_panel, last_panel) * panel.
struct PackedLinearPart {
  int64_t first_row, last_row;
  int64_t first_panel, last_panel;
};

struct PackedLinearKernel {
  int panel;
  int lanes;  // of a vector
  int64_t max_part_rows;
  void (*run)(const PackedLinearArgs& args, const PackedLinearPart& part);
};

// For float32 x.
const PackedLinearKernel& packed_linear_kernel_portable();
#if defined(__x86_64__)
const PackedLinearKernel& packed_linear_kernel_avx2();
const PackedLinearKernel& packed_linear_kernel_avx512();
// For bfloat16 x.
const PackedLinearKernel& packed_linear_kernel_avx512_bf16();
const PackedLinearKernel& packed_linear_kernel_amx();
#endif

}  // namespace echo_vllm::cpu
