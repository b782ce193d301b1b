// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
//
// The tree attention operator on the CPU: checks its arguments, cuts the batch into tasks, and
// runs the kernel of the selected instruction set on torch's threads.
#include "tree_attention.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>

#include "../common/checks.h"
#include "../common/tree_attention_checks.h"
#include "../common/tree_mask.h"
#include "../ops.h"
#include "isa.h"
#include "threads.h"

namespace echo_vllm::cpu {
namespace {

// Fewer multiply-adds than this are not worth waking the other threads (a few microseconds).
constexpr int64_t kMinParallelWork = 1 << 19;
// More tasks than threads even out their different lengths.
constexpr int64_t kTasksPerThread = 4;
// Splitting the keys costs a partial result; parts of fewer than this many kTaskKeys do not repay
// it.
constexpr int64_t kMinSplitUnits = 4;

const TreeAttentionKernel& kernel_for(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAmx) return tree_attention_kernel_amx();
  if (isa >= Isa::kAvx512) return tree_attention_kernel_avx512();
  if (isa == Isa::kAvx2) return tree_attention_kernel_avx2();
#endif
  return tree_attention_kernel_portable();
}

// Memory that a thread keeps from call to call.
class Buffer {
 public:
  float* at_least(int64_t floats) {
    if (floats > capacity_) {
      const int64_t wanted = (floats + 15) / 16 * 16;
      capacity_ = 0;
      memory_.reset(static_cast<float*>(std::aligned_alloc(64, wanted * sizeof(float))));
      check(memory_ != nullptr, kTreeAttentionOp, ": out of memory for ", wanted,
            " floats of scratch");
      capacity_ = wanted;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> memory_;
  int64_t capacity_ = 0;
};

// The first key that a window leaves visible to any row of the request, rounded down to where
// a task may begin.
int first_key_of(const TreeAttentionArgs& args, int request) {
  if (args.sliding_window <= 0) return 0;
  const int rows = args.row_start[request + 1] - args.row_start[request];
  int64_t first = INT32_MAX;
  for (int row = 0; row < rows; ++row) {
    first =
        std::min(first, args.positions[args.query_start[request] + row] - args.sliding_window + 1);
  }
  first = std::clamp<int64_t>(first, 0, context_of(args, request));
  return static_cast<int>(first / kTaskKeys * kTaskKeys);
}

void check_request(const char* op, const TreeAttentionArgs& args, int request, int64_t num_tokens,
                   int64_t num_suffix_rows, int64_t num_mask_rows, int64_t max_blocks,
                   int64_t num_blocks) {
  const int64_t rows = static_cast<int64_t>(args.row_start[request + 1]) - args.row_start[request];
  check(args.row_start[request] >= 0 && rows >= 0 && args.row_start[request + 1] <= num_mask_rows,
        op, ": row_start[", request, "..", request + 1, "] = ", args.row_start[request], ", ",
        args.row_start[request + 1], " is not a range of the ", num_mask_rows, " rows of mask");
  const int64_t query = args.query_start[request];
  check(query >= 0 && query + rows <= num_tokens, op, ": request ", request, " owns query rows ",
        query, " .. ", query + rows, ", but query has ", num_tokens);
  const int64_t suffix = args.suffix_start[request], length = args.suffix_len[request];
  check(suffix >= 0 && length >= 0 && suffix + length <= num_suffix_rows, op, ": request ", request,
        " owns suffix rows ", suffix, " .. ", suffix + length, ", but suffix_key has ",
        num_suffix_rows);
  check(words_for_bits(static_cast<int>(length)) <= args.mask_words, op, ": suffix_len[", request,
        "] = ", length, " needs ", words_for_bits(static_cast<int>(length)),
        " mask words, but mask has ", args.mask_words);
  const int64_t context = context_of(args, request);
  check(context >= 0 && context <= max_blocks * args.block_size, op, ": context_lens[", request,
        "] = ", context, " does not fit block_table, which holds ", max_blocks, " blocks of ",
        args.block_size);
  if (rows == 0) return;
  const int32_t* blocks = args.block_table + request * args.block_table_stride;
  for (int64_t i = first_key_of(args, request) / args.block_size; i * args.block_size < context;
       ++i) {
    check(blocks[i] >= 0 && blocks[i] < num_blocks, op, ": block_table[", request, ", ", i,
          "] = ", blocks[i], ", but the cache has ", num_blocks, " blocks");
  }
}

// One (request, kv head) and its share of the tasks.
struct Item {
  int request, kv_head;
  int64_t first_task, num_tasks;
  float* partials;  // num_tasks states, or null for one task
  int64_t partial_stride;
};

struct Plan {
  std::vector<Item> items;
  std::vector<TreeAttentionTask> tasks;
  std::vector<int> item_of_task;
  int64_t max_lines = 0;
  bool parallel = false;
};

Plan make_plan(const TreeAttentionArgs& args, int num_requests, Buffer& partial_buffer) {
  const int group = args.num_heads / args.num_kv_heads;
  const auto lines_of = [&](int request) {
    return static_cast<int64_t>(args.row_start[request + 1] - args.row_start[request]) * group;
  };
  Plan plan;
  int64_t total_work = 0;
  std::vector<int> first_key(num_requests);
  std::vector<int64_t> work(num_requests);
  for (int r = 0; r < num_requests; ++r) {
    if (lines_of(r) == 0) continue;
    plan.max_lines = std::max(plan.max_lines, lines_of(r));
    first_key[r] = first_key_of(args, r);
    const int64_t keys = context_of(args, r) + args.suffix_len[r] - first_key[r];
    work[r] = 2 * lines_of(r) * keys * args.head_size;
    total_work += work[r] * args.num_kv_heads;
  }
  const int64_t num_threads = torch::stable::get_num_threads();
  plan.parallel = num_threads > 1 && total_work >= kMinParallelWork;
  const int64_t work_per_task =
      plan.parallel ? std::max<int64_t>(1, total_work / (num_threads * kTasksPerThread))
                    : total_work + 1;
  int64_t partial_floats = 0;
  for (int r = 0; r < num_requests; ++r) {
    if (lines_of(r) == 0) continue;
    const int num_keys = context_of(args, r) + args.suffix_len[r];
    const int64_t units = (num_keys - first_key[r] + kTaskKeys - 1) / kTaskKeys;
    const int64_t splits = std::clamp<int64_t>((work[r] + work_per_task - 1) / work_per_task, 1,
                                               std::max<int64_t>(1, units / kMinSplitUnits));
    for (int head = 0; head < args.num_kv_heads; ++head) {
      Item item{r, head, static_cast<int64_t>(plan.tasks.size()), splits, nullptr, 0};
      if (splits > 1) {
        item.partial_stride = (partial_size(lines_of(r), args.head_size) + 15) / 16 * 16;
        partial_floats += item.partial_stride * splits;
      }
      for (int64_t s = 0; s < splits; ++s) {
        const auto bound = [&](int64_t part) {
          return static_cast<int>(
              std::min<int64_t>(first_key[r] + units * part / splits * kTaskKeys, num_keys));
        };
        plan.tasks.push_back({r, head, bound(s), bound(s + 1), nullptr, nullptr});
        plan.item_of_task.push_back(static_cast<int>(plan.items.size()));
      }
      plan.items.push_back(item);
    }
  }
  float* next = partial_floats > 0 ? partial_buffer.at_least(partial_floats) : nullptr;
  for (Item& item : plan.items) {
    if (item.num_tasks == 1) continue;
    item.partials = next;
    for (int64_t s = 0; s < item.num_tasks; ++s) {
      plan.tasks[item.first_task + s].partial = next;
      next += item.partial_stride;
    }
  }
  // Threads take tasks in turns.
  const size_t stride = plan.parallel ? num_threads : 1;
  for (size_t t = 0; t + stride < plan.tasks.size(); ++t) {
    plan.tasks[t].next = &plan.tasks[t + stride];
  }
  return plan;
}

void execute(const TreeAttentionArgs& args, const Plan& plan, const TreeAttentionKernel& kernel) {
  if (plan.tasks.empty()) return;
  const int64_t scratch_floats = kernel.scratch_size(args, plan.max_lines);
  // Tasks of an item still to be done; whoever does the last one merges.
  std::unique_ptr<std::atomic<int64_t>[]> left(new std::atomic<int64_t>[plan.items.size()]);
  for (size_t i = 0; i < plan.items.size(); ++i) left[i].store(plan.items[i].num_tasks);
  for_each_task(static_cast<int64_t>(plan.tasks.size()), plan.parallel, [&](int64_t t) {
    static thread_local Buffer scratch_buffer;
    float* scratch = scratch_buffer.at_least(scratch_floats);
    kernel.run(args, plan.tasks[t], scratch);
    const Item& item = plan.items[plan.item_of_task[t]];
    if (item.partials == nullptr) return;
    if (left[plan.item_of_task[t]].fetch_sub(1, std::memory_order_acq_rel) == 1) {
      kernel.merge(args, item.request, item.kv_head, item.partials, item.num_tasks,
                   item.partial_stride, scratch);
    }
  });
}

void attend(const TreeAttentionArgs& args, int64_t num_requests) {
  static thread_local Buffer partial_buffer;
  const Plan plan = make_plan(args, static_cast<int>(num_requests), partial_buffer);
  execute(args, plan, kernel_for(selected_isa()));
}

}  // namespace

void tree_attention(const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
                    const Tensor& block_table, const Tensor& context_lens,
                    const Tensor& query_start, const Tensor& row_start, const Tensor& suffix_key,
                    const Tensor& suffix_value, const Tensor& suffix_start,
                    const Tensor& suffix_len, const Tensor& mask, const Tensor& positions,
                    double scale, double softcap, int64_t sliding_window,
                    const std::string& layout_name, const Tensor& out,
                    const std::optional<Tensor>& lse, double k_scale, double v_scale) {
  const TreeAttentionArgs args = check_tree_attention(
      query, key_cache, value_cache, block_table, context_lens, query_start, row_start, suffix_key,
      suffix_value, suffix_start, suffix_len, mask, positions, scale, softcap, sliding_window,
      layout_name, out, lse, k_scale, v_scale);
  const int64_t num_requests = context_lens.size(0);
  for (int64_t r = 0; r < num_requests; ++r) {
    check_request(kTreeAttentionOp, args, static_cast<int>(r), query.size(0), suffix_key.size(0),
                  mask.size(0), block_table.size(1), key_cache.size(0));
  }
  attend(args, num_requests);
}

void suffix_attention(const Tensor& query, const Tensor& query_start, const Tensor& row_start,
                      const Tensor& suffix_key, const Tensor& suffix_value,
                      const Tensor& suffix_start, const Tensor& suffix_len, const Tensor& mask,
                      double scale, double softcap, const Tensor& out, const Tensor& lse) {
  const TreeAttentionArgs args = check_suffix_attention(
      kSuffixAttentionOp, query, query_start, row_start, suffix_key, suffix_value, suffix_start,
      suffix_len, mask, scale, softcap, out, lse);
  const int64_t num_requests = suffix_len.size(0);
  for (int64_t r = 0; r < num_requests; ++r) {
    check_request(kSuffixAttentionOp, args, static_cast<int>(r), query.size(0), suffix_key.size(0),
                  mask.size(0), 0, 0);
  }
  attend(args, num_requests);
}

std::string supported_isas_text() {
  std::string text;
  for (const Isa isa : supported_isas()) {
    text += text.empty() ? "" : ",";
    text += isa_name(isa);
  }
  return text;
}

}  // namespace echo_vllm::cpu
