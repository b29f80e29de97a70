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
  const Networks networks(op, weight_hh);
  const Sizes sizes(op, "x", networks.first(op, "x", x), batch_sizes);
  const int64_t I = x.size(-1), H = weight_hh.size(-2);
  const Activation activation = activation_of(op, activation_name);
  const ScheduleOf schedule(op, networks, sizes, keep, reverse);
  const auto check = [&](const char* name, const OptionalTensor& tensor, at::IntArrayRef expected,
                         const char* meaning) {
    check_operand(op, name, tensor, networks, expected, meaning, "x", x);
  };
  check("weight_ih", weight_ih, {H, I}, "(hidden_size, input_size)");
  check("weight_hh", weight_hh, {H, H}, "(hidden_size, hidden_size)");
  check("bias_ih", bias_ih, {H}, "(hidden_size)");
  check("bias_hh", bias_hh, {H}, "(hidden_size)");
  check_alpha(op, networks.first(op, "alpha", alpha), H, x);
  check_state(op, "h0", h0, networks, sizes, H, "x", x);
  check_state(op, "restart", restart, networks, sizes, H, "x", x);
  check_state(op, "mask", mask, networks, sizes, H, "x", x);
  check("noise", noise, sizes.shape(H), "of h");

  Tensor h = at::empty(networks.shape(sizes.shape(H)), x.options());
  Tensor f = alpha ? at::empty_like(h) : at::empty({0}, x.options());
  const auto state_shape = networks.shape(sizes.state_shape(H));
  if (h.numel() == 0)
    return {h, h0 ? h0->clone(at::MemoryFormat::Contiguous) : at::zeros(state_shape, x.options()),
            f};
  Tensor h_n = at::empty(state_shape, x.options());

  const Tensor x_rows = with_feature_rows(x), weight_ih_rows = with_contiguous_matrices(weight_ih),
               weight_hh_rows = with_contiguous_matrices(weight_hh);
  const OptionalTensor h0_rows = with_feature_rows(h0), restart_rows = with_feature_rows(restart),
                       mask_rows = with_feature_rows(mask), noise_rows = with_feature_rows(noise),
                       alpha_row = with_feature_rows(alpha);
  const OptionalTensor bias_ih_row = with_feature_rows(bias_ih),
                       bias_hh_row = with_feature_rows(bias_hh);
  dispatch_dtype(op, "x", x, [&](auto dtype) {
    using S = typename decltype(dtype)::type;
    const int64_t work = sizes.rows() * H * (H + I);
    for_each_network(x, networks, work, [&](const Operands& network, const Parallel& threads) {
      ForwardProblem<S> problem;
      problem.schedule = schedule.of(network);
      problem.I = I;
      problem.H = H;
      problem.activation = activation;
      problem.alpha = network.data<Compute<S>>(alpha_row);
      problem.x = network.rows<S>(x_rows);
      problem.h0 = network.rows<S>(h0_rows);
      problem.restart = network.rows<S>(restart_rows);
      problem.mask = network.rows<S>(mask_rows);
      problem.noise = network.rows<S>(noise_rows);
      problem.weight_ih = network.data<S>(weight_ih_rows);
      problem.weight_hh = network.data<S>(weight_hh_rows);
      problem.bias[0] = network.data<S>(bias_ih_row);
      problem.bias[1] = network.data<S>(bias_hh_row);
      problem.h = network.output_rows<S>(h);
      problem.h_n = network.output<S>(h_n);
      problem.f = network.output_rows<S>(f);
      backend_of<S>(x).rnn_forward(problem, x, threads);
    });
  });
  return {h, h_n, f};
}

}  // namespace torch_bptt
