// A block of threads for each few rows of the batch, which runs all steps: no two blocks ever meet.
//
// The weight stays in registers. What enters a product lies in shared memory, in two places that
// take turns, so that a step has one barrier: while place i % 2 is read, finished states go to the
// other one, which nobody has read since the barrier before. Inputs are brought into the cache some
// steps ahead, and read while the step before multiplies. A thread finishes four units of a row at
// a time.
#include "paths.h"
#include "product.h"
#include "step.h"

namespace torch_bptt::cuda {

namespace {

// ---- products: the weight in registers, times a place -------------------------------------------
//
// A place has ROWS rows of WIDTH elements, WIDTH >= H, behind H zeros. A thread has kGroups
// results, each of kQuad units of a row.

template <class S, int WIDTH>
constexpr int kRowBytes = WIDTH * int(sizeof(S)) + 16;  // eight rows lie in different banks

// Tensor cores: a warp computes one or two tiles of 16 units, all rows, with the weight as the left
// factor. Which unit is which row of that is free; so chosen, two threads that exchange half of
// their results have four neighbours of a row each.
template <class S, int WIDTH, int ROWS>
class TensorBlock {
 public:
  using C = float;
  // More than eight warps would leave a thread too few registers.
  static constexpr int kTiles = WIDTH > 128 ? 2 : 1, kThreads = WIDTH / 16 / kTiles * kWarp,
                       kRows = ROWS, kWidth = WIDTH, kOctets = ROWS / 8, kGroups = kTiles * kOctets;
  static constexpr bool kReadsAhead = WIDTH <= 128;  // else the weight takes the registers for it

  TORCH_BPTT_DEVICE explicit TensorBlock(const Loop<S>& loop) : lane(int(lane_index())) {
    const bool words = reads_words<S, Product>(loop);
    TORCH_BPTT_UNROLL
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      TORCH_BPTT_UNROLL
      for (int tile = 0; tile < kTiles; ++tile) {
        TORCH_BPTT_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int row = Product::unit(lane, chunk, i);
          const int64_t j = first_unit(tile) + row % 8 * 2 + row / 8;  // 8 rows apart: neighbours
          weight[chunk][tile][i] = read(loop, j, Product::k(lane, chunk, i), words);
        }
      }
    }
  }

  // As a product reads its factors.
  static TORCH_BPTT_DEVICE S rounded(S value) { return Product::rounded(value); }

  TORCH_BPTT_DEVICE void multiply(const unsigned char* place) {
    Product product[kTiles][kOctets];
    TORCH_BPTT_UNROLL
    for (int chunk = 0; chunk < kChunks; chunk += 2) {
      TORCH_BPTT_UNROLL
      for (int octet = 0; octet < kOctets; ++octet) {
        const auto piece = Product::read(place + octet * 8 * kRowBytes<S, WIDTH> + chunk * 32,
                                         kRowBytes<S, WIDTH>, lane);
        TORCH_BPTT_UNROLL
        for (int tile = 0; tile < kTiles; ++tile)
          product[tile][octet].add(chunk / 2, weight[chunk][tile], weight[chunk + 1][tile], piece);
      }
    }
    // Of the two rows that a thread has, the neighbouring thread takes one.
    const bool second = has_second_row();
    TORCH_BPTT_UNROLL
    for (int group = 0; group < kGroups; ++group) {
      const Product& sums = product[group / kOctets][group % kOctets];
      TORCH_BPTT_UNROLL
      for (int e = 0; e < 2; ++e) {
        const float first_row = sums.sum(2 * e), second_row = sums.sum(2 * e + 1);
        const float own = second ? second_row : first_row;
        const float other = warp_shuffle_xor(second ? first_row : second_row, 4);
        results[group][e] = second ? other : own;
        results[group][2 + e] = second ? own : other;
      }
    }
  }

  TORCH_BPTT_DEVICE bool finishes(int) const { return true; }
  TORCH_BPTT_DEVICE int row(int group) const {
    return group % kOctets * 8 + lane % 4 * 2 + has_second_row();
  }
  TORCH_BPTT_DEVICE int unit(int group) const {
    return first_unit(group / kOctets) + lane / 8 * kQuad;
  }
  TORCH_BPTT_DEVICE Elements<C, kQuad> result(int group) const { return results[group]; }

 private:
  // Two products are enough to wait for each other; one needs more chains.
  using Product = TensorProduct<S, kGroups == 1 ? 4 : 2>;
  static constexpr int kElements = Product::kElements;
  static constexpr int kChunks = WIDTH * int(sizeof(S)) / 32;  // of the sum

