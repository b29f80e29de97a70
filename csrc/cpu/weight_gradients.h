// Sums over the rows of a chunk: dW_hh += du^T (m p), dW_ih += du^T x, dbias += sum of du,
// dalpha += sum of d (f - p).
//
// The first two are one matrix product each, the rows being the summed index: m p and x are copied
// into panels, du is read as it lies.
#pragma once

#include "team.h"

TORCH_BPTT_KERNELS_BEGIN

template <class S>
class WeightGradients {
 public:
  using P = Operand<S>;

  WeightGradients(const BackwardProblem<S>& problem, int64_t chunk_rows, int threads)
      : p(problem),
        s(problem.schedule),
        du_pairs(kPairs && products() ? Panels<P>::units(chunk_rows) * p.H : 0),
        panels_p(p.grad_weight_hh ? Panels<P>::size(chunk_rows, p.H) : 0),
        panels_x(p.grad_weight_ih ? Panels<P>::size(chunk_rows, p.I) : 0),
        wide_hh(kNarrow<S> && p.grad_weight_hh ? p.H * p.H : 0),
        wide_ih(kNarrow<S> && p.grad_weight_ih ? p.H * p.I : 0),
        column_sum(p.H),
        bias_total(p.grad_bias ? p.H : 0),
        masked(p.mask.data && p.grad_weight_hh ? threads * kMaskedRows * p.H : 0),
        zeros(p.H) {
    zeros.fill_zero(p.H);
    if (p.grad_bias) bias_total.fill_zero(p.H);
    if (p.grad_alpha) std::memset(p.grad_alpha, 0, uint64_t(p.H) * sizeof(C));
  }

  bool wanted() const { return products() || p.grad_bias || p.grad_alpha; }

  // The thread's share of what add() reads; du (rows of the chunk, H).
  void pack(const Chunk& chunk, const P* du, const Team& team) {
    const int64_t rows = s.offset(chunk.t1) - s.offset(chunk.t0);
    const auto pack_rows = [&](const Panels<P>& panels, const auto& row_of) {
      const Range mine = team.share(panels.count());
      if (mine.begin == mine.end) return;
      int64_t t = chunk.t0, b = 0;
      panels.pack(mine.begin, mine.end, [&](int64_t k) {
        const S* row = row_of(t, b, k);
        if (++b == s.rows_at(t)) b = 0, ++t;
        return row;
      });
    };
    if (p.grad_weight_hh)
      pack_rows({panels_p.get(), rows, p.H}, [&](int64_t t, int64_t b, int64_t k) {
        return p.mask.data ? entering(t, b, k, team) : arriving(t, b);
      });
    if (p.grad_weight_ih)
      pack_rows({panels_x.get(), rows, p.I}, [&](int64_t t, int64_t b, int64_t) {
        return static_cast<const S*>(s.row(p.x, t, b));
      });
    if constexpr (kPairs)
      if (products()) pair_rows(du, rows, columns_of(team));
  }

  // Adds the packed chunk to the sums, or starts them: the thread's share of the rows of dW. All
  // threads must have packed. d is read for the gradient of alpha alone.
  void add(const Chunk& chunk, const P* du, const Compute<S>* d, bool start,
           const Team& team) const {
    const int64_t rows = s.offset(chunk.t1) - s.offset(chunk.t0);
    if (p.grad_weight_hh)
      add_product({panels_p.get(), rows, p.H}, du, sums(wide_hh, p.grad_weight_hh), start, team);
    if (p.grad_weight_ih)
      add_product({panels_x.get(), rows, p.I}, du, sums(wide_ih, p.grad_weight_ih), start, team);
    if (p.grad_bias) add_bias(du, rows, columns_of(team));
    if (p.grad_alpha) add_alpha(chunk, d, columns_of(team));
  }

  // Rounds the sums of the narrow types into the outputs; all must have added.
  void finish() const {
    if constexpr (kNarrow<S>) {
      if (p.grad_weight_hh) convert_row(wide_hh.get(), p.grad_weight_hh, p.H * p.H);
      if (p.grad_weight_ih) convert_row(wide_ih.get(), p.grad_weight_ih, p.H * p.I);
    }
    if (p.grad_bias) convert_row(bias_total.get(), p.grad_bias, p.H);
  }

 private:
  using C = Compute<S>;
  using Unit = typename Product<P>::Unit;
  static constexpr int64_t kTerms = Product<P>::kTerms;
  static constexpr bool kPairs = kTerms > 1;
  static constexpr int64_t kMaskedRows = kTerms;  // as many as are packed at a time

  bool products() const { return p.grad_weight_hh || p.grad_weight_ih; }

  Range columns_of(const Team& team) const {
    const Range vectors = team.share((p.H + kLanes<C> - 1) / kLanes<C>);
    return {vectors.begin * kLanes<C>, smaller(vectors.end * kLanes<C>, p.H)};
  }

