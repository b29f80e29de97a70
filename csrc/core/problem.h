// What the kernels are asked to compute: sizes, rows and options as plain structs. No torch, no
// Python, no allocation.
//
// Symbols: T steps, B batch rows, I input size, H hidden size, N rows in all (T*B when dense).
#pragma once

#include <cstdint>

#include "inline.h"

namespace torch_bptt {

enum class Activation : int;  // listed in activations.h

// Storage types that are computed in float32. Only their bits are kept here; cpu/simd.h converts.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// ENTRY(type) for each storage type.
#define TORCH_BPTT_STORAGE_TYPES(ENTRY) ENTRY(float) ENTRY(double) ENTRY(bfloat16) ENTRY(float16)

// The type a storage type is computed in.
template <class S>
struct compute_type {
  using type = float;
};
template <>
struct compute_type<double> {
  using type = double;
};
template <class S>
using Compute = typename compute_type<S>::type;

// Rows of features, the features of one row contiguous. Any strides between rows, zero (expanded)
// included.
template <class S>
struct Rows {
  S* data = nullptr;  // null: absent
  int64_t step = 0;   // elements from step t to t + 1; unused when the rows are packed
  int64_t row = 0;    // elements from row b to b + 1
};

// Which rows exist at each step, and where the state that arrives at a step comes from.
//
// Dense: B rows at every step. Packed (as in PackedSequence): the rows of step t lie at offsets[t],
// and a row that has ended is absent from then on. `reverse` runs every row from its last step to
// its first.
struct Schedule {
  int64_t T = 0;
  int64_t B = 0;
  const int64_t* offsets = nullptr;  // (T + 1) first row of each step; null: dense
  const int64_t* lengths = nullptr;  // (B) steps of each row; null: T
  const bool* keep = nullptr;  // (T, B) false: the row restarts, the state of the step before does
                               // not arrive at this one; null: all true
  bool reverse = false;
  int64_t truncate = 0;  // k > 0: the gradient crosses a link only between steps of the same block
                         // of k; 0: all links

  TORCH_BPTT_INLINE int64_t offset(int64_t t) const { return offsets ? offsets[t] : t * B; }
  TORCH_BPTT_INLINE int64_t rows() const { return offset(T); }
  TORCH_BPTT_INLINE int64_t rows_at(int64_t t) const {
    return offsets ? offsets[t + 1] - offsets[t] : B;
  }
  TORCH_BPTT_INLINE int64_t length(int64_t b) const { return lengths ? lengths[b] : T; }

  // Steps in processing order: i = 0 is the first one processed.
  TORCH_BPTT_INLINE int64_t step(int64_t i) const { return reverse ? T - 1 - i : i; }
  TORCH_BPTT_INLINE int64_t before(int64_t t) const { return reverse ? t + 1 : t - 1; }
  TORCH_BPTT_INLINE int64_t after(int64_t t) const { return reverse ? t - 1 : t + 1; }

  // Rows [0, rows_continued(t)) of step t receive a state of the step before; the others start from
  // h0.
  TORCH_BPTT_INLINE int64_t rows_continued(int64_t t) const { return common_rows(t, before(t)); }
  // Rows [0, rows_continuing(t)) of step t hand their state to the step after; for the others step
  // t is the last.
  TORCH_BPTT_INLINE int64_t rows_continuing(int64_t t) const { return common_rows(t, after(t)); }

  // Does the state of the step before (or h0) arrive at step t?
  TORCH_BPTT_INLINE bool kept(int64_t t, int64_t b) const { return !keep || keep[t * B + b]; }
  // Does the gradient cross the link that arrives at step t? Truncation cuts it where a loop would
  // detach the state.
  TORCH_BPTT_INLINE bool linked(int64_t t, int64_t b) const {
    if (!kept(t, b)) return false;
    if (truncate == 0) return true;
    const int64_t own = reverse ? length(b) - 1 - t : t;  // the row's own steps, counted from zero
    return own == 0 || own % truncate != 0;
  }

  template <class S>
  TORCH_BPTT_INLINE S* row(const Rows<S>& rows, int64_t t, int64_t b) const {
    return rows.data + (offsets ? offsets[t] * rows.row : t * rows.step) + b * rows.row;
  }

