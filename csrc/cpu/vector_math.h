// tanh and sigmoid for vectors: at most 2 units in the last place from the correctly rounded value
// over the whole range, subnormal numbers included; NaN stays NaN, +-Inf gives the limit
// (tests/test_kernels.py measures it).
//
// Both rest on exp(y) = 2^n exp(r), n = round(y / ln 2), |r| <= ln(2) / 2, with exp(r) - 1 from its
// Taylor series: the first term left out is below half a unit in the last place of the result (r^8
// / 8!: 5e-9 relative to r in float32; r^14 / 14!: 1e-17 in float64). Where n gets large, ln 2 is
// subtracted in two parts, the first short enough for n times it to be exact.
#pragma once

#include "simd.h"

TORCH_BPTT_KERNELS_BEGIN

template <class C>
struct exp_constants;
template <>
struct exp_constants<float> {
  static constexpr float log2e = 1.44269504088896341f, ln2_high = 0.693359375f,
                         ln2_low = -2.12194440e-4f;
  static constexpr float round =
      0x1.8p23f;  // adding it rounds to an integer, kept in the low mantissa bits
  static constexpr float tanh_saturates = 10;    // |x| from where tanh(x) rounds to 1
  static constexpr float exp_underflows = -104;  // exp(y) rounds to 0 from here down
  static constexpr int mantissa_bits = 23, exponent_bias = 127, terms = 7;
};
template <>
struct exp_constants<double> {
  static constexpr double log2e = 1.44269504088896340736, ln2_high = 6.93147180369123816490e-01,
                          ln2_low = 1.90821492927058770002e-10;
  static constexpr double round = 0x1.8p52;
  static constexpr double tanh_saturates = 20;
  static constexpr double exp_underflows = -746;
  static constexpr int mantissa_bits = 52, exponent_bias = 1023, terms = 13;
};

constexpr double kInverseFactorial[] = {1.,
                                        1.,
                                        1. / 2,
                                        1. / 6,
                                        1. / 24,
                                        1. / 120,
                                        1. / 720,
                                        1. / 5040,
                                        1. / 40320,
                                        1. / 362880,
                                        1. / 3628800,
                                        1. / 39916800,
                                        1. / 479001600,
                                        1. / 6227020800};

template <class C>
struct VectorMath {
  using V = Vector<C>;
  using Bits = typename vector_of<C>::bits;
  using K = exp_constants<C>;

  // tanh |x| = e / (e + 2) with e = exp(2 |x|) - 1, which keeps full accuracy near zero. What
  // limits it is the latency of the chain (a processor has room to work on a few vectors at a
  // time), so ln 2 is subtracted in one part: the error that leaves in e is n rounding errors of ln
  // 2, and as e grows tanh depends on it less and less.
  static TORCH_BPTT_INLINE V tanh(V x) {
    const Bits sign = (Bits)x & sign_bit();
    const V magnitude = (V)((Bits)x ^ sign);
    const V shifted = magnitude * (2 * K::log2e) + K::round;
    const V n = shifted - K::round;
    const V r = magnitude * 2 - n * (K::ln2_high + K::ln2_low);
    const V scale = power_of_two(exponent(shifted));
    const V e = scale * expm1(r) + (scale - 1);
    const V y = magnitude > K::tanh_saturates ? V{} + 1 : e / (e + 2);
    return (V)((Bits)y | sign);
  }

  // With e = exp(-|x|): 1 / (1 + e) for x >= 0, else e / (1 + e); neither cancels.
  static TORCH_BPTT_INLINE V sigmoid(V x) {
    V y = (V)((Bits)x | sign_bit());
    y = y < K::exp_underflows ? V{} + K::exp_underflows : y;
    const V shifted = y * K::log2e + K::round;
    const V n = shifted - K::round;
    const V r = (y - n * K::ln2_high) - n * K::ln2_low;
    // 2^n in two factors, because it can be below the smallest normal number itself.
    const Bits exponent_n = exponent(shifted), half = exponent_n >> 1;
    const V e = (1 + expm1(r)) * power_of_two(half) * power_of_two(exponent_n - half);
    return (x < 0 ? e : V{} + 1) / (1 + e);
  }

 private:
  static TORCH_BPTT_INLINE Bits sign_bit() { return (Bits)(-V{}); }  // of -0.0

  // n from n + round.
  static TORCH_BPTT_INLINE Bits exponent(V shifted) {
    return (Bits)shifted - (Bits)(V{} + K::round);
  }

  static TORCH_BPTT_INLINE V power_of_two(Bits n) {
    return (V)((n + K::exponent_bias) << K::mantissa_bits);
  }

  static TORCH_BPTT_INLINE V expm1(V r) {
    const V r2 = r * r, r4 = r2 * r2;
    return r2 * taylor<2, K::terms - 1>(r, r2, r4, r4 * r4) + r;
  }

  // sum of r^i / (FIRST + i)! for i in [0, COUNT), COUNT <= 16, in halves: a short chain of
  // multiply-adds.
  template <int FIRST, int COUNT>
  static TORCH_BPTT_INLINE V taylor(V r, V r2, V r4, V r8) {
    if constexpr (COUNT == 1) {
      return V{} + C(kInverseFactorial[FIRST]);
    } else {
      constexpr int low = COUNT > 8 ? 8 : COUNT > 4 ? 4 : COUNT > 2 ? 2 : 1;
      const V power = low == 8 ? r8 : low == 4 ? r4 : low == 2 ? r2 : r;
      return taylor<FIRST, low>(r, r2, r4, r8) +
             power * taylor<FIRST + low, COUNT - low>(r, r2, r4, r8);
    }
  }
};

TORCH_BPTT_KERNELS_END
