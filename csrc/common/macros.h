// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
//
// Functions that the CPU and the CUDA kernels share carry ECHO_HOST_DEVICE.
// They are static and always inlined on the host on purpose: the CPU kernels are compiled once per
// instruction set, and an ordinary inline function would be merged by the linker, so that a
// portable build could end up calling a copy that holds AVX-512 instructions.
#pragma once

#if defined(__CUDACC__)
#define ECHO_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define ECHO_HOST_DEVICE static inline __attribute__((always_inline))
#endif
