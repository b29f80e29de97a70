// Problems -> loops: buffers, the matrix products over all rows, the choice of a path.
//
// What runs over time is in cuda/. Around it there are a few large products and sums, which are
// PyTorch's. Temporary memory beyond the results: in forward, for the narrow types, the drive of a
// stretch of steps in float32; in backward du, one row for each of h.
#include "cuda_backend.h"

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <cstdlib>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>

#include "core/activations.h"
#include "cuda/paths.h"
#include "cuda_device.h"
#include "cuda_products.h"

namespace torch_bptt::cuda {

namespace {

using at::Tensor;

// The largest drive of the narrow types that is kept at a time.
constexpr int64_t kDriveBytes = int64_t(64) << 20;

// TORCH_BPTT_CUDA_PATH=step (or another of kPathNames): the path to take wherever it can be taken.
const Path* wished_path() {
  static const std::optional<Path> wish = []() -> std::optional<Path> {
    const char* const name = std::getenv("TORCH_BPTT_CUDA_PATH");
    if (!name || !*name) return std::nullopt;
    int i = 0;
    std::string names;
    for (const char* known : kPathNames) {
      if (std::string_view(name) == known) return Path(i);
      names += std::string(i++ ? ", " : "") + known;
    }
    TORCH_CHECK_VALUE(false, "TORCH_BPTT_CUDA_PATH must be one of ", names, ", got ", name);
  }();
  return wish ? &*wish : nullptr;
}

// What the parts of one call share.
template <class S>
class Call {
 public:
  using C = Compute<S>;

  Call(const Tensor& like, const Schedule& schedule, int64_t H)
      : stored(like.options().dtype(type_of(kDtype<S>))),
        computed(like.options().dtype(type_of(kDtype<C>))),
        stream(stream_of(like.device())),
        host(schedule),
        on_device(schedule),
        H(H),
        tf32(std::is_same_v<S, float> && tf32_allowed()),
        device_guard(like.device()) {
    if (!host.offsets) return;
    numbers = at::empty({host.T + 1 + host.B}, like.options().dtype(at::kLong));
    int64_t* to = numbers.data_ptr<int64_t>();
    check(store_numbers(host.offsets, host.T + 1, to, stream));
    check(store_numbers(host.lengths, host.B, to + host.T + 1, stream));
    on_device.offsets = to;
    on_device.lengths = to + host.T + 1;
  }

  Tensor empty(at::IntArrayRef shape) const { return at::empty(shape, stored); }
  Tensor zeros_computed(at::IntArrayRef shape) const { return at::zeros(shape, computed); }
  Tensor empty_computed(at::IntArrayRef shape) const { return at::empty(shape, computed); }

  // Tensors over the memory of a problem.
  template <class T>
  Tensor over(T* data, at::IntArrayRef shape) const {
    return over(data, shape, c10::contiguous_strides(shape));
  }
  template <class T>
  Tensor over(T* data, at::IntArrayRef shape, at::IntArrayRef strides) const {
    using Element = std::remove_const_t<T>;
    return tensor_over(data, shape, strides, std::is_same_v<Element, S> ? stored : computed);
  }
  // (parts, rows, columns), or a plain matrix where parts is 1.
  template <class T>
  Tensor over_parts(T* data, int64_t parts, at::IntArrayRef shape) const {
    if (parts == 1) return over(data, shape);
    return over(data, {parts, shape[0], shape[1]});
  }
  // The rows of steps [begin, end) of a sequence.
  template <class T>
  Tensor rows_of(const Rows<T>& rows, int64_t features, int64_t begin, int64_t end) const {
    T* const data = host.row(rows, begin, 0);
    if (host.offsets)
      return over(data, {host.offset(end) - host.offset(begin), features}, {rows.row, 1});
    return over(data, {end - begin, host.B, features}, {rows.step, rows.row, 1});
  }
  // The same as a matrix; copied where its rows are not one distance apart.
  template <class T>
  Tensor matrix_of(const Rows<T>& rows, int64_t features, int64_t begin, int64_t end) const {
    return rows_of(rows, features, begin, end)
        .reshape({host.offset(end) - host.offset(begin), features});
  }
  template <class T>
  Tensor matrix_of(const Rows<T>& rows, int64_t features) const {
    return matrix_of(rows, features, 0, host.T);
  }

  Loop<S> loop(Pass pass) const {
    Loop<S> loop;
    loop.pass = pass;
    loop.schedule = on_device;
    loop.H = H;
    return loop;
  }

