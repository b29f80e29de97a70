// The one wording of errors:  operation: argument must be X, expected E, got G.
//
// ValueError for a wrong value or shape, TypeError for a wrong kind of thing, RuntimeError for a
// mix of dtypes or devices, as torch.nn.RNN has it.
#pragma once

#include <ATen/OpMathType.h>
#include <ATen/core/Tensor.h>
#include <c10/util/DimVector.h>
#include <c10/util/Exception.h>

#include <optional>
#include <string>
#include <vector>

namespace torch_bptt {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Autograd has undefined tensors where operators have absent ones.
inline OptionalTensor optional(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

inline void check_shape(const char* op, const char* name, const Tensor& tensor,
                        at::IntArrayRef expected, const char* meaning) {
  TORCH_CHECK_VALUE(tensor.sizes() == expected, op, ": ", name, " must have shape ", meaning,
                    ", expected ", expected, ", got ", tensor.sizes());
}

// Same dtype and device as the reference tensor, whose name stands first in the message.
inline void check_like(const char* op, const char* name, const Tensor& tensor,
                       const char* reference_name, const Tensor& reference) {
  TORCH_CHECK(tensor.device() == reference.device(), op, ": ", name, " must be on the device of ",
              reference_name, ", expected ", reference.device(), ", got ", tensor.device());
  TORCH_CHECK(tensor.scalar_type() == reference.scalar_type(), op, ": ", name,
              " must have the dtype of ", reference_name, ", expected ", reference.scalar_type(),
              ", got ", tensor.scalar_type());
}

// A shape with one more dimension in front.
inline c10::DimVector in_front(int64_t size, at::IntArrayRef shape) {
  c10::DimVector result{size};
  result.append(shape.begin(), shape.end());
  return result;
}

// How many networks an operator runs: one, or, where weight_hh is (G, H, H), G of one shape side by
// side. Every other tensor then has G in front as well, expanded where they share it. Checks look
// at the first network, which stands for all.
struct Networks {
  int64_t count = 1;
  bool several = false;

  Networks(const char* op, const Tensor& weight_hh) {
    TORCH_CHECK_VALUE(weight_hh.dim() == 2 || weight_hh.dim() == 3, op,
                      ": weight_hh must have shape (hidden_size, hidden_size), or (networks, "
                      "hidden_size, hidden_size), got ",
                      weight_hh.sizes());
    if (weight_hh.dim() == 2) return;
    several = true;
    count = weight_hh.size(0);
    TORCH_CHECK_VALUE(count > 0, op, ": weight_hh must have one matrix or more, got none");
  }

  Tensor first(const char* op, const char* name, const Tensor& tensor) const {
    if (!several) return tensor;
    TORCH_CHECK_VALUE(tensor.dim() > 0 && tensor.size(0) == count, op, ": ", name,
                      " must have a dimension of ", count,
                      " networks in front, as weight_hh has, got shape ", tensor.sizes());
    return tensor.select(0, 0);
  }
  OptionalTensor first(const char* op, const char* name, const OptionalTensor& tensor) const {
    return tensor ? OptionalTensor(first(op, name, *tensor)) : std::nullopt;
  }

  // The shape of an output for all networks.
  c10::DimVector shape(at::IntArrayRef of_one) const {
    return several ? in_front(count, of_one) : c10::DimVector(of_one);
  }
};

// One leak for each unit, in the type that x is computed in. Its values are the caller's concern:
// looking at them would wait for the device.
inline void check_alpha(const char* op, const OptionalTensor& alpha, int64_t hidden_size,
                        const Tensor& x) {
  if (!alpha) return;
  check_shape(op, "alpha", *alpha, {hidden_size}, "(hidden_size)");
  const auto expected = at::toOpMathType(x.scalar_type());
  TORCH_CHECK(alpha->device() == x.device() && alpha->scalar_type() == expected, op,
              ": alpha must be ", expected, " on ", x.device(), ", in which ", x.scalar_type(),
              " is computed, got ", alpha->scalar_type(), " on ", alpha->device());
}

inline void check_truncate(const char* op, int64_t truncate) {
  TORCH_CHECK_VALUE(truncate >= 0, op,
                    ": truncate must be a number of steps, expected 0 (none) or more, got ",
                    truncate);
}

inline void check_clip(const char* op, const std::optional<double>& clip) {
  TORCH_CHECK_VALUE(!clip || *clip >= 0, op,
                    ": clip must be a bound, expected None or 0 or more, got ", *clip);
}

// The sizes of one call, read from a (T, B, features) or packed (N, features) tensor, or from a
// single step of (B, features), and which rows exist when.
struct Sizes {
  c10::Device device;
  int64_t T = 0, B = 0, dims = 0;
  std::vector<int64_t> offsets, lengths;  // empty: dense

  Sizes(const char* op, const char* name, const Tensor& data, const OptionalTensor& batch_sizes)
      : device(data.device()) {
    dims = data.dim();
    if (!batch_sizes) {
      TORCH_CHECK_VALUE(dims == 3 || dims == 2, op, ": ", name,
                        " must have 3 dimensions (steps, batch, features), or 2 (batch, features) "
                        "for one step, got ",
                        dims);
      T = dims == 3 ? data.size(0) : 1;
      B = data.size(-2);
      return;
    }
    TORCH_CHECK_VALUE(dims == 2, op, ": ", name,
                      " must have 2 dimensions (rows, features) with batch_sizes, got ", dims);
    TORCH_CHECK_TYPE(batch_sizes->scalar_type() == at::kLong && batch_sizes->device().is_cpu() &&
                         batch_sizes->dim() == 1,
                     op, ": batch_sizes must be a 1-D int64 tensor on the CPU, got ",
                     batch_sizes->dim(), "-D ", batch_sizes->scalar_type(), " on ",
                     batch_sizes->device());
    const Tensor contiguous = batch_sizes->contiguous();
    const int64_t* sizes = contiguous.const_data_ptr<int64_t>();
    T = batch_sizes->size(0);
    B = T > 0 ? sizes[0] : 0;
    offsets.assign(1, 0);
    for (int64_t t = 0; t < T; ++t) {
      TORCH_CHECK_VALUE(sizes[t] > 0 && (t == 0 || sizes[t] <= sizes[t - 1]), op,
                        ": batch_sizes must be positive and never increase, got ", sizes[t],
                        " at step ", t, t > 0 ? " after " : "",
                        t > 0 ? std::to_string(sizes[t - 1]) : "");
      int64_t sum = 0;
      TORCH_CHECK_VALUE(!__builtin_add_overflow(offsets.back(), sizes[t], &sum), op,
                        ": batch_sizes must add up to the rows of ", name, ", expected ",
                        data.size(0), ", got more than an int64 holds");
      offsets.push_back(sum);
    }
    TORCH_CHECK_VALUE(offsets.back() == data.size(0), op,
                      ": batch_sizes must add up to the rows of ", name, ", expected ",
                      data.size(0), ", got ", offsets.back());
    lengths.resize(B);
    for (int64_t t = 0; t < T; ++t)
      for (int64_t b = t + 1 < T ? sizes[t + 1] : 0; b < sizes[t]; ++b) lengths[b] = t + 1;
  }

  bool packed() const { return !offsets.empty(); }
  int64_t rows() const { return packed() ? offsets.back() : T * B; }
  // The shape of a tensor with one row of `features` for each row there is.
  c10::DimVector shape(int64_t features) const {
    if (dims == 2) return {rows(), features};
    return {T, B, features};
  }
  // The shape of a state (h0, h_n, ...): one step, with as many dimensions.
  c10::DimVector state_shape(int64_t features) const {
    if (dims == 2) return {B, features};
    return {1, B, features};
  }
};

// Parts of a batch, the rows of which alternate: row b belongs to part b % parts.
inline void check_parts(const char* op, int64_t parts, const Sizes& sizes) {
  TORCH_CHECK_VALUE(parts >= 0, op, ": parts must be a number of parts of the batch, expected 0 ",
                    "(one sum over all rows) or more, got ", parts);
  if (parts <= 1) return;
  const auto check = [&](int64_t rows) {
    TORCH_CHECK_VALUE(rows % parts == 0, op, ": parts must divide the rows of every step, got ",
                      parts, " parts of ", rows, " rows");
  };
  check(sizes.B);
  for (size_t t = 1; t < sizes.offsets.size(); ++t) check(sizes.offsets[t] - sizes.offsets[t - 1]);
}

// A tensor of every network, where there is one, with dtype and device of `like`.
inline void check_operand(const char* op, const char* name, const OptionalTensor& tensor,
                          const Networks& networks, at::IntArrayRef expected, const char* meaning,
                          const char* like_name, const Tensor& like) {
  if (!tensor) return;
  check_shape(op, name, networks.first(op, name, *tensor), expected, meaning);
  check_like(op, name, *tensor, like_name, like);
}
inline void check_state(const char* op, const char* name, const OptionalTensor& state,
                        const Networks& networks, const Sizes& sizes, int64_t hidden_size,
                        const char* like_name, const Tensor& like) {
  check_operand(op, name, state, networks, sizes.state_shape(hidden_size),
                "(batch, hidden_size), and as many dimensions as the sequence", like_name, like);
}

}  // namespace torch_bptt
