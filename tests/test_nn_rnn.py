"""What the README's table says of torch.nn.RNN: that it works, or how it fails, on the CPU; and
what PyTorch's own tables say of cuDNN. A new version of PyTorch may make some of this untrue: then
the table is to be changed."""

import contextlib
import io
from pathlib import Path

import pytest
import torch
import torchgen
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, hessian, jvp, vmap
from torch.nn.utils.rnn import pack_padded_sequence

T, B, I, H = 5, 2, 3, 4  # noqa: E741


# What it warns of on the way to failing, or to working.
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning",
    "ignore::FutureWarning",
    "ignore::DeprecationWarning",
    "ignore::torch.jit.TracerWarning",
)


def net(**options):
    return nn.RNN(I, H, **options)


def x(*leading):
    return torch.randn(*leading, T, B, I)


def parameters(module):
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def squares(module, x, weights=None):
    output, _ = module(x) if weights is None else functional_call(module, weights, (x,))
    return output.square().sum()


def packed(x):
    return pack_padded_sequence(x, [5, 3])


# ---- what it refuses -----------------------------------------------------------------------------


def compile_fullgraph():
    torch.compile(net(), fullgraph=True, backend="eager")(x())


def export_with_dynamic_steps():
    shapes = {"input": {0: torch.export.Dim("steps", min=2)}}
    torch.export.export(net(), (x(),), dynamic_shapes=shapes)


def vmap_over_inputs():
    rnn = net()
    vmap(lambda x: rnn(x)[0])(x(6))


def vmap_over_weights():
    rnn, given = net(), x()
    stacked = {name: torch.stack([weight] * 3) for name, weight in parameters(rnn).items()}
    vmap(lambda weights: squares(rnn, given, weights))(stacked)


def gradients_of_each_sample():
    rnn = net()
    one = grad(lambda weights, x: squares(rnn, x[:, None], weights))
    vmap(one, (None, 1))(parameters(rnn), x())


def forward_mode_through_packing():
    rnn, given = net(), x()
    jvp(lambda x: rnn(packed(x))[0].data, (given,), (given,))


def a_row_without_steps():
    pack_padded_sequence(x(), [5, 0])


def load_by_swapping():
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        net().load_state_dict(net().state_dict())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def option(name, value):
    return lambda: net(**{name: value})


def argument(name, value):
    return lambda: net()(x(), **{name: value})


REFUSED = {
    compile_fullgraph: (RuntimeError, "Attempted to wrap RNN, GRU, or LSTM"),
    export_with_dynamic_steps: (Exception, "Constraints violated"),
    vmap_over_inputs: (RuntimeError, "Batching rule not implemented for aten::rnn_tanh.input"),
    vmap_over_weights: (RuntimeError, "Batching rule not implemented for aten::rnn_tanh.input"),
    gradients_of_each_sample: (RuntimeError, "doesn't match the broadcast shape"),
    forward_mode_through_packing: (NotImplementedError, "forward AD with _pack_padded_sequence"),
    a_row_without_steps: (RuntimeError, "Length of all samples has to be greater than 0"),
    load_by_swapping: (RuntimeError, "has weakref associated with it"),
    argument("lengths", torch.tensor([5, 2])): (TypeError, "unexpected keyword argument 'lengths'"),
    argument("reset", torch.zeros(T, B)): (TypeError, "unexpected keyword argument 'reset'"),
    argument("need_output", False): (TypeError, "unexpected keyword argument 'need_output'"),
    option("nonlinearity", "sigmoid"): (ValueError, "Unknown nonlinearity 'sigmoid'"),
    option("nonlinearity", "identity"): (ValueError, "Unknown nonlinearity 'identity'"),
    option("alpha", 0.2): (TypeError, "unexpected keyword argument 'alpha'"),
    option("learn_h0", True): (TypeError, "unexpected keyword argument 'learn_h0'"),
    option("truncate", 2): (TypeError, "unexpected keyword argument 'truncate'"),
    option("clip_grad_h", 1.0): (TypeError, "unexpected keyword argument 'clip_grad_h'"),
    option("checkpoint", 2): (TypeError, "unexpected keyword argument 'checkpoint'"),
    option("recurrent_dropout", 0.1): (
        TypeError,
        "unexpected keyword argument 'recurrent_dropout'",
    ),
    option("noise", 0.1): (TypeError, "unexpected keyword argument 'noise'"),
}