  void run(const Loop<S>& loop, Steps steps) const {
    Task task;
    task.pass = loop.pass;
    task.dtype = kDtype<S>;
    task.T = host.T;
    task.B = host.B;
    task.H = H;
    task.tf32 = tf32;
    task.library = library_rounds_alike(type_of(task.dtype), tf32);
    Plan plan;
    const DeviceFacts& facts = facts_of(stored.device());
    TORCH_CHECK(plan_loop(facts, task, &plan, wished_path()),
                "torch_bptt: no kernel for a device of capability ", facts.capability, " with ",
                facts.shared_bytes, " bytes of shared memory");
    switch (plan.path) {
      case Path::step:
        return check(run_step_path(loop, steps, plan, stream));
      case Path::block:
        return check(run_block_path(loop, steps, plan, stream));
      case Path::cluster:
        if constexpr (sizeof(S) < 8) return check(run_cluster_path(loop, steps, plan, stream));
        break;
      case Path::grid:
        if constexpr (sizeof(S) < 8) {
          const Tensor workspace = at::empty({plan.workspace_bytes}, stored.dtype(at::kByte));
          return check(run_grid_path(loop, steps, plan, workspace.data_ptr(), stream));
        }
        break;
      case Path::gemm:
        return run_gemm_path(loop, host, steps, stored, stream);
    }
    TORCH_CHECK(false, "torch_bptt: the plan chose a path that was not compiled");
  }
  void run(const Loop<S>& loop) const { run(loop, {0, loop.steps()}); }

  const at::TensorOptions stored, computed;
  void* const stream;
  const Schedule host;  // its offsets and lengths are the host's
  Schedule on_device;
  const int64_t H;

 private:
  const bool tf32;
  const c10::DeviceGuard device_guard;
  // The operators run below autograd and autocast; what they call must, too.
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const c10::impl::ExcludeDispatchKeyGuard below_autocast{c10::autocast_dispatch_keyset};
  Tensor numbers;
};

// ---- products over all rows ---------------------------------------------------------------------

bool is_narrow(const Tensor& tensor) { return tensor.element_size() == 2; }

// Rows of H as (rows, parts, H): row r belongs to part r % parts.
Tensor with_parts(const Tensor& rows, int64_t parts) { return rows.unflatten(0, {-1, parts}); }

// out = a^T b, the gradient of a weight, for each part of the rows (core/problem.h): rounded to
// storage once.
class WeightGradient {
 public:
  WeightGradient(Tensor out, int64_t parts)
      : out(std::move(out)),
        sum(is_narrow(this->out) ? at::empty_like(this->out, at::kFloat) : this->out),
        parts(parts) {}

  void add(const Tensor& a, const Tensor& b) {
    if (parts == 1)
      add_product(a.t(), b);
    else
      add_product(with_parts(a, parts).permute({1, 2, 0}), with_parts(b, parts).transpose(0, 1));
  }
  void finish() {
    if (first)
      out.zero_();
    else if (is_narrow(out))
      out.copy_(sum);
  }

 private:
  void add_product(const Tensor& a, const Tensor& b) {
    if (first) {
      multiply_wide(sum, a, b);
    } else if (is_narrow(a)) {
      Tensor product = at::empty_like(sum);
      multiply_wide(product, a, b);
      sum.add_(product);
    } else {
      a.dim() == 2 ? sum.addmm_(a, b) : sum.baddbmm_(a, b);
    }
    first = false;
  }

