"""checkpoint= and need_output=: the numbers of the plain run, from less memory.

The plain run is held against torch.nn.RNN and against loops elsewhere; here it is the yardstick.
"""

import math
import re
import threading
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given
from pairs import assert_same, assert_same_run, examples, networks_with_input, pair, randn, run
from tolerances import close_to_truth, largest_error
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import torch_bptt
from torch_bptt import checkpoint as implementation
from torch_bptt import functional

# Within what the tolerance of pairs is derived for.
T, B, I, H = 6, 4, 3, 5  # noqa: E741
LENGTHS = [3, 6, 0, 5]
STRETCHES = (1, 2, 4, True, 9)  # True is 3


def networks(*, checkpoint=True, **options):
    """A plain network and one with checkpoint= and the same parameters, in float64."""
    torch.manual_seed(0)
    options = {"dtype": torch.float64, **options}
    plain = torch_bptt.RNN(I, H, **options)
    checkpointed = torch_bptt.RNN(I, H, **options, checkpoint=checkpoint)
    checkpointed.load_state_dict(plain.state_dict())
    return plain, checkpointed


class ManyToOne:
    """A network whose loss is of h_n alone, with or without being told so."""

    def __init__(self, module, need_output):
        self.module, self.need_output = module, need_output
        self.named_parameters = module.named_parameters

    def __call__(self, input, hx, **keywords):
        output, h_n = self.module(input, hx, **keywords, need_output=self.need_output)
        assert (output is None) == (not self.need_output)
        return h_n, h_n.clone()


def arguments(layout, states, reset=False):
    """input, hx and keywords of a call."""
    input, hx, keywords = randn(T, B, I), randn(states, B, H, seed=1), {}
    if layout == "packed":
        input = pack_padded_sequence(input, [4, 6, 1, 3], enforce_sorted=False)
    if layout == "lengths":
        keywords["lengths"] = LENGTHS
    if reset:
        keywords["reset"] = torch.rand(T, B, generator=torch.Generator().manual_seed(2)) < 0.3
    return input, hx, keywords


# ---- the same numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize("reset", [False, True], ids=["", "reset"])
@pytest.mark.parametrize("clip", [None, 0.3], ids=["", "clip"])
@pytest.mark.parametrize("truncate", [None, 2, 3, 8], ids=lambda k: f"truncate {k}")
@pytest.mark.parametrize("alpha", [1.0, 0.3], ids=lambda a: f"alpha {a}")
@pytest.mark.parametrize("layout", ["batch", "packed", "lengths"])
def test_outputs_and_gradients(layout, alpha, truncate, clip, reset):
    for layers, bidirectional in ((1, False), (2, False), (1, True)):
        if bidirectional and layout != "batch" and truncate in (2, 3):
            continue  # refused: see below
        plain, checkpointed = networks(
            num_layers=layers,
            bidirectional=bidirectional,
            alpha=alpha,
            truncate=truncate,
            clip_grad_h=clip,
        )
        input, hx, keywords = arguments(layout, 2 if bidirectional else layers, reset)
        expected = run(plain, input, hx, **keywords)
        expected_last = run(ManyToOne(plain, True), input, hx, **keywords)
        for checkpointed.checkpoint in (2, 4):  # shorter and longer than truncate
            assert_same_run(run(checkpointed, input, hx, **keywords), expected)
            last = run(ManyToOne(checkpointed, False), input, hx, **keywords)
            assert_same_run(last, expected_last)


@examples
@given(networks_with_input())
def test_as_torch_nn_rnn(drawn):
    options, input, hx = drawn
    if options["num_layers"] > 1:
        options["bidirectional"] = False
        if hx is not None:
            hx = hx[: options["num_layers"]]
    ours, theirs = pair(**options)
    expected = run(theirs, input, hx)
    for ours.checkpoint in STRETCHES:
        assert_same_run(run(ours, input, hx), expected)


@pytest.mark.parametrize("shape", [(1, 2, I), (7, 0, I), (7, I)], ids=str)
def test_odd_sizes(shape):
    plain, checkpointed = networks()
    for checkpointed.checkpoint in STRETCHES:
        assert_same_run(run(checkpointed, randn(*shape)), run(plain, randn(*shape)))


