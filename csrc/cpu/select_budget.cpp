// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
//
// select_budget: which candidates of all requests share a batch-wide budget.
#include <algorithm>
#include <vector>

#include "../common/candidate_order.h"
#include "../common/checks.h"
#include "../ops.h"

namespace echo_vllm::cpu {
namespace {

constexpr const char* kOp = "select_budget";

// In one function object, so that the sorts inline it.
struct RanksBefore {
  bool operator()(const RankedCandidate& a, const RankedCandidate& b) const {
    return ranks_before(a, b);
  }
};

// One request's row of the candidate pool.
struct Row {
  const float* scores;
  const int32_t* tiers;
  const int64_t* parents;
  int64_t request, columns;

  RankedCandidate at(int64_t column) const {
    return {rank_key(tiers[column], scores[column]), request * columns + column};
  }
};

void check_candidate(const Row& row, int64_t column) {
  const int64_t parent = row.parents[column];
  if (parent == -1) return;
  check(parent >= 0 && parent < column, kOp, ": the parent of column ", column, " of request ",
        row.request, " must be -1 (the root) or an earlier column, got ", parent);
  check(is_candidate(row.scores[parent]), kOp, ": column ", column, " of request ", row.request,
        " has a score, but its parent, column ", parent, ", has none");
  check(!ranks_before(row.at(column), row.at(parent)), kOp, ": column ", column, " of request ",
        row.request, " (tier ", row.tiers[column], ", score ", row.scores[column],
        ") ranks before its parent, column ", parent, " (tier ", row.tiers[parent], ", score ",
        row.scores[parent], ")");
}

// Leaves the `count` best in [first, last), in any order, and returns their end.
template <class Iterator>
Iterator keep_best(Iterator first, Iterator last, int64_t count) {
  if (last - first <= count) return last;
  if (count > 0) std::nth_element(first, first + (count - 1), last, RanksBefore{});
  return first + count;
}

template <class T>
const T* row_of(const Tensor& tensor, int64_t request) {
  return static_cast<const T*>(tensor.const_data_ptr()) + request * tensor.stride(0);
}

}  // namespace

std::tuple<Tensor, Tensor> select_budget(const Tensor& scores, const Tensor& tiers,
                                         const Tensor& parents, int64_t budget,
                                         int64_t max_per_request,
                                         const std::optional<Tensor>& limit) {
  check_candidates(scores, tiers, parents, budget, max_per_request, limit);
  const int64_t num_requests = scores.size(0), columns = scores.size(1);
  // The size depends on shapes alone, as on CUDA: what is not used is -1.
  const int64_t num_slots = std::min(budget, num_requests * std::min(max_per_request, columns));
  if (limit) {
    const int64_t now = *static_cast<const int32_t*>(limit->const_data_ptr());
    budget = std::min(budget, std::max<int64_t>(0, now));
  }

  // Request after request, each with at most max_per_request; `ends` says where one ends.
  std::vector<RankedCandidate> kept;
  std::vector<int64_t> ends(num_requests);
  kept.reserve(num_requests * columns);
  for (int64_t request = 0; request < num_requests; ++request) {
    const Row row{row_of<float>(scores, request), row_of<int32_t>(tiers, request),
                  row_of<int64_t>(parents, request), request, columns};
    const int64_t begin = static_cast<int64_t>(kept.size());
    for (int64_t column = 0; column < columns; ++column) {
      if (!is_candidate(row.scores[column])) continue;
      check_candidate(row, column);
      kept.push_back(row.at(column));
    }
    kept.resize(keep_best(kept.begin() + begin, kept.end(), max_per_request) - kept.begin());
    ends[request] = static_cast<int64_t>(kept.size());
  }

  // The last candidate that the budget pays for; everything up to it stays.
  if (static_cast<int64_t>(kept.size()) > budget) {
    std::vector<RankedCandidate> best = kept;
    const auto end = keep_best(best.begin(), best.end(), budget);
    const bool any = end != best.begin();
    const RankedCandidate last = any ? *(end - 1) : RankedCandidate{};
    int64_t begin = 0, size = 0;
    for (int64_t request = 0; request < num_requests; ++request) {
      for (int64_t i = begin; i < ends[request]; ++i) {
        if (any && !ranks_before(last, kept[i])) kept[size++] = kept[i];
      }
      begin = ends[request];
      ends[request] = size;
    }
    kept.resize(size);
  }

  Tensor chosen = torch::stable::new_empty(parents, {num_slots}, ScalarType::Long);
  Tensor cu_nodes = torch::stable::new_empty(parents, {num_requests + 1}, ScalarType::Int);
  int64_t* column = static_cast<int64_t*>(chosen.mutable_data_ptr());
  int32_t* bound = static_cast<int32_t*>(cu_nodes.mutable_data_ptr());
  bound[0] = 0;
  int64_t begin = 0;
  for (int64_t request = 0; request < num_requests; ++request) {
    std::sort(kept.begin() + begin, kept.begin() + ends[request], RanksBefore{});
    for (int64_t i = begin; i < ends[request]; ++i) {
      column[i] = kept[i].index - request * columns;
    }
    begin = ends[request];
    bound[request + 1] = static_cast<int32_t>(begin);
  }
  std::fill(column + begin, column + num_slots, -1);
  return {chosen, cu_nodes};
}

}  // namespace echo_vllm::cpu
