// The operators, torch.ops.torch_bptt.*; binding.cpp has their schemas.
//
// Rows are dense, (T, B, features), or packed as in PackedSequence: (N, features) with batch_sizes
// (T); (B, features) alone is a single step. A state is one step with as many dimensions as x:
// (1, B, H) beside dense rows, else (B, H). keep (T, B) is false where the state arriving at a step
// counts as zero. The mathematics is in README.md beside this file.
#pragma once

#include <array>
#include <string>
#include <string_view>
#include <tuple>

#include "checks.h"

namespace torch_bptt {

// -> h as x with H features; h_n, a state; f(z_t) as h, empty when alpha is 1
std::tuple<Tensor, Tensor, Tensor> rnn_forward(
    const Tensor& x, const OptionalTensor& h0, const Tensor& weight_ih, const Tensor& weight_hh,
    const OptionalTensor& bias_ih, const OptionalTensor& bias_hh, std::string_view activation,
    const OptionalTensor& batch_sizes, const OptionalTensor& keep, double alpha, bool reverse);

// -> grad_x, grad_h0, grad_weight_ih, grad_weight_hh, grad_bias; those not wanted are empty and
// cost nothing
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rnn_backward(
    const OptionalTensor& grad_h, const OptionalTensor& grad_h_n, const Tensor& x,
    const OptionalTensor& h0, const Tensor& h, const OptionalTensor& f, const Tensor& weight_ih,
    const Tensor& weight_hh, std::string_view activation, std::array<bool, 5> wanted,
    const OptionalTensor& batch_sizes, const OptionalTensor& keep, double alpha, bool reverse,
    int64_t truncate, std::optional<double> clip);

// -> d as g; d0, a state
std::tuple<Tensor, Tensor> adjoint_scan(const Tensor& g, const Tensor& gate,
                                        const Tensor& weight_hh, const OptionalTensor& batch_sizes,
                                        const OptionalTensor& keep, double alpha, bool reverse,
                                        int64_t truncate, std::optional<double> clip);

// -> q as c
Tensor tangent_scan(const Tensor& c, const OptionalTensor& q0, const Tensor& gate,
                    const Tensor& weight_hh, const OptionalTensor& batch_sizes,
                    const OptionalTensor& keep, double alpha, bool reverse, int64_t truncate);

// ---- the layer with its derivative (autograd.cpp)
// ------------------------------------------------

// -> h, h_n. Without a graph, and with one.
std::tuple<Tensor, Tensor> rnn(const Tensor& x, const OptionalTensor& h0, const Tensor& weight_ih,
                               const Tensor& weight_hh, const OptionalTensor& bias_ih,
                               const OptionalTensor& bias_hh, std::string_view activation,
                               const OptionalTensor& batch_sizes, const OptionalTensor& keep,
                               double alpha, bool reverse, int64_t truncate,
                               std::optional<double> clip);
std::tuple<Tensor, Tensor> rnn_with_gradient(
    const Tensor& x, const OptionalTensor& h0, const Tensor& weight_ih, const Tensor& weight_hh,
    const OptionalTensor& bias_ih, const OptionalTensor& bias_hh, std::string_view activation,
    const OptionalTensor& batch_sizes, const OptionalTensor& keep, double alpha, bool reverse,
    int64_t truncate, std::optional<double> clip);

struct LayerOptions {
  std::string activation;
  double alpha;
  bool reverse;
  int64_t truncate;
  std::optional<double> clip;
  std::array<bool, 6> given;  // of x, h0, weight_ih, weight_hh, bias_ih, bias_hh: those that exist
};

struct SavedForBackward {
  OptionalTensor grad_h, grad_h_n;
  Tensor x;
  OptionalTensor h0;
  Tensor weight_ih, weight_hh;
  OptionalTensor batch_sizes, keep;
  Tensor h;
  OptionalTensor f;
};

// The gradients of x, h0, weight_ih, weight_hh, bias_ih, bias_hh, undefined where not wanted, as
// functions that can be differentiated: torch_bptt.autograd.backward_with_graph.
std::array<Tensor, 6> backward_with_graph(const SavedForBackward& saved,
                                          const LayerOptions& options,
                                          const std::array<bool, 6>& wanted);

}  // namespace torch_bptt
