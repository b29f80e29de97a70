"""torch.func, and what torch.autograd has like it, of networks with every option: the same
transform of a loop in plain PyTorch has to give the same.

To cover another transform, add a line to TRANSFORMS; another kind of network, to NETWORKS.
"""

import statistics
import time
from typing import NamedTuple

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.autograd.functional as of_autograd
import torch.nn.functional as F
from pairs import assert_same, randn
from torch import nn
from torch.func import (
    functional_call,
    functionalize,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    stack_module_state,
    vjp,
    vmap,
)  # fmt: skip
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from torch_bptt import RNN, RNNCell, functional

ACTIVATIONS = {
    "tanh": torch.tanh, "relu": torch.relu, "sigmoid": torch.sigmoid, "identity": lambda z: z,
}  # fmt: skip

# float64, at most 5 steps of 2 layers, sums of at most 8 terms, up to four passes through time (a
# third derivative): fewer than 5 * 2 * 16 * 4 = 640 roundings of 1.1e-16, each amplified by less
# than the norm of W_hh, below 0.5 * 3, to the power of the steps, 8: below 6e-13 of the largest
# entry on the way. A third derivative may be a tenth of what it is the sum of. A wrong term changes
# a result by more than 1e-4.
LIMIT = 6e-12


def assert_alike(got, expected):
    """Equal shapes and numbers in two nested structures."""
    got, expected = pytree.tree_leaves(got), pytree.tree_leaves(expected)
    assert len(got) == len(expected)
    for index, (mine, other) in enumerate(zip(got, expected, strict=True)):
        assert_same(f"part {index}", mine, other, LIMIT)


def loop(net, parameters, x, hx=None, lengths=None, reset=None):
    """output and h_n of time-major x, by a loop over steps; all but net may be mapped over."""
    steps, rows, _ = x.shape
    lengths = torch.as_tensor([steps] * rows if lengths is None else lengths)
    reset = torch.zeros(steps, rows, dtype=torch.bool) if reset is None else reset
    training, count = net.training, len(net._all_weights)
    masks = [
        F.dropout(x.new_ones(rows, net.hidden_size), net.recurrent_dropout, training)
        for _ in range(count)
    ]
    outputs, ends = [], []
    for index, names in enumerate(net._all_weights):
        reverse = net.bidirectional and index % 2 == 1
        weight_ih, weight_hh, *biases = (parameters[name] for name in names)
        alpha = parameters.get("alpha", net.alpha)
        alpha = alpha[index] if isinstance(alpha, torch.Tensor) and alpha.dim() == 2 else alpha
        noise = torch.zeros(steps, rows, net.hidden_size, dtype=x.dtype)
        if training and net.noise:
            noise = torch.normal(0.0, net.noise, noise.shape, dtype=x.dtype)
        start = parameters["h0"][index] if net.learn_h0 else noise.new_zeros(net.hidden_size)
        h, states = start.expand(rows, -1) if hx is None else hx[index], [None] * steps
        for t in reversed(range(steps)) if reverse else range(steps):
            own = lengths - 1 - t if reverse else torch.full_like(lengths, t)
            exists = (t < lengths)[:, None]
            if net.truncate:
                cut = (own > 0) & (own % net.truncate == 0)
                h = torch.where(cut[:, None] & exists, h.detach(), h)
            crossed = t + 1 if reverse else t
            if crossed < steps:
                new = reset[crossed] & (own > 0) if reverse else reset[crossed]
                h = torch.where(new[:, None] & exists, start, h)
            z = x[t] @ weight_ih.T + (masks[index] * h) @ weight_hh.T + sum(biases) + noise[t]
            following = (1 - alpha) * h + alpha * ACTIVATIONS[net.nonlinearity](z)
            h = torch.where(exists, following, h)
            states[t] = torch.where(exists, following, 0)
        outputs.append(torch.stack(states))
        ends.append(h)
        if reverse or not net.bidirectional:
            x, outputs = torch.cat(outputs, -1), []
            if index + 1 < count:
                x = F.dropout(x, net.dropout, training)
    return x, torch.stack(ends)


