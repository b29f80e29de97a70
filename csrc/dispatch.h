// From tensors to kernels: dtype, activation, rows, threads, and the backend of a device.
#pragma once

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <omp.h>

#include <algorithm>
#include <string_view>

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

// The matrix of every network contiguous; one that they share is kept expanded.
inline Tensor with_contiguous_matrices(const Tensor& weight) {
  if (weight.dim() == 2 || weight.stride(0) != 0) return weight.contiguous();
  return weight.select(0, 0).contiguous().expand(weight.sizes());
}

// What one network of several reads and writes, as the kernels want it. The tensors must outlive
// this, and have passed with_feature_rows or with_contiguous_matrices; an absent one gives null,
// and so does an output that is empty, which is one that is not wanted.
class Operands {
 public:
  Operands(const Networks& networks, int64_t index) : several(networks.several), index(index) {}

  template <class S>
  const S* data(const Tensor& tensor) const {
    check_memory(tensor);
    return static_cast<const S*>(tensor.const_data_ptr()) + offset(tensor);
  }
  template <class S>
  const S* data(const OptionalTensor& tensor) const {
    return tensor ? data<S>(*tensor) : nullptr;
  }
  template <class S>
  S* output(const Tensor& tensor) const {
    return tensor.numel() ? static_cast<S*>(tensor.data_ptr()) + offset(tensor) : nullptr;
  }
  template <class S>
  Rows<const S> rows(const Tensor& tensor) const {
    return {data<S>(tensor), step(tensor), tensor.stride(-2)};
  }
  template <class S>
  Rows<const S> rows(const OptionalTensor& tensor) const {
    return tensor ? rows<S>(*tensor) : Rows<const S>{};
  }
  template <class S>
  Rows<S> output_rows(const Tensor& tensor) const {
    if (tensor.numel() == 0) return {};
    return {output<S>(tensor), step(tensor), tensor.stride(-2)};
  }

 private:
  // A storage can be given back under a tensor, as some of FSDP's are: an error, not a crash.
  static void check_memory(const Tensor& tensor) {
    const size_t needed = at::detail::computeStorageNbytes(
        tensor.sizes(), tensor.strides(), tensor.element_size(), size_t(tensor.storage_offset()));
    TORCH_CHECK(needed <= tensor.storage().nbytes(), "a tensor of shape ", tensor.sizes(),
                " must have its memory, expected a storage of at least ", needed, " bytes, got ",
                tensor.storage().nbytes());
  }
  int64_t offset(const Tensor& tensor) const { return several ? index * tensor.stride(0) : 0; }
  int64_t step(const Tensor& tensor) const {
    return tensor.dim() - several == 3 ? tensor.stride(-3) : 0;
  }

  const bool several;
  const int64_t index;
};

// Options about rows and links, and the tensors they point into.
struct ScheduleOf {
  ScheduleOf(const char* op, const Networks& networks, const Sizes& sizes,
             const OptionalTensor& keep_option, bool reverse, int64_t truncate = 0) {
    check_truncate(op, truncate);
    if (keep_option) {
      TORCH_CHECK_TYPE(keep_option->scalar_type() == at::kBool, op,
                       ": keep must be a bool tensor, got ", keep_option->scalar_type());
      check_shape(op, "keep", networks.first(op, "keep", *keep_option), {sizes.T, sizes.B},
                  "(steps, batch)");
      TORCH_CHECK(keep_option->device() == sizes.device, op,
                  ": keep must be on the device of the sequence, expected ", sizes.device, ", got ",
                  keep_option->device());
      keep = with_contiguous_matrices(*keep_option);
    }
    schedule.T = sizes.T;
    schedule.B = sizes.B;
    schedule.offsets = sizes.packed() ? sizes.offsets.data() : nullptr;
    schedule.lengths = sizes.packed() ? sizes.lengths.data() : nullptr;
    schedule.reverse = reverse;
    schedule.truncate = truncate;
  }

  Schedule of(const Operands& network) const {
    Schedule result = schedule;
    result.keep = network.data<bool>(keep);
    return result;
  }

 private:
  Schedule schedule;
  OptionalTensor keep;
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

// Whether the CUDA backend takes what is on that tensor's device. In the build with its kernels on
// the host, which is for tests, it takes everything.
inline bool takes_cuda([[maybe_unused]] const Tensor& like) {
#if defined(TORCH_BPTT_CUDA_ON_HOST)
  return true;
#elif defined(TORCH_BPTT_CUDA)
  return like.is_cuda();
#else
  return false;
#endif
}

// The functions of a backend; `like` is a tensor of the call, and the threads are for the CPU.
template <class S>
struct Backend {
  void (*rnn_forward)(const ForwardProblem<S>& problem, const Tensor& like, const Parallel&);
  void (*rnn_backward)(const BackwardProblem<S>& problem, const Tensor& like, const Parallel&);
  void (*adjoint_scan)(const AdjointProblem<S>& problem, const Tensor& like, const Parallel&);
  void (*tangent_scan)(const TangentProblem<S>& problem, const Tensor& like, const Parallel&);
};

template <class S>
constexpr Backend<S> kCpuBackend{
    [](const ForwardProblem<S>& problem, const Tensor&, const Parallel& threads) {
      cpu::kernels().of<S>().rnn_forward(problem, threads);
    },
    [](const BackwardProblem<S>& problem, const Tensor&, const Parallel& threads) {
      cpu::kernels().of<S>().rnn_backward(problem, threads);
    },
    [](const AdjointProblem<S>& problem, const Tensor&, const Parallel& threads) {
      cpu::kernels().of<S>().adjoint_scan(problem, threads);
    },
    [](const TangentProblem<S>& problem, const Tensor&, const Parallel& threads) {
      cpu::kernels().of<S>().tangent_scan(problem, threads);
    },
};

#ifdef TORCH_BPTT_CUDA
template <class S>
constexpr Backend<S> kCudaBackend{
    [](const ForwardProblem<S>& problem, const Tensor& like, const Parallel&) {
      cuda::rnn_forward(problem, like);
    },
    [](const BackwardProblem<S>& problem, const Tensor& like, const Parallel&) {
      cuda::rnn_backward(problem, like);
    },
    [](const AdjointProblem<S>& problem, const Tensor& like, const Parallel&) {
      cuda::adjoint_scan(problem, like);
    },
    [](const TangentProblem<S>& problem, const Tensor& like, const Parallel&) {
      cuda::tangent_scan(problem, like);
    },
};
#endif

// The backend for the device of a tensor.
template <class S>
const Backend<S>& backend_of([[maybe_unused]] const Tensor& like) {
#ifdef TORCH_BPTT_CUDA
  if (takes_cuda(like)) return kCudaBackend<S>;
#endif
  return kCpuBackend<S>;
}

// body(network, threads) for each of the networks, which share the threads: each network has one
// alone, or, where there are more threads than networks, all of them in turn. `work` is that of a
// network in multiply-adds. On a GPU they run one after the other; `like` says where they are.
template <class Body>
void for_each_network(const Tensor& like, const Networks& networks, int64_t work,
                      const Body& body) {
  if (networks.count == 1 || networks.count < at::get_num_threads() || takes_cuda(like)) {
    for (int64_t i = 0; i < networks.count; ++i) body(Operands(networks, i), torch_threads());
    return;
  }
  const int64_t grain = kWorkPerThread / std::max<int64_t>(work, 1) + 1;
  at::parallel_for(0, networks.count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(Operands(networks, i), Parallel{});
  });
}

}  // namespace torch_bptt
