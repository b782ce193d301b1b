// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
//
// Memory of large outputs, kept for the next one of about the same size. malloc gives blocks of
// more than 32 MiB back to the system at once; for the logits of a thousand rows, mapping them anew
// page by page takes longer than all else that is done with them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace echo_vllm::cpu {

// Smaller outputs are malloc's.
constexpr int64_t kLargeBytes = int64_t{32} << 20;

// An uninitialised contiguous tensor [rows, columns] of the dtype of `x`. A large one has memory
// that goes back to a pool, of `kFreeBlocks` at most, when the last tensor that shares it is gone.
torch::stable::Tensor new_output(const torch::stable::Tensor& x, int64_t rows, int64_t columns);

}  // namespace echo_vllm::cpu
