// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
//
// Argument checks of the operators. Python sees a RuntimeError with exactly this text.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <sstream>
#include <stdexcept>
#include <string>

namespace echo_vllm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

template <class... Parts>
void check(bool condition, const Parts&... parts) {
  if (!condition) fail(parts...);
}

// Prints a tensor's shape. A type rather than a function that returns text: the checks run on
// every call and must not format anything unless they fail.
struct ShapeOf {
  const Tensor& tensor;
};

inline std::ostream& operator<<(std::ostream& stream, const ShapeOf& shape) {
  const auto sizes = shape.tensor.sizes();
  stream << '[';
  for (size_t i = 0; i < sizes.size(); ++i) stream << (i == 0 ? "" : ", ") << sizes[i];
  return stream << ']';
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

inline void check_last_dim_contiguous(const char* op, const char* name, const Tensor& t) {
  const int64_t last = t.dim() - 1;
  check(t.size(last) <= 1 || t.stride(last) == 1, op, ": the last dimension of ", name,
        " must be contiguous, got stride ", t.stride(last));
}

// A contiguous vector of integers.
inline void check_index_vector(const char* op, const char* name, const Tensor& t,
                               ScalarType dtype) {
  check_dim(op, name, t, 1);
  check_dtype(op, name, t, dtype);
  check_last_dim_contiguous(op, name, t);
}

}  // namespace echo_vllm
