// A cluster of blocks for each few rows of the batch, which runs all steps: weights stay where they
// are, in registers and shared memory, and at every step each block sends the new states of its
// units into the shared memory of all blocks of its cluster, its own too. Clusters know nothing of
// each other, so there is nothing to synchronise over the grid.
//
// The exchange. What enters step s (counted from the launch's first) lies in place s % 2 of every
// block, and box s % 2 tells when all of it has come. Why two places and two boxes suffice:
//
//   (1) A block's wait for step s ends when the letters of all units of all blocks have come. A
//       thread sends its letters for s after the barrier of step s - 1, which all warps of its
//       block pass after they have read place (s - 1) % 2. So when the wait for s ends anywhere,
//       all blocks have read what entered s - 1.
//   (2) Letters for s + 1 go to place (s + 1) % 2 = (s - 1) % 2. They are sent after the wait for
//   s:
//       by (1) nobody reads that place any more.
//   (3) The sums of step s are written after the wait for s. The block's own letters for s were
//       sent by the threads that read the sums of s - 1, after they had read them.
//   (4) Box s % 2 is told at step s - 1 what to expect, by one thread that has passed the wait for
//       s - 2, the end of the box's phase before. Letters for s may come earlier than that: the
//       arrival that is missing keeps the phase open. They cannot come before the phase for s - 2
//       has ended: they are sent after a wait for s - 1, hence after all senders of this block
//       had passed the wait for s - 2.
//   (5) No letters are sent for a step that is not run, and a block ends after its wait for the
//       last one: no letter finds its receiver gone.
//
//   (6) No warp misses the end of a phase: the one after the next cannot end before the warp has
//       passed the barrier of this step, by (1).
//
// In (1) every block has letters to send for every row that its cluster has, whether or not the row
// exists at that step. tests/test_cuda_cluster.py runs this in random orders, and breaks it.
#include "cluster_layout.h"
#include "device.h"
#include "paths.h"
#include "step.h"

namespace torch_bptt::cuda {

namespace {

#if TORCH_BPTT_HAS_CLUSTERS

// How 16 units are multiplied with 8 rows. Either way a thread has 4 registers of each chunk of the
// weight; register i begins with element `k` of unit `unit`.

// Tensor cores. float is rounded to tf32, each weight and each state once.
template <class S>
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
  TORCH_BPTT_DEVICE void add(const uint32_t (&even)[4], const uint32_t (&odd)[4],
                             const Piece& piece) {
    multiply(sums[0], even, {piece.of[0], piece.of[1]});
    multiply(sums[1], odd, {piece.of[2], piece.of[3]});
  }

  TORCH_BPTT_DEVICE void store(float* to, int stride, int lane) {
    TORCH_BPTT_UNROLL
    for (int i = 0; i < 4; ++i)
      to[(2 * (lane % 4) + (i & 1)) * stride + lane / 4 + 8 * (i >> 1)] = sums[0][i] + sums[1][i];
  }

 private:
  static TORCH_BPTT_DEVICE void multiply(float (&sum)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
    if constexpr (sizeof(S) == 4)
      warp_mma_tf32(sum, a, b);
    else
      warp_mma<S>(sum, a, b);
  }