# ---- what is transformed -------------------------------------------------------------------------

PARTS = torch.linspace(0.2, 0.9, 12, dtype=torch.float64).view(4, 3)
LENGTHS = [4, 2, 4]
RESET = torch.tensor([[0, 1, 0], [1, 0, 0], [0, 0, 0], [0, 0, 1]]).bool()

# name -> (arguments of RNN, of its call)
NETWORKS = {
    "plain": ({}, {}),
    "everything": (
        {
            "num_layers": 2,
            "bidirectional": True,
            "alpha": nn.Parameter(PARTS),
            "learn_h0": True,
            "truncate": 3,
        },
        {"lengths": LENGTHS, "reset": RESET},
    ),
    "packed": ({"nonlinearity": "sigmoid", "alpha": 0.4, "bidirectional": True}, {"packed": True}),
    "relu": ({"nonlinearity": "relu", "bias": False, "num_layers": 2}, {"reset": RESET}),
}
SIZES = torch.tensor([3, 3, 2, 2])  # of the steps of rows with the lengths 4, 4, 2
PACKED = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 9, 10])  # where they lie in (4 * 3, I)


def network(arguments):
    net = RNN(2, 3, dtype=torch.float64, **arguments)
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        if parameter is not net.alpha:
            nn.init.uniform_(parameter, -0.5, 0.5, generator=generator)
    return net


def fused(net, parameters, x, hx, *, packed=False, **options):
    """What ``loop`` returns, by RNN."""
    if not packed:
        return functional_call(net, parameters, (x, hx), options)
    rows = PackedSequence(x.flatten(0, 1).index_select(0, PACKED), SIZES)
    output, h_n = functional_call(net, parameters, (rows, hx))
    zeros = output.data.new_zeros(x.shape[0] * x.shape[1], output.data.shape[-1])
    return zeros.index_copy(0, PACKED, output.data).unflatten(0, x.shape[:2]), h_n


def by_loop(net, parameters, x, hx, *, packed=False, **options):
    return loop(net, parameters, x, hx, **({"lengths": [4, 4, 2]} if packed else options))


def function_of(run, net, options):
    """A function of x, hx and the weights, with values to call it with; output and h_n."""
    parameters = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    parameters = {name: tensor.detach() for name, tensor in parameters.items()}
    names = ["weight_ih_l0", "weight_hh_l0", "bias_hh_l0", "alpha", "h0"]
    names = [name for name in names if name in parameters]
    hx = 0.5 * randn(len(net._all_weights), 3, 3, seed=1)

    def function(x, hx, *chosen):
        return run(net, {**parameters, **dict(zip(names, chosen, strict=True))}, x, hx, **options)

    return function, (randn(4, 3, 2), hx, *(parameters[name] for name in names))


# ---- what is done to it --------------------------------------------------------------------------


class Task(NamedTuple):
    """A function of several tensors, and where to take it."""

    function: object
    at: tuple

    @property
    def every(self):
        return tuple(range(len(self.at)))

    def loss(self, *inputs):
        output, h_n = self.function(*inputs)
        weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
        return (weights * output).sum() + output.pow(2).sum() + h_n.pow(3).sum()

    def gradient(self, *inputs):
        return grad(self.loss, self.every)(*inputs)

    def slope(self, *inputs):
        """The derivative of the loss in a direction."""
        return jvp(self.loss, inputs, self.direction)[1]

    @property
    def direction(self):
        return tuple(tensor.sin() + 0.3 for tensor in self.at)

    @property
    def other(self):
        return tuple(tensor.cos() for tensor in self.at)

    def several(self, dims):
        """Three variants of the arguments along the given dimensions."""
        scale = torch.tensor([1.0, 0.8, 0.5], dtype=torch.float64)
        return tuple(
            t if dim is None else (scale.view(-1, *[1] * t.dim()) * t).movedim(0, dim)
            for t, dim in zip(self.at, dims, strict=True)
        )

    def leaves(self):
        return [tensor.clone().requires_grad_() for tensor in self.at]


def squares(tree):
    return sum(tensor.pow(2).sum() for tensor in pytree.tree_leaves(tree))