  const S* arriving(int64_t t, int64_t b) const {
    if (!s.kept(t, b)) return p.restart.data ? p.restart.data + b * p.restart.row : zeros.get();
    if (b < s.rows_continued(t)) return s.row(p.h, s.before(t), b);
    return p.h0.data ? p.h0.data + b * p.h0.row : zeros.get();
  }

  // m p_t, in the scratch of the k-th row of the chunk.
  const S* entering(int64_t t, int64_t b, int64_t k, const Team& team) const {
    S* to = masked.get() + (team.index * kMaskedRows + k % kMaskedRows) * p.H;
    const S *mask = p.mask.data + b * p.mask.row, *state = arriving(t, b);
    for_columns<C>(0, p.H, [&](int64_t j, auto lanes) {
      store(to + j, load(mask + j, lanes) * load(state + j, lanes), lanes);
    });
    return to;
  }

  void pair_rows(const P* du, int64_t rows, Range columns) const {
    for (int64_t k = 0; k < rows; k += kTerms) {
      const P* pair[] = {du + k * p.H, du + (k + 1) * p.H};
      for_columns<C>(columns.begin, columns.end, [&](int64_t j, auto lanes) {
        Unit units[kLanes<C>];
        Product<P>::gather(pair, rows - k, j, lanes, units);
        Unit* to = du_pairs.get() + k / kTerms * p.H + j;
        __builtin_memcpy(to, units, uint64_t(smaller(columns.end - j, kLanes<C>)) * sizeof(Unit));
      });
    }
  }

  void add_bias(const P* du, int64_t rows, Range columns) const {
    C* sum = column_sum.get();
    for (int64_t r = 0; r < rows; ++r) {
      for_columns<C>(columns.begin, columns.end, [&](int64_t j, auto lanes) {
        const Vector<C> term = load(du + r * p.H + j, lanes);
        store(sum + j, r == 0 ? term : load(sum + j, lanes) + term, lanes);
      });
    }
    add_columns(bias_total.get(), columns);
  }

  void add_alpha(const Chunk& chunk, const C* d, Range columns) const {
    C* sum = column_sum.get();
    bool first = true;
    for (int64_t t = chunk.t0; t < chunk.t1; ++t) {
      for (int64_t b = 0; b < s.rows_at(t); ++b, d += p.H) {
        const S *f = s.row(p.f, t, b), *state = arriving(t, b);
        for_columns<C>(columns.begin, columns.end, [&](int64_t j, auto lanes) {
          const Vector<C> term = load(d + j, lanes) * (load(f + j, lanes) - load(state + j, lanes));
          store(sum + j, first ? term : load(sum + j, lanes) + term, lanes);
        });
        first = false;
      }
    }
    add_columns(p.grad_alpha, columns);
  }

  // total += the sums of the chunk's columns, so that rounding grows with rows and chunks, not with
  // their product.
  void add_columns(C* total, Range columns) const {
    for_columns<C>(columns.begin, columns.end, [&](int64_t j, auto lanes) {
      store(total + j, load(total + j, lanes) + load(column_sum.get() + j, lanes), lanes);
    });
  }

  // sum (H, N) += du^T panels, or = where the sums start.
  void add_product(const Panels<P>& panels, const P* du, C* sum, bool start,
                   const Team& team) const {
    const Range mine = team.share((p.H + kTileRows - 1) / kTileRows);
    C* out[kTileRows];
    for (int64_t column = 0; column < panels.count(); ++column) {
      for (int64_t group = mine.begin; group < mine.end; ++group) {
        const int64_t j = group * kTileRows, width = smaller(kTileRows, p.H - j);
        Lines lines;  // of the sums so far, which are too many for the cache
        for (int64_t i = 0; i < width; ++i) {
          out[i] = sum + (j + i) * panels.N;
          lines.add(out[i], panels.first_column(column),
                    panels.first_column(column) + panels.columns(column));
        }
        const Unit* columns;
        if constexpr (kPairs)
          columns = du_pairs.get() + j;
        else
          columns = du + j;
        const auto tile = Tiles<P, Columns>::get(width, panels.vectors(column), false);
        tile({panels.K, &columns, p.H, panels.rows(column), panels.stride(column),
              start ? nullptr : out, out, panels.first_column(column), panels.columns(column),
              &lines, nullptr});
      }
    }
  }

  // float and double are summed in the output itself.
  static C* sums(const Buffer<C>& wide, S* output) {
    if constexpr (kNarrow<S>)
      return wide.get();
    else
      return output;
  }

  const BackwardProblem<S>& p;
  const Schedule& s;
  Buffer<Unit> du_pairs, panels_p, panels_x;
  Buffer<C> wide_hh, wide_ih, column_sum, bias_total;
  Buffer<S> masked, zeros;
};

TORCH_BPTT_KERNELS_END
