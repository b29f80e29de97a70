// All blocks of the device together, which run all steps: for weights that no cluster can hold. The
// weight stays in registers and shared memory; the states of a step go through global memory, that
// is, through the second-level cache.
//
// A block multiplies its slice of the entering states with its columns of its cluster's rows of the
// weight, and sends each block of its cluster the sums for the units that this one finishes
// (grid_layout.h). Those are added up in the order of the blocks, finished, and their states
// written for all blocks to read, with a number that says so. While the number travels, each thread
// writes its results and prepares what it will finish next; while rows of states come, those before
// them are multiplied.
//
// The exchange. What enters step s (counted from the launch's first) lies in place s % 2 of global
// memory; a block's flag is at least s + 1 when its part lies there. Sums of step s go to letters
// s % 2 of the block that finishes them, and box s % 2 tells when all have come. Why two of each
// suffice:
//
//   (1) A block finishes step s when it has the sums of all blocks of its cluster. Each of those
//       sends them after all of its warps have read their part of what entered s; and the slices of
//       a cluster make up the whole. So when a block has finished step s, all blocks have written
//       what enters s, hence have finished s - 1; by the same argument, applied to each of them,
//       every block of the grid has read what entered s - 1.
//   (2) What enters s + 1 is written to place (s + 1) % 2 = (s - 1) % 2 by threads that have the
//       sums of step s: by (1) nobody reads that place any more.
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
// Inside a block, barriers part a step: when rows of the slice are there, for the warps that share
// it; when all sums are; and when all states are written. After the second one the slice may be
// overwritten, after the third one the sums.
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

// Global memory of a launch: a flag for each block, zeros at its start; and what enters two steps,
// [row][columns].
class Workspace {
 public:
  Workspace(const GridLayout& layout, void* memory)
      : flags(static_cast<uint32_t*>(memory)),
        states(static_cast<unsigned char*>(memory) + layout.flag_bytes) {}

#if TORCH_BPTT_HAS_CLUSTERS
  // What enters step s.
  TORCH_BPTT_DEVICE unsigned char* place(const GridLayout& layout, int s) const {
    return states + (s & 1) * layout.state_bytes;
  }
#endif

  uint32_t* flags;

 private:
  unsigned char* states;
};

#if TORCH_BPTT_HAS_CLUSTERS

// ---- the exchange -------------------------------------------------------------------------------

// Waits for all groups of copies but the last `pending`, of which there are no more than MOST.
template <int MOST>
TORCH_BPTT_DEVICE void wait_copies_but(int pending) {
  if constexpr (MOST > 0)
    if (pending < MOST) return wait_copies_but<MOST - 1>(pending);
  wait_copies<MOST>();
}

// The part of a block's slice that a warp multiplies. The warps of a part share its reading: a
// thread reads the same 16 bytes of every `row_step`th row.
class Slice {
 public:
  // For warp `across` of its part, which begins at `to`; rows have `width` bytes.
  TORCH_BPTT_DEVICE Slice(const GridLayout& layout, unsigned char* to, int width, int own_bytes,
                          int across, int part)
      : l(layout) {
    const int begin = int(cluster_rank()) * l.slice_bytes + part * l.part_bytes(),
              left = width - begin, bytes = left < l.part_bytes() ? left : l.part_bytes();
    const bool exists = bytes > 0;
    first_block = begin / own_bytes;
    blocks = exists ? (begin + bytes + own_bytes - 1) / own_bytes - first_block : 0;
    const int pieces = exists ? (bytes + 15) / 16 : 1, threads = l.across * kWarp,
              thread = across * kWarp + int(lane_index()), at = thread % pieces * 16;
    row_step = threads / pieces;
    first_row = exists && thread / pieces < row_step ? thread / pieces : l.rows;
    valid = bytes - at < 16 ? bytes - at : 16;
    column = begin + at;
    column_to = to + at;
  }

