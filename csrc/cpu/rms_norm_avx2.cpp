// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
#include "rms_norm_kernel.h"

namespace echo_vllm::cpu {

RmsNormKernel rms_norm_kernel_avx2() { return run_rms_norm; }

}  // namespace echo_vllm::cpu
