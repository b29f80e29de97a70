// What a matrix product multiplies: single elements, or pairs of them where the processor
// multiplies pairs in one instruction.
//
// A product reads units: kTerms elements of its summed index side by side. Rows of a are read as
// they lie in memory; b is gathered into units when it is packed.
#pragma once

#include "simd.h"

TORCH_BPTT_KERNELS_BEGIN

// P: float or double, or bfloat16 in pairs.
template <class P>
struct Product {
  static constexpr int kTerms = 1;
  using Unit = P;
  using Units = Vector<P>;

  static TORCH_BPTT_INLINE Unit unit(const P* row) { return *row; }
  static TORCH_BPTT_INLINE Unit last_unit(const P* row) { return *row; }
  static TORCH_BPTT_INLINE Units units(const Unit* b) { return load(b, Whole{}); }
  template <class A>  // a unit or a vector of them
  static TORCH_BPTT_INLINE Vector<P> add(Vector<P> sum, A a, Units b) {
    return sum + a * b;
  }

  // Units of columns [j, j + lanes) of `terms` <= kTerms rows; the missing ones are zeros.
  template <class S, class Lanes>
  static TORCH_BPTT_INLINE void gather(const S* const* rows, int64_t, int64_t j, Lanes lanes,
                                       Unit* to) {
    store(to, load(rows[0] + j, lanes), Whole{});
  }

  // A vector of units of one row, `terms` of them there and the rest zeros.
  template <class S>
  static TORCH_BPTT_INLINE Units read(const S* row, int64_t terms) {
    return terms >= kLanes<P> ? load(row, Whole{}) : load(row, Part{int(terms)});
  }
};

#if defined(TORCH_BPTT_BF16_DOT)
// Two products and two sums for each lane, rounded to float32 after each sum, subnormal numbers as
// zeros.
template <>
struct Product<bfloat16> {
  static constexpr int kTerms = 2;
  using Unit = uint32_t;
  using Units = UBits32;

  static TORCH_BPTT_INLINE Unit unit(const bfloat16* row) {
    Unit pair;
    __builtin_memcpy(&pair, row, sizeof pair);
    return pair;
  }
  static TORCH_BPTT_INLINE Unit last_unit(const bfloat16* row) { return row->bits; }
  static TORCH_BPTT_INLINE Units units(const Unit* b) {
    Units v;
    __builtin_memcpy(&v, b, sizeof v);
    return v;
  }
  template <class A>
  static TORCH_BPTT_INLINE Vector<float> add(Vector<float> sum, A a, Units b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)(Units{} + a), (__m512bh)b);
  }

  template <class Lanes>
  static TORCH_BPTT_INLINE void gather(const bfloat16* const* rows, int64_t terms, int64_t j,
                                       Lanes lanes, Unit* to) {
    const Units low = (Units)load(rows[0] + j, lanes) >> 16;
    const Units high = terms > 1 ? (Units)load(rows[1] + j, lanes) : Units{};
    const Units pairs = low | high;
    __builtin_memcpy(to, &pairs, sizeof pairs);
  }

  static TORCH_BPTT_INLINE Units read(const bfloat16* row, int64_t terms) {
    Units pairs{};
    if (terms >= 2 * kLanes<float>)
      __builtin_memcpy(&pairs, row, sizeof pairs);
    else
      __builtin_memcpy(&pairs, row, uint64_t(terms) * sizeof(bfloat16));
    return pairs;
  }
};
#endif

// What products over rows of S are made of.
template <class S>
struct operand_type {
  using type = Compute<S>;
};
#if defined(TORCH_BPTT_BF16_DOT)
template <>
struct operand_type<bfloat16> {
  using type = bfloat16;
};
#endif
template <class S>
using Operand = typename operand_type<S>::type;

// Rows of S are converted before a product reads them.
template <class S>
constexpr bool kConverted = sizeof(Operand<S>) != sizeof(S);

TORCH_BPTT_KERNELS_END
