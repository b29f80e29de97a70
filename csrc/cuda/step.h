// One step of a loop: where the state that enters it lies, and what becomes of one element of the
// product. Every path runs these; they differ in how the product comes about.
#pragma once

#include "../core/cell.h"
#include "device.h"
#include "loops.h"

namespace torch_bptt::cuda {

// N elements of a row that follow each other. Of the last ones of a row only `count` exist.
template <class V, int N>
struct Elements {
  V of[N];
  TORCH_BPTT_DEVICE V& operator[](int e) { return of[e]; }
  TORCH_BPTT_DEVICE const V& operator[](int e) const { return of[e]; }
};
template <int N, class Body>
TORCH_BPTT_DEVICE void for_elements(int count, Body body) {
  TORCH_BPTT_UNROLL
  for (int e = 0; e < N; ++e)
    if (N == 1 || e < count) body(e);
}
template <int N, class S>
TORCH_BPTT_DEVICE Elements<Compute<S>, N> read_elements(const S* from, int count) {
  Elements<Compute<S>, N> values{};
  for_elements<N>(count, [&](int e) { values[e] = widen(from[e]); });
  return values;
}

// What elements need besides the product, as it lies in memory: nothing is computed with it before
// finish(), so that no thread waits for it before.
template <class S, int N>
struct Inputs {
  Elements<Compute<S>, N>
      few{};  // forward: the sum of the biases; adjoint: g_n, at a row's last step
  Elements<Compute<S>, N> c{};  // forward
  Elements<S, N> g{};           // adjoint, tangent; forward: noise
  Elements<S, N> gate{};        // adjoint, tangent
};

// The state that arrives at a row.
template <class S>
struct Arriving {
  const S* row;  // null: zeros
  bool carried;  // it is `state` of the step before (in the order of the loop)
};

// Step i in the order of the loop. ALIGNED: wherever N elements of a row are asked for, they are
// all there and are read and written 16 bytes at a time, to which they must be aligned.
template <class S, bool ALIGNED = false>
class Step : private StepRows {
 public:
  using C = Compute<S>;
  using StepRows::rows;

  TORCH_BPTT_DEVICE Step(const Loop<S>& loop, int64_t i) : StepRows(loop, i), l(loop) {}

  // N elements of a row, of which `count` exist; all of them where ALIGNED.
  template <int N, class V>
  static TORCH_BPTT_DEVICE Elements<V, N> load(const V* from, int count) {
    Elements<V, N> values{};
    if constexpr (ALIGNED) {
      for_pieces<V, N>([&](int first, int size) {
        const Words4 piece = load16(from + first);
        __builtin_memcpy(values.of + first, &piece, size);
      });
    } else {
      for_elements<N>(count, [&](int e) { values[e] = from[e]; });
    }
    return values;
  }
  template <int N, class V>
  static TORCH_BPTT_DEVICE void store(V* to, const Elements<V, N>& values, int count) {
    if constexpr (ALIGNED) {
      for_pieces<V, N>([&](int first, int size) {
        Words4 piece;
        __builtin_memcpy(&piece, values.of + first, size);
        store16(to + first, piece);
      });
    } else {
      for_elements<N>(count, [&](int e) { to[e] = values[e]; });
    }
  }

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

  // Elements [j, j + N) of what is multiplied by the weight in row b, of which `count` exist.
  template <int N>
  TORCH_BPTT_DEVICE Elements<S, N> entering(int64_t b, int64_t j, int count) const {
    const S *const row = arriving(b).row, *const factor = mask(b);
    if (!row) return {};
    Elements<S, N> values = load<N>(row + j, count);
    if (!factor) return values;
    const Elements<S, N> m = load<N>(factor + j, count);
    for_elements<N>(N, [&](int e) { values[e] = narrow<S>(widen(m[e]) * widen(values[e])); });
    return values;
  }

  // Elements [j, j + N) of row b, of which `count` exist. All N go the same way through every
  // option, so that they overlap.
  template <int N>
  TORCH_BPTT_DEVICE Inputs<S, N> inputs(int64_t b, int64_t j, int count) const {
    Inputs<S, N> in;
    if (b >= existing) return in;
    const auto add = [&](const S* from) {
      const Elements<S, N> more = load<N>(from, count);
      for_elements<N>(N, [&](int e) { in.few[e] += widen(more[e]); });
    };
    const S* const g = g_row(b);
    if (g) in.g = load<N>(g + j, count);
    if (l.pass == Pass::forward) {
      if (l.bias[0]) add(l.bias[0] + j);
      if (l.bias[1]) add(l.bias[1] + j);
      in.c = load<N>(c_row(b) + j, count);
    } else {
      if (l.g_n.data && b >= received) add(l.g_n.data + b * l.g_n.row + j);
      in.gate = load<N>(gate_row(b) + j, count);
    }
    return in;
  }

