// One step of a loop: where the state that enters it lies, and what becomes of one element of the
// product. Every path runs these; they differ in how the product comes about.
#pragma once

#include "../core/cell.h"
#include "device.h"
#include "loops.h"

namespace torch_bptt::cuda {

// ---- elements -----------------------------------------------------------------------------------

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
template <class S, int N>
TORCH_BPTT_DEVICE Elements<Compute<S>, N> widened(const Elements<S, N>& values) {
  Elements<Compute<S>, N> wide;
  for_elements<N>(N, [&](int e) { wide[e] = widen(values[e]); });
  return wide;
}
template <class S, class C, int N>
TORCH_BPTT_DEVICE Elements<S, N> narrowed(const Elements<C, N>& values) {
  Elements<S, N> rounded;
  for_elements<N>(N, [&](int e) { rounded[e] = narrow<S>(values[e]); });
  return rounded;
}

// What N elements of a row have at every step, so that a thread that keeps its elements reads it
// once. What the loop has not got stays zero, and is not used.
template <class S, int N>
struct Constants {
  Elements<Compute<S>, N> bias{};  // forward: the sum of both
  Elements<Compute<S>, N> alpha{};
  Elements<S, N> mask{};
};

// What they need at one step besides the product, as it lies in memory: nothing is computed with it
// before terms(), so that no thread waits for it before.
template <class S, int N>
struct Inputs {
  Elements<Compute<S>, N> c{};  // forward
  Elements<S, N> g{};           // adjoint, tangent; forward: noise
  Elements<S, N> gate{};        // adjoint, tangent
  Elements<S, N> g_n{};         // adjoint: at a row's last step
  bool linked = false;          // adjoint: something comes back from the step after,
  bool restarts = false;        // and it leaves to where the row restarts
};

// What finish() makes of inputs before the product is there.
template <class S, int N>
struct Terms {
  Elements<Compute<S>, N> added{};   // forward: the drive; adjoint, tangent: g
  Elements<Compute<S>, N> factor{};  // adjoint, tangent: alpha f'(z)
  bool linked, restarts;             // as in Inputs
};

// By how many bytes dense rows of a step lie behind those of the step before, in the order of the
// loop.
struct Pace {
  int64_t c, g, gate, state, rounded, exact;
};
template <class V>
TORCH_BPTT_DEVICE V* moved(V* at, int64_t bytes) {
  using Byte = std::conditional_t<std::is_const_v<V>, const char, char>;
  return reinterpret_cast<V*>(reinterpret_cast<Byte*>(at) + bytes);
}

// Where a thread's elements of a step lie: what inputs() reads, and what write() writes. Pointers
// to what the loop has not got are not used.
template <class S>
struct Sources {
  const Compute<S>* c{};
  const S *g{}, *gate{};

  TORCH_BPTT_DEVICE Sources after(int steps, const Pace& pace) const {
    return {moved(c, pace.c * steps), moved(g, pace.g * steps), moved(gate, pace.gate * steps)};
  }
};
template <class S>
struct Targets {
  S *state{}, *rounded{};  // forward with alpha: f(z); adjoint: d
  Compute<S>* exact{};     // adjoint: d

  TORCH_BPTT_DEVICE Targets after(int steps, const Pace& pace) const {
    return {moved(state, pace.state * steps), moved(rounded, pace.rounded * steps),
            moved(exact, pace.exact * steps)};
  }
};

// What becomes of the product.
template <class S, int N>
struct Finished {
  Elements<S, N> state{};
  Elements<Compute<S>, N> exact{};  // forward: f(z); adjoint: d; before they are rounded
};

// ---- steps --------------------------------------------------------------------------------------

// What a kernel knows of its loop when it is compiled; for the rest it asks at every step. DENSE:
// no packed rows. ALIGNED: wherever N elements of a row are asked for, all of them exist, and one
// access takes them, or several of 16 bytes: lies_well(). Asking, and finding each row anew, were
// four in five of the instructions that path `cluster` ran before it waited. (A type, not a value
// of a class: nvcc's host side fails to name kernels by those.)
constexpr int kAnyPass = -1;
template <int PASS = kAnyPass, bool DENSE = false, bool ALIGNED = false>
struct Known {
  static constexpr int kPass = PASS;
  static constexpr bool kDense = DENSE, kAligned = ALIGNED;
};

// The state that arrives at a row.
enum class Origin : int { nothing, state, first, restart };

// Step i in the order of the loop.
template <class S, class KNOWN = Known<>>
class Step {
 public:
  using C = Compute<S>;

