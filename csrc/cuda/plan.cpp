#include "plan.h"

#include <initializer_list>

namespace torch_bptt::cuda {

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

int64_t resident_clusters(const DeviceFacts& device, int cluster) {
  // Estimated: they do not cross the parts of the chip, so some places stay empty.
  int64_t clusters = device.multiprocessors * 95 / (100 * cluster);
  if (device.resident_clusters[0])
    for (int i = 0, size = 2; i < 4; ++i, size *= 2)
      if (size == cluster) clusters = device.resident_clusters[i];
  return clusters > 0 ? clusters : 1;
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
