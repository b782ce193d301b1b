// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
#include "tree_attention.cuh"

namespace echo_vllm::cuda {

ECHO_MMA_OF_HEAD_SIZE(256, true);

}  // namespace echo_vllm::cuda