def mapped(task, dims, transform=lambda function: function, of="function", **options):
    dims = tuple(dims[min(i, len(dims) - 1)] for i in task.every)
    return vmap(transform(getattr(task, of)), in_dims=dims, **options), task.several(dims)


def vmapped(*dims, **options):
    def run(task):
        function, inputs = mapped(task, dims, **options)
        return function(*inputs)

    return run


def around_vmap(transform, *dims):
    def run(task):
        function, inputs = mapped(task, dims)
        return transform(function, inputs)

    return run


def along(function):
    """The tangent of function's result in the direction of its arguments."""
    return lambda *inputs: jvp(function, inputs, tuple(t.sin() for t in inputs))


def gradients_of(function, inputs):
    return grad(lambda *inputs: squares(function(*inputs)), tuple(range(len(inputs))))(*inputs)


def jvp_of_vmap(function, inputs):
    return jvp(function, inputs, tuple(t.cos() for t in inputs))


def batched_gradients(create_graph):
    """is_grads_batched, and with create_graph a derivative of what it returns."""

    def run(task):
        leaves = task.leaves()
        results = task.function(*leaves)
        several = [torch.stack([t.sin(), t.cos()]).detach() for t in results]
        found = torch.autograd.grad(
            results, leaves, several, is_grads_batched=True, create_graph=create_graph
        )
        if not create_graph:
            return found
        return found, torch.autograd.grad(squares(found), leaves)

    return run


def batched_second_gradients(task):
    leaves = task.leaves()
    first = torch.autograd.grad(task.loss(*leaves), leaves, create_graph=True)
    several = [torch.stack([t.sin(), t.cos()]).detach() for t in first]
    return torch.autograd.grad(first, leaves, several, is_grads_batched=True)


def dual(task):
    with forward_ad.dual_level():
        inputs = [forward_ad.make_dual(t, d) for t, d in zip(task.at, task.direction, strict=True)]
        return [tuple(forward_ad.unpack_dual(t)) for t in task.function(*inputs)]


def dual_gradient(task):
    """Forward over reverse with dual numbers."""
    with forward_ad.dual_level():
        pairs = zip(task.leaves(), task.direction, strict=True)
        leaves = [forward_ad.make_dual(t, d) for t, d in pairs]
        found = torch.autograd.grad(task.loss(*leaves), leaves)
        return [tuple(forward_ad.unpack_dual(t)) for t in found]


def backward_through(transform):
    """A transform inside a loss that autograd differentiates."""

    def run(task):
        leaves = task.leaves()
        loss = squares(transform(task)(*leaves))
        return loss, torch.autograd.grad(loss, leaves)

    return run


def in_no_grad(task):
    with torch.no_grad():
        return task.gradient(*task.at), jvp(task.function, task.at, task.direction)


def graph_made_in_no_grad(task):
    leaves = task.leaves()
    loss = task.loss(*leaves)
    with torch.no_grad():
        found = torch.autograd.grad(loss, leaves, create_graph=True)
    return torch.autograd.grad(squares(found), leaves)


def only_some_require_grad(task):
    leaves = [t.requires_grad_(i % 2 == 1) for i, t in enumerate(task.leaves())]
    chosen = leaves[1::2]
    found = torch.autograd.grad(task.loss(*leaves), chosen, create_graph=True)
    return found, torch.autograd.grad(squares(found), chosen)


def only(index):
    """Second derivatives through output alone, or h_n alone."""

    def run(task):
        leaves = task.leaves()
        result = task.function(*leaves)[index]
        found = torch.autograd.grad(
            result.pow(3).sum(), leaves, create_graph=True, materialize_grads=True
        )
        return found, torch.autograd.grad(squares(found), leaves, materialize_grads=True)

    return run


def in_inference_mode(task):
    with torch.inference_mode():
        return task.function(*task.at), vmapped(0)(task)


def third(task):
    def second(*inputs):
        pairs = zip(task.gradient(*inputs), task.direction, strict=True)
        return sum((g * d).sum() for g, d in pairs)

    return jvp(grad(second, task.every), task.at, task.other)


