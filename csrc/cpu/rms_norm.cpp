// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
//
// rms_norm: the norms between the linear layers of a forward, on torch's threads.
#include "rms_norm.h"

#include <algorithm>

#include "../common/checks.h"
#include "../ops.h"
#include "isa.h"
#include "threads.h"

namespace echo_vllm::cpu {
namespace {

// Fewer numbers than this are not worth waking the other threads.
constexpr int64_t kMinParallelNumbers = 1 << 15;

RmsNormKernel kernel_for(Isa isa) {
#if defined(__x86_64__)
  if (isa >= Isa::kAvx512) return rms_norm_kernel_avx512();
  if (isa == Isa::kAvx2) return rms_norm_kernel_avx2();
#endif
  return rms_norm_kernel_portable();
}

}  // namespace

Tensor rms_norm(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& weight,
                double epsilon) {
  const char* op = "rms_norm";
  check_dim(op, "x", x, 2);
  check_float_or_bfloat16(op, "x", x);
  const ScalarType dtype = x.scalar_type();
  check(x.is_contiguous(), op, ": x must be contiguous");
  const int64_t rows = x.size(0), size = x.size(1);
  check(size > 0, op, ": x must have columns, got shape ", ShapeOf{x});
  check_dim(op, "weight", weight, 1);
  check_dtype(op, "weight", weight, dtype);
  check_size(op, "weight", weight, 0, size);
  check_last_dim_contiguous(op, "weight", weight);
  RmsNormArgs args{};
  if (residual.has_value()) {
    check_dim(op, "residual", *residual, 2);
    check_dtype(op, "residual", *residual, dtype);
    check_size(op, "residual", *residual, 0, rows);
    check_size(op, "residual", *residual, 1, size);
    check(residual->is_contiguous(), op, ": residual must be contiguous");
    args.residual = residual->mutable_data_ptr();
  }
  Tensor out = torch::stable::new_empty(x, {rows, size});
  args.x = x.const_data_ptr();
  args.weight = weight.const_data_ptr();
  args.out = out.mutable_data_ptr();
  args.size = size;
  args.epsilon = static_cast<float>(epsilon);
  args.is_bfloat16 = dtype == ScalarType::BFloat16;
  const RmsNormKernel run = kernel_for(selected_isa());
  const bool parallel = rows * size >= kMinParallelNumbers;
  const int64_t tasks =
      parallel ? std::min<int64_t>(rows, 4 * torch::stable::get_num_threads()) : 1;
  if (rows == 0) return out;
  for_each_task(tasks, parallel,
                [&](int64_t task) { run(args, rows * task / tasks, rows * (task + 1) / tasks); });
  return out;
}

}  // namespace echo_vllm::cpu
