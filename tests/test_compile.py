"""torch.compile: one graph for all T and B, and the numbers of a loop in plain PyTorch."""

import copy

import plain
import pytest
import torch
from cases import Case, one_step, problem
from pairs import assert_same, randn
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import torch_bptt

# PyTorch's own: the parts of it that it still compiles the old way when inductor starts.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
)
I, H = 3, 5  # noqa: E741
SHAPES = [(7, 6), (6, 2), (11, 4), (2, 7), (8, 9), (3, 4), (9, 2), (4, 8), (10, 4), (6, 12)]
OPERATORS = torch.ops.torch_bptt


@pytest.fixture(autouse=True)
def forget():
    """Every test starts as if nothing was compiled, and none compiles twice unless it says so."""
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def compiled(call, backend="aot_eager", dynamic=True, **options):
    return torch.compile(call, fullgraph=True, backend=backend, dynamic=dynamic, **options)


def network(cls=torch_bptt.RNN, **options):
    torch.manual_seed(0)
    net = cls(I, H, **options).double()
    for name, parameter in net.named_parameters():
        if name == "h0":
            nn.init.uniform_(parameter)
    return net


def gradients(parts, leaves):
    """Of a random weighted sum of parts; zeros where there is none."""
    loss = sum((part * randn(*part.shape, seed=9)).sum() for part in parts)
    return torch.autograd.grad(loss, leaves, materialize_grads=True)


def assert_same_call(call, expected, leaves):
    """Results and gradients of two calls without arguments, whose results are tuples of tensors."""
    got, expected = call(), expected()
    for index, (mine, other) in enumerate(zip(got, expected, strict=True)):
        assert_same(f"result {index}", mine, other)
    for index, (mine, other) in enumerate(
        zip(gradients(got, leaves), gradients(expected, leaves), strict=True)
    ):
        assert_same(f"gradient {index}", mine, other)


def arguments(names, states, steps, rows):
    """What forward takes beside its input."""
    pick = torch.Generator().manual_seed(steps * rows)
    made = {
        "hx": lambda: randn(states, rows, H, seed=2).requires_grad_(),
        "lengths": lambda: torch.randint(0, steps + 1, (rows,), generator=pick),
        "reset": lambda: torch.rand(steps, rows, generator=pick) < 0.3,
    }
    return {name: made[name]() for name in names}


CASES = [
    ({}, ()),
    ({"nonlinearity": "relu", "bias": False}, ("hx",)),
    ({"num_layers": 2, "bidirectional": True}, ("hx",)),
    ({"alpha": 0.3, "learn_h0": True, "bidirectional": True}, ("reset",)),
    ({"alpha": nn.Parameter(torch.tensor(0.4))}, ()),
    ({"truncate": 3, "nonlinearity": "sigmoid"}, ("hx", "reset")),
    ({}, ("lengths",)),
    ({"num_layers": 2, "bidirectional": True, "truncate": 2}, ("lengths", "hx")),
    ({"bidirectional": True, "alpha": 0.3, "learn_h0": True}, ("lengths", "reset")),
    ({"bidirectional": True, "learn_h0": True, "truncate": 3}, ("lengths", "reset", "hx")),
]


def check(net, call, given, shapes):
    """call, a compiled net, against the loop, on inputs of all these shapes."""
    states = len(net._all_weights)
    for steps, rows in shapes:
        x = randn(steps, rows, I).requires_grad_()
        others = arguments(given, states, steps, rows)
        leaves = [x, *net.parameters(), *([others["hx"]] if "hx" in others else [])]
        assert_same_call(
            lambda x=x, others=others: call(x, **others),
            lambda x=x, others=others: plain.run(net, x, **others),
            leaves,
        )
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(("options", "given"), CASES, ids=str)
def test_one_graph_for_all_shapes_and_the_numbers_of_a_loop(options, given):
    net = network(**copy.deepcopy(options))
    check(net, compiled(net), given, SHAPES if len(given) < 2 else SHAPES[:3])


@pytest.mark.parametrize("given", [("hx",), ("lengths", "reset")], ids=str)
def test_inductor(given):
    net = network(bidirectional=True, learn_h0=True)
    check(net, compiled(net, "inductor"), given, SHAPES)


def test_dimensions_may_be_marked_instead():
    net = network()
    call = compiled(net, dynamic=None)
    for steps, rows in SHAPES:
        x = randn(steps, rows, I)
        torch._dynamo.mark_dynamic(x, (0, 1))
        assert_same("output", call(x)[0], plain.run(net, x)[0])
    assert counters["stats"]["unique_graphs"] == 1


def test_the_graph_does_not_grow_with_time():
    sizes = []

    def count(graph, _):
        sizes.append(len(graph.graph.nodes))
        return graph

    for steps in (3, 1000):
        torch._dynamo.reset()
        compiled(network(bidirectional=True), count, dynamic=False)(randn(steps, 2, I))
    assert sizes[0] == sizes[1] < 40