def test_all_rows_empty():
    plain, checkpointed = networks()
    got, expected = (run(net, randn(T, 2, I), lengths=[0, 0]) for net in (checkpointed, plain))
    assert_same_run(got, expected)


@pytest.mark.parametrize("reverse", [False, True])
def test_functional(reverse):
    weights = [randn(H, I), randn(H, H, seed=1) / H, randn(H)]
    results = []
    for options in ({}, {"checkpoint": 2}, {"checkpoint": 2, "need_output": False}):
        x = randn(T, I).requires_grad_()
        output, h_n = functional.rnn(x, randn(H), *weights, reverse=reverse, **options)
        assert (output is None) == ("need_output" in options)
        results.append((h_n, *torch.autograd.grad(h_n.sum(), x)))
    for result in results[1:]:
        for got, expected in zip(result, results[0], strict=True):
            assert_same("h_n and gradient", got, expected)


@pytest.mark.parametrize(
    "wanted", [["hx"], ["input"], ["weight_hh_l0"], ["bias_ih_l0", "hx"]], ids=str
)
@pytest.mark.parametrize("truncate", [None, 2], ids=lambda k: f"truncate {k}")
@pytest.mark.parametrize("create_graph", [False, True])
def test_only_some_gradients(wanted, truncate, create_graph):
    """Behind the first cut nothing of hx is left, which must be zero and not an error."""
    results = []
    for net in networks(truncate=truncate, checkpoint=2):
        leaves = {"input": randn(T, B, I), "hx": randn(1, B, H), **dict(net.named_parameters())}
        for name, leaf in leaves.items():
            leaf.requires_grad_(name in wanted)
        output, h_n = net(leaves["input"], leaves["hx"])
        for part in (output, h_n):
            results.append(
                torch.autograd.grad(
                    (part * randn(*part.shape)).sum(),
                    [leaves[name] for name in wanted],
                    create_graph=create_graph,
                    retain_graph=True,
                )
                if part.requires_grad
                else [torch.zeros_like(leaves[name]) for name in wanted]
            )
    half = len(results) // 2
    for got, expected in zip(results[half:], results[:half], strict=True):
        for name, mine, other in zip(wanted, got, expected, strict=True):
            assert_same(name, mine, other)


@pytest.mark.filterwarnings("ignore:torch_bptt has no kernels for complex numbers")
def test_complex_numbers():
    plain, checkpointed = networks(dtype=torch.complex128)
    results = []
    for net in (plain, checkpointed):
        output, h_n = net(randn(T, B, I).to(torch.complex128) * (1 + 0.5j))
        loss = output.abs().sum() + h_n.imag.sum()
        results.append(torch.autograd.grad(loss, list(net.parameters())))
    for got, expected in zip(*reversed(results), strict=True):
        assert_same("gradient", torch.view_as_real(got), torch.view_as_real(expected))


def test_the_output_is_bit_for_bit_that_of_the_plain_run():
    """More than two rows: see docs/options.md."""
    plain, checkpointed = networks(dtype=torch.float32, num_layers=2)
    x = torch.randn(50, 3, I)
    for got, expected in zip(checkpointed(x), plain(x), strict=True):
        assert torch.equal(got, expected)


def test_without_need_output_and_gradient(monkeypatch):
    monkeypatch.setattr(implementation, "AT_ONCE", 2 * B * H)  # two steps at a time
    for layers, bidirectional in ((1, False), (2, False), (1, True), (2, True)):
        states = layers * (2 if bidirectional else 1)
        net, _ = networks(
            num_layers=layers, bidirectional=bidirectional, truncate=3, checkpoint=None
        )
        for layout in ("batch", "packed", "lengths"):
            input, hx, keywords = arguments(layout, states, reset=True)
            with torch.no_grad():
                _, expected = net(input, hx, **keywords)
                output, h_n = net(input, hx, **keywords, need_output=False)
            assert output is None
            assert_same("h_n", h_n, expected)


