// x, h0, weights -> h: checks, allocation, the call of a backend.
#include "dispatch.h"
#include "operators.h"

namespace torch_bptt {

std::tuple<Tensor, Tensor, Tensor> rnn_forward(
    const Tensor& x, const OptionalTensor& h0, const Tensor& weight_ih, const Tensor& weight_hh,
    const OptionalTensor& bias_ih, const OptionalTensor& bias_hh, std::string_view activation_name,
    const OptionalTensor& batch_sizes, const OptionalTensor& keep, const OptionalTensor& alpha,
    const OptionalTensor& restart, const OptionalTensor& mask, const OptionalTensor& noise,
    bool reverse) {
  constexpr const char* op = "rnn_forward";
  const Sizes sizes(op, "x", x, batch_sizes);
  const int64_t I = x.size(-1), H = weight_hh.size(0);
  const Activation activation = activation_of(op, activation_name);
  const ScheduleOf schedule(op, sizes, keep, reverse);
  check_shape(op, "weight_ih", weight_ih, {H, I}, "(hidden_size, input_size)");
  check_shape(op, "weight_hh", weight_hh, {H, H}, "(hidden_size, hidden_size)");
  check_like(op, "weight_ih", weight_ih, "x", x);
  check_like(op, "weight_hh", weight_hh, "x", x);
  if (bias_ih) {
    check_shape(op, "bias_ih", *bias_ih, {H}, "(hidden_size)");
    check_like(op, "bias_ih", *bias_ih, "x", x);
  }
  if (bias_hh) {
    check_shape(op, "bias_hh", *bias_hh, {H}, "(hidden_size)");
    check_like(op, "bias_hh", *bias_hh, "x", x);
  }
  check_alpha(op, alpha, H, x);
  check_state(op, "h0", h0, sizes, H, "x", x);
  check_state(op, "restart", restart, sizes, H, "x", x);
  check_state(op, "mask", mask, sizes, H, "x", x);
  if (noise) {
    check_shape(op, "noise", *noise, sizes.shape(H), "of h");
    check_like(op, "noise", *noise, "x", x);
  }

  Tensor h = at::empty(sizes.shape(H), x.options());
  Tensor f = alpha ? at::empty_like(h) : at::empty({0}, x.options());
  if (h.numel() == 0)
    return {
        h,
        h0 ? h0->clone(at::MemoryFormat::Contiguous) : at::zeros(sizes.state_shape(H), x.options()),
        f};
  Tensor h_n = at::empty(sizes.state_shape(H), x.options());

  const Tensor x_rows = with_feature_rows(x), weight_ih_rows = weight_ih.contiguous(),
               weight_hh_rows = weight_hh.contiguous();
  const OptionalTensor h0_rows = with_feature_rows(h0), restart_rows = with_feature_rows(restart),
                       mask_rows = with_feature_rows(mask), noise_rows = with_feature_rows(noise),
                       alpha_row = with_feature_rows(alpha);
  const OptionalTensor bias_ih_row = with_feature_rows(bias_ih),
                       bias_hh_row = with_feature_rows(bias_hh);
  dispatch_dtype(op, "x", x, [&](auto dtype) {
    using S = typename decltype(dtype)::type;
    ForwardProblem<S> problem;
    problem.schedule = schedule.schedule;
    problem.I = I;
    problem.H = H;
    problem.activation = activation;
    problem.alpha = alpha ? const_data_of<Compute<S>>(*alpha_row) : nullptr;
    problem.x = rows_of<S>(x_rows);
    problem.h0 = rows_of<S>(h0_rows);
    problem.restart = rows_of<S>(restart_rows);
    problem.mask = rows_of<S>(mask_rows);
    problem.noise = rows_of<S>(noise_rows);
    problem.weight_ih = const_data_of<S>(weight_ih_rows);
    problem.weight_hh = const_data_of<S>(weight_hh_rows);
    problem.bias[0] = bias_ih ? const_data_of<S>(*bias_ih_row) : nullptr;
    problem.bias[1] = bias_hh ? const_data_of<S>(*bias_hh_row) : nullptr;
    problem.h = output_rows_of<S>(h);
    problem.h_n = data_of<S>(h_n);
    problem.f = output_rows_of<S>(f);
    backend_of<S>(x).rnn_forward(problem, x);
  });
  return {h, h_n, f};
}

}  // namespace torch_bptt