  float sums[2][4] = {};  // of even chunks, of odd ones
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
    for (int r = 0; r < 8; ++r) piece.row[r] = load16(rows + r * row_bytes + lane % 4 * 16);
    return piece;
  }
  TORCH_BPTT_DEVICE void add(const uint32_t (&low)[4], const uint32_t (&high)[4],
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

// Register i of a chunk for the 16 units from `unit0` on. int suffices: the weight has to fit into
// a cluster.
template <class S, class Product>
TORCH_BPTT_DEVICE uint32_t weight_register(const Loop<S>& loop, int unit0, int lane, int chunk,
                                           int i) {
  const int H = int(loop.H), unit = unit0 + Product::unit(lane, chunk, i),
            k = Product::k(lane, chunk, i);
  if (unit >= H || k >= H) return 0;
  const S* from = loop.weight + (unit * H + k);
  if constexpr (Product::kElements == 1) {
    return as_bits(Product::rounded(*from));
  } else {
    if (H % 2 == 0) return load4(from);
    return from[0].bits | (k + 1 < H ? uint32_t(from[1].bits) << 16 : 0);
  }
}

// ---- states -------------------------------------------------------------------------------------

constexpr int kQuad = ClusterLayout::kQuad;
// Steps ahead that the inputs are brought into the cache: a step takes about as long as memory.
constexpr int kPrefetched = 3;

// Elements [j, j + N) of what arrives at a step, of a row that exists there. `fresh` is the state
// before it where that has just been computed.
template <int N, class S>
TORCH_BPTT_DEVICE Elements<S, N> arriving_elements(const Arriving<S>& from, int64_t j, int count,
                                                   const Elements<S, N>* fresh) {
  if (from.carried && fresh) return *fresh;
  Elements<S, N> p{};
  if (from.row) for_elements<N>(count, [&](int e) { p[e] = from.row[j + e]; });
  return p;
}

template <int N, class S>
TORCH_BPTT_DEVICE Elements<Compute<S>, N> widened(const Elements<S, N>& values) {
  Elements<Compute<S>, N> wide;
  for_elements<N>(N, [&](int e) { wide[e] = widen(values[e]); });
  return wide;
}

// The same as it enters the product.
template <class Product, int N, class S>
TORCH_BPTT_DEVICE Elements<S, N> entering_elements(Elements<S, N> p, const S* mask, int64_t j,
                                                   int count) {
  if (mask)
    for_elements<N>(count, [&](int e) { p[e] = narrow<S>(widen(mask[j + e]) * widen(p[e])); });
  for_elements<N>(N, [&](int e) { p[e] = Product::rounded(p[e]); });
  return p;
}

// A letter: 16 bytes of a row. Of 2-byte types that is two quads, and the two threads that have
// them share the receivers.
template <class S>
struct Letter {
  static constexpr int kThreads = 4 / sizeof(S), kElements = 16 / sizeof(S);
  Words4 text;

  // Called by whole warps.
  TORCH_BPTT_DEVICE explicit Letter(const Elements<S, kQuad>& quad) {
    if constexpr (kThreads == 1) {
      TORCH_BPTT_UNROLL
      for (int e = 0; e < 4; ++e) text.word[e] = as_bits(quad[e]);
    } else {
      const uint32_t low = quad[0].bits | uint32_t(quad[1].bits) << 16,
                     high = quad[2].bits | uint32_t(quad[3].bits) << 16;
      const uint32_t other_low = warp_shuffle_xor(low, 1), other_high = warp_shuffle_xor(high, 1);
      if (lane_index() % 2 == 0)
        text = {{low, high, other_low, other_high}};
      else
        text = {{other_low, other_high, low, high}};
    }
  }
};

// ---- the product --------------------------------------------------------------------------------

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

// ---- the loop -----------------------------------------------------------------------------------

template <class S, class Product>
__global__ void __launch_bounds__(ClusterLayout::kMaxThreads, 1)
    cluster_kernel(const __grid_constant__ Loop<S> loop, const __grid_constant__ Steps steps,
                   const __grid_constant__ ClusterLayout layout) {
  using C = Compute<S>;
  constexpr int kRegisterChunks = ClusterLayout::kRegisterChunks,
                kUnrolled = ClusterLayout::kUnrolled;
  unsigned char* const memory = shared_memory();
  Mailbox* const boxes = reinterpret_cast<Mailbox*>(memory);
  float* const sums = reinterpret_cast<float*>(memory + layout.sums);
  const auto place = [&](int64_t s) {
    return memory + ClusterLayout::kPlaces + (s & 1) * layout.place_bytes;
  };
  const int thread = int(thread_index()), lane = thread % kWarp, warp = thread / kWarp;
  const int blocks = layout.cluster, rank = int(cluster_rank());
  const int tile = warp % layout.tiles, part = warp / layout.tiles, chunks = layout.chunks;
  const int unit0 = rank * layout.units;
  const int64_t b0 = int64_t(block_index().x / blocks) * layout.rows;
  const int rows = int(loop.schedule.B - b0 < layout.rows ? loop.schedule.B - b0 : layout.rows);

  // Weights of this warp's units and part of the sum: in registers, the rest in shared memory.
  uint32_t weight[kRegisterChunks][4];
  TORCH_BPTT_UNROLL
  for (int chunk = 0; chunk < kRegisterChunks; ++chunk) {
    if (chunk % 8 == 0) keep_order();
    TORCH_BPTT_UNROLL
    for (int i = 0; i < 4; ++i)
      weight[chunk][i] = chunk < chunks ? weight_register<S, Product>(loop, unit0 + tile * 16, lane,
                                                                      part * chunks + chunk, i)
                                        : 0;
  }
  Words4* const more_weight = reinterpret_cast<Words4*>(memory + layout.weights) +
                              warp * layout.shared_chunks * kWarp + lane;
  for (int chunk = kRegisterChunks; chunk < chunks; ++chunk) {
    Words4 words;
    TORCH_BPTT_UNROLL
    for (int i = 0; i < 4; ++i)
      words.word[i] =
          weight_register<S, Product>(loop, unit0 + tile * 16, lane, part * chunks + chunk, i);
    more_weight[(chunk - kRegisterChunks) * kWarp] = words;
  }

  // The quad that this thread finishes, and how many of its elements there are.
  const int row = thread * kQuad / layout.units, unit = thread * kQuad % layout.units;
  const int64_t b = b0 + row;
  const int j = unit0 + unit, left = int(loop.H) - j;
  const int count = left < 0 ? 0 : left < kQuad ? left : kQuad;
  const bool mine = row < rows;

  // Zeros where no units and no rows are; then what enters the first step.
  for (int at = thread * 16; at < 2 * layout.place_bytes; at += int(block_threads()) * 16)
    store16(place(0) + at, Words4{});
  if (thread == 0) {
    init_mailbox(&boxes[0], 1);
    init_mailbox(&boxes[1], 1);
    publish_mailboxes();
  }
  sync_block();
  Elements<C, kQuad> arriving{};  // with alpha the quad needs it besides the product
  {
    const Step<S> first(loop, steps.begin);
    for (int r = warp; r < rows; r += int(block_threads()) / kWarp) {
      if (b0 + r >= first.rows()) continue;
      const Arriving<S> from = first.arriving(b0 + r);
      const S* const mask = first.mask(b0 + r);
      S* const to = reinterpret_cast<S*>(place(0) + r * layout.row_bytes);
      for (int64_t k = lane; k < loop.H; k += kWarp)
        to[k] =
            entering_elements<Product>(arriving_elements<1, S>(from, k, 1, nullptr), mask, k, 1)[0];
    }
    if (loop.alpha && mine && b < first.rows())
      arriving = widened(arriving_elements<kQuad, S>(first.arriving(b), j, count, nullptr));
  }
  sync_cluster();

  for (int64_t i = steps.begin; i < steps.end; ++i) {
    const int64_t s = i - steps.begin;
    const bool last = i + 1 == steps.end;
    const Step<S> step(loop, i), next(loop, last ? i : i + 1);

    Inputs<S, kQuad> inputs;
    if (mine && b < step.rows()) inputs = step.template inputs<kQuad>(b, j, count);
    if (mine && count > 0 && i + kPrefetched < steps.end)
      Step<S>(loop, i + kPrefetched).prefetch(b, j);
    const bool goes_on = mine && !last && b < next.rows();
    const Arriving<S> next_from = goes_on ? next.arriving(b) : Arriving<S>{};
    const S* const next_mask = goes_on ? next.mask(b) : nullptr;
    if (thread == 0 && !last)
      arrive_expecting(&boxes[(s + 1) & 1], rows * blocks * layout.units * int(sizeof(S)));
    if (s > 0) wait_for_mail(&boxes[s & 1], unsigned((s - 1) >> 1 & 1));
    warp_sync();  // lanes may have waited differently long, and what follows is of whole warps

    for (int r = 0; r < rows; r += ClusterLayout::kTileRows) {
      const unsigned char* const from =
          place(s) + r * layout.row_bytes + part * chunks * ClusterLayout::kChunkBytes;
      const auto read = [&](int chunk) {
        return Product::read(from + chunk * ClusterLayout::kChunkBytes, layout.row_bytes, lane);
      };
      Product product;
      typename Product::Piece ahead[kUnrolled / 2];
      if constexpr (Product::kReadAhead) read_pieces(ahead, 0, read);
      TORCH_BPTT_UNROLL
      for (int group = 0; group < kRegisterChunks; group += kUnrolled) {
        if constexpr (Product::kReadAhead) {
          typename Product::Piece pieces[kUnrolled / 2];
          copy_pieces(pieces, ahead);
          if (group + kUnrolled < kRegisterChunks && group + kUnrolled < chunks)
            read_pieces(ahead, group + kUnrolled, read);
          TORCH_BPTT_UNROLL
          for (int k = 0; k < kUnrolled; k += 2)
            product.add(weight[group + k], weight[group + k + 1], pieces[k / 2]);
        } else {
          TORCH_BPTT_UNROLL
          for (int k = 0; k < kUnrolled; k += 2)
            product.add(weight[group + k], weight[group + k + 1], read(group + k));
        }
        if (group + kUnrolled >= chunks) break;
      }
      TORCH_BPTT_UNROLL_LITTLE
      for (int chunk = kRegisterChunks; chunk < chunks; chunk += 2) {
        const Words4 even = more_weight[(chunk - kRegisterChunks) * kWarp],
                     odd = more_weight[(chunk + 1 - kRegisterChunks) * kWarp];
        product.add(even.word, odd.word, read(chunk));
      }
      product.store(sums + part * layout.part_sums + r * layout.sum_stride + tile * 16,
                    layout.sum_stride, lane);
    }
    sync_block();

    Elements<S, kQuad> state{};
    if (mine && b < step.rows()) {
      Elements<C, kQuad> sum{};
      TORCH_BPTT_UNROLL_LITTLE
      for (int p = 0; p < layout.parts; ++p) {
        const Words4 add = load16(sums + p * layout.part_sums + row * layout.sum_stride + unit);
        for_elements<kQuad>(kQuad, [&](int e) { sum[e] += as_float(add.word[e]); });
      }
      state = step.template finish<kQuad>(b, j, count, sum, arriving, inputs);
    }
    if (last) continue;

    if (goes_on) {
      state = arriving_elements(next_from, j, count, &state);
      arriving = widened(state);
      state = entering_elements<Product>(state, next_mask, j, count);
    } else {
      state = {};
    }
    warp_sync();
    const Letter<S> letter(state);
    if (!mine) continue;
    unsigned char* const to = place(s + 1) + row * layout.row_bytes + j / Letter<S>::kElements * 16;
    for (int block = lane % Letter<S>::kThreads; block < blocks; block += Letter<S>::kThreads) {
      // Every block begins with another one, so that not all letters go the same way at once.
      const unsigned peer = unsigned(rank + block < blocks ? rank + block : rank + block - blocks);
      send(in_block(peer, to), letter.text, in_block(peer, &boxes[(s + 1) & 1]));
    }
  }
}

#else

template <class S>
class TensorProduct;
class PlainProduct;

template <class S, class Product>
__global__ void cluster_kernel(const __grid_constant__ Loop<S>, const __grid_constant__ Steps,
                               const __grid_constant__ ClusterLayout) {
  __trap();  // no clusters before sm_90: the plan never comes here
}

#endif  // TORCH_BPTT_HAS_CLUSTERS

template <class S, class Product>
Error run(const Loop<S>& loop, Steps steps, const Plan& plan, void* stream) {
  const ClusterLayout layout(loop.H, sizeof(S), plan.cluster, plan.rows);
  Launch how;
  how.grid.x = unsigned(ClusterLayout::up(loop.schedule.B, plan.rows) / plan.rows * plan.cluster);
  how.threads = layout.threads;
  how.cluster = plan.cluster;
  how.shared_bytes = layout.shared_bytes;
  how.stream = stream;
  const auto kernel = cluster_kernel<S, Product>;
  if (Error error = prepare(kernel, how)) return error;
  return launch(kernel, how, loop, steps, layout);
}

}  // namespace

template <class S>
Error run_cluster_path(const Loop<S>& loop, Steps steps, const Plan& plan, void* stream) {
  if (plan.units == Units::tensor) return run<S, TensorProduct<S>>(loop, steps, plan, stream);
  if constexpr (std::is_same_v<S, float>) return run<S, PlainProduct>(loop, steps, plan, stream);
  return "the plan asks for a product that was not compiled";
}

int largest_cluster(int64_t shared_bytes) {
  for (int cluster = 16; cluster > 1; cluster /= 2) {
    Launch how;
    how.grid.x = how.cluster = unsigned(cluster);
    how.threads = ClusterLayout::kMaxThreads;
    how.shared_bytes = size_t(shared_bytes);
    int clusters = 0;
    const Error error = active_clusters(cluster_kernel<float, PlainProduct>, how, &clusters);
    if (!error && clusters > 0) return cluster;
  }
  return 0;
}

template Error run_cluster_path(const Loop<float>&, Steps, const Plan&, void*);
template Error run_cluster_path(const Loop<bfloat16>&, Steps, const Plan&, void*);
template Error run_cluster_path(const Loop<float16>&, Steps, const Plan&, void*);

}  // namespace torch_bptt::cuda
