// grad_h, grad_h_n -> the gradients of x, h0, weights, bias, alpha and restart: checks, allocation,
// the call of a backend.
#include "dispatch.h"
#include "operators.h"

namespace torch_bptt {

Gradients rnn_backward(const OptionalTensor& grad_h, const OptionalTensor& grad_h_n,
                       const Tensor& x, const OptionalTensor& h0, const Tensor& h,
                       const OptionalTensor& f, const Tensor& weight_ih, const Tensor& weight_hh,
                       std::string_view activation_name, std::array<bool, 8> wanted,
                       const OptionalTensor& batch_sizes, const OptionalTensor& keep,
                       const OptionalTensor& alpha, const OptionalTensor& restart,
                       const OptionalTensor& mask, bool reverse, int64_t truncate,
                       std::optional<double> clip) {
  constexpr const char* op = "rnn_backward";
  const Sizes sizes(op, "x", x, batch_sizes);
  const int64_t I = x.size(-1), H = weight_hh.size(0);
  const Activation activation = activation_of(op, activation_name);
  const ScheduleOf schedule(op, sizes, keep, reverse, truncate);
  check_clip(op, clip);
  check_shape(op, "weight_ih", weight_ih, {H, I}, "(hidden_size, input_size)");
  check_shape(op, "weight_hh", weight_hh, {H, H}, "(hidden_size, hidden_size)");
  check_shape(op, "h", h, sizes.shape(H), "of the output of rnn_forward");
  check_like(op, "weight_ih", weight_ih, "x", x);
  check_like(op, "weight_hh", weight_hh, "x", x);
  check_like(op, "h", h, "x", x);
  check_alpha(op, alpha, H, x);
  TORCH_CHECK_VALUE(alpha || !wanted[5], op,
                    ": alpha must be given where its gradient is wanted, got None");
  if (alpha) {
    TORCH_CHECK_VALUE(
        f, op, ": f must be given where alpha is, expected an output of rnn_forward, got None");
    check_shape(op, "f", *f, sizes.shape(H), "of the output of rnn_forward");
    check_like(op, "f", *f, "x", x);
  }
  if (grad_h) {
    check_shape(op, "grad_h", *grad_h, sizes.shape(H), "of h");
    check_like(op, "grad_h", *grad_h, "x", x);
  }
  check_state(op, "grad_h_n", grad_h_n, sizes, H, "x", x);
  check_state(op, "h0", h0, sizes, H, "x", x);
  check_state(op, "restart", restart, sizes, H, "x", x);
  check_state(op, "mask", mask, sizes, H, "x", x);

  const bool none = h.numel() == 0;  // no rows: all sums are empty
  const auto output = [&](bool is_wanted, at::IntArrayRef shape) {
    if (!is_wanted) return at::empty({0}, x.options());
    return none ? at::zeros(shape, x.options()) : at::empty(shape, x.options());
  };
  Tensor grad_x =
      wanted[0] ? (none ? at::zeros_like(x) : at::empty_like(x)) : at::empty({0}, x.options());
  if (grad_x.size(-1) > 1 && grad_x.stride(-1) != 1) grad_x = at::empty(x.sizes(), x.options());
  Tensor grad_h0 = output(wanted[1], sizes.state_shape(H));
  Tensor grad_weight_ih = output(wanted[2], {H, I}), grad_weight_hh = output(wanted[3], {H, H}),
         grad_bias = output(wanted[4], {H});
  const auto computed = x.options().dtype(at::toOpMathType(x.scalar_type()));
  Tensor grad_alpha = wanted[5] ? at::zeros({H}, computed) : at::empty({0}, computed);
  Tensor grad_restart = output(wanted[6], sizes.state_shape(H));
  const auto rows_only = x.sizes().slice(0, x.dim() - 1);
  Tensor norms = wanted[7] ? at::zeros(rows_only, computed) : at::empty({0}, computed);
  const Gradients gradients{grad_x,    grad_h0,    grad_weight_ih, grad_weight_hh,
                            grad_bias, grad_alpha, grad_restart,   norms};
  if (none) {
    if (wanted[1] && grad_h_n) grad_h0.copy_(*grad_h_n);  // T = 0: h_n is h0
    return gradients;
  }

  const OptionalTensor grad_h_rows = with_feature_rows(grad_h),
                       grad_h_n_rows = with_feature_rows(grad_h_n), h0_rows = with_feature_rows(h0),
                       restart_rows = with_feature_rows(restart),
                       mask_rows = with_feature_rows(mask), alpha_row = with_feature_rows(alpha);
  const Tensor x_rows = with_feature_rows(x), h_rows = with_feature_rows(h),
               f_rows = alpha ? with_feature_rows(*f) : h_rows,
               weight_ih_rows = weight_ih.contiguous(), weight_hh_rows = weight_hh.contiguous();
  dispatch_dtype(op, "x", x, [&](auto dtype) {
    using S = typename decltype(dtype)::type;
    BackwardProblem<S> problem;
    problem.schedule = schedule.schedule;
    problem.I = I;
    problem.H = H;
    problem.activation = activation;
    problem.alpha = alpha ? const_data_of<Compute<S>>(*alpha_row) : nullptr;
    problem.clip = clip.value_or(-1);
    problem.grad_h = rows_of<S>(grad_h_rows);
    problem.grad_h_n = rows_of<S>(grad_h_n_rows);
    problem.x = rows_of<S>(x_rows);
    problem.h0 = rows_of<S>(h0_rows);
    problem.restart = rows_of<S>(restart_rows);
    problem.mask = rows_of<S>(mask_rows);
    problem.h = rows_of<S>(h_rows);
    problem.f = rows_of<S>(f_rows);
    problem.weight_ih = const_data_of<S>(weight_ih_rows);
    problem.weight_hh = const_data_of<S>(weight_hh_rows);
    problem.grad_x = output_rows_of<S>(grad_x);
    problem.grad_h0 = output_rows_of<S>(grad_h0);
    problem.grad_weight_ih = grad_weight_ih.numel() ? data_of<S>(grad_weight_ih) : nullptr;
    problem.grad_weight_hh = grad_weight_hh.numel() ? data_of<S>(grad_weight_hh) : nullptr;
    problem.grad_bias = grad_bias.numel() ? data_of<S>(grad_bias) : nullptr;
    problem.grad_alpha = wanted[5] ? data_of<Compute<S>>(grad_alpha) : nullptr;
    problem.grad_restart = grad_restart.numel() ? data_of<S>(grad_restart) : nullptr;
    problem.norms = wanted[7] ? data_of<Compute<S>>(norms) : nullptr;
    backend_of<S>(x).rnn_backward(problem, x);
  });
  return gradients;
}

}  // namespace torch_bptt
