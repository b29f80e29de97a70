// The arithmetic of one step on either side of the matrix product. A cell knows no loop; a loop
// knows no cell. V is a scalar or a vector of C.
#pragma once

#include "activations.h"

namespace torch_bptt {

// Options of a step in the type it is computed in.
template <class C>
struct StepOptions {
  C alpha;  // share of the new value
  C rest;   // 1 - alpha: share of the arriving state
  C clip;   // bound of |d_t|; negative: none
  TORCH_BPTT_INLINE bool leaky() const { return rest != 0; }

  TORCH_BPTT_INLINE StepOptions(double alpha, double clip)
      : alpha(C(alpha)), rest(C(1 - alpha)), clip(C(clip)) {}
};

// h_t = (1 - alpha) p_t + alpha f(z_t)
template <class V, class C>
TORCH_BPTT_INLINE V leak(V p, V y, const StepOptions<C>& options) {
  return options.rest * p + options.alpha * y;
}

// d_t clamped to [-clip, clip]; NaN stays NaN.
template <class V, class C>
TORCH_BPTT_INLINE V clamp(V d, const StepOptions<C>& options) {
  const V high = V{} + options.clip, low = V{} - options.clip;
  d = d > high ? high : d;
  return d < low ? low : d;
}

}  // namespace torch_bptt
