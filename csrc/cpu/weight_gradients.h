// Sums over the rows of a chunk: dW_hh += du^T (m p), dW_ih += du^T x, dbias += sum of du,
// dalpha += sum of d (f - p).
//
// The first two are one matrix product each, the rows being the summed index: m p and x are copied
// into panels, du is read as it lies. Where the batch has parts, each of them is summed by itself.
#pragma once

#include "team.h"

TORCH_BPTT_KERNELS_BEGIN

// What is summed together: the whole batch by all threads, or one part of it by one of them.
struct Summed {
  int64_t part;
  int64_t scratch;  // each that works at the same time has its own
  const Team& team;
};

template <class S>
class WeightGradients {
 public:
  using P = Operand<S>;

  WeightGradients(const BackwardProblem<S>& problem, int64_t chunk_rows, int threads)
      : p(problem),
        s(problem.schedule),
        part_rows(chunk_rows / p.parts),
        du_pairs(p, kPairs && products() ? Panels<P>::units(part_rows) * p.H : 0, threads),
        panels_p(p, p.grad_weight_hh ? Panels<P>::size(part_rows, p.H) : 0, threads),
        panels_x(p, p.grad_weight_ih ? Panels<P>::size(part_rows, p.I) : 0, threads),
        column_sum(p, p.H, threads),
        wide_hh(kNarrow<S> && p.grad_weight_hh ? p.parts * p.H * p.H : 0),
        wide_ih(kNarrow<S> && p.grad_weight_ih ? p.parts * p.H * p.I : 0),
        bias_total(p.grad_bias ? p.parts * p.H : 0),
        masked(p.mask.data && p.grad_weight_hh ? threads * kMaskedRows * p.H : 0),
        zeros(p.H) {
    zeros.fill_zero(p.H);
    if (p.grad_bias) bias_total.fill_zero(p.parts * p.H);
    if (p.grad_alpha) std::memset(p.grad_alpha, 0, uint64_t(p.parts * p.H) * sizeof(C));
  }

  bool wanted() const { return products() || p.grad_bias || p.grad_alpha; }

  // Adds a chunk to the sums; with `start` sets them to it. Each thread does its share of the
  // parts, or with one part its share of the rows of dW. du and d have a row of H for each row of
  // the chunk; d is read for the gradient of alpha alone.
  void add(const Chunk& chunk, const P* du, const Compute<S>* d, bool start, const Team& team) {
    if (p.parts == 1) {
      const Summed all{0, 0, team};
      pack(chunk, du, all, team.index);
      team.wait();
      add(chunk, du, d, start, all);
      return;
    }
    Barrier none;
    const Team alone(0, 1, none);
    const Range mine = team.share(p.parts);
    for (int64_t part = mine.begin; part < mine.end; ++part) {
      const Summed one{part, team.index, alone};
      pack(chunk, du, one, team.index);
      add(chunk, du, d, start, one);
    }
  }

  // Rounds the sums of the narrow types into the outputs; all must have added.
  void finish() const {
    if constexpr (kNarrow<S>) {
      if (p.grad_weight_hh) convert_row(wide_hh.get(), p.grad_weight_hh, p.parts * p.H * p.H);
      if (p.grad_weight_ih) convert_row(wide_ih.get(), p.grad_weight_ih, p.parts * p.H * p.I);
    }
    if (p.grad_bias) convert_row(bias_total.get(), p.grad_bias, p.parts * p.H);
  }

 private:
  // Scratch of the same size for each that works at the same time.
  template <class E>
  class Scratch {
   public:
    Scratch(const BackwardProblem<S>& p, int64_t size, int threads)
        : size(size), all((p.parts == 1 ? 1 : threads) * size) {}
    E* of(const Summed& summed) const { return all.get() + summed.scratch * size; }

   private:
    const int64_t size;
    Buffer<E> all;
  };

  // The thread's share of what add() reads.
  void pack(const Chunk& chunk, const P* du, const Summed& summed, int thread) {
    const int64_t rows = rows_of(chunk);
    const auto pack_rows = [&](const Panels<P>& panels, const auto& row_of) {
      const Range mine = summed.team.share(panels.count());
      if (mine.begin == mine.end) return;
      int64_t t = chunk.t0, b = summed.part;
      panels.pack(mine.begin, mine.end, [&](int64_t k) {
        const S* row = row_of(t, b, k);
        if ((b += p.parts) >= s.rows_at(t)) b = summed.part, ++t;
        return row;
      });
    };
    if (p.grad_weight_hh)
      pack_rows({panels_p.of(summed), rows, p.H}, [&](int64_t t, int64_t b, int64_t k) {
        return p.mask.data ? entering(t, b, k, thread) : arriving(t, b);
      });
    if (p.grad_weight_ih)
      pack_rows({panels_x.of(summed), rows, p.I}, [&](int64_t t, int64_t b, int64_t) {
        return static_cast<const S*>(s.row(p.x, t, b));
      });
    if constexpr (kPairs)
      if (products()) pair_rows(du, rows, summed);
  }

