// Matrix products for short and long rows: a register tile over weights packed into panels.
//
//   out[r][0..N) = init[r][0..N) + sum_k a[r][k] * b[k][0..N)
//
// b is packed once per call into panels a few vectors of columns wide, all k of a panel
// consecutive, so that the inner loop reads it in order; calls of a few steps read it as it lies.
// Rows of a, init and out are lists of pointers: strides, packed sequences, restarted rows (a row
// of zeros) and previous states need no copy and no branch in the loop.
//
// Every sum runs over k in order, in one chain per element, whatever the size of the tile: a row's
// result does not depend on the rows beside it. The exception are `Panels::few_rows`, for
// recurrences over one or two batch rows, where one chain would wait for the latency of each
// multiply-add; that is a property of the whole call, never of a tile.
#pragma once

#include "product.h"
#include "workspace.h"

TORCH_BPTT_KERNELS_BEGIN

// Register tiles: 6 rows x 4 vectors use 24 of the 32 registers of AVX-512, 6 x 2 use 12 of 16
// before it; the rest hold one row of b and the broadcast element of a.
constexpr int kTileRows = 6;
constexpr bool kManyRegisters = TORCH_BPTT_VECTOR_BYTES == 64;
constexpr int kPanelVectors = kManyRegisters ? 4 : 2;
constexpr int kPanelLines =  // cache lines in a row of a panel
    kPanelVectors * TORCH_BPTT_VECTOR_BYTES < 64 ? 1 : kPanelVectors * TORCH_BPTT_VECTOR_BYTES / 64;
constexpr bool kMaskedStores = TORCH_BPTT_VECTOR_BYTES == 64;

// For one or two rows wider panels: each broadcast then serves four multiply-adds, where two would
// leave the loads, not the arithmetic, as the limit. 8 sums (16 with AVX-512) hide the latency.
constexpr int kFewRows = 2;
constexpr int kFewRowsPanelVectors = 4;
template <int ROWS>
constexpr int kFewRowsChains = (kManyRegisters ? 4 : 2) / ROWS;

// Columns that any panel boundary is a multiple of.
template <class C>
constexpr int64_t kColumnUnit = kFewRowsPanelVectors * kLanes<C>;

// Rows given to one multiply(): a multiple of kTileRows whose pointers and states stay in the
// first-level cache.
constexpr int kBlockRows = 60;

// b (K, N) in panels. The last panel is only as wide as its columns need, filled up with zeros to
// whole vectors; so is the last unit of K where units are pairs.
template <class P>
struct Panels {
  using Unit = typename Product<P>::Unit;
  using C = Compute<P>;
  Unit* data;
  int64_t K, N;
  bool few_rows = false;           // the rows of a are at most kFewRows
  bool backwards = false;          // a product begins with the last panel
  const Unit* in_place = nullptr;  // b as it lies, whole vectors wide, read instead of panels

  // For step t of a recurrence over a few rows, which waits for the panels to arrive: every other
  // step begins with those that the step before has just read, of which the second-level cache has
  // kept its size (1 MiB: 100 steps of H = 512 took 15 % less time, of 650 and 1024 23 %).
  Panels of_step(int64_t t) const { return {data, K, N, few_rows, few_rows && t % 2, in_place}; }

  static int64_t units(int64_t K) { return (K + Product<P>::kTerms - 1) / Product<P>::kTerms; }
  static int64_t size(int64_t K, int64_t N) {
    return units(K) * ((N + kLanes<C> - 1) / kLanes<C>)*kLanes<C>;
  }
  int64_t width() const { return (few_rows ? kFewRowsPanelVectors : kPanelVectors) * kLanes<C>; }
  int64_t count() const { return panels(N); }
  int64_t panels(int64_t columns) const { return (columns + width() - 1) / width(); }
  int64_t first_column(int64_t panel) const { return panel * width(); }
  int64_t columns(int64_t panel) const { return smaller(width(), N - first_column(panel)); }
  int vectors(int64_t panel) const { return int((columns(panel) + kLanes<C> - 1) / kLanes<C>); }
  Unit* panel(int64_t panel) const { return data + first_column(panel) * units(K); }
  // What a product reads: the rows of a panel, and from one to the next.
  const Unit* rows(int64_t panel) const {
    return in_place ? in_place + first_column(panel) : this->panel(panel);
  }
  int64_t stride(int64_t panel) const { return in_place ? N : vectors(panel) * kLanes<C>; }