# ---- in narrow dtypes ----------------------------------------------------------------------------


def gradients(net, x, lengths, autocast=False):
    """output, h_n and the gradients of the parameters."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output, h_n = net(x, lengths=lengths)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad((output * weights).sum(), list(net.parameters()))
    return output, h_n, grads


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["batch", "lengths"])
def test_autocast(lengths):
    """bfloat16, in the second run too, which backward starts from outside."""
    plain, checkpointed = networks(dtype=torch.float32, checkpoint=2)
    x = randn(T, B, I).float()
    *results, grads = gradients(checkpointed, x, lengths, autocast=True)
    *expected, plain_grads = gradients(plain, x, lengths, autocast=True)
    for got, other in zip(results, expected, strict=True):
        assert got.dtype == torch.bfloat16
        assert torch.equal(got, other)
    *_, truths = gradients(plain.double(), x.double(), lengths)
    for got, other, truth in zip(grads, plain_grads, truths, strict=True):
        assert got.dtype == torch.float32
        plain_error = largest_error(other, truth)
        close_to_truth("gradient", got.bfloat16(), truth, plain_error, K=T * B)


def test_gradients_in_bfloat16_are_added_up_in_float32():
    """1600 ones, of 400 stretches. bfloat16 has no number between 1024 and 1032: a sum of its own
    would stay at 1024 for ever. 1600 it has."""
    _, net = networks(dtype=torch.bfloat16, checkpoint=1, nonlinearity="identity")
    with torch.no_grad():
        net.weight_hh_l0.zero_()
    output, _ = net(torch.zeros(400, B, I, dtype=torch.bfloat16))
    output.sum().backward()
    for bias in (net.bias_ih_l0, net.bias_hh_l0):
        assert bias.grad.dtype == torch.bfloat16
        assert (bias.grad == 400 * B).all()


# ---- random numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoint", [1, 4])
def test_dropout_is_the_same_in_the_second_run(checkpoint):
    _, net = networks(num_layers=2, dropout=0.5, checkpoint=checkpoint)

    def outputs(*inputs):
        torch.manual_seed(3)
        return net(*inputs)

    inputs = [randn(T, 1, I).requires_grad_(), randn(2, 1, H).requires_grad_()]
    assert torch.autograd.gradcheck(outputs, inputs)
    assert torch.autograd.gradgradcheck(outputs, inputs)


RANDOM = [{"num_layers": 2, "dropout": 0.5}, {"noise": 0.3}]


def of_seed(net, seed, x):
    torch.manual_seed(seed)
    return net(x)


@pytest.mark.parametrize("options", RANDOM, ids=str)
def test_the_seed_decides(options):
    _, net = networks(**options)
    results = [of_seed(net, seed, randn(T, B, I))[0] for seed in (0, 0, 1)]
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    before = torch.get_rng_state()
    assert not torch.equal(net(randn(T, B, I))[0], results[2])  # later calls draw other numbers
    assert not torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("options", RANDOM, ids=str)
def test_backward_leaves_the_generator_alone(options):
    """Also while it runs: whoever draws from it meanwhile neither disturbs nor is disturbed."""
    _, net = networks(**options)
    x, found = randn(T, B, I).requires_grad_(), []
    for disturb in (False, True):
        output, _ = of_seed(net, 3, x)
        before = torch.get_rng_state()
        with Disturbing() if disturb else torch.enable_grad():
            found.append(torch.autograd.grad(output.square().sum(), [x, *net.parameters()]))
        assert torch.equal(torch.get_rng_state(), before) != disturb
    for mine, other in zip(*found, strict=True):
        assert torch.equal(mine, other)


class Disturbing(TorchDispatchMode):
    """Draws a number before every operator, as another thread might, and never finds torch's own
    generator at a number that it has drawn before."""

    def __init__(self):
        super().__init__()
        self.drawn = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        number = torch.default_generator.get_state().numpy().tobytes()
        assert number not in self.drawn
        self.drawn.add(number)
        torch.rand(())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", RANDOM, ids=str)
def test_threads(options):
    """Each goes back through the same graph, while others do, and all draw numbers of their own."""
    _, net = networks(**options, checkpoint=2)
    x = randn(40, B, I).requires_grad_()
    output, _ = net(x)
    (expected,) = torch.autograd.grad(output.sum(), x, retain_graph=True)
    found = []

    def go_back():
        for _ in range(10):
            torch.rand(3)
            found.append(torch.autograd.grad(output.sum(), x, retain_graph=True)[0])

    threads = [threading.Thread(target=go_back) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 40
    assert all(torch.equal(grad, expected) for grad in found)


@pytest.mark.parametrize("options", RANDOM, ids=str)
def test_one_stretch_draws_what_the_plain_run_draws(options, monkeypatch):
    """From a generator that is where torch's own is."""

    def copied(draws, device):
        return draws._replace(generator=torch.default_generator.clone_state())

    monkeypatch.setattr(implementation, "_seeded", copied)
    plain, checkpointed = networks(**options, checkpoint=T)
    assert_same_run(run(checkpointed, randn(T, B, I)), run(plain, randn(T, B, I)))


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_dropout_from_a_generator_is_torch_s(p, dtype):
    x = torch.randn(50, 7, dtype=dtype)
    own = torch.Generator().manual_seed(3)
    torch.manual_seed(3)
    draws = functional.Draws(dropout=p, generator=own)
    assert torch.equal(functional._dropout(x, draws), torch.nn.functional.dropout(x, p))


