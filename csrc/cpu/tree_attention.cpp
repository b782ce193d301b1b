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
#include "../common/tree_mask.h"
#include "../ops.h"
#include "isa.h"
#include "threads.h"

namespace echo_vllm::cpu {
namespace {

constexpr const char* kOp = "tree_attention";

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
  if (isa == Isa::kAvx512) return tree_attention_kernel_avx512();
  if (isa == Isa::kAvx2) return tree_attention_kernel_avx2();
#endif
  return tree_attention_kernel_portable();
}

KvLayout parse_layout(const std::string& name) {
  if (name == "vec" || name == "vec16") return KvLayout::kVec;
  if (name == "amx") return KvLayout::kAmx;
  if (name == "nhd") return KvLayout::kNhd;
  fail(kOp, ": layout must be one of vec, vec16, amx, nhd, got '", name, "'");
}

Dtype parse_dtype(const Tensor& query) {
  switch (query.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      fail(kOp, ": query must be float32, bfloat16 or float16, got ",
           torch::headeronly::toString(query.scalar_type()));
  }
}

// Memory that a thread keeps from call to call.
class Buffer {
 public:
  float* at_least(int64_t floats) {
    if (floats > capacity_) {
      capacity_ = (floats + 15) / 16 * 16;
      memory_.reset(static_cast<float*>(std::aligned_alloc(64, capacity_ * sizeof(float))));
      check(memory_ != nullptr, kOp, ": out of memory for ", capacity_, " floats of scratch");
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

struct CacheView {
  int64_t num_blocks;
  CacheStrides strides;
};

CacheView check_cache(const char* name, const Tensor& cache, KvLayout layout, int64_t block_size,
                      int64_t num_kv_heads, int64_t head_size) {
  check_dim(kOp, name, cache, 4);
  check_last_dim_contiguous(kOp, name, cache);
  check_size(kOp, name, cache, 3, head_size);
  if (layout == KvLayout::kNhd) {
    check_size(kOp, name, cache, 1, block_size);
    check_size(kOp, name, cache, 2, num_kv_heads);
    return {cache.size(0), {cache.stride(0), cache.stride(2), cache.stride(1)}};
  }
  check_size(kOp, name, cache, 1, num_kv_heads);
  check_size(kOp, name, cache, 2, block_size);
  check(cache.stride(2) == head_size, kOp, ": ", name,
        " must be contiguous inside a (block, kv head), got stride ", cache.stride(2),
        " for a head size of ", head_size);
  return {cache.size(0), {cache.stride(0), cache.stride(1), 0}};
}

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
  first = std::clamp<int64_t>(first, 0, args.context_lens[request]);
  return static_cast<int>(first / kTaskKeys * kTaskKeys);
}

void check_request(const TreeAttentionArgs& args, int request, int64_t num_tokens,
                   int64_t num_suffix_rows, int64_t num_mask_rows, int64_t max_blocks,
                   int64_t num_blocks) {
  const int64_t rows = static_cast<int64_t>(args.row_start[request + 1]) - args.row_start[request];
  check(args.row_start[request] >= 0 && rows >= 0 && args.row_start[request + 1] <= num_mask_rows,
        kOp, ": row_start[", request, "..", request + 1, "] = ", args.row_start[request], ", ",
        args.row_start[request + 1], " is not a range of the ", num_mask_rows, " rows of mask");
  const int64_t query = args.query_start[request];
  check(query >= 0 && query + rows <= num_tokens, kOp, ": request ", request, " owns query rows ",
        query, " .. ", query + rows, ", but query has ", num_tokens);
  const int64_t suffix = args.suffix_start[request], length = args.suffix_len[request];
  check(suffix >= 0 && length >= 0 && suffix + length <= num_suffix_rows, kOp, ": request ",
        request, " owns suffix rows ", suffix, " .. ", suffix + length, ", but suffix_key has ",
        num_suffix_rows);
  check(words_for_bits(static_cast<int>(length)) <= args.mask_words, kOp, ": suffix_len[", request,
        "] = ", length, " needs ", words_for_bits(static_cast<int>(length)),
        " mask words, but mask has ", args.mask_words);
  const int64_t context = args.context_lens[request];
  check(context >= 0 && context <= max_blocks * args.block_size, kOp, ": context_lens[", request,
        "] = ", context, " does not fit block_table, which holds ", max_blocks, " blocks of ",
        args.block_size);
  if (rows == 0) return;
  const int32_t* blocks = args.block_table + request * args.block_table_stride;
  for (int64_t i = first_key_of(args, request) / args.block_size; i * args.block_size < context;
       ++i) {
    check(blocks[i] >= 0 && blocks[i] < num_blocks, kOp, ": block_table[", request, ", ", i,
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
    const int64_t keys = args.context_lens[r] + args.suffix_len[r] - first_key[r];
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
    const int num_keys = args.context_lens[r] + args.suffix_len[r];
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
        plan.tasks.push_back({r, head, bound(s), bound(s + 1), nullptr});
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

}  // namespace

void tree_attention(const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
                    const Tensor& block_table, const Tensor& context_lens,
                    const Tensor& query_start, const Tensor& row_start, const Tensor& suffix_key,
                    const Tensor& suffix_value, const Tensor& suffix_start,
                    const Tensor& suffix_len, const Tensor& mask, const Tensor& positions,
                    double scale, double softcap, int64_t sliding_window,
                    const std::string& layout_name, const Tensor& out) {
  const KvLayout layout = parse_layout(layout_name);
  TreeAttentionArgs args{};
  args.dtype = parse_dtype(query);
  const ScalarType dtype = query.scalar_type();

  check_dim(kOp, "query", query, 3);
  check_last_dim_contiguous(kOp, "query", query);
  const int64_t num_tokens = query.size(0), num_heads = query.size(1), head_size = query.size(2);
  check(head_size > 0 && head_size % 16 == 0, kOp, ": the head size must be a multiple of 16, got ",
        head_size);
  check_dim(kOp, "out", out, 3);
  check_dtype(kOp, "out", out, dtype);
  check_last_dim_contiguous(kOp, "out", out);
  for (int64_t dim = 0; dim < 3; ++dim) check_size(kOp, "out", out, dim, query.size(dim));

  check_dim(kOp, "suffix_key", suffix_key, 3);
  check_dim(kOp, "suffix_value", suffix_value, 3);
  check_dtype(kOp, "suffix_key", suffix_key, dtype);
  check_dtype(kOp, "suffix_value", suffix_value, dtype);
  check_last_dim_contiguous(kOp, "suffix_key", suffix_key);
  check_last_dim_contiguous(kOp, "suffix_value", suffix_value);
  const int64_t num_kv_heads = suffix_key.size(1);
  check_size(kOp, "suffix_key", suffix_key, 2, head_size);
  for (int64_t dim = 0; dim < 3; ++dim) {
    check_size(kOp, "suffix_value", suffix_value, dim, suffix_key.size(dim));
  }
  check(num_kv_heads > 0 && num_heads % num_kv_heads == 0, kOp, ": ", num_heads,
        " q heads are not a multiple of ", num_kv_heads, " kv heads");

  check_dim(kOp, "key_cache", key_cache, 4);
  check_dtype(kOp, "key_cache", key_cache, dtype);
  check_dtype(kOp, "value_cache", value_cache, dtype);
  const int64_t block_size = key_cache.size(layout == KvLayout::kNhd ? 1 : 2);
  const CacheView keys =
      check_cache("key_cache", key_cache, layout, block_size, num_kv_heads, head_size);
  const CacheView values =
      check_cache("value_cache", value_cache, layout, block_size, num_kv_heads, head_size);
  check(keys.num_blocks == values.num_blocks, kOp, ": key_cache has ", keys.num_blocks,
        " blocks, value_cache ", values.num_blocks);
  check(block_size > 0 && (layout != KvLayout::kVec || block_size % 16 == 0), kOp,
        ": the block size of the ", layout_name, " layout must be a multiple of 16, got ",
        block_size);
  if (layout == KvLayout::kAmx) {
    check(
        dtype == ScalarType::BFloat16 && head_size % 32 == 0 && block_size % 32 == 0, kOp,
        ": the amx layout holds bfloat16 with head and block sizes that are multiples of 32, got ",
        torch::headeronly::toString(dtype), ", ", head_size, ", ", block_size);
  }

  check_index_vector(kOp, "context_lens", context_lens, ScalarType::Int);
  check_index_vector(kOp, "query_start", query_start, ScalarType::Int);
  check_index_vector(kOp, "row_start", row_start, ScalarType::Int);
  check_index_vector(kOp, "suffix_start", suffix_start, ScalarType::Int);
  check_index_vector(kOp, "suffix_len", suffix_len, ScalarType::Int);
  check_index_vector(kOp, "positions", positions, ScalarType::Long);
  check_dim(kOp, "block_table", block_table, 2);
  check_dtype(kOp, "block_table", block_table, ScalarType::Int);
  check_last_dim_contiguous(kOp, "block_table", block_table);
  check_dim(kOp, "mask", mask, 2);
  check_dtype(kOp, "mask", mask, ScalarType::Long);
  check(mask.is_contiguous(), kOp, ": mask must be contiguous");
  const int64_t num_requests = context_lens.size(0);
  check_size(kOp, "row_start", row_start, 0, num_requests + 1);
  check_size(kOp, "suffix_start", suffix_start, 0, num_requests);
  check_size(kOp, "suffix_len", suffix_len, 0, num_requests);
  check_size(kOp, "positions", positions, 0, num_tokens);
  check(query_start.size(0) >= num_requests && block_table.size(0) >= num_requests, kOp, ": ",
        num_requests, " requests need as many entries of query_start and block_table, got ",
        query_start.size(0), " and ", block_table.size(0));

  args.query = query.const_data_ptr();
  args.query_stride_row = query.stride(0);
  args.query_stride_head = query.stride(1);
  args.out = out.mutable_data_ptr();
  args.out_stride_row = out.stride(0);
  args.out_stride_head = out.stride(1);
  args.key_cache = key_cache.const_data_ptr();
  args.value_cache = value_cache.const_data_ptr();
  args.key_strides = keys.strides;
  args.value_strides = values.strides;
  args.block_table = static_cast<const int32_t*>(block_table.const_data_ptr());
  args.block_table_stride = block_table.stride(0);
  args.suffix_key = suffix_key.const_data_ptr();
  args.suffix_value = suffix_value.const_data_ptr();
  args.suffix_key_stride_row = suffix_key.stride(0);
  args.suffix_key_stride_head = suffix_key.stride(1);
  args.suffix_value_stride_row = suffix_value.stride(0);
  args.suffix_value_stride_head = suffix_value.stride(1);
  args.context_lens = static_cast<const int32_t*>(context_lens.const_data_ptr());
  args.query_start = static_cast<const int32_t*>(query_start.const_data_ptr());
  args.row_start = static_cast<const int32_t*>(row_start.const_data_ptr());
  args.suffix_start = static_cast<const int32_t*>(suffix_start.const_data_ptr());
  args.suffix_len = static_cast<const int32_t*>(suffix_len.const_data_ptr());
  args.mask = static_cast<const int64_t*>(mask.const_data_ptr());
  args.mask_words = mask.size(1);
  args.positions = static_cast<const int64_t*>(positions.const_data_ptr());
  args.num_heads = static_cast<int>(num_heads);
  args.num_kv_heads = static_cast<int>(num_kv_heads);
  args.head_size = static_cast<int>(head_size);
  args.block_size = static_cast<int>(block_size);
  args.sliding_window = static_cast<int>(std::clamp<int64_t>(sliding_window, -1, INT32_MAX));
  args.scale = static_cast<float>(scale);
  args.softcap = static_cast<float>(softcap);
  args.layout = layout;

  for (int64_t r = 0; r < num_requests; ++r) {
    check_request(args, static_cast<int>(r), num_tokens, suffix_key.size(0), mask.size(0),
                  block_table.size(1), keys.num_blocks);
  }
  static thread_local Buffer partial_buffer;
  const Plan plan = make_plan(args, static_cast<int>(num_requests), partial_buffer);
  execute(args, plan, kernel_for(selected_isa()));
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
