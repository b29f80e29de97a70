// Matrix products that are PyTorch's, of tensors over the memory of a problem; and the path whose
// steps are such products.
#pragma once

#include <ATen/ATen.h>

#include "cuda/paths.h"

namespace torch_bptt::cuda {

constexpr at::ScalarType type_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::float64:
      return at::kDouble;
    case Dtype::bfloat16:
      return at::kBFloat16;
    case Dtype::float16:
      return at::kHalf;
    default:
      return at::kFloat;
  }
}

inline void check(Error error) {
  TORCH_CHECK(!error, "torch_bptt: a CUDA kernel did not start: ", error);
}

// A tensor over memory that is somebody else's.
inline at::Tensor tensor_over(const void* data, at::IntArrayRef shape, at::IntArrayRef strides,
                              const at::TensorOptions& options) {
  return at::for_blob(const_cast<void*>(data), shape)
      .strides(strides)
      .options(options)
      .target_device(options.device())
      .make_tensor();
}

// out = a b for matrices or batches of them. Sums are in the type of out, the one computed in;
// factors of float32 are rounded to tf32 if torch.backends.cuda.matmul says so.
void multiply_wide(at::Tensor& out, const at::Tensor& a, const at::Tensor& b);

// Runs some steps of a loop as path gemm. `host` is its schedule with the numbers of the host,
// `stored` the options of tensors of S there.
template <class S>
void run_gemm_path(const Loop<S>& loop, const Schedule& host, Steps steps,
                   const at::TensorOptions& stored, void* stream);

}  // namespace torch_bptt::cuda
