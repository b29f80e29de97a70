// Matrix products for short and long rows: a register tile over weights packed into panels.
//
//   out[r][0..N) = init[r][0..N) + sum_k a[r][k] * b[k][0..N)
//
// b is packed once per call into panels a few vectors of columns wide, all k of a panel
// consecutive, so that the inner loop reads it in order. Rows of a, init and out are lists of
// pointers: strides, packed sequences, restarted rows (a row of zeros) and previous states need no
// copy and no branch in the loop.
//
// Every sum runs over k in order, in one chain per element, whatever the size of the tile: a row's
// result does not depend on the rows beside it. The exception are `Panels::few_rows`, for
// recurrences over one or two batch rows, where one chain would wait for the latency of each
// multiply-add; that is a property of the whole call, never of a tile.
#pragma once

#include "workspace.h"

TORCH_BPTT_KERNELS_BEGIN

// Register tiles: 6 rows x 4 vectors use 24 of the 32 registers of AVX-512, 6 x 2 use 12 of 16
// before it; the rest hold one row of b and the broadcast element of a.
constexpr int kTileRows = 6;
constexpr bool kManyRegisters = TORCH_BPTT_VECTOR_BYTES == 64;
constexpr int kPanelVectors = kManyRegisters ? 4 : 2;

// For one or two rows wider panels: each broadcast then serves four multiply-adds, where two would
// leave the loads, not the arithmetic, as the limit. 8 sums (16 with AVX-512) hide the latency.
constexpr int kFewRows = 2;
constexpr int kFewRowsPanelVectors = 4;
template <int ROWS>
constexpr int kFewRowsChains = (kManyRegisters ? 4 : 2) / ROWS;

// Rows given to one multiply(): a multiple of kTileRows whose pointers and states stay in the
// first-level cache.
constexpr int kBlockRows = 60;

// b (K, N) in panels. The last panel is only as wide as its columns need, filled up with zeros to
// whole vectors.
template <class C>
struct Panels {
  using Element = C;
  C* data;
  int64_t K, N;
  bool few_rows = false;  // the rows of a are at most kFewRows

  static int64_t size(int64_t K, int64_t N) {
    return K * ((N + kLanes<C> - 1) / kLanes<C>)*kLanes<C>;
  }
  int64_t width() const { return (few_rows ? kFewRowsPanelVectors : kPanelVectors) * kLanes<C>; }
  int64_t count() const { return (N + width() - 1) / width(); }
  int64_t first_column(int64_t panel) const { return panel * width(); }
  int64_t columns(int64_t panel) const { return smaller(width(), N - first_column(panel)); }
  int vectors(int64_t panel) const { return int((columns(panel) + kLanes<C> - 1) / kLanes<C>); }
  C* panel(int64_t panel) const { return data + first_column(panel) * K; }

  // b[k][0..N) = source[0..N), restricted to the panels [begin, end).
  template <class S>
  void pack_row(int64_t k, const S* source, int64_t begin, int64_t end) const {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t width = vectors(p) * kLanes<C>;
      C* target = panel(p) + k * width;
      const S* from = source + first_column(p);
      for_columns<C>(0, columns(p), [&](int64_t j, auto lanes) {
        store(target + j, load(from + j, lanes), Whole{});
      });
    }
  }

  // b = source (K, N)
  template <class S>
  void pack(const S* source) const {
    for (int64_t k = 0; k < K; ++k) pack_row(k, source + k * N, 0, count());
  }

  // b = transpose of source (N, K)
  template <class S>
  void pack_transposed(const S* source) const {
    constexpr int L = kLanes<C>;
    for (int64_t p = 0; p < count(); ++p) {
      const int64_t width = vectors(p) * L;
      for (int64_t v = 0; v < width; v += L) {
        const int64_t first = first_column(p) + v;
        const int n = int(smaller(L, N - first));
        C* target = panel(p) + v;
        int64_t k = 0;
        for (; k + L <= K; k += L) {  // a square of L x L, read and written in whole vectors
          C square[L][L];
          for (int j = 0; j < L; ++j) {
            const V row = j < n ? load(source + (first + j) * K + k, Whole{}) : V{};
            store(square[j], row, Whole{});
          }
          for (int i = 0; i < L; ++i) {
            C column[L];
            for (int j = 0; j < L; ++j) column[j] = square[j][i];
            store(target + (k + i) * width, load(column, Whole{}), Whole{});
          }
        }
        for (; k < K; ++k) {
          C column[L] = {};
          for (int j = 0; j < n; ++j) column[j] = load(source + (first + j) * K + k, Part{1})[0];
          store(target + k * width, load(column, Whole{}), Whole{});
        }
      }
    }
  }

 private:
  using V = Vector<C>;
};

