// Which path a loop takes on which device, and with what tiles: arithmetic on the host, without a
// device. What decides are estimated times, not measured ones: their constants are in estimates.h
// and at the head of each plan.
#pragma once

#include <cstdint>

#include "loops.h"

namespace torch_bptt::cuda {

// What the plan asks of a device.
struct DeviceFacts {
  int capability = 0;  // 90 for compute capability 9.0
  int multiprocessors = 0;
  int64_t shared_bytes = 0;  // of one block at most
  int largest_cluster = 0;   // blocks of a cluster at most; 0: no clusters
  bool whole_grid = true;    // clusters of a grid may wait for each other, if they all fit
  // Clusters of 2, 4, 8 and 16 blocks that run at a time if they have the device to themselves,
  // each block with all shared memory. 0: not known.
  int resident_clusters[4]{};
};

constexpr const char* kDtypeNames[] = {"float32", "float64", "bfloat16", "float16"};
enum class Dtype : int { float32, float64, bfloat16, float16 };
template <class S>
constexpr Dtype kDtype{};
template <>
inline constexpr Dtype kDtype<float> = Dtype::float32;
template <>
inline constexpr Dtype kDtype<double> = Dtype::float64;
template <>
inline constexpr Dtype kDtype<bfloat16> = Dtype::bfloat16;
template <>
inline constexpr Dtype kDtype<float16> = Dtype::float16;

constexpr int size_of(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
}

// How products are computed. All add in float32, float64 in itself.
enum class Arithmetic : int {
  plain,   // multiply-add of single numbers
  tensor,  // tensor cores: bfloat16, float16, and float32 rounded to tf32
};

constexpr const char* kPathNames[] = {"step", "block", "cluster", "grid", "gemm"};
enum class Path : int {
  step,     // a kernel for each step
  block,    // a block of threads for each few rows of the batch, which runs all steps
  cluster,  // a cluster of blocks for each few rows
  grid,     // all blocks of the device together
  gemm,     // a library's product for each step, and a kernel that finishes it
};

// What is asked: a loop, without its pointers.
struct Task {
  Pass pass{};
  Dtype dtype{};
  int64_t T = 0, B = 0, H = 0;
  bool tf32 = false;    // products of float32 may round their factors to tf32
  bool library = true;  // a library's product of two matrices rounds as a loop's does
};

// The tile of the product that a block of path `step` computes.
struct StepTile {
  int units;        // columns of the result
  int rows;         // rows of the batch
  int groups;       // parts in which the sum is cut, each with warps of its own
  int group_bytes;  // of a row that a group reads at a time
  int stages;       // such reads under way
  int threads;

  TORCH_BPTT_INLINE constexpr int block_bytes() const { return groups * group_bytes; }
  // 16 bytes more than a multiple of 128: eight rows in a column lie in different banks.
  TORCH_BPTT_INLINE constexpr int row_bytes() const { return block_bytes() + 16; }
  TORCH_BPTT_INLINE constexpr int stage_bytes() const { return (units + rows) * row_bytes(); }
  // The sums of the groups, in the place of the stages.
  TORCH_BPTT_INLINE constexpr int sum_stride() const { return units + 4; }
  TORCH_BPTT_INLINE constexpr int sums_bytes(int size) const {
    return groups * rows * sum_stride() * size;
  }
  TORCH_BPTT_INLINE constexpr int tile_bytes(int size) const {
    const int reads = stages * stage_bytes(), sums = sums_bytes(size);
    return reads > sums ? reads : sums;
  }
  // And the pointers of rows and masks.
  TORCH_BPTT_INLINE constexpr int shared_bytes(int size) const {
    return tile_bytes(size) + rows * 16;
  }
};

enum StepTileIndex : int { kTensorSmall, kTensorMedium, kTensorLarge, kPlainSmall, kPlainLarge };
constexpr StepTile kStepTiles[] = {{16, 16, 8, 64, 3, 256},
                                   {32, 32, 2, 128, 3, 256},
                                   {64, 64, 1, 128, 3, 256},
                                   {16, 16, 8, 64, 2, 128},
                                   {64, 64, 1, 128, 2, 256}};

// What a block of path `gemm` finishes: rows by columns, a thread 16 bytes of one row. Its elements
// follow each other, or lie `across` apart.
struct FinishTile {
  static constexpr int kThreads = 256, kBytes = 16;

  constexpr FinishTile(int64_t H, int size) : elements(kBytes / size) {
    while (across < kThreads && across * elements < H) across *= 2;
  }
  TORCH_BPTT_INLINE constexpr int rows() const { return kThreads / across; }
  TORCH_BPTT_INLINE constexpr int columns() const { return across * elements; }

  int elements;    // of a thread
  int across = 1;  // threads for a row
};

struct Plan {
  Path path{};
  Arithmetic arithmetic{};
  int tile = 0;        // step: which of kStepTiles; grid: tiles of a warp
  int rows = 0;        // of the batch that go together
  int cluster = 1;     // blocks of a cluster
  int64_t blocks = 0;  // of a launch
  int threads = 0;     // of a block
  int64_t shared_bytes = 0;
  int64_t workspace_bytes = 0;  // grid: global memory that blocks tell each other their states in
  double step_ns = 0;           // estimated time of a step
};

// The path that is estimated fastest; `wish`, if not null, where that one can do it. False where
// none can.
bool plan_loop(const DeviceFacts& device, const Task& task, Plan* plan, const Path* wish = nullptr);
// One path; false where it cannot do it.
bool plan_step(const DeviceFacts& device, const Task& task, Plan* plan);
bool plan_block(const DeviceFacts& device, const Task& task, Plan* plan);
bool plan_cluster(const DeviceFacts& device, const Task& task, Plan* plan);
bool plan_grid(const DeviceFacts& device, const Task& task, Plan* plan);
bool plan_gemm(const DeviceFacts& device, const Task& task, Plan* plan);

// Whether the device has tensor cores for what is asked.
bool has_tensor_units(const DeviceFacts& device, const Task& task);
// Clusters of so many blocks that run at a time.
int64_t resident_clusters(const DeviceFacts& device, int cluster);

}  // namespace torch_bptt::cuda
