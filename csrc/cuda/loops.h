// The three recurrences as the CUDA kernels see them. All pointers are device pointers, those in
// `schedule` as well. No torch.
//
// One struct serves them all, because each is a product with one matrix and an epilogue:
//
//   state_i = finish( entering_i weight^T ),   entering_i made of state_{i-1}
//
//   forward  state = h    entering = m p             weight = W_hh      up in processing order
//   adjoint  state = du   entering = du              weight = W_hh^T    down
//   tangent  state = q    entering = m (link q)      weight = W_hh      up
//
// csrc/README.md has the equations; step.h has what happens to one element of one step.
#pragma once

#include "../core/problem.h"

namespace torch_bptt::cuda {

constexpr const char* kPassNames[] = {"forward", "adjoint", "tangent"};
enum class Pass : int { forward, adjoint, tangent };

template <class S>
struct Loop {
  using C = Compute<S>;

  Pass pass{};
  Schedule schedule;
  int64_t H = 0;
  Activation activation{};
  bool gate_given = false;  // `gate` is alpha f'(z) itself, not the f(z) that it is made of
  bool gate_stops = false;  // adjoint, tangent: one of zero stops even what is infinite or NaN
  const C* alpha{};         // (H) null: ones
  C clip = -1;              // adjoint: negative: none
  const S* weight{};        // (H, H) contiguous, product[j] = sum_k entering[k] weight[j][k]
  Rows<const S> mask;       // (B, H) null: ones

  // Read at every step; rows as of `state`.
  const C* c{};         // forward: x W_ih^T, rows of H from row `c_first` of the sequence on;
  int64_t c_first = 0;  // they may lie where h will be
  Rows<const S> noise;  // forward; null: zeros
  const S* bias[2]{};   // forward (H); null: zeros
  Rows<const S> g;      // adjoint: null: zeros; tangent
  Rows<const S> gate;   // adjoint, tangent

  // States that arrive from outside (B, H); null: zeros.
  Rows<const S> first;    // forward, tangent: before each row's first step
  Rows<const S> restart;  // forward, tangent: where a row restarts
  Rows<const S> g_n;      // adjoint: the gradient of h_n

  // Written. What is null is not wanted, but for `state`, and `carried` where alpha is given.
  Rows<S> state;     // every row of every step
  Rows<S> f;         // forward with alpha: f(z)
  S* h_n{};          // forward (B, H): the state after each row's last step
  Rows<S> d;         // adjoint: d_t
  Rows<C> d_exact;   // adjoint: d_t in the type it is computed in
  Rows<S> d0;        // adjoint (B, H): d before each row's first step
  C* restart_sum{};  // adjoint (B, H), zeros at the start: the sum of what leaves at restarts
  C* carried{};      // adjoint with alpha (B, H): d of the step at hand

  // Whether the adjoint continues past each row's first step.
  TORCH_BPTT_INLINE bool before_first() const {
    return pass == Pass::adjoint && (d0.data || restart_sum);
  }
  // How many steps there are to run, the one past the first included.
  TORCH_BPTT_INLINE int64_t steps() const { return schedule.T + (before_first() ? 1 : 0); }
};

// Some of a loop's steps, in its order; the state of the step before `begin` is there already.
struct Steps {
  int64_t begin, end;
};

// Which rows step i, in the order of a loop, has to do with: each count is of the first rows of the
// batch. A schedule of the host answers on the host, one of the device there.
struct StepRows {
  template <class S>
  TORCH_BPTT_INLINE StepRows(const Loop<S>& loop, int64_t i)
      : StepRows(loop.schedule, loop.pass, loop.before_first(), i) {}
  TORCH_BPTT_INLINE StepRows(const Schedule& s, Pass pass, bool before_first, int64_t i) {
    const bool adjoint = pass == Pass::adjoint;
    t = adjoint ? s.step(s.T - 1 - i) : s.step(i);
    from = adjoint ? s.after(t) : s.before(t);
    existing = i < s.T ? s.rows_at(t) : 0;
    received = i >= s.T ? 0 : adjoint ? s.rows_continuing(t) : s.rows_continued(t);
    // Rows of the step before that have no step here: the recurrence runs once more for them.
    closing = before_first && i > 0 ? s.rows_at(from) : 0;
    handed_on = pass == Pass::forward && i < s.T ? s.rows_continuing(t) : 0;
  }

  // Rows [0, rows()) have something to do.
  TORCH_BPTT_INLINE int64_t rows() const { return existing > closing ? existing : closing; }

  int64_t t, from;    // this step, and the one whose state it goes on from
  int64_t existing;   // rows of this step
  int64_t received;   // of them, those that continue from `from`
  int64_t closing;    // rows of `from`, where the loop goes on past a row's first step
  int64_t handed_on;  // forward: rows that have a step after this one
};

}  // namespace torch_bptt::cuda
