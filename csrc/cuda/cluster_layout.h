// How a cluster of blocks shares a recurrent product, and what lies where in a block's shared
// memory: arithmetic for the plan and for cluster_path.cu.
#pragma once

#include <cstdint>

#include "../core/activations.h"

namespace torch_bptt::cuda {

// Block r of a cluster of C owns `units` of the H units, from r units on, and keeps their rows of
// the weight from the first step to the last. It computes them for `rows` rows of the batch. Its
// warps are cut by units, 16 to a tile, and by parts of the sum. The sum over K runs in chunks of
// 32 bytes, two at a time; a chunk of 16 units is 512 bytes of weight, 16 for each thread of a
// warp.
struct ClusterLayout {
  static constexpr int kTileUnits = 16, kTileRows = 8, kChunkBytes = 32, kWeightBytes = 512;
  static constexpr int kMaxThreads = 256;
  static constexpr int kRegisterChunks = 32;  // of each warp's weights: 128 registers
  static constexpr int kUnrolled = 4;         // chunks between two looks at their number
  static constexpr int kQuads = 2;            // four units of a row that a thread finishes, at most

  int64_t H;
  int size;     // of an element
  int cluster;  // blocks, C
  int rows;     // of the batch, a multiple of 8

  TORCH_BPTT_INLINE static constexpr int64_t up(int64_t value, int64_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
  }

  TORCH_BPTT_INLINE constexpr int units() const {
    return int(up((H + cluster - 1) / cluster, kTileUnits));
  }
  TORCH_BPTT_INLINE constexpr int tiles() const { return units() / kTileUnits; }
  TORCH_BPTT_INLINE constexpr int parts() const {
    const int warps = kMaxThreads / 32 / tiles();
    return warps > 1 ? warps : 1;
  }
  TORCH_BPTT_INLINE constexpr int warps() const { return tiles() * parts(); }
  TORCH_BPTT_INLINE constexpr int threads() const { return warps() * 32; }

  // Chunks of a part of the sum; those beyond kRegisterChunks are read from shared memory.
  TORCH_BPTT_INLINE constexpr int chunks() const {
    const int64_t all = (H * size + kChunkBytes - 1) / kChunkBytes;
    return int(up((all + parts() - 1) / parts(), kUnrolled));
  }
  TORCH_BPTT_INLINE constexpr int shared_chunks() const {
    return chunks() > kRegisterChunks ? chunks() - kRegisterChunks : 0;
  }

  // What enters the product, a row of the batch after the other: room for the chunks of all parts
  // and for the units of all blocks. 16 bytes more than a multiple of 128, so that eight rows lie
  // in different banks.
  TORCH_BPTT_INLINE constexpr int row_bytes() const {
    const int read = parts() * chunks() * kChunkBytes, written = cluster * units() * size;
    return int(up(read > written ? read : written, 128)) + 16;
  }
  TORCH_BPTT_INLINE constexpr int place_bytes() const { return rows * row_bytes(); }

  // Sums of a part, [row][unit]; 4 more than a multiple of 16, for the banks again.
  TORCH_BPTT_INLINE constexpr int sum_stride() const { return units() + 4; }
  TORCH_BPTT_INLINE constexpr int part_sums() const { return rows * sum_stride(); }

  // Shared memory: two mailboxes, two places for what enters, the sums, weights.
  static constexpr int kPlaces = 128;
  TORCH_BPTT_INLINE constexpr int sums_at() const { return kPlaces + 2 * place_bytes(); }
  TORCH_BPTT_INLINE constexpr int weights_at() const {
    return int(up(sums_at() + parts() * part_sums() * 4, 128));
  }
  TORCH_BPTT_INLINE constexpr int64_t shared_bytes() const {
    return weights_at() + int64_t(warps()) * shared_chunks() * kWeightBytes;
  }

  // What a thread finishes: four units of a row at a time.
  TORCH_BPTT_INLINE constexpr int row_quads() const { return units() / 4; }

  TORCH_BPTT_INLINE constexpr bool fits(int64_t available_bytes) const {
    return units() * 2 <= kMaxThreads && rows * row_quads() <= kQuads * threads() &&
           shared_bytes() <= available_bytes;
  }
};

}  // namespace torch_bptt::cuda
