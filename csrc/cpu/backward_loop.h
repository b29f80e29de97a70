// grad_h, grad_h_n -> adjoint loop -> du, the gradient of the drive -> gradients of x, h0, weights,
// bias
//
// A chunk of steps at a time: its du never leave the cache, and the memory used does not grow with
// T.
#pragma once

#include "linear_loop.h"
#include "weight_gradients.h"

TORCH_BPTT_KERNELS_BEGIN

template <class S>
class BackwardLoop {
 public:
  BackwardLoop(const BackwardProblem<S>& problem, const Parallel& parallel)
      : p(problem),
        s(problem.schedule),
        parallel(parallel),
        chunk_rows(rows_per_chunk(s, p.I, p.H)),
        tasks(tasks_for(parallel, chunk_rows * p.H * p.I, chunk_rows / kBlockRows)),
        panels_hh(Panels<C>::size(p.H, p.H)),
        panels_ih(p.grad_x.data ? Panels<C>::size(p.H, p.I) : 0),
        grad_x_block(kNarrow<S> && p.grad_x.data ? tasks * kBlockRows * p.I : 0) {}

  void run() {
    weight_hh().pack(p.weight_hh);
    if (p.grad_x.data) weight_ih().pack(p.weight_ih);
    AdjointLoop<S> adjoint(
        s, p.H, StepOptions<C>(p.alpha, p.clip), adjoint_cell_of<S>(p.activation),
        {p.grad_h, p.grad_h_n, p.f, {}, p.grad_h0}, weight_hh(), chunk_rows, parallel);
    WeightGradients<S> weights(p, chunk_rows, parallel);
    while (adjoint.next()) {
      if (p.grad_x.data) input_gradient(adjoint.chunk(), adjoint.chunk_du());
      weights.add(adjoint.chunk(), adjoint.chunk_du());
    }
    weights.finish();
  }

 private:
  using C = Compute<S>;

  Panels<C> weight_hh() const { return {panels_hh.get(), p.H, p.H, s.B <= kFewRows}; }
  Panels<C> weight_ih() const { return {panels_ih.get(), p.H, p.I}; }

  // dx = du W_ih for the rows of a chunk, its steps shared among the tasks.
  void input_gradient(const Chunk& chunk, const C* chunk_du) {
    for_each_task(parallel, tasks, [&](int task) {
      const int64_t steps = chunk.t1 - chunk.t0;
      const C* du[kBlockRows];
      S* grad_x[kBlockRows];
      C* out[kBlockRows];
      int rows = 0;
      const auto flush = [&] {
        multiply(weight_ih(), p.H, rows, du, nullptr, out, [&](int64_t first, int64_t last) {
          if constexpr (kNarrow<S>) {
            for_block<C>(rows, first, last, [&](int64_t r, int64_t j, auto lanes) {
              store(grad_x[r] + j, load(out[r] + j, lanes), lanes);
            });
          }
        });
        rows = 0;
      };
      for (int64_t t = chunk.t0 + steps * task / tasks; t < chunk.t0 + steps * (task + 1) / tasks;
           ++t) {
        for (int64_t b = 0; b < s.rows_at(t); ++b) {
          du[rows] = chunk_du + (s.offset(t) - s.offset(chunk.t0) + b) * p.H;
          grad_x[rows] = s.row(p.grad_x, t, b);
          if constexpr (kNarrow<S>)
            out[rows] = grad_x_block.get() + (task * kBlockRows + rows) * p.I;
          else
            out[rows] = grad_x[rows];
          if (++rows == kBlockRows) flush();
        }
      }
      flush();
    });
  }

  const BackwardProblem<S>& p;
  const Schedule& s;
  const Parallel& parallel;
  const int64_t chunk_rows;
  const int tasks;
  Buffer<C> panels_hh, panels_ih, grad_x_block;
};

template <class S>
void rnn_backward(const BackwardProblem<S>& problem, const Parallel& parallel) {
  BackwardLoop<S>(problem, parallel).run();
}

TORCH_BPTT_KERNELS_END
