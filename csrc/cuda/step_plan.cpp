// Which tile of the product of a step.
#include <algorithm>

#include "estimates.h"
#include "plan.h"
#include "tiles.h"

namespace torch_bptt::cuda {

namespace {

// An estimate from published figures, to be replaced by a measurement on the device itself.
// Multiply-adds of float32; of float64, and before 9.0, half as many.
constexpr double kPlainTilePerCycle = 60;

// Of one step, by the reads of its tiles, which small batches wait for most, or by its sums; or by
// the host, which starts a kernel for each.
double estimated_step_ns(const DeviceFacts& device, const Task& task, const StepTile& tile) {
  const int64_t blocks = ceil_div(task.H, tile.units) * ceil_div(task.B, tile.rows);
  const int64_t waves = ceil_div(blocks, device.multiprocessors);
  const double reads =
      double(tile.units + tile.rows) * double(task.H) * size_of(task.dtype) / kCacheBytesPerNs;
  if (has_tensor_units(device, task))
    return std::max(kHostLaunchNs, kLaunchNs + double(waves) * reads);
  const double per_ns = kPlainTilePerCycle * kClock / (device.capability < 90 ? 2 : 1) /
                        (task.dtype == Dtype::float64 ? 2 : 1);
  const double sums = double(tile.units * tile.rows) * double(task.H) / per_ns;
  return std::max(kHostLaunchNs, kLaunchNs + double(waves) * std::max(reads, sums));
}

}  // namespace

bool plan_step(const DeviceFacts& device, const Task& task, Plan* plan) {
  const bool tensor = has_tensor_units(device, task);
  const int first = tensor ? kTensorSmall : kPlainSmall, last = tensor ? kTensorLarge : kPlainLarge;
  int best = first;
  for (int tile = first + 1; tile <= last; ++tile)
    if (estimated_step_ns(device, task, kStepTiles[tile]) <
        estimated_step_ns(device, task, kStepTiles[best]))
      best = tile;
  const StepTile& tile = kStepTiles[best];
  *plan = {};
  plan->path = Path::step;
  plan->arithmetic = tensor ? Arithmetic::tensor : Arithmetic::plain;
  plan->tile = best;
  plan->rows = tile.rows;
  plan->blocks = ceil_div(task.H, tile.units) * ceil_div(task.B, tile.rows);
  plan->threads = tile.threads;
  plan->shared_bytes = tile.shared_bytes(task.dtype == Dtype::float64 ? 8 : 4);
  plan->step_ns = estimated_step_ns(device, task, tile);
  return plan->shared_bytes <= device.shared_bytes;
}

}  // namespace torch_bptt::cuda
