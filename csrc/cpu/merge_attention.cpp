// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
//
// merge_attention on the CPU: a row and head at a time, on torch's threads.
#include "../common/merge_attention.h"

#include <cmath>
#include <cstring>

#include "../common/checks.h"
#include "../common/tree_attention_checks.h"
#include "../ops.h"
#include "simd.h"
#include "threads.h"

namespace echo_vllm::cpu {
namespace {

// Fewer numbers than this are merged faster by one thread than it takes to wake the others.
constexpr int64_t kMinParallelNumbers = 1 << 15;

template <class T>
void merge_line(const MergeAttentionArgs& args, int64_t token, int head) {
  const auto lse_of = [&](int part) {
    return args.parts[part].lse[head * args.parts[part].lse_stride_head + token];
  };
  const MergeWeights weights = merge_weights(
      lse_of(0), lse_of(1), [](float x) { return std::exp(x); },
      [](float x) { return std::log(x); });
  T* out = static_cast<T*>(args.out) + token * args.out_stride_row + head * args.out_stride_head;
  const T* from[2];
  for (int part = 0; part < 2; ++part) {
    const AttentionPart& p = args.parts[part];
    from[part] = static_cast<const T*>(p.out) + token * p.stride_row + head * p.stride_head;
  }
  for (int d = 0; d < args.head_size; d += kLanes) {
    Vec sum{};
    for (int part = 0; part < 2; ++part) {
      if (weights.share[part] > 0.0f) sum += load(from[part] + d) * weights.share[part];
    }
    store(out + d, sum);
  }
  if (args.lse != nullptr) args.lse[head * args.lse_stride_head + token] = weights.lse;
}

template <class T>
void merge_rows(const MergeAttentionArgs& args) {
  const int64_t first = args.row_start[0];
  const int64_t rows = args.row_start[args.num_requests] - first;
  const int64_t numbers = rows * args.num_heads * args.head_size;
  for_each_task(rows, numbers >= kMinParallelNumbers, [&](int64_t i) {
    const int64_t row = first + i;
    const int request = request_of_row(args.row_start, args.num_requests, row);
    const int64_t token = args.query_start[request] + row - args.row_start[request];
    for (int head = 0; head < args.num_heads; ++head) merge_line<T>(args, token, head);
  });
}

}  // namespace

void merge_attention(const Tensor& prefix_out, const Tensor& prefix_lse, const Tensor& suffix_out,
                     const Tensor& suffix_lse, const Tensor& query_start, const Tensor& row_start,
                     const Tensor& out, const std::optional<Tensor>& lse) {
  const MergeAttentionArgs args = check_merge_attention(
      prefix_out, prefix_lse, suffix_out, suffix_lse, query_start, row_start, out, lse);
  for (int r = 0; r < args.num_requests; ++r) {
    const int64_t rows = int64_t{args.row_start[r + 1]} - args.row_start[r];
    const int64_t query = args.query_start[r];
    check(args.row_start[r] >= 0 && rows >= 0 && query >= 0 && query + rows <= args.num_tokens,
          kMergeAttentionOp, ": request ", r, " owns rows ", query, " .. ", query + rows,
          ", but out has ", args.num_tokens);
  }
  if (args.num_requests == 0) return;
  switch (args.dtype) {
    case Dtype::kFloat32:
      return merge_rows<float>(args);
    case Dtype::kBFloat16:
      return merge_rows<BFloat16>(args);
    case Dtype::kFloat16:
      return merge_rows<Float16>(args);
  }
}

}  // namespace echo_vllm::cpu
