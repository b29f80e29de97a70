// The linear recurrences that carry the second and higher derivatives: checks, allocation, the call
// of a backend.
#include "dispatch.h"
#include "operators.h"

namespace torch_bptt {

namespace {

// What both scans check of their arguments.
void check_scan(const char* op, const char* name, const Tensor& g, const Tensor& gate,
                const Tensor& weight_hh, const Sizes& sizes, const OptionalTensor& alpha,
                const OptionalTensor& mask) {
  const int64_t H = weight_hh.size(0);
  check_shape(op, "weight_hh", weight_hh, {H, H}, "(hidden_size, hidden_size)");
  check_shape(op, name, g, sizes.shape(H), "(steps, batch, hidden_size)");
  check_shape(op, "gate", gate, sizes.shape(H), "(steps, batch, hidden_size)");
  check_like(op, "gate", gate, name, g);
  check_like(op, "weight_hh", weight_hh, name, g);
  check_alpha(op, alpha, H, g);
  check_state(op, "mask", mask, sizes, H, name, g);
}

template <class S>
ScanProblem<S> scan_problem(const ScheduleOf& schedule, const OptionalTensor& alpha,
                            const OptionalTensor& mask, const Tensor& g, const Tensor& gate,
                            const Tensor& weight_hh, const Tensor& d) {
  ScanProblem<S> problem;
  problem.schedule = schedule.schedule;
  problem.H = weight_hh.size(0);
  problem.alpha = alpha ? const_data_of<Compute<S>>(*alpha) : nullptr;
  problem.mask = rows_of<S>(mask);
  problem.g = rows_of<S>(g);
  problem.gate = rows_of<S>(gate);
  problem.weight_hh = const_data_of<S>(weight_hh);
  problem.d = output_rows_of<S>(d);
  return problem;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> adjoint_scan(
    const Tensor& g, const Tensor& gate, const Tensor& weight_hh, const OptionalTensor& batch_sizes,
    const OptionalTensor& keep, const OptionalTensor& alpha, const OptionalTensor& mask,
    bool reverse, int64_t truncate, std::optional<double> clip) {
  constexpr const char* op = "adjoint_scan";
  const Sizes sizes(op, "g", g, batch_sizes);
  const ScheduleOf schedule(op, sizes, keep, reverse, truncate);
  check_scan(op, "g", g, gate, weight_hh, sizes, alpha, mask);
  check_clip(op, clip);
  const auto state = sizes.state_shape(weight_hh.size(0));
  Tensor d = at::empty(g.sizes(), g.options());
  if (d.numel() == 0) return {d, at::zeros(state, g.options()), at::zeros(state, g.options())};
  Tensor d0 = at::empty(state, g.options());
  Tensor d_restart = keep ? at::empty(state, g.options()) : at::zeros(state, g.options());
  const Tensor g_rows = with_feature_rows(g), gate_rows = with_feature_rows(gate),
               weight_rows = weight_hh.contiguous();
  const OptionalTensor alpha_row = with_feature_rows(alpha), mask_rows = with_feature_rows(mask);
  dispatch_dtype(op, "g", g, [&](auto dtype) {
    using S = typename decltype(dtype)::type;
    ScanProblem<S> problem =
        scan_problem<S>(schedule, alpha_row, mask_rows, g_rows, gate_rows, weight_rows, d);
    problem.clip = clip.value_or(-1);
    problem.d0 = output_rows_of<S>(d0);
    problem.restart = keep ? data_of<S>(d_restart) : nullptr;
    backend_of<S>(g).adjoint_scan(problem, g);
  });
  return {d, d0, d_restart};
}

Tensor tangent_scan(const Tensor& c, const OptionalTensor& q0, const Tensor& gate,
                    const Tensor& weight_hh, const OptionalTensor& batch_sizes,
                    const OptionalTensor& keep, const OptionalTensor& alpha,
                    const OptionalTensor& restart, const OptionalTensor& mask, bool reverse,
                    int64_t truncate) {
  constexpr const char* op = "tangent_scan";
  const Sizes sizes(op, "c", c, batch_sizes);
  const ScheduleOf schedule(op, sizes, keep, reverse, truncate);
  check_scan(op, "c", c, gate, weight_hh, sizes, alpha, mask);
  check_state(op, "q0", q0, sizes, weight_hh.size(0), "c", c);
  check_state(op, "restart", restart, sizes, weight_hh.size(0), "c", c);
  Tensor q = at::empty(c.sizes(), c.options());
  if (q.numel() == 0) return q;
  const Tensor c_rows = with_feature_rows(c), gate_rows = with_feature_rows(gate),
               weight_rows = weight_hh.contiguous();
  const OptionalTensor q0_rows = with_feature_rows(q0), restart_rows = with_feature_rows(restart),
                       alpha_row = with_feature_rows(alpha), mask_rows = with_feature_rows(mask);
  dispatch_dtype(op, "c", c, [&](auto dtype) {
    using S = typename decltype(dtype)::type;
    ScanProblem<S> problem =
        scan_problem<S>(schedule, alpha_row, mask_rows, c_rows, gate_rows, weight_rows, q);
    problem.d0_in = rows_of<S>(q0_rows);
    problem.restart_in = rows_of<S>(restart_rows);
    backend_of<S>(c).tangent_scan(problem, c);
  });
  return q;
}

}  // namespace torch_bptt
