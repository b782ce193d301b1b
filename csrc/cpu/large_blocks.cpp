// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
#include "large_blocks.h"

#include <sys/mman.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <mutex>
#include <new>
#include <vector>

namespace echo_vllm::cpu {
namespace {

using torch::stable::Tensor;

// A step has two large outputs at most, the target's logits and the drafter's.
constexpr size_t kFreeBlocks = 2;
// What a block may be larger than what is asked for, as a factor.
constexpr int64_t kMostSlack = 4;
constexpr int64_t kPage = int64_t{2} << 20;

struct Block {
  void* data;
  int64_t bytes;
};

class Pool {
 public:
  void* take(int64_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      // Ascending by size.
      for (auto it = free_.begin(); it != free_.end(); ++it) {
        if (it->bytes < bytes || it->bytes > kMostSlack * bytes) continue;
        used_.push_back(*it);
        free_.erase(it);
        return used_.back().data;
      }
    }
    bytes = (bytes + kPage - 1) / kPage * kPage;
    void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) throw std::bad_alloc();
    madvise(data, bytes, MADV_HUGEPAGE);
    const std::lock_guard<std::mutex> lock(mutex_);
    used_.push_back({data, bytes});
    return data;
  }

  void give(void* data) {
    Block gone{nullptr, 0};
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto it = std::find_if(used_.begin(), used_.end(),
                                   [data](const Block& block) { return block.data == data; });
      const Block block = *it;
      used_.erase(it);
      free_.insert(std::find_if(free_.begin(), free_.end(),
                                [&](const Block& other) { return other.bytes >= block.bytes; }),
                   block);
      if (free_.size() > kFreeBlocks) {
        gone = free_.front();  // The smallest: batches that grow have outgrown it.
        free_.erase(free_.begin());
      }
    }
    if (gone.data != nullptr) munmap(gone.data, gone.bytes);
  }

 private:
  std::mutex mutex_;
  std::vector<Block> free_, used_;
};

Pool& pool() {
  static Pool* const kept = new Pool;  // Tensors may outlive static objects.
  return *kept;
}

void give_back(void* data) { pool().give(data); }

}  // namespace

Tensor new_output(const Tensor& x, int64_t rows, int64_t columns) {
  const int64_t bytes = rows * columns * static_cast<int64_t>(x.element_size());
  if (bytes < kLargeBytes) return torch::stable::new_empty(x, {rows, columns});
  return torch::stable::from_blob(pool().take(bytes), {rows, columns}, {columns, 1}, x.device(),
                                  x.scalar_type(), &give_back);
}

}  // namespace echo_vllm::cpu