TRANSFORMS = {
    "vjp": lambda t: vjp(t.function, *t.at)[1](t.function(*t.at)),
    "jvp": lambda t: jvp(t.function, t.at, t.direction),
    "functionalize": lambda t: functionalize(t.function)(*t.at),
    "functionalize grad": lambda t: functionalize(t.gradient)(*t.at),
    "functionalize vmap": around_vmap(lambda f, inputs: functionalize(f)(*inputs), 0),
    "jacrev": lambda t: jacrev(t.function, 1, chunk_size=5)(*t.at),
    "jacfwd": lambda t: jacfwd(t.function, 1)(*t.at),
    "hessian": lambda t: hessian(t.loss, t.every[1:])(*t.at),
    "reverse over reverse": lambda t: vjp(t.gradient, *t.at)[1](t.direction),
    "forward over reverse": lambda t: jvp(t.gradient, t.at, t.direction),
    "reverse over forward": lambda t: grad(t.slope, t.every)(*t.at),
    "forward over forward": lambda t: jvp(t.slope, t.at, t.other),
    "forward over forward of all": lambda t: jvp(along(t.function), t.at, t.other),
    "jacfwd of jacfwd": lambda t: jacfwd(jacfwd(t.loss, 2), 3)(*t.at),
    "forward thrice": lambda t: jvp(along(along(t.loss)), t.at, t.other),
    "forward over reverse over forward": lambda t: jvp(grad(t.slope, t.every), t.at, t.other),
    "reverse over forward over forward": lambda t: grad(
        lambda *inputs: jvp(t.slope, inputs, t.other)[1], t.every
    )(*t.at),
    "forward over forward over reverse": lambda t: jvp(along(t.gradient), t.at, t.other),
    "third": third,
    "vmap": vmapped(0),
    "vmap over inputs": vmapped(0, None, None),
    "vmap over weights": vmapped(None, None, 0),
    "vmap over other dimensions": vmapped(2, -1, 1, -1, 0, out_dims=(1, -1)),
    "vmap in chunks": vmapped(0, chunk_size=2),
    "vmap of vmap": lambda t: vmap(
        lambda x: vmap(lambda w: t.function(x, t.at[1], w, *t.at[3:]), out_dims=1)(t.several(
            (None, None, 0, *[None] * len(t.at[3:])))[2])
    )(torch.stack([t.at[0], -t.at[0]])),
    "gradients of each sample": vmapped(0, None, None, of="gradient"),
    "gradients of each network": vmapped(0, of="gradient"),
    "vmap of jvp": vmapped(0, transform=along),
    "vmap over directions": lambda t: vmap(lambda *d: jvp(t.function, t.at, d))(
        *(torch.stack(pair) for pair in zip(t.direction, t.other, strict=True))
    ),
    "vmap of jvp of grad": vmapped(0, transform=along, of="gradient"),
    "vmap of jvp of jvp": vmapped(0, transform=lambda f: along(along(f))),
    "vmap of grad of grad": vmapped(
        0, transform=lambda f: lambda *inputs: gradients_of(f, inputs), of="gradient"
    ),
    "jvp of vmap": around_vmap(jvp_of_vmap, 0),
    "jvp of vmap over inputs": around_vmap(jvp_of_vmap, 0, None, None),
    "jvp of jvp of vmap": around_vmap(lambda f, inputs: jvp_of_vmap(along(f), inputs), 0),
    "jacfwd of vmap": around_vmap(lambda f, inputs: jacfwd(f, 2)(*inputs), 0),
    "grad of vmap": around_vmap(gradients_of, 0),
    "jvp of grad of vmap": around_vmap(
        lambda f, inputs: jvp_of_vmap(lambda *i: gradients_of(f, i), inputs), None, 0
    ),
    "autograd: grad in batches": batched_gradients(create_graph=False),
    "autograd: grad of grad in batches": batched_gradients(create_graph=True),
    "autograd: second grad in batches": batched_second_gradients,
    "autograd: jacobian": lambda t: of_autograd.jacobian(t.function, t.at, vectorize=True),
    "autograd: jacobian forward": lambda t: of_autograd.jacobian(
        t.function, t.at, vectorize=True, strategy="forward-mode"
    ),
    "autograd: hessian": lambda t: of_autograd.hessian(t.loss, t.at, vectorize=True),
    "autograd: hessian forward": lambda t: of_autograd.hessian(
        t.loss, t.at, vectorize=True, outer_jacobian_strategy="forward-mode"
    ),
    "autograd: hvp": lambda t: of_autograd.hvp(t.loss, t.at, t.direction),
    "autograd: vhp": lambda t: of_autograd.vhp(t.loss, t.at, t.direction),
    "autograd: jvp": lambda t: of_autograd.jvp(t.function, t.at, t.direction),
    "dual numbers": dual,
    "grad of dual numbers": dual_gradient,
    "backward through grad": backward_through(lambda t: t.gradient),
    "backward through jvp": backward_through(lambda t: along(t.function)),
    "backward through vmap of grad": backward_through(
        lambda t: lambda x, *others: vmap(lambda x: t.gradient(x, *others))(
            torch.stack([x, x.sin()])
        )
    ),
    "no_grad around": in_no_grad,
    "no_grad around create_graph": graph_made_in_no_grad,
    "some require grad": only_some_require_grad,
    "output alone": only(0),
    "h_n alone": only(1),
    "inference mode": in_inference_mode,
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_as_the_loop(name, transform):
    arguments, options = NETWORKS[name]
    net = network(arguments)
    results = [
        TRANSFORMS[transform](Task(*function_of(run, net, options))) for run in (fused, by_loop)
    ]
    assert_alike(*results)


@pytest.mark.filterwarnings("ignore:.*get_attr Node:UserWarning")  # torch.func.linearize's own
@pytest.mark.parametrize("options", [{}, {"lengths": LENGTHS}, {"packed": True}], ids=str)
def test_linearize(options):
    net = network({"alpha": 0.4, "truncate": 2})
    results = []
    for run in (fused, by_loop):
        function, (x, *others) = function_of(run, net, options)
        output, tangent = linearize(lambda x, f=function, o=others: f(x, *o), x)
        results.append((output, tangent(x.sin()), tangent(x.cos())))
    assert_alike(*results)


# ---- what differs from sample to sample ----------------------------------------------------------


@pytest.mark.parametrize("with_lengths", [True, False], ids=["lengths", "no lengths"])
@pytest.mark.parametrize("with_reset", [True, False], ids=["reset", "no reset"])
@pytest.mark.parametrize("with_hx", [True, False], ids=["hx", "no hx"])
def test_lengths_reset_and_hx_of_each_sample(with_lengths, with_reset, with_hx):
    net = network(NETWORKS["everything"][0])
    _, (x, hx, *_) = function_of(fused, net, {})
    samples = 5
    x = torch.stack([x * (1 - 0.1 * i) for i in range(samples)])
    hx = torch.stack([hx * (1 - 0.2 * i) for i in range(samples)])
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 5, (samples, 3), generator=generator)
    reset = torch.rand(samples, 4, 3, generator=generator) < 0.3
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def derivatives(run):
        def of_one(x, hx, lengths, reset):
            options = {"lengths": lengths} if with_lengths else {}
            options |= {"reset": reset} if with_reset else {}

            def loss(parameters, x):
                output, h_n = run(net, parameters, x, hx if with_hx else None, **options)
                return output.pow(2).sum() + h_n.pow(3).sum()

            at = parameters, x
            return loss(*at), jvp(grad(loss, (0, 1)), at, at)

        return of_one

    got = vmap(derivatives(fused))(x, hx, lengths, reset)
    for i in range(samples):
        expected = derivatives(by_loop)(x[i], hx[i], lengths[i], reset[i])
        assert_alike(pytree.tree_map(lambda t, i=i: t[i], got), expected)


