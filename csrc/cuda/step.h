// One step of a loop: where the state that enters it lies, and what becomes of one element of the
// product. Every path runs these; they differ in how the product comes about.
#pragma once

#include "../core/cell.h"
#include "device.h"
#include "loops.h"

namespace torch_bptt::cuda {

// What an element needs besides the product; it can be read before the product is there.
template <class S>
struct Inputs {
  Compute<S> added;  // forward: c + bias + noise; adjoint: g + g_n; tangent: g
  Compute<S> gate;   // adjoint, tangent
};

// The state that arrives at a row.
template <class S>
struct Arriving {
  const S* row;  // null: zeros
  bool carried;  // it is `state` of the step before (in the order of the loop)
};

// Step i in the order of the loop.
template <class S>
class Step {
 public:
  using C = Compute<S>;

  TORCH_BPTT_DEVICE Step(const Loop<S>& loop, int64_t i) : l(loop) {
    const Schedule& s = loop.schedule;
    const bool adjoint = loop.pass == Pass::adjoint;
    t = adjoint ? s.step(s.T - 1 - i) : s.step(i);
    from = adjoint ? s.after(t) : s.before(t);
    existing = i < s.T ? s.rows_at(t) : 0;
    received = i >= s.T ? 0 : adjoint ? s.rows_continuing(t) : s.rows_continued(t);
    // Rows of the step before that have no step here: the recurrence runs once more for them.
    closing = loop.before_first() && i > 0 ? s.rows_at(from) : 0;
    handed_on = loop.pass == Pass::forward && i < s.T ? s.rows_continuing(t) : 0;
  }

  // Rows [0, rows()) have something to do.
  TORCH_BPTT_DEVICE int64_t rows() const { return existing > closing ? existing : closing; }

  // What is multiplied by the weight, before the mask.
  TORCH_BPTT_DEVICE Arriving<S> arriving(int64_t b) const {
    const Schedule& s = l.schedule;
    if (l.pass == Pass::adjoint) {
      const bool linked = b >= existing ? l.restart_sum || s.kept(from, b)
                          : b >= received
                              ? false
                              : (l.restart_sum && !s.kept(from, b)) || s.linked(from, b);
      return {linked ? s.row(l.state, from, b) : nullptr, linked};
    }
    if (!s.kept(t, b)) return {given(l.restart, b), false};
    if (l.pass == Pass::tangent && !s.linked(t, b)) return {nullptr, false};
    if (b < received) return {s.row(l.state, from, b), true};
    return {given(l.first, b), false};
  }

  // The mask of what enters; null: ones. The adjoint has its mask behind the product.
  TORCH_BPTT_DEVICE const S* mask(int64_t b) const {
    return l.pass == Pass::adjoint ? nullptr : given(l.mask, b);
  }

  TORCH_BPTT_DEVICE Inputs<S> inputs(int64_t b, int64_t j) const {
    const Schedule& s = l.schedule;
    Inputs<S> in{0, 0};
    if (b >= existing) return in;
    if (l.pass == Pass::forward) {
      if (l.bias[0]) in.added += widen(l.bias[0][j]);
      if (l.bias[1]) in.added += widen(l.bias[1][j]);
      if (l.noise.data) in.added += widen(s.row(l.noise, t, b)[j]);
      in.added += l.c[(s.offset(t) + b - l.c_first) * l.H + j];
      return in;
    }
    if (l.g.data) in.added = widen(s.row(l.g, t, b)[j]);
    if (l.g_n.data && b >= received) in.added += widen(l.g_n.data[b * l.g_n.row + j]);
    in.gate = widen(s.row(l.gate, t, b)[j]);
    return in;
  }