  TORCH_BPTT_DEVICE bool has_second_row() const { return lane / 4 % 2; }
  TORCH_BPTT_DEVICE int first_unit(int tile) const {
    return (int(warp_index()) * kTiles + tile) * 16;
  }

  // In branches: without them the registers do not suffice for the widest weight.
  static TORCH_BPTT_DEVICE uint32_t read(const Loop<S>& loop, int64_t j, int64_t k, bool words) {
    S elements[kElements] = {};
    const S* const from = loop.weight + j * loop.H + k;
    if (words && j < loop.H && k < loop.H) {
      __builtin_memcpy(elements, __builtin_assume_aligned(from, 4), 4);
    } else {
      TORCH_BPTT_UNROLL
      for (int e = 0; e < kElements; ++e)
        if (j < loop.H && k + e < loop.H) elements[e] = from[e];
    }
    elements[0] = rounded(elements[0]);
    uint32_t bits;
    __builtin_memcpy(&bits, elements, 4);
    return bits;
  }

  int lane;
  uint32_t weight[kChunks][kTiles][4];
  Elements<C, kQuad> results[kGroups];
};

// Single multiply-adds: eight threads share the sums of four units, 16 bytes of a row in turn.
template <class S, int WIDTH, int ROWS>
class PlainBlock {
 public:
  using C = Compute<S>;
  static constexpr int kParts = 8, kThreads = WIDTH / kQuad * kParts, kRows = ROWS, kWidth = WIDTH,
                       kGroups = (ROWS + kParts - 1) / kParts;
  static constexpr bool kReadsAhead = WIDTH * sizeof(S) <= 512;

  TORCH_BPTT_DEVICE explicit PlainBlock(const Loop<S>& loop)
      : part(int(thread_index()) % kParts), first(int(thread_index()) / kParts * kQuad) {
    TORCH_BPTT_UNROLL
    for (int u = 0; u < kQuad; ++u) {
      TORCH_BPTT_UNROLL
      for (int k = 0; k < kTerms; ++k) {
        const int64_t j = first + u, column = (k / kVector * kParts + part) * kVector + k % kVector;
        weight[u][k] =
            j < loop.H && column < loop.H ? widen(loop.weight[j * loop.H + column]) : C(0);
      }
    }
  }

  static TORCH_BPTT_DEVICE S rounded(S value) { return value; }

  TORCH_BPTT_DEVICE void multiply(const unsigned char* place) {
    TORCH_BPTT_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      C sums[kQuad] = {};
      TORCH_BPTT_UNROLL
      for (int piece = 0; piece < kTerms / kVector; ++piece) {
        const Words4 words =
            load_words<16>(place + r * kRowBytes<S, WIDTH> + (piece * kParts + part) * 16);
        S elements[kVector];
        __builtin_memcpy(elements, &words, sizeof(words));
        TORCH_BPTT_UNROLL
        for (int e = 0; e < kVector; ++e) {
          TORCH_BPTT_UNROLL
          for (int u = 0; u < kQuad; ++u)
            sums[u] += weight[u][piece * kVector + e] * widen(elements[e]);
        }
      }
      TORCH_BPTT_UNROLL
      for (int u = 0; u < kQuad; ++u) {
        TORCH_BPTT_UNROLL
        for (int lanes = kParts / 2; lanes > 0; lanes /= 2)
          sums[u] += warp_shuffle_xor(sums[u], lanes);
        if (r % kParts == part) results[r / kParts][u] = sums[u];
      }
    }
  }

  TORCH_BPTT_DEVICE bool finishes(int group) const { return row(group) < ROWS; }
  TORCH_BPTT_DEVICE int row(int group) const { return group * kParts + part; }
  TORCH_BPTT_DEVICE int unit(int) const { return first; }
  TORCH_BPTT_DEVICE Elements<C, kQuad> result(int group) const { return results[group]; }

 private:
  static constexpr int kVector = 16 / sizeof(S), kTerms = WIDTH / kParts;
  static_assert(kTerms % kVector == 0);

  int part, first;
  C weight[kQuad][kTerms];
  Elements<C, kQuad> results[kGroups] = {};
};

// ---- the loop -----------------------------------------------------------------------------------