  Tensor out, sum;
  const int64_t parts;
  bool first = true;
};

template <class S>
bool is_one_matrix(const Rows<S>& rows, const Schedule& s) {
  return s.offsets || s.T == 1 || rows.step == s.B * rows.row;
}

}  // namespace

// ---- forward ------------------------------------------------------------------------------------

template <class S>
void rnn_forward(const ForwardProblem<S>& p, const Tensor& like) {
  using C = Compute<S>;
  const Call<S> call(like, p.schedule, p.H);
  const Schedule& s = call.host;
  Loop<S> loop = call.loop(Pass::forward);
  loop.activation = p.activation;
  loop.alpha = p.alpha;
  loop.weight = p.weight_hh;
  loop.mask = p.mask;
  loop.noise = p.noise;
  loop.bias[0] = p.bias[0];
  loop.bias[1] = p.bias[1];
  loop.first = p.h0;
  loop.restart = p.restart;
  loop.state = p.h;
  loop.f = p.f;
  loop.h_n = p.h_n;
  const Tensor weight_ih = call.over(p.weight_ih, {p.H, p.I}).t();
  if constexpr (std::is_same_v<S, C>) {
    Tensor drive = call.over(p.h.data, {s.rows(), p.H});  // h takes its place, element by element
    at::mm_out(drive, call.matrix_of(p.x, p.I), weight_ih);
    loop.c = p.h.data;
    call.run(loop);
  } else {
    const int64_t most_rows = std::max<int64_t>(1, kDriveBytes / (p.H * int64_t(sizeof(C))));
    Tensor drive;
    for (Steps steps{0, 0}; steps.begin < s.T; steps.begin = steps.end) {
      // Processing order begins at the end of a reversed sequence.
      const auto first = [&] { return s.reverse ? s.T - steps.end : steps.begin; };
      const auto last = [&] { return s.reverse ? s.T - steps.begin : steps.end; };
      const auto rows = [&] { return s.offset(last()) - s.offset(first()); };
      do ++steps.end;
      while (steps.end < s.T && rows() + s.rows_at(s.step(steps.end)) <= most_rows);
      if (!drive.defined() || drive.size(0) < rows()) drive = call.empty_computed({rows(), p.H});
      Tensor part = drive.narrow(0, 0, rows());
      multiply_wide(part, call.matrix_of(p.x, p.I, first(), last()), weight_ih);
      loop.c = part.data_ptr<C>();
      loop.c_first = s.offset(first());
      call.run(loop, steps);
    }
  }
}

// ---- backward -----------------------------------------------------------------------------------

namespace {

// Sums of gradients that leave at restarts: in the output itself where its type is computed in.
template <class S>
class RestartSum {
 public:
  RestartSum(const Call<S>& call, S* out) {
    if (!out) return;
    output = call.over(out, {call.host.B, call.H});
    sum =
        std::is_same_v<S, Compute<S>> ? output.zero_() : call.zeros_computed({call.host.B, call.H});
  }
  Compute<S>* data() const { return sum.defined() ? sum.template data_ptr<Compute<S>>() : nullptr; }
  void finish() {
    if (output.defined() && !output.is_same(sum)) output.copy_(sum);
  }

 private:
  Tensor output, sum;
};

// The part of a loop that every adjoint has, and its memory.
template <class S>
struct Adjoint {
  Loop<S> loop;
  Tensor weight, du, carried;
  RestartSum<S> restart;

