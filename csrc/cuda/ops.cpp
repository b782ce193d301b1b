// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
//
// The operators on CUDA tensors: they check shapes on the host, allocate by shapes alone, and call
// the launchers. What is in device memory is trusted: nothing here waits for the device, so a
// forest or a slot that does not fit cannot be refused as it is on the CPU.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <memory>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "../common/checks.h"
#include "../common/ragged_tiles.h"
#include "../common/sample_path_checks.h"
#include "../common/tree_attention_checks.h"
#include "kernels.h"

// Weak: torch's CPU builds lack it, and the library must load there too.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace echo_vllm::cuda {
namespace {

// A launch goes to the current device, which need not be the tensors'.
#if defined(ECHO_EMULATE_CUDA)
struct DeviceGuard {
  explicit DeviceGuard(int) {}
};
#else
using torch::stable::accelerator::DeviceGuard;
#endif

cudaStream_t current_stream(const Tensor& tensor) {
#if defined(ECHO_EMULATE_CUDA)
  static_cast<void>(tensor);
  return nullptr;
#else
  void* stream = nullptr;
  check(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA streams");
  check(
      aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) == AOTI_TORCH_SUCCESS,
      "torch gave no CUDA stream for device ", tensor.get_device_index());
  return static_cast<cudaStream_t>(stream);
#endif
}

void check_launch(const char* op, cudaError_t error) {
  check(error != cudaErrorNoKernelImageForDevice, op,
        ": the extension holds no kernel for this GPU: build it with ECHO_CUDA_ARCHS set to the "
        "GPU's architecture, 80 or later");
  check(error == cudaSuccess, op, ": ", cudaGetErrorString(error));
}

// A kernel would follow a pointer of another device, and the error would show up elsewhere.
void check_devices(const char* op, const Tensor& first,
                   std::initializer_list<std::pair<const char*, const Tensor*>> others) {
  for (const auto& [name, tensor] : others) {
    check(tensor->is_cuda() == first.is_cuda() &&
              tensor->get_device_index() == first.get_device_index(),
          op, ": ", name, " is not on the device of the other tensors, which is number ",
          first.get_device_index());
  }
}

int64_t device_attribute(const Tensor& tensor, cudaDeviceAttr attribute) {
  int value = 0;
  check_launch("cudaDeviceGetAttribute",
               cudaDeviceGetAttribute(&value, attribute, tensor.get_device_index()));
  return value;
}

template <class T>
const T* read(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* write(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

ForestArgs check_forest(const char* op, const Tensor& parents, const Tensor& cu_nodes) {
  check_index_vector(op, "parents", parents, ScalarType::Int);
  check_index_vector(op, "cu_nodes", cu_nodes, ScalarType::Int);
  check(cu_nodes.size(0) >= 1, op, ": cu_nodes must hold at least the 0 it starts with");
  return {read<int32_t>(parents), read<int32_t>(cu_nodes), parents.size(0),
          static_cast<int>(cu_nodes.size(0) - 1)};
}

}  // namespace

std::tuple<Tensor, Tensor> build_super_tree(const Tensor& parents, const Tensor& cu_nodes,
                                            int64_t num_words) {
  const char* op = "build_super_tree";
  const DeviceGuard guard(parents.get_device_index());
  check_devices(op, parents, {{"cu_nodes", &cu_nodes}});
  SuperTreeArgs args{};
  args.forest = check_forest(op, parents, cu_nodes);
  check(num_words >= 1, op, ": num_words must be >= 1, got ", num_words);
  const int64_t num_rows = args.forest.num_nodes + args.forest.num_requests;
  Tensor mask = torch::stable::new_empty(parents, {num_rows, num_words}, ScalarType::Long);
  Tensor depths = torch::stable::new_empty(parents, {num_rows}, ScalarType::Int);
  args.num_words = static_cast<int>(num_words);
  args.mask = write<int64_t>(mask);
  args.depths = write<int32_t>(depths);
  check_launch(op, launch_build_super_tree(args, current_stream(parents)));
  return {mask, depths};
}

std::tuple<Tensor, Tensor> accept_path(const Tensor& sampled, const Tensor& token_ids,
                                       const Tensor& parents, const Tensor& cu_nodes,
                                       int64_t max_depth) {
  const char* op = "accept_path";
  const DeviceGuard guard(parents.get_device_index());
  check_devices(op, parents,
                {{"sampled", &sampled}, {"token_ids", &token_ids}, {"cu_nodes", &cu_nodes}});
  AcceptPathArgs args{};
  args.forest = check_forest(op, parents, cu_nodes);
  check(max_depth >= 0, op, ": max_depth must be >= 0, got ", max_depth);
  check_index_vector(op, "sampled", sampled, ScalarType::Long);
  check_size(op, "sampled", sampled, 0, args.forest.num_nodes + args.forest.num_requests);
  args.wide_tokens = token_ids.scalar_type() == ScalarType::Long;
  check_index_vector(op, "token_ids", token_ids,
                     args.wide_tokens ? ScalarType::Long : ScalarType::Int);
  check_size(op, "token_ids", token_ids, 0, args.forest.num_nodes);
  Tensor rows =
      torch::stable::new_empty(parents, {args.forest.num_requests, max_depth + 1}, ScalarType::Int);
  Tensor counts = torch::stable::new_empty(parents, {args.forest.num_requests}, ScalarType::Int);
  args.sampled = read<int64_t>(sampled);
  args.token_ids = token_ids.const_data_ptr();
  args.max_depth = static_cast<int>(max_depth);
  args.accepted_rows = write<int32_t>(rows);
  args.num_accepted = write<int32_t>(counts);
  check_launch(op, launch_accept_path(args, current_stream(parents)));
  return {rows, counts};
}

std::tuple<Tensor, Tensor> select_budget(const Tensor& scores, const Tensor& tiers,
                                         const Tensor& parents, int64_t budget,
                                         int64_t max_per_request,
                                         const std::optional<Tensor>& limit) {
  const char* op = "select_budget";
  const DeviceGuard guard(parents.get_device_index());
  check_devices(op, parents, {{"scores", &scores}, {"tiers", &tiers}});
  if (limit) check_devices(op, parents, {{"limit", &*limit}});
  check_candidates(scores, tiers, parents, budget, max_per_request, limit);
  const int64_t num_requests = scores.size(0), num_columns = scores.size(1);
  check(num_columns <= kMaxSelectColumns, op, ": on CUDA a request may have ", kMaxSelectColumns,
        " columns at most, got ", num_columns);
  const int64_t list_size = std::min(max_per_request, num_columns);
  const int64_t num_slots = std::min(budget, num_requests * list_size);
  Tensor columns = torch::stable::new_empty(parents, {num_slots}, ScalarType::Long);
  Tensor cu_nodes = torch::stable::new_empty(parents, {num_requests + 1}, ScalarType::Int);
  Tensor keys = torch::stable::new_empty(parents, {num_requests * list_size}, ScalarType::Long);
  Tensor lists =
      torch::stable::new_empty(parents, {num_requests * (list_size + 3)}, ScalarType::Int);
  SelectBudgetArgs args{};
  args.scores = read<float>(scores);
  args.tiers = read<int32_t>(tiers);
  args.parents = read<int64_t>(parents);
  args.scores_stride = scores.stride(0);
  args.tiers_stride = tiers.stride(0);
  args.num_requests = static_cast<int>(num_requests);
  args.num_columns = static_cast<int>(num_columns);
  args.list_size = static_cast<int>(list_size);
  args.budget = budget;
  args.limit = limit ? read<int32_t>(*limit) : nullptr;
  args.sorted_keys = write<uint64_t>(keys);
  args.windows = write<int32_t>(lists);
  args.sorted_columns = args.windows + 3 * num_requests;
  args.columns = write<int64_t>(columns);
  args.num_slots = num_slots;
  args.cu_nodes = write<int32_t>(cu_nodes);
  check_launch(op, launch_select_budget(args, current_stream(parents)));
  return {columns, cu_nodes};
}

std::tuple<Tensor, Tensor, Tensor> sample_path(
    const Tensor& target_logits, const Tensor& target_rows, const Tensor& draft_probs,
    const Tensor& draft_rows, const std::optional<Tensor>& draft_ids, const Tensor& rules,
    const Tensor& uniforms, const Tensor& token_ids, const Tensor& parents, const Tensor& cu_nodes,
    int64_t max_depth, const std::optional<Tensor>& temperatures) {
  const DeviceGuard guard(parents.get_device_index());
  check_devices(kSamplePathOp, parents,
                {{"target_logits", &target_logits},
                 {"target_rows", &target_rows},
                 {"draft_probs", &draft_probs},
                 {"draft_rows", &draft_rows},
                 {"rules", &rules},
                 {"uniforms", &uniforms},
                 {"token_ids", &token_ids},
                 {"cu_nodes", &cu_nodes}});
  if (draft_ids) check_devices(kSamplePathOp, parents, {{"draft_ids", &*draft_ids}});
  if (temperatures) check_devices(kSamplePathOp, parents, {{"temperatures", &*temperatures}});
  SampledPath out{parents, parents, parents};
  const SamplePathArgs args = check_sample_path(target_logits, target_rows, draft_probs, draft_rows,
                                                draft_ids, rules, uniforms, token_ids, parents,
                                                cu_nodes, max_depth, temperatures, false, &out);
  check_launch(kSamplePathOp, launch_sample_path(args, current_stream(parents)));
  return {out.accepted_rows, out.num_accepted, out.last_tokens};
}

void commit_kv(const std::vector<Tensor>& kv_caches, const Tensor& src_slots,
               const Tensor& dst_slots, int64_t block_size, const std::string& layout) {
  const char* op = "commit_kv";
  const DeviceGuard guard(src_slots.get_device_index());
  check(layout == "nhd" || layout == "hnd", op, ": on CUDA layout must be nhd or hnd, got '",
        layout, "'");
  check(block_size > 0, op, ": block_size must be positive, got ", block_size);
  check_devices(op, src_slots, {{"dst_slots", &dst_slots}});
  for (const Tensor& cache : kv_caches) check_devices(op, src_slots, {{"a KV cache", &cache}});
  check_index_vector(op, "src_slots", src_slots, ScalarType::Long);
  check_index_vector(op, "dst_slots", dst_slots, ScalarType::Long);
  check_size(op, "dst_slots", dst_slots, 0, src_slots.size(0));
  check(src_slots.size(0) <= kMaxCommitMoves, op, ": one call on CUDA makes ", kMaxCommitMoves,
        " moves at most, got ", src_slots.size(0), "; requests can be committed in several calls");
  if (kv_caches.empty()) return;
  constexpr int64_t kUnit = 16;
  auto args = std::make_unique<CommitArgs>();
  args->src_slots = read<int64_t>(src_slots);
  args->dst_slots = read<int64_t>(dst_slots);
  args->num_moves = static_cast<int>(src_slots.size(0));
  args->block_size = static_cast<int>(block_size);
  const int64_t num_kv_heads = kv_caches[0].size(1);
  const int64_t row_bytes = kv_caches[0].size(3) * kv_caches[0].element_size();
  args->num_kv_heads = static_cast<int>(num_kv_heads);
  args->units = static_cast<int>(row_bytes / kUnit);
  for (size_t first = 0; first < kv_caches.size(); first += kMaxCommitLayers) {
    const size_t end = std::min(kv_caches.size(), first + kMaxCommitLayers);
    args->num_layers = static_cast<int>(end - first);
    for (size_t i = first; i < end; ++i) {
      const Tensor& cache = kv_caches[i];
      const int64_t size = cache.element_size();
      check(cache.dim() == 4 && cache.size(1) == num_kv_heads && cache.size(2) == block_size &&
                cache.size(3) * size == row_bytes,
            op, ": kv_caches[", i, "] must be [num_blocks, ", num_kv_heads, ", ", block_size,
            ", 2 * head_size] of ", row_bytes, " bytes a row like the first, got ", ShapeOf{cache});
      CommitLayer& layer = args->layers[i - first];
      layer = {static_cast<char*>(cache.mutable_data_ptr()), stride_of(cache, 0) * size,
               stride_of(cache, 1) * size, stride_of(cache, 2) * size};
      check(cache.stride(3) == 1 && row_bytes % kUnit == 0 &&
                reinterpret_cast<uintptr_t>(layer.base) % kUnit == 0 &&
                layer.block_stride % kUnit == 0 && layer.head_stride % kUnit == 0 &&
                layer.token_stride % kUnit == 0,
            op, ": K and V of a token in kv_caches[", i, "] must be contiguous and aligned to ",
            kUnit, " bytes");
    }
    check_launch(op, launch_commit_kv(*args, current_stream(src_slots)));
  }
}

namespace {

void check_suffix_devices(const char* op, const Tensor& query, const Tensor& query_start,
                          const Tensor& row_start, const Tensor& suffix_key,
                          const Tensor& suffix_value, const Tensor& suffix_start,
                          const Tensor& suffix_len, const Tensor& mask, const Tensor& out) {
  check_devices(op, query,
                {{"query_start", &query_start},
                 {"row_start", &row_start},
                 {"suffix_key", &suffix_key},
                 {"suffix_value", &suffix_value},
                 {"suffix_start", &suffix_start},
                 {"suffix_len", &suffix_len},
                 {"mask", &mask},
                 {"out", &out}});
}

// `max_keys`: the most that a request may have, from shapes.
void attend(const char* op, const TreeAttentionArgs& args, int64_t num_requests, int64_t num_rows,
            int64_t max_keys, const Tensor& query) {
  constexpr int kMaxHeadSize = 256, kMaxMaskWords = 512;
  check(args.head_size <= kMaxHeadSize, op, ": on CUDA the head size may be ", kMaxHeadSize,
        " at most, got ", args.head_size);
  check(args.mask_words <= kMaxMaskWords, op, ": on CUDA a mask row may have ", kMaxMaskWords,
        " words at most, got ", args.mask_words);
  AttentionPlan plan{};
  plan.num_requests = static_cast<int>(num_requests);
  plan.num_rows = num_rows;
  if (plan.num_requests == 0 || plan.num_rows == 0) return;

  constexpr int kFewLines = 16;
  const int64_t lines = plan.num_rows * (args.num_heads / args.num_kv_heads);
  plan.kernel =
      choose_attention_kernel(args, lines <= int64_t{kFewLines} * plan.num_requests,
                              device_attribute(query, cudaDevAttrMaxSharedMemoryPerBlockOptin));
  const int64_t tiles =
      std::max<int64_t>(plan.num_requests, lines / attention_tile_lines(plan.kernel));
  // Two blocks a multiprocessor, three rounds: enough to even out requests of unequal length.
  constexpr int kBlocksPerMultiprocessor = 6;
  const int64_t slots =
      kBlocksPerMultiprocessor * device_attribute(query, cudaDevAttrMultiProcessorCount);
  plan.max_splits = choose_max_splits(tiles * args.num_kv_heads, slots,
                                      max_keys / attention_tile_keys(args, plan.kernel) + 1);
  Tensor partial;
  if (plan.max_splits > 1) {
    const int64_t states = plan.max_splits * plan.num_rows * args.num_heads;
    partial = torch::stable::new_empty(query, {states * (args.head_size + 2)}, ScalarType::Float);
    plan.partial_out = write<float>(partial);
    plan.partial_ml = plan.partial_out + states * args.head_size;
  }
  check_launch(op, launch_tree_attention(args, plan, current_stream(query)));
}

}  // namespace

void tree_attention(const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
                    const Tensor& block_table, const Tensor& context_lens,
                    const Tensor& query_start, const Tensor& row_start, const Tensor& suffix_key,
                    const Tensor& suffix_value, const Tensor& suffix_start,
                    const Tensor& suffix_len, const Tensor& mask, const Tensor& positions,
                    double scale, double softcap, int64_t sliding_window, const std::string& layout,
                    const Tensor& out, const std::optional<Tensor>& lse, double k_scale,
                    double v_scale) {
  const char* op = kTreeAttentionOp;
  const DeviceGuard guard(query.get_device_index());
  check(layout == "nhd", op,
        ": on CUDA layout must be nhd (its strides may be those of hnd), got '", layout, "'");
  check_devices(op, query,
                {{"key_cache", &key_cache},
                 {"value_cache", &value_cache},
                 {"block_table", &block_table},
                 {"context_lens", &context_lens},
                 {"positions", &positions}});
  check_suffix_devices(op, query, query_start, row_start, suffix_key, suffix_value, suffix_start,
                       suffix_len, mask, out);
  if (lse) check_devices(op, query, {{"lse", &*lse}});
  const TreeAttentionArgs args = check_tree_attention(
      query, key_cache, value_cache, block_table, context_lens, query_start, row_start, suffix_key,
      suffix_value, suffix_start, suffix_len, mask, positions, scale, softcap, sliding_window,
      layout, out, lse, k_scale, v_scale);
  const int64_t max_keys =
      block_table.size(1) * args.block_size + std::min(suffix_key.size(0), args.mask_words * 64);
  attend(op, args, context_lens.size(0), std::min(query.size(0), mask.size(0)), max_keys, query);
}

void suffix_attention(const Tensor& query, const Tensor& query_start, const Tensor& row_start,
                      const Tensor& suffix_key, const Tensor& suffix_value,
                      const Tensor& suffix_start, const Tensor& suffix_len, const Tensor& mask,
                      double scale, double softcap, const Tensor& out, const Tensor& lse) {
  const DeviceGuard guard(query.get_device_index());
  check_suffix_devices(kSuffixAttentionOp, query, query_start, row_start, suffix_key, suffix_value,
                       suffix_start, suffix_len, mask, out);
  check_devices(kSuffixAttentionOp, query, {{"lse", &lse}});
  const TreeAttentionArgs args = check_suffix_attention(
      kSuffixAttentionOp, query, query_start, row_start, suffix_key, suffix_value, suffix_start,
      suffix_len, mask, scale, softcap, out, lse);
  attend(kSuffixAttentionOp, args, suffix_len.size(0), std::min(query.size(0), mask.size(0)),
         std::min(suffix_key.size(0), args.mask_words * 64), query);
}

void merge_attention(const Tensor& prefix_out, const Tensor& prefix_lse, const Tensor& suffix_out,
                     const Tensor& suffix_lse, const Tensor& query_start, const Tensor& row_start,
                     const Tensor& out, const std::optional<Tensor>& lse) {
  const DeviceGuard guard(out.get_device_index());
  check_devices(kMergeAttentionOp, out,
                {{"prefix_out", &prefix_out},
                 {"prefix_lse", &prefix_lse},
                 {"suffix_out", &suffix_out},
                 {"suffix_lse", &suffix_lse},
                 {"query_start", &query_start},
                 {"row_start", &row_start}});
  if (lse) check_devices(kMergeAttentionOp, out, {{"lse", &*lse}});
  const MergeAttentionArgs args = check_merge_attention(
      prefix_out, prefix_lse, suffix_out, suffix_lse, query_start, row_start, out, lse);
  check_launch(kMergeAttentionOp, launch_merge_attention(args, current_stream(out)));
}

}  // namespace echo_vllm::cuda

#if defined(ECHO_EMULATE_CUDA)
// The same operators on CPU tensors, with the kernels emulated, beside the real ones.
#include "../schemas.h"

STABLE_TORCH_LIBRARY(echo_vllm_emulated, m) { echo_vllm::define_schemas(m); }
STABLE_TORCH_LIBRARY_IMPL(echo_vllm_emulated, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(echo_vllm, CUDA, m) {
#endif
  m.impl("tree_attention", TORCH_BOX(&echo_vllm::cuda::tree_attention));
  m.impl("suffix_attention", TORCH_BOX(&echo_vllm::cuda::suffix_attention));
  m.impl("merge_attention", TORCH_BOX(&echo_vllm::cuda::merge_attention));
  m.impl("commit_kv", TORCH_BOX(&echo_vllm::cuda::commit_kv));
  m.impl("build_super_tree", TORCH_BOX(&echo_vllm::cuda::build_super_tree));
  m.impl("accept_path", TORCH_BOX(&echo_vllm::cuda::accept_path));
  m.impl("select_budget", TORCH_BOX(&echo_vllm::cuda::select_budget));
  m.impl("sample_path", TORCH_BOX(&echo_vllm::cuda::sample_path));
}
