// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
//
// select_budget in three launches. Each request's candidates are sorted; the threshold is then
// found bit by bit, from counts that a binary search in each sorted list gives; and what a request
// gets is the front of its list. There are no atomics: the result depends on the input only.
#include "../common/candidate_order.h"
#include "device.cuh"
#include "kernels.h"

namespace echo_vllm::cuda {
namespace {

constexpr int kMaxSortThreads = 512;
constexpr int kThresholdThreads = 1024;
constexpr int kEmitThreads = 256;
constexpr uint64_t kNothing = ~uint64_t{0};

// A candidate's key can be kNothing too (the last tier, the lowest score), so what marks an empty
// place is its column.
__device__ bool comes_before(uint64_t key_a, int column_a, uint64_t key_b, int column_b) {
  return key_a != key_b ? key_a < key_b : column_a < column_b;
}

// One block a request: a bitonic sort in shared memory over the next power of two.
__global__ void __launch_bounds__(kMaxSortThreads)
    sort_candidates_kernel(const SelectBudgetArgs args, int padded) {
  uint64_t* keys = reinterpret_cast<uint64_t*>(shared_memory());
  int32_t* columns = reinterpret_cast<int32_t*>(keys + padded);
  const int request = blockIdx.x;
  const float* scores = args.scores + request * args.scores_stride;
  const int32_t* tiers = args.tiers + request * args.tiers_stride;
  for (int i = threadIdx.x; i < padded; i += blockDim.x) {
    const bool exists = i < args.num_columns && is_candidate(scores[i]);
    keys[i] = exists ? rank_key(tiers[i], scores[i]) : kNothing;
    columns[i] = exists ? i : INT32_MAX;
  }
  __syncthreads();
  for (int run = 2; run <= padded; run *= 2) {
    for (int distance = run / 2; distance > 0; distance /= 2) {
      for (int pair = threadIdx.x; pair < padded / 2; pair += blockDim.x) {
        const int a = pair / distance * 2 * distance + pair % distance;
        const int b = a + distance;
        const bool ascending = (a & run) == 0;
        if (comes_before(keys[b], columns[b], keys[a], columns[a]) == ascending) {
          const uint64_t key = keys[a];
          keys[a] = keys[b];
          keys[b] = key;
          const int32_t column = columns[a];
          columns[a] = columns[b];
          columns[b] = column;
        }
      }
      __syncthreads();
    }
  }
  // Candidates come first. Their number is where they end.
  int32_t* size = args.windows + 2 * int64_t{args.num_requests} + request;
  if (threadIdx.x == 0 && (args.list_size == 0 || columns[0] == INT32_MAX)) *size = 0;
  for (int i = threadIdx.x; i < args.list_size; i += blockDim.x) {
    const int64_t place = int64_t{request} * args.list_size + i;
    args.sorted_keys[place] = keys[i];
    args.sorted_columns[place] = columns[i];
    const bool last = i + 1 == args.list_size || columns[i + 1] == INT32_MAX;
    if (columns[i] != INT32_MAX && last) *size = i + 1;
  }
}

// The sum over the block, in every thread. `sums` holds two times 32 numbers, used in turns, so
// that one barrier a call is enough.
__device__ int64_t block_sum(int64_t value, int64_t* sums, int turn) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  sums += turn % 2 * kWarpSize;
  value = warp_sum(value);
  if (lane == 0) sums[warp] = value;
  __syncthreads();
  return warp_sum(lane < static_cast<int>(blockDim.x) / kWarpSize ? sums[lane] : int64_t{0});
}

__device__ uint64_t block_min(uint64_t value, int64_t* sums, int turn) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  uint64_t* smallest = reinterpret_cast<uint64_t*>(sums) + turn % 2 * kWarpSize;
  value = warp_min(value);
  if (lane == 0) smallest[warp] = value;
  __syncthreads();
  return warp_min(lane < static_cast<int>(blockDim.x) / kWarpSize ? smallest[lane] : kNothing);
}

// The sum over the threads before this one.
__device__ int64_t block_sum_before(int64_t value, int64_t* sums, int turn) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  sums += turn % 2 * kWarpSize;
  int64_t through = value;
  for (int lanes = 1; lanes < kWarpSize; lanes *= 2) {
    const int64_t other = shuffle_up(through, lanes);
    if (lane >= lanes) through += other;
  }
  if (lane == kWarpSize - 1) sums[warp] = through;
  __syncthreads();
  int64_t before = through - value;
  for (int i = 0; i < warp; ++i) before += sums[i];
  return before;
}

