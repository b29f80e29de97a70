// A kernel for each step: any size, dtype and option.
//
// A block computes a tile of the product, `units` columns by `rows` rows of the batch, reading both
// factors through shared memory in stages of cp.async, and finishes its elements. Small tiles cut
// the sum in groups of warps, so that a small batch still occupies many blocks with many warps.
// While a step runs, the next one already reads its first part of the weight (Launch::overlap).
#include "paths.h"

#include "step.h"

namespace torch_bptt::cuda {

namespace {

// ---- reading both factors -----------------------------------------------------------------------

// A row of the result: what enters the product, and its mask.
template <class S>
struct Row {
  const S* entering;  // null: zeros
  const S* mask;      // null: ones
};

// 16 bytes of a row of H elements, from element k on; zeros behind its end. FRESH: the step before
// may just have written it.
template <class S, bool FRESH>
TORCH_BPTT_DEVICE void read_piece(unsigned char* to, const S* row, const S* mask, int64_t k,
                                  int64_t H, const S* readable, bool aligned) {
  constexpr int kElements = 16 / sizeof(S);
  const int64_t left = row && k < H ? H - k : 0;
  const int valid = int(left < kElements ? left : kElements);
  if (aligned && !mask) {
    copy_async<16>(to, valid ? row + k : readable, valid * int(sizeof(S)));
    return;
  }
  TORCH_BPTT_UNROLL
  for (int e = 0; e < kElements; ++e) {
    S value{};
    if (e < valid) {
      value = FRESH ? load_fresh(row + k + e) : row[k + e];
      if (mask) value = narrow<S>(widen(mask[k + e]) * widen(value));
    }
    __builtin_memcpy(to + e * int(sizeof(S)), &value, sizeof(S));
  }
}

// The part of the weight that a stage needs, and that of the rows, which lies behind it.
template <class S, int TILE>
TORCH_BPTT_DEVICE void read_weight(unsigned char* stage, const Loop<S>& loop, int64_t unit0,
                                   int64_t block, bool aligned) {
  constexpr StepTile kTile = kStepTiles[TILE];
  constexpr int kPieces = kTile.block_bytes() / 16, kElements = 16 / sizeof(S);
  for (int p = int(thread_index()); p < kTile.units * kPieces; p += kTile.threads) {
    const int row = p / kPieces, piece = p % kPieces;
    const S* from = unit0 + row < loop.H ? loop.weight + (unit0 + row) * loop.H : nullptr;
    read_piece<S, false>(stage + row * kTile.row_bytes() + piece * 16, from, nullptr,
                         (block * kPieces + piece) * kElements, loop.H, loop.weight, aligned);
  }
}
template <class S, int TILE>
TORCH_BPTT_DEVICE void read_rows(unsigned char* stage, const Loop<S>& loop, const Row<S>* rows,
                                 int64_t block, bool aligned) {
  constexpr StepTile kTile = kStepTiles[TILE];
  constexpr int kPieces = kTile.block_bytes() / 16, kElements = 16 / sizeof(S);
  for (int p = int(thread_index()); p < kTile.rows * kPieces; p += kTile.threads) {
    const int row = p / kPieces, piece = p % kPieces;
    read_piece<S, true>(stage + (kTile.units + row) * kTile.row_bytes() + piece * 16,
                        rows[row].entering, rows[row].mask, (block * kPieces + piece) * kElements,
                        loop.H, loop.weight, aligned);
  }
}

// ---- the product of a stage ---------------------------------------------------------------------

// Tensor cores: a warp computes 16 units by kRows rows. float is rounded to tf32.
template <class S, int TILE>
class TensorTile {
  static constexpr StepTile kTile = kStepTiles[TILE];

 public:
  TORCH_BPTT_DEVICE TensorTile() : lane(int(lane_index())) {
    const int warp = int(warp_index());
    unit = warp % kAcross * 16;
    row = warp / kAcross % kDown * kRows;
    group = warp / (kAcross * kDown);
  }

