// How large the clusters of a whole grid, and how the batch and a block's warps are cut.
#include <algorithm>
#include <cmath>

#include "estimates.h"
#include "grid_layout.h"
#include "plan.h"

namespace torch_bptt::cuda {

namespace {

// Of one step, in nanoseconds. Estimates from published figures of an H100, to be replaced by
// measurements on the device itself.
constexpr double kHopNs = 950;  // until a block sees what another wrote, and has begun to read
// Counted in the machine code of the forward pass of a dense loop, as the sum of its stalls: 350
// from the flags to the last copy of 16 rows, 210 from their arrival to the first product, 260
// until the sums of two parts are sent, 250 that they travel, 520 until states are written, 150 to
// the flag. Results and what the next step needs take 650 more, and the hop as long.
constexpr double kFixedCycles = 1740;
// Where a thread finishes one more row nothing hides those, nor the 230 of the options.
constexpr double kPassCycles = 1400;
constexpr double kLatencyCycles = 33;  // until tensor cores can add to a sum again
constexpr double kBeginNs = 8000;      // of the whole loop: the launch, the first meeting

double estimated_step_ns(const Task& task, Arithmetic arithmetic, const GridLayout& layout) {
  const bool tensor = arithmetic == Arithmetic::tensor;
  const double warps = layout.threads / 32.0, on_one = std::ceil(warps / 4),
               octets = double(ceil_div(layout.rows, GridLayout::kTileRows)),
               passes =
                   double(ceil_div(layout.rows, GridLayout::rows_together(tensor, layout.tiles)));
  // Warps read states, and, for the rows that go together, weights that are not in registers; sums
  // are written and read.
  const double shared =
      octets * warps * layout.chunks * GridLayout::kTileRows * GridLayout::kChunkBytes +
      passes * warps * layout.tiles * layout.shared_chunks * GridLayout::kWeightBytes +
      2.0 * layout.parts * layout.part_sums * 4;
  const double product = std::max({octets * layout.tiles * layout.chunks * on_one *
                                       (tensor ? kTensorCycles : kPlainCycles),
                                   tensor ? passes * layout.chunks / 2 * kLatencyCycles : 0,
                                   shared / kSharedBytesPerCycle}) /
                         kClock;
  const double states = double(layout.rows) * layout.slice_bytes / kCacheBytesPerNs,
               letters = double(layout.rows) * layout.own_units * 4 * (layout.cluster - 1) /
                         kExchangeBytesPerNs;
  // While a stage is multiplied the next ones come.
  const double together = std::max(product, states) + std::min(product, states) / layout.stages;
  const double more_rows = double(ceil_div(layout.rows, layout.own_step()) - 1);
  const double begin = kBeginNs + double(task.H) * double(task.H) * size_of(task.dtype) /
                                      layout.blocks() / kWeightBytesPerNs;
  return kHopNs + (kFixedCycles + more_rows * kPassCycles) / kClock + together + letters +
         begin / double(task.T > 0 ? task.T : 1);
}

}  // namespace

bool plan_grid(const DeviceFacts& device, const Task& task, Plan* plan) {
  if (task.dtype == Dtype::float64 || task.H < 1 || task.B < 1 || !device.whole_grid) return false;
  const bool tensor = has_tensor_units(device, task);
  const Arithmetic arithmetic = tensor ? Arithmetic::tensor : Arithmetic::plain;
  // Without tensor cores a thread has registers for the sums of one tile.
  const int most_tiles = tensor ? GridLayout::kMostTiles : 1;
  constexpr int kMostLaunches = 16;
  *plan = {};
  // Rows of the batch do not know each other, so that a large one may go in parts.
  for (int64_t launches = ceil_div(task.B, GridLayout::kMostRows);
       launches <= kMostLaunches && launches <= task.B; ++launches) {
    const int rows = int(ceil_div(task.B, launches));
    for (int cluster = 2; cluster <= device.largest_cluster; cluster *= 2) {
      for (int tiles = 1; tiles <= most_tiles; ++tiles) {
        const GridLayout layout(task.H, rows, size_of(task.dtype), cluster,
                                resident_clusters(device, cluster), tiles);
        if (!layout.fits(device.shared_bytes)) continue;
        const double step_ns = double(launches) * estimated_step_ns(task, arithmetic, layout);
        if (plan->blocks && step_ns >= plan->step_ns) continue;
        plan->path = Path::grid;
        plan->arithmetic = arithmetic;
        plan->tile = tiles;
        plan->rows = rows;
        plan->cluster = cluster;
        plan->blocks = layout.blocks();
        plan->threads = layout.threads;
        plan->shared_bytes = layout.shared_bytes;
        plan->workspace_bytes = layout.workspace_bytes();
        plan->step_ns = step_ns;
      }
    }
  }
  return plan->blocks > 0;
}

}  // namespace torch_bptt::cuda