// One block: how many of each request's best the budget pays for, and where they go.
// A thread keeps to a range of requests. windows[0] and [1] bound the part of each list that
// agrees with the bits of the threshold that are known.
__global__ void __launch_bounds__(kThresholdThreads)
    find_threshold_kernel(const SelectBudgetArgs args) {
  int64_t* sums = reinterpret_cast<int64_t*>(shared_memory());
  int turn = 0;
  const int requests = args.num_requests;
  const int threads = static_cast<int>(blockDim.x);
  const int each = (requests + threads - 1) / threads;
  const int begin = min(requests, static_cast<int>(threadIdx.x) * each);
  const int end = min(requests, begin + each);
  int32_t* lows = args.windows;
  int32_t* highs = lows + requests;
  int32_t* sizes = highs + requests;

  int64_t total = 0;
  uint64_t first_key = kNothing, last_key_inverted = kNothing;
  for (int r = begin; r < end; ++r) {
    lows[r] = 0;
    highs[r] = sizes[r];
    total += sizes[r];
    if (sizes[r] == 0) continue;
    const uint64_t* keys = args.sorted_keys + int64_t{r} * args.list_size;
    first_key = min(first_key, keys[0]);
    last_key_inverted = min(last_key_inverted, ~keys[sizes[r] - 1]);
  }
  total = block_sum(total, sums, turn++);
  first_key = block_min(first_key, sums, turn++);
  last_key_inverted = block_min(last_key_inverted, sums, turn++);
  int64_t left = args.budget < total ? args.budget : total;
  if (args.limit != nullptr && *args.limit < left) left = *args.limit < 0 ? 0 : *args.limit;
  if (left < total && left > 0) {
    // `left` of the candidates in the windows are wanted, by rank; the windows narrow to one key.
    // The bits above the first in which any two keys differ are known.
    const uint64_t differing = first_key ^ ~last_key_inverted;
    const int num_bits = 64 - __clzll(static_cast<long long>(differing));
    uint64_t prefix = num_bits == 64 ? 0 : first_key >> num_bits << num_bits;
    for (int bit = num_bits - 1; bit >= 0; --bit) {
      const uint64_t middle = prefix | uint64_t{1} << bit;
      int64_t below = 0;
      for (int r = begin; r < end; ++r) {
        const uint64_t* keys = args.sorted_keys + int64_t{r} * args.list_size;
        int low = lows[r], high = highs[r];
        const int first = low;
        while (low < high) {
          const int at = (low + high) / 2;
          if (keys[at] < middle) {
            low = at + 1;
          } else {
            high = at;
          }
        }
        sizes[r] = low;
        below += low - first;
      }
      below = block_sum(below, sums, turn++);
      const bool is_below = left <= below;
      if (!is_below) {
        left -= below;
        prefix = middle;
      }
      for (int r = begin; r < end; ++r) (is_below ? highs : lows)[r] = sizes[r];
    }
  } else {
    for (int r = begin; r < end; ++r) {
      if (left == 0) highs[r] = 0;
      lows[r] = highs[r];
    }
    left = 0;
  }

  // Ahead of the window: chosen. In it, all rank equal: request after request, while they last.
  int64_t equal = 0;
  for (int r = begin; r < end; ++r) equal += highs[r] - lows[r];
  left -= block_sum_before(equal, sums, turn++);
  int64_t chosen = 0;
  for (int r = begin; r < end; ++r) {
    const int64_t in_window = highs[r] - lows[r];
    const int64_t take = left <= 0 ? 0 : left < in_window ? left : in_window;
    left -= in_window;
    sizes[r] = lows[r] + static_cast<int32_t>(take);
    chosen += sizes[r];
  }
  int64_t place = block_sum_before(chosen, sums, turn++);
  if (threadIdx.x == 0) args.cu_nodes[0] = 0;
  for (int r = begin; r < end; ++r) {
    place += sizes[r];
    args.cu_nodes[r + 1] = static_cast<int32_t>(place);
  }
}

// A block a request, and one more for what lies behind the last chosen.
__global__ void __launch_bounds__(kEmitThreads) emit_columns_kernel(const SelectBudgetArgs args) {
  const int request = blockIdx.x;
  if (request == args.num_requests) {
    for (int64_t i = args.cu_nodes[request] + int64_t{threadIdx.x}; i < args.num_slots;
         i += kEmitThreads) {
      args.columns[i] = -1;
    }
    return;
  }
  const int first = args.cu_nodes[request], size = args.cu_nodes[request + 1] - first;
  const int32_t* sorted = args.sorted_columns + int64_t{request} * args.list_size;
  for (int i = threadIdx.x; i < size; i += kEmitThreads) args.columns[first + i] = sorted[i];
}

}  // namespace

cudaError_t launch_select_budget(const SelectBudgetArgs& args, cudaStream_t stream) {
  int padded = 2;
  while (padded < args.num_columns) padded *= 2;
  int threads = kWarpSize;
  while (threads < padded / 2 && threads < kMaxSortThreads) threads *= 2;
  const size_t sort_bytes = static_cast<size_t>(padded) * (sizeof(uint64_t) + sizeof(int32_t));
  cudaError_t error = launch(sort_candidates_kernel, dim3(args.num_requests), dim3(threads),
                             sort_bytes, stream, args, padded);
  if (error != cudaSuccess) return error;
  threads = kWarpSize;
  while (threads < args.num_requests && threads < kThresholdThreads) threads *= 2;
  error = launch(find_threshold_kernel, dim3(1), dim3(threads), 2 * kWarpSize * sizeof(int64_t),
                 stream, args);
  if (error != cudaSuccess || args.num_slots == 0) return error;
  return launch(emit_columns_kernel, dim3(args.num_requests + 1), dim3(kEmitThreads), 0, stream,
                args);
}

}  // namespace echo_vllm::cuda
