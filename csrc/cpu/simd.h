// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
//
// Vectors of floats for the kernels that are compiled once per instruction set. GCC's vector
// extensions spell them, so one source serves SSE2, NEON, AVX2 and AVX-512; the width follows the
// compiler's target flags. Everything is static: see common/macros.h.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>

#include "../common/macros.h"

#define ECHO_INLINE static inline __attribute__((always_inline))

namespace echo_vllm::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t UintVec __attribute__((vector_size(kLanes * 4)));
typedef uint16_t HalfVec __attribute__((vector_size(kLanes * 2)));

// 16-bit floats are storage formats only; arithmetic is in fp32.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Initializer lists, not loops over lanes: GCC turns only the former into one broadcast.
#if defined(__AVX512F__)
ECHO_INLINE Vec splat(float x) { return Vec{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
ECHO_INLINE UintVec splat_bits(uint32_t x) {
  return UintVec{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
}
ECHO_INLINE IntVec lane_index() {
  return IntVec{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
}
#elif defined(__AVX2__)
ECHO_INLINE Vec splat(float x) { return Vec{x, x, x, x, x, x, x, x}; }
ECHO_INLINE UintVec splat_bits(uint32_t x) { return UintVec{x, x, x, x, x, x, x, x}; }
ECHO_INLINE IntVec lane_index() { return IntVec{0, 1, 2, 3, 4, 5, 6, 7}; }
#else
ECHO_INLINE Vec splat(float x) { return Vec{x, x, x, x}; }
ECHO_INLINE UintVec splat_bits(uint32_t x) { return UintVec{x, x, x, x}; }
ECHO_INLINE IntVec lane_index() { return IntVec{0, 1, 2, 3}; }
#endif

ECHO_INLINE Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

ECHO_INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof(v)); }

ECHO_INLINE Vec select(IntVec condition, Vec yes, Vec no) {
  return reinterpret_cast<Vec>((reinterpret_cast<IntVec>(yes) & condition) |
                               (reinterpret_cast<IntVec>(no) & ~condition));
}

ECHO_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }
ECHO_INLINE Vec min(Vec a, Vec b) { return a < b ? a : b; }

ECHO_INLINE Vec half_to_float(UintVec h) {
  // Shifting the exponent into place and rescaling by 2^112 covers zeros, subnormals and normals;
  // infinities and NaNs need their exponent back.
  const UintVec magnitude = (h & 0x7fffu) << 13;
  const UintVec sign = (h & 0x8000u) << 16;
  UintVec bits = reinterpret_cast<UintVec>(reinterpret_cast<Vec>(magnitude) * 0x1p112f);
  const UintVec special = reinterpret_cast<UintVec>((h & 0x7c00u) == 0x7c00u);
  bits = (bits & ~special) | ((magnitude | 0x7f800000u) & special);
  return reinterpret_cast<Vec>(bits | sign);
}

// GCC 12 splits a generic 16 -> 32 bit conversion in two; the intrinsics are one load.
ECHO_INLINE UintVec load_halves(const uint16_t* p) {
#if defined(__AVX512F__)
  __m256i h;
  std::memcpy(&h, p, sizeof(h));
  return reinterpret_cast<UintVec>(_mm512_cvtepu16_epi32(h));
#elif defined(__AVX2__)
  __m128i h;
  std::memcpy(&h, p, sizeof(h));
  return reinterpret_cast<UintVec>(_mm256_cvtepu16_epi32(h));
#else
  HalfVec h;
  std::memcpy(&h, p, sizeof(h));
  return __builtin_convertvector(h, UintVec);
#endif
}

ECHO_INLINE Vec load(const BFloat16* p) {
  return reinterpret_cast<Vec>(load_halves(&p->bits) << 16);
}

ECHO_INLINE Vec load(const Float16* p) { return half_to_float(load_halves(&p->bits)); }

ECHO_INLINE float to_float(float x) { return x; }

ECHO_INLINE float to_float(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof(f));
  return f;
}

