// Chooses the instruction set at run time.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace torch_bptt::cpu {

#if defined(__x86_64__)
namespace {

// AVX-512 with other kernels for bfloat16.
const Kernels& avx512_bf16() {
  static const Kernels kernels = [] {
    Kernels changed = kAvx512;
    changed.name = "avx512_bf16";
    changed.of_bfloat16 = kAvx512Bf16;
    return changed;
  }();
  return kernels;
}

}  // namespace
#endif

IsaList available() {
  IsaList list{{&kBaseline}, 1};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    list.sets[list.count++] = &kAvx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      list.sets[list.count++] = &kAvx512;
      if (__builtin_cpu_supports("avx512bf16")) list.sets[list.count++] = &avx512_bf16();
    }
  }
#endif
  return list;
}

namespace {

const Kernels* find(const char* name) {
  const IsaList list = available();
  for (int i = 0; i < list.count; ++i)
    if (std::strcmp(list.sets[i]->name, name) == 0) return list.sets[i];
  return nullptr;
}

const Kernels* initial() {
  const IsaList list = available();
  const char* wanted = std::getenv("TORCH_BPTT_ISA");
  if (!wanted || !*wanted) return list.sets[list.count - 1];
  if (const Kernels* found = find(wanted)) return found;
  std::string names;
  for (int i = 0; i < list.count; ++i) names += std::string(i ? ", " : "") + list.sets[i]->name;
  throw std::invalid_argument(
      "TORCH_BPTT_ISA must be an instruction set of this machine, expected one of " + names +
      ", got " + wanted);
}

const Kernels*& chosen() {
  static const Kernels* kernels = initial();
  return kernels;
}

}  // namespace

const Kernels& kernels() { return *chosen(); }

bool use(const char* name) {
  const Kernels* found = find(name);
  if (found) chosen() = found;
  return found;
}

}  // namespace torch_bptt::cpu
