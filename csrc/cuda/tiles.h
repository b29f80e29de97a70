// How a weight is cut that stays on the chip: arithmetic for plans and kernels.
#pragma once

#include <cstdint>

namespace torch_bptt::cuda {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t multiple) { return ceil_div(a, multiple) * multiple; }

// Tiles of 16 units by 8 rows of the batch. The sum runs in chunks of 32 bytes of a row, two at a
// time; of the weight, a chunk of a tile is 512 bytes, 16 for each thread of a warp.
struct Tiles {
  static constexpr int kTileUnits = 16, kTileRows = 8, kChunkBytes = 32, kWeightBytes = 512;
  static constexpr int kMaxThreads = 256;
  static constexpr int kMostParts = kMaxThreads / 32;  // of a sum, with warps of its own each
  static constexpr int kMostBlocks = 16;               // of a cluster
  static constexpr int kRegisterChunks = 32;           // of each warp's weight: 128 registers
  static constexpr int kQuad = 4;  // each thread finishes so many units of a row
};

}  // namespace torch_bptt::cuda