def test_dropout_drops_its_share():
    """2 sqrt(p (1-p) / n) is two standard deviations; one draw, the same in every run."""
    net = torch_bptt.RNN(1, 1, 2, dropout=0.3, nonlinearity="identity", bias=False, checkpoint=7)
    with torch.no_grad():
        for name, weight in net.named_parameters():
            weight.fill_(name.startswith("weight_ih"))
    torch.manual_seed(0)
    n = 10000
    output, _ = net(torch.ones(n, 1, 1))
    assert abs((output == 0).float().mean() - 0.3) < 2 * math.sqrt(0.3 * 0.7 / n)


# ---- derivatives ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["batch", "lengths"])
@pytest.mark.parametrize("options", [{}, {"truncate": 2, "alpha": 0.3}, {"num_layers": 2}], ids=str)
@pytest.mark.parametrize("need_output", [True, False])
def test_second_derivatives(layout, options, need_output):
    results = []
    for net in networks(**options, checkpoint=2):
        input, hx, keywords = arguments(layout, net.num_layers)
        input.requires_grad_()
        # hx depends on a parameter: its gradient must not be counted twice.
        output, h_n = net(input, hx * net.weight_hh_l0.sum(), need_output=need_output, **keywords)
        loss = (h_n**3).sum() + ((output**2).sum() if need_output else 0)
        leaves = [input, *net.parameters()]
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        second = torch.autograd.grad(sum((grad**2).sum() for grad in first), leaves)
        results.append([*first, *second])
    for got, expected in zip(*reversed(results), strict=True):
        assert_same("gradient", got, expected)


def test_a_second_derivative_through_clip_grad_h_raises():
    _, net = networks(clip_grad_h=0.1)
    (grad,) = torch.autograd.grad(net(randn(T, B, I))[0].sum(), net.weight_hh_l0, create_graph=True)
    with pytest.raises(NotImplementedError, match="clip_grad_h: a second derivative"):
        grad.sum().backward()


def test_backward_twice():
    _, net = networks()
    output, _ = net(randn(T, B, I))
    output.sum().backward(retain_graph=True)
    once = net.weight_hh_l0.grad.clone()
    output.sum().backward()
    assert torch.equal(net.weight_hh_l0.grad, 2 * once)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        output.sum().backward()


def test_a_changed_weight_is_noticed_and_a_changed_output_is_not_needed():
    _, net = networks()
    output, _ = net(randn(T, B, I))
    output.mul_(2).sum().backward()
    output, _ = net(randn(T, B, I))
    with torch.no_grad():
        net.weight_hh_l0 += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_anomaly_mode():
    plain, checkpointed = networks()
    with pytest.warns(UserWarning, match="Anomaly Detection"), torch.autograd.detect_anomaly():
        got = run(checkpointed, randn(T, B, I))
    assert_same_run(got, run(plain, randn(T, B, I)))


