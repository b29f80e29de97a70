// The layer and its first derivative as nodes of the autograd graph, as PyTorch's own operators
// have them. A node in C++ takes less time than one in Python: RNN(8, 8) on one step, forward and
// backward, 33 us instead of 44; under torch.func, whose handling of Python's nodes is slow, an
// ensemble of small networks takes a third of the time.
//
// Where a derivative is to be differentiated itself, the nodes call torch_bptt/autograd.py; forward
// mode takes the Functions there from the start.
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <type_traits>

#include "operators.h"

namespace torch_bptt {

namespace {

using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using torch::dynamo::autograd::CompiledNodeArgs;
using torch::dynamo::autograd::SwapSavedVariables;
using NodePtr = decltype(torch::autograd::Edge::function);

// A reference-counted node. Older versions of PyTorch hold it in std::shared_ptr, newer ones in
// c10::intrusive_ptr.
template <class N>
auto make_node() {
  if constexpr (std::is_same_v<NodePtr, std::shared_ptr<Node>>)
    return std::shared_ptr<N>(new N, [](auto* node) { deleteNode(node); });
  else
    return c10::make_intrusive<N>();
}

const auto& forward_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torch_bptt::rnn_forward", "")
                             .typed<decltype(rnn_forward)>();
  return op;
}

const auto& layer_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torch_bptt::rnn_with_f", "")
                             .typed<decltype(rnn_with_f)>();
  return op;
}

const auto& backward_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torch_bptt::rnn_backward", "")
                             .typed<decltype(rnn_backward)>();
  return op;
}

// Whether a transform of torch.func is at work. Each of its levels has a graph of its own: a node
// of one level then has to call an operator that makes a node in turn.
bool under_transforms() {
  return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerBackMode);
}

// Whether a tensor is one itself, and not somebody's wrapper of another.
bool is_plain(const Tensor& tensor) {
  constexpr c10::DispatchKeySet wrappers({c10::DispatchKey::Python, c10::DispatchKey::Functionalize,
                                          c10::DispatchKey::FuncTorchBatched,
                                          c10::DispatchKey::FuncTorchGradWrapper,
                                          c10::DispatchKey::Batched});
  return !tensor.key_set().has_any(wrappers);
}

// x and weight_ih as backward needs them, which reads x for the gradient of weight_ih alone, and
// that for the gradient of x: else a shape. The caller may then change them in place, or let x go.
SavedVariable saved_x(const Tensor& x, const Tensor& weight_ih) {
  if (weight_ih.requires_grad() || under_transforms() || !is_plain(x)) return {x, false};
  return {at::empty_strided(x.sizes(), c10::DimVector(size_t(x.dim()), 0), x.options()), false};
}
SavedVariable saved_weight_ih(const Tensor& weight_ih, const Tensor& x) {
  if (x.requires_grad() || under_transforms() || !is_plain(weight_ih)) return {weight_ih, false};
  return {Tensor(weight_ih.variable_data()), false};  // with a version of its own
}

template <class... Tensors>
void check_no_tangents(const char* op, const Tensors&... tensors) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !(torch::autograd::isFwGradDefined(tensors) || ...), op,
      ": the operator must not be called in forward mode, got a tensor with a tangent: call ",
      "torch_bptt.functional.rnn or a module");
}

void check_probe(const OptionalTensor& probe, const Tensor& x) {
  if (!probe) return;
  const auto rows = x.sizes().slice(0, x.dim() - 1);
  TORCH_CHECK_VALUE(probe->sizes() == rows, "rnn: probe must have one entry for each row of x, ",
                    "expected ", rows, ", got ", probe->sizes());
  const auto expected = at::toOpMathType(x.scalar_type());
  TORCH_CHECK(probe->scalar_type() == expected, "rnn: probe must be ", expected, ", in which ",
              x.scalar_type(), " is computed, got ", probe->scalar_type());
}

}  // namespace

// The node of rnn. Its name is what users see as grad_fn, in anomaly mode and in profiles.
struct RNNNode : Node {
  LayerOptions options;
  SavedVariable x, h0, weight_ih, weight_hh, batch_sizes, keep, alpha, restart, mask, h, f;

