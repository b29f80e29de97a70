// The operators, torch.ops.torch_bptt.*; binding.cpp has their schemas.
//
// Rows are dense, (T, B, features), or packed as in PackedSequence: (N, features) with batch_sizes
// (T); (B, features) alone is a single step. A state is one step with as many dimensions as x:
// (1, B, H) beside dense rows, else (B, H). The mathematics is in README.md beside this file.
//
// Options that several operators have, and what None stands for:
//
// clang-format off
//   keep     bool (T, B); false: the row restarts, the state before does not arrive    all true
//   restart  a state: what arrives instead                                             zeros
//   alpha    (H): the leak of each unit, in the type that x is computed in             ones
//   mask     a state: factors of what arrives, before it is multiplied by W_hh         ones
//   noise    as h, added to z                                                          zeros
// clang-format on
//
// With weight_hh (G, H, H) an operator runs G networks side by side: every other tensor but
// batch_sizes, results included, has G in front.
#pragma once

#include <array>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "checks.h"

namespace torch_bptt {

// -> h as x with H features; h_n, a state; f(z_t) as h, empty without alpha
std::tuple<Tensor, Tensor, Tensor> rnn_forward(
    const Tensor& x, const OptionalTensor& h0, const Tensor& weight_ih, const Tensor& weight_hh,
    const OptionalTensor& bias_ih, const OptionalTensor& bias_hh, std::string_view activation,
    const OptionalTensor& batch_sizes, const OptionalTensor& keep, const OptionalTensor& alpha,
    const OptionalTensor& restart, const OptionalTensor& mask, const OptionalTensor& noise,
    bool reverse);

// -> grad_x, grad_h0, grad_weight_ih, grad_weight_hh, grad_bias, grad_alpha, grad_restart, norms
// |dL/dh_t| of every row; those not wanted are empty and cost nothing. With parts > 0 those of
// weights, bias and alpha are (parts, ...): row b counts to part b % parts alone.
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
enum Gradient {
  GRAD_X,
  GRAD_H0,
  GRAD_WEIGHT_IH,
  GRAD_WEIGHT_HH,
  GRAD_BIAS,
  GRAD_ALPHA,
  GRAD_RESTART,
  NORMS,
  GRADIENTS
};
using Wanted = std::array<bool, GRADIENTS>;
using Backward = Gradients(const OptionalTensor& grad_h, const OptionalTensor& grad_h_n,
                           const Tensor& x, const OptionalTensor& h0, const Tensor& h,
                           const OptionalTensor& f, const Tensor& weight_ih,
                           const Tensor& weight_hh, std::string_view activation, Wanted wanted,
                           const OptionalTensor& batch_sizes, const OptionalTensor& keep,
                           const OptionalTensor& alpha, const OptionalTensor& restart,
                           const OptionalTensor& mask, bool reverse, int64_t truncate,
                           std::optional<double> clip, int64_t parts);
Backward rnn_backward;

// gate_stops: a gate of zero stops even what is infinite or NaN, as relu's slope does.
// -> d as g; d0 and what goes back to restart, states
std::tuple<Tensor, Tensor, Tensor> adjoint_scan(
    const Tensor& g, const Tensor& gate, const Tensor& weight_hh, const OptionalTensor& batch_sizes,
    const OptionalTensor& keep, const OptionalTensor& alpha, const OptionalTensor& mask,
    bool reverse, int64_t truncate, std::optional<double> clip, bool gate_stops);

// -> q as c
Tensor tangent_scan(const Tensor& c, const OptionalTensor& q0, const Tensor& gate,
                    const Tensor& weight_hh, const OptionalTensor& batch_sizes,
                    const OptionalTensor& keep, const OptionalTensor& alpha,
                    const OptionalTensor& restart, const OptionalTensor& mask, bool reverse,
                    int64_t truncate, bool gate_stops);

// ---- the layer with its derivative (autograd.cpp) -----------------------------------------------

// -> h, h_n. Without a graph, and with one. probe has the shape of x without its features and the
// type that x is computed in: it changes nothing, and its gradient is the norm of dL/dh_t.
template <class Results>
using Layer = Results(const Tensor& x, const OptionalTensor& h0, const Tensor& weight_ih,
                      const Tensor& weight_hh, const OptionalTensor& bias_ih,
                      const OptionalTensor& bias_hh, std::string_view activation,
                      const OptionalTensor& batch_sizes, const OptionalTensor& keep,
                      const OptionalTensor& alpha, const OptionalTensor& restart,
                      const OptionalTensor& mask, const OptionalTensor& noise,
                      const OptionalTensor& probe, bool reverse, int64_t truncate,
                      std::optional<double> clip);
Layer<std::tuple<Tensor, Tensor>> rnn, rnn_with_gradient;

// The same with f(z_t) as rnn_forward returns it, which has no gradient: what a node calls under a
// transform of torch.func, so that each of its levels gets a node.
Layer<std::tuple<Tensor, Tensor, Tensor>> rnn_with_f, rnn_with_f_with_gradient;

// rnn_backward with a graph.
Backward rnn_backward_with_gradient;

// The arguments of the layer that have a gradient, in their order.
enum LayerInput { X, H0, WEIGHT_IH, WEIGHT_HH, BIAS_IH, BIAS_HH, ALPHA, RESTART, PROBE, INPUTS };

struct LayerOptions {
  std::string activation;
  bool reverse;
  int64_t truncate;
  std::optional<double> clip;
};

struct SavedForBackward {
  OptionalTensor grad_h, grad_h_n;
  Tensor x;
  OptionalTensor h0;
  Tensor weight_ih, weight_hh;
  OptionalTensor batch_sizes, keep, alpha, restart, mask;
  Tensor h;
  OptionalTensor f;
};

// The gradients of a layer's inputs, undefined where not wanted, as functions that can be
// differentiated: torch_bptt.autograd.backward_with_graph.
std::array<Tensor, INPUTS> backward_with_graph(const SavedForBackward& saved,
                                               const LayerOptions& options,
                                               const std::array<bool, INPUTS>& wanted);

struct BackwardOptions {
  std::string activation;
  Wanted wanted;
  bool reverse;
  int64_t truncate;
  std::optional<double> clip;
  int64_t parts;
};

// The gradients of the tensors that rnn_backward reads, in its order, undefined where not needed:
// torch_bptt.autograd.second_backward.
std::vector<Tensor> second_backward(const std::vector<Tensor>& tensors,
                                    const BackwardOptions& options, const std::vector<bool>& needed,
                                    const std::vector<Tensor>& grads);

}  // namespace torch_bptt
