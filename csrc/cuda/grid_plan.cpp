// How large the clusters of a whole grid, and how the batch and a block's warps are cut.
#include <algorithm>

#include "estimates.h"
#include "grid_layout.h"
#include "plan.h"

namespace torch_bptt::cuda {

namespace {

// Of one step, in nanoseconds. Estimates from published figures of an H100, to be replaced by
// measurements on the device itself.
constexpr double kHopNs = 950;  // until a block sees what another wrote, and has begun to read
// Counted in the machine code of the forward pass, as the sum of its stalls: a group takes about
// 2100 cycles until its sums are sent, of which reading is 750, and 2100 until its states are told.
// Of those 4200 about 1000 are waits in which another group's instructions can run, and 700 are the
// product. Groups are finished one after the other.
constexpr double kGroupCycles = 2500;
constexpr double kFixedCycles = 300;  // of the letters and the first barrier: in all 2.6 us a step
constexpr double kBeginNs = 8000;     // of the whole loop: the launch, the first meeting

double estimated_step_ns(const Task& task, Arithmetic arithmetic, const GridLayout& layout) {
  const double warps = layout.threads / 32.0,
               octets = double(layout.groups) * layout.rows / GridLayout::kTileRows;
  const double product = octets * layout.tiles * layout.chunks * warps / 4 *
                         (arithmetic == Arithmetic::tensor ? kTensorCycles : kPlainCycles);
  // Warps read states, and, for two octets at a time, weights that are not in registers; sums are
  // written and read.
  const double passes =
      arithmetic == Arithmetic::tensor && layout.rows > GridLayout::kTileRows ? octets / 2 : octets;
  const double shared =
      octets * warps * layout.chunks * GridLayout::kTileRows * GridLayout::kChunkBytes +
      passes * warps * layout.tiles * layout.shared_chunks * GridLayout::kWeightBytes +
      2.0 * layout.groups * layout.parts * layout.part_sums * 4;
  const double states = double(task.B) * layout.slice_bytes / kCacheBytesPerNs,
               letters = double(task.B) * layout.own_units * 4 * (layout.cluster - 1) /
                         kExchangeBytesPerNs;
  const double work = std::max(product, shared / kSharedBytesPerCycle) / kClock +
                      layout.groups * kGroupCycles / kClock,
               travel = states + letters, latency = kHopNs + kFixedCycles / kClock;
  // With several groups one is on its way while another is computed.
  const double g = layout.groups, step = g > 1 ? std::max(work, travel) +
                                                     std::max(0.0, latency - work * (g - 1) / g) +
                                                     (work < travel ? work : travel) / g
                                               : work + travel + latency;
  const double begin = kBeginNs + double(task.H) * double(task.H) * size_of(task.dtype) /
                                      layout.blocks() / kWeightBytesPerNs;
  return step + begin / double(task.T > 0 ? task.T : 1);
}

}  // namespace

bool plan_grid(const DeviceFacts& device, const Task& task, Plan* plan) {
  if (task.dtype == Dtype::float64 || task.H < 1 || task.B < 1 || !device.whole_grid) return false;
  const bool tensor = has_tensor_units(device, task);
  const Arithmetic arithmetic = tensor ? Arithmetic::tensor : Arithmetic::plain;
  // Without tensor cores a thread has registers for the sums of one tile.
  const int most_tiles = tensor ? GridLayout::kMostTiles : 1;
  constexpr int kMostRows = 64, kMostLaunches = 16;
  *plan = {};
  // Rows of the batch do not know each other, so that a large one may go in parts.
  for (int launches = 1; launches <= kMostLaunches && launches <= task.B; launches *= 2) {
    Task part = task;
    part.B = ceil_div(task.B, launches);
    for (int cluster = 2; cluster <= device.largest_cluster; cluster *= 2) {
      for (int rows = 8; rows <= kMostRows && rows < part.B + 8; rows += 8) {
        for (int tiles = 1; tiles <= most_tiles; ++tiles) {
          const GridLayout layout(task.H, part.B, size_of(task.dtype), cluster,
                                  resident_clusters(device, cluster), rows, tiles);
          if (!layout.fits(device.shared_bytes)) continue;
          const double step_ns = launches * estimated_step_ns(part, arithmetic, layout);
          if (plan->blocks && step_ns >= plan->step_ns) continue;
          plan->path = Path::grid;
          plan->arithmetic = arithmetic;
          plan->tile = tiles;
          plan->rows = rows;
          plan->batch = part.B;
          plan->cluster = cluster;
          plan->blocks = layout.blocks();
          plan->threads = layout.threads;
          plan->shared_bytes = layout.shared_bytes;
          plan->workspace_bytes = layout.workspace_bytes();
          plan->step_ns = step_ns;
        }
      }
    }
  }
  return plan->blocks > 0;
}

}  // namespace torch_bptt::cuda