@pytest.mark.parametrize("batch_first", [True, False])
def test_one_sequence_with_a_length_of_each_sample(batch_first):
    net = RNN(2, 3, batch_first=batch_first, dtype=torch.float64)
    x, lengths = randn(4, 5, 2), torch.tensor([0, 1, 5, 3])
    got = vmap(lambda x, n: net(x, lengths=n))(x, lengths)
    for i, n in enumerate(lengths.tolist()):
        assert_alike([part[i] for part in got], net(x[i], lengths=n))


def test_a_length_of_a_sample_out_of_range():
    net = RNN(2, 3)
    lengths = torch.tensor([[1, 2], [3, 5]])
    with pytest.raises(ValueError, match=r"expected 0 to 4, got 5 in a row of a sample"):
        vmap(lambda x, n: net(x, lengths=n))(torch.zeros(2, 4, 2, 2), lengths)


def test_no_samples_no_networks_and_no_rows():
    """vmap over nothing, as in the Jacobian of an empty batch, has the shapes of something."""
    net, x = RNN(2, 3, dtype=torch.float64), randn(4, 5, 2)
    weights = {name: p.detach() for name, p in net.named_parameters()}

    def loss(weights, x):
        return functional_call(net, weights, (x,))[0].square().sum()

    assert vmap(net)(x.expand(0, 4, 5, 2))[0].shape == (0, 4, 5, 3)
    for dims in ((None, 0), (0, None), (0, 0)):
        several = {n: w.expand(0, *w.shape) if dims[0] == 0 else w for n, w in weights.items()}
        samples = x.expand(0, 4, 5, 2) if dims[1] == 0 else x
        for each in (grad(loss), jacfwd(jacrev(loss))):
            found = vmap(each, in_dims=dims)(several, samples)
            for got, one in zip(
                pytree.tree_leaves(found), pytree.tree_leaves(each(weights, x)), strict=True
            ):
                assert got.shape == (0, *one.shape)
    empty = x[:, :0]
    assert jacrev(lambda x: net(x)[0])(empty).shape == (4, 0, 3, 4, 0, 2)
    assert jacfwd(lambda x: net(x)[0])(empty).shape == (4, 0, 3, 4, 0, 2)
    assert hessian(lambda x: loss(weights, x))(empty).shape == (4, 0, 2, 4, 0, 2)