// What enters a product, at its place.
template <class Product, class S>
TORCH_BPTT_DEVICE void put(unsigned char* place, int row, int j, int count,
                           Elements<S, kQuad> values) {
  for_elements<kQuad>(kQuad,
                      [&](int e) { values[e] = e < count ? Product::rounded(values[e]) : S{}; });
  constexpr int kAligned = sizeof(values) < 16 ? sizeof(values) : 16;
  unsigned char* const to = place + row * kRowBytes<S, Product::kWidth> + j * int(sizeof(S));
  __builtin_memcpy(__builtin_assume_aligned(to, kAligned), &values, sizeof(values));
}

template <class S, class Product, class KNOWN>
__global__ void __launch_bounds__(Product::kThreads, 1)
    block_kernel(const __grid_constant__ Loop<S> loop, const __grid_constant__ Pace pace,
                 const __grid_constant__ Steps steps) {
  using C = Compute<S>;
  using Step = cuda::Step<S, KNOWN>;
  // Whether there are registers for pointers that go along with the steps, and for what no step
  // changes or the next one needs; else all of it is found anew.
  constexpr bool kFollows = KNOWN::kDense && Product::kReadsAhead, kKeeps = Product::kReadsAhead;
  constexpr int kGroups = Product::kGroups,
                kPlaceBytes = Product::kRows * kRowBytes<S, Product::kWidth>;
  unsigned char* const places = shared_memory();
  for (int byte = int(thread_index()) * 16; byte < 2 * kPlaceBytes; byte += Product::kThreads * 16)
    store_words<16>(places + byte, {});
  Product product(loop);

  const int64_t row0 = int64_t(block_index().x) * Product::kRows;
  const auto row_of = [&](int group) { return row0 + product.row(group); };
  const auto count_of = [&](int group) {
    const int left = int(loop.H) - product.unit(group);
    return KNOWN::kAligned || left > kQuad ? kQuad : left;
  };
  const auto is_mine = [&](int group) {
    return product.unit(group) < loop.H && product.finishes(group) &&
           row_of(group) < loop.schedule.B;
  };

  Constants<S, kQuad> constants[kGroups];
  Elements<C, kQuad> leaking[kGroups] = {};
  Inputs<S, kQuad> inputs[kGroups];
  Sources<S> sources[kGroups];
  Targets<S> targets[kGroups];
  sync_block();
  {
    const Step first(loop, steps.begin);
    TORCH_BPTT_UNROLL
    for (int group = 0; group < kGroups; ++group) {
      const int64_t b = row_of(group);
      const int j = product.unit(group), count = count_of(group);
      if (!is_mine(group)) continue;
      if (kKeeps) constants[group] = first.template constants<kQuad>(b, j, count);
      if (!first.has(b)) continue;
      sources[group] = first.sources(b, j), targets[group] = first.targets(b, j);
      if (kKeeps) leaking[group] = first.template leaking<kQuad>(b, j, count);
      inputs[group] = first.template inputs<kQuad>(b, j, count, sources[group]);
      put<Product>(places, product.row(group), j, count,
                   first.template entering<kQuad>(b, j, count));
    }
  }
  const int many = int(steps.end - steps.begin);
  for (int s = 0; s < many; ++s) {
    unsigned char* const here = places + (s & 1) * kPlaceBytes;
    unsigned char* const there = places + (~s & 1) * kPlaceBytes;
    const bool last = s + 1 == many;
    const int64_t i = steps.begin + s;
    const Step step(loop, i), next(loop, i + 1), later(loop, i + kPrefetched);
    Origin origin[kGroups] = {};
    Inputs<S, kQuad> ahead[kGroups];
    TORCH_BPTT_UNROLL
    for (int group = 0; group < kGroups; ++group) {
      const int64_t b = row_of(group);
      const int j = product.unit(group), count = count_of(group);
      if (!is_mine(group)) continue;
      // One thread for a line of float32.
      if (j % 32 == 0 && s + kPrefetched < many && later.has(b))
        later.prefetch(b, kFollows ? sources[group].after(kPrefetched, pace) : later.sources(b, j));
      if (!Product::kReadsAhead && s > 0 && step.has(b))
        inputs[group] = step.template inputs<kQuad>(b, j, count, step.sources(b, j));
      if (last || !next.has(b)) continue;
      origin[group] = next.origin(b);
      if (!Product::kReadsAhead) continue;
      sources[group] = kFollows ? sources[group].after(1, pace) : next.sources(b, j);
      ahead[group] = next.template inputs<kQuad>(b, j, count, sources[group]);
    }
    sync_block();
    Terms<S, kQuad> terms[kGroups];
    if (Product::kReadsAhead) {  // while the product waits for its factors
      TORCH_BPTT_UNROLL
      for (int group = 0; group < kGroups; ++group)
        terms[group] = step.terms(inputs[group], constants[group]);
    }
    product.multiply(here);
    TORCH_BPTT_UNROLL
    for (int group = 0; group < kGroups; ++group) {
      const int64_t b = row_of(group);
      const int j = product.unit(group), count = count_of(group);
      const bool exists = is_mine(group) && step.has(b);
      if (!kKeeps && is_mine(group)) {
        constants[group] = step.template constants<kQuad>(b, j, count);
        if (step.has(b)) leaking[group] = step.template leaking<kQuad>(b, j, count);
      }
      if (!Product::kReadsAhead) terms[group] = step.terms(inputs[group], constants[group]);
      Finished<S, kQuad> finished;
      if (exists)
        finished = step.template finish<kQuad>(b, j, count, product.result(group), leaking[group],
                                               terms[group], constants[group]);
      if (is_mine(group) && !last && next.has(b)) {
        const auto state = next.template arriving<kQuad>(origin[group], b, j, count, finished);
        if (kKeeps) leaking[group] = next.leaking(finished, state);
        put<Product>(there, product.row(group), j, count, next.entering(state, constants[group]));
      }
      // Other threads wait for what enters: what only memory gets comes after it.
      if (exists) {
        if (!kFollows) targets[group] = step.targets(b, j);
        step.write(b, j, count, finished, targets[group]);
        if (last || !kKeeps) step.hand_over(b, j, count, finished);
      }
      if (kFollows) targets[group] = targets[group].after(1, pace);
      if (Product::kReadsAhead) inputs[group] = ahead[group];
    }
  }
}

