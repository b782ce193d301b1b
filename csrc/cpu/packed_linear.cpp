// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
//
// pack_linear and packed_linear: the linear layers of a forward over few rows, on torch's threads.
#include "packed_linear.h"

#include <algorithm>
#include <string>

#include "../common/checks.h"
#include "../ops.h"
#include "isa.h"
#include "large_blocks.h"
#include "threads.h"

namespace echo_vllm::cpu {
namespace {

// More tasks than threads even out what else the machine does.
constexpr int64_t kTasksPerThread = 4;
// Fewer multiply-adds than this are not worth waking the other threads.
constexpr int64_t kMinParallelWork = 1 << 17;

const PackedLinearKernel& kernel_for(Isa isa) {
#if defined(__x86_64__)
  if (isa >= Isa::kAvx512) return packed_linear_kernel_avx512();
  if (isa == Isa::kAvx2) return packed_linear_kernel_avx2();
#endif
  return packed_linear_kernel_portable();
}

// The kernel that reads panels of this width.
const PackedLinearKernel& kernel_of_panel(const char* op, int64_t panel) {
  std::string known;
  for (const Isa isa : supported_isas()) {
    const PackedLinearKernel& kernel = kernel_for(isa);
    if (kernel.panel == panel) return kernel;
    known += (known.empty() ? "" : ", ") + std::to_string(kernel.panel);
  }
  fail(op, ": packed.shape[2] must be a panel that this machine reads (", known, "), got ", panel,
       "; pack the weight with pack_linear");
}

// The kernel for bfloat16 x.
const PackedLinearKernel& pair_kernel(const char* op) {
#if defined(__x86_64__)
  if (selected_isa() >= Isa::kAmx) return packed_linear_kernel_amx();
  if (selected_isa() >= Isa::kAvx512Bf16) return packed_linear_kernel_avx512_bf16();
#endif
  fail(op,
       ": bfloat16 needs a processor with AVX-512 instructions for it (avx512_bf16); use float32");
}

bool is_bfloat16(const uint32_t* bits, int64_t count) {
  uint32_t low = 0;
  for (int64_t i = 0; i < count; ++i) low |= bits[i] & 0xffffu;
  return low == 0;
}

// [panels, ceil(K / 2), 2 * panel] of bfloat16 numbers [columns, depth].
Tensor pack_pairs(const Tensor& weight, int64_t panel) {
  const int64_t columns = weight.size(0), depth = weight.size(1);
  const int64_t panels = (columns + panel - 1) / panel, steps = (depth + 1) / 2;
  const uint16_t* from = static_cast<const uint16_t*>(weight.const_data_ptr());
  Tensor packed = torch::stable::new_empty(weight, {panels, steps, 2 * panel});
  uint16_t* to = static_cast<uint16_t*>(packed.mutable_data_ptr());
  for_each_task(panels, true, [&](int64_t p) {
    for (int64_t k = 0; k < 2 * steps; ++k) {
      for (int64_t j = 0; j < panel; ++j) {
        const int64_t column = p * panel + j;
        to[((p * steps + k / 2) * panel + j) * 2 + k % 2] =
            column < columns && k < depth ? from[column * depth + k] : uint16_t{0};
      }
    }
  });
  return packed;
}

// [panels, K, panel] of fp32 numbers [columns, depth].
Tensor pack_floats(const Tensor& weight) {
  const int64_t columns = weight.size(0), depth = weight.size(1);
  const PackedLinearKernel& kernel = kernel_for(selected_isa());
  const int64_t panel = kernel.panel, lanes = kernel.lanes;
  const int64_t panels = (columns + panel - 1) / panel;
  const uint32_t* from = static_cast<const uint32_t*>(weight.const_data_ptr());
  const bool halves = is_bfloat16(from, columns * depth);
  Tensor packed = torch::stable::new_empty(weight, {panels, depth, panel},
                                           halves ? ScalarType::BFloat16 : ScalarType::Float);
  void* to = packed.mutable_data_ptr();
  for_each_task(panels, true, [&](int64_t p) {
    for (int64_t k = 0; k < depth; ++k) {
      const int64_t begin = (p * depth + k) * panel;
      for (int64_t j = 0; j < panel; ++j) {
        const int64_t column = p * panel + j;
        const uint32_t bits = column < columns ? from[column * depth + k] : 0;
        if (halves) {
          // Of two vectors, the first one's columns are the lower halves.
          const int64_t pair = j / (2 * lanes), place = j % (2 * lanes);
          const int64_t at = 2 * lanes * pair + 2 * (place % lanes) + place / lanes;
          static_cast<uint16_t*>(to)[begin + at] = static_cast<uint16_t>(bits >> 16);
        } else {
          static_cast<uint32_t*>(to)[begin + j] = bits;
        }
      }
    }
  });
  return packed;
}

}  // namespace

Tensor pack_linear(const Tensor& weight) {
  const char* op = "pack_linear";
  check_dim(op, "weight", weight, 2);
  check_float_or_bfloat16(op, "weight", weight);
  check(weight.is_contiguous(), op, ": weight must be contiguous");
  if (weight.scalar_type() == ScalarType::BFloat16)
    return pack_pairs(weight, pair_kernel(op).panel);
  return pack_floats(weight);
}

Tensor packed_linear(const Tensor& x, const Tensor& packed, int64_t num_columns,
                     const std::optional<Tensor>& bias) {
  const char* op = "packed_linear";
  check_dim(op, "x", x, 2);
  check_float_or_bfloat16(op, "x", x);
  const ScalarType dtype = x.scalar_type();
  const bool pairs = dtype == ScalarType::BFloat16;
  check_last_dim_contiguous(op, "x", x);
  check_dim(op, "packed", packed, 3);
  check_size(op, "packed", packed, 1, pairs ? (x.size(1) + 1) / 2 : x.size(1));
  check(x.size(1) > 0, op, ": x must have columns, got shape ", ShapeOf{x});
  check(packed.is_contiguous(), op, ": packed must be contiguous");
  const ScalarType kept = packed.scalar_type();
  check(kept == ScalarType::BFloat16 || (!pairs && kept == ScalarType::Float), op,
        ": packed must be ", pairs ? "BFloat16" : "Float or BFloat16", ", got ",
        torch::headeronly::toString(kept));
  const PackedLinearKernel& kernel = pairs ? pair_kernel(op) : kernel_of_panel(op, packed.size(2));
  if (pairs) check_size(op, "packed", packed, 2, 2 * kernel.panel);
  const int64_t panels = packed.size(0);
  check((num_columns + kernel.panel - 1) / kernel.panel == panels && num_columns > 0, op,
        ": num_columns must fit the ", panels, " panels of ", kernel.panel, ", got ", num_columns);
  PackedLinearArgs args{};
  if (bias.has_value()) {
    check_dim(op, "bias", *bias, 1);
    check_dtype(op, "bias", *bias, dtype);
    check_size(op, "bias", *bias, 0, num_columns);
    check_last_dim_contiguous(op, "bias", *bias);
    args.bias = bias->const_data_ptr();
  }
  Tensor out = new_output(x, x.size(0), num_columns);
  args.x = x.const_data_ptr();
  args.packed = packed.const_data_ptr();
  args.out = out.mutable_data_ptr();
  args.x_stride = x.stride(0);
  args.rows = x.size(0);
  args.columns = num_columns;
  args.depth = x.size(1);
  args.is_bfloat16 = kept == ScalarType::BFloat16;
  if (args.rows == 0) return out;
  const int64_t blocks = (args.rows + kernel.max_part_rows - 1) / kernel.max_part_rows;
  const int64_t wanted = torch::stable::get_num_threads() * kTasksPerThread;
  const int64_t parts = std::min(panels, (wanted + blocks - 1) / blocks);
  const bool parallel = args.rows * num_columns * args.depth >= kMinParallelWork;
  for_each_task(blocks * parts, parallel, [&](int64_t task) {
    const int64_t block = task / parts, part = task % parts;
    kernel.run(args, {args.rows * block / blocks, args.rows * (block + 1) / blocks,
                      panels * part / parts, panels * (part + 1) / parts});
  });
  return out;
}

}  // namespace echo_vllm::cpu