  // Waits until all units of it have been written, and starts copies: a group for each stage.
  TORCH_BPTT_DEVICE void read(const Workspace& workspace, int s) const {
    const unsigned char* const from = workspace.place(l, s) + column;
    for (int block = int(lane_index()); block < blocks; block += kWarp)
      wait_for_flag(workspace.flags + first_block + block, uint32_t(s) + 1);
    warp_sync();
    for (int stage = 0; stage < l.rows; stage += l.stage_rows) {
      const int end = stage + l.stage_rows < l.rows ? stage + l.stage_rows : l.rows;
      const int first = stage + first_row;
      unsigned char* row_to = column_to + first * l.row_bytes;
      const unsigned char* row_from = from + first * l.state_row_bytes;
      TORCH_BPTT_UNROLL_LITTLE
      for (int row = first; row < end; row += row_step) {
        copy_async<16>(row_to, row_from, valid);
        row_to += row_step * l.row_bytes;
        row_from += row_step * l.state_row_bytes;
      }
      commit_copies();
    }
  }

 private:
  const GridLayout& l;
  int first_block, blocks;  // that write it
  int first_row, row_step;
  int column, valid;  // of a row, and how many bytes there exist
  unsigned char* column_to;
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

// Adds `count` quads, a power of two, in their order, which are read in few goes; FIRST have been
// added.
template <int MOST, int FIRST = 0, class Read>
TORCH_BPTT_DEVICE void add_up(Elements<float, kQuad>& sum, int count, Read read) {
  constexpr int kMany = FIRST > 0 ? FIRST : 1;
  if constexpr (FIRST < MOST) {
    if (FIRST > 0 && FIRST >= count) return;
    Words4 more[kMany];
    TORCH_BPTT_UNROLL
    for (int k = 0; k < kMany; ++k) more[k] = read(FIRST + k);
    TORCH_BPTT_UNROLL
    for (int k = 0; k < kMany; ++k)
      for_elements<kQuad>(kQuad, [&](int e) { sum[e] += as_float(more[k].word[e]); });
    add_up<MOST, FIRST + kMany>(sum, count, read);
  }
}

// What a quad of a step needs besides its product: what there always is, and what options bring.
// The registers do not suffice to keep the latter during the product.
template <class S>
struct Prepared {
  bool exists = false;
  Origin origin{};  // of what arrives at the next step
  Terms<S, kQuad> terms;
};
template <class S>
struct Extras {
  Constants<S, kQuad> constants;
  Elements<Compute<S>, kQuad> leaking{};
  Elements<S, kQuad> arriving{};  // at the next step, where it is not this one's state
};

template <class S, class Product, int TILES, class KNOWN>
__global__ void __launch_bounds__(GridLayout::kMaxThreads, 1)
    grid_kernel(const __grid_constant__ Loop<S> loop, const __grid_constant__ Steps steps,
                const __grid_constant__ GridLayout layout,
                const __grid_constant__ Workspace workspace, int64_t first_row) {
  using C = Compute<S>;
  using Step = cuda::Step<S, KNOWN>;
  constexpr int kRegisterChunks = GridLayout::register_chunks(TILES);
  constexpr int kTogether = GridLayout::rows_together(Product::kReadAhead, TILES);
  // Whether there are registers to keep what a thread has prepared during the product.
  constexpr bool kKeeps = Product::kReadAhead;
  unsigned char* const memory = shared_memory();
  const auto box_of = [](int s) { return (s & 1) * int(sizeof(Mailbox)); };
  const auto box = [&](int s) { return reinterpret_cast<Mailbox*>(memory + box_of(s)); };
  float* const sums = reinterpret_cast<float*>(memory + layout.sums);
  const int thread = int(thread_index()), lane = thread % kWarp, warp = thread / kWarp;
  const int block = int(block_index().x), rank = int(cluster_rank()), H = int(loop.H);
  const int across = warp % layout.across, part = warp / layout.across, chunks = layout.chunks;
  const int units0 = block / layout.cluster * layout.units,
            units_end = units0 + layout.units < H ? units0 + layout.units : H,
            unit0 = units0 + across * TILES * GridLayout::kTileUnits,
            chunk0 = (rank * layout.parts + part) * chunks;
  const int rows = layout.rows;

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

  // The quad of a row that this thread finishes, of every `own_step`th row, and how many of its
  // elements there are; and the quads of the cluster's units that it sends.
  const int own_quads = layout.own_units / kQuad, own_step = layout.own_step(),
            own_unit = thread % own_quads * kQuad;
  const int j = block * layout.own_units + own_unit, left = H - j;
  const int count = left < 0 ? 0 : left < kQuad ? left : kQuad;
  const int own_row = count > 0 && thread / own_quads < own_step ? thread / own_quads : rows;
  const int quads = layout.units / kQuad, send_step = layout.send_step(),
            send_unit = thread % quads * kQuad,
            send_row = thread / quads < send_step ? thread / quads : rows;
  // Letters of step s: sums of all blocks for the own units, [block][row][unit].
  const auto letters = [&](int s) { return layout.letters + (s & 1) * layout.box_bytes; };
  const auto letter = [&](int from, int row, int unit) {
    return ((from * rows + row) * layout.own_units + unit) * int(sizeof(float));
  };
  const Remote receiver = in_block(unsigned(send_unit / layout.own_units), memory);
  const int sent = letter(rank, 0, send_unit % layout.own_units);

  // This thread's quad of what enters step s, where all blocks find it.
  const auto write_entering = [&](int s, int row, const Elements<S, kQuad>& values) {
    unsigned char* const to =
        workspace.place(layout, s) + (row * layout.state_row_bytes + j * int(sizeof(S)));
    __builtin_memcpy(__builtin_assume_aligned(to, kQuad * sizeof(S)), &values, sizeof values);
  };
  // When all threads have written theirs. The last warp has the least to finish.
  const auto publish_entering = [&](int s) {
    sync_block();
    if (thread == layout.threads - kWarp) publish(workspace.flags + block, uint32_t(s) + 1);
  };

  // Rows and columns that do not exist are multiplied along, and nobody writes them: zeros.
  for (int at = GridLayout::kPlace + thread * 16; at < layout.sums; at += layout.threads * 16)
    store_words<16>(memory + at, Words4{});
  if (thread == 0) {
    init_mailbox(box(0), 1);
    init_mailbox(box(1), 1);
    publish_mailboxes();
  }
  {
    const Step first(loop, steps.begin);
    for (int row = own_row; row < rows; row += own_step) {
      const int64_t b = first_row + row;
      Elements<S, kQuad> state{};
      if (first.has(b)) state = rounded<Product>(first.template entering<kQuad>(b, j, count));
      write_entering(0, row, state);
    }
    publish_entering(0);
  }
  sync_cluster();

  const Slice slice(layout, memory + GridLayout::kPlace + part * layout.part_bytes(),
                    H * int(sizeof(S)), layout.own_units * int(sizeof(S)), across, part);
  const int many = int(steps.end - steps.begin);
  for (int s = 0; s < many; ++s) {
    const int64_t i = steps.begin + s;
    const bool last = s + 1 == many;
    if (thread == 0) arrive_expecting(box(s), rows * layout.units * int(sizeof(float)));

    const auto prepare = [&](int row) {
      const int64_t b = first_row + row;
      const Step step(loop, i), next(loop, i + 1);
      Prepared<S> made;
      made.exists = step.has(b);
      if (!last && next.has(b)) made.origin = next.origin(b);
      if (made.exists)
        made.terms = step.terms(step.template inputs<kQuad>(b, j, count, step.sources(b, j)),
                                Step::template of_units<kQuad>(loop, j, count));
      return made;
    };
    const auto read_extras = [&](int row, const Prepared<S>& own) {
      const int64_t b = first_row + row;
      const Step step(loop, i), next(loop, i + 1);
      Extras<S> read;
      read.constants = step.template constants<kQuad>(b, j, count);
      if (own.exists) read.leaking = step.template leaking<kQuad>(b, j, count);
      if (own.origin != Origin::state)
        read.arriving = next.template arriving<kQuad>(own.origin, b, j, count, {});
      return read;
    };
    const auto finish = [&](int row, const Prepared<S>& own, const Extras<S>& extras) {
      const int64_t b = first_row + row;
      const Step step(loop, i), next(loop, i + 1);
      Finished<S, kQuad> finished;
      if (own.exists) {
        Elements<C, kQuad> product{};
        add_up<GridLayout::kMostBlocks>(product, layout.cluster, [&](int from) {
          return load_words<16>(memory + letters(s) + letter(from, row, own_unit));
        });
        finished = step.template finish<kQuad>(b, j, count, product, extras.leaking, own.terms,
                                               extras.constants);
      }
      if (last) return finished;
      Elements<S, kQuad> arriving = extras.arriving;
      if (own.origin == Origin::state) arriving = finished.state;
      write_entering(s + 1, row, rounded<Product>(next.entering(arriving, extras.constants)));
      return finished;
    };
    const auto write = [&](int row, const Finished<S, kQuad>& finished) {
      const int64_t b = first_row + row;
      const Step step(loop, i);
      step.write(b, j, count, finished, step.targets(b, j));
      step.hand_over(b, j, count, finished);
    };

    // While others publish what enters.
    Prepared<S> own;
    if (kKeeps && own_row < rows) own = prepare(own_row);
    slice.read(workspace, s);
    if (s + kPrefetched < many) {
      const Step later(loop, i + kPrefetched);
      for (int row = own_row; row < rows; row += own_step)
        if (const int64_t b = first_row + row; later.has(b)) later.prefetch(b, later.sources(b, j));
    }

    for (int stage = 0, pending = layout.stages; stage < rows; stage += layout.stage_rows) {
      const int end = stage + layout.stage_rows < rows ? stage + layout.stage_rows : rows;
      wait_copies_but<GridLayout::kMostStages - 1>(--pending);
      sync_part(1 + part, layout.across * kWarp);
      for (int r = stage; r < end; r += kTogether) {
        const unsigned char* const from =
            memory + GridLayout::kPlace + r * layout.row_bytes + part * layout.part_bytes();
        float* const to = sums + part * layout.part_sums + r * layout.sum_stride +
                          across * TILES * GridLayout::kTileUnits;
        if (kTogether > GridLayout::kTileRows && r + GridLayout::kTileRows < end)
          multiply<Product, kTogether / GridLayout::kTileRows>(
              weight, more_weight, chunks, from, layout.row_bytes, to, layout.sum_stride);
        else
          multiply<Product, 1>(weight, more_weight, chunks, from, layout.row_bytes, to,
                               layout.sum_stride);
      }
    }
    sync_block();

    for (int row = send_row; row < rows; row += send_step) {
      Elements<C, kQuad> sum{};
      add_up<GridLayout::kMostParts>(sum, layout.parts, [&](int p) {
        return load_words<16>(sums + p * layout.part_sums + row * layout.sum_stride + send_unit);
      });
      Words4 text;
      for_elements<kQuad>(kQuad, [&](int e) { text.word[e] = as_bits(sum[e]); });
      send(receiver + (letters(s) + sent + letter(0, row, 0)), text, receiver + box_of(s));
    }

    Extras<S> extras;
    if (!kKeeps && own_row < rows) own = prepare(own_row);
    if (own_row < rows) extras = read_extras(own_row, own);
    Finished<S, kQuad> finished;
    int row = own_row;
    for (;; row += own_step) {
      // Who finishes nothing waits as well: the block may not end before.
      wait_for_mail(box(s), unsigned(s >> 1 & 1));
      if (row >= rows) break;
      finished = finish(row, own, extras);
      if (row + own_step >= rows) break;
      if (own.exists) write(row, finished);
      own = prepare(row + own_step);
      extras = read_extras(row + own_step, own);
    }
    if (!last) publish_entering(s + 1);
    // Others wait for what enters: what is for later comes after it.
    if (own.exists) write(row, finished);
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
  const auto run_rows = [&](auto kernel, int64_t first_row, int rows) -> Error {
    const GridLayout layout(loop.H, rows, sizeof(S), plan.cluster, plan.blocks / plan.cluster,
                            plan.tile);
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
    for (int64_t row = 0; row < B; row += plan.rows) {
      const int64_t left = B - row;
      if (Error error = run_rows(kernel, row, left < plan.rows ? int(left) : plan.rows))
        return error;
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