  // b[k] = row(k), the panels [begin, end)
  template <class Row>
  void pack(int64_t begin, int64_t end, const Row& row) const {
    using S = std::remove_pointer_t<decltype(row(0))>;
    constexpr int64_t kTerms = Product<P>::kTerms;
    for (int64_t k = 0; k < K; k += kTerms) {
      const int64_t terms = smaller(kTerms, K - k);
      S* rows[kTerms]{};
      for (int64_t i = 0; i < terms; ++i) rows[i] = row(k + i);
      for (int64_t p = begin; p < end; ++p) {
        Unit* target = panel(p) + k / kTerms * (vectors(p) * kLanes<C>);
        const int64_t first = first_column(p);
        for_columns<C>(0, columns(p), [&](int64_t j, auto lanes) {
          Product<P>::gather(rows, terms, first + j, lanes, target + j);
        });
      }
    }
  }

  // b = source^T, source (N, K), the panels [begin, end)
  template <class S>
  void pack_transposed(const S* source, int64_t begin, int64_t end) const {
    constexpr int L = kLanes<C>;
    constexpr int64_t terms = Product<P>::kTerms;
    for (int64_t p = begin; p < end; ++p) {
      const int64_t width = vectors(p) * L;
      for (int64_t v = 0; v < width; v += L) {
        const int64_t first = first_column(p) + v, rows = smaller(L, N - first);
        Unit* target = panel(p) + v;
        for (int64_t k = 0; k < units(K); k += L) {
          typename Product<P>::Units square[L];
          for (int64_t j = 0; j < L; ++j)
            square[j] = j < rows
                            ? Product<P>::read(source + (first + j) * K + k * terms, K - k * terms)
                            : typename Product<P>::Units{};
          transpose(square);
          for (int64_t i = 0; i < smaller(L, units(K) - k); ++i)
            __builtin_memcpy(target + (k + i) * width, &square[i], sizeof square[i]);
        }
      }
    }
  }

 private:
  // a[FIRST], b[FIRST], a[FIRST + 1], b[FIRST + 1], ...
  template <int FIRST>
  struct Interleaved {
    static constexpr int at(int i, int lanes) { return FIRST + i / 2 + i % 2 * lanes; }
  };

  // Interleaves the first half of the rows with the second half, log2(L) times.
  template <class V, int L>
  static TORCH_BPTT_INLINE void transpose(V (&rows)[L]) {
#pragma GCC unroll 8
    for (int stage = 1; stage < L; stage *= 2) {
      V next[L];
#pragma GCC unroll 16
      for (int i = 0; i < L / 2; ++i) {
        next[2 * i] = shuffle<C, Interleaved<0>>(rows[i], rows[i + L / 2]);
        next[2 * i + 1] = shuffle<C, Interleaved<L / 2>>(rows[i], rows[i + L / 2]);
      }
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) rows[i] = next[i];
    }
  }
};

// Cache lines that will be wanted when a tile is done. The tile asks for one with each of its first
// terms: asked for all at once they would wait for each other, and the tile for them.
class Lines {
 public:
  Lines() {}  // leaves `line` uninitialised, which would take time to clear
  template <class S>
  TORCH_BPTT_INLINE void add(const S* row, int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end && count < kMost; j += 64 / int64_t(sizeof(S)))
      line[count++] = row + j;
  }
  TORCH_BPTT_INLINE void prefetch(int64_t i) const { __builtin_prefetch(line[i]); }
  TORCH_BPTT_INLINE int64_t size() const { return count; }

 private:
  static constexpr int64_t kMost = 96;
  const void* line[kMost];
  int64_t count = 0;
};

