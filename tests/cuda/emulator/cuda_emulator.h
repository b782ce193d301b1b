// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
//
// Runs the kernels of csrc/cuda on a host without a GPU: the sources themselves are compiled by a
// host compiler with this header in place of CUDA's.
//
// Each thread of a block is a fiber; whatever threads do together (barriers, shuffles, matrix
// instructions) is a meeting point. Between meeting points fibers run in random order, and so do
// blocks, which shows missing barriers and dependence on the order of blocks. Shared memory starts
// as NaN. Asynchronous copies arrive as late as they may. The fragment layouts of ldmatrix and
// mma.m16n8k16 are written down here from the PTX manual, apart from the kernels. What this cannot
// show: races inside a warp, alignment, memory ordering, and how fast anything is.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
enum cudaError_t : int {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorNoKernelImageForDevice = 209
};
using cudaStream_t = void*;
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
inline const char* cudaGetErrorString(cudaError_t) { return "invalid launch"; }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

using std::max;
using std::min;
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clzll(long long bits) {
  return bits == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(bits));
}

namespace echo_vllm::emulator {

constexpr int kWarpSize = 32;
constexpr size_t kStackBytes = 128 * 1024;
constexpr size_t kMaxSharedBytes = 227 * 1024;  // a block on sm_90

// What a block may have; a test may say less.
inline size_t shared_bytes_of_device() {
  const char* text = std::getenv("ECHO_EMULATED_SHARED_BYTES");
  return text == nullptr ? kMaxSharedBytes : std::strtoul(text, nullptr, 10);
}

struct Barrier {
  int arrived = 0;
  unsigned generation = 0;
};

struct Copy {
  void* to;
  unsigned char bytes[16];
};

struct Fiber {
  std::unique_ptr<unsigned char[]> stack{new unsigned char[kStackBytes]};
  ucontext_t start;
  jmp_buf state;
  bool started, finished;
  const Barrier* waits_for;
  unsigned generation;
  std::vector<std::vector<Copy>> copies;  // groups, the last one open
};

struct Warp {
  Barrier barrier;
  alignas(16) unsigned char exchange[kWarpSize][64];
};

struct Block {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  Barrier barrier;
  alignas(128) unsigned char shared[kMaxSharedBytes];
  int num_threads = 0, running = -1;
  jmp_buf scheduler;
  ucontext_t scheduler_context;
  std::function<void()> body;
  std::mt19937 random{12345};
};

inline Block& block() {
  static Block instance;
  return instance;
}

inline Fiber& fiber() { return *block().fibers[block().running]; }
inline Warp& warp() { return block().warps[block().running / kWarpSize]; }
inline int lane() { return block().running % kWarpSize; }

inline void meet(Barrier& barrier, int count) {
  const unsigned generation = barrier.generation;
  if (++barrier.arrived == count) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  Fiber& self = fiber();
  self.waits_for = &barrier;
  self.generation = generation;
  if (_setjmp(self.state) == 0) _longjmp(block().scheduler, 1);
  self.waits_for = nullptr;
}

inline void fiber_main() {
  block().body();
  fiber().finished = true;
  _longjmp(block().scheduler, 1);
}

inline void resume(int thread) {
  Block& b = block();
  Fiber& f = *b.fibers[thread];
  b.running = thread;
  threadIdx = dim3(static_cast<unsigned>(thread), 0, 0);
  if (_setjmp(b.scheduler) != 0) return;
  if (f.started) _longjmp(f.state, 1);
  f.started = true;
  getcontext(&f.start);
  f.start.uc_stack.ss_sp = f.stack.get();
  f.start.uc_stack.ss_size = kStackBytes;
  f.start.uc_link = nullptr;
  makecontext(&f.start, fiber_main, 0);
  setcontext(&f.start);
}

[[noreturn]] inline void die(const char* what) {
  std::fprintf(stderr, "cuda_emulator: %s\n", what);
  std::abort();
}

inline void run_block(int num_threads) {
  Block& b = block();
  b.num_threads = num_threads;
  b.warps = std::vector<Warp>(num_threads / kWarpSize);
  b.barrier = {};
  std::memset(b.shared, 0xff, sizeof(b.shared));
  while (static_cast<int>(b.fibers.size()) < num_threads) {
    b.fibers.push_back(std::make_unique<Fiber>());
  }
  std::vector<int> alive;
  for (int i = 0; i < num_threads; ++i) {
    Fiber& f = *b.fibers[i];
    f.started = f.finished = false;
    f.waits_for = nullptr;
    f.copies.assign(1, {});
    alive.push_back(i);
  }
  while (!alive.empty()) {
    std::shuffle(alive.begin(), alive.end(), b.random);
    bool progress = false;
    for (const int thread : alive) {
      const Fiber& f = *b.fibers[thread];
      if (f.waits_for != nullptr && f.waits_for->generation == f.generation) continue;
      progress = true;
      resume(thread);
    }
    if (!progress) die("threads wait at barriers that the others have left");
    std::erase_if(alive, [&](int thread) { return b.fibers[thread]->finished; });
  }
}

template <class T>
T exchange(T value, int from) {
  static_assert(sizeof(T) <= 64);
  Warp& w = warp();
  std::memcpy(w.exchange[lane()], &value, sizeof(T));
  meet(w.barrier, kWarpSize);
  T result;
  std::memcpy(&result, w.exchange[from], sizeof(T));
  meet(w.barrier, kWarpSize);
  return result;
}

}  // namespace echo_vllm::emulator

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount
               ? 6
               : static_cast<int>(echo_vllm::emulator::shared_bytes_of_device());
  return cudaSuccess;
}