  TORCH_BPTT_DEVICE void add(const unsigned char* stage) {
    const unsigned char* weight =
        stage + (unit + lane % 16) * kTile.row_bytes() + group * kTile.group_bytes + lane / 16 * 16;
    const unsigned char* rows = stage +
                                (kTile.units + row + lane % 8 + lane / 16 * 8) * kTile.row_bytes() +
                                group * kTile.group_bytes + lane / 8 % 2 * 16;
    TORCH_BPTT_UNROLL
    for (int k = 0; k < kTile.group_bytes; k += 32) {
      uint32_t a[4];
      warp_load_matrices(a, weight + k);
      round(a);
      TORCH_BPTT_UNROLL
      for (int n = 0; n < kRows; n += 16) {
        uint32_t b[4];
        warp_load_matrices(b, rows + n * kTile.row_bytes() + k);
        round(b);
        warp_multiply<S>(sums[n / 8], a, {b[0], b[1]});
        warp_multiply<S>(sums[n / 8 + 1], a, {b[2], b[3]});
      }
    }
  }

  TORCH_BPTT_DEVICE void store(float* to) const {
    TORCH_BPTT_UNROLL
    for (int n = 0; n < kRows / 8; ++n) {
      TORCH_BPTT_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int r = row + n * 8 + lane % 4 * 2 + i % 2, u = unit + lane / 4 + i / 2 * 8;
        to[(group * kTile.rows + r) * kTile.sum_stride() + u] = sums[n][i];
      }
    }
  }

 private:
  static constexpr int kAcross = kTile.units / 16;
  static constexpr int kDown = kTile.threads / kWarp / kAcross / kTile.groups;
  static constexpr int kRows = kTile.rows / kDown;  // of a warp
  static_assert(kRows % 16 == 0 && kAcross * kDown * kTile.groups * kWarp == kTile.threads);

  template <int N>
  static TORCH_BPTT_DEVICE void round(uint32_t (&registers)[N]) {
    if constexpr (sizeof(S) == 4) {
      TORCH_BPTT_UNROLL
      for (int i = 0; i < N; ++i) registers[i] = to_tf32(as_float(registers[i]));
    }
  }

  int lane, unit, row, group;
  float sums[kRows / 8][4] = {};
};

// Single multiply-adds: a thread computes 4 units by 4 rows.
template <class S, int TILE>
class PlainTile {
  static constexpr StepTile kTile = kStepTiles[TILE];

 public:
  using C = Compute<S>;

  TORCH_BPTT_DEVICE PlainTile() {
    const int thread = int(thread_index());
    unit = thread % kAcross;
    row = thread / kAcross % kDown;
    group = thread / (kAcross * kDown);
  }

  TORCH_BPTT_DEVICE void add(const unsigned char* stage) {
    constexpr int kElements = 16 / sizeof(S);
    for (int k = 0; k < kTile.group_bytes; k += 16) {
      C weight[4][kElements], rows[4][kElements];
      TORCH_BPTT_UNROLL
      for (int i = 0; i < 4; ++i) {
        read(weight[i],
             stage + (unit + i * kAcross) * kTile.row_bytes() + group * kTile.group_bytes + k);
        read(rows[i], stage + (kTile.units + row + i * kDown) * kTile.row_bytes() +
                          group * kTile.group_bytes + k);
      }
      TORCH_BPTT_UNROLL
      for (int e = 0; e < kElements; ++e) {
        TORCH_BPTT_UNROLL
        for (int r = 0; r < 4; ++r) {
          TORCH_BPTT_UNROLL
          for (int u = 0; u < 4; ++u) sums[r][u] += weight[u][e] * rows[r][e];
        }
      }
    }
  }

  TORCH_BPTT_DEVICE void store(C* to) const {
    TORCH_BPTT_UNROLL
    for (int r = 0; r < 4; ++r) {
      TORCH_BPTT_UNROLL
      for (int u = 0; u < 4; ++u)
        to[(group * kTile.rows + row + r * kDown) * kTile.sum_stride() + unit + u * kAcross] =
            sums[r][u];
    }
  }

 private:
  static constexpr int kAcross = kTile.units / 4, kDown = kTile.rows / 4;
  static_assert(kAcross * kDown * kTile.groups == kTile.threads);