  TORCH_BPTT_DEVICE Step(const Loop<S>& loop, int64_t i)
      : l(loop),
        s(schedule_of(loop)),
        pass(pass_of(loop)),
        i(i),
        of(s, pass, pass == Pass::adjoint && loop.before_first(), i) {}

  // Whether row b, one of the batch, has something to do.
  TORCH_BPTT_DEVICE bool has(int64_t b) const { return KNOWN::kDense || b < rows(); }
  // Rows [0, rows()) have.
  TORCH_BPTT_DEVICE int64_t rows() const { return of.rows(); }

  // N elements of a row, of which `count` exist; all of them where they lie aligned. FRESH: where
  // each step is a kernel, the one before may just have written them.
  template <int N, bool FRESH = false, class V>
  static TORCH_BPTT_DEVICE Elements<V, N> load(const V* from, int count) {
    Elements<V, N> values{};
    if constexpr (kTogether<V, N> > 0)
      for_pieces<V, N>([&](int first) {
        using Piece = Words<kTogether<V, N>>;
        const Piece* const at = reinterpret_cast<const Piece*>(from + first);
        const Piece piece = FRESH ? load_fresh(at) : load_words<sizeof(Piece)>(at);
        __builtin_memcpy(values.of + first, &piece, sizeof piece);
      });
    else
      for_elements<N>(count, [&](int e) { values[e] = FRESH ? load_fresh(from + e) : from[e]; });
    return values;
  }
  template <int N, class V>
  static TORCH_BPTT_DEVICE void store(V* to, const Elements<V, N>& values, int count) {
    if constexpr (kTogether<V, N> > 0)
      for_pieces<V, N>([&](int first) {
        Words<kTogether<V, N>> piece;
        __builtin_memcpy(&piece, values.of + first, sizeof piece);
        store_words(to + first, piece);
      });
    else
      for_elements<N>(count, [&](int e) { to[e] = values[e]; });
  }

  // ---- what arrives -----------------------------------------------------------------------------

  // What is multiplied by the weight, before the mask: of a row that the step has, as always below.
  TORCH_BPTT_DEVICE Origin origin(int64_t b) const {
    if (pass == Pass::adjoint) {
      const bool linked = !exists(b) ? l.restart_sum || s.kept(from(), b)
                          : !receives(b)
                              ? false
                              : (l.restart_sum && !s.kept(from(), b)) || s.linked(from(), b);
      return linked ? Origin::state : Origin::nothing;
    }
    if (!s.kept(t(), b)) return l.restart.data ? Origin::restart : Origin::nothing;
    if (pass == Pass::tangent && !s.linked(t(), b)) return Origin::nothing;
    if (receives(b)) return Origin::state;
    return l.first.data ? Origin::first : Origin::nothing;
  }
  // Null: zeros.
  TORCH_BPTT_DEVICE const S* arriving(int64_t b, Origin origin) const {
    if (origin == Origin::nothing) return nullptr;
    // Of the step before, in the order of the loop.
    if (origin == Origin::state) return s.row(l.state, from(), b);
    const Rows<const S>& given = origin == Origin::first ? l.first : l.restart;
    return given.data + b * given.row;
  }
  TORCH_BPTT_DEVICE const S* arriving(int64_t b) const { return arriving(b, origin(b)); }

  // Its elements, where `finished` is the step before.
  template <int N>
  TORCH_BPTT_DEVICE Elements<S, N> arriving(Origin origin, int64_t b, int64_t j, int count,
                                            const Finished<S, N>& finished) const {
    if (origin == Origin::state) return finished.state;
    const S* const row = arriving(b, origin);
    if (!row) return {};
    return load<N>(row + j, count);
  }

  // The mask of what enters; null: ones. The adjoint has its mask behind the product.
  TORCH_BPTT_DEVICE const S* mask(int64_t b) const {
    return masks_entering() ? l.mask.data + b * l.mask.row : nullptr;
  }
  TORCH_BPTT_DEVICE bool masks_entering() const { return pass != Pass::adjoint && l.mask.data; }

  // Elements [j, j + N) of what is multiplied by the weight in row b, of which `count` exist.
  template <int N>
  TORCH_BPTT_DEVICE Elements<S, N> entering(int64_t b, int64_t j, int count) const {
    const S *const row = arriving(b), *const factor = mask(b);
    if (!row) return {};
    const Elements<S, N> p = load<N>(row + j, count);
    if (!factor) return p;
    return masked(p, load<N>(factor + j, count));
  }
  // The same, of what arrives.
  template <int N>
  TORCH_BPTT_DEVICE Elements<S, N> entering(const Elements<S, N>& arriving,
                                            const Constants<S, N>& constants) const {
    if (!masks_entering()) return arriving;
    return masked(arriving, constants.mask);
  }

