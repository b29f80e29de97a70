// The layer with its first derivative: one node of the autograd graph in C++. RNN(8, 8) on one
// step, forward and backward, takes 37 us with it and 44 with one in Python. Transforms that
// rewrite functions (torch.func, forward mode, torch.compile) take the Function in
// torch_bptt/autograd.py instead; so does this node where the derivative is to be differentiated
// itself.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>

#include "operators.h"

namespace torch_bptt {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

const auto& forward_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torch_bptt::rnn_forward", "")
                             .typed<decltype(rnn_forward)>();
  return op;
}

const auto& backward_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torch_bptt::rnn_backward", "")
                             .typed<decltype(rnn_backward)>();
  return op;
}

OptionalTensor optional(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

// What is no tensor about a layer, as autograd keeps it.
struct SavedOptions : torch::CustomClassHolder {
  explicit SavedOptions(LayerOptions options) : options(std::move(options)) {}
  const LayerOptions options;
};

}  // namespace

// Its name stands in what autograd says of it.
struct RNNNode : torch::autograd::Function<RNNNode> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const OptionalTensor& h0,
                               const Tensor& weight_ih, const Tensor& weight_hh,
                               const OptionalTensor& bias_ih, const OptionalTensor& bias_hh,
                               const OptionalTensor& alpha, const OptionalTensor& restart,
                               const OptionalTensor& probe, const OptionalTensor& batch_sizes,
                               const OptionalTensor& keep, const OptionalTensor& mask,
                               const OptionalTensor& noise, const std::string& activation,
                               bool reverse, int64_t truncate, const std::optional<double>& clip) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [h, h_n, f] = forward_op().call(x, h0, weight_ih, weight_hh, bias_ih, bias_hh, activation,
                                         batch_sizes, keep, alpha, restart, mask, noise, reverse);
    if (probe) check_probe(*probe, x);
    ctx->set_materialize_grads(false);
    const Tensor none;
    ctx->save_for_backward({x, h0.value_or(none), weight_ih, weight_hh, batch_sizes.value_or(none),
                            keep.value_or(none), alpha.value_or(none), restart.value_or(none),
                            mask.value_or(none), h, alpha ? f : none});
    ctx->saved_data["options"] = c10::IValue::make_capsule(c10::make_intrusive<SavedOptions>(
        LayerOptions{activation,
                     reverse,
                     truncate,
                     clip,
                     {true, h0.has_value(), true, true, bias_ih.has_value(), bias_hh.has_value(),
                      alpha.has_value(), restart.has_value(), probe.has_value()}}));
    return {h, h_n};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(kArguments);
    if (!grads[0].defined() && !grads[1].defined()) return result;
    const variable_list saved = ctx->get_saved_variables();
    const auto holder =
        c10::static_intrusive_pointer_cast<SavedOptions>(ctx->saved_data["options"].toCapsule());
    const LayerOptions& options = holder->options;
    std::array<bool, INPUTS> wanted;
    size_t edge = 0;  // autograd counts only the arguments that are there
    for (size_t i = 0; i < wanted.size(); ++i)
      wanted[i] = options.given[i] && ctx->needs_input_grad(edge++);

    const SavedForBackward all{optional(grads[0]), optional(grads[1]), saved[0],
                               optional(saved[1]), saved[2],           saved[3],
                               optional(saved[4]), optional(saved[5]), optional(saved[6]),
                               optional(saved[7]), optional(saved[8]), saved[9],
                               optional(saved[10])};
    if (at::GradMode::is_enabled()) {
      std::array<Tensor, INPUTS> of = backward_with_graph(all, options, wanted);
      std::move(of.begin(), of.end(), result.begin());
      return result;
    }
    auto [grad_x, grad_h0, grad_weight_ih, grad_weight_hh, grad_bias, grad_alpha, grad_restart,
          norms] = backward_op().call(all.grad_h, all.grad_h_n, all.x, all.h0, all.h, all.f,
                                      all.weight_ih, all.weight_hh, options.activation,
                                      {wanted[X], wanted[H0], wanted[WEIGHT_IH], wanted[WEIGHT_HH],
                                       wanted[BIAS_IH] || wanted[BIAS_HH], wanted[ALPHA],
                                       wanted[RESTART], wanted[PROBE]},
                                      all.batch_sizes, all.keep, all.alpha, all.restart, all.mask,
                                      options.reverse, options.truncate, options.clip);
    if (wanted[X]) result[X] = grad_x;
    if (wanted[H0]) result[H0] = grad_h0;
    if (wanted[WEIGHT_IH]) result[WEIGHT_IH] = grad_weight_ih;
    if (wanted[WEIGHT_HH]) result[WEIGHT_HH] = grad_weight_hh;
    if (wanted[BIAS_IH]) result[BIAS_IH] = grad_bias;
    if (wanted[BIAS_HH]) result[BIAS_HH] = grad_bias;
    if (wanted[ALPHA]) result[ALPHA] = grad_alpha;
    if (wanted[RESTART]) result[RESTART] = grad_restart;
    if (wanted[PROBE]) result[PROBE] = norms;
    return result;
  }

 private:
  static constexpr size_t kArguments = 17;  // of forward, without ctx

  static void check_probe(const Tensor& probe, const Tensor& x) {
    const auto rows = x.sizes().slice(0, x.dim() - 1);
    TORCH_CHECK_VALUE(probe.sizes() == rows, "rnn: probe must have one entry for each row of x, ",
                      "expected ", rows, ", got ", probe.sizes());
    const auto expected = at::toOpMathType(x.scalar_type());
    TORCH_CHECK(probe.scalar_type() == expected, "rnn: probe must be ", expected, ", in which ",
                x.scalar_type(), " is computed, got ", probe.scalar_type());
  }
};