// Where a tile finds a[r][k].
template <class C, int ROWS>
struct RowPointers {  // in rows of their own
  const C* rows[ROWS];
  TORCH_BPTT_INLINE explicit RowPointers(const C* const* a) {
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) rows[r] = a[r];
  }
  TORCH_BPTT_INLINE C at(int r, int64_t k) const { return rows[r][k]; }
};
template <class C, int ROWS>
struct Interleaved {  // side by side: a[k * ROWS + r]
  const C* data;
  TORCH_BPTT_INLINE explicit Interleaved(const C* const* a) : data(a[0]) {}
  TORCH_BPTT_INLINE C at(int r, int64_t k) const { return data[k * ROWS + r]; }
};

template <class C>
using Tile = void (*)(int64_t K, const C* const* a, const C* b, const C* const* init, C* const* out,
                      int64_t column, int64_t columns);

// The end of a tile whose last vector is only partly columns. Apart from the tile, so that its
// branches do not cost the tile registers.
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

// ROWS x (VECTORS vectors) of out, from column `column` on; init null: zeros. The sum is added to
// init at the end, so that long sums over several chunks are sums of shorter ones.
template <class C, int ROWS, int VECTORS, int CHAINS, template <class, int> class Source>
void tile(int64_t K, const C* const* a, const C* b, const C* const* init, C* const* out,
          int64_t column, int64_t columns) {
  constexpr int L = kLanes<C>;
  using V = Vector<C>;
  const Source<C, ROWS> source(a);
  V sum[CHAINS][ROWS][VECTORS] = {};
  int64_t k = 0;
  for (; k + CHAINS <= K; k += CHAINS) {
#pragma GCC unroll 4
    for (int c = 0; c < CHAINS; ++c) {
      V b_k[VECTORS];
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) b_k[v] = load(b + (c * VECTORS + v) * L, Whole{});
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) {
        const C a_k = source.at(r, k + c);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) sum[c][r][v] += a_k * b_k[v];
      }
    }
    b += CHAINS * VECTORS * L;
  }
  for (; k < K; ++k, b += VECTORS * L) {
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) sum[0][r][v] += source.at(r, k) * load(b + v * L, Whole{});
    }
  }
#pragma GCC unroll 4
  for (int c = 1; c < CHAINS; ++c) {
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) sum[0][r][v] += sum[c][r][v];
    }
  }
  if (columns < VECTORS * L) {
    C sums[ROWS * VECTORS * L];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) store(sums + (r * VECTORS + v) * L, sum[0][r][v], Whole{});
    }
    return finish_narrow(ROWS, VECTORS * L, sums, init, out, column, columns);
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) {
      const int64_t j = column + v * L;
      store(out[r] + j, init ? load(init[r] + j, Whole{}) + sum[0][r][v] : sum[0][r][v], Whole{});
    }
  }
}

template <class C, template <class, int> class Source>
struct Tiles {
  template <int ROWS, int CHAINS>
  static Tile<C> row(int vectors) {
    if constexpr (ROWS <= kFewRows || kManyRegisters) {
      if (vectors == 4) return tile<C, ROWS, 4, CHAINS, Source>;
      if (vectors == 3) return tile<C, ROWS, 3, CHAINS, Source>;
    }
    return vectors == 2 ? tile<C, ROWS, 2, CHAINS, Source> : tile<C, ROWS, 1, CHAINS, Source>;
  }
  static Tile<C> get(int64_t rows, int vectors, bool few_rows) {
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

// out = init + a b for `rows` rows, K of the panels' K terms (0: out = init). after(first column,
// last column) runs for every part of out, once it is done for all rows and while it is in the
// first-level cache.
template <class C, class After>
void multiply(const Panels<C>& b, int64_t K, int64_t rows,
              const typename Panels<C>::Element* const* a,
              const typename Panels<C>::Element* const* init,
              typename Panels<C>::Element* const* out, After after) {
  const int64_t groups = (rows + kTileRows - 1) / kTileRows;
  for (int64_t p = 0; p < b.count(); ++p) {
    const int64_t j = b.first_column(p), columns = b.columns(p);
    for (int64_t g = 0; g < groups; ++g) {  // of nearly equal size: 32 rows are 6+6+5+5+5+5
      const int64_t r = rows * g / groups, count = rows * (g + 1) / groups - r;
      Tiles<C, RowPointers>::get(count, b.vectors(p), b.few_rows)(
          K, a + r, b.panel(p), init ? init + r : nullptr, out + r, j, columns);
    }
    if (groups > 1) after(j, j + columns);
  }
  if (groups == 1) after(0, b.N);  // a few rows are still in cache, and one long block is better
}

TORCH_BPTT_KERNELS_END
