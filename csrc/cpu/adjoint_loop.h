// The linear recurrence of every backward pass, down in processing order; tangent_loop.h has its
// transpose.
//
//   d_t = g_t + link_{t+1} [ (1 - alpha) d_{t+1} + m ((gate_{t+1} d_{t+1}) W_hh) ]
//
// Where a row restarts, what the brackets hold goes to the gradient of the restart state instead.
#pragma once

#include "../core/cell.h"
#include "state_rows.h"
#include "team.h"

TORCH_BPTT_KERNELS_BEGIN

// Up to kBlockRows rows of one step.
template <class S>
struct AdjointBlock {
  using C = Compute<S>;
  using P = Operand<S>;
  const P* arriving[kBlockRows];  // du_{t+1} = gate_{t+1} d_{t+1}, zeros where the link is cut
  C* product[kBlockRows];         // du_{t+1} W_hh; du_t itself where that is of the same type
  P* du[kBlockRows];              // du_t
  const C* d_next[kBlockRows];    // d_{t+1}, leaky only
  C* d[kBlockRows];               // d_t for the next step, leaky only
  const S* mask[kBlockRows];      // masked only
  C* restart[kBlockRows];         // where the row restarts at t + 1: what goes back is added here
  C* d_exact[kBlockRows];         // null: d_t is not wanted in the type it is computed in
  const S* g[kBlockRows];         // null: zeros
  const S* g_n[kBlockRows];       // gradient of h_n where t is the row's last step; null elsewhere
  const S* y[kBlockRows];         // f(z_t), or the gate itself
  S* d_out[kBlockRows];           // null: d_t is not wanted
};

// What all steps have in common.
template <class C>
struct AdjointOptions {
  const C* alpha;  // null: ones
  C clip;          // negative: none
  bool masked;
};

template <class S>
using AdjointCell = void (*)(const AdjointBlock<S>& block, int64_t rows, int64_t begin, int64_t end,
                             const AdjointOptions<Compute<S>>& options);

// gate_t as a function of what forward kept: alpha f'(z_t) from f(z_t).
template <class A>
struct SlopeGate {
  static constexpr bool kStops = A::kStops;
  template <class V>
  static TORCH_BPTT_INLINE V of(V y) {
    return A::slope(y);
  }
  template <class V>
  static TORCH_BPTT_INLINE V of(V y, V alpha) {
    return alpha * A::slope(y);
  }
};
template <bool STOPS>
struct GivenGate {
  static constexpr bool kStops = STOPS;
  template <class V>
  static TORCH_BPTT_INLINE V of(V gate) {
    return gate;
  }
  template <class V>
  static TORCH_BPTT_INLINE V of(V gate, V) {
    return gate;
  }
};

// What goes back over a link, and what it adds up to at d_t's end of it:
//   (1 - alpha) d_{t+1} + m (du_{t+1} W_hh)
template <class C, class S, class Lanes>
TORCH_BPTT_INLINE Vector<C> going_back(const C* product, const S* mask, const C* d_next, int64_t j,
                                       Lanes lanes, const AdjointOptions<C>& options) {
  Vector<C> d = load(product + j, lanes);
  if (options.masked) d *= load(mask + j, lanes);
  if (options.alpha) d += (1 - load(options.alpha + j, lanes)) * load(d_next + j, lanes);
  return d;
}

// Most networks: no leak, mask or clamp, and no state to restart from. KEEP: d_t is wanted in the
// type it is computed in, for the norms.
template <class S, class Gate, bool KEEP>
void plain_adjoint_cell(const AdjointBlock<S>& block, int64_t rows, int64_t begin, int64_t end,
                        const AdjointOptions<Compute<S>>&) {
  using C = Compute<S>;
  for_block<C>(rows, begin, end, [&](int64_t r, int64_t j, auto lanes) {
    Vector<C> d = load(block.product[r] + j, lanes);
    if (block.g[r]) d += load(block.g[r] + j, lanes);
    if (block.g_n[r]) d += load(block.g_n[r] + j, lanes);
    if constexpr (KEEP) store(block.d_exact[r] + j, d, lanes);
    const Vector<C> gate = Gate::of(load(block.y[r] + j, lanes));
    store(block.du[r] + j, passed<Gate::kStops>(gate, d), lanes);
  });
}

