// The two linear recurrences, transposes of each other: adjoint (down in processing order) and
// tangent (up).
//
//   d_t = g_t + link_{t+1} [ (1 - alpha) d_{t+1} + (gate_{t+1} d_{t+1}) W_hh ]
//   q_t = g_t + link_t     [ (1 - alpha) q_{t-1} + gate_t (q_{t-1} W_hh^T) ]
#pragma once

#include "../core/cell.h"
#include "forward_loop.h"
#include "matmul.h"

TORCH_BPTT_KERNELS_BEGIN

// ---- adjoint
// ----------------------------------------------------------------------------------------------------

// Up to kBlockRows rows of one step.
template <class S>
struct AdjointBlock {
  using C = Compute<S>;
  const C* arriving[kBlockRows];  // du_{t+1} = gate_{t+1} d_{t+1}, zeros where the link is cut
  C* du[kBlockRows];              // du_{t+1} W_hh, then du_t
  const C* d_next[kBlockRows];    // d_{t+1}, leaky only
  C* d[kBlockRows];               // d_t for the next step, leaky only
  const S* g[kBlockRows];         // null: zeros
  const S* g_n[kBlockRows];       // gradient of h_n where t is the row's last step; null elsewhere
  const S* y[kBlockRows];         // f(z_t), or the gate itself
  S* d_out[kBlockRows];           // null: d_t is not wanted
};

template <class S>
using AdjointCell = void (*)(const AdjointBlock<S>& block, int64_t rows, int64_t begin, int64_t end,
                             StepOptions<Compute<S>> options);

// gate_t as a function of what forward kept: alpha f'(z_t) from f(z_t).
template <class A>
struct SlopeGate {
  template <class V, class C>
  static TORCH_BPTT_INLINE V of(V y, const StepOptions<C>& options) {
    return options.leaky() ? options.alpha * A::slope(y) : A::slope(y);
  }
};
struct GivenGate {
  template <class V, class C>
  static TORCH_BPTT_INLINE V of(V gate, const StepOptions<C>&) {
    return gate;
  }
};

template <class S, class Gate>
void adjoint_cell(const AdjointBlock<S>& block, int64_t rows, int64_t begin, int64_t end,
                  StepOptions<Compute<S>> options) {
  using C = Compute<S>;
  const bool leaky = options.leaky();
  for_block<C>(rows, begin, end, [&](int64_t r, int64_t j, auto lanes) {
    Vector<C> d = load(block.du[r] + j, lanes);
    if (block.g[r]) d += load(block.g[r] + j, lanes);
    if (block.g_n[r]) d += load(block.g_n[r] + j, lanes);
    if (leaky) d += options.rest * load(block.d_next[r] + j, lanes);
    if (options.clip >= 0) d = clamp(d, options);
    if (leaky) store(block.d[r] + j, d, lanes);
    if (block.d_out[r]) store(block.d_out[r] + j, d, lanes);
    store(block.du[r] + j, Gate::of(load(block.y[r] + j, lanes), options) * d, lanes);
  });
}

template <class S>
AdjointCell<S> adjoint_cell_of(Activation activation) {
  switch (activation) {
#define TORCH_BPTT_ENTRY(name, type) \
  case Activation::name:             \
    return adjoint_cell<S, SlopeGate<type>>;
    TORCH_BPTT_ACTIVATIONS(TORCH_BPTT_ENTRY)
#undef TORCH_BPTT_ENTRY
  }
  __builtin_unreachable();
}

// What the adjoint reads and writes besides du; shared by adjoint_scan and rnn_backward.
template <class S>
struct AdjointRows {
  Rows<const S> g, g_n, y;
  Rows<S> d;   // null: not wanted
  Rows<S> d0;  // null: not wanted
};

// Walks a chunk of steps at a time, so that the caller can use the chunk's du_t while they are in
// cache. du of two chunks exist at any time: the current one and the one processed before it, whose
// edge the current one starts from.
template <class S>
class AdjointLoop {
 public:
  AdjointLoop(const Schedule& s, int64_t H, const StepOptions<Compute<S>>& options,
              AdjointCell<S> cell, const AdjointRows<S>& rows, const Panels<Compute<S>>& weight_hh,
              int64_t chunk_rows, const Parallel& parallel)
      : s(s),
        H(H),
        options(options),
        cell(cell),
        rows(rows),
        weight_hh(weight_hh),
        chunk_rows(chunk_rows),
        parallel(parallel),
        tasks(tasks_for(parallel, chunk_rows * H * H, s.B / kTileRows)),
        du(2 * chunk_rows * H),
        states(options.leaky() ? 2 * s.B * H : 0),
        zeros(H),
        d0_block(tasks * kBlockRows * H) {
    zeros.fill_zero(H);
  }

