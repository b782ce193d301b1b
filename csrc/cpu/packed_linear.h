// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
//
// What the operator (packed_linear.cpp) hands to a kernel, and the table of kernels, one per
// instruction set. As in tree_attention.h only plain data crosses this border.
//
// A packed weight is [panels, K, kPanel]: a panel holds kPanel columns of the transposed weight
// (kPanel rows of the weight), zeros beyond the last. kPanel is two vectors of the instruction set,
// so it says which kernel reads the weight. Numbers are fp32, or bfloat16 where that loses nothing;
// then the 32-bit lane i holds column i in its low half and column i + kPanel / 2 in its high half,
// so that a load, a shift and a mask give two vectors.
#pragma once

#include <cstdint>

namespace echo_vllm::cpu {

struct PackedLinearArgs {
  const float* x;  // [rows, depth], x_stride floats from row to row
  const void* packed;
  const float* bias;  // [columns] or null
  float* out;         // [rows, columns]
  int64_t x_stride;
  int64_t rows, columns, depth;
  bool is_bfloat16;
};

struct PackedLinearKernel {
  int panel;
  // Columns [first_panel, last_panel) * panel of rows [first_row, last_row).
  void (*run)(const PackedLinearArgs& args, int64_t first_row, int64_t last_row,
              int64_t first_panel, int64_t last_panel);
};

const PackedLinearKernel& packed_linear_kernel_portable();
#if defined(__x86_64__)
const PackedLinearKernel& packed_linear_kernel_avx2();
const PackedLinearKernel& packed_linear_kernel_avx512();
#endif

}  // namespace echo_vllm::cpu
