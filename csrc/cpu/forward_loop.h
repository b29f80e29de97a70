// x, h0, weights -> input projection -> recurrent loop -> h, h_n
#pragma once

#include "../core/cell.h"
#include "inner_products.h"
#include "state_rows.h"
#include "team.h"
#include "vector_math.h"

TORCH_BPTT_KERNELS_BEGIN

// Up to kBlockRows rows of one step.
template <class S>
struct ForwardBlock {
  using C = Compute<S>;
  const Operand<S>* arriving[kBlockRows];  // p_t
  const Operand<S>* entering[kBlockRows];  // m p_t: what is multiplied by W_hh
  C* z[kBlockRows];  // u_t, then z_t; the row of h itself but for narrow types
  S* h[kBlockRows];
  S* f[kBlockRows];      // leaky only
  C* state[kBlockRows];  // converted types only: h_t as it was rounded, ready for the next product
};

// z -> h for columns [begin, end) of the block's rows.
template <class S>
using ForwardCell = void (*)(const ForwardBlock<S>& block, int64_t rows, int64_t begin, int64_t end,
                             const Compute<S>* alpha);

template <class S, class A>
void forward_cell(const ForwardBlock<S>& block, int64_t rows, int64_t begin, int64_t end,
                  const Compute<S>* alpha) {
  using C = Compute<S>;
  for_block<C>(rows, begin, end, [&](int64_t r, int64_t j, auto lanes) {
    Vector<C> h = A::template value<VectorMath<C>>(load(block.z[r] + j, lanes));
    if (alpha) {
      store(block.f[r] + j, h, lanes);
      h = leak(load(alpha + j, lanes), load(block.arriving[r] + j, lanes), h);
    }
    store(block.h[r] + j, h, lanes);
    if constexpr (kConverted<S>) store(block.state[r] + j, rounded_to<S>(h), lanes);
  });
}

template <class S>
ForwardCell<S> forward_cell_of(Activation activation) {
  switch (activation) {
#define TORCH_BPTT_ENTRY(name, type) \
  case Activation::name:             \
    return forward_cell<S, type>;
    TORCH_BPTT_ACTIVATIONS(TORCH_BPTT_ENTRY)
#undef TORCH_BPTT_ENTRY
  }
  __builtin_unreachable();
}

// Copies rows that have no step after t to h_n.
template <class S>
void keep_final(const Schedule& s, int64_t t, const Share& share, const Rows<S>& h, S* h_n,
                int64_t H) {
  const int64_t end = smaller(share.rows.end, s.rows_at(t));
  for (int64_t b = larger(share.rows.begin, s.rows_continuing(t)); b < end; ++b)
    __builtin_memcpy(h_n + b * H + share.columns.begin, s.row(h, t, b) + share.columns.begin,
                     uint64_t(share.columns.end - share.columns.begin) * sizeof(S));
}

template <class S>
class ForwardLoop {
 public:
  ForwardLoop(const ForwardProblem<S>& problem, const Parallel& parallel)
      : p(problem),
        s(problem.schedule),
        parallel(parallel),
        cut(cut_steps<C>(parallel, s, p.H, s.rows() * p.H * (p.H + p.I))),
        chunk_rows(rows_per_chunk(s, p.I, p.H)),
        cell(forward_cell_of<S>(p.activation)),
        panels_ih(packed(p.I) ? Panels<P>::size(p.I, p.H) : 0),
        panels_hh(packed(p.H) ? Panels<P>::size(p.H, p.H) : 0),
        bias(p.H),
        zeros(p.H),
        h0(kConverted<S> && p.h0.data ? s.B * p.H : 0),
        restart(kConverted<S> && p.restart.data ? s.B * p.H : 0),
        masked(p.mask.data ? cut.threads * kBlockRows * p.H : 0),
        states(kConverted<S> ? 2 * s.B * p.H : 0),
        drive(kNarrow<S> ? cut.threads * chunk_rows * p.H : 0),
        x_block(kConverted<S> ? cut.threads * kBlockRows * p.I : 0) {}

