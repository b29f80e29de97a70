// The activations, one entry each: value f(z), and slope f'(z) as a function of the output y =
// f(z). Because the slope needs only the output, forward saves nothing but what it returns. kStops:
// a slope of zero stops even what is infinite or NaN, as PyTorch's derivative of relu does; else it
// is a factor like any other.
//
// To add one: write its struct, name it in TORCH_BPTT_ACTIVATIONS, add its line to
// torch_bptt/reference.py. V is a scalar or a vector of them; M supplies exp-like functions for V
// (cpu/vector_math.h).
#pragma once

#include "inline.h"

namespace torch_bptt {

struct Tanh {
  static constexpr bool kStops = false;
  template <class M, class V>
  static TORCH_BPTT_INLINE V value(V z) {
    return M::tanh(z);
  }
  template <class V>
  static TORCH_BPTT_INLINE V slope(V y) {
    return 1 - y * y;
  }
};

struct Relu {
  static constexpr bool kStops = true;
  template <class M, class V>
  static TORCH_BPTT_INLINE V value(V z) {
    return z <= 0 ? V{} : z;  // this way round, NaN stays NaN
  }
  template <class V>
  static TORCH_BPTT_INLINE V slope(V y) {
    return y <= 0 ? V{} : V{} + 1;
  }
};

struct Sigmoid {
  static constexpr bool kStops = false;
  template <class M, class V>
  static TORCH_BPTT_INLINE V value(V z) {
    return M::sigmoid(z);
  }
  template <class V>
  static TORCH_BPTT_INLINE V slope(V y) {
    return y * (1 - y);
  }
};

struct Identity {
  static constexpr bool kStops = false;
  template <class M, class V>
  static TORCH_BPTT_INLINE V value(V z) {
    return z;
  }
  template <class V>
  static TORCH_BPTT_INLINE V slope(V) {
    return V{} + 1;
  }
};

#define TORCH_BPTT_ACTIVATIONS(entry) \
  entry(tanh, Tanh) entry(relu, Relu) entry(sigmoid, Sigmoid) entry(identity, Identity)

enum class Activation : int {
#define TORCH_BPTT_ENTRY(name, type) name,
  TORCH_BPTT_ACTIVATIONS(TORCH_BPTT_ENTRY)
#undef TORCH_BPTT_ENTRY
};

constexpr bool stops(Activation activation) {
  constexpr bool kStops[] = {
#define TORCH_BPTT_ENTRY(name, type) type::kStops,
      TORCH_BPTT_ACTIVATIONS(TORCH_BPTT_ENTRY)
#undef TORCH_BPTT_ENTRY
  };
  return kStops[int(activation)];
}

constexpr const char* kActivationNames[] = {
#define TORCH_BPTT_ENTRY(name, type) #name,
    TORCH_BPTT_ACTIVATIONS(TORCH_BPTT_ENTRY)
#undef TORCH_BPTT_ENTRY
};

}  // namespace torch_bptt
