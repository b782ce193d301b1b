// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
//
// What the kernels need of the device: launches, warp primitives, asynchronous copies, tensor-core
// instructions and 16-bit floats. tests/cuda/emulator/cuda_emulator.h has the same for a host
// without a GPU, so the kernels must not use the device in any other way.
#pragma once

#include <cstdint>

#include "../common/fp8.h"

#if defined(ECHO_EMULATE_CUDA)
#include "cuda_emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace echo_vllm::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t stream, const Args&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  constexpr size_t kDefaultSharedBytes = 48 * 1024;
  if (shared_bytes > kDefaultSharedBytes) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, args...);
  static_cast<void>(cudaGetLastError());  // the next caller's launch is not to blame
  return error;
}

__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int lanes) {
  return __shfl_xor_sync(kAllLanes, value, lanes);
}

template <class T>
__device__ __forceinline__ T shuffle_up(T value, int lanes) {
  return __shfl_up_sync(kAllLanes, value, lanes);
}

__device__ __forceinline__ unsigned ballot(bool predicate) {
  return __ballot_sync(kAllLanes, predicate);
}

__device__ __forceinline__ void atomic_or_shared(uint64_t* word, uint64_t bits) {
  atomicOr(reinterpret_cast<unsigned long long*>(word), static_cast<unsigned long long>(bits));
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies 16 bytes to shared memory, or zeros if not `valid`; both pointers must be aligned.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)),
               "l"(global), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}

// Waits until at most `kPending` committed groups of this thread are under way.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of 16-bit numbers; lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

// Storage formats; arithmetic is in fp32.
struct Float32 {
  float value;
};
struct BFloat16 {
  __nv_bfloat16 value;
};
struct Float16 {
  __half value;
};

__device__ __forceinline__ float to_float(Float32 x) { return x.value; }
__device__ __forceinline__ float to_float(BFloat16 x) { return __bfloat162float(x.value); }
__device__ __forceinline__ float to_float(Float16 x) { return __half2float(x.value); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ Float32 from_float<Float32>(float x) {
  return {x};
}
template <>
__device__ __forceinline__ BFloat16 from_float<BFloat16>(float x) {
  return {__float2bfloat16_rn(x)};
}
template <>
__device__ __forceinline__ Float16 from_float<Float16>(float x) {
  return {__float2half_rn(x)};
}

// Two numbers in one register, `low` in the lower half.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<BFloat16>(float low, float high) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
template <>
__device__ __forceinline__ uint32_t pack<Float16>(float low, float high) {
  uint32_t both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

// Both halves times a power of two.
template <class T>
__device__ __forceinline__ uint32_t multiply_pair(uint32_t pair, float factor);
template <>
__device__ __forceinline__ uint32_t multiply_pair<BFloat16>(uint32_t pair, float factor) {
  __nv_bfloat162 both;
  memcpy(&both, &pair, sizeof(both));
  both = __hmul2(both, __float2bfloat162_rn(factor));
  memcpy(&pair, &both, sizeof(pair));
  return pair;
}
template <>
__device__ __forceinline__ uint32_t multiply_pair<Float16>(uint32_t pair, float factor) {
  __half2 both;
  memcpy(&both, &pair, sizeof(both));
  both = __hmul2(both, __float2half2_rn(factor));
  memcpy(&pair, &both, sizeof(pair));
  return pair;
}

// c[16 x 8] += a[16 x 16] * b[16 x 8], mma.m16n8k16 with fp32 accumulators.
template <class T>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1);
template <>
__device__ __forceinline__ void multiply_add<BFloat16>(float (&c)[4], const uint32_t (&a)[4],
                                                       uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void multiply_add<Float16>(float (&c)[4], const uint32_t (&a)[4],
                                                      uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace echo_vllm::cuda
#endif

namespace echo_vllm::cuda {

struct Float8 {  // e4m3
  uint8_t code;
};

__device__ __forceinline__ float to_float(Float8 x) { return e4m3_to_float(x.code); }

// Two e4m3 codes, each in the low byte of a half, as two numbers of 16 bits; exact.
template <class T>
__device__ __forceinline__ uint32_t widen_e4m3_pair(uint32_t codes);
template <>
__device__ __forceinline__ uint32_t widen_e4m3_pair<BFloat16>(uint32_t codes) {
  return multiply_pair<BFloat16>(spread_e4m3_pair(codes, 7), 0x1p120f) | e4m3_pair_nan_bits(codes);
}
template <>
__device__ __forceinline__ uint32_t widen_e4m3_pair<Float16>(uint32_t codes) {
  return multiply_pair<Float16>(spread_e4m3_pair(codes, 10), 0x1p8f) | e4m3_pair_nan_bits(codes);
}

// Eight e4m3 codes as eight numbers of 16 bits.
template <class T>
__device__ __forceinline__ uint4 widen_e4m3(const void* codes) {
  uint32_t words[2];
  memcpy(words, codes, sizeof(words));
  return {widen_e4m3_pair<T>(low_e4m3_pair(words[0])), widen_e4m3_pair<T>(high_e4m3_pair(words[0])),
          widen_e4m3_pair<T>(low_e4m3_pair(words[1])),
          widen_e4m3_pair<T>(high_e4m3_pair(words[1]))};
}

template <class T>
__device__ __forceinline__ T warp_sum(T value) {
  for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) value += shuffle_xor(value, lanes);
  return value;
}

template <class T>
__device__ __forceinline__ T warp_min(T value) {
  for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) {
    const T other = shuffle_xor(value, lanes);
    value = other < value ? other : value;
  }
  return value;
}

inline unsigned blocks_for(int64_t items, int per_block) {
  return static_cast<unsigned>((items + per_block - 1) / per_block);
}

}  // namespace echo_vllm::cuda
