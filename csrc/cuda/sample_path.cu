// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
//
// sample_path: one block a request. All that decides is the same in every thread: the numbers of a
// sweep over the vocabulary end in shared memory, and each thread adds them up in one order. A
// token is found by halving: the warps have a stretch of the vocabulary each, the stretch that
// holds the token is divided among them again, and the last piece is scanned.
#include "../common/rejection.h"
#include "device.cuh"
#include "kernels.h"

namespace echo_vllm::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarpSize;
// A stretch that a warp scans by itself.
constexpr int kScanned = 1024;
constexpr float kInfinity = __builtin_huge_valf();

// What a token weighs; see common/rejection.h. The draft is not read where scale is 0.
struct Residual {
  const float* logits;
  const float* draft;
  const int32_t* draft_ids;
  float top, scale, sharpness;

  __device__ float target_weight(int token) const {
    return exp2_fast((logits[token] - top) * sharpness);
  }
  __device__ float draft_weight(int token) const {
    const int id = draft_ids == nullptr ? token : draft_ids[token];
    return id < 0 ? 0.0f : draft[id];
  }
  __device__ float operator()(int token) const {
    const float target = target_weight(token);
    return scale > 0.0f ? residual_weight(target, draft_weight(token), scale) : target;
  }
};

struct DraftWeights {
  const float* draft;
  __device__ float operator()(int id) const { return draft[id]; }
};

struct IsTop {
  const float* logits;
  float top;
  __device__ float operator()(int token) const { return logits[token] == top ? 1.0f : 0.0f; }
};

__device__ int piece_of(int begin, int end) {
  const int each = (end - begin + kWarps - 1) / kWarps;
  return (each + kWarpSize - 1) / kWarpSize * kWarpSize;
}

__device__ float block_max(const float* x, int n, double* parts) {
  float top = -kInfinity;
  for (int i = threadIdx.x; i < n; i += kThreads) top = x[i] > top ? x[i] : top;
  top = -warp_min(-top);
  __syncthreads();  // the parts of before have been read
  if (threadIdx.x % kWarpSize == 0) parts[threadIdx.x / kWarpSize] = top;
  __syncthreads();
  for (int i = 0; i < kWarps; ++i) top = parts[i] > top ? static_cast<float>(parts[i]) : top;
  return top;
}

// The sum over [begin, end). `parts` becomes the sums of the warps' pieces.
template <class Weights>
__device__ double block_sum(const Weights& weights, int begin, int end, double* parts) {
  const int warp = threadIdx.x / kWarpSize, piece = piece_of(begin, end);
  const int first = begin + warp * piece;
  const int last = min(end, first + piece);
  double sum = 0.0;
  for (int i = first + static_cast<int>(threadIdx.x) % kWarpSize; i < last; i += kWarpSize) {
    sum += weights(i);
  }
  sum = warp_sum(sum);
  __syncthreads();  // the parts of before have been read
  if (threadIdx.x % kWarpSize == 0) parts[warp] = sum;
  __syncthreads();
  double total = 0.0;
  for (int i = 0; i < kWarps; ++i) total += parts[i];
  return total;
}

// The first of [0, n) at which the sum from the left passes `place`; the last one that has any
// weight where rounding leaves none; 0 where nothing has. `parts` is of a block_sum over [0, n).
template <class Weights>
__device__ int block_sample(const Weights& weights, int n, double place, double* parts) {
  int begin = 0, end = n;
  for (;;) {
    int chosen = 0;
    double before = 0.0, through = 0.0;
    for (int i = 0; i < kWarps; ++i) {
      if (parts[i] <= 0.0) continue;
      chosen = i;
      before = through;
      through += parts[i];
      if (place < through) break;
    }
    place -= before;
    const int piece = piece_of(begin, end);
    begin = min(end, begin + chosen * piece);
    end = min(end, begin + piece);
    if (end - begin <= kScanned) break;
    block_sum(weights, begin, end, parts);
  }
  const int lane = threadIdx.x % kWarpSize;
  int token = begin;
  double before = 0.0;
  for (int first = begin; first < end; first += kWarpSize) {
    const float weight = first + lane < end ? weights(first + lane) : 0.0f;
    double through = weight;
    for (int lanes = 1; lanes < kWarpSize; lanes *= 2) {
      const double other = shuffle_up(through, lanes);
      if (lane >= lanes) through += other;
    }
    const unsigned some = ballot(weight > 0.0f);
    const unsigned passed = ballot(weight > 0.0f && place < before + through);
    if (passed != 0) return first + __ffs(static_cast<int>(passed)) - 1;
    if (some != 0) token = first + 63 - __clzll(static_cast<long long>(some));
    before += warp_sum(static_cast<double>(weight));
  }
  return token;
}

