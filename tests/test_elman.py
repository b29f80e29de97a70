"""ElmanNetwork: predictions and losses against a literal loop, memory, derivatives, errors.

``literal`` is the definition: one row at a time, one step at a time, one loss at a time, each
written with elementary operations. It knows no batch, no packing, no mask and no chunk.
"""

import copy
import pickle
import random

import pytest
import torch
import torch.nn.functional as F
from pairs import assert_same, randn
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import torch_bptt
from torch_bptt import ElmanNetwork

NONLINEARITIES = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "identity": lambda z: z,
}
ACTIVATIONS = {
    "identity": lambda o: o,
    "sigmoid": lambda o: 1 / (1 + torch.exp(-o)),
    "softmax": lambda o: torch.exp(o) / torch.exp(o).sum(),
}
LOSSES = {  # of one prediction: from o, yhat, y, each (K,), or y a class
    "mse": lambda o, yhat, y: ((yhat - y) ** 2).sum() / len(o),
    "half_squared_error": lambda o, yhat, y: ((yhat - y) ** 2).sum() / 2,
    "cross_entropy": lambda o, yhat, y: (
        -(ACTIVATIONS["softmax"](o).log() * (F.one_hot(y, len(o)) if y.dim() == 0 else y)).sum()
    ),
    "binary_cross_entropy": lambda o, yhat, y: (
        -(y * ACTIVATIONS["sigmoid"](o).log() + (1 - y) * ACTIVATIONS["sigmoid"](-o).log()).sum()
        / len(o)
    ),
}


def make(*sizes, **options):
    """A network in float64 with the same weights in every run."""
    torch.manual_seed(0)
    return ElmanNetwork(*sizes, **{"dtype": torch.float64, **options})


def literal_states(rnn, x, h0, starts):
    """(states (T, D*H) of the last layer, h_n (L*D, H)) of one row x, (T, I).

    starts[t]: the row starts from zero before step t.
    """
    directions, h_n = 2 if rnn.bidirectional else 1, []
    for layer in range(rnn.num_layers):
        outputs = []
        for name in [f"l{layer}", f"l{layer}_reverse"][:directions]:
            W, U = getattr(rnn, f"weight_ih_{name}"), getattr(rnn, f"weight_hh_{name}")
            b = getattr(rnn, f"bias_ih_{name}") + getattr(rnn, f"bias_hh_{name}") if rnn.bias else 0
            h, states = h0[len(h_n)], {}
            steps = range(len(x))
            for t in reversed(steps) if name.endswith("reverse") else steps:
                cut = t + 1 if name.endswith("reverse") else t
                if cut < len(x) and starts[cut]:
                    h = torch.zeros_like(h)
                h = states[t] = NONLINEARITIES[rnn.nonlinearity](W @ x[t] + U @ h + b)
            outputs.append([states[t] for t in steps])
            h_n.append(h)
        x = [torch.cat(together) for together in zip(*outputs, strict=True)]
    return x, torch.stack(h_n)


def literal(network, x, h0, starts):
    """(o, yhat) of one row: lists over its steps; many_to_one: over the one prediction."""
    states, h_n = literal_states(network.rnn, x, h0, starts)
    if network.many_to_one:
        states = [torch.cat(list(h_n[-2 if network.rnn.bidirectional else -1 :]))]
    c = 0 if network.head.bias is None else network.head.bias
    o = [network.head.weight @ h + c for h in states]
    return o, [ACTIVATIONS[network.output_activation](each) for each in o], h_n


def literal_loss(network, problem, loss, reduction):
    """(loss, h_n) of a ``Problem``."""
    sums, lasts, finals = [], [], []
    for b in range(problem.rows):
        length = problem.lengths[b]
        o, yhat, h_n = literal(
            network, problem.x[:length, b], problem.hx[:, b], problem.starts[:length, b]
        )
        own = []
        for t in range(len(o)):
            y = problem.y[b] if network.many_to_one else problem.y[t, b]
            counts = problem.mask[b] if network.many_to_one else problem.mask[t, b]
            if counts and not (y.dim() == 0 and y == -100):
                own.append(LOSSES[loss](o[t], yhat[t], y))
        finals.append(h_n)
        sums += own
        lasts += own[-1:]
    chosen = lasts if reduction == "last" else sums
    total = torch.stack([problem.x.new_zeros(()), *chosen]).sum()
    return total if reduction == "sum" else total / len(chosen), torch.stack(finals, 1)


# ---- one problem in every layout

FITTING = [
    (loss, activation)
    for loss in LOSSES
    for activation in ACTIVATIONS
    if (loss, activation) not in {("cross_entropy", "sigmoid"), ("binary_cross_entropy", "softmax")}
]


