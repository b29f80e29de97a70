// A library's product for each step, for large ones: what is around it.
//
// Mostly what a product multiplies lies in memory as a matrix, the state of the step before; where
// it does not (restarts from a state, a mask), a kernel gathers it. Another one finishes the
// elements. It does not ask which rows were gathered: rows where nothing arrives ignore the
// product, so that their part of it may be anything.
#include "paths.h"
#include "step.h"

namespace torch_bptt::cuda {

namespace {

// The elements of a thread in a matrix (rows, H): kCount times N that follow each other. A warp
// reads whole lines either way.
template <class S, bool ALIGNED>
struct Own {
  static constexpr int kElements = FinishTile::kBytes / sizeof(S);
  static constexpr int N = ALIGNED ? kElements : 1, kCount = kElements / N;

  TORCH_BPTT_DEVICE Own(const FinishTile& tile)
      : b(int64_t(block_index().x) * tile.rows() + int(thread_index()) / tile.across),
        first(int64_t(block_index().y) * tile.columns() + int(thread_index()) % tile.across * N),
        apart(tile.across) {}
  TORCH_BPTT_DEVICE int64_t column(int k) const { return first + k * apart; }

  int64_t b, first;
  int apart;
};

template <class S, bool ALIGNED>
__global__ void __launch_bounds__(FinishTile::kThreads)
    gather_kernel(const __grid_constant__ Loop<S> loop, int64_t i, int64_t rows, FinishTile tile,
                  S* to) {
  const Own<S, ALIGNED> own(tile);
  if (own.b >= rows) return;
  const Step<S, Known<kAnyPass, false, ALIGNED>> step(loop, i);
  TORCH_BPTT_UNROLL
  for (int k = 0; k < own.kCount; ++k) {
    const int64_t j = own.column(k);
    if (j >= loop.H) continue;
    step.store(to + own.b * loop.H + j, step.template entering<own.N>(own.b, j, own.N), own.N);
  }
}

template <class S, bool ALIGNED>
__global__ void __launch_bounds__(FinishTile::kThreads)
    finish_kernel(const __grid_constant__ Loop<S> loop, int64_t i, int64_t rows, FinishTile tile,
                  const Compute<S>* products) {
  using C = Compute<S>;
  const Own<S, ALIGNED> own(tile);
  if (own.b >= rows) return;
  constexpr int N = own.N;
  const Step<S, Known<kAnyPass, false, ALIGNED>> step(loop, i);
  const bool arrives = step.origin(own.b) != Origin::nothing;
  Inputs<S, N> in[own.kCount];
  Elements<C, N> product[own.kCount]{}, leaking[own.kCount]{};
  TORCH_BPTT_UNROLL
  for (int k = 0; k < own.kCount; ++k) {
    const int64_t j = own.column(k);
    if (j >= loop.H) continue;
    in[k] = step.template inputs<N>(own.b, j, N, step.sources(own.b, j));
    if (!arrives) continue;
    product[k] = step.template load<N>(products + own.b * loop.H + j, N);
    leaking[k] = step.template leaking<N>(own.b, j, N);
  }
  TORCH_BPTT_UNROLL
  for (int k = 0; k < own.kCount; ++k) {
    const int64_t j = own.column(k);
    if (j >= loop.H) continue;
    const auto constants = step.template constants<N>(own.b, j, N);
    const auto finished = step.template finish<N>(own.b, j, N, product[k], leaking[k],
                                                  step.terms(in[k], constants), constants);
    step.write(own.b, j, N, finished, step.targets(own.b, j));
    step.hand_over(own.b, j, N, finished);
  }
}

// ---- starting them ------------------------------------------------------------------------------

// The kernel for the loop's alignment, over the first `rows` rows.
template <class S, class Kernel, class Matrix>
Error run(Kernel aligned, Kernel any, const Loop<S>& loop, int64_t i, int64_t rows, Matrix* matrix,
          void* stream) {
  const FinishTile tile(loop.H, sizeof(S));
  Launch how;
  how.grid = {unsigned((rows + tile.rows() - 1) / tile.rows()),
              unsigned((loop.H + tile.columns() - 1) / tile.columns()), 1};
  how.threads = tile.kThreads;
  how.stream = stream;
  constexpr int kElements = FinishTile::kBytes / sizeof(S);
  const bool all_lies_well =
      lies_well(loop, kElements) && reinterpret_cast<uintptr_t>(matrix) % FinishTile::kBytes == 0;
  const Kernel kernel = all_lies_well ? aligned : any;
  return launch(kernel, how, loop, i, rows, tile, matrix);
}

}  // namespace

template <class S>
Error gather_step(const Loop<S>& loop, int64_t i, int64_t rows, S* to, void* stream) {
  return run(gather_kernel<S, true>, gather_kernel<S, false>, loop, i, rows, to, stream);
}
template <class S>
Error finish_step(const Loop<S>& loop, int64_t i, int64_t rows, const Compute<S>* products,
                  void* stream) {
  return run(finish_kernel<S, true>, finish_kernel<S, false>, loop, i, rows, products, stream);
}

#define TORCH_BPTT_ENTRY(S)                                                \
  template Error gather_step(const Loop<S>&, int64_t, int64_t, S*, void*); \
  template Error finish_step(const Loop<S>&, int64_t, int64_t, const Compute<S>*, void*);
TORCH_BPTT_STORAGE_TYPES(TORCH_BPTT_ENTRY)
#undef TORCH_BPTT_ENTRY

}  // namespace torch_bptt::cuda