// ---- starting it --------------------------------------------------------------------------------

template <class S, class Product>
Error run_product(const Loop<S>& loop, Steps steps, void* stream) {
  Launch how;
  how.grid.x = unsigned((loop.schedule.B + Product::kRows - 1) / Product::kRows);
  how.threads = Product::kThreads;
  how.shared_bytes = 2 * Product::kRows * kRowBytes<S, Product::kWidth>;
  how.stream = stream;
  return run_knowing(loop, kQuad, [&](auto known) -> Error {
    const auto kernel = block_kernel<S, Product, decltype(known)>;
    if (Error error = prepare(kernel, how)) return error;
    return run_in_parts(steps,
                        [&](Steps part) { return launch(kernel, how, loop, pace_of(loop), part); });
  });
}

template <class S, int WIDTH>
Error run_width(const Loop<S>& loop, Steps steps, const Plan& plan, void* stream) {
  if constexpr (sizeof(S) < 8) {
    if (plan.arithmetic == Arithmetic::tensor && plan.rows == 8)
      return run_product<S, TensorBlock<S, WIDTH, 8>>(loop, steps, stream);
    if constexpr (WIDTH <= 128)  // beyond, a thread has registers for fewer rows
      if (plan.arithmetic == Arithmetic::tensor && plan.rows == 16)
        return run_product<S, TensorBlock<S, WIDTH, 16>>(loop, steps, stream);
  }
  if constexpr (sizeof(S) >= 4) {
    if (plan.arithmetic == Arithmetic::plain && plan.rows == 1)
      return run_product<S, PlainBlock<S, WIDTH, 1>>(loop, steps, stream);
    if constexpr (WIDTH * sizeof(S) <= 512)
      if (plan.arithmetic == Arithmetic::plain && plan.rows == 4)
        return run_product<S, PlainBlock<S, WIDTH, 4>>(loop, steps, stream);
  }
  return "the plan asks for a product that was not compiled";
}

}  // namespace

template <class S>
Error run_block_path(const Loop<S>& loop, Steps steps, const Plan& plan, void* stream) {
  if (loop.H <= 64) return run_width<S, 64>(loop, steps, plan, stream);
  if (loop.H <= 128) return run_width<S, 128>(loop, steps, plan, stream);
  if constexpr (sizeof(S) == 2)
    if (loop.H <= 256) return run_width<S, 256>(loop, steps, plan, stream);
  return "the plan asks for a width that was not compiled";
}

#define TORCH_BPTT_ENTRY(S) \
  template Error run_block_path(const Loop<S>&, Steps, const Plan&, void*);
TORCH_BPTT_STORAGE_TYPES(TORCH_BPTT_ENTRY)
#undef TORCH_BPTT_ENTRY

}  // namespace torch_bptt::cuda