template <class S, class Gate>
void adjoint_cell(const AdjointBlock<S>& block, int64_t rows, int64_t begin, int64_t end,
                  const AdjointOptions<Compute<S>>& given) {
  using C = Compute<S>;
  const AdjointOptions<C> options = given;
  for_block<C>(rows, begin, end, [&](int64_t r, int64_t j, auto lanes) {
    Vector<C> d = going_back(block.product[r], block.mask[r], block.d_next[r], j, lanes, options);
    if (C* sum = block.restart[r]) {
      store(sum + j, load(sum + j, lanes) + d, lanes);
      d = Vector<C>{};
    }
    if (block.g[r]) d += load(block.g[r] + j, lanes);
    if (block.g_n[r]) d += load(block.g_n[r] + j, lanes);
    if (options.clip >= 0) d = clamp(d, options.clip);
    if (block.d_exact[r]) store(block.d_exact[r] + j, d, lanes);
    if (block.d_out[r]) store(block.d_out[r] + j, d, lanes);
    Vector<C> gate = load(block.y[r] + j, lanes);
    if (options.alpha) {
      store(block.d[r] + j, d, lanes);
      gate = Gate::of(gate, load(options.alpha + j, lanes));
    } else {
      gate = Gate::of(gate);
    }
    store(block.du[r] + j, passed<Gate::kStops>(gate, d), lanes);
  });
}

template <class S>
struct AdjointCells {
  AdjointCell<S> plain{}, keeping{}, full;
};

template <class S>
AdjointCells<S> adjoint_cells_of(Activation activation) {
  switch (activation) {
#define TORCH_BPTT_ENTRY(name, type)                       \
  case Activation::name:                                   \
    return {plain_adjoint_cell<S, SlopeGate<type>, false>, \
            plain_adjoint_cell<S, SlopeGate<type>, true>, adjoint_cell<S, SlopeGate<type>>};
    TORCH_BPTT_ACTIVATIONS(TORCH_BPTT_ENTRY)
#undef TORCH_BPTT_ENTRY
  }
  __builtin_unreachable();
}

// What the adjoint reads and writes besides du; shared by adjoint_scan and rnn_backward.
template <class S>
struct AdjointRows {
  Rows<const S> g, g_n, y, mask;
  Rows<S> d;     // null: not wanted
  Rows<S> d0;    // null: not wanted
  S* restart{};  // (B, H) null: not wanted
};

// Chunks of steps in the order of the adjoint. du of two chunks exist at any time: the current one
// and the one processed before it, whose edge the current one starts from.
class AdjointWalk {
 public:
  AdjointWalk(const Schedule& s, int64_t chunk_rows) : s(s), chunk_rows(chunk_rows) {}

  // The next chunk; false when all steps are done.
  bool next() {
    done += current.t1 - current.t0;
    if (done == s.T) return false;
    previous = current;
    parity ^= 1;
    current = s.reverse ? chunk_from(s, done, chunk_rows) : chunk_until(s, s.T - done, chunk_rows);
    return true;
  }

  const Chunk& chunk() const { return current; }
  bool first() const { return done == 0; }
  // The i-th step of the chunk in processing order.
  int64_t step(int64_t i) const { return s.step(s.T - 1 - done - i); }
  int64_t steps() const { return current.t1 - current.t0; }
  int64_t rows() const { return s.offset(current.t1) - s.offset(current.t0); }

  // Where the rows of the chunk begin among those of two chunks.
  int64_t first_slot() const { return parity * chunk_rows; }
  // The place of row b of a step of this chunk or of the one before.
  int64_t slot(int64_t t, int64_t b) const {
    const bool now = t >= current.t0 && t < current.t1;
    const int64_t first = s.offset(now ? current.t0 : previous.t0);
    return (now ? parity : parity ^ 1) * chunk_rows + s.offset(t) - first + b;
  }

 private:
  const Schedule& s;
  const int64_t chunk_rows;
  Chunk current{0, 0}, previous{0, 0};
  int parity = 0;
  int64_t done = 0;
};

// A chunk of steps at a time, so that the caller can use the chunk's du_t while they are in cache.
// All threads must be done with a chunk before one begins the next but one: du of packed rows then
// lies where other rows' lay.
template <class S>
class AdjointLoop {
 public:
  using P = Operand<S>;

