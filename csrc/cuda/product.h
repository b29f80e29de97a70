// The product of a step where the weight stays on the chip from the first step to the last, and
// what enters it. Path `block` has only the tensor cores' from here.
#pragma once

#include "device.h"
#include "step.h"
#include "tiles.h"

namespace torch_bptt::cuda {

// How 16 units are multiplied with 8 rows. Either way a thread has 4 registers of each chunk of the
// weight; register i begins with element `k` of unit `unit`.

// Tensor cores. float is rounded to tf32, each weight and each state once. The sum runs in CHAINS
// of instructions that wait for the one before: a warp that has few tiles under way needs more.
template <class S, int CHAINS>
class TensorProduct {
 public:
  static constexpr int kElements = 4 / sizeof(S);  // of a register
  static TORCH_BPTT_DEVICE int unit(int lane, int, int i) { return lane / 4 + 8 * (i & 1); }
  static TORCH_BPTT_DEVICE int k(int lane, int chunk, int i) {
    return (chunk * 8 + lane % 4 + 4 * (i >> 1)) * kElements;
  }
  static TORCH_BPTT_DEVICE S rounded(S value) {
    if constexpr (sizeof(S) == 4)
      return as_float(to_tf32(value));
    else
      return value;
  }

  // Two chunks of the rows, which have them at `rows`.
  struct Piece {
    uint32_t of[4];
  };
  static constexpr bool kReadAhead = true;  // of a product: the registers suffice
  static TORCH_BPTT_DEVICE Piece read(const unsigned char* rows, int row_bytes, int lane) {
    Piece piece;
    warp_load_matrices(piece.of, rows + lane % 8 * row_bytes + lane / 8 * 16);
    return piece;
  }
  // Adds the chunks 2 pair and 2 pair + 1. The compiler has to know `pair`, or whether it is even.
  TORCH_BPTT_DEVICE void add(int pair, const uint32_t (&even)[4], const uint32_t (&odd)[4],
                             const Piece& piece) {
    const int chain = pair * 2 % CHAINS;
    warp_multiply<S>(sums[chain], even, {piece.of[0], piece.of[1]});
    warp_multiply<S>(sums[chain + 1], odd, {piece.of[2], piece.of[3]});
  }

  // For unit lane / 4 + 8 (i >> 1) and row 2 (lane % 4) + (i & 1).
  TORCH_BPTT_DEVICE float sum(int i) const {
    const float sum = sums[0][i] + sums[1][i];
    if constexpr (CHAINS == 2)
      return sum;
    else
      return sum + (sums[2][i] + sums[3][i]);
  }
  TORCH_BPTT_DEVICE void store(float* to, int stride, int lane) const {
    TORCH_BPTT_UNROLL
    for (int i = 0; i < 4; ++i)
      to[(2 * (lane % 4) + (i & 1)) * stride + lane / 4 + 8 * (i >> 1)] = sum(i);
  }

 private:
  static_assert(CHAINS == 2 || CHAINS == 4);
  float sums[CHAINS][4] = {};  // of even chunks, of odd ones
};

// float in full. A thread has two units, 8 apart, and of every 16 k the 4 at 4 (lane % 4): one
// unit's in even chunks, the other's in odd ones.
class PlainProduct {
 public:
  static constexpr int kElements = 1;
  static TORCH_BPTT_DEVICE int unit(int lane, int chunk, int) { return lane / 4 + 8 * (chunk & 1); }
  static TORCH_BPTT_DEVICE int k(int lane, int chunk, int i) {
    return chunk / 2 * 16 + lane % 4 * 4 + i;
  }
  static TORCH_BPTT_DEVICE float rounded(float value) { return value; }