class Problem:
    """Rows as the literal loop wants them, (T, B, ...), and as arguments in a layout."""

    def __init__(self, network, steps, lengths, *, loss, classes=True, mask, starts, ignore=False):
        generator = torch.Generator().manual_seed(steps + len(lengths))
        self.network, self.lengths, self.rows = network, lengths, len(lengths)
        rnn, K = network.rnn, network.head.out_features
        states = rnn.num_layers * (2 if rnn.bidirectional else 1)
        self.x = randn(steps, self.rows, rnn.input_size)
        self.hx = randn(states, self.rows, rnn.hidden_size, seed=1)
        shape = (self.rows,) if network.many_to_one else (steps, self.rows)
        self.mask = torch.ones(shape, dtype=torch.bool)
        if mask:
            self.mask = torch.rand(shape, generator=generator) < 0.7
        self.starts = torch.zeros(steps, self.rows, dtype=torch.bool)
        if starts:
            self.starts = torch.rand(self.starts.shape, generator=generator) < 0.3
        if loss == "cross_entropy" and classes:
            self.y = torch.randint(K, shape, generator=generator)
            if ignore:
                self.y[torch.rand(shape, generator=generator) < 0.3] = -100
        else:
            self.y = torch.rand(*shape, K, generator=generator, dtype=torch.float64)
            self.y = self.y / self.y.sum(-1, keepdim=True)

    def leaves(self):
        self.x.requires_grad_()
        self.hx.requires_grad_()
        return {"x": self.x, "hx": self.hx, **dict(self.network.named_parameters())}

    def arguments(self, layout):
        """(input, target, hx) and the options, in the words of the layout."""
        existing = torch.arange(len(self.x))[:, None] < torch.tensor(self.lengths)
        y, options = self.y, {}
        if not self.network.many_to_one:  # what does not count may be anything
            nothing = -7 if y.dtype == torch.int64 else float("nan")
            counts = existing & self.mask
            y = torch.where(counts if y.dim() == 2 else counts[..., None], y, nothing)
        x = torch.where(existing[..., None], self.x, float("nan"))
        if not bool(self.mask.all()):
            options["mask"] = self.mask
        if bool(self.starts.any()):
            options["reset"] = self.starts
        if layout.startswith("packed"):
            sort = sorted(self.lengths, reverse=True) == self.lengths

            def pack(tensor):
                return pack_padded_sequence(tensor, self.lengths, enforce_sorted=sort)

            x = pack(self.x)
            if layout == "packed all" and not self.network.many_to_one:
                y = pack(y)
                options = {n: pack(v) if n == "mask" else v for n, v in options.items()}
            return (x, y, self.hx), options
        if min(self.lengths) < len(self.x):
            options["lengths"] = self.lengths
        if layout == "batch_first":
            x = x.transpose(0, 1)
            flip = {"reset"} if self.network.many_to_one else {"reset", "mask"}
            y = y if self.network.many_to_one else y.transpose(0, 1)
            options = {n: v.transpose(0, 1) if n in flip else v for n, v in options.items()}
        if layout == "one":
            x, hx = x[:, 0], self.hx[:, 0]
            last = {n: v[0] for n, v in options.items() if n == "lengths"}
            y = y[0] if self.network.many_to_one else y[:, 0]
            rest = {n: v[..., 0] for n, v in options.items() if n not in last}
            return (x, y, hx), last | rest
        return (x, y, self.hx), options


LAYOUTS = ["batch", "batch_first", "one", "packed", "packed all"]


def draw(layout, seed):
    """(problem, loss, reduction, chunk): a little of everything, the same for the same seed."""
    choose = random.Random(f"{layout} {seed}").choice
    loss, activation = choose(FITTING)
    many_to_one, yes_or_no = choose([False, False, True]), [True, False]
    num_layers, bidirectional = choose([(1, False), (2, False), (1, True), (2, True)])
    network = make(
        choose([1, 3]),
        choose([1, 4]),
        choose([1, 2, 4]),
        output_activation=activation,
        many_to_one=many_to_one,
        num_layers=num_layers,
        nonlinearity=choose(sorted(NONLINEARITIES)),
        bias=choose(yes_or_no),
        bidirectional=bidirectional,
        batch_first=layout == "batch_first",
        checkpoint=None if (num_layers, bidirectional) == (2, True) else choose([None, True, 1, 2]),
    )
    lengths = choose([[5, 5, 5], [2, 5, 4], [4, 0, 1], [5, 4, 4], [1, 1], [0], [3]])
    if layout == "one":
        lengths = lengths[-1:]
    if layout.startswith("packed"):
        lengths = [max(1, length) for length in lengths]
    steps = max(lengths) if layout.startswith("packed") else choose([5, max(1, *lengths, 0)])
    flags = {name: choose(yes_or_no) for name in ("classes", "mask", "starts", "ignore")}
    problem = Problem(network, steps, lengths, loss=loss, **flags)
    reduction = choose(["sum", "mean"] if many_to_one else ["sum", "mean", "last"])
    return problem, loss, reduction, choose([1, 3, 1000, None])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", range(40))
def test_loss_is_the_literal_one(layout, seed):
    problem, loss, reduction, chunk = draw(layout, seed)
    network, leaves = problem.network, problem.leaves()
    (x, y, hx), options = problem.arguments(layout)
    got, h_n = network.loss(x, y, hx, loss=loss, reduction=reduction, chunk=chunk, **options)
    expected, finals = literal_loss(network, problem, loss, reduction)
    if expected.isnan():  # the mean of nothing
        assert got.isnan()
        return
    h_n = h_n[:, None] if layout == "one" else h_n
    assert_same("loss", got, expected)
    assert_same("h_n", h_n, finals)
    compare_gradients(leaves, got + h_n.square().sum(), expected + finals.square().sum())


def compare_gradients(leaves, got, expected):
    for name, leaf in leaves.items():
        mine, other = (
            torch.autograd.grad(result, leaf, retain_graph=True, materialize_grads=True)[0]
            for result in (got, expected)
        )
        assert_same(f"grad of {name}", mine, other)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", range(20))
def test_predictions_are_the_literal_ones(layout, seed):
    problem, *_ = draw(layout, seed)
    network = problem.network
    (x, _, hx), options = problem.arguments(layout)
    options.pop("mask", None)
    prediction, h_n = network(x, hx, **options)
    if isinstance(prediction, PackedSequence):
        prediction, _ = pad_packed_sequence(prediction)
    if layout == "one":
        prediction, h_n = (
            prediction[None] if network.many_to_one else prediction[:, None],
            h_n[:, None],
        )
    if layout == "batch_first" and not network.many_to_one:
        prediction = prediction.transpose(0, 1)
    for b, length in enumerate(problem.lengths):
        row = problem.x[:length, b], problem.hx[:, b], problem.starts[:length, b]
        _, yhat, final = literal(network, *row)
        assert_same("h_n", h_n[:, b], final)
        own = prediction[b][None] if network.many_to_one else prediction[:length, b]
        if len(own):
            assert_same("prediction", own, torch.stack(yhat))


# ---- what torch computes, where torch has it


