// The linear recurrences that carry the second and higher derivatives: checks, allocation, the call
// of a backend.
#include "dispatch.h"
#include "operators.h"

namespace torch_bptt {

namespace {

// What both scans check of their arguments.
void check_scan(const char* op, const char* name, const Tensor& g, const Tensor& gate,
                const Tensor& weight_hh, const Sizes& sizes, double alpha) {
  const int64_t H = weight_hh.size(0);
  check_alpha(op, alpha);
  check_shape(op, "weight_hh", weight_hh, {H, H}, "(hidden_size, hidden_size)");
  check_shape(op, name, g, sizes.shape(H), "(steps, batch, hidden_size)");
  check_shape(op, "gate", gate, sizes.shape(H), "(steps, batch, hidden_size)");
  check_like(op, "gate", gate, name, g);
  check_like(op, "weight_hh", weight_hh, name, g);
}

template <class S>
ScanProblem<S> scan_problem(const ScheduleOf& schedule, double alpha, const Tensor& g,
                            const Tensor& gate, const Tensor& weight_hh, const Tensor& d) {
  ScanProblem<S> problem;
  problem.schedule = schedule.schedule;
  problem.H = weight_hh.size(0);
  problem.alpha = alpha;
  problem.g = rows_of<S>(g);
  problem.gate = rows_of<S>(gate);
  problem.weight_hh = const_data_of<S>(weight_hh);
  problem.d = output_rows_of<S>(d);
  return problem;
}

}  // namespace

std::tuple<Tensor, Tensor> adjoint_scan(const Tensor& g, const Tensor& gate,
                                        const Tensor& weight_hh, const OptionalTensor& batch_sizes,
                                        const OptionalTensor& keep, double alpha, bool reverse,
                                        int64_t truncate, std::optional<double> clip) {
  constexpr const char* op = "adjoint_scan";
  const Sizes sizes(op, "g", g, batch_sizes);
  const ScheduleOf schedule(op, sizes, keep, reverse, truncate);
  check_scan(op, "g", g, gate, weight_hh, sizes, alpha);
  check_clip(op, clip);
  Tensor d = at::empty(g.sizes(), g.options());
  if (d.numel() == 0) return {d, at::zeros(sizes.state_shape(weight_hh.size(0)), g.options())};
  Tensor d0 = at::empty(sizes.state_shape(weight_hh.size(0)), g.options());
  const Tensor g_rows = with_feature_rows(g), gate_rows = with_feature_rows(gate),
               weight_rows = weight_hh.contiguous();
  dispatch_dtype(op, "g", g, [&](auto dtype) {
    using S = typename decltype(dtype)::type;
    ScanProblem<S> problem = scan_problem<S>(schedule, alpha, g_rows, gate_rows, weight_rows, d);
    problem.clip = clip.value_or(-1);
    problem.d0 = output_rows_of<S>(d0);
    cpu::kernels().of<S>().adjoint_scan(problem, torch_threads());
  });
  return {d, d0};
}

Tensor tangent_scan(const Tensor& c, const OptionalTensor& q0, const Tensor& gate,
                    const Tensor& weight_hh, const OptionalTensor& batch_sizes,
                    const OptionalTensor& keep, double alpha, bool reverse, int64_t truncate) {
  constexpr const char* op = "tangent_scan";
  const Sizes sizes(op, "c", c, batch_sizes);
  const ScheduleOf schedule(op, sizes, keep, reverse, truncate);
  check_scan(op, "c", c, gate, weight_hh, sizes, alpha);
  if (q0) {
    check_shape(op, "q0", *q0, sizes.state_shape(weight_hh.size(0)),
                "(batch, hidden_size), and as many dimensions as c");
    check_like(op, "q0", *q0, "c", c);
  }
  Tensor q = at::empty(c.sizes(), c.options());
  if (q.numel() == 0) return q;
  const Tensor c_rows = with_feature_rows(c), gate_rows = with_feature_rows(gate),
               weight_rows = weight_hh.contiguous();
  const OptionalTensor q0_rows = with_feature_rows(q0);
  dispatch_dtype(op, "c", c, [&](auto dtype) {
    using S = typename decltype(dtype)::type;
    ScanProblem<S> problem = scan_problem<S>(schedule, alpha, c_rows, gate_rows, weight_rows, q);
    problem.d0_in = rows_of<S>(q0_rows);
    cpu::kernels().of<S>().tangent_scan(problem, torch_threads());
  });
  return q;
}

}  // namespace torch_bptt
