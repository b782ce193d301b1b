// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
//
// Cuts a ragged batch of tree rows into tiles and the keys into splits, by arithmetic alone: grids
// are sized from shapes that the host knows, and each block finds its part from row_start.
#pragma once

#include <cstdint>

#include "macros.h"

namespace echo_vllm {

// The lines of a request (its rows times `group` q heads) fill whole tiles of `tile_lines`. Tiles
// are numbered through the batch: request i's begin here. Rounding down leaves a request up to one
// tile too many, never one too few, and the number needs no sum over the requests before it.
ECHO_HOST_DEVICE int64_t first_tile_of(const int32_t* row_start, int request, int group,
                                       int tile_lines) {
  const int64_t lines = static_cast<int64_t>(row_start[request] - row_start[0]) * group;
  return lines / tile_lines + request;
}

// Tiles of a batch of at most `num_rows` rows: the size of the grid.
ECHO_HOST_DEVICE int64_t max_tiles(int64_t num_rows, int num_requests, int group, int tile_lines) {
  return num_rows * group / tile_lines + num_requests;
}

struct LineTile {
  int request;
  int first_line, num_lines;  // in the request; num_lines is 0 where there is nothing to do
};

// The lines of tile `tile`: the last request that begins at or before it owns it.
ECHO_HOST_DEVICE LineTile find_tile(const int32_t* row_start, int num_requests, int group,
                                    int tile_lines, int64_t tile) {
  int low = 0, high = num_requests;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (first_tile_of(row_start, middle, group, tile_lines) <= tile) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const int64_t first = (tile - first_tile_of(row_start, low, group, tile_lines)) * tile_lines;
  const int64_t lines = static_cast<int64_t>(row_start[low + 1] - row_start[low]) * group;
  const int64_t left = lines - first;
  return {low, static_cast<int>(first),
          static_cast<int>(left < 0            ? 0
                           : left < tile_lines ? left
                                               : tile_lines)};
}

// Fewer key tiles than this are not worth a partial result.
constexpr int kMinTilesPerSplit = 4;

// Into how many of `max_splits` parts `num_tiles` key tiles are cut; 1 at least.
ECHO_HOST_DEVICE int num_splits_of(int num_tiles, int max_splits) {
  const int wanted = (num_tiles + kMinTilesPerSplit - 1) / kMinTilesPerSplit;
  return wanted < 1 ? 1 : wanted < max_splits ? wanted : max_splits;
}

ECHO_HOST_DEVICE int split_begin(int num_tiles, int num_splits, int split) {
  return static_cast<int>(static_cast<int64_t>(num_tiles) * split / num_splits);
}

// The splits that fill `num_slots` places with blocks when the tiles alone do not.
ECHO_HOST_DEVICE int choose_max_splits(int64_t num_tiles, int64_t num_slots,
                                       int64_t max_key_tiles) {
  constexpr int64_t kMostSplits = 64;
  if (num_tiles < 1) return 1;
  int64_t splits = num_slots / num_tiles;
  const int64_t useful = (max_key_tiles + kMinTilesPerSplit - 1) / kMinTilesPerSplit;
  splits = splits < useful ? splits : useful;
  splits = splits < kMostSplits ? splits : kMostSplits;
  return splits < 1 ? 1 : static_cast<int>(splits);
}

}  // namespace echo_vllm
