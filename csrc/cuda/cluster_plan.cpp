// How large a cluster, and how many rows of the batch for each.
#include "cluster_layout.h"
#include "estimates.h"
#include "plan.h"

namespace torch_bptt::cuda {

namespace {

// Of one step, in nanoseconds. Estimates from published figures of an H100, to be replaced by
// measurements on the device itself.
constexpr double kFixedCycles = 900;  // reading, adding parts up, the activation, one exchange
constexpr double kBeginNs = 5000;     // of the whole loop: the launch, the cluster's first meeting

double estimated_step_ns(const DeviceFacts& device, const Task& task, Arithmetic arithmetic,
                         const ClusterLayout& layout) {
  const double groups = double(ceil_div(layout.rows, ClusterLayout::kTileRows)),
               warps = layout.threads / 32.0;
  const double product = groups * layout.chunks * warps / 4 *
                         (arithmetic == Arithmetic::tensor ? kTensorCycles : kPlainCycles);
  const double weights =
      groups * layout.shared_chunks * warps * ClusterLayout::kWeightBytes / kSharedBytesPerCycle;
  const double letters = double(layout.rows) * double(task.H) * size_of(task.dtype) *
                         (layout.cluster - 1) / layout.cluster / kExchangeBytesPerNs;
  const int64_t clusters = ceil_div(task.B, layout.rows),
                resident = resident_clusters(device, layout.cluster),
                waves = ceil_div(clusters, resident);
  const double begin = kBeginNs + double(waves) * layout.units * double(task.H) *
                                      size_of(task.dtype) / kWeightBytesPerNs;
  return double(waves) * ((kFixedCycles + product + weights) / kClock + letters) +
         begin / double(task.T > 0 ? task.T : 1);
}

}  // namespace

bool plan_cluster(const DeviceFacts& device, const Task& task, Plan* plan) {
  if (task.dtype == Dtype::float64 || task.H < 1 || task.B < 1) return false;
  const bool tensor = has_tensor_units(device, task);
  const Arithmetic arithmetic = tensor ? Arithmetic::tensor : Arithmetic::plain;
  *plan = {};
  for (int cluster = 2; cluster <= device.largest_cluster; cluster *= 2) {
    // Few rows each, so that little travels in each cluster; no more than all clusters at a time.
    for (int rows = 1; rows <= 64 && rows < task.B + 8; rows += rows < 8 ? 1 : 8) {
      const ClusterLayout layout(task.H, size_of(task.dtype), cluster, rows);
      if (!layout.fits(device.shared_bytes)) continue;
      const double step_ns = estimated_step_ns(device, task, arithmetic, layout);
      if (plan->blocks && step_ns >= plan->step_ns) continue;
      plan->path = Path::cluster;
      plan->arithmetic = arithmetic;
      plan->rows = rows;
      plan->cluster = cluster;
      plan->blocks = ceil_div(task.B, rows) * cluster;
      plan->threads = layout.threads;
      plan->shared_bytes = layout.shared_bytes;
      plan->step_ns = step_ns;
    }
  }
  return plan->blocks > 0;
}

}  // namespace torch_bptt::cuda