  void run() {
    zeros.fill_zero(p.H);
    bias.fill_zero(p.H);
    for (const S* part : p.bias)
      for_columns<C>(0, part ? p.H : 0, [&](int64_t j, auto lanes) {
        store(bias.get() + j, load(bias.get() + j, lanes) + load(part + j, lanes), lanes);
      });
    if constexpr (kConverted<S>) {
      convert_state(p.h0, s.B, p.H, h0.get());
      convert_state(p.restart, s.B, p.H, restart.get());
    }
    run_team(parallel, cut.threads, [this](const Team& team) { run_thread(team); });
  }

 private:
  using C = Compute<S>;
  using P = Operand<S>;

  Panels<P> weight_ih() const { return {panels_ih.get(), p.I, p.H}; }
  Panels<P> weight_hh() const { return {panels_hh.get(), p.H, p.H, s.B <= kFewRows}; }

  // Whether a weight of K terms is packed.
  bool packed(int64_t K) const { return !takes_inner_products<C>(s.rows(), K); }

  // out = init + a weight^T, as in multiply().
  template <class Ahead, class After>
  void multiply_weight(const Panels<P>& panels, const S* weight, Range columns, int64_t rows,
                       const P* const* a, const C* const* init, C* const* out, Ahead ahead,
                       After after) const {
    if (packed(panels.K)) {
      multiply(panels, columns.begin, columns.end, panels.K, rows, a, init, out, ahead, after);
    } else {
      multiply_transposed(weight, columns.begin, columns.end, panels.K, rows, a, init, out,
                          panels.backwards);
      after(columns.begin, columns.end);
    }
  }

  void run_thread(const Team& team) {
    if (packed(p.I)) pack_transposed(weight_ih(), p.weight_ih, team);
    if (packed(p.H)) pack_transposed(weight_hh(), p.weight_hh, team);
    team.wait();
    const Share share = share_of<C>(cut, s, p.H, team);
    for (int64_t done = 0; done < s.T;) {
      const Chunk chunk =
          s.reverse ? chunk_until(s, s.T - done, chunk_rows) : chunk_from(s, done, chunk_rows);
      project(team, chunk, share);
      for (int64_t i = done; i < done + chunk.t1 - chunk.t0; ++i) {
        step(team, chunk, s.step(i), share);
        if (cut.columns) team.wait();
      }
      done += chunk.t1 - chunk.t0;
    }
  }

  // u = x W_ih^T + bias + noise for the rows of a chunk.
  void project(const Team& team, const Chunk& chunk, const Share& share) {
    const P* x[kBlockRows];
    const C* init[kBlockRows];
    C* u[kBlockRows];
    int rows = 0;
    const auto flush = [&] {
      multiply_weight(
          weight_ih(), p.weight_ih, share.columns, rows, x, init, u,
          [&](Lines& lines, int64_t r, int64_t end, int64_t j, int64_t j_end) {
            if (j == share.columns.begin)
              for (int64_t next = end; next < smaller(rows, end + kTileRows); ++next)
                lines.add(x[next], 0, p.I);
            for (; r < end; ++r) lines.add(u[r], j, j_end);
          },
          [](int64_t, int64_t) {});
      rows = 0;
    };
    for (int64_t t = chunk.t0; t < chunk.t1; ++t) {
      for (int64_t b = share.rows.begin; b < smaller(share.rows.end, s.rows_at(t)); ++b) {
        x[rows] = input(team, rows, s.row(p.x, t, b));
        u[rows] = drive_row(team, chunk, t, b);
        init[rows] = p.noise.data ? noisy_bias(u[rows], s.row(p.noise, t, b), share) : bias.get();
        if (++rows == kBlockRows) flush();
      }
    }
    flush();
  }

