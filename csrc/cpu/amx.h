// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
//
// AMX tile registers: 16 rows of 64 bytes, or fewer rows. Only files that are compiled for AMX may
// include this.
#pragma once

#include <immintrin.h>

#include "simd.h"

namespace echo_vllm::cpu {
namespace {

constexpr int kTileRegisters = 8;
constexpr int kRegisterRows = 16;

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t column_bytes[16] = {};
  uint8_t rows[16] = {};
};

// GCC's tile intrinsics do not tell the compiler that they read and write memory.
ECHO_INLINE void memory_barrier() { asm volatile("" ::: "memory"); }

// While it lives, the first `count` registers have so many rows, and the others all.
class TileSession {
 public:
  TileSession(int count, int rows) {
    TileConfig config;
    for (int i = 0; i < kTileRegisters; ++i) {
      config.column_bytes[i] = 64;
      config.rows[i] = i < count && rows < kRegisterRows ? rows : kRegisterRows;
    }
    memory_barrier();
    _tile_loadconfig(&config);
  }
  ~TileSession() { _tile_release(); }
  TileSession(const TileSession&) = delete;
  TileSession& operator=(const TileSession&) = delete;
};

}  // namespace
}  // namespace echo_vllm::cpu
