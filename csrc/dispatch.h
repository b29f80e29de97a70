// From tensors to kernels: dtype, activation, rows, threads. The only place that knows which
// backends were built.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <omp.h>

#include <algorithm>
#include <string_view>
#include <utility>

#include "checks.h"
#include "core/activations.h"
#include "core/problem.h"
#include "cpu/kernels.h"
#ifdef TORCH_BPTT_CUDA
#include "cuda_backend.h"
#endif

namespace torch_bptt {

template <class S>
struct tag {
  using type = S;
};

// body(tag<storage type>{}) for the dtype of `tensor`.
template <class Body>
void dispatch_dtype(const char* op, const char* name, const Tensor& tensor, Body&& body) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return body(tag<float>{});
    case at::kDouble:
      return body(tag<double>{});
    case at::kBFloat16:
      return body(tag<bfloat16>{});
    case at::kHalf:
      return body(tag<float16>{});
    default:
      TORCH_CHECK_TYPE(false, op, ": ", name,
                       " must be float32, float64, bfloat16 or float16, got ",
                       tensor.scalar_type());
  }
}

inline Activation activation_of(const char* op, std::string_view name) {
  int i = 0;
  std::string names;
  for (const char* known : kActivationNames) {
    if (name == known) return Activation(i);
    names += std::string(i++ ? ", " : "") + known;
  }
  TORCH_CHECK_VALUE(false, op, ": activation must be one of ", names, ", got ", name);
}

template <class S>
S* data_of(const Tensor& tensor) {
  return static_cast<S*>(tensor.data_ptr());
}
template <class S>
const S* const_data_of(const Tensor& tensor) {
  return static_cast<const S*>(tensor.const_data_ptr());
}

// The same values with the features of a row contiguous, as Rows wants them. Nearly always the
// tensor itself; an expanded dimension (the gradient of a sum) is kept expanded, so that nothing of
// the size of the sequence is copied.
inline Tensor with_feature_rows(const Tensor& tensor) {
  if (tensor.size(-1) <= 1 || tensor.stride(-1) == 1) return tensor;
  Tensor distinct = tensor;
  for (int64_t d = 0; d + 1 < tensor.dim(); ++d)
    if (tensor.stride(d) == 0 && tensor.size(d) > 1) distinct = distinct.narrow(d, 0, 1);
  return distinct.contiguous().expand(tensor.sizes());
}
inline OptionalTensor with_feature_rows(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(with_feature_rows(*tensor)) : std::nullopt;
}

// Views for the kernels. The tensors must outlive them, and have passed with_feature_rows.
template <class S>
Rows<const S> rows_of(const Tensor& tensor) {
  return {const_data_of<S>(tensor), tensor.dim() == 3 ? tensor.stride(0) : 0, tensor.stride(-2)};
}
template <class S>
Rows<const S> rows_of(const OptionalTensor& tensor) {
  return tensor ? rows_of<S>(*tensor) : Rows<const S>{};
}
template <class S>
Rows<S> output_rows_of(const Tensor& tensor) {  // an empty tensor is one that is not wanted
  if (tensor.numel() == 0) return {};
  return {data_of<S>(tensor), tensor.dim() == 3 ? tensor.stride(0) : 0, tensor.stride(-2)};
}

// Options about rows and links, and the tensors they point into.
struct ScheduleOf {
  Schedule schedule;
  Tensor keep;

  ScheduleOf(const char* op, const Sizes& sizes, const OptionalTensor& keep_option, bool reverse,
             int64_t truncate = 0) {
    check_truncate(op, truncate);
    if (keep_option) {
      TORCH_CHECK_TYPE(keep_option->scalar_type() == at::kBool, op,
                       ": keep must be a bool tensor, got ", keep_option->scalar_type());
      check_shape(op, "keep", *keep_option, {sizes.T, sizes.B}, "(steps, batch)");
      TORCH_CHECK(keep_option->device() == sizes.device, op,
                  ": keep must be on the device of the sequence, expected ", sizes.device, ", got ",
                  keep_option->device());
      keep = keep_option->contiguous();
    }
    schedule.T = sizes.T;
    schedule.B = sizes.B;
    schedule.offsets = sizes.packed() ? sizes.offsets.data() : nullptr;
    schedule.lengths = sizes.packed() ? sizes.lengths.data() : nullptr;
    schedule.keep = keep.defined() ? keep.const_data_ptr<bool>() : nullptr;
    schedule.reverse = reverse;
    schedule.truncate = truncate;
  }
};

// PyTorch's own threads, all running at once. Inside a parallel region of the caller's there is
// only the calling one. No num_threads clause: GOMP would end and start threads whenever it
// changes.
inline Parallel torch_threads() {
  return {at::in_parallel_region() ? 1 : at::get_num_threads(),
          [](int threads, void (*task)(void*, int, int), void* context) {
#pragma omp parallel
            {
              const int count = std::min(threads, omp_get_num_threads());
              if (omp_get_thread_num() < count) task(context, omp_get_thread_num(), count);
            }
          }};
}

// The functions of a backend; `like` is a tensor of the call.
template <class S>
struct Backend {
  void (*rnn_forward)(const ForwardProblem<S>& problem, const Tensor& like);
  void (*rnn_backward)(const BackwardProblem<S>& problem, const Tensor& like);
  void (*adjoint_scan)(const ScanProblem<S>& problem, const Tensor& like);
  void (*tangent_scan)(const ScanProblem<S>& problem, const Tensor& like);
};

template <class S>
constexpr Backend<S> kCpuBackend{
    [](const ForwardProblem<S>& problem, const Tensor&) {
      cpu::kernels().of<S>().rnn_forward(problem, torch_threads());
    },
    [](const BackwardProblem<S>& problem, const Tensor&) {
      cpu::kernels().of<S>().rnn_backward(problem, torch_threads());
    },
    [](const ScanProblem<S>& problem, const Tensor&) {
      cpu::kernels().of<S>().adjoint_scan(problem, torch_threads());
    },
    [](const ScanProblem<S>& problem, const Tensor&) {
      cpu::kernels().of<S>().tangent_scan(problem, torch_threads());
    },
};

#ifdef TORCH_BPTT_CUDA
template <class S>
constexpr Backend<S> kCudaBackend{cuda::rnn_forward<S>, cuda::rnn_backward<S>,
                                  cuda::adjoint_scan<S>, cuda::tangent_scan<S>};
#endif

// The backend for the device of a tensor. In the build with CUDA kernels on the host, which is for
// tests, that one.
template <class S>
const Backend<S>& backend_of([[maybe_unused]] const Tensor& like) {
#if defined(TORCH_BPTT_CUDA_ON_HOST)
  return kCudaBackend<S>;
#elif defined(TORCH_BPTT_CUDA)
  if (like.is_cuda()) return kCudaBackend<S>;
#endif
  return kCpuBackend<S>;
}

}  // namespace torch_bptt
