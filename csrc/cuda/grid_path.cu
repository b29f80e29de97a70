// All blocks of the device together, which run all steps: for weights that no cluster can hold. The
// weight stays in registers and shared memory; the states of a step go through global memory, that
// is, through the second-level cache.
//
// A block multiplies its slice of the entering states with its columns of its cluster's rows of the
// weight, and sends each block of its cluster the sums for the units that this one finishes
// (grid_layout.h). Those are added up in the order of the blocks, finished, and their states
// written for all blocks to read, with a number that says so. The batch goes in groups of rows:
// while one group is multiplied the states of the next one come, and while one group's sums travel
// the next one's are computed.
//
// The exchange. What enters step s (counted from the launch's first) lies in place s % 2 of global
// memory; a block's flag is at least s + 1 when its part lies there. Sums of step s go to letters
// s % 2 of the block that finishes them, and box s % 2 tells when all have come. All of it is for
// each group of rows separately. Why two of each suffice:
//
//   (1) A block finishes step s when it has the sums of all blocks of its cluster. Each of those
//       sends them after it has read its slice of what entered s; and the slices of a cluster make
//       up the whole. So when a block has finished step s, all blocks have written what enters s,
//       hence have finished s - 1; by the same argument, applied to each of them, every block of
//       the grid has read what entered s - 1.
//   (2) What enters s + 1 is written to place (s + 1) % 2 = (s - 1) % 2 by blocks that have
//       finished step s: by (1) nobody reads that place any more.
//   (3) Letters for s + 1 are sent after their sender has read its slice of what entered s + 1.
//       Some block wrote that after it had finished s, hence by (1) after all blocks had finished
//       s - 1, the receiver among them: it no longer reads letters (s - 1) % 2.
//   (4) Box s % 2 is told what to expect at the beginning of step s, by a thread that has passed
//       the wait for s - 2, the end of the box's phase before. Letters for s may come earlier: the
//       arrival that is missing keeps the phase open. They cannot come before the phase for s - 2
//       has ended, by (3).
//   (5) Nothing is sent for a step that is not run, and a block ends after it has received the
//       letters of the last one: no letter finds its receiver gone.
//
// For this all blocks have to run at the same time, which the launch demands, and every block has
// something to send and to write for every row, whether or not the row exists at that step.
// tests/test_cuda_loops.py runs this in random orders, and breaks it.
#include "device.h"
#include "grid_layout.h"
#include "paths.h"
#include "product.h"
#include "step.h"

namespace torch_bptt::cuda {

namespace {

// Global memory of a launch: flags, which are zeros at its start, [group][block]; and what enters
// two steps, [row][columns].
class Workspace {
 public:
  Workspace(const GridLayout& layout, void* memory)
      : flags(static_cast<uint32_t*>(memory)),
        states(static_cast<unsigned char*>(memory) + layout.flag_bytes) {}

#if TORCH_BPTT_HAS_CLUSTERS
  TORCH_BPTT_DEVICE uint32_t* flags_of(const GridLayout& layout, int group) const {
    return flags + group * layout.blocks();
  }
  // Row `row` of what enters step s.
  TORCH_BPTT_DEVICE unsigned char* states_of(const GridLayout& layout, int64_t s,
                                             int64_t row) const {
    return states + (s & 1) * layout.state_bytes + row * layout.state_row_bytes;
  }
#endif

  uint32_t* flags;

 private:
  unsigned char* states;
};

#if TORCH_BPTT_HAS_CLUSTERS

// ---- the exchange -------------------------------------------------------------------------------

// The slice of a row group that this warp multiplies, into shared memory: waits until all units of
// it have been written, and starts copies. Warps of the same part share the rows.
class Slice {
 public:
  TORCH_BPTT_DEVICE Slice(const GridLayout& layout, const Workspace& workspace, int H, int size,
                          int across, int part)
      : l(layout),
        w(workspace),
        row_bytes(H * size),
        to(part * layout.chunks * GridLayout::kChunkBytes),
        first_row(across) {
    const int bytes = layout.chunks * GridLayout::kChunkBytes, own_bytes = layout.own_units * size,
              end = begin() + bytes < row_bytes ? begin() + bytes : row_bytes;
    first_block = begin() / own_bytes;
    blocks = begin() < end ? (end + own_bytes - 1) / own_bytes - first_block : 0;
  }