  AdjointLoop(const Schedule& s, int64_t H, const Compute<S>* alpha, double clip,
              const AdjointCells<S>& cells, const AdjointRows<S>& rows, const Panels<P>& weight_hh,
              int64_t chunk_rows, const Cut& cut, bool keep_d)
      : s(s),
        H(H),
        options{alpha, Compute<S>(clip), rows.mask.data != nullptr},
        plain(!alpha && clip < 0 && !rows.mask.data && !rows.d.data && !rows.restart),
        cell(!plain   ? cells.full
             : keep_d ? cells.keeping
                      : cells.plain),
        rows(rows),
        weight_hh(weight_hh),
        cut(cut),
        du(2 * chunk_rows * H),
        d_exact(keep_d ? 2 * chunk_rows * H : 0),
        keep_d(keep_d),
        states(alpha ? 2 * s.B * H : 0),
        restarts(rows.restart ? s.B * H : 0),
        zeros(H),
        products(cut.threads * kBlockRows * H) {
    zeros.fill_zero(H);
    if (rows.restart) restarts.fill_zero(s.B * H);
  }

  // The thread's share of the walk's chunk; the whole of it where columns are cut.
  void run(const AdjointWalk& walk, const Share& share, const Team& team) {
    for (int64_t i = 0; i < walk.steps(); ++i) {
      step(walk, walk.step(i), share, team);
      if (cut.columns) team.wait();
    }
  }

  // du of the walk's chunk: one row of H for each of its rows, in memory order of a packed
  // sequence.
  const P* chunk_du(const AdjointWalk& walk) const { return du.get() + walk.first_slot() * H; }
  // d of the walk's chunk, where the loop was told to keep it.
  const Compute<S>* chunk_d(const AdjointWalk& walk) const {
    return d_exact.get() + walk.first_slot() * H;
  }

  // Rounds the sums over all restarts into the output; all steps must be done.
  void finish() const {
    if (rows.restart) convert_row(restarts.get(), rows.restart, s.B * H);
  }

 private:
  using C = Compute<S>;

  void step(const AdjointWalk& walk, int64_t t, const Share& share, const Team& team) {
    const int64_t begin = share.rows.begin, end = smaller(share.rows.end, s.rows_at(t)),
                  continuing = smaller(end, s.rows_continuing(t));
    step_rows(walk, t, {begin, continuing}, share.columns, H, team);
    // The rows' last step: nothing comes back from later.
    step_rows(walk, t, {larger(begin, continuing), end}, share.columns, 0, team);
    if (!rows.d0.data && !rows.restart) return;
    const Range first{larger(begin, s.rows_continued(t)), end};
    if (first.begin >= first.end) return;
    if (cut.columns) team.wait();
    before_first(walk, t, first, share.columns, team);
  }

  void step_rows(const AdjointWalk& walk, int64_t t, Range range, Range columns, int64_t K,
                 const Team& team) {
    AdjointBlock<S> block;
    for (int64_t b0 = range.begin; b0 < range.end; b0 += kBlockRows) {
      const int64_t count = smaller(kBlockRows, range.end - b0);
      for (int64_t r = 0; r < count; ++r) {
        const int64_t b = b0 + r, next = s.after(t);
        const bool restarts = K > 0 && rows.restart && !s.kept(next, b);
        const bool linked = restarts || (K > 0 && s.linked(next, b));
        block.arriving[r] = linked ? du_row(walk, next, b) : zero_row();
        block.du[r] = du_row(walk, t, b);
        if constexpr (std::is_same_v<P, C>)
          block.product[r] = block.du[r];
        else
          block.product[r] = product_row(team, r);
        block.g[r] = rows.g.data ? s.row(rows.g, t, b) : nullptr;
        block.g_n[r] = K == 0 && rows.g_n.data ? rows.g_n.data + b * rows.g_n.row : nullptr;
        block.y[r] = s.row(rows.y, t, b);
        block.d_exact[r] = keep_d ? d_exact.get() + walk.slot(t, b) * H : nullptr;
        if (plain) continue;
        block.mask[r] = mask_row(b);
        block.restart[r] = restarts ? restart_row(b) : nullptr;
        block.d_out[r] = rows.d.data ? s.row(rows.d, t, b) : nullptr;
        if (options.alpha) {
          block.d_next[r] = linked ? ring().row(next, b) : zeros.get();
          block.d[r] = ring().row(t, b);
        }
      }
      multiply(
          weight_hh.of_step(t), columns.begin, columns.end, K, count, block.arriving, nullptr,
          block.product,
          [&](Lines& lines, int64_t r, int64_t end, int64_t j, int64_t j_end) {
            for (; r < end; ++r) {
              if (block.g[r]) lines.add(block.g[r], j, j_end);
              lines.add(block.y[r], j, j_end);
            }
          },
          [&](int64_t j, int64_t j_end) { cell(block, count, j, j_end, options); });
    }
  }

