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

#include "../common/fp8.h"
#include "../common/macros.h"

#define ECHO_INLINE static inline __attribute__((always_inline))
#define ECHO_INLINE_MEMBER inline __attribute__((always_inline))

namespace echo_vllm::cpu {
namespace {

// Of the caches: what a prefetch brings.
constexpr int kLineBytes = 64;

constexpr float kLog2E = 1.44269504088896341f;

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
struct Float8 {  // e4m3, see common/fp8.h
  uint8_t code;
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

ECHO_INLINE Vec load(const Float8* p) {
  float values[kLanes];
  for (int i = 0; i < kLanes; ++i) values[i] = e4m3_to_float(p[i].code);
  return load(values);
}

ECHO_INLINE float to_float(float x) { return x; }

ECHO_INLINE float to_float(Float8 x) { return e4m3_to_float(x.code); }

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

// Copies one number, converting it only if the types differ.
template <class T>
ECHO_INLINE void convert(T from, float* to) {
  *to = to_float(from);
}

ECHO_INLINE void convert(BFloat16 from, BFloat16* to) { *to = from; }
ECHO_INLINE void convert(Float16 from, Float16* to) { *to = from; }

// Round to nearest even, as torch does.
ECHO_INLINE UintVec round_to_bfloat16(Vec v) {
  const UintVec bits = reinterpret_cast<UintVec>(v);
  const UintVec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const UintVec nan = reinterpret_cast<UintVec>(v != v);
  return (rounded & ~nan) | (nan & 0x7fc0u);
}

ECHO_INLINE void store(BFloat16* p, Vec v) {
#if defined(__AVX512BF16__)
  const __m256bh h = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(v));
#elif defined(__AVX512F__)
  const __m256i h = _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(round_to_bfloat16(v)));
#else
  const HalfVec h = __builtin_convertvector(round_to_bfloat16(v), HalfVec);
#endif
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

// `yes` in the lanes whose bit is set in `bits`, counted from bit `first`, else `no`.
ECHO_INLINE Vec select(uint64_t bits, int first, Vec yes, Vec no) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(_mm512_mask_blend_ps(static_cast<__mmask16>(bits >> first),
                                                    reinterpret_cast<__m512>(no),
                                                    reinterpret_cast<__m512>(yes)));
#else
  const UintVec one_bit = splat_bits(1) << reinterpret_cast<UintVec>(lane_index());
  const UintVec word = splat_bits(static_cast<uint32_t>(bits >> first));
  const IntVec condition = reinterpret_cast<IntVec>((word & one_bit) != 0);
  return reinterpret_cast<Vec>((reinterpret_cast<IntVec>(yes) & condition) |
                               (reinterpret_cast<IntVec>(no) & ~condition));
#endif
}

// 2^x for x <= 126 from a polynomial of the given degree on [-0.5, 0.5] (minimax in the relative
// error). Far below zero the result is about 1e-38 rather than zero.
template <int kDegree>
ECHO_INLINE Vec exp2(Vec x) {
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
  x = max(x, splat(-125.0f));
  const Vec shifted = x + 12582912.0f;
  const Vec r = x - (shifted - 12582912.0f);
  Vec p;
  if constexpr (kDegree == 3) {  // 8e-5
    p = r * 5.5171668530e-02f + 2.4261112511e-01f;
    p = p * r + 6.9326096773e-01f;
    p = p * r + 9.9992805719e-01f;
  } else {  // 2e-7
    static_assert(kDegree == 5);
    p = r * 1.3276472455e-03f + 9.6755409613e-03f;
    p = p * r + 5.5507130921e-02f;
    p = p * r + 2.4022120237e-01f;
    p = p * r + 6.9314694405e-01f;
    p = p * r + 1.0000001192e+00f;
  }
  const UintVec exponent = reinterpret_cast<UintVec>(shifted) << 23;
  return reinterpret_cast<Vec>(reinterpret_cast<UintVec>(p) + exponent);
}

ECHO_INLINE float exp2(float x) { return exp2<5>(splat(x))[0]; }

ECHO_INLINE Vec tanh(Vec x) {
  constexpr float kTwoLog2E = 2.88539008177792681f;
  x = min(max(x, splat(-10.0f)), splat(10.0f));
  const Vec e = exp2<5>(x * kTwoLog2E);
  return (e - 1.0f) / (e + 1.0f);
}

}  // namespace
}  // namespace echo_vllm::cpu
