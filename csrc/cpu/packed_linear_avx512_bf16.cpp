// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
//
// x and weights in bfloat16, multiplied in pairs and added in fp32. A panel's numbers of the same
// column at two steps of the depth lie next to each other; an odd depth ends with a zero.
#include "packed_linear_kernel.h"

namespace echo_vllm::cpu {
namespace {

struct PairFormat {
  using X = BFloat16;
  static constexpr int kSteps = 2;
  static constexpr int kVecs = 3, kTileRows = 8;  // 24 of 32 registers accumulate
  static constexpr int kStepBytes = kVecs * kLanes * 2 * sizeof(BFloat16);
  using Weights = __m512bh;

  static ECHO_INLINE_MEMBER void load_step(const void* from, __m512bh* to) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      std::memcpy(&to[v], static_cast<const char*>(from) + v * sizeof(__m512bh), sizeof(__m512bh));
    }
  }
  static ECHO_INLINE_MEMBER __m512bh factor(const BFloat16* x, int count) {
    uint32_t pair = x->bits;
    if (count > 1) std::memcpy(&pair, x, sizeof(pair));
    return reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(pair)));
  }
  static ECHO_INLINE_MEMBER Vec add(Vec sum, __m512bh factor, __m512bh weights) {
    return _mm512_dpbf16_ps(sum, factor, weights);
  }
};

void run(const PackedLinearArgs& args, const PackedLinearPart& part) {
  linear_panels<PairFormat>(args, part);
}

}  // namespace

const PackedLinearKernel& packed_linear_kernel_avx512_bf16() {
  static constexpr PackedLinearKernel kKernel{PairFormat::kVecs * kLanes, kLanes, kMaxPartRows,
                                              run};
  return kKernel;
}

}  // namespace echo_vllm::cpu
