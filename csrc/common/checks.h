// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
//
// Argument checks of the operators. Python sees a RuntimeError with exactly this text.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>

namespace echo_vllm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Prints a tensor's shape. A type rather than a function that returns text: the checks run on
// every call and must not format anything unless they fail.
struct ShapeOf {
  const Tensor& tensor;
};

// No streams: where the compiler links libstdc++ into the library, their locale is that of another
// copy, and printing a number crashes.
template <class Part>
void append(std::string& message, const Part& part) {
  if constexpr (std::is_same_v<Part, ShapeOf>) {
    const auto sizes = part.tensor.sizes();
    message += '[';
    for (size_t i = 0; i < sizes.size(); ++i) {
      message += (i == 0 ? "" : ", ") + std::to_string(sizes[i]);
    }
    message += ']';
  } else if constexpr (std::is_arithmetic_v<Part>) {
    message += std::to_string(part);
  } else {
    message += part;
  }
}

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::string message;
  (append(message, parts), ...);
  throw std::runtime_error(message);
}

template <class... Parts>
void check(bool condition, const Parts&... parts) {
  if (!condition) fail(parts...);
}

inline void check_dim(const char* op, const char* name, const Tensor& t, int64_t dim) {
  check(t.dim() == dim, op, ": ", name, " must have ", dim, " dimensions, got shape ", ShapeOf{t});
}

inline void check_size(const char* op, const char* name, const Tensor& t, int64_t dim,
                       int64_t size) {
  check(t.size(dim) == size, op, ": ", name, ".shape[", dim, "] must be ", size, ", got shape ",
        ShapeOf{t});
}

inline void check_dtype(const char* op, const char* name, const Tensor& t, ScalarType dtype) {
  check(t.scalar_type() == dtype, op, ": ", name, " must be ", torch::headeronly::toString(dtype),
        ", got ", torch::headeronly::toString(t.scalar_type()));
}

inline void check_float_or_bfloat16(const char* op, const char* name, const Tensor& t) {
  const ScalarType dtype = t.scalar_type();
  check(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, op, ": ", name,
        " must be Float or BFloat16, got ", torch::headeronly::toString(dtype));
}

inline void check_last_dim_contiguous(const char* op, const char* name, const Tensor& t) {
  const int64_t last = t.dim() - 1;
  check(t.size(last) <= 1 || t.stride(last) == 1, op, ": the last dimension of ", name,
        " must be contiguous, got stride ", t.stride(last));
}

// The stride of a dimension; 0 where it has one entry, whose stride may be anything.
inline int64_t stride_of(const Tensor& t, int64_t dim) {
  return t.size(dim) > 1 ? t.stride(dim) : 0;
}

// A contiguous vector of integers.
inline void check_index_vector(const char* op, const char* name, const Tensor& t,
                               ScalarType dtype) {
  check_dim(op, name, t, 1);
  check_dtype(op, name, t, dtype);
  check_last_dim_contiguous(op, name, t);
}

// The arguments of select_budget.
inline void check_candidates(const Tensor& scores, const Tensor& tiers, const Tensor& parents,
                             int64_t budget, int64_t max_per_request,
                             const std::optional<Tensor>& limit) {
  const char* op = "select_budget";
  check_dim(op, "scores", scores, 2);
  check_dtype(op, "scores", scores, ScalarType::Float);
  check_last_dim_contiguous(op, "scores", scores);
  const int64_t num_requests = scores.size(0), columns = scores.size(1);
  for (const auto& [name, tensor, dtype] : {std::tuple{"tiers", &tiers, ScalarType::Int},
                                            std::tuple{"parents", &parents, ScalarType::Long}}) {
    check_dim(op, name, *tensor, 2);
    check_dtype(op, name, *tensor, dtype);
    check_size(op, name, *tensor, 0, num_requests);
    check_size(op, name, *tensor, 1, columns);
    check_last_dim_contiguous(op, name, *tensor);
  }
  check(budget >= 0, op, ": budget must be >= 0, got ", budget);
  check(max_per_request >= 0, op, ": max_per_request must be >= 0, got ", max_per_request);
  if (limit) {
    check_index_vector(op, "limit", *limit, ScalarType::Int);
    check_size(op, "limit", *limit, 0, 1);
  }
}

}  // namespace echo_vllm
