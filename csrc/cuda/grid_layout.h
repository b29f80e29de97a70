// How the clusters of a whole grid share a recurrent product, and what lies where in a block's
// shared memory and in the memory through which blocks tell each other their states: arithmetic for
// the plan and for grid_path.cu.
#pragma once

#include <cstdint>

#include "../core/inline.h"
#include "tiles.h"

namespace torch_bptt::cuda {

// Cluster q has the units [q units, (q + 1) units). Block r of a cluster keeps of their rows of the
// weight the bytes [r slice_bytes, (r + 1) slice_bytes): the sum is cut over the blocks of a
// cluster. Each block adds up and finishes `own_units` of its cluster's units; in the order of the
// blocks of the grid, so that block i finishes the units [i own_units, (i + 1) own_units).
//
// The warps of a block are cut by units, `across` of them with `tiles` tiles each, and by parts of
// its slice. The batch goes in groups of rows, one group after the other.
struct GridLayout : Tiles {
  static constexpr int kMaxGroups = 15;  // each has a barrier
  static constexpr int kMostTiles = 3;   // of a warp
  // Chunks of each of its tiles that a warp has in registers; two go together.
  TORCH_BPTT_INLINE static constexpr int register_chunks(int tiles) {
    return kRegisterChunks / tiles / 2 * 2;
  }
  static constexpr int kPlaces = 256;  // where they begin; before, two mailboxes for each group

  int cluster, clusters, rows, groups, batch;
  int units, own_units;
  int tiles, across, parts, threads;
  int chunks;                       // of a part, for each tile
  int shared_chunks;                // of them, those beyond the registers
  int slice_bytes;                  // of a row, that a block multiplies
  int places;                       // for the slices of two groups, where there are two
  int row_bytes, place_bytes;       // of what enters the product, a row of the batch after another
  int sum_stride, part_sums, sums;  // sums of a part, [row][unit], in floats; where they begin
  int box_bytes, letters;           // sums of all blocks for a group's own units; where they begin
  int weights;                      // where those in shared memory begin
  int64_t shared_bytes;
  int64_t state_row_bytes, state_bytes, flag_bytes;  // in global memory

  // For B rows of the batch; `size` of an element; at most `most_clusters` run at a time; `rows` is
  // a multiple of 8.
  constexpr GridLayout(int64_t H, int64_t B, int size, int cluster, int64_t most_clusters, int rows,
                       int tiles)
      : cluster(cluster), rows(rows), batch(int(B)), tiles(tiles) {
    // A block finishes whole quads.
    const int multiple = cluster * kQuad > kTileUnits ? cluster * kQuad : kTileUnits;
    units = int(round_up(ceil_div(H, most_clusters), multiple));
    own_units = units / cluster;
    clusters = int(ceil_div(H, units));
    groups = int(ceil_div(B, rows));
    places = groups > 1 ? 2 : 1;
    across = int(ceil_div(units / kTileUnits, tiles));
    parts = kMaxThreads / 32 / across;
    if (parts < 1) parts = 1;
    threads = across * parts * 32;
    const int64_t of_block = ceil_div(ceil_div(H * size, kChunkBytes), cluster);
    chunks = int(round_up(ceil_div(of_block, parts), 2));
    const int in_registers = register_chunks(tiles);
    shared_chunks = chunks > in_registers ? chunks - in_registers : 0;
    slice_bytes = parts * chunks * kChunkBytes;
    // 16 bytes more than a multiple of 128, so that eight rows lie in different banks.
    row_bytes = int(round_up(slice_bytes, 128)) + 16;
    place_bytes = rows * row_bytes;
    sum_stride = across * tiles * kTileUnits + 4;  // for the banks again
    part_sums = rows * sum_stride;
    sums = kPlaces + places * place_bytes;
    box_bytes = cluster * rows * own_units * 4;
    letters = int(round_up(sums + int64_t(parts) * part_sums * 4, 16));
    weights = int(round_up(letters + int64_t(2) * groups * box_bytes, 128));
    shared_bytes = weights + int64_t(across) * parts * tiles * shared_chunks * kWeightBytes;
    state_row_bytes = int64_t(cluster) * slice_bytes;
    state_bytes = B * state_row_bytes;
    flag_bytes = round_up(int64_t(groups) * blocks() * 4, 256);
  }

  TORCH_BPTT_INLINE constexpr int blocks() const { return clusters * cluster; }
  constexpr int64_t workspace_bytes() const { return flag_bytes + 2 * state_bytes; }
  TORCH_BPTT_INLINE constexpr int rows_of(int group) const {
    return batch - group * rows < rows ? batch - group * rows : rows;
  }

  // Whether a block can do it, with so much shared memory.
  constexpr bool fits(int64_t available_bytes) const {
    return threads <= kMaxThreads && groups <= kMaxGroups && units <= kQuad * threads &&
           rows * own_units <= kQuad * threads && shared_bytes <= available_bytes;
  }
};

}  // namespace torch_bptt::cuda
