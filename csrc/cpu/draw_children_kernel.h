// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
//
// A row's distribution, its draws without replacement, and what they are worth. The numbers are
// those of echo_vllm/trees/draws.py and echo_vllm/forecast/gains.py, step by step; the row stays in
// the caches from the first pass to the last.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "draw_children.h"
#include "weights.h"

namespace echo_vllm::cpu {
namespace {

// Tokens that are summed together, the share of q's mass below which nothing is left to draw, and
// the most probable tokens from which slots are estimated: BLOCK, EXHAUSTED, LOOKED_AT there.
constexpr int kDrawBlock = 128;
constexpr double kExhausted = 1e-12;
constexpr int kLookedAt = 32;

// AFTER_REJECTIONS.
constexpr double kAfterRejections[] = {1.0, 0.5, 0.4, 0.35, 0.3};
constexpr int64_t kLastAfter = 4;

// Stream.DRAW times the constant that keeps streams apart.
constexpr uint64_t kDrawStream = 0xD1B54A32D192ED03u;

ECHO_INLINE uint64_t mix_bits(uint64_t x) {
  x += 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

ECHO_INLINE double after(int64_t rank) {
  return kAfterRejections[rank < kLastAfter ? rank : kLastAfter];
}

struct Curve {
  double scale, exponent;

  double operator()(double q) const { return scale * std::pow(q, exponent); }
};

// Per thread: what a row needs beside its place in the output.
struct DrawScratch {
  std::vector<double> sums;
  double masses[kDrawBlock];
  float best[kLookedAt];
  int num_best;
};

// The row's logits over its temperature, in `out`; false where it has no distribution.
template <class T>
bool scaled_row(const T* logits, float temperature, int n, float* out) {
  IntVec bad{};
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vec v = load(logits + i) / splat(temperature);
    bad |= reinterpret_cast<IntVec>(v != v);
    store(out + i, v);
  }
  bool is_nan = false;
  for (int lane = 0; lane < kLanes; ++lane) is_nan |= bad[lane] != 0;
  for (; i < n; ++i) {
    out[i] = to_float(logits[i]) / temperature;
    is_nan |= out[i] != out[i];
  }
  return !is_nan;
}

// The greatest probabilities, falling; those that are met first are a heap with the least on top.
ECHO_INLINE void keep_best(const float* probs, int begin, int end, DrawScratch& scratch) {
  float* const best = scratch.best;
  const auto least_first = std::greater<float>();
  for (int t = begin; t < end; ++t) {
    if (scratch.num_best < kLookedAt) {
      best[scratch.num_best++] = probs[t];
      std::push_heap(best, best + scratch.num_best, least_first);
    } else if (probs[t] > best[0]) {
      std::pop_heap(best, best + kLookedAt, least_first);
      best[kLookedAt - 1] = probs[t];
      std::push_heap(best, best + kLookedAt, least_first);
    }
  }
}

// Normalises the weights, and sums their blocks.
void normalise_row(float* probs, int n, DrawScratch& scratch) {
  double total = 0.0;
  for (int begin = 0; begin < n; begin += kDrawBlock) {
    const int end = std::min(begin + kDrawBlock, n);
    Vec part{};
    int i = begin;
    for (; i + kLanes <= end; i += kLanes) part += load(probs + i);
    double sum = horizontal_sum(part);
    for (; i < end; ++i) sum += probs[i];
    total += sum;
  }
  const float factor = static_cast<float>(1.0 / total);
  scratch.sums.clear();
  scratch.num_best = 0;
  for (int begin = 0; begin < n; begin += kDrawBlock) {
    const int end = std::min(begin + kDrawBlock, n);
    Vec top{};
    int i = begin;
    for (; i + kLanes <= end; i += kLanes) {
      const Vec v = load(probs + i) * factor;
      store(probs + i, v);
      top = max(v, top);
    }
    float most = horizontal_max(top);
    for (; i < end; ++i) {
      probs[i] *= factor;
      most = std::max(most, probs[i]);
    }
    // Chains that do not wait for each other.
    constexpr int kChains = 8;
    double chains[kChains] = {};
    int t = begin;
    for (; t + kChains <= end; t += kChains) {
      for (int c = 0; c < kChains; ++c) chains[c] += probs[t + c];
    }
    double sum = 0.0;
    for (; t < end; ++t) sum += probs[t];
    for (const double chain : chains) sum += chain;
    scratch.sums.push_back(sum);
    if (scratch.num_best < kLookedAt || most > scratch.best[0]) {
      keep_best(probs, begin, end, scratch);
    }
  }
  std::sort(scratch.best, scratch.best + scratch.num_best, std::greater<float>());
}

// Inverts the sum of q from the left, with what was drawn before left out.
void draw_row(const float* probs, int n, const int64_t* keys, int64_t k, DrawScratch& scratch,
              int64_t* token_ids) {
  std::vector<double>& sums = scratch.sums;
  const int num_blocks = static_cast<int>(sums.size());
  double least = 0.0;
  for (const double sum : sums) least += sum;
  least *= kExhausted;
  for (int64_t rank = 0; rank < k; ++rank) {
    const uint64_t bits = mix_bits(static_cast<uint64_t>(keys[rank]) ^ kDrawStream);
    double left = 0.0;
    for (const double sum : sums) left += sum;
    double place = static_cast<double>(bits >> 11) * 0x1p-53 * left;
    int block = 0;
    double through = sums[0];
    while (block + 1 < num_blocks && !(through > place)) through += sums[++block];
    place -= through - sums[block];
    const int begin = block * kDrawBlock, size = std::min(kDrawBlock, n - begin);
    for (int i = 0; i < size; ++i) scratch.masses[i] = probs[begin + i];
    for (int64_t drawn = 0; drawn < rank; ++drawn) {
      const int64_t at = token_ids[drawn] - begin;
      if (at >= 0 && at < size) scratch.masses[at] = 0.0;
    }
    int found = 0;
    double before = scratch.masses[0];
    while (found + 1 < size && !(before > place)) before += scratch.masses[++found];
    // Rounding can end up on a token without mass: rather no child.
    const bool is_missing = !(scratch.masses[found] > 0.0 && left > least);
    token_ids[rank] = is_missing ? -1 : begin + found;
    scratch.masses[found] = 0.0;
    double rest = 0.0;
    for (int i = 0; i < size; ++i) rest += scratch.masses[i];
    sums[block] = rest;
  }
}

// Before drawing: how probable it is that each child is the accepted one.
void expect_gains(const DrawScratch& scratch, const Curve& curve, int64_t k, float* gains) {
  const int n = scratch.num_best;
  double seen = 0.0;
  for (int i = 0; i < n; ++i) seen += scratch.best[i];
  const double unseen = std::max(0.0, 1.0 - seen);
  double still[kLookedAt], rejected[kLookedAt], reach = 1.0;
  std::fill(still, still + n, 1.0);
  for (int64_t rank = 0; rank < k; ++rank) {
    double left = unseen, accepted = 0.0, refused = unseen;
    for (int i = 0; i < n; ++i) left += scratch.best[i] * still[i];
    for (int i = 0; i < n; ++i) {
      const double draft = scratch.best[i] * still[i] / std::max(left, kExhausted);
      const double chance = curve(draft) * after(rank);
      accepted += draft * chance;
      rejected[i] = draft * (1.0 - chance);
      refused += rejected[i];
    }
    if (!(left > kExhausted)) accepted = 0.0;
    gains[rank] = static_cast<float>(reach * accepted);
    reach *= 1.0 - accepted;
    for (int i = 0; i < n; ++i) {
      still[i] = std::max(0.0, still[i] - rejected[i] / std::max(refused, kExhausted));
    }
  }
}

// After drawing.
void estimate_reaches(const float* probs, const int64_t* token_ids, const Curve& curve, int64_t k,
                      float* reaches) {
  double gone = 0.0, before = 1.0;
  for (int64_t rank = 0; rank < k; ++rank) {
    const double drawn = token_ids[rank] < 0 ? 0.0 : probs[token_ids[rank]];
    const double draft = std::min(1.0, drawn / std::max(1.0 - gone, kExhausted));
    const double chance = drawn > 0.0 ? curve(draft) * after(rank) : 0.0;
    reaches[rank] = static_cast<float>(before * chance);
    before *= 1.0 - chance;
    gone += drawn;
  }
}

template <class T>
void draw_rows(const DrawChildrenArgs& args, int64_t first, int64_t last) {
  static thread_local DrawScratch scratch;
  const int n = static_cast<int>(args.vocab);
  const Curve curve{args.scale, args.exponent};
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for (int64_t row = first; row < last; ++row) {
    const T* logits = static_cast<const T*>(args.logits) + row * args.logits_stride;
    float* const probs = args.probs + row * args.vocab;
    int64_t* const token_ids = args.token_ids + row * args.k;
    int64_t* const keys = args.child_keys + row * args.k;
    const uint64_t key = static_cast<uint64_t>(args.keys[row]);
    for (int64_t rank = 0; rank < args.k; ++rank) {
      keys[rank] = static_cast<int64_t>(mix_bits(key + 1 + static_cast<uint64_t>(rank)));
    }
    bool exists =
        scaled_row(logits, args.temperature == nullptr ? 1.0f : args.temperature[row], n, probs);
    const float top = exists ? max_of(probs, n) : kInfinity;
    exists = top > -kInfinity && top < kInfinity;
    if (exists) {
      exponentials(probs, n, top, probs);
      normalise_row(probs, n, scratch);
      draw_row(probs, n, keys, args.k, scratch, token_ids);
    } else {
      std::fill(probs, probs + n, std::numeric_limits<float>::quiet_NaN());
      std::fill(token_ids, token_ids + args.k, int64_t{-1});
    }
    for (int64_t rank = 0; rank < args.k; ++rank) {
      const int64_t token = token_ids[rank];
      args.logprobs[row * args.k + rank] = token < 0 ? -kInfinity : std::log(probs[token]);
    }
    if (args.scale == 0.0) continue;
    float* const gains = args.gains + row * args.k;
    float* const reaches = args.reaches + row * args.k;
    if (exists) {
      expect_gains(scratch, curve, args.k, gains);
      estimate_reaches(probs, token_ids, curve, args.k, reaches);
    } else {
      std::fill(gains, gains + args.k, 0.0f);
      std::fill(reaches, reaches + args.k, 0.0f);
    }
  }
}

void run_draw_children(const DrawChildrenArgs& args, int64_t first, int64_t last) {
  if (args.is_bfloat16) {
    draw_rows<BFloat16>(args, first, last);
  } else {
    draw_rows<float>(args, first, last);
  }
}

}  // namespace
}  // namespace echo_vllm::cpu