inline void __syncthreads() {
  echo_vllm::emulator::Block& b = echo_vllm::emulator::block();
  echo_vllm::emulator::meet(b.barrier, b.num_threads);
}
inline void __syncwarp() { echo_vllm::emulator::meet(echo_vllm::emulator::warp().barrier, 32); }

namespace echo_vllm::cuda {

constexpr int kWarpSize = emulator::kWarpSize;

template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t, const Args&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  if (block.x % kWarpSize != 0 || block.x > 1024 ||
      shared_bytes > emulator::shared_bytes_of_device() || grid.y > 65535 || grid.z > 65535) {
    return cudaErrorInvalidValue;
  }
  emulator::Block& b = emulator::block();
  b.body = [&] { kernel(args...); };
  blockDim = block;
  gridDim = grid;
  std::vector<uint64_t> order(uint64_t{grid.x} * grid.y * grid.z);
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), b.random);
  for (const uint64_t i : order) {
    blockIdx = dim3(static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                    static_cast<unsigned>(i / grid.x / grid.y));
    emulator::run_block(static_cast<int>(block.x));
  }
  return cudaSuccess;
}

inline unsigned char* shared_memory() { return emulator::block().shared; }

template <class T>
T shuffle_xor(T value, int lanes) {
  return emulator::exchange(value, emulator::lane() ^ lanes);
}

template <class T>
T shuffle_up(T value, int lanes) {
  const int lane = emulator::lane();
  return emulator::exchange(value, lane >= lanes ? lane - lanes : lane);
}

inline unsigned ballot(bool predicate) {
  unsigned bits = 0;
  emulator::Warp& w = emulator::warp();
  w.exchange[emulator::lane()][0] = predicate;
  emulator::meet(w.barrier, kWarpSize);
  for (int i = 0; i < kWarpSize; ++i) bits |= unsigned{w.exchange[i][0]} << i;
  emulator::meet(w.barrier, kWarpSize);
  return bits;
}

inline void atomic_or_shared(uint64_t* word, uint64_t bits) { *word |= bits; }

inline void copy_async(void* shared, const void* global, bool valid) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 ||
      (valid && reinterpret_cast<uintptr_t>(global) % 16 != 0)) {
    emulator::die("cp.async of unaligned memory");
  }
  emulator::Copy copy{shared, {}};
  if (valid) std::memcpy(copy.bytes, global, 16);
  emulator::fiber().copies.back().push_back(copy);
}

inline void commit_copies() { emulator::fiber().copies.emplace_back(); }

template <int kPending>
void wait_copies() {
  auto& groups = emulator::fiber().copies;
  while (groups.size() > kPending + 1) {
    for (const emulator::Copy& copy : groups.front()) std::memcpy(copy.to, copy.bytes, 16);
    groups.erase(groups.begin());
  }
}

