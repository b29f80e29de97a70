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
//       s: by (1) nobody reads that place any more.
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
// exists at that step. tests/test_cuda_loops.py runs this in random orders, and breaks it.
#include "cluster_layout.h"
#include "device.h"
#include "paths.h"
#include "product.h"
#include "step.h"

namespace torch_bptt::cuda {

namespace {

#if TORCH_BPTT_HAS_CLUSTERS

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

// ---- the loop -----------------------------------------------------------------------------------

template <class S, class Product, class KNOWN>
__global__ void __launch_bounds__(ClusterLayout::kMaxThreads, 1)
    cluster_kernel(const __grid_constant__ Loop<S> loop, const __grid_constant__ Pace pace,
                   const __grid_constant__ Steps steps,
                   const __grid_constant__ ClusterLayout layout) {
  using C = Compute<S>;
  using Step = cuda::Step<S, KNOWN>;
  // Whether there are registers for pointers that go along with the steps, and for what no step
  // changes; else both are found anew.
  constexpr bool kFollows = KNOWN::kDense && Product::kReadAhead, kKeeps = Product::kReadAhead;
  constexpr int kRegisterChunks = ClusterLayout::kRegisterChunks,
                kUnrolled = ClusterLayout::kUnrolled;
  unsigned char* const memory = shared_memory();
  Mailbox* const boxes = reinterpret_cast<Mailbox*>(memory);
  float* const sums = reinterpret_cast<float*>(memory + layout.sums);
  const auto place = [&](int s) {
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
  Words4* const more_weight = reinterpret_cast<Words4*>(memory + layout.weights) +
                              warp * layout.shared_chunks * kWarp + lane;
  const auto read_weights = [&](auto words) {
    const auto read = [&](int chunk, int i) {
      return weight_register<S, Product, words.value>(loop, unit0 + tile * 16, int(loop.H), lane,
                                                      part * chunks + chunk, i);
    };
    TORCH_BPTT_UNROLL
    for (int chunk = 0; chunk < kRegisterChunks; ++chunk) {
      if (chunk % 8 == 0) keep_order();
      TORCH_BPTT_UNROLL
      for (int i = 0; i < 4; ++i) weight[chunk][i] = chunk < chunks ? read(chunk, i) : 0;
    }
    for (int chunk = kRegisterChunks; chunk < chunks; ++chunk) {
      Words4 more;
      TORCH_BPTT_UNROLL
      for (int i = 0; i < 4; ++i) more.word[i] = read(chunk, i);
      more_weight[(chunk - kRegisterChunks) * kWarp] = more;
    }
  };
  if (reads_words<S, Product>(loop))
    read_weights(std::true_type{});
  else
    read_weights(std::false_type{});

  // The quad that this thread finishes, and how many of its elements there are.
  const int row = thread * kQuad / layout.units, unit = thread * kQuad % layout.units;
  const int64_t b = b0 + row;
  const int j = unit0 + unit, left = int(loop.H) - j;
  const int count = left < 0 ? 0 : left < kQuad ? left : kQuad;
  const bool sends = row < rows, mine = sends && count > 0;

  // Zeros where no units and no rows are; then what enters the first step.
  for (int at = thread * 16; at < 2 * layout.place_bytes; at += int(block_threads()) * 16)
    store_words<16>(place(0) + at, Words4{});
  if (thread == 0) {
    init_mailbox(&boxes[0], 1);
    init_mailbox(&boxes[1], 1);
    publish_mailboxes();
  }
  sync_block();
  Constants<S, kQuad> constants;
  Elements<C, kQuad> leaking{};
  Sources<S> sources;
  Targets<S> targets;
  {
    const Step first(loop, steps.begin);
    for (int r = warp; r < rows; r += int(block_threads()) / kWarp) {
      if (b0 + r >= first.rows()) continue;
      S* const to = reinterpret_cast<S*>(place(0) + r * layout.row_bytes);
      for (int64_t k = lane; k < loop.H; k += kWarp)
        to[k] = rounded<Product>(first.template entering<1>(b0 + r, k, 1))[0];
    }
    if (kKeeps && mine) constants = first.template constants<kQuad>(b, j, count);
    if (mine && first.has(b)) leaking = first.template leaking<kQuad>(b, j, count);
    if (kFollows && mine) sources = first.sources(b, j), targets = first.targets(b, j);
  }
  sync_cluster();

  const int many = int(steps.end - steps.begin);
  for (int s = 0; s < many; ++s) {
    const bool last = s + 1 == many;
    const int64_t i = steps.begin + s;
    const Step step(loop, i), next(loop, i + 1);

    const bool exists = mine && step.has(b), goes_on = mine && !last && next.has(b);
    Inputs<S, kQuad> inputs;
    if (!kKeeps && mine) constants = step.template constants<kQuad>(b, j, count);
    if (exists) {
      if (!kFollows) sources = step.sources(b, j);
      inputs = step.template inputs<kQuad>(b, j, count, sources);
    }
    if (mine && s + kPrefetched < many) {
      const Step later(loop, i + kPrefetched);
      if (kFollows)
        later.prefetch(b, sources.after(kPrefetched, pace));
      else if (later.has(b))
        later.prefetch(b, later.sources(b, j));
    }
    const Origin origin = goes_on ? next.origin(b) : Origin::nothing;
    if (thread == 0 && !last)
      arrive_expecting(&boxes[(s + 1) & 1], rows * blocks * layout.units * int(sizeof(S)));
    const unsigned char* const entered = place(s) + part * chunks * ClusterLayout::kChunkBytes;
    if (s > 0) wait_for_mail(&boxes[s & 1], unsigned((s - 1) >> 1 & 1));
    // While the product waits for its factors.
    const Terms<S, kQuad> terms = step.terms(inputs, constants);
    warp_sync();  // lanes may have waited differently long, and what follows is of whole warps

    for (int r = 0; r < rows; r += ClusterLayout::kTileRows) {
      const unsigned char* const from = entered + r * layout.row_bytes;
      const auto read = [&](int chunk) {
        return Product::read(from + chunk * ClusterLayout::kChunkBytes, layout.row_bytes, lane);
      };
      Product product;
      using Pieces = typename Product::Piece[kUnrolled / 2];
      Pieces pieces;
      if constexpr (Product::kReadAhead) read_pieces(pieces, 0, read);
      TORCH_BPTT_UNROLL
      for (int group = 0; group < kRegisterChunks; group += kUnrolled) {
        if constexpr (Product::kReadAhead) {
          // Behind the last chunk too, where there is shared memory as well: a condition would cost
          // more, as pieces would be copied where it does not hold.
          Pieces ahead;
          if (group + kUnrolled < kRegisterChunks) read_pieces(ahead, group + kUnrolled, read);
          TORCH_BPTT_UNROLL
          for (int k = 0; k < kUnrolled; k += 2)
            product.add(k / 2, weight[group + k], weight[group + k + 1], pieces[k / 2]);
          if (group + kUnrolled < kRegisterChunks) copy_pieces(pieces, ahead);
        } else {
          TORCH_BPTT_UNROLL
          for (int k = 0; k < kUnrolled; k += 2)
            product.add(k / 2, weight[group + k], weight[group + k + 1], read(group + k));
        }
        if (group + kUnrolled >= chunks) break;
      }
      TORCH_BPTT_UNROLL_LITTLE
      for (int group = kRegisterChunks; group < chunks; group += kUnrolled) {
        TORCH_BPTT_UNROLL
        for (int k = 0; k < kUnrolled; k += 2) {
          const Words4* const words = more_weight + (group + k - kRegisterChunks) * kWarp;
          const Words4 even = words[0], odd = words[kWarp];
          product.add(k / 2, even.word, odd.word, read(group + k));
        }
      }
      product.store(sums + part * layout.part_sums + r * layout.sum_stride + tile * 16,
                    layout.sum_stride, lane);
    }
    sync_block();

    Finished<S, kQuad> finished;
    if (exists) {
      Elements<C, kQuad> sum{};
      const float* const first = sums + row * layout.sum_stride + unit;
      const auto read = [&](int p) { return load_words<16>(first + p * layout.part_sums); };
      const auto add = [&](const Words4& part) {
        for_elements<kQuad>(kQuad, [&](int e) { sum[e] += as_float(part.word[e]); });
      };
      // The number of parts is a power of two; they are read in few goes.
      const Words4 part0 = read(0), part1 = layout.parts > 1 ? read(1) : Words4{};
      add(part0), add(part1);
      TORCH_BPTT_UNROLL
      for (int p = 2; p < ClusterLayout::kMostParts; p *= 2) {
        if (p >= layout.parts) break;
        TORCH_BPTT_UNROLL
        for (int q = 0; q < p; ++q) add(read(p + q));
      }
      finished = step.template finish<kQuad>(b, j, count, sum, leaking, terms, constants);
    }
    if (!last) {
      Elements<S, kQuad> state{};
      if (goes_on) {
        state = next.template arriving<kQuad>(origin, b, j, count, finished);
        leaking = next.leaking(finished, state);
        state = rounded<Product>(next.entering(state, constants));
      }
      warp_sync();
      const Letter<S> letter(state);
      unsigned char* const to =
          place(s + 1) + row * layout.row_bytes + j / Letter<S>::kElements * 16;
      // Every block begins with another one, so that not all letters go the same way at once.
      TORCH_BPTT_UNROLL
      for (int k = 0; sends && k < ClusterLayout::kMostBlocks; k += Letter<S>::kThreads) {
        const int block = k + lane % Letter<S>::kThreads;
        if (block >= blocks) break;
        const unsigned peer =
            unsigned(rank + block < blocks ? rank + block : rank + block - blocks);
        send(in_block(peer, to), letter.text, in_block(peer, &boxes[(s + 1) & 1]));
      }
    }
    // Others wait for the letters: what only memory gets comes after them.
    if (exists) {
      if (!kFollows) targets = step.targets(b, j);
      step.write(b, j, count, finished, targets);
      if (last) step.hand_over(b, j, count, finished);
    }
    if (kFollows) sources = sources.after(1, pace), targets = targets.after(1, pace);
  }
}

#else

template <class S, class Product, class KNOWN>
__global__ void cluster_kernel(const __grid_constant__ Loop<S>, const __grid_constant__ Pace,
                               const __grid_constant__ Steps,
                               const __grid_constant__ ClusterLayout) {
  __trap();  // no clusters before sm_90: the plan never comes here
}

#endif  // TORCH_BPTT_HAS_CLUSTERS

template <class S, class Product>
Error run(const Loop<S>& loop, Steps steps, const Plan& plan, void* stream) {
  const ClusterLayout layout(loop.H, sizeof(S), plan.cluster, plan.rows);
  Launch how;
  how.grid.x = unsigned(ceil_div(loop.schedule.B, plan.rows) * plan.cluster);
  how.threads = layout.threads;
  how.cluster = plan.cluster;
  how.shared_bytes = layout.shared_bytes;
  how.stream = stream;
  return run_knowing(loop, kQuad, [&](auto known) -> Error {
    const auto kernel = cluster_kernel<S, Product, decltype(known)>;
    if (Error error = prepare(kernel, how)) return error;
    return run_in_parts(
        steps, [&](Steps part) { return launch(kernel, how, loop, pace_of(loop), part, layout); });
  });
}

}  // namespace

template <class S>
Error run_cluster_path(const Loop<S>& loop, Steps steps, const Plan& plan, void* stream) {
  if (plan.arithmetic == Arithmetic::tensor)
    return run<S, TensorProduct<S, 4>>(loop, steps, plan, stream);
  if constexpr (std::is_same_v<S, float>) return run<S, PlainProduct>(loop, steps, plan, stream);
  return "the plan asks for a product that was not compiled";
}

int largest_cluster(int64_t shared_bytes) {
  const auto kernel = cluster_kernel<float, PlainProduct, Known<int(Pass::forward), true, true>>;
  for (int cluster = 16; cluster > 1; cluster /= 2) {
    Launch how;
    how.grid.x = how.cluster = unsigned(cluster);
    how.threads = ClusterLayout::kMaxThreads;
    how.shared_bytes = size_t(shared_bytes);
    int clusters = 0;
    const Error error = active_clusters(kernel, how, &clusters);
    if (!error && clusters > 0) return cluster;
  }
  return 0;
}

template Error run_cluster_path(const Loop<float>&, Steps, const Plan&, void*);
template Error run_cluster_path(const Loop<bfloat16>&, Steps, const Plan&, void*);
template Error run_cluster_path(const Loop<float16>&, Steps, const Plan&, void*);

}  // namespace torch_bptt::cuda
