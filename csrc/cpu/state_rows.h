// Rows of states between two steps, for the loops.
#pragma once

#include "matmul.h"

TORCH_BPTT_KERNELS_BEGIN

// The B rows of a state, where there is one, in the type that products read.
template <class S>
void convert_state(const Rows<const S>& state, int64_t B, int64_t H, Operand<S>* to) {
  for (int64_t b = 0; state.data && b < B; ++b)
    convert_row(state.data + b * state.row, to + b * H, H);
}

// to = m p, rounded as a state is.
template <class S>
void mask_row(const S* mask, const Operand<S>* p, Operand<S>* to, int64_t H) {
  using C = Compute<S>;
  for_columns<C>(0, H, [&](int64_t j, auto lanes) {
    store(to + j, rounded_to<S>(load(mask + j, lanes) * load(p + j, lanes)), lanes);
  });
}

// A row of H for every row of the batch, of the current step and of the one before, in turns.
template <class C>
struct StateRing {
  C* data;
  int64_t B, H;
  C* row(int64_t t, int64_t b) const { return data + ((t & 1) * B + b) * H; }
};

TORCH_BPTT_KERNELS_END
