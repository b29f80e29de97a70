#include "plan.h"

#include <algorithm>
#include <initializer_list>

#include "estimates.h"
#include "tiles.h"

namespace torch_bptt::cuda {

namespace {

// Estimates from published figures, to be replaced by measurements on the device itself.
constexpr double kFixedCycles = 600;    // path block: reading, adding up, the activation, a barrier
constexpr double kPlainPerCycle = 100;  // multiply-adds of float32; of float64 half as many
constexpr double kPlainTilePerCycle = 60;  // the same of path step; before 9.0 half as many

}  // namespace

bool has_tensor_units(const DeviceFacts& device, const Task& task) {
  switch (task.dtype) {
    case Dtype::float16:
      return device.capability >= 75;
    case Dtype::bfloat16:
      return device.capability >= 80;
    case Dtype::float32:
      return device.capability >= 80 && task.tf32;
    case Dtype::float64:
      return false;
  }
  return false;
}

namespace {

// Of one step, by the reads of its tiles, which small batches wait for most, or by its sums.
double estimated_step_ns(const DeviceFacts& device, const Task& task, const StepTile& tile) {
  const int64_t blocks = ceil_div(task.H, tile.units) * ceil_div(task.B, tile.rows);
  const int64_t waves = ceil_div(blocks, device.multiprocessors);
  const double reads =
      double(tile.units + tile.rows) * double(task.H) * size_of(task.dtype) / kCacheBytesPerNs;
  if (has_tensor_units(device, task)) return kLaunchNs + double(waves) * reads;
  const double per_ns = kPlainTilePerCycle * kClock / (device.capability < 90 ? 2 : 1) /
                        (task.dtype == Dtype::float64 ? 2 : 1);
  const double sums = double(tile.units * tile.rows) * double(task.H) / per_ns;
  return kLaunchNs + double(waves) * std::max(reads, sums);
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

bool plan_block(const DeviceFacts& device, const Task& task, Plan* plan) {
  // A row for each multiprocessor gains nothing from tensor cores, and needs no rounding to tf32.
  const bool tensor = has_tensor_units(device, task) &&
                      (task.dtype != Dtype::float32 || task.B > device.multiprocessors);
  if (!tensor && size_of(task.dtype) == 2) return false;
  const int64_t width = task.H <= 64 ? 64 : task.H <= 128 ? 128 : 256;
  if (task.H > (size_of(task.dtype) == 2 ? 256 : 128)) return false;
  // The weight is read once for all steps; with one there is nothing to gain.
  if (task.T < 2) return false;
  *plan = {};
  plan->path = Path::block;
  plan->arithmetic = tensor ? Arithmetic::tensor : Arithmetic::plain;
  const int few = tensor ? 8 : 1, many = tensor ? 16 : 4;
  // A wide weight leaves a thread registers for few rows.
  const bool wide = width * size_of(task.dtype) > 512 || width > 128;
  plan->rows = !wide && task.B > few * int64_t(device.multiprocessors) ? many : few;
  plan->blocks = ceil_div(task.B, plan->rows);
  plan->threads = int(tensor ? width * 2 / (width > 128 ? 2 : 1) : width * 2);
  plan->shared_bytes = 2 * plan->rows * (width * size_of(task.dtype) + 16);
  const double work =
      tensor ? double(width) / 16 * double(width * size_of(task.dtype)) / 32 * (plan->rows / 8) /
                   4 * kTensorCycles
             : double(width * width) * plan->rows /
                   (task.dtype == Dtype::float64 ? kPlainPerCycle / 2 : kPlainPerCycle);
  const double begin = kLaunchNs + double(task.H * task.H * size_of(task.dtype)) / kCacheBytesPerNs;
  plan->step_ns =
      double(ceil_div(plan->blocks, device.multiprocessors)) * (kFixedCycles + work) / kClock +
      begin / double(task.T);
  return plan->shared_bytes <= device.shared_bytes;
}

bool plan_loop(const DeviceFacts& device, const Task& task, Plan* plan, const Path* wish) {
  bool found = false;
  for (const auto path : {plan_block, plan_cluster, plan_grid, plan_step, plan_gemm}) {
    Plan candidate;
    if (!path(device, task, &candidate)) continue;
    if (wish && candidate.path == *wish) {
      *plan = candidate;
      return true;
    }
    if (found && plan->step_ns <= candidate.step_ns) continue;
    *plan = candidate;
    found = true;
  }
  return found;
}

}  // namespace torch_bptt::cuda
