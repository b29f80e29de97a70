// Products with weights as they lie in memory, for calls of so few rows that packing the weights
// would cost more than panels save.
//
//   out[r][n] = init[r][n] + sum_k a[r][k] * weight[n][k]
//
// Every sum is an inner product of two rows: one chain for each lane of a vector, then the lanes
// are added in halves. It is the same in every tile, so a row's result does not depend on the rows
// beside it. But it is not the order of sums over panels: which of the two a call uses depends on
// its number of rows in all.
#pragma once

#include "matmul.h"

TORCH_BPTT_KERNELS_BEGIN

// For `rows` rows of K terms in the whole call. Measured on Zen 5: packing costs about 0.45 cycles
// an element, a sum here up to 15 cycles more than in a tile. A tile needs 8 chains to hide the
// latency of a multiply-add.
template <class C>
constexpr bool takes_inner_products(int64_t rows, int64_t K) {
  return kLanes<C> >= 8 && 32 * rows <= K;
}

// The first, or from FIRST on the second, half of every segment of lanes.
template <int SEGMENT, int FIRST>
struct HalfSegments {
  static constexpr int at(int i, int) {
    return i / (SEGMENT / 2) * SEGMENT + i % (SEGMENT / 2) + FIRST;
  }
};

// Lane i of the result is the sum of all lanes of v[i], for as many v as SEGMENT.
template <class C, int SEGMENT>
TORCH_BPTT_INLINE Vector<C> sums_of_lanes(Vector<C>* v) {
  if constexpr (SEGMENT == 1) {
    return v[0];
  } else {
    constexpr int half = SEGMENT / 2;
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i)
      v[i] = shuffle<C, HalfSegments<SEGMENT, 0>>(v[2 * i], v[2 * i + 1]) +
             shuffle<C, HalfSegments<SEGMENT, half>>(v[2 * i], v[2 * i + 1]);
    return sums_of_lanes<C, half>(v);
  }
}

// sums[r][c] for ROWS rows of a and kLanes / ROWS rows of w.
template <class S, int ROWS>
void inner_products(int64_t K, const Operand<S>* const* a, const S* const* w, Compute<S>* sums) {
  using C = Compute<S>;
  using Product = Product<Operand<S>>;
  constexpr int kColumns = kLanes<C> / ROWS;
  constexpr int64_t kTerms = kLanes<C> * Product::kTerms;
  Vector<C> sum[kLanes<C>] = {};
  const auto add = [&](int64_t k, int64_t terms) {
    typename Product::Units a_k[ROWS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) a_k[r] = Product::read(a[r] + k, terms);
#pragma GCC unroll 16
    for (int c = 0; c < kColumns; ++c) {
      const auto w_k = Product::read(w[c] + k, terms);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r)
        sum[r * kColumns + c] = Product::add(sum[r * kColumns + c], a_k[r], w_k);
    }
  };
  int64_t k = 0;
  for (; k + kTerms <= K; k += kTerms) add(k, kTerms);
  if (k < K) add(k, K - k);
  store(sums, sums_of_lanes<C, kLanes<C>>(sum), Whole{});
}

// Columns [begin, end) of out = init + a weight^T for at most ROWS rows.
template <class S, int ROWS>
void multiply_few(const S* weight, int64_t begin, int64_t end, int64_t K, int64_t rows,
                  const Operand<S>* const* a, const Compute<S>* const* init,
                  Compute<S>* const* out) {
  constexpr int kColumns = kLanes<Compute<S>> / ROWS;
  const Operand<S>* a_rows[ROWS];
  for (int r = 0; r < ROWS; ++r) a_rows[r] = a[smaller(r, rows - 1)];
  for (int64_t j = begin; j < end; j += kColumns) {
    const S* w[kColumns];
    for (int c = 0; c < kColumns; ++c) w[c] = weight + smaller(j + c, end - 1) * K;
    Compute<S> sums[ROWS][kColumns];
    inner_products<S, ROWS>(K, a_rows, w, sums[0]);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < smaller(kColumns, end - j); ++c)
        out[r][j + c] = init[r][j + c] + sums[r][c];
  }
}

// The same for any number of rows, weight (N, K).
template <class S>
void multiply_transposed(const S* weight, int64_t begin, int64_t end, int64_t K, int64_t rows,
                         const Operand<S>* const* a, const Compute<S>* const* init,
                         Compute<S>* const* out, bool backwards) {
  constexpr int L = kLanes<Compute<S>>;
  if constexpr (takes_inner_products<Compute<S>>(0, 0)) {
    const int64_t blocks = (end - begin + L - 1) / L;  // of rows of the weight: they stay in cache
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t j = begin + (backwards ? blocks - 1 - i : i) * L, j_end = smaller(j + L, end);
      for (int64_t r = 0; r < rows; r += 4) {
        const auto multiply = rows - r == 1   ? multiply_few<S, 1>
                              : rows - r == 2 ? multiply_few<S, 2>
                                              : multiply_few<S, 4>;
        multiply(weight, j, j_end, K, smaller(rows - r, 4), a + r, init + r, out + r);
      }
    }
  }
}

TORCH_BPTT_KERNELS_END
