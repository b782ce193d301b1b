// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
//
// Threads come from torch's own intra-op pool: the one OpenMP runtime that torch and vLLM's CPU
// worker share, whose threads the worker has bound to cores. This library links no OpenMP itself.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>

namespace echo_vllm::cpu {

// Calls f(task) for every task in [0, num_tasks) on up to `num_threads` threads, handing tasks out
// one by one. The team is either one thread or all of them: libgomp stops and starts threads
// whenever the size of the team changes.
template <class F>
void for_each_task(int64_t num_tasks, bool parallel, const F& f) {
  const int64_t num_threads = parallel ? torch::stable::get_num_threads() : 1;
  if (num_threads <= 1 || num_tasks <= 1) {
    for (int64_t task = 0; task < num_tasks; ++task) f(task);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, num_threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot) {
      for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < num_tasks;) {
        f(task);
      }
    }
  });
}

}  // namespace echo_vllm::cpu