// Where a tile finds the units a[r][k].
template <class P, int ROWS>
struct RowPointers {  // in rows of their own
  using Element = P;
  const P* rows[ROWS];
  TORCH_BPTT_INLINE RowPointers(const P* const* a, int64_t) {
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) rows[r] = a[r];
  }
  TORCH_BPTT_INLINE auto at(int r, int64_t k) const {
    return Product<P>::unit(rows[r] + k * Product<P>::kTerms);
  }
  TORCH_BPTT_INLINE auto last(int r, int64_t k) const {
    return Product<P>::last_unit(rows[r] + k * Product<P>::kTerms);
  }
};
template <class P, int ROWS>
struct Columns {  // side by side, a row of them for each k
  using Element = typename Product<P>::Unit;
  const Element* data;
  int64_t stride;
  TORCH_BPTT_INLINE Columns(const Element* const* a, int64_t stride) : data(a[0]), stride(stride) {}
  TORCH_BPTT_INLINE auto at(int r, int64_t k) const { return data[k * stride + r]; }
  TORCH_BPTT_INLINE auto last(int r, int64_t k) const { return at(r, k); }
};

// One tile: `columns` columns of out, from `column` on.
template <class P, class A>
struct TileProblem {
  int64_t K;          // terms
  const A* const* a;  // what Source wants
  int64_t stride = 0;
  const typename Product<P>::Unit* b;
  int64_t b_stride;
  const Compute<P>* const* init;  // null: zeros
  Compute<P>* const* out;
  int64_t column, columns;
  const Lines* lines;
  // As many lines as there are units of K, which will be wanted in the second-level cache; null:
  // none
  const typename Product<P>::Unit* ahead = nullptr;
};

// The end of a tile whose last vector is only partly columns, where storing a part of a vector
// takes branches. Apart from the tile, so that they do not cost the tile registers.
template <class C>
__attribute__((noinline)) void finish_narrow(int rows, int width, const C* sums,
                                             const C* const* init, C* const* out, int64_t column,
                                             int64_t columns) {
  for (int r = 0; r < rows; ++r) {
    for_columns<C>(0, columns, [&](int64_t j, auto lanes) {
      const Vector<C> sum = load(sums + r * width + j, lanes);
      store(out[r] + column + j, init ? load(init[r] + column + j, lanes) + sum : sum, lanes);
    });
  }
}

// ROWS x (VECTORS vectors) of out. The sum is added to init at the end, so that long sums over
// several chunks are sums of shorter ones.
template <class P, int ROWS, int VECTORS, int CHAINS, template <class, int> class Source>
void tile(const TileProblem<P, typename Source<P, ROWS>::Element>& problem) {
  using C = Compute<P>;
  using V = Vector<C>;
  using Units = typename Product<P>::Units;
  constexpr int L = kLanes<C>;
  constexpr int kTerms = Product<P>::kTerms;
  const Source<P, ROWS> source(problem.a, problem.stride);
  const typename Product<P>::Unit* b = problem.b;
  const int64_t b_stride = problem.b_stride;
  const int64_t whole = problem.K / kTerms;
  V sum[CHAINS][ROWS][VECTORS] = {};
  int64_t k = 0;
  const auto add = [&](int chain, const auto& a) {
    Units b_k[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) b_k[v] = Product<P>::units(b + v * L);
    b += b_stride;
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const auto a_k = a(r);
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v)
        sum[chain][r][v] = Product<P>::add(sum[chain][r][v], a_k, b_k[v]);
    }
  };
  const auto add_chains = [&] {
#pragma GCC unroll 4
    for (int c = 0; c < CHAINS; ++c) add(c, [&](int r) { return source.at(r, k + c); });
  };
  for (const int64_t end = smaller(whole / CHAINS, problem.lines->size()) * CHAINS; k < end;
       k += CHAINS) {
    problem.lines->prefetch(k / CHAINS);
    add_chains();
  }
  if constexpr (CHAINS == 1) {  // tiles of few rows have no time for it
    if (problem.ahead) {
      for (; k < whole; ++k) {
        __builtin_prefetch(problem.ahead + k * int64_t(64 / sizeof *problem.ahead), 0, 2);
        add_chains();
      }
    }
  }
  for (; k + CHAINS <= whole; k += CHAINS) add_chains();
  for (; k < whole; ++k) add(0, [&](int r) { return source.at(r, k); });
  if (problem.K % kTerms) add(0, [&](int r) { return source.last(r, k); });
