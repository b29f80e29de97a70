// What surrounds the loops besides matrix products: numbers that kernels take from memory, the
// states that entered each product, and sums over rows. No sum is cut differently from run to run.
#include <cmath>

#include "paths.h"
#include "step.h"

namespace torch_bptt::cuda {

namespace {

// Kernel arguments hold 4 KiB.
struct Numbers {
  int64_t number[480];
};

__global__ void __launch_bounds__(512)
    store_numbers_kernel(const __grid_constant__ Numbers from, int count, int64_t* to) {
  if (int(thread_index()) < count) to[thread_index()] = from.number[thread_index()];
}

using KnownForward = Known<int(Pass::forward)>;

// m p_t of all rows. A block takes one step after another.
template <class S>
__global__ void __launch_bounds__(256)
    entering_rows_kernel(const __grid_constant__ Loop<S> loop, S* to) {
  const Schedule& s = loop.schedule;
  for (int64_t i = block_index().x; i < s.T; i += grid_blocks().x) {
    const Step<S, KnownForward> step(loop, i);
    const int64_t t = s.step(i), elements = s.rows_at(t) * loop.H;
    for (int64_t e = thread_index(); e < elements; e += block_threads()) {
      const int64_t b = e / loop.H, j = e % loop.H;
      to[s.offset(t) * loop.H + e] = step.template entering<1>(b, j, 1)[0];
    }
  }
}

// Sums of d (f - p) over the rows of some steps that belong to one part of the batch: 32 columns, 8
// threads for each.
template <class S>
__global__ void __launch_bounds__(256, 2)
    alpha_sums_kernel(const __grid_constant__ Loop<S> loop, const Compute<S>* d, int64_t parts,
                      int64_t steps, Compute<S>* sums) {
  using C = Compute<S>;
  const Schedule& s = loop.schedule;
  C* const partial = reinterpret_cast<C*>(shared_memory());
  const int column = int(lane_index()), share = int(warp_index());
  const int64_t part = block_index().x % parts, j = block_index().x / parts * 32 + column;
  const int64_t begin = block_index().y * steps;
  const int64_t end = begin + steps < s.T ? begin + steps : s.T;
  C sum = 0;
  for (int64_t i = begin; i < end; ++i) {
    const Step<S, KnownForward> step(loop, i);
    const int64_t t = s.step(i), rows = s.rows_at(t);
    for (int64_t b = share * parts + part; j < loop.H && b < rows; b += 8 * parts) {
      const S* row = step.arriving(b);
      const C p = row ? widen(row[j]) : C(0);
      sum += d[(s.offset(t) + b) * loop.H + j] * (widen(s.row(loop.f, t, b)[j]) - p);
    }
  }
  partial[share * 32 + column] = sum;
  sync_block();
  if (share > 0 || j >= loop.H) return;
  for (int other = 1; other < 8; ++other) sum += partial[other * 32 + column];
  sums[(block_index().y * parts + part) * loop.H + j] = sum;
}

template <class C>
TORCH_BPTT_DEVICE C warp_sum_of_squares(const C* row, int64_t H, C scale) {
  C sum = 0;
  for (int64_t j = lane_index(); j < H; j += kWarp) sum += scale * row[j] * (scale * row[j]);
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) sum += warp_shuffle_xor(sum, lanes);
  return sum;
}

// |d| of every row, a warp for each. Where squares would overflow or vanish, as they do where
// gradients explode or vanish, the row is scaled by a power of two first.
template <class C>
__global__ void __launch_bounds__(256)
    row_norms_kernel(const C* d, int64_t rows, int64_t H, C* norms) {
  constexpr bool kSingle = sizeof(C) == sizeof(float);
  constexpr C kSmallest = kSingle ? 0x1p-100 : 0x1p-900, kScale = kSingle ? 0x1p90 : 0x1p600;
  const int64_t r = int64_t(block_index().x) * 8 + warp_index();
  if (r >= rows) return;
  const C* row = d + r * H;
  C scale = 1, sum = warp_sum_of_squares(row, H, scale);
  if (!(sum >= kSmallest && sum - sum == 0)) {
    scale = sum < kSmallest ? kScale : 1 / kScale;
    sum = warp_sum_of_squares(row, H, scale);
  }
  if (lane_index() == 0) norms[r] = std::sqrt(sum) / scale;
}

}  // namespace

Error store_numbers(const int64_t* numbers, int64_t count, int64_t* to, void* stream) {
  constexpr int kMost = sizeof(Numbers) / sizeof(int64_t);
  Launch how;
  how.threads = 512;
  how.stream = stream;
  for (int64_t done = 0; done < count; done += kMost) {
    Numbers part;
    const int some = int(count - done < kMost ? count - done : kMost);
    for (int k = 0; k < some; ++k) part.number[k] = numbers[done + k];
    if (Error error = launch(store_numbers_kernel, how, part, some, to + done)) return error;
  }
  return nullptr;
}

template <class S>
Error entering_rows(const Loop<S>& loop, S* to, void* stream) {
  Launch how;
  how.grid.x = unsigned(loop.schedule.T < 4096 ? loop.schedule.T : 4096);
  how.threads = 256;
  how.stream = stream;
  return launch(entering_rows_kernel<S>, how, loop, to);
}

int64_t alpha_sum_groups(const Schedule& schedule) { return schedule.T < 64 ? schedule.T : 64; }

template <class S>
Error alpha_sums(const Loop<S>& loop, const Compute<S>* d, int64_t parts, Compute<S>* sums,
                 void* stream) {
  const int64_t groups = alpha_sum_groups(loop.schedule);
  Launch how;
  how.grid = {unsigned((loop.H + 31) / 32 * parts), unsigned(groups), 1};
  how.threads = 256;
  how.shared_bytes = 256 * sizeof(Compute<S>);
  how.stream = stream;
  const int64_t steps = (loop.schedule.T + groups - 1) / groups;
  return launch(alpha_sums_kernel<S>, how, loop, d, parts, steps, sums);
}

template <class C>
Error row_norms(const C* d, int64_t rows, int64_t H, C* norms, void* stream) {
  Launch how;
  how.grid.x = unsigned((rows + 7) / 8);
  how.threads = 256;
  how.stream = stream;
  return launch(row_norms_kernel<C>, how, d, rows, H, norms);
}

#define TORCH_BPTT_ENTRY(S)                                \
  template Error entering_rows(const Loop<S>&, S*, void*); \
  template Error alpha_sums(const Loop<S>&, const Compute<S>*, int64_t, Compute<S>*, void*);
TORCH_BPTT_STORAGE_TYPES(TORCH_BPTT_ENTRY)
#undef TORCH_BPTT_ENTRY
template Error row_norms(const float*, int64_t, int64_t, float*, void*);
template Error row_norms(const double*, int64_t, int64_t, double*, void*);

}  // namespace torch_bptt::cuda
