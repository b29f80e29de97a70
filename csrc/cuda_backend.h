// The CUDA backend as the operators see it: the same four functions as cpu/kernels.h, on problems
// whose pointers are device pointers; those of the schedule but `keep` are the host's.
//
// `like` is any tensor of the call: it has the device and the dtype.
#pragma once

#include <ATen/core/Tensor.h>

#include "core/problem.h"

namespace torch_bptt::cuda {

template <class S>
void rnn_forward(const ForwardProblem<S>& problem, const at::Tensor& like);
template <class S>
void rnn_backward(const BackwardProblem<S>& problem, const at::Tensor& like);
template <class S>
void adjoint_scan(const AdjointProblem<S>& problem, const at::Tensor& like);
template <class S>
void tangent_scan(const TangentProblem<S>& problem, const at::Tensor& like);

}  // namespace torch_bptt::cuda
