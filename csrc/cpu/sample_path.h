// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
//
// The kernels of sample_path, one per instruction set. As in packed_linear.h only plain data
// crosses this border.
#pragma once

#include "../common/rejection.h"

namespace echo_vllm::cpu {

// Walks the tree of one request. `scratch` has room for 2 * vocab floats, one user at a time.
using SamplePathKernel = void (*)(const SamplePathArgs& args, int request, float* scratch);

SamplePathKernel sample_path_kernel_portable();
#if defined(__x86_64__)
SamplePathKernel sample_path_kernel_avx2();
SamplePathKernel sample_path_kernel_avx512();
#endif

}  // namespace echo_vllm::cpu