// Lane i's address is that of row i % 8 of matrix i / 8.
inline void load_matrices(uint32_t (&r)[4], const void* row, bool transposed) {
  emulator::Warp& w = emulator::warp();
  const int lane = emulator::lane();
  std::memcpy(w.exchange[lane], row, 16);
  emulator::meet(w.barrier, kWarpSize);
  const auto element = [&](int matrix, int i, int j) {
    uint16_t bits;
    std::memcpy(&bits, w.exchange[8 * matrix + i] + 2 * j, 2);
    return uint32_t{bits};
  };
  for (int m = 0; m < 4; ++m) {
    const int major = lane / 4, minor = lane % 4 * 2;
    r[m] = transposed ? element(m, minor, major) | element(m, minor + 1, major) << 16
                      : element(m, major, minor) | element(m, major, minor + 1) << 16;
  }
  emulator::meet(w.barrier, kWarpSize);
}
inline void load_matrices(uint32_t (&r)[4], const void* row) { load_matrices(r, row, false); }
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  load_matrices(r, row, true);
}

inline float exp2_fast(float x) { return std::exp2(x); }

struct Float32 {
  float value;
};
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline float to_float(Float32 x) { return x.value; }
inline float to_float(BFloat16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }
inline float to_float(Float16 x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  float magnitude = std::ldexp(static_cast<float>(fraction + (exponent > 0 ? 1024 : 0)),
                               std::max(exponent, 1) - 25);
  if (exponent == 31) magnitude = fraction != 0 ? NAN : INFINITY;
  return x.bits >> 15 != 0 ? -magnitude : magnitude;
}

template <class T>
T from_float(float x);
template <>
inline Float32 from_float<Float32>(float x) {
  return {x};
}
template <>
inline BFloat16 from_float<BFloat16>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline Float16 from_float<Float16>(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float magnitude = std::fabs(x);
  if (x != x) return {0x7fff};
  if (magnitude == 0.0f) return {sign};
  if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  int exponent = 0;
  std::frexp(magnitude, &exponent);
  exponent = std::max(exponent - 1, -14);
  // Units of the last place, rounded to even by the host's rounding mode.
  const int units = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  return {static_cast<uint16_t>(sign | (units + ((exponent + 14) << 10)))};
}

template <class T>
uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | uint32_t{from_float<T>(high).bits} << 16;
}

template <class T>
uint32_t multiply_pair(uint32_t pair, float factor) {
  const T low{static_cast<uint16_t>(pair)}, high{static_cast<uint16_t>(pair >> 16)};
  return pack<T>(to_float(low) * factor, to_float(high) * factor);
}

// The register `i / 2`, half `i % 2` of A that lane holds, and likewise for B and C.
inline int row_of_a(int lane, int i) { return lane / 4 + (i / 2 % 2) * 8; }
inline int column_of_a(int lane, int i) { return lane % 4 * 2 + i % 2 + (i / 4) * 8; }
inline int row_of_b(int lane, int i) { return lane % 4 * 2 + i % 2 + (i / 2) * 8; }
inline int column_of_b(int lane) { return lane / 4; }
inline int row_of_c(int lane, int i) { return lane / 4 + (i / 2) * 8; }
inline int column_of_c(int lane, int i) { return lane % 4 * 2 + i % 2; }

template <class T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::Warp& w = emulator::warp();
  const int own = emulator::lane();
  const uint32_t fragments[6] = {a[0], a[1], a[2], a[3], b0, b1};
  std::memcpy(w.exchange[own], fragments, sizeof(fragments));
  emulator::meet(w.barrier, kWarpSize);
  float matrix_a[16][16], matrix_b[16][8];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    T halves[12];
    std::memcpy(halves, w.exchange[lane], sizeof(halves));
    for (int i = 0; i < 8; ++i) {
      matrix_a[row_of_a(lane, i)][column_of_a(lane, i)] = to_float(halves[i]);
    }
    for (int i = 0; i < 4; ++i) {
      matrix_b[row_of_b(lane, i)][column_of_b(lane)] = to_float(halves[8 + i]);
    }
  }
  for (int i = 0; i < 4; ++i) {
    for (int k = 0; k < 16; ++k) {
      c[i] += matrix_a[row_of_c(own, i)][k] * matrix_b[k][column_of_c(own, i)];
    }
  }
  emulator::meet(w.barrier, kWarpSize);
}

}  // namespace echo_vllm::cuda
