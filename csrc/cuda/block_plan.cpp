// How many rows of the batch for a block that runs all steps.
#include "estimates.h"
#include "plan.h"
#include "tiles.h"

namespace torch_bptt::cuda {

namespace {

// Estimates from published figures, to be replaced by measurements on the device itself.
constexpr double kFixedCycles = 600;    // reading, adding up, the activation, a barrier
constexpr double kPlainPerCycle = 100;  // multiply-adds of float32; of float64 half as many

}  // namespace

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

}  // namespace torch_bptt::cuda
