// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
#include "draw_children_kernel.h"

namespace echo_vllm::cpu {

DrawChildrenKernel draw_children_kernel_portable() { return run_draw_children; }

}  // namespace echo_vllm::cpu
