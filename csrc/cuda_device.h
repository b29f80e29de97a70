// The device that a tensor is on: its stream, and what a plan asks of it.
#pragma once

#include <ATen/core/Tensor.h>

#include "cuda/plan.h"

namespace torch_bptt::cuda {

// The caller's stream there, a cudaStream_t.
void* stream_of(c10::Device device);

const DeviceFacts& facts_of(c10::Device device);

// Whether products of float32 inside a loop may round their factors to tf32. PyTorch's own setting
// for recurrent layers decides: torch.backends.cudnn.rnn.fp32_precision, or allow_tf32.
bool tf32_allowed();

// Whether PyTorch's own product of two matrices of that type rounds as products inside a loop do:
// float32 to tf32 or not, float16 with sums in float32. torch.backends.cuda.matmul has the
// settings.
bool library_rounds_alike(at::ScalarType type, bool tf32);

}  // namespace torch_bptt::cuda
