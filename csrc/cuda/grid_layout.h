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
// its slice.
struct GridLayout : Tiles {
  static constexpr int kMostTiles = 3;   // of a warp
  static constexpr int kMostRows = 128;  // of the batch
  static constexpr int kMostStages = 4;  // in which they are read and multiplied
  // Chunks of each of its tiles that a warp has in registers; two go together.
  TORCH_BPTT_INLINE static constexpr int register_chunks(int tiles) {
    return kRegisterChunks / tiles / 2 * 2;
  }
  // Rows that are multiplied together: as many as there are registers for their sums.
  TORCH_BPTT_INLINE static constexpr int rows_together(bool tensor, int tiles) {
    return (tensor && tiles < 3 ? 2 : 1) * kTileRows;
  }
  static constexpr int kPlace = 128;  // where it begins; before, two mailboxes

  int cluster, clusters, rows;
  int units, own_units;
  int tiles, across, parts, threads;
  int stage_rows, stages;           // rows that are multiplied while the next ones come
  int chunks;                       // of a part, for each tile
  int shared_chunks;                // of them, those beyond the registers
  int slice_bytes;                  // of a row, that a block multiplies
  int row_bytes;                    // of the slice in shared memory
  int sum_stride, part_sums, sums;  // sums of a part, [row][unit], in floats; where they begin
  int box_bytes, letters;           // sums of all blocks for the own units; where they begin
  int weights;                      // where those in shared memory begin
  int64_t shared_bytes;
  int state_row_bytes, state_bytes;  // in global memory, of what enters a step
  int64_t flag_bytes;

  // For so many rows of the batch; `size` of an element; at most `most_clusters` run at a time.
  constexpr GridLayout(int64_t H, int rows, int size, int cluster, int64_t most_clusters, int tiles)
      : cluster(cluster), rows(rows), tiles(tiles) {
    // A block finishes whole quads.
    const int multiple = cluster * kQuad > kTileUnits ? cluster * kQuad : kTileUnits;
    units = int(round_up(ceil_div(H, most_clusters), multiple));
    own_units = units / cluster;
    clusters = int(ceil_div(H, units));
    across = int(ceil_div(units / kTileUnits, tiles));
    parts = kMaxThreads / 32 / across;
    if (parts < 1) parts = 1;
    threads = across * parts * 32;
    const int padded_rows = int(round_up(rows, kTileRows));
    stage_rows = int(round_up(ceil_div(rows, kMostStages), 2 * kTileRows));
    stages = int(ceil_div(rows, stage_rows));
    const int64_t of_block = ceil_div(ceil_div(H * size, kChunkBytes), cluster);
    chunks = int(round_up(ceil_div(of_block, parts), 2));
    const int in_registers = register_chunks(tiles);
    shared_chunks = chunks > in_registers ? chunks - in_registers : 0;
    slice_bytes = parts * chunks * kChunkBytes;
    // 16 bytes more than a multiple of 128, so that eight rows lie in different banks.
    row_bytes = int(round_up(slice_bytes, 128)) + 16;
    sum_stride = across * tiles * kTileUnits + 4;  // for the banks again
    part_sums = padded_rows * sum_stride;
    sums = kPlace + padded_rows * row_bytes;
    box_bytes = cluster * rows * own_units * 4;
    letters = int(round_up(sums + int64_t(parts) * part_sums * 4, 16));
    weights = int(round_up(letters + int64_t(2) * box_bytes, 128));
    shared_bytes = weights + int64_t(across) * parts * tiles * shared_chunks * kWeightBytes;
    state_row_bytes = cluster * slice_bytes;
    state_bytes = rows * state_row_bytes;
    flag_bytes = round_up(int64_t(blocks()) * 4, 256);
  }

  TORCH_BPTT_INLINE constexpr int blocks() const { return clusters * cluster; }
  // A thread finishes a quad of every `own_step`th row, and sends one of every `send_step`th.
  TORCH_BPTT_INLINE constexpr int own_step() const { return threads / (own_units / kQuad); }
  TORCH_BPTT_INLINE constexpr int send_step() const { return threads / (units / kQuad); }
  TORCH_BPTT_INLINE constexpr int part_bytes() const { return chunks * kChunkBytes; }
  constexpr int64_t workspace_bytes() const { return flag_bytes + 2 * int64_t(state_bytes); }

  // Whether a block can do it, with so much shared memory. The threads of a part read a row of it
  // together.
  constexpr bool fits(int64_t available_bytes) const {
    return threads <= kMaxThreads && units <= kQuad * threads && part_bytes() <= across * 32 * 16 &&
           shared_bytes <= available_bytes;
  }
};

}  // namespace torch_bptt::cuda