# ---- memory --------------------------------------------------------------------------------------


class Memory(TorchDispatchMode):
    """The bytes of tensors made meanwhile and alive, and the most there were."""

    def __init__(self, *before):
        super().__init__()
        self.seen = weakref.WeakSet(tensor.untyped_storage() for tensor in before)
        self.now, self.most = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self.seen:
                storage = tensor.untyped_storage()
                self.seen.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.most = max(self.most, self.now)
        return result

    def _freed(self, nbytes):
        self.now -= nbytes


def states_held(net, steps, need_output, grad=True, lengths=None):
    """The most memory of a training step beyond its input, in states of all rows."""
    x = randn(*((B, steps) if net.batch_first else (steps, B)), I)
    with Memory(x, *net.parameters()) as memory, torch.set_grad_enabled(grad):
        _, h_n = net(x, need_output=need_output, lengths=lengths)
        if grad:
            h_n.sum().backward()
    net.zero_grad()
    return memory.most / (B * H * 8)


# Besides what the tests count: d and the states before and after a stretch, and the weights'
# gradients of one stretch and of all, together 2 (H I + H H + 2 H) numbers, below 6 states.
FEW = 12


@pytest.mark.parametrize("steps", [100, 2500])
def test_memory(steps, monkeypatch):
    plain, checkpointed = networks()
    root = math.isqrt(steps)
    # The states between stretches, and the output of one stretch.
    assert states_held(checkpointed, steps, need_output=False) <= 2 * root + FEW
    for checkpointed.checkpoint in (1, 10, steps):
        c = checkpointed.checkpoint
        assert states_held(checkpointed, steps, need_output=False) <= steps / c + c + FEW
    # The output itself is held only while there is somebody who has it.
    checkpointed.checkpoint = True
    assert states_held(checkpointed, steps, need_output=True) <= steps + 2 * root + FEW
    assert states_held(plain, steps, need_output=False) >= steps
    monkeypatch.setattr(implementation, "AT_ONCE", 10 * B * H)
    assert states_held(plain, steps, need_output=False, grad=False) <= 10 + FEW
    assert states_held(checkpointed, steps, need_output=False, grad=False) <= 10 + FEW


@pytest.mark.parametrize("steps", [100, 2500])
@pytest.mark.parametrize("batch_first", [False, True])
def test_memory_with_lengths(steps, batch_first, monkeypatch):
    """The input is packed a stretch at a time. One step of a stretch then takes, in numbers of a
    row: I as packed, and once more where flattening copies, H of output; places in it, which are
    int64: step, row and what is computed from them, 6 at the same time at most; and in backward I
    and I of gradients. The step itself, twice, for all rows. So less than 2 + (4 I + 8) / H states.
    Of every stretch, of 10 steps and more, the lengths are noted: 1 / H.
    """
    lengths = torch.tensor([steps, steps // 3, 0, steps - 1])
    plain, checkpointed = networks(batch_first=batch_first)
    root, step = math.isqrt(steps), 2 + (4 * I + 8) / H
    got = states_held(checkpointed, steps, need_output=False, lengths=lengths)
    assert got <= (1 + step + 1 / H) * root + FEW
    monkeypatch.setattr(implementation, "AT_ONCE", 10 * B * H)
    for net in (plain, checkpointed):
        got = states_held(net, steps, need_output=False, grad=False, lengths=lengths)
        assert got <= 10 * step + steps / 10 / H + FEW


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("lengths", [[3, 4, 0, 2], [0] * B, [T] * B], ids=str)
def test_lengths_short_of_the_input(lengths, batch_first):
    """Stretches end with the longest row; output and gradients are zero from there on."""
    plain, checkpointed = networks(batch_first=batch_first, checkpoint=2)
    x = randn(B, T, I) if batch_first else randn(T, B, I)
    expected = run(plain, x, lengths=lengths)
    assert_same_run(run(checkpointed, x, lengths=lengths), expected)
    last = run(ManyToOne(checkpointed, False), x, lengths=lengths, hx=randn(1, B, H))
    assert_same_run(last, run(ManyToOne(plain, True), x, lengths=lengths, hx=randn(1, B, H)))


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "error"), [(0, ValueError), (-1, ValueError), (False, TypeError), (2.0, TypeError)]
)
def test_checkpoint_is_none_true_or_a_positive_int(value, error):
    message = f"checkpoint must be None, True or an int of at least 1, got {value}"
    with pytest.raises(error, match=f"^RNN: {message}$"):
        torch_bptt.RNN(I, H, checkpoint=value)
    with pytest.raises(error, match=f"^rnn: {message}$"):
        functional.rnn(randn(T, I), None, randn(H, I), randn(H, H), checkpoint=value)


