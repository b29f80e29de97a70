// The linear recurrences that carry the second and higher derivatives: checks, allocation, the call
// of a backend.
#include "dispatch.h"
#include "operators.h"

namespace torch_bptt {

namespace {

// What both scans check of their arguments.
void check_scan(const char* op, const char* name, const Tensor& g, const Tensor& gate,
                const Tensor& weight_hh, const Networks& networks, const Sizes& sizes,
                const OptionalTensor& alpha, const OptionalTensor& mask) {
  const int64_t H = weight_hh.size(-2);
  const auto check = [&](const char* which, const Tensor& tensor, at::IntArrayRef expected,
                         const char* meaning) {
    check_operand(op, which, tensor, networks, expected, meaning, name, g);
  };
  check("weight_hh", weight_hh, {H, H}, "(hidden_size, hidden_size)");
  check(name, g, sizes.shape(H), "(steps, batch, hidden_size)");
  check("gate", gate, sizes.shape(H), "(steps, batch, hidden_size)");
  check_alpha(op, networks.first(op, "alpha", alpha), H, g);
  check_state(op, "mask", mask, networks, sizes, H, name, g);
}

// What both problems have alike.
template <template <class> class Problem, class S>
Problem<S> scan_problem(const ScheduleOf& schedule, const Operands& network,
                        const OptionalTensor& alpha, const OptionalTensor& mask, const Tensor& gate,
                        bool gate_stops, const Tensor& weight_hh) {
  Problem<S> problem;
  problem.schedule = schedule.of(network);
  problem.H = weight_hh.size(-2);
  problem.alpha = network.data<Compute<S>>(alpha);
  problem.mask = network.rows<S>(mask);
  problem.gate = network.rows<S>(gate);
  problem.gate_stops = gate_stops;
  problem.weight_hh = network.data<S>(weight_hh);
  return problem;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> adjoint_scan(
    const Tensor& g, const Tensor& gate, const Tensor& weight_hh, const OptionalTensor& batch_sizes,
    const OptionalTensor& keep, const OptionalTensor& alpha, const OptionalTensor& mask,
    bool reverse, int64_t truncate, std::optional<double> clip, bool gate_stops) {
  constexpr const char* op = "adjoint_scan";
  const Networks networks(op, weight_hh);
  const Sizes sizes(op, "g", networks.first(op, "g", g), batch_sizes);
  const ScheduleOf schedule(op, networks, sizes, keep, reverse, truncate);
  check_scan(op, "g", g, gate, weight_hh, networks, sizes, alpha, mask);
  check_clip(op, clip);
  const int64_t H = weight_hh.size(-2);
  const auto state = networks.shape(sizes.state_shape(H));
  Tensor d = at::empty(g.sizes(), g.options());
  if (d.numel() == 0) return {d, at::zeros(state, g.options()), at::zeros(state, g.options())};
  Tensor d0 = at::empty(state, g.options());
  Tensor d_restart = keep ? at::empty(state, g.options()) : at::zeros(state, g.options());
  const Tensor g_rows = with_feature_rows(g), gate_rows = with_feature_rows(gate),
               weight_rows = with_contiguous_matrices(weight_hh);
  const OptionalTensor alpha_row = with_feature_rows(alpha), mask_rows = with_feature_rows(mask);
  dispatch_dtype(op, "g", g, [&](auto dtype) {
    using S = typename decltype(dtype)::type;
    const int64_t work = sizes.rows() * H * H;
    for_each_network(g, networks, work, [&](const Operands& network, const Parallel& threads) {
      auto problem = scan_problem<AdjointProblem, S>(schedule, network, alpha_row, mask_rows,
                                                     gate_rows, gate_stops, weight_rows);
      problem.g = network.rows<S>(g_rows);
      problem.d = network.output_rows<S>(d);
      problem.clip = clip.value_or(-1);
      problem.d0 = network.output_rows<S>(d0);
      problem.restart = keep ? network.output<S>(d_restart) : nullptr;
      backend_of<S>(g).adjoint_scan(problem, g, threads);
    });
  });
  return {d, d0, d_restart};
}

Tensor tangent_scan(const Tensor& c, const OptionalTensor& q0, const Tensor& gate,
                    const Tensor& weight_hh, const OptionalTensor& batch_sizes,
                    const OptionalTensor& keep, const OptionalTensor& alpha,
                    const OptionalTensor& restart, const OptionalTensor& mask, bool reverse,
                    int64_t truncate, bool gate_stops) {
  constexpr const char* op = "tangent_scan";
  const Networks networks(op, weight_hh);
  const Sizes sizes(op, "c", networks.first(op, "c", c), batch_sizes);
  const ScheduleOf schedule(op, networks, sizes, keep, reverse, truncate);
  check_scan(op, "c", c, gate, weight_hh, networks, sizes, alpha, mask);
  const int64_t H = weight_hh.size(-2);
  check_state(op, "q0", q0, networks, sizes, H, "c", c);
  check_state(op, "restart", restart, networks, sizes, H, "c", c);
  Tensor q = at::empty(c.sizes(), c.options());
  if (q.numel() == 0) return q;
  const Tensor c_rows = with_feature_rows(c), gate_rows = with_feature_rows(gate),
               weight_rows = with_contiguous_matrices(weight_hh);
  const OptionalTensor q0_rows = with_feature_rows(q0), restart_rows = with_feature_rows(restart),
                       alpha_row = with_feature_rows(alpha), mask_rows = with_feature_rows(mask);
  dispatch_dtype(op, "c", c, [&](auto dtype) {
    using S = typename decltype(dtype)::type;
    const int64_t work = sizes.rows() * H * H;
    for_each_network(c, networks, work, [&](const Operands& network, const Parallel& threads) {
      auto problem = scan_problem<TangentProblem, S>(schedule, network, alpha_row, mask_rows,
                                                     gate_rows, gate_stops, weight_rows);
      problem.c = network.rows<S>(c_rows);
      problem.q = network.output_rows<S>(q);
      problem.q0 = network.rows<S>(q0_rows);
      problem.restart = network.rows<S>(restart_rows);
      backend_of<S>(c).tangent_scan(problem, c, threads);
    });
  });
  return q;
}

}  // namespace torch_bptt