  // Brings closer what inputs() will read.
  TORCH_BPTT_DEVICE void prefetch(int64_t b, int64_t j) const {
    if (b >= existing) return;
    if (const S* const g = g_row(b)) prefetch_line(g + j);
    if (l.pass == Pass::forward)
      prefetch_line(c_row(b) + j);
    else
      prefetch_line(gate_row(b) + j);
  }

  // The product becomes the new state, which is written and returned. `arriving` are these elements
  // of arriving(b), read with alpha alone, and not in the adjoint.
  template <int N>
  TORCH_BPTT_DEVICE Elements<S, N> finish(int64_t b, int64_t j, int count,
                                          const Elements<C, N>& product,
                                          const Elements<C, N>& arriving,
                                          const Inputs<S, N>& in) const {
    if (l.pass == Pass::forward) return finish_forward(b, j, count, product, arriving, in);
    if (l.pass == Pass::tangent) return finish_tangent(b, j, count, product, arriving, in);
    if (b < existing) return finish_adjoint(b, j, count, product, in);
    finish_before_first(b, j, count, product);
    return {};
  }

 private:
  // The first element and the bytes of each of the 16 bytes that N elements take.
  template <class V, int N, class Body>
  static TORCH_BPTT_DEVICE void for_pieces(Body body) {
    constexpr int kSize = sizeof(Words4), kElements = kSize / sizeof(V);
    static_assert(N % kElements == 0);
    TORCH_BPTT_UNROLL
    for (int first = 0; first < N; first += kElements) body(first, kSize);
  }

  template <int N>
  static TORCH_BPTT_DEVICE Elements<S, N> stored(const Elements<C, N>& values) {
    Elements<S, N> rounded;
    for_elements<N>(N, [&](int e) { rounded[e] = narrow<S>(values[e]); });
    return rounded;
  }

  template <int N>
  TORCH_BPTT_DEVICE Elements<S, N> finish_forward(int64_t b, int64_t j, int count,
                                                  const Elements<C, N>& product,
                                                  const Elements<C, N>& arriving,
                                                  const Inputs<S, N>& in) const {
    const Schedule& s = l.schedule;
    Elements<C, N> h;
    for_elements<N>(N, [&](int e) { h[e] = in.few[e] + widen(in.g[e]) + in.c[e] + product[e]; });
    switch (l.activation) {
#define TORCH_BPTT_ENTRY(name, type)                                                   \
  case Activation::name:                                                               \
    for_elements<N>(N, [&](int e) { h[e] = type::template value<DeviceMath>(h[e]); }); \
    break;
      TORCH_BPTT_ACTIVATIONS(TORCH_BPTT_ENTRY)
#undef TORCH_BPTT_ENTRY
    }
    if (l.alpha) {
      store(s.row(l.f, t, b) + j, stored(h), count);
      const Elements<C, N> alpha = load<N>(l.alpha + j, count);
      for_elements<N>(N, [&](int e) { h[e] = leak(alpha[e], arriving[e], h[e]); });
    }
    const Elements<S, N> state = stored(h);
    store(s.row(l.state, t, b) + j, state, count);
    if (b >= handed_on) store(l.h_n + b * l.H + j, state, count);
    return state;
  }

  template <int N>
  TORCH_BPTT_DEVICE Elements<S, N> finish_tangent(int64_t b, int64_t j, int count,
                                                  const Elements<C, N>& product,
                                                  const Elements<C, N>& arriving,
                                                  const Inputs<S, N>& in) const {
    Elements<C, N> q;
    for_elements<N>(N, [&](int e) { q[e] = widen(in.gate[e]) * product[e]; });
    if (l.alpha) {
      const Elements<C, N> alpha = load<N>(l.alpha + j, count);
      for_elements<N>(N, [&](int e) { q[e] += (1 - alpha[e]) * arriving[e]; });
    }
    for_elements<N>(N, [&](int e) { q[e] += widen(in.g[e]); });
    const Elements<S, N> state = stored(q);
    store(l.schedule.row(l.state, t, b) + j, state, count);
    return state;
  }

