#include "cuda_device.h"

#include <ATen/Context.h>
#include <c10/core/DeviceGuard.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

#include <deque>
#include <mutex>

#include "cuda/paths.h"

namespace torch_bptt::cuda {

namespace {

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, device));
  return value;
}

DeviceFacts ask(int device) {
  DeviceFacts facts;
  facts.capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
                     attribute(cudaDevAttrComputeCapabilityMinor, device);
  facts.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device);
  facts.shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (facts.capability >= 90 && attribute(cudaDevAttrClusterLaunch, device)) {
    const c10::DeviceGuard guard(c10::Device(c10::kCUDA, c10::DeviceIndex(device)));
    facts.largest_cluster = largest_cluster(facts.shared_bytes);
    for (int i = 0, size = 2; i < 4 && size <= facts.largest_cluster; ++i, size *= 2)
      facts.resident_clusters[i] = whole_grid_clusters(size, facts.shared_bytes);
    facts.whole_grid = facts.resident_clusters[0] > 0;
  }
  return facts;
}

}  // namespace

void* stream_of(c10::Device device) {
  return c10::cuda::getCurrentCUDAStream(device.index()).stream();
}

const DeviceFacts& facts_of(c10::Device device) {
  struct Known {
    std::once_flag asked;
    DeviceFacts facts;
  };
  static std::deque<Known> devices(size_t(c10::cuda::device_count()));
  Known& known = devices.at(size_t(device.index()));
  std::call_once(known.asked, [&] { known.facts = ask(device.index()); });
  return known.facts;
}

bool tf32_allowed() {
  return !at::NoTF32Guard::should_disable_tf32() &&
         at::globalContext().allowTF32CuDNN(at::Float32Op::RNN);
}

bool library_rounds_alike(at::ScalarType type, bool tf32) {
  const at::Context& context = at::globalContext();
  if (type == at::kHalf) return !context.allowFP16AccumulationCuBLAS();
  if (type != at::kFloat) return true;
  // Not allowTF32CuBLAS(), which refuses where only the newer of both settings was made.
  const bool allowed = context.float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
                       at::Float32Precision::TF32;
  return tf32 == (allowed && !at::NoTF32Guard::should_disable_tf32());
}

}  // namespace torch_bptt::cuda