  // bias + noise, at `to`.
  const C* noisy_bias(C* to, const S* noise, const Share& share) const {
    for_columns<C>(share.columns.begin, share.columns.end, [&](int64_t j, auto lanes) {
      store(to + j, load(bias.get() + j, lanes) + load(noise + j, lanes), lanes);
    });
    return to;
  }

  // h_t of the thread's share.
  void step(const Team& team, const Chunk& chunk, int64_t t, const Share& share) {
    const int64_t end = smaller(share.rows.end, s.rows_at(t));
    ForwardBlock<S> block;
    for (int64_t b0 = share.rows.begin; b0 < end; b0 += kBlockRows) {
      const int64_t rows = smaller(kBlockRows, end - b0);
      for (int64_t r = 0; r < rows; ++r) {
        block.arriving[r] = arriving(t, b0 + r);
        block.entering[r] =
            p.mask.data ? entering(team, r, b0 + r, block.arriving[r]) : block.arriving[r];
        block.z[r] = drive_row(team, chunk, t, b0 + r);
        block.h[r] = s.row(p.h, t, b0 + r);
        if (p.alpha) block.f[r] = s.row(p.f, t, b0 + r);
        if constexpr (kConverted<S>) block.state[r] = ring().row(t, b0 + r);
      }
      multiply_weight(
          weight_hh().of_step(t), p.weight_hh, share.columns, rows, block.entering, block.z,
          block.z, [](auto&&...) {},
          [&](int64_t j, int64_t j_end) { cell(block, rows, j, j_end, p.alpha); });
    }
    keep_final(s, t, share, p.h, p.h_n, p.H);
  }

  const P* arriving(int64_t t, int64_t b) const {
    if (!s.kept(t, b)) return given(p.restart, restart, b);
    if (b >= s.rows_continued(t)) return given(p.h0, h0, b);
    if constexpr (kConverted<S>)
      return ring().row(s.before(t), b);
    else
      return s.row(p.h, s.before(t), b);
  }

  // Row b of a state that the caller gave.
  const P* given(const Rows<const S>& state, const Buffer<P>& converted, int64_t b) const {
    if (!state.data) return zeros.get();
    if constexpr (kConverted<S>)
      return converted.get() + b * p.H;
    else
      return state.data + b * state.row;
  }

  const P* entering(const Team& team, int64_t slot, int64_t b, const P* arriving) const {
    P* to = masked.get() + (team.index * kBlockRows + slot) * p.H;
    mask_row<S>(p.mask.data + b * p.mask.row, arriving, to, p.H);
    return to;
  }

  // Where u_t goes: into h itself, or for the narrow types into float32 scratch that lasts for one
  // chunk.
  C* drive_row(const Team& team, const Chunk& chunk, int64_t t, int64_t b) const {
    if constexpr (kNarrow<S>)
      return drive.get() + (team.index * chunk_rows + s.offset(t) - s.offset(chunk.t0) + b) * p.H;
    else
      return s.row(p.h, t, b);
  }

  const P* input(const Team& team, int slot, const S* x) const {
    if constexpr (kConverted<S>) {
      P* wide = x_block.get() + (team.index * kBlockRows + slot) * p.I;
      convert_row(x, wide, p.I);
      return wide;
    } else {
      return x;
    }
  }

  StateRing<P> ring() const { return {states.get(), s.B, p.H}; }

  const ForwardProblem<S>& p;
  const Schedule& s;
  const Parallel& parallel;
  const Cut cut;
  const int64_t chunk_rows;
  const ForwardCell<S> cell;
  Buffer<typename Product<P>::Unit> panels_ih, panels_hh;
  Buffer<C> bias;
  Buffer<P> zeros, h0, restart, masked, states;
  Buffer<C> drive;
  Buffer<P> x_block;
};

template <class S>
void rnn_forward(const ForwardProblem<S>& problem, const Parallel& parallel) {
  ForwardLoop<S>(problem, parallel).run();
}

TORCH_BPTT_KERNELS_END