  // What the leak adds 1 - alpha times of: p, and in the adjoint d of the step after.
  template <int N>
  TORCH_BPTT_DEVICE Elements<C, N> leaking(int64_t b, int64_t j, int count) const {
    if (!l.alpha) return {};
    if (pass == Pass::adjoint) {
      if (exists(b) && !receives(b)) return {};
      return load<N, true>(l.carried + b * l.H + j, count);
    }
    const S* const row = arriving(b);
    if (!row) return {};
    return widened(load<N, true>(row + j, count));
  }
  // The same for the step after this one, at which `arriving` arrives.
  template <int N>
  TORCH_BPTT_DEVICE Elements<C, N> leaking(const Finished<S, N>& finished,
                                           const Elements<S, N>& arriving) const {
    if (pass == Pass::adjoint) return finished.exact;
    return widened(arriving);
  }

  // ---- what is read -----------------------------------------------------------------------------

  template <int N>
  TORCH_BPTT_DEVICE Constants<S, N> constants(int64_t b, int64_t j, int count) const {
    Constants<S, N> all = of_units<N>(l, j, count);
    all.mask = mask_of<N>(b, j, count);
    return all;
  }
  // Of these, what does not depend on the row.
  template <int N>
  static TORCH_BPTT_DEVICE Constants<S, N> of_units(const Loop<S>& loop, int64_t j, int count) {
    Constants<S, N> read;
    if (pass_of(loop) == Pass::forward) {
      TORCH_BPTT_UNROLL
      for (const S* const bias : loop.bias) {
        if (!bias) continue;
        const Elements<S, N> more = load<N>(bias + j, count);
        for_elements<N>(N, [&](int e) { read.bias[e] += widen(more[e]); });
      }
    }
    if (loop.alpha) read.alpha = load<N>(loop.alpha + j, count);
    return read;
  }
  template <int N>
  TORCH_BPTT_DEVICE Elements<S, N> mask_of(int64_t b, int64_t j, int count) const {
    if (!l.mask.data) return {};
    return load<N>(l.mask.data + b * l.mask.row + j, count);
  }

  // Nothing that the loop writes before this step is among it.
  template <int N>
  TORCH_BPTT_DEVICE Inputs<S, N> inputs(int64_t b, int64_t j, int count,
                                        const Sources<S>& at) const {
    Inputs<S, N> in;
    if (!exists(b)) return in;
    if (g().data) in.g = load<N>(at.g, count);
    if (pass == Pass::forward)
      in.c = load<N>(at.c, count);
    else
      in.gate = load<N>(at.gate, count);
    if (pass == Pass::adjoint) {
      if (receives(b)) {
        in.restarts = l.restart_sum && !s.kept(from(), b);
        in.linked = in.restarts || s.linked(from(), b);
      } else if (l.g_n.data) {
        in.g_n = load<N>(l.g_n.data + b * l.g_n.row + j, count);
      }
    }
    return in;
  }
  // Brings closer what inputs() will read.
  TORCH_BPTT_DEVICE void prefetch(int64_t b, const Sources<S>& at) const {
    if (!exists(b)) return;
    if (g().data) prefetch_line(at.g);
    if (pass == Pass::forward)
      prefetch_line(at.c);
    else
      prefetch_line(at.gate);
  }

  // Elements from j on of row b.
  TORCH_BPTT_DEVICE Sources<S> sources(int64_t b, int64_t j) const {
    Sources<S> at;
    if (!exists(b)) return at;
    if (g().data) at.g = s.row(g(), t(), b) + j;
    if (pass == Pass::forward)
      at.c = l.c + (s.offset(t()) + b - l.c_first) * l.H + j;
    else
      at.gate = s.row(l.gate, t(), b) + j;
    return at;
  }
  TORCH_BPTT_DEVICE Targets<S> targets(int64_t b, int64_t j) const {
    Targets<S> at;
    if (!exists(b)) return at;
    at.state = s.row(l.state, t(), b) + j;
    if (rounded().data) at.rounded = s.row(rounded(), t(), b) + j;
    if (l.d_exact.data) at.exact = s.row(l.d_exact, t(), b) + j;
    return at;
  }

