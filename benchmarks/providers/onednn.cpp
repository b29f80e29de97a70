// One layer of oneDNN's vanilla RNN in one or both directions, behind a plain C interface that
// onednn.py calls. Weights come and gradients go in the layout of torch.nn.RNN, so that every call
// reorders them, as a training step must; all else is made once.

#include <omp.h>

#include <cstring>
#include <exception>
#include <oneapi/dnnl/dnnl.hpp>
#include <optional>
#include <string>
#include <unordered_map>

namespace {

using dnnl::memory;
using Forward = dnnl::vanilla_rnn_forward;
using Backward = dnnl::vanilla_rnn_backward;
using Arguments = std::unordered_map<int, memory>;
using Tag = memory::format_tag;

struct Sizes {
  memory::dim T, B, I, H, D;
};

const dnnl::engine& cpu() {
  static const dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  return engine;
}

// A tensor of the caller, whose address is told before each call.
memory elsewhere(const memory::desc& desc) { return {desc, cpu(), nullptr}; }

void point(const memory& at, const void* data) { at.set_data_handle(const_cast<void*>(data)); }

// A weight in the layout of torch and in the one that a primitive asked for. Where the two are the
// same there is one memory and nothing to do.
struct Weight {
  memory torch, own;
  dnnl::reorder to_own, to_torch;

  Weight(const memory::desc& theirs, const memory::desc& wanted)
      : torch(elsewhere(theirs)), own(theirs == wanted ? torch : memory(wanted, cpu())) {
    if (theirs != wanted) {
      to_own = dnnl::reorder(torch, own);
      to_torch = dnnl::reorder(own, torch);
    }
  }
  void load(dnnl::stream& stream, const void* data) {
    point(torch, data);
    if (to_own) to_own.execute(stream, torch, own);
  }
  // Where a gradient is to be added up, from zero on.
  void clear(void* data) {
    point(torch, data);
    std::memset(own.get_data_handle(), 0, own.get_desc().get_size());
  }
  void store(dnnl::stream& stream) {
    if (to_torch) to_torch.execute(stream, own, torch);
  }
};

struct Layer {
  Sizes sizes;
  memory::data_type type;
  dnnl::algorithm activation;

  // Of tensors as torch has them: weights of both directions lie one after the other.
  memory::desc sequence(memory::dim features, memory::data_type type) const {
    return {{sizes.T, sizes.B, features}, type, Tag::tnc};
  }
  memory::desc state(memory::data_type type) const {
    return {{1, sizes.D, sizes.B, sizes.H}, type, Tag::ldnc};
  }
  memory::desc weight(memory::dim inputs, memory::data_type type, Tag tag) const {
    return {{1, sizes.D, inputs, 1, sizes.H}, type, tag};
  }
  memory::desc bias() const {
    return {{1, sizes.D, 1, sizes.H}, memory::data_type::f32, Tag::ldgo};
  }
  dnnl::rnn_direction direction() const {
    return sizes.D == 2 ? dnnl::rnn_direction::bidirectional_concat
                        : dnnl::rnn_direction::unidirectional_left2right;
  }
  Forward::primitive_desc describe_forward() const {
    return {cpu(),
            dnnl::prop_kind::forward_training,  // without a backward pass, too: inference is slower
            activation,
            direction(),
            sequence(sizes.I, type),
            state(type),
            weight(sizes.I, type, Tag::any),
            weight(sizes.H, type, Tag::any),
            bias(),
            sequence(sizes.D * sizes.H, type),
            state(type)};
  }
};

// What of a step is the same in both passes.
struct Pass {
  dnnl::stream stream{cpu()};
  memory x, h0, b, output, h_n;
  Weight w_ih, w_hh;

  template <class Description>
  Pass(const Layer& layer, const Description& description)
      : x(elsewhere(description.src_layer_desc())),
        h0(elsewhere(description.src_iter_desc())),
        b(elsewhere(description.bias_desc())),
        output(elsewhere(description.dst_layer_desc())),
        h_n(elsewhere(description.dst_iter_desc())),
        w_ih(layer.weight(layer.sizes.I, layer.type, Tag::ldgoi), description.weights_layer_desc()),
        w_hh(layer.weight(layer.sizes.H, layer.type, Tag::ldgoi), description.weights_iter_desc()) {
  }

  Arguments arguments() const {
    return {{DNNL_ARG_SRC_LAYER, x},
            {DNNL_ARG_SRC_ITER, h0},
            {DNNL_ARG_WEIGHTS_LAYER, w_ih.own},
            {DNNL_ARG_WEIGHTS_ITER, w_hh.own},
            {DNNL_ARG_BIAS, b},
            {DNNL_ARG_DST_LAYER, output},
            {DNNL_ARG_DST_ITER, h_n}};
  }
  // Addresses in the order x, h0, w_ih, w_hh, b, output, h_n.
  void load(void* const* tensors) {
    point(x, tensors[0]);
    point(h0, tensors[1]);
    w_ih.load(stream, tensors[2]);
    w_hh.load(stream, tensors[3]);
    point(b, tensors[4]);
    point(output, tensors[5]);
    point(h_n, tensors[6]);
  }
};

struct ForwardPass : Pass {
  Forward primitive;
  memory workspace;
  Arguments all;