  template <int N>
  static TORCH_BPTT_DEVICE void read(C (&to)[N], const unsigned char* from) {
    const Words4 words = load_words<16>(from);
    S elements[N];
    __builtin_memcpy(elements, &words, sizeof(words));
    TORCH_BPTT_UNROLL
    for (int e = 0; e < N; ++e) to[e] = widen(elements[e]);
  }

  int unit, row, group;
  C sums[4][4] = {};
};

// ---- the step -----------------------------------------------------------------------------------

template <class S, int TILE>
__global__ void __launch_bounds__(kStepTiles[TILE].threads, 2)
    step_kernel(const __grid_constant__ Loop<S> loop, int64_t i, bool aligned) {
  using C = Compute<S>;
  using Product = std::conditional_t<TILE <= kTensorLarge, TensorTile<S, TILE>, PlainTile<S, TILE>>;
  constexpr StepTile kTile = kStepTiles[TILE];
  constexpr int kElements = kTile.units * kTile.rows / kTile.threads;  // of a thread
  static_assert(kElements * kTile.threads == kTile.units * kTile.rows);

  let_next_kernel_start();
  unsigned char* const memory = shared_memory();
  auto* const rows = reinterpret_cast<Row<S>*>(memory + kTile.tile_bytes(sizeof(C)));
  const int64_t row0 = int64_t(block_index().x) * kTile.rows,
                unit0 = int64_t(block_index().y) * kTile.units;
  const Step<S> step(loop, i);
  // Where the adjoint begins nothing comes back from later, and the product is not read.
  const bool multiplied = loop.pass != Pass::adjoint || i > 0;
  const int64_t blocks =
      multiplied ? (loop.H * int64_t(sizeof(S)) + kTile.block_bytes() - 1) / kTile.block_bytes()
                 : 0;
  const auto stage_of = [&](int64_t block) {
    return memory + block % kTile.stages * kTile.stage_bytes();
  };
  const auto row_of = [&](int e) {
    return (e * kTile.threads + int(thread_index())) / kTile.units;
  };
  const auto unit_of = [&](int e) {
    return (e * kTile.threads + int(thread_index())) % kTile.units;
  };
  if (row0 < step.rows()) {
    TORCH_BPTT_UNROLL
    for (int e = 0; e < kElements; ++e) {  // one thread for a line of float32
      const int64_t b = row0 + row_of(e), j = unit0 + unit_of(e);
      if (unit_of(e) % 32 == 0 && j < loop.H && b < step.rows())
        step.prefetch(b, step.sources(b, j));
    }
    for (int64_t block = 0; block < kTile.stages - 1 && block < blocks; ++block)
      read_weight<S, TILE>(stage_of(block), loop, unit0, block, aligned);
  }
  // What finished elements need besides the product no kernel of the loop writes before this one:
  // where there are registers for it, it is read while the one before ends.
  constexpr bool kReadsAhead = kElements <= 4;
  Inputs<S, 1> inputs[kElements];
  Constants<S, 1> constants[kElements];
  const auto read = [&](int e) {
    const int64_t b = row0 + row_of(e), j = unit0 + unit_of(e);
    if (b >= step.rows() || j >= loop.H) return;
    inputs[e] = step.template inputs<1>(b, j, 1, step.sources(b, j));
    constants[e] = step.template constants<1>(b, j, 1);
  };
  if (kReadsAhead) {
    TORCH_BPTT_UNROLL
    for (int e = 0; e < kElements; ++e) read(e);
  }
  wait_for_kernel_before();
  if (row0 >= step.rows()) return;

  if (int(thread_index()) < kTile.rows) {
    const int64_t b = row0 + thread_index();
    rows[thread_index()] = b < step.rows() ? Row<S>{step.arriving(b), step.mask(b)} : Row<S>{};
  }
  sync_block();

  Product product;
  for (int64_t block = 0; block < kTile.stages - 1; ++block) {
    if (block < blocks) read_rows<S, TILE>(stage_of(block), loop, rows, block, aligned);
    commit_copies();
  }
  for (int64_t block = 0; block < blocks; ++block) {
    wait_copies<kTile.stages - 2>();
    sync_block();  // the stage is there, and the one before it has been used
    if (const int64_t next = block + kTile.stages - 1; next < blocks) {
      read_weight<S, TILE>(stage_of(next), loop, unit0, next, aligned);
      read_rows<S, TILE>(stage_of(next), loop, rows, next, aligned);
    }
    commit_copies();
    product.add(stage_of(block));
  }
  wait_copies<0>();
  sync_block();
  C* const sums = reinterpret_cast<C*>(memory);
  product.store(sums);
  sync_block();

  TORCH_BPTT_UNROLL
  for (int e = 0; e < kElements; ++e) {
    const int row = row_of(e), unit = unit_of(e);
    const int64_t b = row0 + row, j = unit0 + unit;
    if (b >= step.rows() || j >= loop.H) continue;
    Elements<C, 1> sum{};
    for (int group = 0; group < kTile.groups; ++group)
      sum[0] += sums[(group * kTile.rows + row) * kTile.sum_stride() + unit];
    if (!kReadsAhead) read(e);
    const auto finished =
        step.template finish<1>(b, j, 1, sum, step.template leaking<1>(b, j, 1),
                                step.terms(inputs[e], constants[e]), constants[e]);
    step.write(b, j, 1, finished, step.targets(b, j));
    step.hand_over(b, j, 1, finished);
  }
}

// ---- starting it --------------------------------------------------------------------------------

template <class S>
bool is_aligned(const S* data, int64_t stride = 0) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * int64_t(sizeof(S)) % 16 == 0;
}
template <class S>
bool is_aligned(const Rows<S>& rows) {
  return is_aligned(rows.data, rows.step) && is_aligned(rows.data, rows.row);
}