std::tuple<Tensor, Tensor> rnn_with_gradient(
    const Tensor& x, const OptionalTensor& h0, const Tensor& weight_ih, const Tensor& weight_hh,
    const OptionalTensor& bias_ih, const OptionalTensor& bias_hh, std::string_view activation,
    const OptionalTensor& batch_sizes, const OptionalTensor& keep, const OptionalTensor& alpha,
    const OptionalTensor& restart, const OptionalTensor& mask, const OptionalTensor& noise,
    const OptionalTensor& probe, bool reverse, int64_t truncate, std::optional<double> clip) {
  if (!at::GradMode::is_enabled()) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return rnn(x, h0, weight_ih, weight_hh, bias_ih, bias_hh, activation, batch_sizes, keep, alpha,
               restart, mask, noise, probe, reverse, truncate, clip);
  }
  const variable_list outputs = RNNNode::apply(x, h0, weight_ih, weight_hh, bias_ih, bias_hh, alpha,
                                               restart, probe, batch_sizes, keep, mask, noise,
                                               std::string(activation), reverse, truncate, clip);
  return {outputs[0], outputs[1]};
}

std::tuple<Tensor, Tensor> rnn(const Tensor& x, const OptionalTensor& h0, const Tensor& weight_ih,
                               const Tensor& weight_hh, const OptionalTensor& bias_ih,
                               const OptionalTensor& bias_hh, std::string_view activation,
                               const OptionalTensor& batch_sizes, const OptionalTensor& keep,
                               const OptionalTensor& alpha, const OptionalTensor& restart,
                               const OptionalTensor& mask, const OptionalTensor& noise,
                               const OptionalTensor&, bool reverse, int64_t,
                               std::optional<double>) {
  auto [h, h_n, f] = forward_op().call(x, h0, weight_ih, weight_hh, bias_ih, bias_hh, activation,
                                       batch_sizes, keep, alpha, restart, mask, noise, reverse);
  return {h, h_n};
}

}  // namespace torch_bptt