  // Adds the packed chunk. All threads of the team must have packed.
  void add(const Chunk& chunk, const P* du, const Compute<S>* d, bool start,
           const Summed& summed) const {
    const int64_t rows = rows_of(chunk);
    if (p.grad_weight_hh)
      add_product({panels_p.of(summed), rows, p.H}, du,
                  sums(wide_hh, p.grad_weight_hh) + summed.part * p.H * p.H, start, summed);
    if (p.grad_weight_ih)
      add_product({panels_x.of(summed), rows, p.I}, du,
                  sums(wide_ih, p.grad_weight_ih) + summed.part * p.H * p.I, start, summed);
    if (p.grad_bias) add_bias(du, rows, summed);
    if (p.grad_alpha) add_alpha(chunk, d, summed);
  }

  using C = Compute<S>;
  using Unit = typename Product<P>::Unit;
  static constexpr int64_t kTerms = Product<P>::kTerms;
  static constexpr bool kPairs = kTerms > 1;
  static constexpr int64_t kMaskedRows = kTerms;  // as many as are packed at a time

  bool products() const { return p.grad_weight_hh || p.grad_weight_ih; }

  // Rows of a part in a chunk, and the k-th of them among those of the whole chunk.
  int64_t rows_of(const Chunk& chunk) const {
    return (s.offset(chunk.t1) - s.offset(chunk.t0)) / p.parts;
  }
  template <class E>
  const E* row(const E* chunk, int64_t k, const Summed& summed) const {
    return chunk + (k * p.parts + summed.part) * p.H;
  }

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
  const S* entering(int64_t t, int64_t b, int64_t k, int thread) const {
    S* to = masked.get() + (thread * kMaskedRows + k % kMaskedRows) * p.H;
    const S *mask = p.mask.data + b * p.mask.row, *state = arriving(t, b);
    for_columns<C>(0, p.H, [&](int64_t j, auto lanes) {
      store(to + j, load(mask + j, lanes) * load(state + j, lanes), lanes);
    });
    return to;
  }

  void pair_rows(const P* du, int64_t rows, const Summed& summed) const {
    const Range columns = columns_of(summed.team);
    for (int64_t k = 0; k < rows; k += kTerms) {
      const P* pair[] = {row(du, k, summed), row(du, k + 1, summed)};
      for_columns<C>(columns.begin, columns.end, [&](int64_t j, auto lanes) {
        Unit units[kLanes<C>];
        Product<P>::gather(pair, rows - k, j, lanes, units);
        Unit* to = du_pairs.of(summed) + k / kTerms * p.H + j;
        __builtin_memcpy(to, units, uint64_t(smaller(columns.end - j, kLanes<C>)) * sizeof(Unit));
      });
    }
  }

  void add_bias(const P* du, int64_t rows, const Summed& summed) const {
    const Range columns = columns_of(summed.team);
    C* sum = column_sum.of(summed);
    for (int64_t r = 0; r < rows; ++r) {
      const P* terms = row(du, r, summed);
      for_columns<C>(columns.begin, columns.end, [&](int64_t j, auto lanes) {
        const Vector<C> term = load(terms + j, lanes);
        store(sum + j, r == 0 ? term : load(sum + j, lanes) + term, lanes);
      });
    }
    add_columns(sum, bias_total.get() + summed.part * p.H, columns);
  }

  void add_alpha(const Chunk& chunk, const C* d, const Summed& summed) const {
    const Range columns = columns_of(summed.team);
    C* sum = column_sum.of(summed);
    int64_t r = 0;
    for (int64_t t = chunk.t0; t < chunk.t1; ++t) {
      for (int64_t b = summed.part; b < s.rows_at(t); b += p.parts, ++r) {
        const S *f = s.row(p.f, t, b), *state = arriving(t, b);
        const C* factors = row(d, r, summed);
        for_columns<C>(columns.begin, columns.end, [&](int64_t j, auto lanes) {
          const Vector<C> term =
              load(factors + j, lanes) * (load(f + j, lanes) - load(state + j, lanes));
          store(sum + j, r == 0 ? term : load(sum + j, lanes) + term, lanes);
        });
      }
    }
    add_columns(sum, p.grad_alpha + summed.part * p.H, columns);
  }

  // total += the sums of the chunk's columns, so that rounding grows with rows and chunks, not with
  // their product.
  static void add_columns(const C* sum, C* total, Range columns) {
    for_columns<C>(columns.begin, columns.end, [&](int64_t j, auto lanes) {
      store(total + j, load(total + j, lanes) + load(sum + j, lanes), lanes);
    });
  }

  // sum (H, N) += du^T panels, or = where the sums start.
  void add_product(const Panels<P>& panels, const P* du, C* sum, bool start,
                   const Summed& summed) const {
    const Range mine = summed.team.share((p.H + kTileRows - 1) / kTileRows);
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
        int64_t stride = p.H;
        if constexpr (kPairs) {
          columns = du_pairs.of(summed) + j;
        } else {
          columns = row(du, 0, summed) + j;
          stride *= p.parts;
        }
        const auto tile = Tiles<P, Columns>::get(width, panels.vectors(column), false);
        tile({.K = panels.K,
              .a = &columns,
              .stride = stride,
              .b = panels.rows(column),
              .b_stride = panels.stride(column),
              .init = start ? nullptr : out,
              .out = out,
              .column = panels.first_column(column),
              .columns = panels.columns(column),
              .lines = &lines});
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
  const int64_t part_rows;  // of a chunk at most
  Scratch<Unit> du_pairs, panels_p, panels_x;
  Scratch<C> column_sum;
  Buffer<C> wide_hh, wide_ih, bias_total;
  Buffer<S> masked, zeros;
};

TORCH_BPTT_KERNELS_END
