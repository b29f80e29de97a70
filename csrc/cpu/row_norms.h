// |d| of every row of a chunk: how large the gradient of each state is.
//
// Exploding and vanishing gradients are what the norms are for: where squares would overflow or
// vanish, a row is scaled by a power of two first.
#pragma once

#include "inner_products.h"

TORCH_BPTT_KERNELS_BEGIN

template <class C>
C scaled_norm(const C* row, int64_t H, C scale) {
  C sum = 0;
  for (int64_t j = 0; j < H; ++j) sum += scale * row[j] * (scale * row[j]);
  return C(__builtin_sqrt(sum)) / scale;
}

// The norm of a row whose squares add up to `sum`.
template <class C>
TORCH_BPTT_INLINE C norm_of(C sum, const C* row, int64_t H) {
  constexpr bool kSingle = sizeof(C) == sizeof(float);
  constexpr C kSmallest = kSingle ? 0x1p-100 : 0x1p-900, kScale = kSingle ? 0x1p90 : 0x1p600;
  if (sum >= kSmallest && sum - sum == 0) return C(__builtin_sqrt(sum));
  return scaled_norm(row, H, sum < kSmallest ? kScale : 1 / kScale);
}

// As many rows at a time as a vector has lanes: the sums over lanes, which would take as long as
// all the rest for short rows, are then vectors themselves.
template <class C>
void row_norms(const C* d, int64_t rows, int64_t H, C* norms) {
  constexpr int L = kLanes<C>;
  for (int64_t r0 = 0; r0 < rows; r0 += L) {
    const C* row[L];
    Vector<C> sums[L] = {};
    for (int i = 0; i < L; ++i) row[i] = d + smaller(r0 + i, rows - 1) * H;
    for_columns<C>(0, H, [&](int64_t j, auto lanes) {
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) {
        const Vector<C> part = load(row[i] + j, lanes);
        sums[i] += part * part;
      }
    });
    C sum[L];
    store(sum, sums_of_lanes<C, L>(sums), Whole{});
    for (int i = 0; i < smaller(L, rows - r0); ++i) norms[r0 + i] = norm_of(sum[i], row[i], H);
  }
}

TORCH_BPTT_KERNELS_END
