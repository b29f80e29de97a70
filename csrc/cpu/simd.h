// Vectors of float and double, their loads and stores, and the conversions of the narrow storage
// types.
//
// Written with the compilers' vector extension instead of intrinsics: one source serves every
// instruction set, and the width is the including file's TORCH_BPTT_VECTOR_BYTES. Everything lives
// in a namespace of that file's own, so that code for one instruction set is never linked into
// another's.
#pragma once

#if TORCH_BPTT_VECTOR_BYTES > 16
#include <immintrin.h>
#endif

#include <cstdint>

#include "../core/problem.h"

#define TORCH_BPTT_KERNELS_BEGIN \
  namespace torch_bptt {         \
  namespace cpu {                \
  namespace TORCH_BPTT_ISA {
#define TORCH_BPTT_KERNELS_END \
  }                            \
  }                            \
  }

TORCH_BPTT_KERNELS_BEGIN

template <class C>
struct vector_of;
template <>
struct vector_of<float> {
  typedef float type __attribute__((vector_size(TORCH_BPTT_VECTOR_BYTES)));
  typedef int32_t bits __attribute__((vector_size(TORCH_BPTT_VECTOR_BYTES)));
  typedef uint32_t unsigned_bits __attribute__((vector_size(TORCH_BPTT_VECTOR_BYTES)));
};
template <>
struct vector_of<double> {
  typedef double type __attribute__((vector_size(TORCH_BPTT_VECTOR_BYTES)));
  typedef int64_t bits __attribute__((vector_size(TORCH_BPTT_VECTOR_BYTES)));
};
template <class C>
using Vector = typename vector_of<C>::type;
template <class C>
constexpr int kLanes = TORCH_BPTT_VECTOR_BYTES / int(sizeof(C));

template <class S>
constexpr bool kNarrow = sizeof(S) < sizeof(float);

// Lanes of a and b in an order of their own: lane i of the result is lane Order::at(i, lanes) of a
// followed by b.
template <class C, class Order, class V, int... I>
TORCH_BPTT_INLINE V shuffle(V a, V b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, Order::at(I, kLanes<C>)...);
#else
  return __builtin_shuffle(a, b, typename vector_of<C>::bits{Order::at(I, kLanes<C>)...});
#endif
}
template <class C, class Order, class V>
TORCH_BPTT_INLINE V shuffle(V a, V b) {
  return shuffle<C, Order>(a, b, std::make_integer_sequence<int, kLanes<C>>{});
}

using UBits32 = vector_of<float>::unsigned_bits;
typedef uint16_t Bits16 __attribute__((vector_size(TORCH_BPTT_VECTOR_BYTES / 2)));

// bfloat16 is the upper half of a float32; rounding is to nearest, ties to even, and NaN stays NaN.
// The instruction for it (up to 8 % less time for a forward pass) makes subnormal results zeros, as
// the product of pairs does.
TORCH_BPTT_INLINE Vector<float> widen(bfloat16, Bits16 v) {
  return (Vector<float>)(__builtin_convertvector(v, UBits32) << 16);
}
TORCH_BPTT_INLINE Bits16 narrow(bfloat16, Vector<float> v) {
#if defined(TORCH_BPTT_BF16_DOT)
  return (Bits16)_mm512_cvtneps_pbh((__m512)v);
#else
  const UBits32 u = (UBits32)v;
  const UBits32 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const UBits32 nan = (u >> 16) | 0x40u;
  return __builtin_convertvector(v == v ? rounded : nan, Bits16);
#endif
}

// float16: the exponent is rebased by a multiplication with 2^112, which also normalises subnormal
// numbers.
TORCH_BPTT_INLINE Vector<float> widen(float16, Bits16 v) {
  const UBits32 u = __builtin_convertvector(v, UBits32);
  const UBits32 magnitude = (u & 0x7fffu) << 13;
  const UBits32 finite = (UBits32)((Vector<float>)magnitude * 0x1p112f);
  const UBits32 special = magnitude | 0x7f800000u;  // Inf and NaN: all exponent bits
  return (Vector<float>)((magnitude >= 0x0f800000u ? special : finite) | ((u & 0x8000u) << 16));
}
TORCH_BPTT_INLINE Bits16 narrow(float16, Vector<float> v) {
  const UBits32 u = (UBits32)v;
  const UBits32 sign = (u >> 16) & 0x8000u;
  const UBits32 magnitude = u & 0x7fffffffu;
  const UBits32 special = magnitude > 0x7f800000u ? UBits32{} + 0x7e00u : UBits32{} + 0x7c00u;
  // Subnormal results: adding 0.5 puts the rounding where the unit of float16 is, 2^-24.
  const UBits32 subnormal = (UBits32)((Vector<float>)magnitude + 0.5f) - 0x3f000000u;
  const UBits32 normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const UBits32 finite = magnitude < 0x38800000u ? subnormal : normal;
  return __builtin_convertvector((magnitude >= 0x47800000u ? special : finite) | sign, Bits16);
}

// How many lanes of a vector are meant: all, or the first `count` (the last columns of a row).
struct Whole {};
struct Part {
  int count;
};

