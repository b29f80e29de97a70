// The device that the kernels are told they run on.
//
//   TORCH_BPTT_ON_HOST_CAPABILITY=75|80|90   plan for a T4, an A100 or an H200 (default)
//   TORCH_BPTT_ON_HOST_TF32=1                products of float32 round their factors to tf32
#include <cstdlib>
#include <string_view>

#include "cuda_device.h"

namespace torch_bptt::cuda {

namespace {

std::string_view environment(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}

DeviceFacts make_facts() {
  const std::string_view capability = environment("TORCH_BPTT_ON_HOST_CAPABILITY");
  if (capability == "75") return {75, 40, 65536, 0};
  if (capability == "80") return {80, 108, 166912, 0};
  DeviceFacts facts{90, 132, 232448, 16};
  // So many that the fibers of all blocks of a grid can run at a time.
  for (int i = 0; i < 4; ++i) facts.resident_clusters[i] = 40 >> i;
  return facts;
}

}  // namespace

void* stream_of(c10::Device) { return nullptr; }

const DeviceFacts& facts_of(c10::Device) {
  static const DeviceFacts facts = make_facts();
  return facts;
}

bool tf32_allowed() { return environment("TORCH_BPTT_ON_HOST_TF32") == "1"; }

// The CPU's products never round to tf32.
bool library_rounds_alike(at::ScalarType type, bool tf32) { return type != at::kFloat || !tf32; }

}  // namespace torch_bptt::cuda