# ---- random numbers under vmap -------------------------------------------------------------------

RANDOM = {
    "dropout": {"num_layers": 2, "dropout": 0.5},
    "recurrent_dropout": {"bidirectional": True, "recurrent_dropout": 0.5},
    "noise": {"alpha": 0.5, "noise": 0.3},
    "all": {"num_layers": 2, "dropout": 0.5, "recurrent_dropout": 0.3, "noise": 0.2},
}


def draws(run, net, randomness, dims, of):
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    if dims[0] == 0:
        parameters = {n: torch.stack([p, p / 2, -p, p / 3]) for n, p in parameters.items()}
    x = randn(4, 5, 3, 2) if dims[1] == 0 else randn(5, 3, 2)

    def function(parameters, x):
        return run(net, parameters, x, None)

    transform = {
        "output": function,
        "gradient": grad(lambda p, x: squares(function(p, x))),
        "tangent": lambda p, x: jvp(lambda x: function(p, x), (x,), (x.cos(),)),
    }[of]
    torch.manual_seed(0)
    return vmap(transform, in_dims=dims, randomness=randomness)(parameters, x)


@pytest.mark.parametrize("dims", [(None, 0), (0, None), (0, 0)], ids=["x", "weights", "both"])
@pytest.mark.parametrize("name", RANDOM)
def test_random_options_draw_as_dropout_does(name, dims):
    """The same seed, the same draws, by RNN and by F.dropout in the loop."""
    net = network(RANDOM[name])
    for randomness in ("same", "different"):
        for of in ("output", "gradient", "tangent"):
            call = net, randomness, dims, of
            assert_alike(draws(fused, *call), draws(by_loop, *call))