def test_batch_first_one_sequence_and_no_output():
    net = network(batch_first=True, bidirectional=True)
    x, lengths = randn(4, 6, I), torch.tensor([6, 0, 2, 5])
    output, h_n = plain.run(net, x.transpose(0, 1), lengths=lengths)
    got = compiled(net)(x, lengths=lengths)
    assert_same("output", got[0], output.transpose(0, 1))
    assert_same("h_n", got[1], h_n)
    torch._dynamo.reset()
    nothing, h_n = compiled(net)(x, lengths=lengths, need_output=False)
    assert nothing is None
    assert_same("h_n", h_n, got[1])
    torch._dynamo.reset()
    output, h_n = plain.run(net, x[:1].transpose(0, 1))
    got = compiled(net)(x[0])
    assert_same("output", got[0], output[:, 0])
    assert_same("h_n", got[1], h_n[:, 0])


@pytest.mark.parametrize("given", [[5, 0, 2], 3, torch.tensor([1, 5, 5], dtype=torch.int32)])
def test_lengths_of_every_kind(given):
    net = network()
    lengths = torch.as_tensor(given).reshape(-1)
    x = randn(5, len(lengths), I)
    for got, expected in zip(
        compiled(net)(x, lengths=given), plain.run(net, x, lengths=lengths), strict=True
    ):
        assert_same("result", got, expected)


@pytest.mark.parametrize("direction", [0, 1])
def test_what_lies_past_the_end_of_a_row_does_no_harm(direction):
    """NaN in the padding, and a network whose states would grow without bounds there."""
    net = network(bidirectional=True, nonlinearity="identity", num_layers=2)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "weight_hh" in name and name.endswith("_reverse") == bool(direction):
                parameter.copy_(50 * torch.eye(H))
    x, lengths = randn(300, 2, I), torch.tensor([300, 2])
    x[2:, 1] = torch.nan
    x, lengths = x[:, 1:].clone().requires_grad_(), lengths[1:]
    assert_same_call(
        lambda: compiled(net)(x, lengths=lengths),
        lambda: plain.run(net, x, lengths=lengths),
        [x, *net.parameters()],
    )


@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_packed(enforce_sorted):
    """As an argument: torch.compile does not know pack_padded_sequence itself."""
    net = network(bidirectional=True, alpha=0.5, learn_h0=not enforce_sorted, truncate=3)
    call = compiled(net)
    for steps, rows in SHAPES:
        lengths = 1 + torch.arange(rows) * 5 % steps
        lengths[0] = steps
        if enforce_sorted:
            lengths = lengths.sort(descending=True)[0]
        reset = None if enforce_sorted else arguments(["reset"], 2, steps, rows)["reset"]
        packed = pack_padded_sequence(randn(steps, rows, I), lengths, enforce_sorted=enforce_sorted)
        data = packed.data.requires_grad_()
        got, h_n = call(packed, reset=reset)
        assert isinstance(got, PackedSequence)

        def expected(packed=packed, lengths=lengths, reset=reset):
            x, _ = nn.utils.rnn.pad_packed_sequence(packed)
            output, h_n = plain.run(net, x, lengths=lengths, reset=reset)
            output = pack_padded_sequence(output, lengths, enforce_sorted=enforce_sorted)
            return output.data, h_n

        assert_same_call(
            lambda got=got, h_n=h_n: (got.data, h_n), expected, [data, *net.parameters()]
        )
    assert counters["stats"]["unique_graphs"] == 1


def test_cell_in_a_loop():
    cell = network(torch_bptt.RNNCell)

    def loop(x, h):
        for step in x.unbind():
            h = cell(step, h)
        return (h,)

    x, h = randn(4, 3, I).requires_grad_(), randn(3, H, seed=1).requires_grad_()

    def expected():
        state = h
        for step in x:
            state = torch.tanh(
                step @ cell.weight_ih.T + cell.bias_ih + state @ cell.weight_hh.T + cell.bias_hh
            )
        return (state,)

    call = compiled(loop)
    assert_same_call(lambda: call(x, h), expected, [x, h, *cell.parameters()])