  // The product of row b and column j becomes the new state, which is written and returned.
  // `arriving` is this element of arriving(b), read with alpha alone, and not in the adjoint.
  TORCH_BPTT_DEVICE S finish(int64_t b, int64_t j, C product, C arriving, Inputs<S> in) const {
    if (l.pass == Pass::forward) return finish_forward(b, j, product, arriving, in);
    if (l.pass == Pass::tangent) return finish_tangent(b, j, product, arriving, in);
    return b < existing ? finish_adjoint(b, j, product, in) : finish_before_first(b, j, product);
  }

 private:
  TORCH_BPTT_DEVICE S finish_forward(int64_t b, int64_t j, C product, C arriving,
                                     Inputs<S> in) const {
    const Schedule& s = l.schedule;
    C h = activate(l.activation, in.added + product);
    if (l.alpha) {
      s.row(l.f, t, b)[j] = narrow<S>(h);
      h = leak(l.alpha[j], arriving, h);
    }
    const S stored = narrow<S>(h);
    s.row(l.state, t, b)[j] = stored;
    if (b >= handed_on) l.h_n[b * l.H + j] = stored;
    return stored;
  }

  TORCH_BPTT_DEVICE S finish_tangent(int64_t b, int64_t j, C product, C arriving,
                                     Inputs<S> in) const {
    C q = in.gate * product;
    if (l.alpha) q += (1 - l.alpha[j]) * arriving;
    const S stored = narrow<S>(q + in.added);
    l.schedule.row(l.state, t, b)[j] = stored;
    return stored;
  }

  // What goes back over a link: (1 - alpha) d_{t+1} + m (du_{t+1} W_hh).
  TORCH_BPTT_DEVICE C going_back(int64_t b, int64_t j, C product, bool linked) const {
    if (l.mask.data) product *= widen(l.mask.data[b * l.mask.row + j]);
    if (l.alpha && linked) product += (1 - l.alpha[j]) * l.carried[b * l.H + j];
    return product;
  }

  TORCH_BPTT_DEVICE S finish_adjoint(int64_t b, int64_t j, C product, Inputs<S> in) const {
    const Schedule& s = l.schedule;
    C d = 0;
    if (b < received) {
      const bool restarts = l.restart_sum && !s.kept(from, b);
      d = going_back(b, j, product, restarts || s.linked(from, b));
      if (restarts) {
        l.restart_sum[b * l.H + j] += d;
        d = 0;
      }
    }
    d += in.added;
    if (l.clip >= 0) d = clamp(d, C(l.clip));
    if (l.d_exact.data) s.row(l.d_exact, t, b)[j] = d;
    if (l.d.data) s.row(l.d, t, b)[j] = narrow<S>(d);
    C gate = in.gate;
    if (!l.gate_given) gate = slope(l.activation, gate);
    if (l.alpha) {
      l.carried[b * l.H + j] = d;
      if (!l.gate_given) gate *= l.alpha[j];
    }
    const S stored = narrow<S>(gate * d);
    s.row(l.state, t, b)[j] = stored;
    return stored;
  }

  // d before the row's first step: without g and without the clamp.
  TORCH_BPTT_DEVICE S finish_before_first(int64_t b, int64_t j, C product) const {
    C d = going_back(b, j, product, true);
    if (!l.schedule.kept(from, b)) {
      if (l.restart_sum) l.restart_sum[b * l.H + j] += d;
      d = 0;
    }
    if (l.d0.data) l.d0.data[b * l.d0.row + j] = narrow<S>(d);
    return S{};
  }

  TORCH_BPTT_DEVICE static const S* given(const Rows<const S>& state, int64_t b) {
    return state.data ? state.data + b * state.row : nullptr;
  }

  const Loop<S>& l;
  int64_t t, from;    // this step, and the one whose state it goes on from
  int64_t existing;   // rows of this step
  int64_t received;   // of them, those that continue from `from`
  int64_t closing;    // rows of `from`, where the loop goes on past a row's first step
  int64_t handed_on;  // forward: rows that have a step after this one
};

}  // namespace torch_bptt::cuda