  // The next chunk in the order of the adjoint; false when all steps are done.
  bool next() {
    if (done == s.T) return false;
    previous = current;
    parity ^= 1;
    current = s.reverse ? chunk_from(s, done, chunk_rows) : chunk_until(s, s.T - done, chunk_rows);
    for_each_task(parallel, tasks, [this](int task) {
      const RowRange range = rows_of_task(s, task, tasks);
      for (int64_t i = done; i < done + current.t1 - current.t0; ++i)
        step(task, s.step(s.T - 1 - i), range);
    });
    done += current.t1 - current.t0;
    return true;
  }

  const Chunk& chunk() const { return current; }
  // du of the current chunk: one row of H for each of its rows, in memory order of a packed
  // sequence.
  const Compute<S>* chunk_du() const { return du.get() + parity * chunk_rows * H; }

 private:
  using C = Compute<S>;

  void step(int task, int64_t t, RowRange range) {
    const int64_t end = smaller(range.end, s.rows_at(t)),
                  continuing = smaller(end, s.rows_continuing(t));
    step_rows(t, range.begin, continuing, H);
    step_rows(t, larger(range.begin, continuing), end,
              0);  // the rows' last step: nothing comes back from later
    if (rows.d0.data) before_first(task, t, larger(range.begin, s.rows_continued(t)), end);
  }

  void step_rows(int64_t t, int64_t begin, int64_t end, int64_t K) {
    AdjointBlock<S> block;
    for (int64_t b0 = begin; b0 < end; b0 += kBlockRows) {
      const int64_t count = smaller(kBlockRows, end - b0);
      for (int64_t r = 0; r < count; ++r) {
        const int64_t b = b0 + r, next = s.after(t);
        const bool linked = K > 0 && s.linked(next, b);
        block.arriving[r] = linked ? du_row(next, b) : zeros.get();
        block.du[r] = du_row(t, b);
        block.g[r] = rows.g.data ? s.row(rows.g, t, b) : nullptr;
        block.g_n[r] = K == 0 && rows.g_n.data ? rows.g_n.data + b * rows.g_n.row : nullptr;
        block.y[r] = s.row(rows.y, t, b);
        block.d_out[r] = rows.d.data ? s.row(rows.d, t, b) : nullptr;
        if (options.leaky()) {
          block.d_next[r] = linked ? ring().row(next, b) : zeros.get();
          block.d[r] = ring().row(t, b);
        }
      }
      multiply(weight_hh, K, count, block.arriving, nullptr, block.du,
               [&](int64_t j, int64_t last) { cell(block, count, j, last, options); });
    }
  }

  // d_{-1} for rows whose first step is t: the recursion once more, without g and without the
  // clamp.
  void before_first(int task, int64_t t, int64_t begin, int64_t end) {
    const C* arriving[kBlockRows];
    C* z[kBlockRows];
    for (int64_t b0 = begin; b0 < end; b0 += kBlockRows) {
      const int64_t count = smaller(kBlockRows, end - b0);
      for (int64_t r = 0; r < count; ++r) {
        arriving[r] = s.linked(t, b0 + r) ? du_row(t, b0 + r) : zeros.get();
        z[r] = d0_block.get() + (task * kBlockRows + r) * H;
      }
      multiply(weight_hh, H, count, arriving, nullptr, z, [&](int64_t first, int64_t last) {
        for_block<C>(count, first, last, [&](int64_t r, int64_t j, auto lanes) {
          const int64_t b = b0 + r;
          Vector<C> d = load(z[r] + j, lanes);
          if (options.leaky() && s.linked(t, b))
            d += options.rest * load(ring().row(t, b) + j, lanes);
          store(rows.d0.data + b * rows.d0.row + j, d, lanes);
        });
      });
    }
  }

  C* du_row(int64_t t, int64_t b) const {
    const bool now = t >= current.t0 && t < current.t1;
    const int64_t first = s.offset(now ? current.t0 : previous.t0);
    return du.get() + ((now ? parity : parity ^ 1) * chunk_rows + s.offset(t) - first + b) * H;
  }
  StateRing<C> ring() const { return {states.get(), s.B, H}; }

