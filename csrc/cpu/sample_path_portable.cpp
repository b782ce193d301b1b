// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
#include "sample_path_kernel.h"

namespace echo_vllm::cpu {

SamplePathKernel sample_path_kernel_portable() { return run_sample_path; }

}  // namespace echo_vllm::cpu
