// What only the driver knows: how large a cluster this device, or the part of it that is ours,
// runs.
#include "device.h"
#include "paths.h"

namespace torch_bptt::cuda {

namespace {

// As many threads as a block of the cluster path has, and with all shared memory as few neighbours.
__global__ void __launch_bounds__(256, 1) probe_kernel() {}

}  // namespace

int largest_cluster(int64_t shared_bytes) {
  for (int blocks = 16; blocks > 1; blocks /= 2) {
    Launch how;
    how.grid.x = how.cluster = unsigned(blocks);
    how.threads = 256;
    how.shared_bytes = size_t(shared_bytes);
    int clusters = 0;
    // An error, too, says that there is no such cluster.
    if (!active_clusters(probe_kernel, how, &clusters) && clusters > 0) return blocks;
  }
  return 0;
}

}  // namespace torch_bptt::cuda