template <class S, int TILE>
Error run_tile(const Loop<S>& loop, Steps steps, void* stream) {
  constexpr StepTile kTile = kStepTiles[TILE];
  Launch how;
  // A grid may be wide but not high: more than a million rows are more likely than units.
  how.grid = {unsigned((loop.schedule.B + kTile.rows - 1) / kTile.rows),
              unsigned((loop.H + kTile.units - 1) / kTile.units), 1};
  how.threads = kTile.threads;
  how.shared_bytes = kTile.shared_bytes(sizeof(Compute<S>));
  how.stream = stream;
  const bool aligned = is_aligned(loop.weight, loop.H) && is_aligned(loop.state) &&
                       is_aligned(loop.first) && is_aligned(loop.restart);
  const auto kernel = step_kernel<S, TILE>;
  if (Error error = prepare(kernel, how)) return error;
  for (int64_t i = steps.begin; i < steps.end; ++i) {
    how.overlap = i > steps.begin;
    if (Error error = launch(kernel, how, loop, i, aligned)) return error;
  }
  return nullptr;
}

}  // namespace

template <class S>
Error run_step_path(const Loop<S>& loop, Steps steps, const Plan& plan, void* stream) {
  switch (plan.tile) {
    case kTensorSmall:
      if constexpr (sizeof(S) < 8) return run_tile<S, kTensorSmall>(loop, steps, stream);
      break;
    case kTensorMedium:
      if constexpr (sizeof(S) < 8) return run_tile<S, kTensorMedium>(loop, steps, stream);
      break;
    case kTensorLarge:
      if constexpr (sizeof(S) < 8) return run_tile<S, kTensorLarge>(loop, steps, stream);
      break;
    case kPlainSmall:
      return run_tile<S, kPlainSmall>(loop, steps, stream);
    case kPlainLarge:
      return run_tile<S, kPlainLarge>(loop, steps, stream);
  }
  return "the plan asks for a product that was not compiled";
}

#define TORCH_BPTT_ENTRY(S) template Error run_step_path(const Loop<S>&, Steps, const Plan&, void*);
TORCH_BPTT_STORAGE_TYPES(TORCH_BPTT_ENTRY)
#undef TORCH_BPTT_ENTRY

}  // namespace torch_bptt::cuda
