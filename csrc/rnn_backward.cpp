// grad_h, grad_h_n -> the gradients of x, h0, weights, bias, alpha and restart: checks, allocation,
// the call of a backend.
#include "dispatch.h"
#include "operators.h"

namespace torch_bptt {

Gradients rnn_backward(const OptionalTensor& grad_h, const OptionalTensor& grad_h_n,
                       const Tensor& x, const OptionalTensor& h0, const Tensor& h,
                       const OptionalTensor& f, const Tensor& weight_ih, const Tensor& weight_hh,
                       std::string_view activation_name, Wanted wanted,
                       const OptionalTensor& batch_sizes, const OptionalTensor& keep,
                       const OptionalTensor& alpha, const OptionalTensor& restart,
                       const OptionalTensor& mask, bool reverse, int64_t truncate,
                       std::optional<double> clip, int64_t parts) {
  constexpr const char* op = "rnn_backward";
  const Networks networks(op, weight_hh);
  const Sizes sizes(op, "x", networks.first(op, "x", x), batch_sizes);
  const int64_t I = x.size(-1), H = weight_hh.size(-2);
  const Activation activation = activation_of(op, activation_name);
  const ScheduleOf schedule(op, networks, sizes, keep, reverse, truncate);
  check_clip(op, clip);
  check_parts(op, parts, sizes);
  const auto check = [&](const char* name, const OptionalTensor& tensor, at::IntArrayRef expected,
                         const char* meaning) {
    check_operand(op, name, tensor, networks, expected, meaning, "x", x);
  };
  check("weight_ih", weight_ih, {H, I}, "(hidden_size, input_size)");
  check("weight_hh", weight_hh, {H, H}, "(hidden_size, hidden_size)");
  check("h", h, sizes.shape(H), "of the output of rnn_forward");
  check_alpha(op, networks.first(op, "alpha", alpha), H, x);
  TORCH_CHECK_VALUE(alpha || !wanted[GRAD_ALPHA], op,
                    ": alpha must be given where its gradient is wanted, got None");
  if (alpha) {
    TORCH_CHECK_VALUE(
        f, op, ": f must be given where alpha is, expected an output of rnn_forward, got None");
    check("f", *f, sizes.shape(H), "of the output of rnn_forward");
  }
  check("grad_h", grad_h, sizes.shape(H), "of h");
  check_state(op, "grad_h_n", grad_h_n, networks, sizes, H, "x", x);
  check_state(op, "h0", h0, networks, sizes, H, "x", x);
  check_state(op, "restart", restart, networks, sizes, H, "x", x);
  check_state(op, "mask", mask, networks, sizes, H, "x", x);

  const bool none = h.numel() == 0;  // no rows: all sums are empty
  const auto output = [&](bool is_wanted, at::IntArrayRef shape, at::TensorOptions options) {
    if (!is_wanted) return at::empty({0}, options);
    return none ? at::zeros(shape, options) : at::empty(shape, options);
  };
  const auto computed = x.options().dtype(at::toOpMathType(x.scalar_type()));
  const auto sum_shape = [&](at::IntArrayRef of_one) {  // of a sum over all rows, or over a part's
    return networks.shape(parts > 0 ? in_front(parts, of_one) : c10::DimVector(of_one));
  };
  const auto state_shape = networks.shape(sizes.state_shape(H));
  Tensor grad_x =
      wanted[GRAD_X] ? (none ? at::zeros_like(x) : at::empty_like(x)) : at::empty({0}, x.options());
  if (grad_x.size(-1) > 1 && grad_x.stride(-1) != 1) grad_x = at::empty(x.sizes(), x.options());
  Tensor grad_h0 = output(wanted[GRAD_H0], state_shape, x.options());
  Tensor grad_weight_ih = output(wanted[GRAD_WEIGHT_IH], sum_shape({H, I}), x.options()),
         grad_weight_hh = output(wanted[GRAD_WEIGHT_HH], sum_shape({H, H}), x.options()),
         grad_bias = output(wanted[GRAD_BIAS], sum_shape({H}), x.options()),
         grad_alpha = output(wanted[GRAD_ALPHA], sum_shape({H}), computed);
  Tensor grad_restart = output(wanted[GRAD_RESTART], state_shape, x.options());
  Tensor norms = output(wanted[NORMS], x.sizes().slice(0, x.dim() - 1), computed);
  const Gradients gradients{grad_x,    grad_h0,    grad_weight_ih, grad_weight_hh,
                            grad_bias, grad_alpha, grad_restart,   norms};
  if (none) {
    if (wanted[GRAD_H0] && grad_h_n) grad_h0.copy_(*grad_h_n);  // T = 0: h_n is h0
    return gradients;
  }

  const OptionalTensor grad_h_rows = with_feature_rows(grad_h),
                       grad_h_n_rows = with_feature_rows(grad_h_n), h0_rows = with_feature_rows(h0),
                       restart_rows = with_feature_rows(restart),
                       mask_rows = with_feature_rows(mask), alpha_row = with_feature_rows(alpha);
  const Tensor x_rows = with_feature_rows(x), h_rows = with_feature_rows(h),
               f_rows = alpha ? with_feature_rows(*f) : h_rows,
               weight_ih_rows = with_contiguous_matrices(weight_ih),
               weight_hh_rows = with_contiguous_matrices(weight_hh);
  dispatch_dtype(op, "x", x, [&](auto dtype) {
    using S = typename decltype(dtype)::type;
    const int64_t work = 2 * sizes.rows() * H * (H + I);
    for_each_network(x, networks, work, [&](const Operands& network, const Parallel& threads) {
      BackwardProblem<S> problem;
      problem.schedule = schedule.of(network);
      problem.I = I;
      problem.H = H;
      problem.parts = std::max<int64_t>(parts, 1);
      problem.activation = activation;
      problem.alpha = network.data<Compute<S>>(alpha_row);
      problem.clip = clip.value_or(-1);
      problem.grad_h = network.rows<S>(grad_h_rows);
      problem.grad_h_n = network.rows<S>(grad_h_n_rows);
      problem.x = network.rows<S>(x_rows);
      problem.h0 = network.rows<S>(h0_rows);
      problem.restart = network.rows<S>(restart_rows);
      problem.mask = network.rows<S>(mask_rows);
      problem.h = network.rows<S>(h_rows);
      problem.f = network.rows<S>(f_rows);
      problem.weight_ih = network.data<S>(weight_ih_rows);
      problem.weight_hh = network.data<S>(weight_hh_rows);
      problem.grad_x = network.output_rows<S>(grad_x);
      problem.grad_h0 = network.output_rows<S>(grad_h0);
      problem.grad_weight_ih = network.output<S>(grad_weight_ih);
      problem.grad_weight_hh = network.output<S>(grad_weight_hh);
      problem.grad_bias = network.output<S>(grad_bias);
      problem.grad_alpha = network.output<Compute<S>>(grad_alpha);
      problem.grad_restart = network.output<S>(grad_restart);
      problem.norms = network.output<Compute<S>>(norms);
      backend_of<S>(x).rnn_backward(problem, x, threads);
    });
  });
  return gradients;
}

}  // namespace torch_bptt