  Adjoint(const Call<S>& call, const S* weight_hh, const Compute<S>* alpha, S* grad_restart)
      : loop(call.loop(Pass::adjoint)),
        weight(call.over(weight_hh, {call.H, call.H}).t().contiguous()),
        du(call.empty({call.host.rows(), call.H})),
        restart(call, grad_restart) {
    loop.weight = static_cast<const S*>(weight.const_data_ptr());
    loop.state = {static_cast<S*>(du.data_ptr()), call.host.B * call.H, call.H};
    loop.restart_sum = restart.data();
    loop.alpha = alpha;
    if (!alpha) return;
    carried = call.empty_computed({call.host.B, call.H});
    loop.carried = carried.template data_ptr<Compute<S>>();
  }
};

// The loop of forward that backward belongs to, to ask it for the states that arrived.
template <class S>
Loop<S> forward_of(const Call<S>& call, const BackwardProblem<S>& p) {
  Loop<S> loop = call.loop(Pass::forward);
  loop.mask = p.mask;
  loop.first = p.h0;
  loop.restart = p.restart;
  // Only read, as the kernels in rows.cu do.
  loop.state = {const_cast<S*>(p.h.data), p.h.step, p.h.row};
  loop.f = {const_cast<S*>(p.f.data), p.f.step, p.f.row};
  return loop;
}

// sum du_t^T (m p_t). Where every p_t is the h of the step before, h itself is the factor.
template <class S>
void gradient_of_weight_hh(const Call<S>& call, const BackwardProblem<S>& p, const Tensor& du) {
  const Schedule& s = call.host;
  WeightGradient gradient(call.over_parts(p.grad_weight_hh, p.parts, {p.H, p.H}), p.parts);
  if (s.offsets || s.keep || p.mask.data || !is_one_matrix(p.h, s)) {
    const Tensor entering = call.empty({s.rows(), p.H});
    check(entering_rows(forward_of(call, p), static_cast<S*>(entering.data_ptr()), call.stream));
    gradient.add(du, entering);
  } else {
    const int64_t links = (s.T - 1) * s.B, first = s.reverse ? links : 0;
    if (links > 0)
      gradient.add(
          du.narrow(0, s.reverse ? 0 : s.B, links),
          s.reverse ? call.matrix_of(p.h, p.H, 1, s.T) : call.matrix_of(p.h, p.H, 0, s.T - 1));
    if (p.h0.data)
      gradient.add(du.narrow(0, first, s.B), call.over(p.h0.data, {s.B, p.H}, {p.h0.row, 1}));
  }
  gradient.finish();
}

template <class S>
void gradient_of_x(const Call<S>& call, const BackwardProblem<S>& p, const Tensor& du) {
  const Tensor weight = call.over(p.weight_ih, {p.H, p.I});
  Tensor grad_x = call.rows_of(p.grad_x, p.I, 0, call.host.T);
  if (is_one_matrix(p.grad_x, call.host)) {
    grad_x = grad_x.view({call.host.rows(), p.I});
    at::mm_out(grad_x, du, weight);
  } else {
    grad_x.copy_(at::mm(du, weight).view(grad_x.sizes()));
  }
}

}  // namespace

template <class S>
void rnn_backward(const BackwardProblem<S>& p, const Tensor& like) {
  using C = Compute<S>;
  const Call<S> call(like, p.schedule, p.H);
  const Schedule& s = call.host;
  Adjoint<S> adjoint(call, p.weight_hh, p.alpha, p.grad_restart);
  Loop<S>& loop = adjoint.loop;
  loop.activation = p.activation;
  loop.gate_stops = stops(p.activation);
  loop.clip = p.clip;
  loop.mask = p.mask;
  loop.g = p.grad_h;
  loop.g_n = p.grad_h_n;
  loop.gate = p.f;
  loop.d0 = p.grad_h0;
  Tensor d;
  if (p.norms || p.grad_alpha) {
    d = call.empty_computed({s.rows(), p.H});
    loop.d_exact = {d.data_ptr<C>(), s.B * p.H, p.H};
  }
  call.run(loop);
  adjoint.restart.finish();

  const Tensor& du = adjoint.du;
  if (p.grad_x.data) gradient_of_x(call, p, du);
  if (p.grad_weight_hh) gradient_of_weight_hh(call, p, du);
  if (p.grad_weight_ih) {
    WeightGradient gradient(call.over_parts(p.grad_weight_ih, p.parts, {p.H, p.I}), p.parts);
    gradient.add(du, call.matrix_of(p.x, p.I));
    gradient.finish();
  }
  if (p.grad_bias)
    call.over(p.grad_bias, {p.parts, p.H})
        .copy_(at::sum(with_parts(du, p.parts), {0}, false, type_of(kDtype<C>)));
  if (p.grad_alpha) {
    const Tensor sums = call.empty_computed({alpha_sum_groups(s), p.parts, p.H});
    check(alpha_sums(forward_of(call, p), d.const_data_ptr<C>(), p.parts, sums.data_ptr<C>(),
                     call.stream));
    call.over(p.grad_alpha, {p.parts, p.H}).copy_(sums.sum(0));
  }
  if (p.norms) check(row_norms(d.const_data_ptr<C>(), s.rows(), p.H, p.norms, call.stream));
}

// ---- scans --------------------------------------------------------------------------------------

template <class S>
void adjoint_scan(const AdjointProblem<S>& p, const Tensor& like) {
  const Call<S> call(like, p.schedule, p.H);
  Adjoint<S> adjoint(call, p.weight_hh, p.alpha, p.restart);
  Loop<S>& loop = adjoint.loop;
  loop.gate_given = true;
  loop.gate_stops = p.gate_stops;
  loop.clip = p.clip;
  loop.mask = p.mask;
  loop.g = p.g;
  loop.gate = p.gate;
  loop.d = p.d;
  loop.d0 = p.d0;
  call.run(loop);
  adjoint.restart.finish();
}

template <class S>
void tangent_scan(const TangentProblem<S>& p, const Tensor& like) {
  const Call<S> call(like, p.schedule, p.H);
  Loop<S> loop = call.loop(Pass::tangent);
  loop.gate_given = true;
  loop.gate_stops = p.gate_stops;
  loop.alpha = p.alpha;
  loop.weight = p.weight_hh;
  loop.mask = p.mask;
  loop.g = p.c;
  loop.gate = p.gate;
  loop.first = p.q0;
  loop.restart = p.restart;
  loop.state = p.q;
  call.run(loop);
}

#define TORCH_BPTT_ENTRY(S)                                             \
  template void rnn_forward(const ForwardProblem<S>&, const Tensor&);   \
  template void rnn_backward(const BackwardProblem<S>&, const Tensor&); \
  template void adjoint_scan(const AdjointProblem<S>&, const Tensor&);  \
  template void tangent_scan(const TangentProblem<S>&, const Tensor&);
TORCH_BPTT_STORAGE_TYPES(TORCH_BPTT_ENTRY)
#undef TORCH_BPTT_ENTRY

}  // namespace torch_bptt::cuda