  // What goes back over a link: (1 - alpha) d_{t+1} + m (du_{t+1} W_hh).
  template <int N>
  TORCH_BPTT_DEVICE Elements<C, N> going_back(int64_t b, int64_t j, int count,
                                              const Elements<C, N>& product, bool linked) const {
    Elements<C, N> d = product;
    if (l.mask.data) {
      const Elements<S, N> mask = load<N>(l.mask.data + b * l.mask.row + j, count);
      for_elements<N>(N, [&](int e) { d[e] *= widen(mask[e]); });
    }
    if (l.alpha && linked) {
      const Elements<C, N> next = load<N>(l.carried + b * l.H + j, count),
                           alpha = load<N>(l.alpha + j, count);
      for_elements<N>(N, [&](int e) { d[e] += (1 - alpha[e]) * next[e]; });
    }
    return d;
  }

  template <int N>
  TORCH_BPTT_DEVICE void add_restart(int64_t b, int64_t j, int count,
                                     const Elements<C, N>& d) const {
    C* const place = l.restart_sum + b * l.H + j;
    Elements<C, N> sum = load<N>(place, count);
    for_elements<N>(N, [&](int e) { sum[e] += d[e]; });
    store(place, sum, count);
  }

  template <int N>
  TORCH_BPTT_DEVICE Elements<S, N> finish_adjoint(int64_t b, int64_t j, int count,
                                                  const Elements<C, N>& product,
                                                  const Inputs<S, N>& in) const {
    const Schedule& s = l.schedule;
    Elements<C, N> d{};
    if (b < received) {
      const bool restarts = l.restart_sum && !s.kept(from, b);
      d = going_back(b, j, count, product, restarts || s.linked(from, b));
      if (restarts) {
        add_restart(b, j, count, d);
        d = {};
      }
    }
    for_elements<N>(N, [&](int e) { d[e] += widen(in.g[e]) + in.few[e]; });
    if (l.clip >= 0) for_elements<N>(N, [&](int e) { d[e] = clamp(d[e], C(l.clip)); });
    if (l.d_exact.data) store(s.row(l.d_exact, t, b) + j, d, count);
    if (l.d.data) store(s.row(l.d, t, b) + j, stored(d), count);
    Elements<C, N> gate;
    for_elements<N>(N, [&](int e) { gate[e] = widen(in.gate[e]); });
    if (!l.gate_given) {
      switch (l.activation) {
#define TORCH_BPTT_ENTRY(name, type)                                    \
  case Activation::name:                                                \
    for_elements<N>(N, [&](int e) { gate[e] = type::slope(gate[e]); }); \
    break;
        TORCH_BPTT_ACTIVATIONS(TORCH_BPTT_ENTRY)
#undef TORCH_BPTT_ENTRY
      }
    }
    if (l.alpha) {
      store(l.carried + b * l.H + j, d, count);
      if (!l.gate_given) {
        const Elements<C, N> alpha = load<N>(l.alpha + j, count);
        for_elements<N>(N, [&](int e) { gate[e] *= alpha[e]; });
      }
    }
    for_elements<N>(N, [&](int e) { d[e] *= gate[e]; });
    const Elements<S, N> state = stored(d);
    store(s.row(l.state, t, b) + j, state, count);
    return state;
  }

  // d before the row's first step: without g and without the clamp.
  template <int N>
  TORCH_BPTT_DEVICE void finish_before_first(int64_t b, int64_t j, int count,
                                             const Elements<C, N>& product) const {
    Elements<C, N> d = going_back(b, j, count, product, true);
    if (!l.schedule.kept(from, b)) {
      if (l.restart_sum) add_restart(b, j, count, d);
      d = {};
    }
    if (l.d0.data) store(l.d0.data + b * l.d0.row + j, stored(d), count);
  }

  // Rows of this step. That of noise or g may be absent.
  TORCH_BPTT_DEVICE const C* c_row(int64_t b) const {
    return l.c + (l.schedule.offset(t) + b - l.c_first) * l.H;
  }
  TORCH_BPTT_DEVICE const S* g_row(int64_t b) const {
    const Rows<const S>& g = l.pass == Pass::forward ? l.noise : l.g;
    return g.data ? l.schedule.row(g, t, b) : nullptr;
  }
  TORCH_BPTT_DEVICE const S* gate_row(int64_t b) const { return l.schedule.row(l.gate, t, b); }

  TORCH_BPTT_DEVICE static const S* given(const Rows<const S>& state, int64_t b) {
    return state.data ? state.data + b * state.row : nullptr;
  }

  const Loop<S>& l;
};

}  // namespace torch_bptt::cuda
