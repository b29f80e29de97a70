// The linear recurrence of forward mode, up in processing order; adjoint_loop.h has its transpose.
//
//   q_t = c_t + link_t [ (1 - alpha) q_{t-1} + gate_t ((m q_{t-1}) W_hh^T) ]
//
// Where a row restarts, the tangent of the restart state takes the place of q_{t-1}.
#pragma once

#include "../core/cell.h"
#include "state_rows.h"
#include "team.h"

TORCH_BPTT_KERNELS_BEGIN

template <class S>
class TangentLoop {
 public:
  TangentLoop(const TangentProblem<S>& problem, const Parallel& parallel)
      : p(problem),
        s(problem.schedule),
        parallel(parallel),
        cut(cut_steps<C>(parallel, s, p.H, s.rows() * p.H * p.H)),
        panels(Panels<P>::size(p.H, p.H)),
        zeros(p.H),
        q0(p.q0.data ? s.B * p.H : 0),
        restart(p.restart.data ? s.B * p.H : 0),
        masked(p.mask.data ? cut.threads * kBlockRows * p.H : 0),
        states(2 * s.B * p.H),
        products(cut.threads * kBlockRows * p.H) {}

  void run() {
    zeros.fill_zero(p.H);
    convert_state(p.q0, s.B, p.H, q0.get());
    convert_state(p.restart, s.B, p.H, restart.get());
    run_team(parallel, cut.threads, [this](const Team& team) {
      pack_transposed(weight_hh(), p.weight_hh, team);
      team.wait();
      const Share share = share_of<C>(cut, s, p.H, team);
      for (int64_t i = 0; i < s.T; ++i) {
        step(team, s.step(i), share);
        if (cut.columns) team.wait();
      }
    });
  }

 private:
  using C = Compute<S>;
  using P = Operand<S>;

  void step(const Team& team, int64_t t, const Share& share) {
    const int64_t end = smaller(share.rows.end, s.rows_at(t));
    const P *arriving[kBlockRows], *entering[kBlockRows];
    C* z[kBlockRows];
    for (int64_t b0 = share.rows.begin; b0 < end; b0 += kBlockRows) {
      const int64_t count = smaller(kBlockRows, end - b0);
      for (int64_t r = 0; r < count; ++r) {
        arriving[r] = this->arriving(t, b0 + r);
        entering[r] = p.mask.data ? this->entering(team, r, b0 + r, arriving[r]) : arriving[r];
        z[r] = products.get() + (team.index * kBlockRows + r) * p.H;
      }
      multiply(
          weight_hh().of_step(t), share.columns.begin, share.columns.end, p.H, count, entering,
          nullptr, z, [](auto&&...) {},
          [&](int64_t first, int64_t last) {
            for_block<C>(count, first, last, [&](int64_t r, int64_t j, auto lanes) {
              const int64_t b = b0 + r;
              const Vector<C> gate = load(s.row(p.gate, t, b) + j, lanes),
                              moved = load(z[r] + j, lanes);
              Vector<C> q = p.gate_stops ? passed<true>(gate, moved) : passed<false>(gate, moved);
              if (p.alpha) q += (1 - load(p.alpha + j, lanes)) * load(arriving[r] + j, lanes);
              q += load(s.row(p.c, t, b) + j, lanes);
              store(s.row(p.q, t, b) + j, q, lanes);
              store(ring().row(t, b) + j, rounded_to<S>(q), lanes);
            });
          });
    }
  }

  const P* arriving(int64_t t, int64_t b) const {
    if (!s.kept(t, b)) return p.restart.data ? restart.get() + b * p.H : zeros.get();
    if (!s.linked(t, b)) return zeros.get();
    if (b < s.rows_continued(t)) return ring().row(s.before(t), b);
    return p.q0.data ? q0.get() + b * p.H : zeros.get();
  }

  const P* entering(const Team& team, int64_t slot, int64_t b, const P* arriving) const {
    P* to = masked.get() + (team.index * kBlockRows + slot) * p.H;
    mask_row<S>(p.mask.data + b * p.mask.row, arriving, to, p.H);
    return to;
  }

  Panels<P> weight_hh() const { return {panels.get(), p.H, p.H, s.B <= kFewRows}; }
  StateRing<P> ring() const { return {states.get(), s.B, p.H}; }

  const TangentProblem<S>& p;
  const Schedule& s;
  const Parallel& parallel;
  const Cut cut;
  Buffer<typename Product<P>::Unit> panels;
  Buffer<P> zeros, q0, restart, masked, states;
  Buffer<C> products;
};

template <class S>
void tangent_scan(const TangentProblem<S>& problem, const Parallel& parallel) {
  TangentLoop<S>(problem, parallel).run();
}

TORCH_BPTT_KERNELS_END