  std::string name() const override { return "RNNNode"; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* saved : all_saved()) saved->reset_data();
  }

  // For compiled autograd: what a graph of this node depends on, and the node with other tensors.
  void compiled_args(CompiledNodeArgs& args) const override {
    for (const SavedVariable* saved :
         {&x, &h0, &weight_ih, &weight_hh, &batch_sizes, &keep, &alpha, &restart, &mask, &f})
      args.collect(*saved, false);
    args.collect(h, true);
    args.collect(options.activation);
    args.collect(options.reverse);
    args.collect(options.truncate);
    args.collect(options.clip);
  }
  variable_list apply_with_saved(const variable_list& grads, SwapSavedVariables& swap) override {
    for (SavedVariable* saved : all_saved()) swap.before(*saved);
    variable_list result = apply(variable_list(grads));
    for (SavedVariable* saved : all_saved()) swap.after(*saved);
    return result;
  }

  std::array<SavedVariable*, 11> all_saved() {
    return {&x, &h0, &weight_ih, &weight_hh, &batch_sizes, &keep, &alpha, &restart, &mask, &h, &f};
  }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    variable_list result(INPUTS);
    if (!grads[0].defined() && !grads[1].defined()) return result;
    std::array<bool, INPUTS> wanted;
    for (size_t i = 0; i < wanted.size(); ++i) wanted[i] = task_should_compute_output(i);
    const SavedForBackward all{optional(grads[0]),
                               optional(grads[1]),
                               x.unpack(),
                               optional(h0.unpack()),
                               weight_ih.unpack(),
                               weight_hh.unpack(),
                               optional(batch_sizes.unpack()),
                               optional(keep.unpack()),
                               optional(alpha.unpack()),
                               optional(restart.unpack()),
                               optional(mask.unpack()),
                               h.unpack(getptr()),
                               optional(f.unpack())};
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
                                      options.reverse, options.truncate, options.clip, 0);
    if (wanted[X]) result[X] = grad_x;
    if (wanted[H0]) result[H0] = grad_h0;
    if (wanted[WEIGHT_IH]) result[WEIGHT_IH] = grad_weight_ih;
    if (wanted[WEIGHT_HH]) result[WEIGHT_HH] = grad_weight_hh;
    if (wanted[BIAS_IH]) result[BIAS_IH] = grad_bias;
    // Each bias gets one of its own: who scales gradients in place must not do so twice.
    if (wanted[BIAS_HH]) result[BIAS_HH] = wanted[BIAS_IH] ? grad_bias.clone() : grad_bias;
    if (wanted[ALPHA]) result[ALPHA] = grad_alpha;
    if (wanted[RESTART]) result[RESTART] = grad_restart;
    if (wanted[PROBE]) result[PROBE] = norms;
    return result;
  }
};

std::tuple<Tensor, Tensor, Tensor> rnn_with_f_with_gradient(
    const Tensor& x, const OptionalTensor& h0, const Tensor& weight_ih, const Tensor& weight_hh,
    const OptionalTensor& bias_ih, const OptionalTensor& bias_hh, std::string_view activation,
    const OptionalTensor& batch_sizes, const OptionalTensor& keep, const OptionalTensor& alpha,
    const OptionalTensor& restart, const OptionalTensor& mask, const OptionalTensor& noise,
    const OptionalTensor& probe, bool reverse, int64_t truncate, std::optional<double> clip) {
  check_no_tangents("rnn", x, h0, weight_ih, weight_hh, bias_ih, bias_hh, alpha, restart);
  const bool has_graph = torch::autograd::compute_requires_grad(
      x, h0, weight_ih, weight_hh, bias_ih, bias_hh, alpha, restart, probe);
  NodePtr edge;
  RNNNode* node = nullptr;
  if (has_graph) {
    check_probe(probe, x);
    auto made = make_node<RNNNode>();
    node = made.get();
    edge = std::move(made);
    node->set_next_edges(torch::autograd::collect_next_edges(x, h0, weight_ih, weight_hh, bias_ih,
                                                             bias_hh, alpha, restart, probe));
    node->options = {std::string(activation), reverse, truncate, clip};
    node->x = saved_x(x, weight_ih);
    node->h0 = SavedVariable(h0, false);
    node->weight_ih = saved_weight_ih(weight_ih, x);
    node->weight_hh = SavedVariable(weight_hh, false);
    node->batch_sizes = SavedVariable(batch_sizes, false);
    node->keep = SavedVariable(keep, false);
    node->alpha = SavedVariable(alpha, false);
    node->restart = SavedVariable(restart, false);
    node->mask = SavedVariable(mask, false);
  }
  auto outputs = [&] {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    if (under_transforms())
      return layer_op().call(x, h0, weight_ih, weight_hh, bias_ih, bias_hh, activation, batch_sizes,
                             keep, alpha, restart, mask, noise, probe, reverse, truncate, clip);
    return forward_op().call(x, h0, weight_ih, weight_hh, bias_ih, bias_hh, activation, batch_sizes,
                             keep, alpha, restart, mask, noise, reverse);
  }();
  if (has_graph) {
    auto& [h, h_n, f] = outputs;
    torch::autograd::set_history({h, h_n}, edge);
    node->h = SavedVariable(h, true);
    if (alpha) node->f = SavedVariable(f, false);
  }
  return outputs;
}

std::tuple<Tensor, Tensor> rnn_with_gradient(
    const Tensor& x, const OptionalTensor& h0, const Tensor& weight_ih, const Tensor& weight_hh,
    const OptionalTensor& bias_ih, const OptionalTensor& bias_hh, std::string_view activation,
    const OptionalTensor& batch_sizes, const OptionalTensor& keep, const OptionalTensor& alpha,
    const OptionalTensor& restart, const OptionalTensor& mask, const OptionalTensor& noise,
    const OptionalTensor& probe, bool reverse, int64_t truncate, std::optional<double> clip) {
  auto [h, h_n, f] = rnn_with_f_with_gradient(x, h0, weight_ih, weight_hh, bias_ih, bias_hh,
                                              activation, batch_sizes, keep, alpha, restart, mask,
                                              noise, probe, reverse, truncate, clip);
  return {std::move(h), std::move(h_n)};
}