  ForwardPass(const Layer& layer, const Forward::primitive_desc& description)
      : Pass(layer, description),
        primitive(description),
        workspace(description.workspace_desc(), cpu()),
        all(arguments()) {
    all[DNNL_ARG_WORKSPACE] = workspace;
  }
  void operator()(void* const* tensors) {
    load(tensors);
    primitive.execute(stream, all);
    stream.wait();
  }
};

// All gradients are float32, whatever the type of the layer is.
struct BackwardPass : Pass {
  static constexpr auto f32 = memory::data_type::f32;
  Backward primitive;
  memory grad_output, grad_h_n, grad_x, grad_h0, grad_b;
  Weight grad_w_ih, grad_w_hh;
  Arguments all;

  static Backward::primitive_desc describe(const Layer& layer,
                                           const Forward::primitive_desc& forward) {
    const auto& [T, B, I, H, D] = layer.sizes;
    return {cpu(),
            dnnl::prop_kind::backward,
            layer.activation,
            layer.direction(),
            layer.sequence(I, layer.type),
            layer.state(layer.type),
            layer.weight(I, layer.type, Tag::any),
            layer.weight(H, layer.type, Tag::any),
            layer.bias(),
            layer.sequence(D * H, layer.type),
            layer.state(layer.type),
            layer.sequence(I, f32),
            layer.state(f32),
            layer.weight(I, f32, Tag::any),
            layer.weight(H, f32, Tag::any),
            layer.bias(),
            layer.sequence(D * H, f32),
            layer.state(f32),
            forward};
  }
  BackwardPass(const Layer& layer, const Backward::primitive_desc& description,
               const memory& workspace)
      : Pass(layer, description),
        primitive(description),
        grad_output(elsewhere(description.diff_dst_layer_desc())),
        grad_h_n(description.diff_dst_iter_desc(), cpu()),
        grad_x(elsewhere(description.diff_src_layer_desc())),
        grad_h0(elsewhere(description.diff_src_iter_desc())),
        grad_b(elsewhere(description.diff_bias_desc())),
        grad_w_ih(layer.weight(layer.sizes.I, f32, Tag::ldgoi),
                  description.diff_weights_layer_desc()),
        grad_w_hh(layer.weight(layer.sizes.H, f32, Tag::ldgoi),
                  description.diff_weights_iter_desc()),
        all(arguments()) {
    std::memset(grad_h_n.get_data_handle(), 0, grad_h_n.get_desc().get_size());
    const Arguments more = {
        {DNNL_ARG_WORKSPACE, workspace},
        {DNNL_ARG_DIFF_DST_LAYER, grad_output},
        {DNNL_ARG_DIFF_DST_ITER, grad_h_n},
        {DNNL_ARG_DIFF_SRC_LAYER, grad_x},
        {DNNL_ARG_DIFF_SRC_ITER, grad_h0},
        {DNNL_ARG_DIFF_WEIGHTS_LAYER, grad_w_ih.own},
        {DNNL_ARG_DIFF_WEIGHTS_ITER, grad_w_hh.own},
        {DNNL_ARG_DIFF_BIAS, grad_b},
    };
    all.insert(more.begin(), more.end());
  }
  // Then grad_output, grad_x, grad_h0, grad_w_ih, grad_w_hh, grad_b.
  void operator()(void* const* tensors) {
    load(tensors);
    point(grad_output, tensors[7]);
    point(grad_x, tensors[8]);
    point(grad_h0, tensors[9]);
    grad_w_ih.clear(tensors[10]);
    grad_w_hh.clear(tensors[11]);
    point(grad_b, tensors[12]);
    std::memset(tensors[12], 0, grad_b.get_desc().get_size());
    primitive.execute(stream, all);
    grad_w_ih.store(stream);
    grad_w_hh.store(stream);
    stream.wait();
  }
};

struct Rnn {
  ForwardPass forward;
  std::optional<BackwardPass> backward;

  Rnn(const Layer& layer, const Forward::primitive_desc& description, bool training)
      : forward(layer, description) {
    if (training)
      backward.emplace(layer, BackwardPass::describe(layer, description), forward.workspace);
  }
};

std::string message;

// A call that came back with false left the reason in `message`.
template <class Call>
bool caught(Call&& call) {
  try {
    call();
    return true;
  } catch (const std::exception& error) {
    message = error.what();
    return false;
  }
}

}  // namespace

extern "C" {

const char* rnn_error() { return message.c_str(); }

int rnn_threads() { return omp_get_max_threads(); }

Rnn* rnn_create(int T, int B, int I, int H, int directions, const char* nonlinearity, bool bfloat16,
                bool training) {
  const std::unordered_map<std::string, dnnl::algorithm> activations = {
      {"tanh", dnnl::algorithm::eltwise_tanh}, {"relu", dnnl::algorithm::eltwise_relu}};
  Rnn* rnn = nullptr;
  caught([&] {
    const Layer layer{{T, B, I, H, directions},
                      bfloat16 ? memory::data_type::bf16 : memory::data_type::f32,
                      activations.at(nonlinearity)};
    rnn = new Rnn(layer, layer.describe_forward(), training);
  });
  return rnn;
}

void rnn_destroy(Rnn* rnn) { delete rnn; }

bool rnn_forward(Rnn* rnn, void* const* tensors) {
  return caught([&] { rnn->forward(tensors); });
}

bool rnn_backward(Rnn* rnn, void* const* tensors) {
  return caught([&] { (*rnn->backward)(tensors); });
}
}
