#include "plan.h"

namespace torch_bptt::cuda {

namespace {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Estimates, to be replaced by measurements: what a multiprocessor reads from the level-2 cache,
// in bytes for each nanosecond.
constexpr double kCacheBytesPerNs = 45;

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

// Of one step, by the reads of its tiles, which small batches wait for most.
double estimated_step_ns(const DeviceFacts& device, const Task& task, const StepTile& tile) {
  const int64_t blocks = ceil_div(task.H, tile.units) * ceil_div(task.B, tile.rows);
  const int64_t waves = ceil_div(blocks, device.multiprocessors);
  return double(waves) * double(tile.units + tile.rows) * double(task.H) *
         size_of(task.dtype) / kCacheBytesPerNs;
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
  plan->units = tensor ? Units::tensor : Units::plain;
  plan->tile = best;
  plan->rows = tile.rows;
  plan->blocks = ceil_div(task.H, tile.units) * ceil_div(task.B, tile.rows);
  plan->threads = tile.threads;
  plan->shared_bytes = tile.shared_bytes(task.dtype == Dtype::float64 ? 8 : 4);
  return plan->shared_bytes <= device.shared_bytes;
}

bool plan_block(const DeviceFacts&, const Task&, Plan*) { return false; }

bool plan_loop(const DeviceFacts& device, const Task& task, Plan* plan) {
  return plan_block(device, task, plan) || plan_step(device, task, plan);
}

}  // namespace torch_bptt::cuda