ECHO_INLINE float to_float(Float16 x) {
  UintVec h = splat_bits(x.bits);
  return half_to_float(h)[0];
}

// Round to nearest even, as torch does.
ECHO_INLINE UintVec round_to_bfloat16(Vec v) {
  const UintVec bits = reinterpret_cast<UintVec>(v);
  const UintVec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const UintVec nan = reinterpret_cast<UintVec>(v != v);
  return (rounded & ~nan) | (nan & 0x7fc0u);
}

ECHO_INLINE void store(BFloat16* p, Vec v) {
  const HalfVec h = __builtin_convertvector(round_to_bfloat16(v), HalfVec);
  std::memcpy(p, &h, sizeof(h));
}

ECHO_INLINE void store(Float16* p, Vec v) {
  const UintVec bits = reinterpret_cast<UintVec>(v);
  const UintVec sign = (bits >> 16) & 0x8000u;
  const UintVec magnitude = bits & 0x7fffffffu;
  // Normal halves: rebias the exponent, round to nearest even in integer arithmetic.
  const UintVec normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Subnormal halves: adding 0.5 makes the FPU round at the right bit.
  const UintVec subnormal =
      reinterpret_cast<UintVec>(reinterpret_cast<Vec>(magnitude) + 0.5f) - 0x3f000000u;
  const UintVec is_subnormal = reinterpret_cast<UintVec>(magnitude < 0x38800000u);
  const UintVec is_nan = reinterpret_cast<UintVec>(magnitude > 0x7f800000u);
  const UintVec is_overflow = reinterpret_cast<UintVec>(magnitude >= 0x477ff000u);
  UintVec h = (subnormal & is_subnormal) | (normal & ~is_subnormal);
  h = (h & ~is_overflow) | (is_overflow & 0x7c00u);
  h = (h & ~is_nan) | (is_nan & 0x7e00u);
  const HalfVec halves = __builtin_convertvector(h | sign, HalfVec);
  std::memcpy(p, &halves, sizeof(halves));
}

template <int kStep>
ECHO_INLINE Vec swap_lanes(Vec v) {
  IntVec index = lane_index() ^ kStep;
#if defined(__clang__)
  Vec swapped;
  for (int i = 0; i < kLanes; ++i) swapped[i] = v[index[i]];
  return swapped;
#else
  return __builtin_shuffle(v, index);
#endif
}

ECHO_INLINE float horizontal_max(Vec v) {
  if constexpr (kLanes >= 16) v = max(v, swap_lanes<8>(v));
  if constexpr (kLanes >= 8) v = max(v, swap_lanes<4>(v));
  v = max(v, swap_lanes<2>(v));
  v = max(v, swap_lanes<1>(v));
  return v[0];
}

ECHO_INLINE float horizontal_sum(Vec v) {
  if constexpr (kLanes >= 16) v += swap_lanes<8>(v);
  if constexpr (kLanes >= 8) v += swap_lanes<4>(v);
  v += swap_lanes<2>(v);
  v += swap_lanes<1>(v);
  return v[0];
}

// e^x for x <= 88 to about 1 ulp; below -86 the result stays near 4e-38, not zero.
ECHO_INLINE Vec exp(Vec x) {
  x = min(max(x, splat(-86.0f)), splat(88.0f));
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
  const Vec shifted = x * 1.44269504088896341f + 12582912.0f;
  const Vec n = shifted - 12582912.0f;
  // ln 2 in two parts, so that x - n ln 2 keeps its low bits.
  Vec r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const UintVec exponent = reinterpret_cast<UintVec>(shifted) << 23;
  return reinterpret_cast<Vec>(reinterpret_cast<UintVec>(p) + exponent);
}

ECHO_INLINE Vec tanh(Vec x) {
  x = min(max(x, splat(-20.0f)), splat(20.0f));
  const Vec e = exp(x + x);
  return (e - 1.0f) / (e + 1.0f);
}

}  // namespace
}  // namespace echo_vllm::cpu