@pytest.mark.parametrize(("act", "error"), REFUSED.items(), ids=[e for _, e in REFUSED.values()])
def test_nn_rnn_refuses(act, error):
    kind, words = error
    with pytest.raises(kind) as raised:
        act()
    assert words in str(raised.value)


def test_nn_rnn_compiles_a_graph_for_each_length_where_the_setting_allows_it():
    from torch._dynamo.backends.common import aot_autograd

    nodes = []

    def count(graph, inputs):
        nodes.append(len(graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True), torch.no_grad():
        call = torch.compile(
            net(), fullgraph=True, backend=aot_autograd(fw_compiler=count), dynamic=True
        )
        for steps in (5, 10, 20):
            call(torch.randn(steps, B, I))
    assert len(nodes) == 3
    assert nodes[2] - nodes[1] > nodes[1] - nodes[0] > 0


# ---- what works ----------------------------------------------------------------------------------


def test_nn_rnn_has_second_and_forward_derivatives():
    rnn, given = net(), x().requires_grad_()
    (first,) = torch.autograd.grad(squares(rnn, given), given, create_graph=True)
    assert torch.autograd.grad(first.square().sum(), given)[0].abs().sum() > 0
    given = given.detach()
    assert jvp(lambda x: rnn(x)[0], (given,), (given,))[1].abs().sum() > 0
    assert hessian(lambda x: squares(rnn, x))(given).abs().sum() > 0
    rnn.eval()
    squares(rnn, given).backward()


def test_nn_rnn_takes_packed_sequences():
    output, h_n = net()(packed(x()))
    assert (output.data.shape, h_n.shape) == ((8, H), (1, B, H))


def test_nn_rnn_is_exported_with_dynamic_rows():
    shapes = {"input": {1: torch.export.Dim("rows", min=2)}}
    program = torch.export.export(net(), (x(),), dynamic_shapes=shapes)
    assert program.module()(torch.randn(T, 7, I))[0].shape == (T, 7, H)


def test_nn_rnn_trains_in_narrow_dtypes():
    for dtype in (torch.bfloat16, torch.float16):
        rnn = net(dtype=dtype)
        squares(rnn, x().to(dtype)).backward()
        assert rnn.weight_hh_l0.grad.dtype == dtype


def test_nn_rnn_takes_complex_numbers():
    assert net(dtype=torch.complex64)(x().cfloat())[0].is_complex()


def test_nn_rnn_has_an_output_that_may_change():
    rnn, given = net(), x().requires_grad_()
    rnn(given)[0].relu_().sum().backward()
    assert given.grad.abs().sum() > 0


def test_nn_rnn_goes_into_ddp_and_fsdp():
    """One is enough to see that the wrappers take it."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        for wrap in (
            nn.parallel.DistributedDataParallel,
            lambda rnn: fully_shard(rnn, mesh=init_device_mesh("cpu", (1,))),
        ):
            squares(wrap(net()), x()).backward()
    finally:
        distributed.destroy_process_group()


def test_nn_rnn_is_traced_and_scripted():
    file, rnn, given = io.BytesIO(), net(), x()
    torch.jit.save(torch.jit.trace(rnn, given), file)
    file.seek(0)
    longer = torch.cat([given, given])
    assert torch.equal(torch.jit.load(file)(longer)[0], rnn(longer)[0])
    model = nn.Sequential(net())
    assert torch.equal(torch.jit.script(model)(longer)[0], model(longer)[0])


def test_nn_rnn_is_a_leaf_of_fx():
    graph = torch.fx.symbolic_trace(nn.Sequential(net())).graph
    assert [node.op for node in graph.nodes] == ["placeholder", "call_module", "output"]


def test_nn_rnn_runs_without_values():
    for place in (torch.device("meta"), FakeTensorMode()):
        with place:
            output, _ = net()(torch.empty(T, B, I))
        assert output.shape == (T, B, H)


def test_nn_rnn_is_checkpointed():
    rnn, given = net(), x().requires_grad_()
    expected = torch.autograd.grad(squares(rnn, given), given)[0]
    for reentrant in (False, True):
        given.grad = None
        output, _ = torch.utils.checkpoint.checkpoint(rnn, given, use_reentrant=reentrant)
        output.square().sum().backward()
        assert torch.equal(given.grad, expected)
    with torch.autograd.graph.save_on_cpu():
        output, _ = rnn(given)
    assert torch.equal(torch.autograd.grad(output.square().sum(), given)[0], expected)


def test_nn_rnn_is_deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        squares(net(), x()).backward()
    finally:
        torch.use_deterministic_algorithms(False)


def test_nn_rnn_learns_with_a_scaler():
    rnn, given = net(), x()
    scaler = torch.amp.GradScaler("cpu")
    optimizer = torch.optim.SGD(rnn.parameters(), lr=0.1)
    before = rnn.weight_hh_l0.detach().clone()
    scaler.scale(squares(rnn, given)).backward()
    scaler.step(optimizer)
    assert not torch.equal(rnn.weight_hh_l0, before)


def test_nn_rnn_loads_with_weights_only():
    file, rnn, other, given = io.BytesIO(), net(), net(), x()
    torch.save(rnn.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(given)[0], rnn(given)[0])


def test_nn_rnn_names_an_operation_in_anomaly_mode():
    rnn = net(dtype=torch.float64)
    with torch.no_grad():
        rnn.weight_ih_l0.mul_(1e6)
    with torch.autograd.set_detect_anomaly(True):
        output, _ = rnn(x().double())
        infinite = torch.full_like(output, torch.inf)
        with (
            pytest.warns(UserWarning, match="Traceback of forward call"),
            pytest.raises(RuntimeError, match="'TanhBackward0' returned nan values"),
        ):
            output.backward(infinite)


@contextlib.contextmanager
def medium():
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


def test_nn_rnn_follows_the_precision_of_float32_products():
    """Where the processor has products of bfloat16 that are faster."""
    a = torch.randn(256, 256)
    exact = a @ a
    with medium():
        if torch.equal(a @ a, exact):
            pytest.skip("this processor computes float32 products in float32, whatever is set")
    rnn, given = nn.RNN(256, 256), torch.randn(20, 64, 256)
    gradients = []
    for setting in (contextlib.nullcontext, medium):
        with setting():
            gradients.append(torch.autograd.grad(squares(rnn, given), rnn.weight_hh_l0)[0])
    assert not torch.equal(*gradients)


# ---- cuDNN, without a GPU ------------------------------------------------------------------------


def formulas(operator):
    """What derivatives.yaml, which PyTorch's autograd is generated from, has on an operator."""
    file = Path(torchgen.__file__).parent / "packaged" / "autograd" / "derivatives.yaml"
    [entry] = [
        entry for entry in file.read_text().split("\n- name: ") if entry.startswith(f"{operator}(")
    ]
    return entry


def test_cudnn_has_no_second_derivative():
    of_backward = formulas("_cudnn_rnn_backward")
    for name in ("input", "weight", "hx", "grad_output", "grad_hy"):
        assert f"\n  {name}: not_implemented" in of_backward


def test_cudnn_has_no_forward_mode():
    """An operator with one has a formula for its result; tanh shows what that looks like."""
    assert "\n  result: " in formulas("tanh")
    assert "\n  result" not in formulas("_cudnn_rnn")
    assert "auto_linear" not in formulas("_cudnn_rnn")


def test_cudnn_has_no_count_of_flops():
    from torch.utils.flop_counter import flop_registry

    assert torch.ops.aten.mm in flop_registry
    assert torch.ops.aten._cudnn_rnn not in flop_registry


def test_vmap_refuses_before_a_device_is_chosen():
    """On a device that computes nothing the words are the same."""
    rnn = net(device="meta")
    with pytest.raises(RuntimeError, match="Batching rule not implemented for aten::rnn_tanh"):
        vmap(lambda x: rnn(x)[0])(torch.empty(6, T, B, I, device="meta"))