  // ---- what becomes of the product --------------------------------------------------------------

  template <int N>
  TORCH_BPTT_DEVICE Terms<S, N> terms(const Inputs<S, N>& in,
                                      const Constants<S, N>& constants) const {
    Terms<S, N> made;
    made.linked = in.linked;
    made.restarts = in.restarts;
    if (pass == Pass::forward) {
      for_elements<N>(N,
                      [&](int e) { made.added[e] = constants.bias[e] + widen(in.g[e]) + in.c[e]; });
      return made;
    }
    made.added = widened(in.g);
    made.factor = widened(in.gate);
    if (pass == Pass::tangent) return made;
    for_elements<N>(N, [&](int e) { made.added[e] += widen(in.g_n[e]); });
    if (l.gate_given) return made;
    Elements<C, N>& gate = made.factor;
    switch (l.activation) {
#define TORCH_BPTT_ENTRY(name, type)                                    \
  case Activation::name:                                                \
    for_elements<N>(N, [&](int e) { gate[e] = type::slope(gate[e]); }); \
    break;
      TORCH_BPTT_ACTIVATIONS(TORCH_BPTT_ENTRY)
#undef TORCH_BPTT_ENTRY
    }
    if (l.alpha) for_elements<N>(N, [&](int e) { gate[e] *= constants.alpha[e]; });
    return made;
  }

  // `leaking` is used with alpha alone.
  template <int N>
  TORCH_BPTT_DEVICE Finished<S, N> finish(int64_t b, int64_t j, int count,
                                          const Elements<C, N>& product,
                                          const Elements<C, N>& leaking, const Terms<S, N>& terms,
                                          const Constants<S, N>& constants) const {
    if (pass == Pass::forward) return finish_forward(product, leaking, terms, constants);
    if (pass == Pass::tangent) return finish_tangent(product, leaking, terms, constants);
    const Elements<C, N> back = going_back(product, leaking, constants);
    if (exists(b)) return finish_adjoint(b, j, count, back, terms);
    return finish_before_first(b, j, count, back);
  }

  // Stores the results that are read after the loop, and where each step is a kernel by the next.
  template <int N>
  TORCH_BPTT_DEVICE void write(int64_t b, int64_t j, int count, const Finished<S, N>& finished,
                               const Targets<S>& at) const {
    if (!exists(b)) {
      if (l.d0.data) store(l.d0.data + b * l.d0.row + j, narrowed<S>(finished.exact), count);
      return;
    }
    store(at.state, finished.state, count);
    if (pass != Pass::tangent && rounded().data)
      store(at.rounded, narrowed<S>(finished.exact), count);
    if (pass == Pass::adjoint && l.d_exact.data) store(at.exact, finished.exact, count);
    if (pass == Pass::forward && !hands_on(b)) store(l.h_n + b * l.H + j, finished.state, count);
  }

  // Writes what the leak of the next step needs besides that, where another kernel runs it.
  template <int N>
  TORCH_BPTT_DEVICE void hand_over(int64_t b, int64_t j, int count,
                                   const Finished<S, N>& finished) const {
    if (pass == Pass::adjoint && l.alpha && exists(b))
      store(l.carried + b * l.H + j, finished.exact, count);
  }

 private:
  template <int N>
  TORCH_BPTT_DEVICE Finished<S, N> finish_forward(const Elements<C, N>& product,
                                                  const Elements<C, N>& leaking,
                                                  const Terms<S, N>& terms,
                                                  const Constants<S, N>& constants) const {
    Elements<C, N> h, f;
    for_elements<N>(N, [&](int e) { f[e] = terms.added[e] + product[e]; });
    switch (l.activation) {
#define TORCH_BPTT_ENTRY(name, type)                                                   \
  case Activation::name:                                                               \
    for_elements<N>(N, [&](int e) { f[e] = type::template value<DeviceMath>(f[e]); }); \
    break;
      TORCH_BPTT_ACTIVATIONS(TORCH_BPTT_ENTRY)
#undef TORCH_BPTT_ENTRY
    }
    h = f;
    if (l.alpha)
      for_elements<N>(N, [&](int e) { h[e] = leak(constants.alpha[e], leaking[e], h[e]); });
    return {narrowed<S>(h), f};
  }

