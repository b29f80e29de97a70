// The CPU backend as the rest of the library sees it: four functions for each storage type and
// instruction set.
#pragma once

#include "../core/problem.h"

namespace torch_bptt::cpu {

template <class S>
struct KernelsFor {
  void (*rnn_forward)(const ForwardProblem<S>&, const Parallel&);
  void (*rnn_backward)(const BackwardProblem<S>&, const Parallel&);
  void (*adjoint_scan)(const AdjointProblem<S>&, const Parallel&);
  void (*tangent_scan)(const TangentProblem<S>&, const Parallel&);
};

// One instruction set.
struct Kernels {
  const char* name;
  KernelsFor<float> of_float;
  KernelsFor<double> of_double;
  KernelsFor<bfloat16> of_bfloat16;
  KernelsFor<float16> of_float16;

  template <class S>
  const KernelsFor<S>& of() const;
};
template <>
inline const KernelsFor<float>& Kernels::of() const {
  return of_float;
}
template <>
inline const KernelsFor<double>& Kernels::of() const {
  return of_double;
}
template <>
inline const KernelsFor<bfloat16>& Kernels::of() const {
  return of_bfloat16;
}
template <>
inline const KernelsFor<float16>& Kernels::of() const {
  return of_float16;
}

extern const Kernels kBaseline;
#if defined(__x86_64__)
extern const Kernels kAvx2, kAvx512;
extern const KernelsFor<bfloat16> kAvx512Bf16;
#endif

// The instruction sets this machine can run, slowest first.
struct IsaList {
  const Kernels* sets[4];
  int count;
};
IsaList available();

// The one in use: the best available, or the one that TORCH_BPTT_ISA names.
const Kernels& kernels();
// Uses the named one from now on; false if this machine has none of that name.
bool use(const char* name);

}  // namespace torch_bptt::cpu