@pytest.mark.parametrize("name", RANDOM)
def test_randomness_same_is_that_of_one_call_and_different_is_not(name):
    net, x = network(RANDOM[name]), randn(5, 3, 2)
    xs = x.expand(4, -1, -1, -1)
    torch.manual_seed(0)
    expected = net(x)[0]
    torch.manual_seed(0)
    same = vmap(lambda x: net(x)[0], randomness="same")(xs)
    different = vmap(lambda x: net(x)[0], randomness="different")(xs)
    for i in range(4):
        assert_alike(same[i], expected)
        assert i == 0 or not torch.allclose(different[i], different[0])
    with pytest.raises(RuntimeError, match="randomness error mode"):
        vmap(net)(xs)
    net.eval()
    assert_alike(vmap(net)(xs)[0][0], net(x)[0])


# ---- the other two forms -------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 2), (2,)], ids=["batch", "one"])
@pytest.mark.parametrize("nonlinearity", ACTIVATIONS)
def test_cell(shape, nonlinearity):
    cell = RNNCell(2, 3, nonlinearity=nonlinearity, dtype=torch.float64)
    names = [name for name, _ in cell.named_parameters()]
    at = randn(*shape), randn(*shape[:-1], 3), *(p.detach() for p in cell.parameters())

    def ours(x, h, *weights):
        return (functional_call(cell, dict(zip(names, weights, strict=True)), (x, h)),) * 2

    def theirs(x, h, weight_ih, weight_hh, bias_ih, bias_hh):
        z = x @ weight_ih.T + bias_ih + h @ weight_hh.T + bias_hh
        return (ACTIVATIONS[nonlinearity](z),) * 2

    for transform in (
        "hessian", "jacfwd of jacfwd", "vmap", "vmap over weights", "gradients of each network",
        "vmap of jvp of grad", "jvp of vmap", "third",
    ):  # fmt: skip
        of = TRANSFORMS[transform]
        assert_alike(of(Task(ours, at)), of(Task(theirs, at)))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", [(), (3,)], ids=["one alpha", "alphas"])
def test_function(reverse, shape):
    """functional.rnn: alpha and restart are arguments to differentiate and to map over."""
    net = RNN(2, 3, 2, bidirectional=True, learn_h0=True, dtype=torch.float64)
    net._all_weights = net._all_weights[1:2] if reverse else net._all_weights[:1]
    weights = [getattr(net, name).detach() for name in net._all_weights[0]]
    alpha = torch.linspace(0.3, 0.8, 3, dtype=torch.float64)[: shape[0] if shape else 1]
    at = randn(4, 3, 2), randn(3, 3), alpha.view(shape), 0.5 * randn(3), *weights

    def ours(x, hx, alpha, restart, *weights):
        return functional.rnn(
            x, hx, *weights, alpha=alpha, restart=restart, reverse=reverse, reset=RESET
        )

    def theirs(x, hx, alpha, restart, *weights):
        starts = ~RESET.roll(-1, 0) if reverse else ~RESET
        starts[-1 if reverse else 0] |= reverse
        weight_ih, weight_hh, bias_ih, bias_hh = weights
        h, states = hx, [None] * 4
        for t in reversed(range(4)) if reverse else range(4):
            p = torch.where(starts[t][:, None], h, restart)
            z = x[t] @ weight_ih.T + bias_ih + p @ weight_hh.T + bias_hh
            states[t] = h = (1 - alpha) * p + alpha * torch.tanh(z)
        return torch.stack(states), h

    for transform in (
        "hessian", "forward over forward of all", "vmap", "gradients of each network",
        "vmap of jvp of grad", "jvp of vmap", "third",
    ):  # fmt: skip
        of = TRANSFORMS[transform]
        assert_alike(of(Task(ours, at)), of(Task(theirs, at)))


def test_an_ensemble():
    """stack_module_state: networks of their own, with parameters and buffers."""
    alphas = [torch.tensor(a, dtype=torch.float64) for a in (0.3, 0.6, 0.9)]
    nets = [RNN(2, 3, 2, alpha=a, learn_h0=True, dtype=torch.float64) for a in alphas]
    parameters, buffers = stack_module_state(nets)
    assert buffers.keys() == {"alpha"}
    x = randn(4, 3, 2)

    def loss(parameters, buffers):
        return squares(functional_call(nets[0], (parameters, buffers), (x,)))

    got = vmap(grad(loss))(parameters, buffers)
    for i, net in enumerate(nets):
        own = {name: p.detach() for name, p in net.named_parameters()}
        expected = grad(lambda p, net=net: squares(loop(net, {**p, "alpha": net.alpha}, x)))(own)
        assert_alike({name: g[i] for name, g in got.items()}, expected)


