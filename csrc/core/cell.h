// What cells on CPUs and GPUs have in common. V is a scalar or a vector of C.
#pragma once

#include "activations.h"

namespace torch_bptt {

// h_t = (1 - alpha) p_t + alpha f(z_t)
template <class V>
TORCH_BPTT_INLINE V leak(V alpha, V p, V y) {
  return (1 - alpha) * p + alpha * y;
}

// gate v, where a gate that stops lets nothing through.
template <bool STOPS, class V>
TORCH_BPTT_INLINE V passed(V gate, V v) {
  if constexpr (STOPS) return gate == 0 ? V{} : gate * v;
  return gate * v;
}

// d_t clamped to [-clip, clip]; NaN stays NaN.
template <class V, class C>
TORCH_BPTT_INLINE V clamp(V d, C clip) {
  const V high = V{} + clip, low = V{} - clip;
  d = d > high ? high : d;
  return d < low ? low : d;
}

}  // namespace torch_bptt
