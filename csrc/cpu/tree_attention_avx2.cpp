// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
#include "tree_attention_kernel.h"

namespace echo_vllm::cpu {

const TreeAttentionKernel& tree_attention_kernel_avx2() {
  static constexpr TreeAttentionKernel kKernel{scratch_size, run, merge};
  return kKernel;
}

}  // namespace echo_vllm::cpu