# ---- two uses ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_gradient_penalty(name):
    """Gulrajani et al. (2017), Improved training of Wasserstein GANs: the critic's gradient with
    respect to each sequence is to have the norm 1."""
    arguments, options = NETWORKS[name]
    net, x = network(arguments), randn(4, 3, 2)
    results = []
    for run in (fused, by_loop):
        x = x.clone().requires_grad_()
        output, _ = run(net, dict(net.named_parameters()), x, None, **options)
        (slope,) = torch.autograd.grad(output.pow(2).sum(), x, create_graph=True)
        penalty = (slope.transpose(0, 1).flatten(1).norm(dim=1) - 1).square().mean()
        weights = list(net.parameters())
        results.append((penalty, torch.autograd.grad(penalty, weights, materialize_grads=True)))
    assert_alike(*results)


def test_hessian_vector_products_agree_and_what_they_take():
    """Times are printed with pytest -s, not judged."""
    net, x = RNN(16, 64, dtype=torch.float64), randn(100, 8, 16)
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    direction = {name: p.cos() for name, p in parameters.items()}

    def loss(parameters):
        return functional_call(net, parameters, (x,))[0].square().mean()

    ways = {
        "gradient": lambda: grad(loss)(parameters),
        "reverse over reverse": lambda: vjp(grad(loss), parameters)[1](direction)[0],
        "forward over reverse": lambda: jvp(grad(loss), (parameters,), (direction,))[1],
        "reverse over forward": lambda: grad(lambda p: jvp(loss, (p,), (direction,))[1])(
            parameters
        ),
    }
    seconds = {name: [] for name in ways}
    for _ in range(5):
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - begin)
    for name in list(ways)[1:]:
        ratio = statistics.median(seconds[name]) / statistics.median(seconds["gradient"])
        print(f"{name}: {ratio:.1f} gradients")
    results = [way() for way in list(ways.values())[1:]]
    # A hundred steps, but of a network that forgets: no number on the way is larger than 1.
    expected = vjp(grad(lambda p: loop(net, p, x)[0].square().mean()), parameters)[1](direction)[0]
    for result in results:
        assert_alike(result, expected)


# ---- what is refused -----------------------------------------------------------------------------


def test_functionalized_forward_mode():
    net = RNN(2, 3)
    x = torch.zeros(4, 1, 2)
    with pytest.raises(NotImplementedError, match=r"functionalize together with forward mode"):
        functionalize(lambda x: jvp(net, (x,), (x,)))(x)


@pytest.mark.parametrize("transform", [grad, vmap, functionalize], ids=lambda f: f.__name__)
def test_checkpoint(transform):
    net = RNN(2, 3, checkpoint=2)
    with pytest.raises(NotImplementedError, match=r"checkpoint must be None under transforms"):
        transform(lambda x: net(x)[0].sum())(torch.zeros(4, 1, 2))


@pytest.mark.parametrize("transform", ["grad of grad in batches", "hessian forward"])
def test_clipped_gradients_in_batches_have_no_derivative(transform):
    net = network({"clip_grad_h": 0.1})
    with pytest.raises(NotImplementedError, match=r"^clip_grad_h: a second derivative"):
        TRANSFORMS[f"autograd: {transform}"](Task(*function_of(fused, net, {})))


@pytest.mark.parametrize("create_graph", [False, True])
def test_gradients_in_batches_through_checkpoint(create_graph):
    net, x = RNN(2, 3, checkpoint=2), torch.zeros(4, 1, 2, requires_grad=True)
    with pytest.raises(NotImplementedError, match=r"checkpoint must be None where gradients are"):
        torch.autograd.grad(
            net(x)[0], x, torch.zeros(5, 4, 1, 3), is_grads_batched=True, create_graph=create_graph
        )
