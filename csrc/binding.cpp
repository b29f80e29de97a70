// The operators' schemas, and the Python module torch_bptt._C with facts about the build. The only
// file with Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <map>
#include <string>
#include <vector>

#include "core/activations.h"
#include "cpu/kernels.h"
#include "cuda/plan.h"
#ifdef TORCH_BPTT_CUDA
#include "cuda_device.h"
#endif
#include "operators.h"

// Nothing is keyword-only, as each keyword of a call from Python costs 0.4 us.
TORCH_LIBRARY(torch_bptt, m) {
  m.set_python_module("torch_bptt.operators");
  m.def(
      "rnn(Tensor x, Tensor? h0, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, "
      "Tensor? bias_hh, str activation, Tensor? batch_sizes=None, Tensor? keep=None, "
      "Tensor? alpha=None, Tensor? restart=None, Tensor? mask=None, Tensor? noise=None, "
      "Tensor? probe=None, bool reverse=False, int truncate=0, float? clip=None) "
      "-> (Tensor h, Tensor h_n)");
  m.def(
      "rnn_with_f(Tensor x, Tensor? h0, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, "
      "Tensor? bias_hh, str activation, Tensor? batch_sizes=None, Tensor? keep=None, "
      "Tensor? alpha=None, Tensor? restart=None, Tensor? mask=None, Tensor? noise=None, "
      "Tensor? probe=None, bool reverse=False, int truncate=0, float? clip=None) "
      "-> (Tensor h, Tensor h_n, Tensor f)");
  m.def(
      "rnn_forward(Tensor x, Tensor? h0, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, "
      "Tensor? bias_hh, str activation, Tensor? batch_sizes=None, Tensor? keep=None, "
      "Tensor? alpha=None, Tensor? restart=None, Tensor? mask=None, Tensor? noise=None, "
      "bool reverse=False) -> (Tensor h, Tensor h_n, Tensor f)");
  m.def(
      "rnn_backward(Tensor? grad_h, Tensor? grad_h_n, Tensor x, Tensor? h0, Tensor h, Tensor? f, "
      "Tensor weight_ih, Tensor weight_hh, str activation, bool[8] wanted, "
      "Tensor? batch_sizes=None, Tensor? keep=None, Tensor? alpha=None, Tensor? restart=None, "
      "Tensor? mask=None, bool reverse=False, int truncate=0, float? clip=None, int parts=0) "
      "-> (Tensor grad_x, Tensor grad_h0, Tensor grad_weight_ih, Tensor grad_weight_hh, "
      "Tensor grad_bias, Tensor grad_alpha, Tensor grad_restart, Tensor norms)");
  m.def(
      "adjoint_scan(Tensor g, Tensor gate, Tensor weight_hh, Tensor? batch_sizes=None, "
      "Tensor? keep=None, Tensor? alpha=None, Tensor? mask=None, bool reverse=False, "
      "int truncate=0, float? clip=None, bool gate_stops=False) "
      "-> (Tensor d, Tensor d0, Tensor d_restart)");
  m.def(
      "tangent_scan(Tensor c, Tensor? q0, Tensor gate, Tensor weight_hh, Tensor? batch_sizes=None, "
      "Tensor? keep=None, Tensor? alpha=None, Tensor? restart=None, Tensor? mask=None, "
      "bool reverse=False, int truncate=0, bool gate_stops=False) -> Tensor q");
}

TORCH_LIBRARY_IMPL(torch_bptt, CompositeExplicitAutograd, m) {
  m.impl("rnn", torch_bptt::rnn);
  m.impl("rnn_with_f", torch_bptt::rnn_with_f);
}

TORCH_LIBRARY_IMPL(torch_bptt, Autograd, m) {
  m.impl("rnn", torch_bptt::rnn_with_gradient);
  m.impl("rnn_with_f", torch_bptt::rnn_with_f_with_gradient);
  m.impl("rnn_backward", torch_bptt::rnn_backward_with_gradient);
}