// One request's tree, and the row that the walk stands at.
struct Walk {
  const SamplePathArgs& args;
  const int32_t* parents;
  const int32_t* token_ids;
  const double* uniforms;
  int first_row, num_nodes, row;
  float sharpness;  // what a logit is worth as a power of 2
  double* parts;

  __device__ int child_with(int token) const {
    for (int node = row; node < num_nodes; ++node) {
      if (parents[node] == row - 1 && token_ids[node] == token) return node + 1;
    }
    return -1;
  }

  // The child that this row accepts, as a row, or -1 and the last token.
  __device__ int step(int32_t rule, bool may_descend, int* last_token) const {
    const int index = args.target_rows[first_row + row], vocab = args.vocab;
    *last_token = -1;
    if (index < 0) return -1;
    const float* logits =
        static_cast<const float*>(args.target_logits) + index * args.target_stride;
    const float top = block_max(logits, vocab, parts);
    if (rule == kGreedy || !(top > -kInfinity && top < kInfinity)) {
      const IsTop is_top{logits, top};
      block_sum(is_top, 0, vocab, parts);
      *last_token = block_sample(is_top, vocab, 0.0, parts);
      return may_descend ? child_with(*last_token) : -1;
    }
    Residual residual{logits, nullptr, args.draft_ids, top, 0.0f, sharpness};
    const int draft_index = rule == kDrawn && may_descend ? args.draft_rows[first_row + row] : -1;
    Rejection state{0.0, 0.0, 0.0f};
    if (draft_index >= 0) {
      residual.draft = args.draft_probs + draft_index * args.draft_stride;
      state.draft_left = block_sum(DraftWeights{residual.draft}, 0, args.draft_vocab, parts);
    }
    state.total = block_sum(residual, 0, vocab, parts);
    if (rule == kBest) {
      *last_token = block_sample(residual, vocab, uniforms[row] * state.total, parts);
      return may_descend ? child_with(*last_token) : -1;
    }
    for (int node = row; draft_index >= 0 && node < num_nodes; ++node) {
      if (parents[node] != row - 1) continue;
      const int token = token_ids[node];
      const float weight = residual.draft_weight(token);
      if (!(weight > 0.0f)) continue;  // q cannot have drawn it
      if (accepts(state, residual.target_weight(token), weight, uniforms[node + 1])) {
        return node + 1;
      }
      const float before = residual.scale;
      residual.scale = scale_after(state, weight);
      const double left = block_sum(residual, 0, vocab, parts);
      if (!(left > 0.0)) {  // r_j and q_j differ by rounding only
        residual.scale = before;
        block_sum(residual, 0, vocab, parts);
        break;
      }
      const double draft_left = state.draft_left - weight;
      state = {left, draft_left > 0.0 ? draft_left : 0.0, residual.scale};
    }
    *last_token = block_sample(residual, vocab, uniforms[0] * state.total, parts);
    return -1;
  }
};

__global__ void __launch_bounds__(kThreads, 1) sample_path_kernel(const SamplePathArgs args) {
  const int request = blockIdx.x;
  const int first_node = args.cu_nodes[request], first_row = first_node + request;
  Walk walk{args,
            args.parents + first_node,
            args.token_ids + first_node,
            args.uniforms + first_row,
            first_row,
            args.cu_nodes[request + 1] - first_node,
            0,
            kLog2E / (args.temperatures == nullptr ? 1.0f : args.temperatures[request]),
            reinterpret_cast<double*>(shared_memory())};
  const int32_t rule = args.rules[request];
  int32_t* path = args.accepted_rows + int64_t{request} * (args.max_depth + 1);
  const bool writes = threadIdx.x == 0;
  if (writes) path[0] = 0;
  int depth = 0, last_token = -1;
  for (int child; (child = walk.step(rule, depth < args.max_depth, &last_token)) > 0;) {
    walk.row = child;
    ++depth;
    if (writes) path[depth] = child;
  }
  for (int i = depth + 1 + static_cast<int>(threadIdx.x); i <= args.max_depth; i += kThreads) {
    path[i] = -1;
  }
  if (writes) {
    args.num_accepted[request] = depth;
    args.last_tokens[request] = last_token;
  }
}

}  // namespace

cudaError_t launch_sample_path(const SamplePathArgs& args, cudaStream_t stream) {
  return launch(sample_path_kernel, dim3(static_cast<unsigned>(args.num_requests)), dim3(kThreads),
                kWarps * sizeof(double), stream, args);
}

}  // namespace echo_vllm::cuda