  template <int N>
  TORCH_BPTT_DEVICE Finished<S, N> finish_tangent(const Elements<C, N>& product,
                                                  const Elements<C, N>& leaking,
                                                  const Terms<S, N>& terms,
                                                  const Constants<S, N>& constants) const {
    Elements<C, N> q;
    q = passed(terms.factor, product);
    if (l.alpha) for_elements<N>(N, [&](int e) { q[e] += (1 - constants.alpha[e]) * leaking[e]; });
    for_elements<N>(N, [&](int e) { q[e] += terms.added[e]; });
    return {narrowed<S>(q), {}};
  }

  // gate v, where a gate that stops lets nothing through.
  template <int N>
  TORCH_BPTT_DEVICE Elements<C, N> passed(const Elements<C, N>& gate, Elements<C, N> v) const {
    for_elements<N>(N, [&](int e) {
      v[e] = l.gate_stops ? torch_bptt::passed<true>(gate[e], v[e])
                          : torch_bptt::passed<false>(gate[e], v[e]);
    });
    return v;
  }

  // What goes back over a link: (1 - alpha) d_{t+1} + m (du_{t+1} W_hh).
  template <int N>
  TORCH_BPTT_DEVICE Elements<C, N> going_back(const Elements<C, N>& product,
                                              const Elements<C, N>& leaking,
                                              const Constants<S, N>& constants) const {
    Elements<C, N> d = product;
    if (l.mask.data) for_elements<N>(N, [&](int e) { d[e] *= widen(constants.mask[e]); });
    if (l.alpha) for_elements<N>(N, [&](int e) { d[e] += (1 - constants.alpha[e]) * leaking[e]; });
    return d;
  }

  template <int N>
  TORCH_BPTT_DEVICE void add_restart(int64_t b, int64_t j, int count,
                                     const Elements<C, N>& d) const {
    C* const place = l.restart_sum + b * l.H + j;
    Elements<C, N> sum = load<N, true>(place, count);
    for_elements<N>(N, [&](int e) { sum[e] += d[e]; });
    store(place, sum, count);
  }

  template <int N>
  TORCH_BPTT_DEVICE Finished<S, N> finish_adjoint(int64_t b, int64_t j, int count,
                                                  const Elements<C, N>& back,
                                                  const Terms<S, N>& terms) const {
    Elements<C, N> d{};
    if (terms.restarts)
      add_restart(b, j, count, back);
    else if (terms.linked)
      d = back;
    for_elements<N>(N, [&](int e) { d[e] += terms.added[e]; });
    if (l.clip >= 0) for_elements<N>(N, [&](int e) { d[e] = clamp(d[e], l.clip); });
    return {narrowed<S>(passed(terms.factor, d)), d};
  }

  // d before the row's first step: without g and without the clamp.
  template <int N>
  TORCH_BPTT_DEVICE Finished<S, N> finish_before_first(int64_t b, int64_t j, int count,
                                                       const Elements<C, N>& back) const {
    if (s.kept(from(), b)) return {{}, back};
    if (l.restart_sum) add_restart(b, j, count, back);
    return {};
  }

  template <int N>
  static TORCH_BPTT_DEVICE Elements<S, N> masked(Elements<S, N> values,
                                                 const Elements<S, N>& mask) {
    for_elements<N>(N, [&](int e) { values[e] = narrow<S>(widen(mask[e]) * widen(values[e])); });
    return values;
  }

  // Noise or g, either of which may be absent; f or d, the same.
  TORCH_BPTT_DEVICE const Rows<const S>& g() const { return pass == Pass::forward ? l.noise : l.g; }
  TORCH_BPTT_DEVICE const Rows<S>& rounded() const { return pass == Pass::forward ? l.f : l.d; }

  // This step, and the one whose state it goes on from.
  // (As `of` has them, but for dense rows hardly anyone asks.)
  TORCH_BPTT_DEVICE int64_t t() const { return down() ? s.T - 1 - i : i; }
  TORCH_BPTT_DEVICE int64_t from() const { return down() ? t() + 1 : t() - 1; }
  TORCH_BPTT_DEVICE bool down() const { return s.reverse != (pass == Pass::adjoint); }
  // What `of` says of row b. Dense rows are all alike.
  TORCH_BPTT_DEVICE bool exists(int64_t b) const {
    return KNOWN::kDense ? pass != Pass::adjoint || i < s.T : b < of.existing;
  }
  TORCH_BPTT_DEVICE bool receives(int64_t b) const {
    return KNOWN::kDense ? i > 0 && exists(b) : b < of.received;
  }
  TORCH_BPTT_DEVICE bool hands_on(int64_t b) const {
    return KNOWN::kDense ? i + 1 < s.T : b < of.handed_on;
  }