def test_functional():
    net = network(nonlinearity="sigmoid")
    net.alpha = 0.3
    names = net._all_weights[0]

    def call(x, hx, reset, *weights):
        output, h_n = torch_bptt.functional.rnn(
            x, hx, *weights, nonlinearity="sigmoid", alpha=0.3, reset=reset, reverse=True
        )
        return output.sin(), h_n

    call = compiled(call)
    for steps, rows in SHAPES:
        x, hx = randn(steps, rows, I).requires_grad_(), randn(rows, H, seed=1).requires_grad_()
        reset = arguments(["reset"], 1, steps, rows)["reset"]
        # In reverse: the steps turned round, and a restart between t and t - 1 with them.
        turned = torch.cat([torch.zeros_like(reset[:1]), reset[1:].flip(0)])

        def expected(x=x, hx=hx, turned=turned):
            output, h_n = plain.run(net, x.flip(0), hx[None], reset=turned)
            return output.flip(0).sin(), h_n[0]

        assert_same_call(
            lambda x=x, hx=hx, reset=reset: call(
                x, hx, reset, *(getattr(net, name) for name in names)
            ),
            expected,
            [x, hx, *net.parameters()],
        )
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("option", [{"recurrent_dropout": 0.4}, {"noise": 0.2}, {"dropout": 0.5}])
def test_random_numbers_are_those_of_eager(option):
    """With aot_eager, that is; inductor draws its own."""
    net = network(num_layers=2, **option)
    call = compiled(net)
    for steps, rows in SHAPES[:3]:
        x = randn(steps, rows, I).requires_grad_()

        def seeded(run, x=x):
            torch.manual_seed(3)
            return run(x)

        assert_same_call(lambda: seeded(call), lambda: seeded(net), [x, *net.parameters()])
        if "dropout" not in option:
            assert not torch.equal(seeded(net)[0], net.eval()(x)[0])
            net.train()
    assert counters["stats"]["unique_graphs"] == 1


# ---- the code around it --------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, I)
        self.rnn = network(num_layers=2)
        self.head = nn.Linear(H, 11).double()
        self.double()

    def forward(self, tokens, states=lambda rnn, x: rnn(x)[0]):
        logits = self.head(states(self.rnn, self.embedding(tokens)))
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def train(model, loss_of, shapes=SHAPES[:4]):
    """Losses of some steps of Adam, and the parameters after them."""
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    losses = []
    for steps, rows in shapes:
        tokens = torch.randint(11, (steps, rows), generator=torch.Generator().manual_seed(steps))
        optimizer.zero_grad()
        loss = loss_of(tokens)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), *model.parameters()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_training_with_all_around_it_compiled(backend):
    torch.manual_seed(0)
    model = Model()
    other = copy.deepcopy(model)
    expected = train(other, lambda tokens: other(tokens, lambda rnn, x: plain.run(rnn, x)[0]))
    for got, wanted in zip(train(model, compiled(model, backend)), expected, strict=True):
        # Adam divides by the root of the squared gradient: where that is small, roundings grow.
        assert_same("loss or parameter", got, wanted, 1e-8)
    assert counters["stats"]["unique_graphs"] == 1


def test_modes_of_gradients_and_autocast():
    """Each has a graph of its own."""
    net, x = network().float(), randn(6, 4, I).float()
    expected = net(x)
    with torch._dynamo.config.patch(error_on_recompile=False):
        call = compiled(net)
        for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
            with mode():
                got = call(x)
            assert got[0].requires_grad == (mode is torch.enable_grad)
            assert torch.equal(got[0], expected[0])
        with torch.autocast("cpu", torch.bfloat16):
            around, narrow = call(x), net(x)

        def inside(x):
            with torch.autocast("cpu", torch.bfloat16):
                return net(x)

        for got in (around, compiled(inside)(x)):
            assert got[0].dtype == torch.bfloat16
            assert all(map(torch.equal, got, narrow))
            of_net = [
                torch.autograd.grad(each[0].float().sum(), list(net.parameters()))
                for each in (got, inside(x))
            ]
            assert all(map(torch.equal, *of_net))
        assert call(x)[0].dtype == torch.float32


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_modes_of_inductor(mode):
    net, x = network(), randn(6, 4, I).requires_grad_()
    call = compiled(net, "inductor", mode=mode)
    assert_same_call(lambda: call(x), lambda: plain.run(net, x), [x, *net.parameters()])


def test_parametrized_weights():
    net, x = network(), randn(6, 4, I)
    nn.utils.parametrizations.orthogonal(net, "weight_hh_l0")
    assert_same("output", compiled(net)(x)[0], plain.run(net, x)[0])


# ---- what it refuses -----------------------------------------------------------------------------


def refuses(message, call, *args, **kwargs):
    with pytest.raises(Exception, match=message):
        call(*args, **kwargs)


def test_wrong_arguments_are_named():
    net, x = network(), randn(6, 4, I)
    refuses("Expected hidden size", compiled(net), x, randn(1, 3, H))
    refuses(r"lengths must be integers, one per row", compiled(net), x, lengths=torch.ones(3))


def test_lengths_beyond_the_input_are_seen_when_it_runs():
    net, x = network(), randn(6, 4, I)
    call = compiled(net)
    call(x, lengths=torch.tensor([6, 1, 0, 2]))
    for wrong in (7, -1):
        with pytest.raises(RuntimeError, match="lengths must lie within the steps of input"):
            call(x, lengths=torch.tensor([6, 1, wrong, 2]))