  TORCH_BPTT_DEVICE void read(unsigned char* place, int group, int64_t s) const {
    const int lane = int(lane_index());
    const uint32_t* const flags = w.flags_of(l, group) + first_block;
    for (int block = lane; block < blocks; block += kWarp)
      wait_for_flag(flags + block, uint32_t(s) + 1);
    warp_sync();
    const unsigned char* const from = w.states_of(l, s, int64_t(group) * l.rows) + begin();
    const int rows = l.rows_of(group), bytes = l.chunks * GridLayout::kChunkBytes;
    for (int row = first_row; row < rows; row += l.across) {
      for (int at = lane * 16; at < bytes; at += kWarp * 16) {
        const int left = row_bytes - begin() - at, valid = left < 0 ? 0 : left < 16 ? left : 16;
        copy_async<16>(place + row * l.row_bytes + to + at, from + row * l.state_row_bytes + at,
                       valid);
      }
    }
  }

 private:
  // Of a row, where this warp's part begins.
  TORCH_BPTT_DEVICE int begin() const { return int(cluster_rank()) * l.slice_bytes + to; }

  const GridLayout& l;
  const Workspace& w;
  const int row_bytes, to, first_row;
  int first_block, blocks;  // that write it
};

// ---- the product --------------------------------------------------------------------------------

// OCTETS times eight rows, which lie at `from`, with the weights of this warp; the sums go to `to`.
// Two octets share what is read of the weights in shared memory.
template <class Product, int OCTETS, int CHUNKS, int TILES>
TORCH_BPTT_DEVICE void multiply(const uint32_t (&weight)[CHUNKS][TILES][4],
                                const Words4* more_weight, int chunks, const unsigned char* from,
                                int row_bytes, float* to, int sum_stride) {
  using Piece = typename Product::Piece;
  const int lane = int(lane_index());
  const auto read = [&](int octet, int chunk) {
    return Product::read(
        from + octet * GridLayout::kTileRows * row_bytes + chunk * GridLayout::kChunkBytes,
        row_bytes, lane);
  };
  using Pieces = Piece[OCTETS];
  const auto read_pieces = [&](Pieces& to, int chunk) {
    TORCH_BPTT_UNROLL
    for (int octet = 0; octet < OCTETS; ++octet) to[octet] = read(octet, chunk);
  };
  Product product[OCTETS][TILES];
  Pieces pieces;
  if constexpr (Product::kReadAhead) read_pieces(pieces, 0);
  TORCH_BPTT_UNROLL
  for (int chunk = 0; chunk < CHUNKS; chunk += 2) {
    if (chunk >= chunks) break;
    // Behind the last chunk too, where there is shared memory as well: a condition would cost more.
    const bool reads_ahead = Product::kReadAhead && chunk + 2 < CHUNKS;
    Pieces ahead{};
    if (reads_ahead) read_pieces(ahead, chunk + 2);
    if constexpr (!Product::kReadAhead) read_pieces(pieces, chunk);
    TORCH_BPTT_UNROLL
    for (int octet = 0; octet < OCTETS; ++octet) {
      TORCH_BPTT_UNROLL
      for (int tile = 0; tile < TILES; ++tile)
        product[octet][tile].add(chunk / 2, weight[chunk][tile], weight[chunk + 1][tile],
                                 pieces[octet]);
    }
    if (reads_ahead) copy_pieces(pieces, ahead);
  }
  TORCH_BPTT_UNROLL_LITTLE
  for (int chunk = CHUNKS; chunk < chunks; chunk += 2) {
    read_pieces(pieces, chunk);
    TORCH_BPTT_UNROLL
    for (int tile = 0; tile < TILES; ++tile) {
      const Words4 even = more_weight[((chunk - CHUNKS) * TILES + tile) * kWarp],
                   odd = more_weight[((chunk + 1 - CHUNKS) * TILES + tile) * kWarp];
      TORCH_BPTT_UNROLL
      for (int octet = 0; octet < OCTETS; ++octet)
        product[octet][tile].add(0, even.word, odd.word, pieces[octet]);
    }
  }
  TORCH_BPTT_UNROLL
  for (int octet = 0; octet < OCTETS; ++octet) {
    TORCH_BPTT_UNROLL
    for (int tile = 0; tile < TILES; ++tile)
      product[octet][tile].store(
          to + octet * GridLayout::kTileRows * sum_stride + tile * GridLayout::kTileUnits,
          sum_stride, lane);
  }
}

// ---- the loop -----------------------------------------------------------------------------------

template <class S, class Product, int TILES, class KNOWN>
__global__ void __launch_bounds__(GridLayout::kMaxThreads, 1)
    grid_kernel(const __grid_constant__ Loop<S> loop, const __grid_constant__ Steps steps,
                const __grid_constant__ GridLayout layout,
                const __grid_constant__ Workspace workspace, int64_t first_row) {
  using C = Compute<S>;
  using Step = cuda::Step<S, KNOWN>;
  constexpr int kRegisterChunks = GridLayout::register_chunks(TILES);
  // Rows that are multiplied together: as many as there are registers for their sums.
  constexpr int kTogether = (Product::kReadAhead ? 2 : 1) * GridLayout::kTileRows;
  unsigned char* const memory = shared_memory();
  const auto box = [&](int64_t s, int group) {
    return reinterpret_cast<Mailbox*>(memory) + (s & 1) * GridLayout::kMaxGroups + group;
  };
  const auto place = [&](int group) {
    return memory + GridLayout::kPlaces + (group & 1) * layout.place_bytes;
  };
  float* const sums = reinterpret_cast<float*>(memory + layout.sums);
  const auto letters = [&](int64_t s, int group) {
    return reinterpret_cast<float*>(memory + layout.letters +
                                    ((s & 1) * layout.groups + group) * layout.box_bytes);
  };
  const auto offset_of = [&](const void* own) {
    return int(static_cast<const unsigned char*>(own) - memory);
  };
  const int thread = int(thread_index()), lane = thread % kWarp, warp = thread / kWarp;
  const int block = int(block_index().x), rank = int(cluster_rank()), H = int(loop.H);
  const int across = warp % layout.across, part = warp / layout.across, chunks = layout.chunks;
  const int units0 = block / layout.cluster * layout.units,
            units_end = units0 + layout.units < H ? units0 + layout.units : H,
            unit0 = units0 + across * TILES * GridLayout::kTileUnits,
            chunk0 = (rank * layout.parts + part) * chunks;

  // Weights of this warp's tiles and part of the slice: in registers, the rest in shared memory.
  uint32_t weight[kRegisterChunks][TILES][4];
  Words4* const more_weight = reinterpret_cast<Words4*>(memory + layout.weights) +
                              warp * layout.shared_chunks * TILES * kWarp + lane;
  const auto read_weights = [&](auto words) {
    const auto read = [&](int chunk, int tile, int i) {
      return weight_register<S, Product, words.value>(loop, unit0 + tile * 16, units_end, lane,
                                                      chunk0 + chunk, i);
    };
    TORCH_BPTT_UNROLL
    for (int chunk = 0; chunk < kRegisterChunks; ++chunk) {
      TORCH_BPTT_UNROLL
      for (int tile = 0; tile < TILES; ++tile) {
        if ((chunk * TILES + tile) % 8 == 0) keep_order();
        TORCH_BPTT_UNROLL
        for (int i = 0; i < 4; ++i)
          weight[chunk][tile][i] = chunk < chunks ? read(chunk, tile, i) : 0;
      }
    }
    for (int chunk = kRegisterChunks; chunk < chunks; ++chunk) {
      TORCH_BPTT_UNROLL
      for (int tile = 0; tile < TILES; ++tile) {
        Words4 more;
        TORCH_BPTT_UNROLL
        for (int i = 0; i < 4; ++i) more.word[i] = read(chunk, tile, i);
        more_weight[((chunk - kRegisterChunks) * TILES + tile) * kWarp] = more;
      }
    }
  };
  if (reads_words<S, Product>(loop))
    read_weights(std::true_type{});
  else
    read_weights(std::false_type{});

  // The quad that this thread finishes of each group, and how many of its elements there are.
  const int own_row = thread * kQuad / layout.own_units,
            own_unit = thread * kQuad % layout.own_units;
  const int j = block * layout.own_units + own_unit, left = H - j;
  const int count = left < 0 ? 0 : left < kQuad ? left : kQuad;
  // The quads of the cluster's units that this thread sends: of every `send_step`th row.
  const int row_quads = layout.units / kQuad, send_step = layout.threads / row_quads,
            send_row = thread / row_quads, send_unit = thread % row_quads * kQuad;
  const Remote receiver = in_block(unsigned(send_unit / layout.own_units), memory);
  const int letter = rank * layout.rows * layout.own_units + send_unit % layout.own_units;

  const auto mine = [&](int group) { return count > 0 && own_row < layout.rows_of(group); };
  const auto row_of = [&](int group) { return group * layout.rows + own_row; };
  // This thread's part of what enters step s, where all blocks find it.
  const auto write_entering = [&](int64_t s, int group, const Elements<S, kQuad>& values) {
    unsigned char* const to =
        workspace.states_of(layout, s, row_of(group)) + j * int64_t(sizeof(S));
    __builtin_memcpy(__builtin_assume_aligned(to, kQuad * sizeof(S)), &values, sizeof values);
  };
  // When all threads have written theirs. Publishing waits for memory, so that the warps take
  // turns, and only the one whose turn it is waits.
  const auto publish_entering = [&](int64_t s, int group) {
    const int warps = layout.threads / kWarp;
    if (warp != warps - 1 - group % warps) return arrive_at_part(1 + group, layout.threads);
    sync_part(1 + group, layout.threads);
    if (lane == 0) publish(workspace.flags_of(layout, group) + block, uint32_t(s) + 1);
  };

  // Rows that do not exist are multiplied along: zeros.
  for (int at = thread * 16; at < layout.places * layout.place_bytes; at += layout.threads * 16)
    store_words<16>(place(0) + at, Words4{});
  if (thread == 0) {
    for (int i = 0; i < 2 * layout.groups; ++i) init_mailbox(box(i & 1, i >> 1), 1);
    publish_mailboxes();
  }
  // Of the quad; its mask depends on the group, and is read with that.
  const Constants<S, kQuad> of_units =
      count > 0 ? Step::template of_units<kQuad>(loop, j, count) : Constants<S, kQuad>{};
  {
    const Step first(loop, steps.begin);
    for (int group = 0; group < layout.groups; ++group) {
      const int64_t b = first_row + row_of(group);
      Elements<S, kQuad> state{};
      if (mine(group) && first.has(b))
        state = rounded<Product>(first.template entering<kQuad>(b, j, count));
      if (mine(group)) write_entering(0, group, state);
      publish_entering(0, group);
    }
  }
  sync_cluster();

  const Slice slice(layout, workspace, H, int(sizeof(S)), across, part);
  for (int64_t i = steps.begin; i < steps.end; ++i) {
    const int64_t s = i - steps.begin;
    const bool last = i + 1 == steps.end;
    if (thread == 0)
      for (int group = 0; group < layout.groups; ++group)
        arrive_expecting(box(s, group), layout.rows_of(group) * layout.units * int(sizeof(float)));
    slice.read(place(0), 0, s);
    commit_copies();
    for (int group = 0; group < layout.groups; ++group) {
      if (group + 1 < layout.groups) {
        slice.read(place(group + 1), group + 1, s);
        commit_copies();
        wait_copies<1>();
      } else {
        wait_copies<0>();
      }
      sync_block();  // the slice is there, and the sums of the group before have been read

      const int rows = layout.rows_of(group);
      for (int r = 0; r < rows; r += kTogether) {
        const unsigned char* const from =
            place(group) + r * layout.row_bytes + part * chunks * GridLayout::kChunkBytes;
        float* const to = sums + part * layout.part_sums + r * layout.sum_stride +
                          across * TILES * GridLayout::kTileUnits;
        if (r + GridLayout::kTileRows < rows)
          multiply<Product, kTogether / GridLayout::kTileRows>(
              weight, more_weight, chunks, from, layout.row_bytes, to, layout.sum_stride);
        else
          multiply<Product, 1>(weight, more_weight, chunks, from, layout.row_bytes, to,
                               layout.sum_stride);
      }
      sync_block();

      if (send_row >= send_step) continue;
      for (int row = send_row; row < rows; row += send_step) {
        Elements<C, kQuad> sum{};
        TORCH_BPTT_UNROLL_LITTLE
        for (int p = 0; p < layout.parts; ++p) {
          const Words4 add =
              load_words<16>(sums + p * layout.part_sums + row * layout.sum_stride + send_unit);
          for_elements<kQuad>(kQuad, [&](int e) { sum[e] += as_float(add.word[e]); });
        }
        Words4 text;
        for_elements<kQuad>(kQuad, [&](int e) { text.word[e] = as_bits(sum[e]); });
        const auto* const own = letters(s, group) + letter + row * layout.own_units;
        send(receiver + offset_of(own), text, receiver + offset_of(box(s, group)));
      }
    }

    const Step step(loop, i), next(loop, i + 1), later(loop, i + kPrefetched);
    for (int group = 0; group < layout.groups; ++group) {
      const int64_t b = first_row + row_of(group);
      const bool exists = mine(group) && step.has(b), goes_on = mine(group) && !last && next.has(b);
      Constants<S, kQuad> constants = of_units;
      Inputs<S, kQuad> inputs;
      Elements<C, kQuad> leaking{};
      if (exists) {
        inputs = step.template inputs<kQuad>(b, j, count, step.sources(b, j));
        leaking = step.template leaking<kQuad>(b, j, count);
      }
      if (mine(group)) constants.mask = step.template mask_of<kQuad>(b, j, count);
      if (mine(group) && i + kPrefetched < steps.end && later.has(b))
        later.prefetch(b, later.sources(b, j));
      const Origin origin = goes_on ? next.origin(b) : Origin::nothing;
      const Terms<S, kQuad> terms = step.terms(inputs, constants);
      wait_for_mail(box(s, group), unsigned(s >> 1 & 1));
      Finished<S, kQuad> finished;
      if (exists) {
        Elements<C, kQuad> sum{};
        const float* const from = letters(s, group) + own_row * layout.own_units + own_unit;
        TORCH_BPTT_UNROLL_LITTLE
        for (int r = 0; r < layout.cluster; ++r) {
          const Words4 add = load_words<16>(from + r * layout.rows * layout.own_units);
          for_elements<kQuad>(kQuad, [&](int e) { sum[e] += as_float(add.word[e]); });
        }
        finished = step.template finish<kQuad>(b, j, count, sum, leaking, terms, constants);
      }
      if (!last) {
        Elements<S, kQuad> state{};
        if (goes_on) {
          state = next.template arriving<kQuad>(origin, b, j, count, finished);
          state = rounded<Product>(next.entering(state, constants));
        }
        if (mine(group)) write_entering(s + 1, group, state);
        publish_entering(s + 1, group);
      }
      // Others wait for what enters: what is for later comes after it.
      if (exists) {
        step.write(b, j, count, finished, step.targets(b, j));
        step.hand_over(b, j, count, finished);
      }
    }
  }
}

#else

template <class S, class Product, int TILES, class KNOWN>
__global__ void grid_kernel(const __grid_constant__ Loop<S>, const __grid_constant__ Steps,
                            const __grid_constant__ GridLayout, const __grid_constant__ Workspace,
                            int64_t) {
  __trap();  // no clusters before sm_90: the plan never comes here
}

#endif  // TORCH_BPTT_HAS_CLUSTERS

Launch launch_of(const GridLayout& layout, void* stream) {
  Launch how;
  how.grid.x = unsigned(layout.blocks());
  how.threads = unsigned(layout.threads);
  how.cluster = unsigned(layout.cluster);
  how.shared_bytes = size_t(layout.shared_bytes);
  how.stream = stream;
  how.whole_grid = true;
  return how;
}

template <class S, class Product, int TILES>
Error run(const Loop<S>& loop, Steps steps, const Plan& plan, void* memory, void* stream) {
  const auto run_rows = [&](auto kernel, int64_t first_row, int64_t rows) -> Error {
    const GridLayout layout(loop.H, rows, sizeof(S), plan.cluster, plan.blocks / plan.cluster,
                            plan.rows, plan.tile);
    const Launch how = launch_of(layout, stream);
    if (Error error = prepare(kernel, how)) return error;
    const Workspace workspace(layout, memory);
    return run_in_parts(steps, [&](Steps part) -> Error {
      if (Error error = clear(workspace.flags, size_t(layout.flag_bytes), stream)) return error;
      return launch(kernel, how, loop, part, layout, workspace, first_row);
    });
  };
  return run_knowing(loop, kQuad, [&](auto known) -> Error {
    const auto kernel = grid_kernel<S, Product, TILES, decltype(known)>;
    const int64_t B = loop.schedule.B;
    for (int64_t row = 0; row < B; row += plan.batch) {
      const int64_t rows = plan.batch < B - row ? plan.batch : B - row;
      if (Error error = run_rows(kernel, row, rows)) return error;
    }
    return nullptr;
  });
}

}  // namespace

template <class S>
Error run_grid_path(const Loop<S>& loop, Steps steps, const Plan& plan, void* workspace,
                    void* stream) {
  if (plan.arithmetic == Arithmetic::tensor) {
    if (plan.tile == 1) return run<S, TensorProduct<S, 2>, 1>(loop, steps, plan, workspace, stream);
    if (plan.tile == 2) return run<S, TensorProduct<S, 2>, 2>(loop, steps, plan, workspace, stream);
    if (plan.tile == 3) return run<S, TensorProduct<S, 2>, 3>(loop, steps, plan, workspace, stream);
  } else if constexpr (std::is_same_v<S, float>) {
    if (plan.tile == 1) return run<S, PlainProduct, 1>(loop, steps, plan, workspace, stream);
  }
  return "the plan asks for a product that was not compiled";
}

int whole_grid_clusters(int cluster, int64_t shared_bytes) {
  Launch how;
  how.grid.x = how.cluster = unsigned(cluster);
  how.threads = GridLayout::kMaxThreads;
  how.shared_bytes = size_t(shared_bytes);
  how.whole_grid = true;
  int clusters = 0;
  const auto kernel =
      grid_kernel<float, TensorProduct<float, 2>, 1, Known<int(Pass::forward), true, true>>;
  const Error error = active_clusters(kernel, how, &clusters);
  return error ? 0 : clusters;
}

template Error run_grid_path(const Loop<float>&, Steps, const Plan&, void*, void*);
template Error run_grid_path(const Loop<bfloat16>&, Steps, const Plan&, void*, void*);
template Error run_grid_path(const Loop<float16>&, Steps, const Plan&, void*, void*);

}  // namespace torch_bptt::cuda
