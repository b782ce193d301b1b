// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
//
// tree_attention: which kernel takes what, the plain kernel for the rest (float32, other head
// sizes, unaligned memory), and the merge of the splits.
#include <initializer_list>

#include "tree_attention.cuh"

namespace echo_vllm::cuda {
namespace {

// The plain kernel: one warp a line, one key after another.
constexpr int kPlainWarps = 4;
constexpr int kPlainThreads = kPlainWarps * kWarpSize;
constexpr int kPlainKeys = 64;
constexpr int kPlainMaxHeadSize = 256;
constexpr int kPlainDims = kPlainMaxHeadSize / kWarpSize;  // dims of a lane

constexpr int kMergeWarps = 4;

// Adds one key to a line's state. Lanes hold every 32nd dim of `q` and `acc`.
template <class U>
__device__ __forceinline__ void add_key(const TreeAttentionArgs& args, const U* k, const U* v,
                                        float key_scale, float value_scale,
                                        const float (&q)[kPlainDims], float (&acc)[kPlainDims],
                                        SoftmaxState& state) {
  const int lane = threadIdx.x % kWarpSize;
  float score = 0.0f;
#pragma unroll
  for (int i = 0; i < kPlainDims; ++i) {
    const int dim = lane + i * kWarpSize;
    if (dim < args.head_size) score += q[i] * to_float(k[dim]);
  }
  score = warp_sum(score) * key_scale;
  if (args.softcap > 0.0f) score = args.softcap * tanhf(score / args.softcap);
  score *= kLog2E;
  const float new_max = fmaxf(state.max, score);
  const float factor = rescale(state.max, new_max), weight = exp2f(score - new_max);
  state = {new_max, state.sum * factor + weight};
#pragma unroll
  for (int i = 0; i < kPlainDims; ++i) {
    const int dim = lane + i * kWarpSize;
    if (dim < args.head_size) acc[i] = acc[i] * factor + weight * value_scale * to_float(v[dim]);
  }
}

// T: the numbers of Q, of the suffix and of the output. C: those of the cache.
template <class T, class C>
__global__ void __launch_bounds__(kPlainThreads)
    tree_attention_plain_kernel(const __grid_constant__ TreeAttentionArgs args,
                                const __grid_constant__ AttentionPlan plan) {
  const TileView view = view_tile(args, plan, kPlainWarps, kPlainKeys, blockIdx.x, blockIdx.z);
  const int lane = threadIdx.x % kWarpSize, line = threadIdx.x / kWarpSize;
  const int split = blockIdx.y;
  if (line >= view.lines.num_lines || split >= view.splits) return;
  const int request = view.lines.request, context = view.context;
  const int row = view.row_of(line), head = view.head_of(line);
  const uint64_t* mask = reinterpret_cast<const uint64_t*>(args.mask) +
                         static_cast<int64_t>(view.mask_row + row) * args.mask_words;
  const int low = first_visible(args, view.query_row + row, context);
  const int end = min(
      view.num_keys,
      (view.first_key_tile + split_begin(view.num_key_tiles, view.splits, split + 1)) * kPlainKeys);
  int key =
      (view.first_key_tile + split_begin(view.num_key_tiles, view.splits, split)) * kPlainKeys;
  key = max(key, low);

  const T* query = static_cast<const T*>(args.query) +
                   (view.query_row + row) * args.query_stride_row + head * args.query_stride_head;
  float q[kPlainDims], acc[kPlainDims];
#pragma unroll
  for (int i = 0; i < kPlainDims; ++i) {
    const int dim = lane + i * kWarpSize;
    q[i] = dim < args.head_size ? to_float(query[dim]) * args.scale : 0.0f;
    acc[i] = 0.0f;
  }
  SoftmaxState state{kMinusInfinity, 0.0f};
  for (; key < end; ++key) {
    if (key < context) {
      const int64_t block =
          args.block_table[request * args.block_table_stride + key / args.block_size];
      const int token = key % args.block_size;
      const C* k = static_cast<const C*>(args.key_cache) + block * args.key_strides.block +
                   view.kv_head * args.key_strides.head + token * args.key_strides.token;
      const C* v = static_cast<const C*>(args.value_cache) + block * args.value_strides.block +
                   view.kv_head * args.value_strides.head + token * args.value_strides.token;
      add_key(args, k, v, args.key_scale, args.value_scale, q, acc, state);
    } else {
      if (!test_mask_bit(mask, key - context)) continue;
      const int64_t suffix_row = args.suffix_start[request] + key - context;
      const T* k = static_cast<const T*>(args.suffix_key) +
                   suffix_row * args.suffix_key_stride_row +
                   view.kv_head * args.suffix_key_stride_head;
      const T* v = static_cast<const T*>(args.suffix_value) +
                   suffix_row * args.suffix_value_stride_row +
                   view.kv_head * args.suffix_value_stride_head;
      add_key(args, k, v, 1.0f, 1.0f, q, acc, state);
    }
  }

  // Lanes hold every 32nd dim, and store_line takes four neighbours: turn them over.
  float* turned = reinterpret_cast<float*>(shared_memory()) + line * kPlainMaxHeadSize;
#pragma unroll
  for (int i = 0; i < kPlainDims; ++i) turned[lane + i * kWarpSize] = acc[i];
  __syncwarp();
  for (int dim = 4 * lane; dim < args.head_size; dim += 4 * kWarpSize) {
    const float four[4] = {turned[dim], turned[dim + 1], turned[dim + 2], turned[dim + 3]};
    store_line<T>(args, plan, view, line, split, dim, four, state);
  }
}

// One warp a line whose keys were cut.
template <class T>
__global__ void __launch_bounds__(kMergeWarps* kWarpSize)
    merge_splits_kernel(const __grid_constant__ TreeAttentionArgs args,
                        const __grid_constant__ AttentionPlan plan, int tile_lines, int tile_keys) {
  TileView view = view_tile(args, plan, tile_lines, tile_keys, blockIdx.x, blockIdx.z);
  const int line = blockIdx.y * kMergeWarps + threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  if (line >= view.lines.num_lines || view.splits == 1) return;
  const int head = view.head_of(line);
  const int64_t row = view.mask_row - args.row_start[0] + view.row_of(line);
  SoftmaxState merged{kMinusInfinity, 0.0f};
  for (int split = 0; split < view.splits; ++split) {
    const int64_t index = partial_index(plan, args, split, row, head);
    merged.max = fmaxf(merged.max, plan.partial_ml[2 * index]);
  }
  for (int split = 0; split < view.splits; ++split) {
    const int64_t index = partial_index(plan, args, split, row, head);
    merged.sum += rescale(plan.partial_ml[2 * index], merged.max) * plan.partial_ml[2 * index + 1];
  }
  const int splits = view.splits;
  view.splits = 1;  // store_line writes to out
  for (int dim = 4 * lane; dim < args.head_size; dim += 4 * kWarpSize) {
    float acc[4] = {};
    for (int split = 0; split < splits; ++split) {
      const int64_t index = partial_index(plan, args, split, row, head);
      const float factor = rescale(plan.partial_ml[2 * index], merged.max);
      const float* from = plan.partial_out + index * args.head_size + dim;
      for (int i = 0; i < 4; ++i) acc[i] += factor * from[i];
    }
    store_line<T>(args, plan, view, line, 0, dim, acc, merged);
  }
}

// Whether copies of 16 bytes may begin at every row; `element` bytes a number.
bool is_aligned(const void* pointer, int element, std::initializer_list<int64_t> strides) {
  constexpr int kBytes = 16;
  bool aligned = reinterpret_cast<uintptr_t>(pointer) % kBytes == 0;
  for (const int64_t stride : strides) aligned = aligned && stride * element % kBytes == 0;
  return aligned;
}

bool has_mma_kernel(const TreeAttentionArgs& args) {
  const int d = args.head_size;
  if (args.dtype == Dtype::kFloat32) return false;
  if (d != 64 && d != 128 && d != 256 && (d != 96 || args.fp8_cache)) return false;
  // A weight over the scale must be a float16.
  if (args.fp8_cache && args.dtype == Dtype::kFloat16 && args.value_scale < 0x1p-14f) return false;
  const int of_cache = args.fp8_cache ? 1 : 2;
  return is_aligned(args.query, 2, {args.query_stride_row, args.query_stride_head}) &&
         is_aligned(args.key_cache, of_cache,
                    {args.key_strides.block, args.key_strides.head, args.key_strides.token}) &&
         is_aligned(
             args.value_cache, of_cache,
             {args.value_strides.block, args.value_strides.head, args.value_strides.token}) &&
         is_aligned(args.suffix_key, 2,
                    {args.suffix_key_stride_row, args.suffix_key_stride_head}) &&
         is_aligned(args.suffix_value, 2,
                    {args.suffix_value_stride_row, args.suffix_value_stride_head});
}

template <int kHeadSize, bool kFp8>
int64_t tile_shared_bytes(AttentionKernel kernel) {
  return kernel == AttentionKernel::kFewLines
             ? MmaTraits<BFloat16, kHeadSize, 1, 4, kFp8>::kTileSharedBytes
             : MmaTraits<BFloat16, kHeadSize, 4, 1, kFp8>::kTileSharedBytes;
}

int64_t shared_bytes(const TreeAttentionArgs& args, AttentionKernel kernel) {
  int64_t bytes = args.mask_words * static_cast<int64_t>(sizeof(uint64_t));
  switch (args.head_size) {
    case 64:
      bytes += args.fp8_cache ? tile_shared_bytes<64, true>(kernel)
                              : tile_shared_bytes<64, false>(kernel);
      break;
    case 96:
      bytes += tile_shared_bytes<96, false>(kernel);
      break;
    case 128:
      bytes += args.fp8_cache ? tile_shared_bytes<128, true>(kernel)
                              : tile_shared_bytes<128, false>(kernel);
      break;
    default:
      bytes += args.fp8_cache ? tile_shared_bytes<256, true>(kernel)
                              : tile_shared_bytes<256, false>(kernel);
  }
  return bytes;
}

template <class T, class C>
cudaError_t launch_plain(const TreeAttentionArgs& args, const AttentionPlan& plan,
                         cudaStream_t stream) {
  const int group = args.num_heads / args.num_kv_heads;
  const dim3 grid(
      static_cast<unsigned>(max_tiles(plan.num_rows, plan.num_requests, group, kPlainWarps)),
      plan.max_splits, args.num_kv_heads);
  return launch(tree_attention_plain_kernel<T, C>, grid, dim3(kPlainThreads),
                kPlainWarps * kPlainMaxHeadSize * sizeof(float), stream, args, plan);
}

template <class T>
cudaError_t launch_merge(const TreeAttentionArgs& args, const AttentionPlan& plan,
                         cudaStream_t stream) {
  const int group = args.num_heads / args.num_kv_heads;
  const int tile_lines = attention_tile_lines(plan.kernel);
  const dim3 grid(
      static_cast<unsigned>(max_tiles(plan.num_rows, plan.num_requests, group, tile_lines)),
      blocks_for(tile_lines, kMergeWarps), args.num_kv_heads);
  return launch(merge_splits_kernel<T>, grid, dim3(kMergeWarps * kWarpSize), 0, stream, args, plan,
                tile_lines, attention_tile_keys(args, plan.kernel));
}

cudaError_t launch_mma(const TreeAttentionArgs& args, const AttentionPlan& plan,
                       cudaStream_t stream) {
  switch (args.head_size) {
    case 64:
      return args.fp8_cache ? launch_mma_of_head_size<64, true>(args, plan, stream)
                            : launch_mma_of_head_size<64, false>(args, plan, stream);
    case 96:
      return launch_mma_of_head_size<96, false>(args, plan, stream);
    case 128:
      return args.fp8_cache ? launch_mma_of_head_size<128, true>(args, plan, stream)
                            : launch_mma_of_head_size<128, false>(args, plan, stream);
    default:
      return args.fp8_cache ? launch_mma_of_head_size<256, true>(args, plan, stream)
                            : launch_mma_of_head_size<256, false>(args, plan, stream);
  }
}

template <class T>
cudaError_t launch_all(const TreeAttentionArgs& args, const AttentionPlan& plan,
                       cudaStream_t stream) {
  const cudaError_t error = plan.kernel != AttentionKernel::kPlain ? launch_mma(args, plan, stream)
                            : args.fp8_cache ? launch_plain<T, Float8>(args, plan, stream)
                                             : launch_plain<T, T>(args, plan, stream);
  if (error != cudaSuccess || plan.max_splits == 1) return error;
  return launch_merge<T>(args, plan, stream);
}

}  // namespace

AttentionKernel choose_attention_kernel(const TreeAttentionArgs& args, bool few_lines,
                                        int64_t max_shared_bytes) {
  if (!has_mma_kernel(args)) return AttentionKernel::kPlain;
  for (const AttentionKernel kernel : {AttentionKernel::kFewLines, AttentionKernel::kManyLines}) {
    if (kernel == AttentionKernel::kFewLines && !few_lines) continue;
    if (shared_bytes(args, kernel) <= max_shared_bytes) return kernel;
  }
  return AttentionKernel::kPlain;
}

int attention_tile_lines(AttentionKernel kernel) {
  switch (kernel) {
    case AttentionKernel::kPlain:
      return kPlainWarps;
    case AttentionKernel::kFewLines:
      return MmaTraits<BFloat16, 64, 1, 4>::kLines;
    default:
      return MmaTraits<BFloat16, 64, 4, 1>::kLines;
  }
}

int attention_tile_keys(const TreeAttentionArgs& args, AttentionKernel kernel) {
  if (kernel == AttentionKernel::kPlain) return kPlainKeys;
  if (kernel == AttentionKernel::kFewLines || args.head_size <= 128) {
    return MmaTraits<BFloat16, 64, 4, 1>::kKeys;
  }
  return MmaTraits<BFloat16, 256, 4, 1>::kKeys;
}

cudaError_t launch_tree_attention(const TreeAttentionArgs& args, const AttentionPlan& plan,
                                  cudaStream_t stream) {
  switch (args.dtype) {
    case Dtype::kBFloat16:
      return launch_all<BFloat16>(args, plan, stream);
    case Dtype::kFloat16:
      return launch_all<Float16>(args, plan, stream);
    default:
      return launch_all<Float32>(args, plan, stream);
  }
}

}  // namespace echo_vllm::cuda