  struct Piece {
    Words4 row[8];
  };
  static constexpr bool kReadAhead = false;
  static TORCH_BPTT_DEVICE Piece read(const unsigned char* rows, int row_bytes, int lane) {
    Piece piece;
    TORCH_BPTT_UNROLL
    for (int r = 0; r < 8; ++r) piece.row[r] = load_words<16>(rows + r * row_bytes + lane % 4 * 16);
    return piece;
  }
  TORCH_BPTT_DEVICE void add(int, const uint32_t (&low)[4], const uint32_t (&high)[4],
                             const Piece& piece) {
    TORCH_BPTT_UNROLL
    for (int r = 0; r < 8; ++r) {
      TORCH_BPTT_UNROLL
      for (int i = 0; i < 4; ++i) {
        sums[r][0] += as_float(low[i]) * as_float(piece.row[r].word[i]);
        sums[r][1] += as_float(high[i]) * as_float(piece.row[r].word[i]);
      }
    }
  }

  // The four lanes that share units add up: each hands over the rows that it does not keep, until
  // it has two of eight.
  TORCH_BPTT_DEVICE void store(float* to, int stride, int lane) {
    keep_half<4>(lane & 2);
    keep_half<2>(lane & 1);
    TORCH_BPTT_UNROLL
    for (int r = 0; r < 2; ++r) {
      TORCH_BPTT_UNROLL
      for (int u = 0; u < 2; ++u) to[(lane % 4 * 2 + r) * stride + lane / 4 + 8 * u] = sums[r][u];
    }
  }

 private:
  template <int ROWS>  // that are kept
  TORCH_BPTT_DEVICE void keep_half(bool upper) {
    TORCH_BPTT_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      TORCH_BPTT_UNROLL
      for (int u = 0; u < 2; ++u) {
        const float away = upper ? sums[r][u] : sums[r + ROWS][u];
        const float kept = upper ? sums[r + ROWS][u] : sums[r][u];
        sums[r][u] = kept + warp_shuffle_xor(away, ROWS / 2);
      }
    }
  }

  float sums[8][2] = {};
};

// ---- weights ------------------------------------------------------------------------------------

// Whether weights can be read 4 bytes at a time.
template <class S, class Product>
TORCH_BPTT_DEVICE bool reads_words(const Loop<S>& loop) {
  return Product::kElements == 1 ||
         (loop.H % 2 == 0 && reinterpret_cast<uintptr_t>(loop.weight) % 4 == 0);
}

// Register i of a chunk for the 16 units from `unit0` on, zero from `end` on. WORDS is
// reads_words(). No branches, so that many reads are under way at a time. int suffices: the weight
// has to fit into the chip.
template <class S, class Product, bool WORDS>
TORCH_BPTT_DEVICE uint32_t weight_register(const Loop<S>& loop, int unit0, int end, int lane,
                                           int chunk, int i) {
  const int H = int(loop.H), unit = unit0 + Product::unit(lane, chunk, i),
            k = Product::k(lane, chunk, i);
  const bool exists = unit < end && k < H;
  const S* const from = loop.weight + (exists ? unit * H + k : 0);
  uint32_t bits;
  if constexpr (Product::kElements == 1) {
    bits = as_bits(Product::rounded(*from));
  } else if constexpr (WORDS) {
    bits = load_words<4>(from).word[0];
  } else {
    const bool second = exists && k + 1 < H;
    const uint32_t upper = from[second].bits;
    bits = from[0].bits | (second ? upper : 0) << 16;
  }
  return exists ? bits : 0;
}

template <class Piece, int N, class Read>
TORCH_BPTT_DEVICE void read_pieces(Piece (&pieces)[N], int chunk, Read read) {
  TORCH_BPTT_UNROLL
  for (int i = 0; i < N; ++i) pieces[i] = read(chunk + 2 * i);
}
template <class Piece, int N>
TORCH_BPTT_DEVICE void copy_pieces(Piece (&to)[N], const Piece (&from)[N]) {
  TORCH_BPTT_UNROLL
  for (int i = 0; i < N; ++i) to[i] = from[i];
}

// ---- states -------------------------------------------------------------------------------------

constexpr int kQuad = Tiles::kQuad;
// Steps ahead that the inputs are brought into the cache: a step takes about as long as memory.
constexpr int kPrefetched = 3;

// Elements as they enter the product.
template <class Product, int N, class S>
TORCH_BPTT_DEVICE Elements<S, N> rounded(Elements<S, N> p) {
  for_elements<N>(N, [&](int e) { p[e] = Product::rounded(p[e]); });
  return p;
}

}  // namespace torch_bptt::cuda