@pytest.mark.parametrize("chunk", [1, None])
def test_the_mean_is_that_of_torch(chunk):
    x, y = randn(6, 3, 2), torch.rand(6, 3, 4, dtype=torch.float64)
    classes = torch.randint(4, (6, 3))
    classes[1:3, 1] = -100
    network = make(2, 5, 4)
    o = network(x)[0]
    theirs = {
        "mse": (y, F.mse_loss(o, y)),
        "cross_entropy": (classes, F.cross_entropy(o.flatten(0, 1), classes.flatten())),
        "binary_cross_entropy": (y, F.binary_cross_entropy(torch.sigmoid(o), y)),
    }
    for loss, (target, expected) in theirs.items():
        assert_same(loss, network.loss(x, target, loss=loss, chunk=chunk)[0], expected)


def test_an_entropy_of_certainty_is_finite():
    """From yhat, which is 0 or 1 to rounding, it would be infinite."""
    for loss, y in [("cross_entropy", torch.ones(3, 2).long()), ("binary_cross_entropy", None)]:
        network = make(1, 1, 2, output_activation=BELONGS[loss])
        nn.init.constant_(network.head.bias, 1000)
        network.head.bias.data[1] = -1000
        y = torch.tensor([[0.0, 1.0]]).expand(3, 2).unsqueeze(1).double() if y is None else y[:, :1]
        total, _ = network.loss(torch.ones(3, 1, 1).double(), y, loss=loss)
        assert total.item() == pytest.approx(2000 if loss == "cross_entropy" else 1000, rel=1e-2)


BELONGS = {"cross_entropy": "softmax", "binary_cross_entropy": "sigmoid"}


# ---- chunks: the same to rounding, and o is never whole


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("chunk", [1, 5, 7, 20, 21, 1000, None])
def test_chunks_change_nothing(loss, chunk):
    network, x, y = make(3, 4, 5), randn(7, 3, 3), torch.rand(7, 3, 5, dtype=torch.float64)
    hx = randn(1, 3, 4, seed=1).requires_grad_()
    leaves = {"hx": hx, **dict(network.named_parameters())}
    whole, _ = network.loss(x, y, hx, loss=loss, chunk=21)
    chunked, _ = network.loss(x, y, hx, loss=loss, chunk=chunk)
    assert_same("loss", chunked, whole)
    compare_gradients(leaves, chunked, whole)


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that any operation returned, forward or back."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                # A view is as large as what it shows, and so is an expanded scalar.
                stored = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.elements = max(self.elements, min(stored, tensor.numel()))
        return result


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("checkpoint", [None, True])
def test_the_largest_tensor_is_a_chunk(reduction, checkpoint):
    T, B, H, K, chunk = 40, 3, 8, 500, 10
    network = make(2, H, K, checkpoint=checkpoint)
    x, y = randn(T, B, 2), torch.randint(K, (T, B))
    options = {"loss": "cross_entropy", "reduction": reduction}

    def largest(chunk):
        with Largest() as seen:
            network.loss(x, y, chunk=chunk, **options)[0].backward()
        return seen.elements

    assert largest(chunk) == max(chunk * K, K * H)
    assert largest(T * B) == (T * B if checkpoint is None else 7 * B) * K
    with torch.no_grad(), Largest() as seen:
        network.loss(x, y, chunk=chunk, **options)
    assert seen.elements == chunk * K


def test_a_large_output_is_cut_into_chunks_of_about_4_megabytes():
    network, x = make(2, 4, 5000, dtype=torch.float32), torch.randn(100, 8, 2)
    y = torch.randint(5000, (100, 8))
    with Largest() as seen:
        network.loss(x, y, loss="cross_entropy")[0].backward()
    assert 0.9 * 2**20 < seen.elements <= 2**20
    assert seen.elements < 100 * 8 * 5000 / 3


def test_with_checkpoint_no_tensor_has_all_steps():
    T, B, H = 2500, 2, 16
    x, y, rows = randn(T, B, 1), randn(T, B, 1, seed=1), T * B

    def largest(checkpoint):
        network = make(1, H, 1, checkpoint=checkpoint, num_layers=2)
        with Largest() as seen:
            network.loss(x, y)[0].backward()
        return seen.elements

    assert largest(None) == rows * H
    # The losses. A stretch of 50 steps has 50 B H = 0.3 of these, and the states of two layers at
    # the 49 ends of stretches 98 B H = 0.6.
    assert largest(True) == rows


def test_without_gradients_none_is_computed(monkeypatch):
    network, x, y = make(2, 4, 6), randn(9, 2, 2), torch.randint(6, (9, 2))
    called = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: called.append(1) or grad(*a, **k))
    with torch.no_grad():
        network.loss(x, y, loss="cross_entropy", chunk=3)
    assert not called
    network.requires_grad_(False)
    network.loss(x, y, loss="cross_entropy", chunk=3)
    assert not called
    network.head.bias.requires_grad_()
    network.loss(x, y, loss="cross_entropy", chunk=3)[0].backward()
    assert len(called) == 6
    assert [name for name, p in network.named_parameters() if p.grad is not None] == ["head.bias"]


def test_backward_twice_adds_up():
    network, x, y = make(2, 4, 6), randn(9, 2, 2), torch.randint(6, (9, 2))
    loss, _ = network.loss(x, y, loss="cross_entropy", chunk=3)
    loss.backward(retain_graph=True)
    once = network.head.weight.grad.clone()
    (3 * loss).backward()
    assert_same("grad", network.head.weight.grad, 4 * once)


# ---- derivatives