def test_need_output_is_a_bool():
    with pytest.raises(TypeError, match=r"^need_output must be a bool, got 0$"):
        torch_bptt.RNN(I, H)(torch.randn(T, B, I), need_output=0)


def test_several_bidirectional_layers_are_refused():
    message = "RNN: checkpoint must be None for several bidirectional layers"
    with pytest.raises(ValueError, match=message):
        torch_bptt.RNN(I, H, 2, bidirectional=True, checkpoint=True)
    net = torch_bptt.RNN(I, H, 2, bidirectional=True)
    net.checkpoint = True
    with pytest.raises(ValueError, match=message):
        net(torch.randn(T, B, I))


def test_truncate_in_reverse_over_rows_of_different_lengths_is_refused():
    plain, net = networks(bidirectional=True, truncate=2)
    x = randn(T, B, I)
    with pytest.raises(
        NotImplementedError, match="checkpoint must be None for truncate in reverse"
    ):
        net(x, lengths=LENGTHS)
    assert_same_run(run(net, x, lengths=[4] * B), run(plain, x, lengths=[4] * B))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_transforms_are_refused():
    _, net = networks()
    x = randn(T, B, I)

    def loss(x):
        return net(x)[0].sum()

    for call in (
        lambda: torch.func.grad(loss)(x),
        lambda: torch.func.vmap(loss)(x[None]),
        lambda: torch.func.jvp(loss, (x,), (x,)),
        lambda: torch.jit.trace(net, x),
        lambda: torch.export.export(net, (x,)),
        lambda: torch.compile(net, backend="eager")(x),
    ):
        with pytest.raises(NotImplementedError, match="checkpoint must be None under transforms"):
            call()


def test_a_compiled_model_leaves_it_out():
    plain, net = networks()
    model = torch.nn.Sequential(torch.compiler.disable(net))
    compiled = torch.compile(model, backend="eager")
    for got, expected in zip(compiled(randn(T, B, I)), plain(randn(T, B, I)), strict=True):
        assert_same("result", got, expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own
def test_transforms_without_need_output():
    net, _ = networks()
    x = randn(T, B, I)
    _, expected = net(x)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    for call in (
        lambda x: compiled(x, need_output=False)[1],
        lambda x: torch.func.jvp(lambda x: net(x, need_output=False)[1], (x,), (x,))[0],
        lambda x: torch.func.vmap(lambda x: net(x, need_output=False)[1], 1, 1)(x),
    ):
        with torch.no_grad():
            assert_same("h_n", call(x), expected)


def test_torch_nn_rnn_has_no_checkpoint():
    with pytest.raises(ValueError, match="to_torch: checkpoint must be None"):
        torch_bptt.RNN(I, H, checkpoint=3).to_torch()


def test_the_example_of_the_documentation_runs():
    page = (Path(__file__).parent.parent / "docs" / "memory.md").read_text()
    (example,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    names = {}
    exec(example, names)
    assert all(weight.grad is not None for weight in names["rnn"].parameters())


def test_repr_and_old_state():
    net = torch_bptt.RNN(I, H, checkpoint=True)
    assert repr(net) == "RNN(3, 5, checkpoint=True)"
    old = dict(vars(torch_bptt.RNN(I, H)))
    del old["checkpoint"]
    net.__setstate__(old)
    assert net.checkpoint is None
