// How a cluster of blocks shares a recurrent product, and what lies where in a block's shared
// memory: arithmetic for the plan and for cluster_path.cu.
#pragma once

#include <cstdint>

#include "tiles.h"

namespace torch_bptt::cuda {

// Block r of a cluster owns the units [r units, (r + 1) units) of H, and keeps their rows of the
// weight from the first step to the last. It computes them for `rows` rows of the batch. Its warps
// are cut by units, 16 to a tile, and by parts of the sum, so that each has a tile and a part.
struct ClusterLayout : Tiles {
  static constexpr int kUnrolled = 4;  // chunks between two looks at their number
  static constexpr int kPlaces = 128;  // where they begin; before them, two mailboxes

  int cluster, rows;
  int units, tiles, parts, threads;
  int chunks;         // of a part of the sum
  int shared_chunks;  // of them, those beyond kRegisterChunks, which are read from shared memory
  int row_bytes, place_bytes;  // of what enters the product, a row of the batch after the other
  int sum_stride, part_sums, sums;  // sums of a part, [row][unit], in floats; where they begin
  int weights;                      // where those in shared memory begin
  int64_t shared_bytes;

  // `size` of an element. Rows are multiplied eight at a time, whether or not there are so many;
  // what travels is what there is.
  constexpr ClusterLayout(int64_t H, int size, int cluster, int rows)
      : cluster(cluster), rows(rows) {
    units = int(round_up(ceil_div(H, cluster), kTileUnits));
    tiles = units / kTileUnits;
    parts = kMaxThreads / 32 / tiles;
    if (parts < 1) parts = 1;
    threads = tiles * parts * 32;
    chunks = int(round_up(ceil_div(ceil_div(H * size, kChunkBytes), parts), kUnrolled));
    shared_chunks = chunks > kRegisterChunks ? chunks - kRegisterChunks : 0;
    // Room for the chunks of all parts and for the units of all blocks. 16 bytes more than a
    // multiple of 128, so that eight rows lie in different banks.
    const int read = parts * chunks * kChunkBytes, written = cluster * units * size;
    row_bytes = int(round_up(read > written ? read : written, 128)) + 16;
    const int multiplied = int(round_up(rows, kTileRows));
    place_bytes = multiplied * row_bytes;
    sum_stride = units + 4;  // for the banks again
    part_sums = multiplied * sum_stride;
    sums = kPlaces + 2 * place_bytes;
    weights = int(round_up(sums + parts * part_sums * 4, 128));
    shared_bytes = weights + int64_t(tiles) * parts * shared_chunks * kWeightBytes;
  }

  // Whether a block can do it, with so much shared memory.
  constexpr bool fits(int64_t available_bytes) const {
    return threads <= kMaxThreads && rows * units <= kQuad * threads &&
           shared_bytes <= available_bytes;
  }
};

}  // namespace torch_bptt::cuda