  // What is known replaces what the loop says, which lets the compiler drop the rest.
  static TORCH_BPTT_DEVICE Pass pass_of(const Loop<S>& loop) {
    return KNOWN::kPass == kAnyPass ? loop.pass : Pass(KNOWN::kPass);
  }
  static TORCH_BPTT_DEVICE Schedule schedule_of(const Loop<S>& loop) {
    Schedule schedule = loop.schedule;
    if (KNOWN::kDense) schedule.offsets = schedule.lengths = nullptr;
    return schedule;
  }
  // Bytes that one access takes of N elements; 0: it takes one element.
  template <class V, int N>
  static constexpr int kTogether = !KNOWN::kAligned || N == 1 ? 0
                                   : N * int(sizeof(V)) < 16  ? N * int(sizeof(V))
                                                              : 16;
  template <class V, int N, class Body>
  static TORCH_BPTT_DEVICE void for_pieces(Body body) {
    TORCH_BPTT_UNROLL
    for (int first = 0; first < N; first += kTogether<V, N> / int(sizeof(V))) body(first);
  }

  const Loop<S>& l;
  const Schedule s;
  const Pass pass;
  const int64_t i;
  const StepRows of;
};

// ---- what kernels know --------------------------------------------------------------------------

// Whether all that a step touches of a loop lies aligned for `elements` at a time, which divide H.
template <class S>
bool lies_well(const Loop<S>& l, int elements) {
  const auto at = [&]<class V>(const V* data, int64_t step = 0, int64_t row = 0) {
    const int64_t all = elements * int64_t(sizeof(V)), bytes = all < 16 ? all : 16;
    return reinterpret_cast<uintptr_t>(data) % bytes == 0 &&
           step * int64_t(sizeof(V)) % bytes == 0 && row * int64_t(sizeof(V)) % bytes == 0;
  };
  const auto rows_lie = [&](const auto&... rows) {
    return (at(rows.data, rows.step, rows.row) && ...);
  };
  const auto vectors_lie = [&](const auto*... data) { return (at(data) && ...); };
  return l.H % elements == 0 && rows_lie(l.mask, l.noise, l.g, l.gate, l.first, l.restart, l.g_n) &&
         rows_lie(l.state, l.f, l.d, l.d_exact, l.d0) &&
         vectors_lie(l.alpha, l.c, l.bias[0], l.bias[1], l.h_n, l.restart_sum, l.carried);
}

template <class S>
Pace pace_of(const Loop<S>& l) {
  const bool forward = l.pass == Pass::forward;
  const int onward = l.schedule.reverse == (l.pass == Pass::adjoint) ? 1 : -1;
  const auto bytes = [&]<class V>(const Rows<V>& rows) {
    return rows.data ? onward * rows.step * int(sizeof(V)) : 0;
  };
  return {onward * l.schedule.B * l.H * int(sizeof(Compute<S>)),
          bytes(forward ? l.noise : l.g),
          bytes(l.gate),
          bytes(l.state),
          bytes(forward ? l.f : l.d),
          bytes(l.d_exact)};
}

// Has `run` start a kernel for as many steps at a time as one may run.
template <class Run>
Error run_in_parts(Steps steps, Run run) {
  for (Steps part = steps; part.begin < steps.end; part.begin = part.end) {
    part.end = part.begin + kMostSteps < steps.end ? part.begin + kMostSteps : steps.end;
    if (Error error = run(part)) return error;
  }
  return nullptr;
}

// Has `run` start the kernel that knows most of such a loop, of those for each pass:
// run(Known<>{}). Dense rows that lie well have kernels of their own. Threads take `elements` at a
// time.
template <class S, class Run>
Error run_knowing(const Loop<S>& loop, int elements, Run run) {
  const bool simple = !loop.schedule.offsets && lies_well(loop, elements);
  const auto run_pass = [&](auto any_rows, auto simple_rows) {
    return simple ? run(simple_rows) : run(any_rows);
  };
  switch (loop.pass) {
#define TORCH_BPTT_ENTRY(name) \
  case Pass::name:             \
    return run_pass(Known<int(Pass::name)>{}, Known<int(Pass::name), true, true>{});
    TORCH_BPTT_ENTRY(forward)
    TORCH_BPTT_ENTRY(adjoint)
    TORCH_BPTT_ENTRY(tangent)
#undef TORCH_BPTT_ENTRY
  }
  return "no such pass";
}

}  // namespace torch_bptt::cuda