  // d_{-1} for rows whose first step is t: the recursion once more, without g and without the
  // clamp. It is zero for a row that restarts at once.
  void before_first(const AdjointWalk& walk, int64_t t, Range range, Range columns,
                    const Team& team) {
    const P* arriving[kBlockRows];
    C* z[kBlockRows];
    for (int64_t b0 = range.begin; b0 < range.end; b0 += kBlockRows) {
      const int64_t count = smaller(kBlockRows, range.end - b0);
      for (int64_t r = 0; r < count; ++r) {
        const bool wanted = rows.restart || s.kept(t, b0 + r);
        arriving[r] = wanted ? du_row(walk, t, b0 + r) : zero_row();
        z[r] = product_row(team, r);
      }
      multiply(
          weight_hh, columns.begin, columns.end, H, count, arriving, nullptr, z, [](auto&&...) {},
          [&](int64_t first, int64_t last) {
            for_block<C>(count, first, last, [&](int64_t r, int64_t j, auto lanes) {
              const int64_t b = b0 + r;
              Vector<C> d = going_back(z[r], mask_row(b), ring().row(t, b), j, lanes, options);
              const bool restarts = !s.kept(t, b);
              if (restarts && rows.restart)
                store(restart_row(b) + j, load(restart_row(b) + j, lanes) + d, lanes);
              if (restarts) d = Vector<C>{};
              if (rows.d0.data) store(rows.d0.data + b * rows.d0.row + j, d, lanes);
            });
          });
    }
  }

  P* du_row(const AdjointWalk& walk, int64_t t, int64_t b) const {
    return du.get() + walk.slot(t, b) * H;
  }
  const P* zero_row() const { return reinterpret_cast<const P*>(zeros.get()); }  // all bits zero
  C* product_row(const Team& team, int64_t r) const {
    return products.get() + (team.index * kBlockRows + r) * H;
  }
  C* restart_row(int64_t b) const { return restarts.get() + b * H; }
  const S* mask_row(int64_t b) const {
    return rows.mask.data ? rows.mask.data + b * rows.mask.row : nullptr;
  }
  StateRing<C> ring() const { return {states.get(), s.B, H}; }

  const Schedule& s;
  const int64_t H;
  const AdjointOptions<C> options;
  const bool plain;
  const AdjointCell<S> cell;
  const AdjointRows<S> rows;
  const Panels<P> weight_hh;
  const Cut cut;
  Buffer<P> du;
  Buffer<C> d_exact;
  const bool keep_d;
  Buffer<C> states;
  Buffer<C> restarts;
  Buffer<C> zeros;
  Buffer<C> products;
};

template <class S>
void adjoint_scan(const AdjointProblem<S>& p, const Parallel& parallel) {
  using C = Compute<S>;
  using P = Operand<S>;
  const Schedule& s = p.schedule;
  Buffer<typename Product<P>::Unit> panels(Panels<P>::size(p.H, p.H));
  const Panels<P> weight_hh{panels.get(), p.H, p.H, s.B <= kFewRows};
  const int64_t chunk_rows = rows_per_chunk(s, p.H, p.H);
  const Cut cut = cut_steps<C>(parallel, s, p.H, s.rows() * p.H * p.H);
  // d is wanted, so that it never is a plain one.
  const AdjointCells<S> cells{.full = p.gate_stops ? adjoint_cell<S, GivenGate<true>>
                                                   : adjoint_cell<S, GivenGate<false>>};
  AdjointLoop<S> loop(s, p.H, p.alpha, p.clip, cells,
                      {p.g, {}, p.gate, p.mask, p.d, p.d0, p.restart}, weight_hh, chunk_rows, cut,
                      false);
  run_team(parallel, cut.threads, [&](const Team& team) {
    pack(weight_hh, p.weight_hh, team);
    team.wait();
    const Share share = share_of<C>(cut, s, p.H, team);
    AdjointWalk walk(s, chunk_rows);
    while (walk.next()) {
      loop.run(walk, share, team);
      team.wait();
    }
  });
  loop.finish();
}

TORCH_BPTT_KERNELS_END
