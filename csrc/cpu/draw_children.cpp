// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
//
// draw_children: the drawn candidates of a level, on torch's threads.
#include "draw_children.h"

#include <algorithm>

#include "../common/checks.h"
#include "../ops.h"
#include "isa.h"
#include "threads.h"

namespace echo_vllm::cpu {
namespace {

DrawChildrenKernel kernel_for(Isa isa) {
#if defined(__x86_64__)
  if (isa >= Isa::kAvx512) return draw_children_kernel_avx512();
  if (isa == Isa::kAvx2) return draw_children_kernel_avx2();
#endif
  return draw_children_kernel_portable();
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> draw_children(
    const Tensor& logits, const std::optional<Tensor>& temperature, const Tensor& keys, int64_t k,
    double scale, double exponent) {
  const char* op = "draw_children";
  check_dim(op, "logits", logits, 2);
  check_float_or_bfloat16(op, "logits", logits);
  check_last_dim_contiguous(op, "logits", logits);
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  check(vocab > 0 && vocab < (int64_t{1} << 31), op,
        ": logits must have between 1 and 2^31 - 1 columns, got shape ", ShapeOf{logits});
  check_index_vector(op, "keys", keys, ScalarType::Long);
  check_size(op, "keys", keys, 0, rows);
  check(k >= 1, op, ": k must be at least 1, got ", k);
  if (temperature.has_value()) {
    check_index_vector(op, "temperature", *temperature, ScalarType::Float);
    check_size(op, "temperature", *temperature, 0, rows);
  }
  const auto ints = [&] { return torch::stable::new_empty(keys, {rows, k}); };
  const auto floats = [&](int64_t columns) {
    return torch::stable::new_empty(keys, {rows, columns}, ScalarType::Float);
  };
  Tensor token_ids = ints(), child_keys = ints();
  Tensor logprobs = floats(k), probs = floats(vocab);
  Tensor gains = floats(scale == 0.0 ? 0 : k), reaches = floats(scale == 0.0 ? 0 : k);
  DrawChildrenArgs args{};
  args.logits = logits.const_data_ptr();
  args.is_bfloat16 = logits.scalar_type() == ScalarType::BFloat16;
  args.logits_stride = stride_of(logits, 0);
  args.temperature =
      temperature.has_value() ? static_cast<const float*>(temperature->const_data_ptr()) : nullptr;
  args.keys = static_cast<const int64_t*>(keys.const_data_ptr());
  args.vocab = vocab;
  args.k = k;
  args.scale = scale;
  args.exponent = exponent;
  args.token_ids = static_cast<int64_t*>(token_ids.mutable_data_ptr());
  args.logprobs = static_cast<float*>(logprobs.mutable_data_ptr());
  args.child_keys = static_cast<int64_t*>(child_keys.mutable_data_ptr());
  args.probs = static_cast<float*>(probs.mutable_data_ptr());
  args.gains = static_cast<float*>(gains.mutable_data_ptr());
  args.reaches = static_cast<float*>(reaches.mutable_data_ptr());
  const DrawChildrenKernel run = kernel_for(selected_isa());
  for_each_task(rows, rows > 1, [&](int64_t row) { run(args, row, row + 1); });
  return {token_ids, logprobs, child_keys, probs, gains, reaches};
}

}  // namespace echo_vllm::cpu
