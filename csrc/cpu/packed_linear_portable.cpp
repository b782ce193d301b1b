// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
#include "packed_linear_kernel.h"

namespace echo_vllm::cpu {

const PackedLinearKernel& packed_linear_kernel_portable() {
  static constexpr PackedLinearKernel kKernel{kFloatPanel, kLanes, kMaxPartRows, run_packed_linear};
  return kKernel;
}

}  // namespace echo_vllm::cpu