namespace {

// The same functions for every device; dispatch.h sends each problem to the backend of its tensors.
void implement_operators(torch::Library& m) {
  m.impl("rnn_forward", torch_bptt::rnn_forward);
  m.impl("rnn_backward", torch_bptt::rnn_backward);
  m.impl("adjoint_scan", torch_bptt::adjoint_scan);
  m.impl("tangent_scan", torch_bptt::tangent_scan);
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_bptt, CPU, m) { implement_operators(m); }
#ifdef TORCH_BPTT_CUDA
TORCH_LIBRARY_IMPL(torch_bptt, CUDA, m) { implement_operators(m); }
#endif

namespace torch_bptt {

namespace {

// torch_bptt.autograd.NAME(args...). An exception keeps its type: autograd's engine knows these.
template <class Result, class... Args>
Result call_python(const char* name, const Args&... args) {
  try {
    return pybind11::module_::import("torch_bptt.autograd")
        .attr(name)(args...)
        .template cast<Result>();
  } catch (pybind11::error_already_set& error) {
    error.restore();
    python_error persistent;
    persistent.persist();
    throw persistent;
  }
}

}  // namespace

std::array<Tensor, INPUTS> backward_with_graph(const SavedForBackward& saved,
                                               const LayerOptions& options,
                                               const std::array<bool, INPUTS>& wanted) {
  pybind11::gil_scoped_acquire gil;
  const auto grads = call_python<std::array<OptionalTensor, INPUTS>>(
      "backward_with_graph", saved.grad_h, saved.grad_h_n, saved.x, saved.h0, saved.weight_ih,
      saved.weight_hh, saved.batch_sizes, saved.keep, saved.alpha, saved.restart, saved.mask,
      saved.h, saved.f,
      pybind11::make_tuple(options.activation, options.reverse, options.truncate, options.clip),
      wanted);
  std::array<Tensor, INPUTS> result;
  for (size_t i = 0; i < grads.size(); ++i) result[i] = grads[i].value_or(Tensor());
  return result;
}

std::vector<Tensor> second_backward(const std::vector<Tensor>& tensors,
                                    const BackwardOptions& options, const std::vector<bool>& needed,
                                    const std::vector<Tensor>& grads) {
  pybind11::gil_scoped_acquire gil;
  const auto of = [](const std::vector<Tensor>& all) {
    std::vector<OptionalTensor> result;
    for (const Tensor& tensor : all) result.push_back(optional(tensor));
    return result;
  };
  const auto found = call_python<std::vector<OptionalTensor>>(
      "second_backward", of(tensors),
      pybind11::make_tuple(options.activation, options.reverse, options.truncate, options.clip),
      options.wanted, options.parts, needed, of(grads));
  std::vector<Tensor> result;
  for (const OptionalTensor& tensor : found) result.push_back(tensor.value_or(Tensor()));
  return result;
}

}  // namespace torch_bptt

namespace {

#ifdef TORCH_BPTT_CUDA
// What the plan knows of a device.
std::map<std::string, pybind11::object> cuda_facts(int index) {
  using namespace torch_bptt::cuda;
  const DeviceFacts& facts = facts_of(c10::Device(c10::kCUDA, c10::DeviceIndex(index)));
  return {
      {"capability", pybind11::int_(facts.capability)},
      {"multiprocessors", pybind11::int_(facts.multiprocessors)},
      {"shared_bytes", pybind11::int_(facts.shared_bytes)},
      {"largest_cluster", pybind11::int_(facts.largest_cluster)},
      {"whole_grid", pybind11::bool_(facts.whole_grid)},
      {"resident_clusters", pybind11::cast(std::vector<int>(std::begin(facts.resident_clusters),
                                                            std::end(facts.resident_clusters)))}};
}
#endif

// What would run where, for those who want to know or to test it: no device is asked.
std::map<std::string, pybind11::object> cuda_plan(const std::tuple<int, int, int64_t, int>& device,
                                                  const std::string& operation,
                                                  const std::string& dtype, int64_t T, int64_t B,
                                                  int64_t H, bool tf32,
                                                  const std::optional<std::string>& path,
                                                  bool library) {
  using namespace torch_bptt::cuda;
  const auto find = [](const char* what, const std::string& name, const auto& names) {
    int i = 0;
    for (const char* known : names) {
      if (name == known) return i;
      ++i;
    }
    throw pybind11::value_error(std::string("cuda_plan: ") + what + " is unknown, got " + name);
  };
  const auto [capability, multiprocessors, shared_bytes, largest_cluster] = device;
  const DeviceFacts facts{capability, multiprocessors, shared_bytes, largest_cluster};
  Task task;
  task.pass = Pass(find("operation", operation, kPassNames));
  task.dtype = Dtype(find("dtype", dtype, kDtypeNames));
  task.T = T;
  task.B = B;
  task.H = H;
  task.tf32 = tf32;
  task.library = library;
  std::optional<Path> wish;
  if (path) wish = Path(find("path", *path, kPathNames));
  Plan plan;
  if (!plan_loop(facts, task, &plan, wish ? &*wish : nullptr))
    throw pybind11::value_error("cuda_plan: no path can do this");
  return {{"path", pybind11::str(kPathNames[int(plan.path)])},
          {"tensor_cores", pybind11::bool_(plan.arithmetic == Arithmetic::tensor)},
          {"rows", pybind11::int_(plan.rows)},
          {"cluster", pybind11::int_(plan.cluster)},
          {"blocks", pybind11::int_(plan.blocks)},
          {"threads", pybind11::int_(plan.threads)},
          {"shared_bytes", pybind11::int_(plan.shared_bytes)},
          {"estimated_step_ns", pybind11::float_(plan.step_ns)}};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  namespace cpu = torch_bptt::cpu;
  m.doc() = "Operators torch.ops.torch_bptt.* and facts about their build.";
  m.def("activations", [] {
    return std::vector<std::string>(std::begin(torch_bptt::kActivationNames),
                                    std::end(torch_bptt::kActivationNames));
  });
  m.def("isas", [] {
    const cpu::IsaList list = cpu::available();
    std::vector<std::string> names;
    for (int i = 0; i < list.count; ++i) names.emplace_back(list.sets[i]->name);
    return names;
  });
  m.def("isa", [] { return std::string(cpu::kernels().name); });
  m.def("set_isa", [](const std::string& name) {
    if (!cpu::use(name.c_str()))
      throw pybind11::value_error(
          "set_isa: name must be an instruction set of this machine (isas()), got " + name);
  });
#ifdef TORCH_BPTT_CUDA
  m.def("cuda_facts", cuda_facts, pybind11::arg("index"));
#endif
  m.def("cuda_plan", cuda_plan, pybind11::arg("device"), pybind11::arg("operation"),
        pybind11::arg("dtype"), pybind11::arg("T"), pybind11::arg("B"), pybind11::arg("H"),
        pybind11::arg("tf32") = false, pybind11::arg("path") = std::nullopt,
        pybind11::arg("library") = true);
  m.def("build_info", [] {
    return std::map<std::string, std::string>{
        {"build", TORCH_BPTT_BUILD},
        {"compiler", __VERSION__},
        {"cuda", TORCH_BPTT_BUILT_WITH_CUDA},
        {"flags", TORCH_BPTT_CXX_FLAGS},
        {"torch", TORCH_BPTT_BUILT_WITH_TORCH},
    };
  });
  cpu::kernels();  // an unknown TORCH_BPTT_ISA is an error of the import, not of the first call
}