TORCH_BPTT_INLINE Vector<float> load(const float* p, Whole) {
  Vector<float> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
TORCH_BPTT_INLINE Vector<double> load(const double* p, Whole) {
  Vector<double> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class S>
TORCH_BPTT_INLINE Vector<float> load(const S* p, Whole) {
  Bits16 v;
  __builtin_memcpy(&v, p, sizeof v);
  return widen(S{}, v);
}
TORCH_BPTT_INLINE void store(float* p, Vector<float> v, Whole) {
  __builtin_memcpy(p, &v, sizeof v);
}
TORCH_BPTT_INLINE void store(double* p, Vector<double> v, Whole) {
  __builtin_memcpy(p, &v, sizeof v);
}
template <class S>
TORCH_BPTT_INLINE void store(S* p, Vector<float> v, Whole) {
  const Bits16 bits = narrow(S{}, v);
  __builtin_memcpy(p, &bits, sizeof bits);
}

// Lane by lane, where the processor has no instruction that leaves some out.
template <class S>
TORCH_BPTT_INLINE Vector<Compute<S>> load(const S* p, Part part) {
  S lanes[kLanes<Compute<S>>] = {};
  for (int i = 0; i < part.count; ++i) lanes[i] = p[i];
  return load(lanes, Whole{});
}
template <class S>
TORCH_BPTT_INLINE void store(S* p, Vector<Compute<S>> v, Part part) {
  S lanes[kLanes<Compute<S>>];
  store(lanes, v, Whole{});
  for (int i = 0; i < part.count; ++i) p[i] = lanes[i];
}

#if TORCH_BPTT_VECTOR_BYTES == 64
TORCH_BPTT_INLINE uint32_t mask(Part part) { return (1u << part.count) - 1; }
TORCH_BPTT_INLINE Vector<float> load(const float* p, Part part) {
  return (Vector<float>)_mm512_maskz_loadu_ps(__mmask16(mask(part)), p);
}
TORCH_BPTT_INLINE Vector<double> load(const double* p, Part part) {
  return (Vector<double>)_mm512_maskz_loadu_pd(__mmask8(mask(part)), p);
}
TORCH_BPTT_INLINE void store(float* p, Vector<float> v, Part part) {
  _mm512_mask_storeu_ps(p, __mmask16(mask(part)), (__m512)v);
}
TORCH_BPTT_INLINE void store(double* p, Vector<double> v, Part part) {
  _mm512_mask_storeu_pd(p, __mmask8(mask(part)), (__m512d)v);
}
template <class S>
TORCH_BPTT_INLINE Bits16 load_bits(const S* p, Part part) {
  return (Bits16)_mm256_maskz_loadu_epi16(__mmask16(mask(part)), p);
}
TORCH_BPTT_INLINE Vector<float> load(const bfloat16* p, Part part) {
  return widen(bfloat16{}, load_bits(p, part));
}
TORCH_BPTT_INLINE Vector<float> load(const float16* p, Part part) {
  return widen(float16{}, load_bits(p, part));
}
TORCH_BPTT_INLINE void store(bfloat16* p, Vector<float> v, Part part) {
  _mm256_mask_storeu_epi16(p, __mmask16(mask(part)), (__m256i)narrow(bfloat16{}, v));
}
TORCH_BPTT_INLINE void store(float16* p, Vector<float> v, Part part) {
  _mm256_mask_storeu_epi16(p, __mmask16(mask(part)), (__m256i)narrow(float16{}, v));
}
#elif TORCH_BPTT_VECTOR_BYTES == 32
TORCH_BPTT_INLINE __m256i mask32(Part part) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(part.count),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
TORCH_BPTT_INLINE __m256i mask64(Part part) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(part.count), _mm256_setr_epi64x(0, 1, 2, 3));
}
TORCH_BPTT_INLINE Vector<float> load(const float* p, Part part) {
  return (Vector<float>)_mm256_maskload_ps(p, mask32(part));
}
TORCH_BPTT_INLINE Vector<double> load(const double* p, Part part) {
  return (Vector<double>)_mm256_maskload_pd(p, mask64(part));
}
TORCH_BPTT_INLINE void store(float* p, Vector<float> v, Part part) {
  _mm256_maskstore_ps(p, mask32(part), (__m256)v);
}
TORCH_BPTT_INLINE void store(double* p, Vector<double> v, Part part) {
  _mm256_maskstore_pd(p, mask64(part), (__m256d)v);
}
#endif

// The value that reading a stored v gives back.
template <class S>
TORCH_BPTT_INLINE Vector<Compute<S>> rounded_to(Vector<Compute<S>> v) {
  if constexpr (kNarrow<S>) {
    return widen(S{}, narrow(S{}, v));
  } else {
    return v;
  }
}

// body(j, lanes) for the columns [begin, end), a vector at a time.
template <class C, class Body>
TORCH_BPTT_INLINE void for_columns(int64_t begin, int64_t end, Body body) {
  int64_t j = begin;
  for (; j + kLanes<C> <= end; j += kLanes<C>) body(j, Whole{});
  if (j < end) body(j, Part{int(end - j)});
}

// to[0..count) = from[0..count), widened or rounded where the types differ.
template <class From, class To>
TORCH_BPTT_INLINE void convert_row(const From* from, To* to, int64_t count) {
  for_columns<Compute<From>>(
      0, count, [&](int64_t j, auto lanes) { store(to + j, load(from + j, lanes), lanes); });
}

// body(r, j, lanes) for rows [0, rows) and columns [begin, end). One loop, not two: the constants
// of the body are then loaded once for the block, not once for the few vectors of each row.
template <class C, class Body>
TORCH_BPTT_INLINE void for_block(int64_t rows, int64_t begin, int64_t end, Body body) {
  const int64_t vectors = (end - begin) / kLanes<C>;
  int64_t r = 0, j = begin;
  for (int64_t left = rows * vectors; left > 0; --left) {
    body(r, j, Whole{});
    const bool last = ++r == rows;
    r = last ? 0 : r;
    j = last ? j + kLanes<C> : j;
  }
  j = begin + vectors * kLanes<C>;
  if (j < end)
    for (r = 0; r < rows; ++r) body(r, j, Part{int(end - j)});
}

TORCH_BPTT_KERNELS_END
