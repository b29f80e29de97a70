// grad_h, grad_h_n -> adjoint loop -> du, the gradient of the drive -> gradients of x, h0, weights,
// bias
//
// A chunk of steps at a time: its du never leave the cache, and the memory used does not grow with
// T.
#pragma once

#include "adjoint_loop.h"
#include "row_norms.h"
#include "weight_gradients.h"

TORCH_BPTT_KERNELS_BEGIN

template <class S>
class BackwardLoop {
 public:
  BackwardLoop(const BackwardProblem<S>& problem, const Parallel& parallel)
      : p(problem),
        s(problem.schedule),
        parallel(parallel),
        chunk_rows(chunk_rows_of(p)),
        cut(cut_steps<C>(parallel, s, p.H, 2 * s.rows() * p.H * (p.H + p.I))),
        panels_hh(in_place(p.weight_hh, p.H) ? 0 : Panels<P>::size(p.H, p.H)),
        panels_ih(p.grad_x.data && !in_place(p.weight_ih, p.I) ? Panels<P>::size(p.H, p.I) : 0),
        grad_x_block(kNarrow<S> && p.grad_x.data ? cut.threads * kBlockRows * p.I : 0),
        adjoint(s, p.H, p.alpha, p.clip, adjoint_cells_of<S>(p.activation),
                {p.grad_h, p.grad_h_n, p.f, p.mask, {}, p.grad_h0, p.grad_restart}, weight_hh(),
                chunk_rows, cut, p.grad_alpha || p.norms),
        weights(p, chunk_rows, cut.threads) {}

  void run() {
    run_team(parallel, cut.threads, [this](const Team& team) { run_thread(team); });
    adjoint.finish();
    weights.finish();
  }

 private:
  using C = Compute<S>;
  using P = Operand<S>;

  // Parts with sums of their own need longer chunks: each sum is read and written once a chunk,
  // which pays for a hundred rows or more.
  static int64_t chunk_rows_of(const BackwardProblem<S>& p) {
    const Schedule& s = p.schedule;
    const int64_t rows = rows_per_chunk(s, p.I, p.H);
    return p.parts == 1 ? rows : smaller(larger(rows, kPartRows * p.parts), s.rows());
  }
  static constexpr int64_t kPartRows = 256;

  Panels<P> weight_hh() const {
    return {.data = panels_hh.get(),
            .K = p.H,
            .N = p.H,
            .few_rows = s.B <= kFewRows,
            .in_place = in_place(p.weight_hh, p.H)};
  }
  Panels<P> weight_ih() const {
    return {.data = panels_ih.get(), .K = p.H, .N = p.I, .in_place = in_place(p.weight_ih, p.I)};
  }

  // The weight (H, N) itself, with the same result, in calls too short for packing to pay (Zen 5:
  // reading in place took 10 to 40 % less time with one step, as much with 4, and with 10 steps of
  // H = 1024, whose rows begin in the same few cache sets, 30 % more).
  const typename Product<P>::Unit* in_place(const S* weight, int64_t N) const {
    if constexpr (std::is_same_v<typename Product<P>::Unit, S>)
      if (s.T <= 4 && s.rows() <= 128 && N % kLanes<C> == 0) return weight;
    return nullptr;
  }

  void run_thread(const Team& team) {
    pack(weight_hh(), p.weight_hh, team);
    if (p.grad_x.data) pack(weight_ih(), p.weight_ih, team);
    team.wait();
    const Share share = share_of<C>(cut, s, p.H, team);
    AdjointWalk walk(s, chunk_rows);
    while (walk.next()) {
      adjoint.run(walk, share, team);
      const P* du = adjoint.chunk_du(walk);
      if (p.grad_x.data) input_gradient(walk.chunk(), du, share, team);
      team.wait();
      if (p.norms) {
        const Range mine = team.share(walk.rows());
        row_norms(adjoint.chunk_d(walk) + mine.begin * p.H, mine.end - mine.begin, p.H,
                  p.norms + s.offset(walk.chunk().t0) + mine.begin);
      }
      if (!weights.wanted()) continue;
      weights.add(walk.chunk(), du, adjoint.chunk_d(walk), walk.first(), team);
    }
  }

  // dx = du W_ih for the rows of a chunk that are the thread's own; a share of its steps where the
  // thread has columns of all rows.
  void input_gradient(const Chunk& chunk, const P* chunk_du, const Share& share, const Team& team) {
    const Range steps =
        cut.columns ? team.share(chunk.t1 - chunk.t0) : Range{0, chunk.t1 - chunk.t0};
    const P* du[kBlockRows];
    S* grad_x[kBlockRows];
    const S* x[kBlockRows];
    C* out[kBlockRows];
    int rows = 0;
    const auto flush = [&] {
      multiply(
          weight_ih(), 0, p.I, p.H, rows, du, nullptr, out,
          [&](Lines& lines, int64_t r, int64_t end, int64_t j, int64_t j_end) {
            for (; r < end; ++r) {
              lines.add(x[r], j, j_end);  // for the gradient of W_ih, which comes next
              lines.add(grad_x[r], j, j_end);
            }
          },
          [&](int64_t first, int64_t last) {
            if constexpr (kNarrow<S>) {
              for_block<C>(rows, first, last, [&](int64_t r, int64_t j, auto lanes) {
                store(grad_x[r] + j, load(out[r] + j, lanes), lanes);
              });
            }
          });
      rows = 0;
    };
    for (int64_t t = chunk.t0 + steps.begin; t < chunk.t0 + steps.end; ++t) {
      for (int64_t b = share.rows.begin; b < smaller(share.rows.end, s.rows_at(t)); ++b) {
        du[rows] = chunk_du + (s.offset(t) - s.offset(chunk.t0) + b) * p.H;
        x[rows] = s.row(p.x, t, b);
        grad_x[rows] = s.row(p.grad_x, t, b);
        if constexpr (kNarrow<S>)
          out[rows] = grad_x_block.get() + (team.index * kBlockRows + rows) * p.I;
        else
          out[rows] = grad_x[rows];
        if (++rows == kBlockRows) flush();
      }
    }
    flush();
  }

  const BackwardProblem<S>& p;
  const Schedule& s;
  const Parallel& parallel;
  const int64_t chunk_rows;
  const Cut cut;
  Buffer<typename Product<P>::Unit> panels_hh, panels_ih;
  Buffer<C> grad_x_block;
  AdjointLoop<S> adjoint;
  WeightGradients<S> weights;
};

template <class S>
void rnn_backward(const BackwardProblem<S>& problem, const Parallel& parallel) {
  BackwardLoop<S>(problem, parallel).run();
}

TORCH_BPTT_KERNELS_END
