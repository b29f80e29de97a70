// What a step takes whose product is a library's.
#include <algorithm>

#include "estimates.h"
#include "plan.h"
#include "tiles.h"

namespace torch_bptt::cuda {

namespace {

// Estimates from published figures of an H100 and H200, to be replaced by measurements on the
// device itself.
constexpr double kFillNs = 2000;  // until the tiles of a product are all at work
// Operations of products: of 16 bits, of float32 in tf32, and of the others, on 132
// multiprocessors.
constexpr double kNarrowPerNs = 500e3, kTf32PerNs = 250e3, kPlainPerNs = 45e3;
// Of a multiprocessor: half of what it can read, in products of few rows and in what finishes them.
constexpr double kReadBytesPerNs = 22;
constexpr int kTile = 64;  // rows and units of a library's smaller tiles

double operations_per_ns(const DeviceFacts& device, const Task& task, bool tensor) {
  const double on_h200 = size_of(task.dtype) == 2 ? kNarrowPerNs
                         : tensor                 ? kTf32PerNs
                                                  : kPlainPerNs;
  return on_h200 * device.multiprocessors / 132 / (device.capability < 90 ? 2 : 1);
}

double estimated_step_ns(const DeviceFacts& device, const Task& task, bool tensor) {
  const double elements = double(task.B) * double(task.H), weight = double(task.H * task.H);
  const double bytes_per_ns = kReadBytesPerNs * device.multiprocessors;
  const double product =
      std::max(2 * elements * double(task.H) / operations_per_ns(device, task, tensor),
               (weight + elements) * size_of(task.dtype) / bytes_per_ns);
  // The product and the drive are read, the state is written.
  const int computed = task.dtype == Dtype::float64 ? 8 : 4;
  const double finish = elements * (2 * computed + size_of(task.dtype)) / bytes_per_ns;
  // Where tiles are few a library cuts the sums, and one more kernel adds them up.
  const int64_t tiles = ceil_div(task.H, kTile) * ceil_div(task.B, kTile);
  const int kernels = 2 * tiles < device.multiprocessors ? 3 : 2;
  return std::max(kHostProductNs + kHostLaunchNs, kernels * kLaunchNs + kFillNs + product + finish);
}

}  // namespace

bool plan_gemm(const DeviceFacts& device, const Task& task, Plan* plan) {
  const bool tensor = has_tensor_units(device, task);
  if (!task.library || (!tensor && size_of(task.dtype) == 2)) return false;
  const FinishTile tile(task.H, size_of(task.dtype));
  *plan = {};
  plan->path = Path::gemm;
  plan->arithmetic = tensor ? Arithmetic::tensor : Arithmetic::plain;
  plan->rows = tile.rows();
  plan->blocks = ceil_div(task.B, tile.rows()) * ceil_div(task.H, tile.columns());
  plan->threads = tile.kThreads;
  plan->step_ns = estimated_step_ns(device, task, tensor);
  return true;
}

}  // namespace torch_bptt::cuda