std::tuple<Tensor, Tensor, Tensor> rnn_with_f(
    const Tensor& x, const OptionalTensor& h0, const Tensor& weight_ih, const Tensor& weight_hh,
    const OptionalTensor& bias_ih, const OptionalTensor& bias_hh, std::string_view activation,
    const OptionalTensor& batch_sizes, const OptionalTensor& keep, const OptionalTensor& alpha,
    const OptionalTensor& restart, const OptionalTensor& mask, const OptionalTensor& noise,
    const OptionalTensor&, bool reverse, int64_t, std::optional<double>) {
  return forward_op().call(x, h0, weight_ih, weight_hh, bias_ih, bias_hh, activation, batch_sizes,
                           keep, alpha, restart, mask, noise, reverse);
}

std::tuple<Tensor, Tensor> rnn(const Tensor& x, const OptionalTensor& h0, const Tensor& weight_ih,
                               const Tensor& weight_hh, const OptionalTensor& bias_ih,
                               const OptionalTensor& bias_hh, std::string_view activation,
                               const OptionalTensor& batch_sizes, const OptionalTensor& keep,
                               const OptionalTensor& alpha, const OptionalTensor& restart,
                               const OptionalTensor& mask, const OptionalTensor& noise,
                               const OptionalTensor& probe, bool reverse, int64_t truncate,
                               std::optional<double> clip) {
  auto [h, h_n, f] =
      rnn_with_f(x, h0, weight_ih, weight_hh, bias_ih, bias_hh, activation, batch_sizes, keep,
                 alpha, restart, mask, noise, probe, reverse, truncate, clip);
  return {std::move(h), std::move(h_n)};
}

// The node of rnn_backward. Its backward computes the gradients anew, as tensor operations that can
// be differentiated again (second_backward).
struct RNNBackwardNode : Node {
  BackwardOptions options;
  std::vector<SavedVariable> tensors;  // that rnn_backward reads, in its order

  std::string name() const override { return "RNNBackwardNode"; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable& saved : tensors) saved.reset_data();
  }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::vector<Tensor> unpacked;
    std::vector<bool> needed;
    for (size_t i = 0; i < tensors.size(); ++i) {
      unpacked.push_back(tensors[i].unpack());
      needed.push_back(task_should_compute_output(i));
    }
    return second_backward(unpacked, options, needed, grads);
  }
};

Gradients rnn_backward_with_gradient(const OptionalTensor& grad_h, const OptionalTensor& grad_h_n,
                                     const Tensor& x, const OptionalTensor& h0, const Tensor& h,
                                     const OptionalTensor& f, const Tensor& weight_ih,
                                     const Tensor& weight_hh, std::string_view activation,
                                     Wanted wanted, const OptionalTensor& batch_sizes,
                                     const OptionalTensor& keep, const OptionalTensor& alpha,
                                     const OptionalTensor& restart, const OptionalTensor& mask,
                                     bool reverse, int64_t truncate, std::optional<double> clip,
                                     int64_t parts) {
  check_no_tangents("rnn_backward", grad_h, grad_h_n, x, h0, h, weight_ih, weight_hh, alpha,
                    restart);
  auto gradients = [&] {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return backward_op().call(grad_h, grad_h_n, x, h0, h, f, weight_ih, weight_hh, activation,
                              wanted, batch_sizes, keep, alpha, restart, mask, reverse, truncate,
                              clip, parts);
  }();
  if (!torch::autograd::compute_requires_grad(grad_h, grad_h_n, x, h0, h, weight_ih, weight_hh,
                                              alpha, restart))
    return gradients;
  auto node = make_node<RNNBackwardNode>();
  node->set_next_edges(torch::autograd::collect_next_edges(grad_h, grad_h_n, x, h0, h, f, weight_ih,
                                                           weight_hh, batch_sizes, keep, alpha,
                                                           restart, mask));
  node->options = {std::string(activation), wanted, reverse, truncate, clip, parts};
  const auto save = [&](const OptionalTensor& tensor) {
    node->tensors.emplace_back(tensor, false);
  };
  for (const OptionalTensor& tensor :
       {grad_h, grad_h_n, OptionalTensor(x), h0, OptionalTensor(h), f, OptionalTensor(weight_ih),
        OptionalTensor(weight_hh), batch_sizes, keep, alpha, restart, mask})
    save(tensor);
  auto& [grad_x, grad_h0, grad_weight_ih, grad_weight_hh, grad_bias, grad_alpha, grad_restart,
         norms] = gradients;
  torch::autograd::set_history(
      {grad_x, grad_h0, grad_weight_ih, grad_weight_hh, grad_bias, grad_alpha, grad_restart},
      NodePtr(std::move(node)));
  return gradients;
}

}  // namespace torch_bptt