@pytest.mark.parametrize(("loss", "activation"), FITTING)
@pytest.mark.parametrize("checkpoint", [None, 2])
def test_first_and_second_derivatives(loss, activation, checkpoint):
    network = make(2, 3, 3, output_activation=activation, checkpoint=checkpoint)
    y = torch.softmax(randn(3, 2, 3, seed=1), -1)
    y = y.argmax(-1) if (loss, activation) == ("cross_entropy", "identity") else y
    names = list(dict(network.named_parameters()))

    def total(x, hx, *parameters):
        given = dict(zip(names, parameters, strict=True))
        return of_loss(network, given, x, y, hx, loss=loss, chunk=4)

    leaves = [randn(3, 2, 2), randn(1, 2, 3, seed=2), *network.parameters()]
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    torch.autograd.gradcheck(total, leaves, fast_mode=True)
    torch.autograd.gradgradcheck(total, leaves, fast_mode=True)


def test_a_head_tied_to_the_input_has_its_gradient_once():
    """With create_graph too, where the states depend on V; and so the second derivatives."""
    network, x, y = make(3, 3, 3), randn(4, 2, 3), torch.randint(3, (4, 2))
    tied = network.head.weight = network.rnn.weight_ih_l0

    def derivatives(chunk):
        loss, _ = network.loss(x, y, loss="cross_entropy", chunk=chunk)
        (first,) = torch.autograd.grad(loss, tied, create_graph=True)
        return first, *torch.autograd.grad(first.square().sum(), tied)

    for chunked, whole in zip(derivatives(3), derivatives(8), strict=True):
        assert_same("derivative", chunked, whole)


class OfLoss(nn.Module):
    """A module whose forward is a network's loss."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, *args, **options):
        return self.network.loss(*args, **options)[0]


def of_loss(network, parameters, *args, **options):
    """The loss with these parameters instead of the network's own."""
    given = {f"network.{name}": value for name, value in parameters.items()}
    return torch.func.functional_call(OfLoss(network), given, args, options)


def test_transforms():
    network, x, y = make(2, 3, 4), randn(5, 3, 2), torch.randint(4, (5, 3))
    parameters = {name: p.detach() for name, p in network.named_parameters()}
    options = {"loss": "cross_entropy", "chunk": 2}

    def total(parameters, x, y):
        return of_loss(network, parameters, x, y, **options)

    expected = torch.autograd.grad(network.loss(x, y, **options)[0], list(network.parameters()))
    gradients = torch.func.grad(total)(parameters, x, y)
    per_sample = torch.func.vmap(torch.func.grad(total), (None, 1, 1))(parameters, x, y)
    for name, want in zip(parameters, expected, strict=True):
        assert_same(name, gradients[name], want)
        assert_same(name, per_sample[name].mean(0), want)
    along = {name: torch.ones_like(p) for name, p in parameters.items()}
    _, change = torch.func.jvp(lambda p: total(p, x, y), (parameters,), (along,))
    assert_same("jvp", change, sum(gradient.sum() for gradient in expected))


@pytest.mark.parametrize("kind", ["linear", "sequential", "hook"])
def test_one_graph_of_torch_compile(kind):
    network, x, y = make(3, 4, 2), randn(5, 3, 3), randn(5, 3, 2)
    HEADS.get(kind, lambda network: None)(network)
    torch.compiler.reset()  # it takes two networks for the same where only hooks tell them apart
    compiled = torch.compile(lambda x: network.loss(x, y)[0], backend="eager", fullgraph=True)
    compare_gradients(dict(network.named_parameters()), compiled(x), network.loss(x, y)[0])


def test_many_gradients_at_once():
    network, x, y = make(2, 3, 4), randn(5, 3, 2), torch.randint(4, (5, 3))
    loss, _ = network.loss(x, y, loss="cross_entropy", chunk=2)
    weight = network.head.weight
    (one,) = torch.autograd.grad(loss, weight, retain_graph=True)
    (many,) = torch.autograd.grad(
        loss, weight, torch.tensor([1.0, -2.0], dtype=torch.float64), is_grads_batched=True
    )
    assert_same("grad", many, torch.stack([one, -2 * one]))


@pytest.mark.parametrize(
    "options",
    [{"num_layers": 2, "dropout": 0.5}, {"noise": 0.3}, {"recurrent_dropout": 0.5}],
    ids=str,
)
def test_checkpoint_draws_the_same_numbers_again(options):
    """gradcheck runs the loss many times, each time with the same seed."""
    network = make(2, 4, 2, checkpoint=2, **options)
    y = randn(5, 2, 2, seed=1)

    def total(x):
        torch.manual_seed(0)
        return network.loss(x, y)[0]

    torch.autograd.gradcheck(total, randn(5, 2, 2).requires_grad_())
    network.eval()
    before = torch.get_rng_state()
    total = network.loss(randn(5, 2, 2), y)[0]
    total.backward()
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "options",
    [{"truncate": 2}, {"clip_grad_h": 0.05}, {"alpha": 0.3}, {"learn_h0": True}],
    ids=str,
)
@pytest.mark.parametrize("layout", ["batch", "lengths", "packed"])
def test_checkpoint_with_other_options(options, layout):
    """As without it, which is tested by itself."""
    x, y, hx, lengths = randn(7, 3, 2), randn(7, 3, 2, seed=1), randn(1, 3, 4, seed=2), [7, 2, 5]
    totals, leaves = [], None
    for checkpoint in (None, 3):
        network = make(2, 4, 2, **options, checkpoint=checkpoint)
        if network.rnn.learn_h0:
            nn.init.constant_(network.rnn.h0, 0.5)
        if leaves is None:
            leaves = {"x": x.requires_grad_(), "hx": hx.requires_grad_()}
            leaves |= dict(network.named_parameters())
        given = {name: leaves[name] for name in dict(network.named_parameters())}
        input = pack_padded_sequence(x, lengths, enforce_sorted=False) if layout == "packed" else x
        module = OfLossAndState(network)
        given = {f"network.{name}": value for name, value in given.items()}
        given_hx = None if network.rnn.learn_h0 else hx
        more = {"reset": torch.eye(7, 3) > 0, "reduction": "sum"}
        more |= {"lengths": lengths} if layout == "lengths" else {}
        totals.append(torch.func.functional_call(module, given, (input, y, given_hx), more))
    assert_same("loss", *reversed(totals))
    compare_gradients(leaves, totals[1], totals[0])