#pragma GCC unroll 4
  for (int c = 1; c < CHAINS; ++c) {
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) sum[0][r][v] += sum[c][r][v];
    }
  }
  const C* const* init = problem.init;
  C* const* out = problem.out;
  if (!kMaskedStores && problem.columns < VECTORS * L) {
    C sums[ROWS * VECTORS * L];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) store(sums + (r * VECTORS + v) * L, sum[0][r][v], Whole{});
    }
    return finish_narrow(ROWS, VECTORS * L, sums, init, out, problem.column, problem.columns);
  }
  const auto finish = [&](int r, int v, auto lanes) {
    const int64_t j = problem.column + v * L;
    store(out[r] + j, init ? load(init[r] + j, lanes) + sum[0][r][v] : sum[0][r][v], lanes);
  };
  const Part last{int(problem.columns - (VECTORS - 1) * L)};
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS - 1; ++v) finish(r, v, Whole{});
    if constexpr (kMaskedStores)
      finish(r, VECTORS - 1, last);
    else
      finish(r, VECTORS - 1, Whole{});
  }
}

template <class P, template <class, int> class Source>
struct Tiles {
  using Tile = void (*)(const TileProblem<P, typename Source<P, 1>::Element>&);

  template <int ROWS, int CHAINS>
  static Tile row(int vectors) {
    if constexpr (ROWS <= kFewRows || kManyRegisters) {
      if (vectors == 4) return tile<P, ROWS, 4, CHAINS, Source>;
      if (vectors == 3) return tile<P, ROWS, 3, CHAINS, Source>;
    }
    return vectors == 2 ? tile<P, ROWS, 2, CHAINS, Source> : tile<P, ROWS, 1, CHAINS, Source>;
  }
  static Tile get(int64_t rows, int vectors, bool few_rows) {
    switch (rows) {
      case 1:
        return few_rows ? row<1, kFewRowsChains<1>>(vectors) : row<1, 1>(vectors);
      case 2:
        return few_rows ? row<2, kFewRowsChains<2>>(vectors) : row<2, 1>(vectors);
      case 3:
        return row<3, 1>(vectors);
      case 4:
        return row<4, 1>(vectors);
      case 5:
        return row<5, 1>(vectors);
      default:
        return row<6, 1>(vectors);
    }
  }
};

// Columns [begin, end) of out = init + a b for `rows` rows, K of the panels' K terms (0: out =
// init); begin is where a panel begins. ahead(lines, r, r_end, first column, last column) names the
// cache lines that will be wanted with this part of out. after(first column, last column) runs for
// every part of out, once it is done for all rows and while it is in the first-level cache.
template <class P, class Ahead, class After>
void multiply(const Panels<P>& b, int64_t begin, int64_t end, int64_t K, int64_t rows,
              const P* const* a, const Compute<P>* const* init, Compute<P>* const* out, Ahead ahead,
              After after) {
  const int64_t groups = (rows + kTileRows - 1) / kTileRows;
  const int64_t first = b.panels(begin), last = b.panels(end) - 1;
  for (int64_t i = first; i <= last; ++i) {
    const int64_t p = b.backwards ? first + last - i : i;
    const int64_t j = b.first_column(p), columns = b.columns(p);
    // All groups but the first find the panel in cache. Meanwhile they ask for the next one, unless
    // all panels stay in the second-level cache: 32 rows of H = 1760 took 2 to 7 % less time, of
    // H = 128 2 to 4 % more.
    const bool asks = groups > 1 && i < last && b.size(b.K, b.N) * sizeof(*b.data) > (1 << 19);
    for (int64_t g = 0; g < groups; ++g) {  // of nearly equal size: 32 rows are 6+6+5+5+5+5
      const int64_t r = rows * g / groups, r_end = rows * (g + 1) / groups;
      Lines lines;
      if (!b.few_rows) ahead(lines, r, r_end, j, j + columns);
      Tiles<P, RowPointers>::get(r_end - r, b.vectors(p), b.few_rows)(
          {.K = K,
           .a = a + r,
           .b = b.rows(p),
           .b_stride = b.stride(p),
           .init = init ? init + r : nullptr,
           .out = out + r,
           .column = j,
           .columns = columns,
           .lines = &lines,
           .ahead =
               asks ? b.rows(p + 1) + g % kPanelLines * b.units(K) * int64_t(64 / sizeof *b.data)
                    : nullptr});
    }
    if (groups > 1) after(j, j + columns);
  }
  // A few rows are still in cache, and one long block is better.
  if (groups == 1) after(begin, end);
}

TORCH_BPTT_KERNELS_END
