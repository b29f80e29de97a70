#include "cuda_products.h"

namespace torch_bptt::cuda {

using at::Tensor;

void multiply_wide(Tensor& out, const Tensor& a, const Tensor& b) {
  const bool matrices = a.dim() == 2, narrow = a.element_size() == 2;
  const auto computed = out.scalar_type();
  if (narrow && a.is_cuda())
    matrices ? at::mm_out(out, a, b, computed) : at::bmm_out(out, a, b, computed);
  else if (narrow)  // PyTorch has that product for CUDA alone
    multiply_wide(out, a.to(computed), b.to(computed));
  else
    matrices ? at::mm_out(out, a, b) : at::bmm_out(out, a, b);
}

namespace {

// What the product of a step multiplies by the weight: the first `count` rows.
template <class S>
struct Entering {
  int64_t count;  // 0: nothing enters
  const S* data;  // null: they lie in no matrix
  int64_t row;    // elements from one row to the next
};

// Rows where nothing arrives may be among them: they ignore their product. So neither truncation
// nor a restart from zeros needs a matrix of its own.
template <class S>
Entering<S> entering_of(const Loop<S>& l, int64_t i) {
  const StepRows step(l, i);
  const auto of_the_step_before = [&](int64_t count) -> Entering<S> {
    return {count, count ? l.schedule.row(l.state, step.from, 0) : nullptr, l.state.row};
  };
  if (l.pass == Pass::adjoint) {
    // All rows of the step before, whether or not grad_h0 is wanted: as many rows round alike.
    return of_the_step_before(i > 0 ? l.schedule.rows_at(step.from) : 0);
  }
  const bool restarts = l.schedule.keep && l.restart.data;
  if (!restarts && !l.first.data && step.received == 0) return {0, nullptr, 0};
  if (restarts || l.mask.data) return {step.existing, nullptr, 0};
  if (!l.first.data || step.received == step.existing) return of_the_step_before(step.received);
  if (step.received == 0) return {step.existing, l.first.data, l.first.row};
  return {step.existing, nullptr, 0};
}

}  // namespace

template <class S>
void run_gemm_path(const Loop<S>& loop, const Schedule& host, Steps steps,
                   const at::TensorOptions& stored, void* stream) {
  using C = Compute<S>;
  Loop<S> on_host = loop;
  on_host.schedule = host;
  const auto matrix = [&](const S* data, int64_t rows, int64_t row) {
    return tensor_over(data, {rows, loop.H}, {row, 1}, stored);
  };
  const Tensor weight = matrix(loop.weight, loop.H, loop.H).t();
  const Tensor products = at::empty({host.B, loop.H}, stored.dtype(type_of(kDtype<C>)));
  Tensor gathered;
  for (int64_t i = steps.begin; i < steps.end; ++i) {
    Entering<S> entering = entering_of(on_host, i);
    // PyTorch copies a matrix whose rows overlap, as those of an expanded state do.
    if (entering.count > 0 && entering.row < loop.H) {
      if (!gathered.defined()) gathered = at::empty({host.B, loop.H}, stored);
      S* const to = static_cast<S*>(gathered.data_ptr());
      check(gather_step(loop, i, entering.count, to, stream));
      entering = {entering.count, to, loop.H};
    }
    if (entering.count > 0) {
      Tensor product = products.narrow(0, 0, entering.count);
      multiply_wide(product, matrix(entering.data, entering.count, entering.row), weight);
    }
    const int64_t rows = StepRows(on_host, i).rows();
    check(finish_step(loop, i, rows, products.const_data_ptr<C>(), stream));
  }
}

#define TORCH_BPTT_ENTRY(S)                                           \
  template void run_gemm_path(const Loop<S>&, const Schedule&, Steps, \
                              const at::TensorOptions& stored, void* stream);
TORCH_BPTT_STORAGE_TYPES(TORCH_BPTT_ENTRY)
#undef TORCH_BPTT_ENTRY

}  // namespace torch_bptt::cuda