class OfLossAndState(OfLoss):
    """Both results of a network's loss in one number."""

    def forward(self, *args, **options):
        loss, h_n = self.network.loss(*args, **options)
        return loss + h_n.square().sum()


# ---- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [7, 1001, 2002])
def test_narrow_networks_add_up_in_float32(dtype, chunk):
    """2002 losses of 1: in bfloat16 no sum of them would be right, one by one it stops at 256."""
    network, y = make(2, 3, 2, dtype=dtype), torch.ones(1001, 2, 2, dtype=dtype)
    nn.init.zeros_(network.head.weight)
    nn.init.zeros_(network.head.bias)
    x = torch.zeros(1001, 2, 2, dtype=dtype)
    total, _ = network.loss(x, y, reduction="sum", chunk=chunk)
    total.backward()
    assert (total.dtype, total.item()) == (torch.float32, 2002)
    eps = -torch.ones(2002, 2)  # 2/K (yhat - y), K = 2
    states = network.rnn(x)[0].flatten(0, 1).float()
    for parameter, exact in [
        (network.head.bias, eps.sum(0)),
        (network.head.weight, eps.T @ states),
    ]:
        assert parameter.grad.dtype == dtype
        # Rounded when all is added up, and one product of a chunk before that.
        torch.testing.assert_close(
            parameter.grad.float(), exact, rtol=torch.finfo(dtype).eps, atol=0
        )
    assert network.loss(x, y.float(), reduction="sum", chunk=chunk)[0] == total


def test_the_loss_of_a_narrow_output_is_computed_in_float32():
    network, y = make(2, 3, 50, dtype=torch.bfloat16), torch.randint(50, (9, 2))
    x = torch.randn(9, 2, 2).bfloat16()
    exact = F.cross_entropy(network(x)[0].flatten(0, 1).double(), y.flatten()).float()
    for chunk in (4, 1000):
        loss, _ = network.loss(x, y, loss="cross_entropy", chunk=chunk)
        torch.testing.assert_close(loss, exact, rtol=1e-6, atol=0)  # a few eps of float32


@pytest.mark.parametrize("checkpoint", [None, 3])
def test_autocast(checkpoint):
    """Chunks and whole alike: products in bfloat16, loss and gradients of parameters in float32."""
    network = make(2, 8, 6, dtype=torch.float32, checkpoint=checkpoint)
    x, y = torch.randn(9, 2, 2), torch.randint(6, (9, 2))
    results = []
    for chunk in (4, 1000):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, _ = network.loss(x, y, loss="cross_entropy", chunk=chunk)
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        assert {loss.dtype, *(gradient.dtype for gradient in gradients)} == {torch.float32}
        results.append([loss, *gradients])
    exact = network.loss(x, y, loss="cross_entropy")[0]
    assert 0 < abs(results[0][0] - exact) < 0.02  # eps of bfloat16 is 0.008
    for chunked, whole in zip(*results, strict=True):
        # A gradient is rounded to bfloat16 at the end, or summed in float32 and not rounded.
        torch.testing.assert_close(chunked, whole, rtol=0.02, atol=0.02 * whole.abs().max().item())


# ---- the module


def test_parameters_are_those_of_rnn_and_linear():
    network = make(3, 4, 2, num_layers=2, bidirectional=True)
    torch.manual_seed(0)
    rnn = nn.RNN(3, 4, 2, bidirectional=True, dtype=torch.float64)
    head = nn.Linear(8, 2, dtype=torch.float64)
    expected = {f"rnn.{name}": value for name, value in rnn.state_dict().items()}
    expected |= {f"head.{name}": value for name, value in head.state_dict().items()}
    assert network.state_dict().keys() == expected.keys()
    assert all(torch.equal(network.state_dict()[name], expected[name]) for name in expected)
    assert isinstance(network.rnn, torch_bptt.RNN)


def test_options_reach_the_layers():
    network = ElmanNetwork(
        3, 4, 2, bias=False, nonlinearity="relu", alpha=0.5, dtype=torch.float64, device="meta"
    )
    assert network.head.bias is None
    assert (network.rnn.nonlinearity, network.rnn.alpha) == ("relu", 0.5)
    assert all(p.dtype == torch.float64 and p.is_meta for p in network.parameters())
    assert "output_activation=identity" in repr(network)
    with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'"):
        ElmanNetwork(3, 4, 2, nonsense=1)


def test_a_copy_is_the_same_network():
    network, x = make(3, 4, 2, output_activation="sigmoid", many_to_one=True), randn(5, 2, 3)
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(other(x)[0], network(x)[0])


def test_a_parametrized_head_counts():
    network, x, y = make(3, 4, 2), randn(5, 2, 3), randn(5, 2, 2)
    nn.utils.parametrizations.weight_norm(network.head)
    original = network.head.parametrizations.weight.original0
    with torch.no_grad():
        original *= 2
    whole = F.mse_loss(network(x)[0], y)
    chunked, _ = network.loss(x, y, chunk=3)
    assert_same("loss", chunked, whole)
    compare_gradients({"g": original}, chunked, whole)


# ---- a head that is more than a linear map, layers that are more than their forward


class Adapter(nn.Module):
    """What has the weight and bias of a linear layer, and does something else."""

    def __init__(self, base):
        super().__init__()
        self.base, self.more = base, nn.Parameter(randn(base.out_features, base.in_features))

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, states):
        return self.base(states) + states @ self.more.T


class Doubled(nn.Linear):
    def forward(self, states):
        return 2 * super().forward(states)


def of_its_own_class(network):
    network.head.__class__ = Doubled


def of_its_own_forward(network):
    head = network.head
    head.forward = lambda states: nn.Linear.forward(head, states).sin()


def of_all_steps(network):
    """Each prediction depends on the others, so that the head must see what forward shows it."""
    network.head.register_forward_hook(lambda module, args, o: o - o.cumsum(0) / 3)


