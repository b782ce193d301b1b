// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
#include "tree_attention.cuh"

namespace echo_vllm::cuda {

template cudaError_t launch_mma_of_head_size<128>(const TreeAttentionArgs&, const AttentionPlan&,
                                                  cudaStream_t);

}  // namespace echo_vllm::cuda