def test_options_without_a_trace():
    x = randn(6, 4, I)
    refuses("checkpoint must be None", compiled(network(checkpoint=2)), x)
    refuses(
        "input must be real", compiled(torch_bptt.RNN(I, H, dtype=torch.complex128)), x.cdouble()
    )
    net = network()
    with torch_bptt.diagnose.gradient_flow(net):
        refuses("the model must not be compiled", compiled(net), x)


# PyTorch's own, where a graph breaks at a call that returns a result with a gradient.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_transforms_stay_outside():
    net, x = network(), randn(6, 4, I)

    def sample(x):
        return net(x)[0].pow(2).sum()

    for transformed in (
        torch.func.vmap(torch.func.grad(sample), 1, 1),
        torch.func.vmap(sample, 1),
        lambda x: torch.func.jvp(sample, (x,), (x,)),
    ):
        refuses("torch.func transforms and forward mode are not", compiled(transformed), x)
    each = torch.compiler.disable(torch.func.vmap(torch.func.grad(sample), 1, 1))
    got = torch.compile(lambda x: 2 * each(x), backend="aot_eager")(x)
    x.requires_grad_()
    assert_same("gradient", got, torch.autograd.grad(2 * sample(x), x)[0])


def test_second_derivatives_stay_outside():
    """torch.compile's own limit, which it names itself."""
    net, x = network(), randn(6, 4, I).requires_grad_()
    output, _ = compiled(net)(x)
    (grad,) = torch.autograd.grad(output.pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        grad.sum().backward()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("options", [{}, {"alpha": 0.5, "num_layers": 2, "bidirectional": True}])
def test_compiled_autograd(options):
    """The backward pass of an eager forward, compiled."""
    net = network(**options)
    x = randn(7, 6, I).requires_grad_()
    output, h_n = net(x)
    loss = output.pow(2).sum() + h_n.sum()
    tensors = [x, *net.parameters()]
    eager = torch.autograd.grad(loss, tensors, retain_graph=True)
    backend = torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.compiled_autograd._enable(backend):
        loss.backward()
    for tensor, expected in zip(tensors, eager, strict=True):
        assert_same("gradient", tensor.grad, expected)


# ---- the operators -------------------------------------------------------------------------------

ALL = Case(packed=True, keep=True, alpha=0.3, reverse=True, truncate=2, clip=0.5, extra=True)


def layouts(p):
    """The tensors of a problem as they are, and in other layouts of the same values."""
    yield p
    if not p.case.packed:
        yield p.map(lambda t: t.transpose(0, 1).contiguous().transpose(0, 1) if t.dim() == 3 else t)
    yield p.map(lambda t: t.mT.contiguous().mT if t.dim() > 1 else t)


@pytest.mark.parametrize("case", [Case(), ALL, ALL.but(packed=False)], ids=str)
def test_opcheck(case):
    for p in layouts(problem(case)):
        opcheck(p)


def test_opcheck_of_one_step_and_of_a_narrow_dtype():
    opcheck(one_step(problem(Case(T=1))))
    opcheck(problem(ALL.but(packed=False), torch.bfloat16))


def opcheck(p):
    """All that PyTorch can check of an operator: schema, autograd, shapes and strides, tracing."""
    state = OPERATORS.rnn_forward(*p.operands, **p.forward_options)
    given = (p.grad_h, p.grad_h_n, p.x, p.h0, state[0], state[2], p.weight_ih, p.weight_hh)
    wanted = {"wanted": [True, True, True, True, True, p.alpha is not None, False, True]}
    leaves = p.map(lambda t: t.detach().requires_grad_())
    for operator, arguments, options in [
        (OPERATORS.rnn, p.operands, p.layer_options),
        (OPERATORS.rnn, leaves.operands, p.layer_options),
        (OPERATORS.rnn_with_f, leaves.operands, p.layer_options),
        (OPERATORS.rnn_forward, p.operands, p.forward_options),
        (OPERATORS.rnn_backward, given, p.backward_options | wanted),
        (OPERATORS.adjoint_scan, (p.grad_h, p.gate, p.weight_hh), p.adjoint_options),
        (OPERATORS.tangent_scan, (p.grad_h, p.grad_h_n, p.gate, p.weight_hh), p.tangent_options),
    ]:
        torch.library.opcheck(operator.default, arguments, options)


def test_every_operator_is_checked():
    names = {
        name.split("::")[1]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("torch_bptt::")
    }
    assert names == {
        "rnn",
        "rnn_with_f",
        "rnn_forward",
        "rnn_backward",
        "adjoint_scan",
        "tangent_scan",
    }