HEADS = {
    "spectral_norm": lambda network: nn.utils.spectral_norm(network.head),
    "pruned": lambda network: prune.random_unstructured(network.head, "weight", 2),
    "adapter": lambda network: setattr(network, "head", Adapter(network.head)),
    "derived": of_its_own_class,
    "own forward": of_its_own_forward,
    "sequential": lambda network: setattr(
        network, "head", nn.Sequential(network.head, nn.Tanh(), nn.Linear(2, 2).double())
    ),
    "hook": of_all_steps,
    "pre-hook": lambda network: network.head.register_forward_pre_hook(
        lambda module, args: (args[0].square(),)
    ),
    "backward hook": lambda network: network.head.register_full_backward_hook(
        lambda module, grads, _: (2 * grads[0],)
    ),
}


def twins(change, **options):
    """The same network twice, changed in the same way."""
    made = []
    for _ in range(2):
        network = make(3, 4, 2, **options)
        torch.manual_seed(1)
        change(network)
        made.append(network)
    return made


def learn(network, total_of):
    """Losses and gradients of two updates."""
    seen, optimizer = [], torch.optim.SGD(network.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        total = total_of(network)
        total.backward()
        seen += [total.detach(), *(parameter.grad.clone() for parameter in network.parameters())]
        optimizer.step()
    return seen


def squares(prediction, y, layout):
    """The mean of all squared errors of a prediction, over the steps that exist."""
    if layout == "packed":
        prediction, lengths = pad_packed_sequence(prediction)
    else:
        lengths = torch.tensor([5, 2, 4] if layout == "lengths" else [5, 5, 5])
    existing = torch.arange(5)[:, None] < lengths
    if layout == "batch_first":
        prediction, y = prediction.transpose(0, 1), y.transpose(0, 1)
    if layout == "many_to_one":
        return (prediction - y).square().mean()
    return (prediction - y)[existing].square().mean()


@pytest.mark.parametrize("layout", ["batch", "batch_first", "lengths", "packed", "many_to_one"])
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("checkpoint", [None, 2])
@pytest.mark.parametrize("chunk", [None, 2])
def test_every_head_counts(kind, layout, checkpoint, chunk):
    """As in forward, whose prediction is compared with the target here."""
    options = {name: True for name in ("batch_first", "many_to_one") if layout == name}
    network, other = twins(HEADS[kind], checkpoint=checkpoint, **options)
    x, y = randn(5, 3, 3), randn(*(() if layout == "many_to_one" else (5,)), 3, 2, seed=1)
    if layout == "batch_first":
        x, y = x.transpose(0, 1), y.transpose(0, 1)
    if layout == "packed":
        x = pack_padded_sequence(x, [5, 2, 4], enforce_sorted=False)
    more = {"lengths": [5, 2, 4]} if layout == "lengths" else {}
    got = learn(network, lambda network: network.loss(x, y, chunk=chunk, **more)[0])
    expected = learn(other, lambda network: squares(network(x, **more)[0], y, layout))
    for mine, theirs in zip(got, expected, strict=True):
        assert_same("loss or gradient", mine, theirs)


@pytest.mark.parametrize("loss", ["cross_entropy", "binary_cross_entropy"])
def test_entropies_of_a_head_of_any_kind(loss):
    """One sequence, classes that do not count, and second derivatives, chunk by chunk and whole."""
    network, x = make(3, 4, 2), randn(5, 3)
    HEADS["sequential"](network)
    classes = torch.tensor([0, 1, -100, 1, 0])
    y = classes if loss == "cross_entropy" else randn(5, 2).sigmoid()
    of_torch = {"cross_entropy": F.cross_entropy}.get(loss, F.binary_cross_entropy_with_logits)
    expected = of_torch(network(x)[0], y)
    leaves = dict(network.named_parameters())
    for chunk in (2, None):
        got = network.loss(x, y, loss=loss, chunk=chunk)[0]
        assert_same("loss", got, expected)
        compare_gradients(leaves, got, expected)
        firsts = (
            torch.autograd.grad(total, network.rnn.weight_hh_l0, create_graph=True)[0]
            for total in (got, expected)
        )
        compare_gradients(leaves, *(first.square().sum() for first in firsts))


@pytest.mark.parametrize(
    ("head", "got"),
    [
        (nn.Flatten(0), r"\(60,\)"),
        (nn.Flatten(0, 1), r"\(15, 4\)"),
        (nn.RNN(4, 2, dtype=torch.float64), "tuple"),
    ],
    ids=str,
)
def test_a_head_has_one_prediction_for_each_state(head, got):
    network = make(3, 4, 2)
    network.head = head
    with pytest.raises(ValueError, match=rf"expected a tensor \(5, 3, K\), got {got}"):
        network.loss(randn(5, 3, 3), randn(5, 3, 2))


class Sigmoid(nn.Module):
    def forward(self, raw):
        return raw.sigmoid()

    def right_inverse(self, value):
        return value.logit()


class Counted(nn.Module):
    """Twice the weight, and how often it was computed."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def forward(self, raw):
        self.count += 1
        return 2 * raw


def with_learned_alpha(network):
    network.rnn.alpha = nn.Parameter(torch.full((4,), 0.3, dtype=torch.float64))
    parametrize.register_parametrization(network.rnn, "alpha", Sigmoid())


PARAMETRIZED = {
    "orthogonal": lambda n: nn.utils.parametrizations.orthogonal(n.rnn, "weight_hh_l0"),
    "spectral_norm": lambda n: nn.utils.parametrizations.spectral_norm(n.rnn, "weight_ih_l0"),
    "alpha": with_learned_alpha,
    "h0": lambda n: parametrize.register_parametrization(n.rnn, "h0", Counted()),
    # Not by parametrizations, which a stretch knows nothing of: once for the whole sequence.
    "old spectral_norm": lambda n: nn.utils.spectral_norm(n.rnn, "weight_hh_l0"),
    "pruned": lambda n: prune.random_unstructured(n.rnn, "weight_hh_l0", 5),
}


@pytest.mark.parametrize("kind", PARAMETRIZED)
@pytest.mark.parametrize("layout", ["batch", "lengths", "packed"])
def test_checkpoint_with_weights_that_are_computed(kind, layout):
    """As without it, which is tested by itself; two updates while training."""
    options = {"learn_h0": kind == "h0"}
    network, other = twins(PARAMETRIZED[kind], checkpoint=2, **options)
    other.rnn.checkpoint = None
    x, y = randn(5, 3, 3), randn(5, 3, 2, seed=1)
    if layout == "packed":
        x = pack_padded_sequence(x, [5, 2, 4], enforce_sorted=False)
    more = {"lengths": [5, 2, 4]} if layout == "lengths" else {}
    runs = [learn(each, lambda net: net.loss(x, y, **more)[0]) for each in (network, other)]
    for mine, theirs in zip(*runs, strict=True):
        assert_same("loss or gradient", mine, theirs)


@pytest.mark.parametrize("checkpoint", [None, 2])
@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0", "bias_hh_l0"])
def test_a_weight_is_computed_once(name, checkpoint):
    network, counted = make(3, 4, 2, checkpoint=checkpoint), Counted()
    parametrize.register_parametrization(network.rnn, name, counted)
    counted.count = 0
    network.loss(randn(7, 3, 3), randn(7, 3, 2))[0].backward()
    assert counted.count == 1


@pytest.mark.parametrize("checkpoint", [None, 2])
def test_hooks_of_the_layers_run_once_and_count(checkpoint):
    network, x, y = make(3, 4, 2, checkpoint=checkpoint), randn(7, 3, 3), randn(7, 3, 2)
    calls = []
    x.requires_grad_()  # else PyTorch warns that the backward hook sees no gradient of an input
    network.rnn.register_forward_hook(lambda module, args, result: (2 * result[0], result[1]))
    network.rnn.register_forward_pre_hook(lambda module, args: calls.append("forward"))
    network.rnn.register_full_backward_hook(lambda module, *grads: calls.append("backward"))
    got, expected = network.loss(x, y)[0], F.mse_loss(network(x)[0], y)
    assert_same("loss", got, expected)
    assert calls == ["forward"] * 2
    leaves = [x, network.rnn.weight_hh_l0]
    mine, other = (torch.autograd.grad(each, leaves) for each in (got, expected))
    for name, a, b in zip(("x", "W_hh"), mine, other, strict=True):
        assert_same(f"grad of {name}", a, b)
    assert calls[2:] == ["backward"] * 2


def test_a_hook_of_all_modules_counts():
    network, x, y = make(3, 4, 2, checkpoint=2), randn(7, 3, 3), randn(7, 3, 2)

    def double(module, args, result):
        if module is network.head:
            return 2 * result
        return (2 * result[0], result[1]) if module is network.rnn else None

    handle = nn.modules.module.register_module_forward_hook(double)
    try:
        got, expected = network.loss(x, y)[0], F.mse_loss(network(x)[0], y)
    finally:
        handle.remove()
    assert_same("loss", got, expected)


def test_many_to_one_with_checkpoint_asks_for_no_output():
    """The states between stretches are kept, and those of one stretch computed again."""
    with Largest() as seen:
        network = make(1, 16, 1, many_to_one=True, checkpoint=True)
        network.loss(randn(400, 2, 1), randn(2, 1))[0].backward()
    assert seen.elements == 400 * 2  # the input; all states would be 16 times as many


# ---- sizes at the edge


@pytest.mark.parametrize("checkpoint", [None, True])
def test_no_rows_and_nothing_that_counts(checkpoint):
    network = make(3, 4, 2, checkpoint=checkpoint)
    loss, h_n = network.loss(randn(5, 0, 3), randn(5, 0, 2), reduction="sum")
    assert (loss.item(), h_n.shape) == (0, (1, 0, 4))
    x, y, nothing = randn(5, 2, 3), randn(5, 2, 2), torch.zeros(5, 2, dtype=torch.bool)
    assert network.loss(x, y, mask=nothing)[0].isnan()
    assert network.loss(x, y, mask=nothing, reduction="last")[0].isnan()
    loss, _ = network.loss(x, y, mask=nothing, reduction="sum")
    loss.backward()
    assert loss.item() == 0
    assert all(not p.grad.any() for p in network.parameters())
    loss, h_n = network.loss(x, y, lengths=[0, 0], reduction="sum")
    assert loss.item() == 0
    assert not h_n.any()


# ---- errors

x, y = torch.zeros(5, 2, 3), torch.zeros(5, 2, 4)
packed = pack_padded_sequence(x, [5, 3])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"output_activation": "relu"}, ValueError, "output_activation must be 'identity' or"),
        ({"output_size": 0}, ValueError, "output_size must be an int of at least 1, got 0"),
        ({"output_size": 2.0}, TypeError, "output_size must be an int of at least 1, got 2.0"),
        ({"many_to_one": 1}, TypeError, "many_to_one must be a bool, got 1"),
        ({"hidden_size": 0}, ValueError, "hidden_size must be greater than zero"),
    ],
)
def test_wrong_networks(options, error, message):
    with pytest.raises(error, match=message):
        ElmanNetwork(**{"input_size": 3, "hidden_size": 4, "output_size": 2, **options})


def wrong(error, message, target=y, input=x, network=None, **options):
    return pytest.param(error, message, target, input, network or {}, options, id=message)


@pytest.mark.parametrize(
    ("error", "message", "target", "input", "network", "options"),
    [
        wrong(ValueError, "loss must be 'mse' or .*, got 'l1'", loss="l1"),
        wrong(ValueError, "reduction must be 'mean' or 'sum' or 'last', got 0", reduction=0),
        wrong(
            ValueError,
            "reduction must be 'mean' or 'sum', got 'last'",
            target=y[0],
            network={"many_to_one": True},
            reduction="last",
        ),
        wrong(ValueError, "chunk must be an int of at least 1, got 0", chunk=0),
        wrong(TypeError, "chunk must be an int of at least 1, got 1.5", chunk=1.5),
        wrong(TypeError, "chunk must be an int of at least 1, got True", chunk=True),
        wrong(
            ValueError,
            "loss 'cross_entropy': output_activation must be 'identity' or 'softmax', got",
            network={"output_activation": "sigmoid"},
            loss="cross_entropy",
        ),
        wrong(
            ValueError,
            "loss 'binary_cross_entropy': output_activation must be 'identity' or 'sigmoid'",
            network={"output_activation": "softmax"},
            loss="binary_cross_entropy",
        ),
        wrong(ValueError, r"expected \(5, 2, 4\), got \(5, 2\)", target=y[..., 0]),
        wrong(ValueError, r"expected \(5, 2, 4\), got \(5, 2, 1\)", target=y[..., :1]),
        wrong(ValueError, r"expected \(5, 2, 4\), got \(5, 1, 4\)", target=y[:, :1]),
        wrong(
            ValueError,
            r"target must be shaped as the prediction, expected \(2, 4\), got \(5, 2, 4\)",
            network={"many_to_one": True},
        ),
        wrong(
            ValueError,
            r"expected \(5, 2\), got \(5, 2, 4\)",
            target=y.long(),
            loss="cross_entropy",
        ),
        wrong(TypeError, "target must be torch.float32, got torch.float64", target=y.double()),
        wrong(TypeError, "target must be torch.float32, got torch.int64", target=y.long()),
        wrong(
            TypeError,
            "target must be torch.int64 for classes or torch.float32, got torch.int32",
            target=y.int(),
            loss="cross_entropy",
        ),
        wrong(TypeError, "target must be a tensor, got list", target=[1.0]),
        wrong(
            TypeError,
            "target must be a tensor or a PackedSequence, got NoneType",
            target=None,
            input=packed,
        ),
        wrong(
            TypeError,
            "target must be a tensor for an input that is not packed, got a PackedSequence",
            target=packed,
        ),
        wrong(
            TypeError,
            "target must be a tensor for many_to_one, got a PackedSequence",
            target=packed,
            input=packed,
            network={"many_to_one": True},
        ),
        wrong(
            ValueError,
            "target must be packed as input is",
            target=pack_padded_sequence(y, [5, 4]),
            input=packed,
        ),
        wrong(
            ValueError,
            "or rows in another order",
            target=pack_padded_sequence(y, [3, 5], enforce_sorted=False),
            input=packed,
        ),
        wrong(
            ValueError,
            r"expected \(8, 4\), got \(8, 3\)",
            target=packed,
            input=packed,
        ),
        wrong(
            ValueError, "target must not require a gradient", target=y.clone().requires_grad_()
        ),
        wrong(RuntimeError, "device of the network, expected cpu, got meta", target=y.to("meta")),
        wrong(TypeError, "mask must be torch.bool, got torch.float32", mask=torch.ones(5, 2)),
        wrong(TypeError, "mask must be a tensor, got list", mask=[True]),
        wrong(
            ValueError,
            r"mask must be shaped as the prediction, expected \(5, 2\), got \(2, 5\)",
            mask=torch.ones(2, 5).bool(),
        ),
        wrong(ValueError, "lengths must be None when input is a PackedSequence",
              input=packed, lengths=[5, 3]),
        wrong(ValueError, "lengths must lie within the steps of input", lengths=[5, 6]),
        wrong(ValueError, "Expected input to be 2D or 3D, got 4D", input=x[None]),
        wrong(RuntimeError, r"Expected hidden size \(1, 2, 6\)", hx=torch.zeros(1, 3, 6)),
        wrong(ValueError, "reset must have one entry per step and row",
              reset=torch.zeros(2, 5).bool()),
        wrong(
            IndexError,
            "Target 4 is out of bounds",
            target=torch.full((5, 2), 4),
            loss="cross_entropy",
        ),
        wrong(
            TypeError,
            "the network must be real, got torch.complex64",
            target=y.to(torch.complex64),
            input=x.to(torch.complex64),
            network={"dtype": torch.complex64},
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("checkpoint", [None, 2])
def test_wrong_arguments_of_loss(error, message, target, input, network, options, checkpoint):
    network = ElmanNetwork(3, 6, 4, checkpoint=checkpoint, **network)
    with pytest.raises(error, match=message):
        network.loss(input, target, **options)


@pytest.mark.parametrize("what", ["mask", "lengths", "classes"])
def test_vmap_over_what_counts_is_refused(what):
    network = ElmanNetwork(3, 4, 2)
    x, y = torch.randn(6, 5, 2, 3), torch.randint(2, (6, 5, 2))
    given = {"mask": torch.rand(6, 5, 2) < 0.5, "lengths": torch.randint(1, 6, (6, 2))}.get(what, y)
    options = {"reduction": "last"} if what == "classes" else {}

    def loss(x, y, given):
        named = {} if what == "classes" else {what: given}
        return network.loss(x, y, loss="cross_entropy", **named, **options)[0]

    with pytest.raises(NotImplementedError, match="must not be mapped over by torch"):
        torch.func.vmap(loss)(x, y, given)


@pytest.mark.parametrize("reduction", ["mean", "last"])
def test_a_loss_with_lengths_is_one_graph(reduction):
    network, x, y = ElmanNetwork(3, 5, 4), torch.randn(7, 4, 3), torch.randn(7, 4, 4)
    options = {"lengths": torch.tensor([1, 7, 0, 4]), "reduction": reduction}
    compiled = torch.compile(network.loss, backend="aot_eager", fullgraph=True)
    got, expected = compiled(x, y, **options)[0], network.loss(x, y, **options)[0]
    torch.testing.assert_close(got, expected)