 private:
  TORCH_BPTT_INLINE int64_t common_rows(int64_t t, int64_t other) const {
    if (other < 0 || other >= T) return 0;
    const int64_t here = rows_at(t), there = rows_at(other);
    return here < there ? here : there;
  }
};

// Below this much work (multiply-adds) a second thread costs more than it brings: waking it takes
// about 5 us.
constexpr int64_t kWorkPerThread = 250'000;

// Threads to share work. run() calls task(context, i, n) for i in [0, n), all n at the same time,
// so that they can wait for one another; n is `threads`, or less where the system gives less. It
// returns when all are done.
struct Parallel {
  int threads = 1;
  void (*run)(int threads, void (*task)(void* context, int index, int count),
              void* context) = nullptr;
};

// h_t = (1 - alpha) p_t + alpha f(z_t),   z_t = x_t W_ih^T + b_ih + b_hh + noise_t + (m p_t) W_hh^T
//
// p_t is the state that arrives at step t; products without W are elementwise.
template <class S>
struct ForwardProblem {
  Schedule schedule;
  int64_t I = 0, H = 0;
  Activation activation{};
  const Compute<S>* alpha{};  // (H) the leak of each unit; null: 1 for all
  Rows<const S> x;            // (T, B, I) or (N, I)
  Rows<const S> h0;           // (B, H); null: zeros
  Rows<const S> restart;      // (B, H) what arrives where a row restarts; null: zeros
  Rows<const S> mask;         // (B, H) m; null: ones
  Rows<const S> noise;        // as h; null: zeros
  const S* weight_ih{};       // (H, I) contiguous
  const S* weight_hh{};       // (H, H) contiguous
  const S* bias[2]{};         // b_ih and b_hh (H); null: zeros
  Rows<S> h;                  // out (T, B, H) or (N, H)
  S* h_n{};                   // out (B, H) contiguous: the state after each row's last step
  Rows<S> f;                  // out, as h: f(z_t); null when alpha is, where it equals h
};

// The gradients of all that ForwardProblem reads but mask and noise. A null output is not computed.
//
// The batch may consist of parts with sums of their own: row b belongs to part b % parts, every
// step has as many rows of each, and the gradients of weights, bias and alpha have one more
// dimension, (parts), in front.
template <class S>
struct BackwardProblem {
  Schedule schedule;
  int64_t I = 0, H = 0;
  int64_t parts = 1;
  Activation activation{};
  const Compute<S>* alpha{};
  double clip = -1;        // >= 0: clamp d_t = dL/dh_t to [-clip, clip] at every step
  Rows<const S> grad_h;    // as h; null: zeros
  Rows<const S> grad_h_n;  // (B, H); null: zeros
  Rows<const S> x, h0, restart, mask, h;  // as in ForwardProblem
  Rows<const S> f;                        // f(z_t); h itself when alpha is null
  const S* weight_ih{};                   // (H, I) contiguous
  const S* weight_hh{};                   // (H, H) contiguous
  Rows<S> grad_x;                         // out, as x
  Rows<S> grad_h0;                        // out (B, H)
  S* grad_restart{};                      // out (B, H) contiguous
  S* grad_weight_ih{};                    // out (H, I) contiguous, of each part
  S* grad_weight_hh{};                    // out (H, H) contiguous, of each part
  S* grad_bias{};                         // out (H), of each part
  Compute<S>* grad_alpha{};               // out (H), of each part
  Compute<S>* norms{};                    // out (rows): |d_t| of each row, in memory order
};

// From the last step to the first:
//   d_t = g_t + (1 - alpha) d_{t+1} + m ((gate_{t+1} d_{t+1}) W_hh)
// across linked steps only.
template <class S>
struct AdjointProblem {
  Schedule schedule;
  int64_t H = 0;
  const Compute<S>* alpha{};
  double clip = -1;
  Rows<const S> g;          // (T, B, H) or (N, H)
  Rows<const S> gate;       // as g: alpha f'(z_t)
  bool gate_stops = false;  // a gate of zero stops even what is infinite or NaN
  Rows<const S> mask;       // (B, H) m; null: ones
  const S* weight_hh{};     // (H, H) contiguous
  Rows<S> d;                // out, as g
  Rows<S> d0;               // out (B, H): once more, before each row's first step
  S* restart{};             // out (B, H) contiguous: the sum of what leaves at restarts
};

// Its transpose, from the first step to the last:
//   q_t = c_t + (1 - alpha) q_{t-1} + gate_t ((m q_{t-1}) W_hh^T)
template <class S>
struct TangentProblem {
  Schedule schedule;
  int64_t H = 0;
  const Compute<S>* alpha{};
  Rows<const S> c;          // (T, B, H) or (N, H)
  Rows<const S> gate;       // as c: alpha f'(z_t)
  bool gate_stops = false;  // a gate of zero stops even what is infinite or NaN
  Rows<const S> mask;       // (B, H) m; null: ones
  Rows<const S> q0;         // (B, H): before each row's first step; null: zeros
  Rows<const S> restart;    // (B, H): arrives where a row restarts; null: zeros
  const S* weight_hh{};     // (H, H) contiguous
  Rows<S> q;                // out, as c
};

}  // namespace torch_bptt