  const Schedule& s;
  const int64_t H;
  const StepOptions<C> options;
  const AdjointCell<S> cell;
  const AdjointRows<S> rows;
  const Panels<C> weight_hh;
  const int64_t chunk_rows;
  const Parallel& parallel;
  const int tasks;
  Buffer<C> du, states, zeros, d0_block;
  Chunk current{0, 0}, previous{0, 0};
  int parity = 0;
  int64_t done = 0;
};

template <class S>
void adjoint_scan(const ScanProblem<S>& p, const Parallel& parallel) {
  using C = Compute<S>;
  Buffer<C> panels(Panels<C>::size(p.H, p.H));
  const Panels<C> weight_hh{panels.get(), p.H, p.H, p.schedule.B <= kFewRows};
  weight_hh.pack(p.weight_hh);
  AdjointLoop<S> loop(p.schedule, p.H, StepOptions<C>(p.alpha, p.clip), adjoint_cell<S, GivenGate>,
                      {p.g, {}, p.gate, p.d, p.d0}, weight_hh, rows_per_chunk(p.schedule, p.H, p.H),
                      parallel);
  while (loop.next()) {
  }
}

// ---- tangent
// ----------------------------------------------------------------------------------------------------

template <class S>
class TangentLoop {
 public:
  TangentLoop(const ScanProblem<S>& problem, const Parallel& parallel)
      : p(problem),
        s(problem.schedule),
        parallel(parallel),
        tasks(tasks_for(parallel, s.rows() * p.H * p.H, s.B / kTileRows)),
        options(p.alpha, -1),
        panels(Panels<C>::size(p.H, p.H)),
        zeros(p.H),
        q0(s.B * p.H),
        states(2 * s.B * p.H),
        product(tasks * kBlockRows * p.H) {}

  void run() {
    weight_hh().pack_transposed(p.weight_hh);
    zeros.fill_zero(p.H);
    for (int64_t b = 0; p.d0_in.data && b < s.B; ++b)
      convert_row(p.d0_in.data + b * p.d0_in.row, q0.get() + b * p.H, p.H);
    for_each_task(parallel, tasks, [this](int task) {
      const RowRange range = rows_of_task(s, task, tasks);
      for (int64_t i = 0; i < s.T; ++i) step(task, s.step(i), range);
    });
  }

 private:
  using C = Compute<S>;

  void step(int task, int64_t t, RowRange range) {
    const int64_t end = smaller(range.end, s.rows_at(t));
    const C* arriving[kBlockRows];
    C* z[kBlockRows];
    for (int64_t b0 = range.begin; b0 < end; b0 += kBlockRows) {
      const int64_t count = smaller(kBlockRows, end - b0);
      for (int64_t r = 0; r < count; ++r) {
        arriving[r] = this->arriving(t, b0 + r);
        z[r] = product.get() + (task * kBlockRows + r) * p.H;
      }
      multiply(weight_hh(), p.H, count, arriving, nullptr, z, [&](int64_t first, int64_t last) {
        for_block<C>(count, first, last, [&](int64_t r, int64_t j, auto lanes) {
          const int64_t b = b0 + r;
          Vector<C> q = load(s.row(p.gate, t, b) + j, lanes) * load(z[r] + j, lanes);
          if (options.leaky()) q += options.rest * load(arriving[r] + j, lanes);
          q += load(s.row(p.g, t, b) + j, lanes);
          store(s.row(p.d, t, b) + j, q, lanes);
          store(ring().row(t, b) + j, rounded_to<S>(q), lanes);
        });
      });
    }
  }

  const C* arriving(int64_t t, int64_t b) const {
    if (!s.linked(t, b)) return zeros.get();
    if (b < s.rows_continued(t)) return ring().row(s.before(t), b);
    return p.d0_in.data ? q0.get() + b * p.H : zeros.get();
  }

  Panels<C> weight_hh() const { return {panels.get(), p.H, p.H, s.B <= kFewRows}; }
  StateRing<C> ring() const { return {states.get(), s.B, p.H}; }

  const ScanProblem<S>& p;
  const Schedule& s;
  const Parallel& parallel;
  const int tasks;
  const StepOptions<C> options;
  Buffer<C> panels, zeros, q0, states, product;
};

template <class S>
void tangent_scan(const ScanProblem<S>& problem, const Parallel& parallel) {
  TangentLoop<S>(problem, parallel).run();
}

TORCH_BPTT_KERNELS_END
