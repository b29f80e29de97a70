"""RTRL against BPTT, a loop with autograd, one-step Jacobians and finite differences.

The recursion of RTRL and the one of BPTT add up the same terms in opposite orders. Here T = 7 steps
with sums of at most I + H + 1 = 9 terms: a number passes through fewer than 200 roundings of
1.1e-16, together 2e-14. Norms of C_t are below 2, mostly near 1, and terms may cancel: LIMIT leaves
a factor of 50. A missing term is of the size of the gradient itself.
"""

import copy
import doctest
import itertools
import re
from pathlib import Path

import pytest
import torch
from pairs import randn
from torch import nn
from torch.nn.utils import parametrizations, prune

import torch_bptt
from torch_bptt import RNN, RNNCell, functional, rtrl
from torch_bptt.rtrl import RTRL

LIMIT = 1e-12
T, B, I, H = 7, 3, 4, 4  # noqa: E741 - the symbols of the documentation
VALUES = {"tanh": torch.tanh, "relu": torch.relu, "sigmoid": torch.sigmoid, "identity": lambda z: z}


def assert_close(name, got, expected, limit=LIMIT):
    """To ``limit`` of the largest expected entry."""
    assert got.shape == expected.shape, f"{name}: {got.shape=}, {expected.shape=}"
    error, scale = (t.abs().max().item() for t in (got - expected, expected))
    assert error <= limit * scale, f"{name}: error {error:.2e}, largest entry {scale:.2e}"


def network(nonlinearity="tanh", bias=True, alpha=1.0, cls=RNN, **options):
    torch.manual_seed(1)
    options |= {} if alpha == 1 else {"alpha": alpha}
    return cls(I, H, nonlinearity=nonlinearity, bias=bias, dtype=torch.float64, **options)


def resets(rows=B):
    """(T, rows): some at the first step, some later, one row twice in a row."""
    reset = torch.zeros(T, rows, dtype=torch.bool)
    reset[0, 0] = reset[3, -1] = reset[4, -1] = reset[5, 0] = True
    return reset


def losses(last_only=False, rows=B):
    """dL/dh_t, (T, rows, H)."""
    g = randn(T, rows, H, seed=3)
    return torch.cat([torch.zeros_like(g[1:]), g[-1:]]) if last_only else g


def by_rtrl(net, x, g, hx=None, reset=None, method="exact"):
    """Gradients of sum g_t h_t that RTRL leaves in the parameters and hx, step by step."""
    leaves = [*net.parameters(), *([] if hx is None else [hx])]
    for leaf in leaves:
        leaf.grad = None
    trainer = RTRL(net, method)
    trainer.start(hx)
    for t in range(len(x)):
        h = trainer.step(x[t], None if reset is None else reset[t])
        (h * g[t]).sum().backward()
    return [leaf.grad for leaf in leaves]


def by_loop(net, x, g, hx=None, reset=None):
    """The same from the definition, by autograd through a loop over all steps."""
    leaves = [*net.parameters(), *([] if hx is None else [hx])]
    weights = {name.removesuffix("_l0"): p for name, p in net.named_parameters()}
    alpha = getattr(net, "alpha", 1.0)
    zero = torch.zeros(x.shape[1], H, dtype=torch.float64)
    start = weights["h0"].expand_as(zero) if "h0" in weights else zero
    h, loss = start if hx is None else hx, 0
    for t in range(len(x)):
        p = h if reset is None else torch.where(reset[t][:, None], start, h)
        z = x[t] @ weights["weight_ih"].T + p @ weights["weight_hh"].T
        z = z + weights.get("bias_ih", 0) + weights.get("bias_hh", 0)
        h = (1 - alpha) * p + alpha * VALUES[net.nonlinearity](z)
        loss = loss + (h * g[t]).sum()
    return torch.autograd.grad(loss, leaves)


def by_bptt(net, x, g, hx=None, reset=None):
    """The same by the kernels."""
    leaves = [*net.parameters(), *([] if hx is None else [hx])]
    options = {"nonlinearity": net.nonlinearity, "alpha": net.alpha, "reset": reset}
    output, _ = functional.rnn(x, hx, *net._flat_weights, **options)
    return torch.autograd.grad((output * g).sum(), leaves)


def assert_all_close(net, got, expected, limit=LIMIT):
    names = [*(name for name, _ in net.named_parameters()), "hx"]
    assert len(got) == len(expected)
    for name, mine, other in zip(names, got, expected, strict=False):
        assert_close(name, mine, other, limit)


CASES = list(
    itertools.product(VALUES, (1.0, 0.3), (False, True), (False, True), (False, True), (1, 3))
)


@pytest.mark.parametrize(("nonlinearity", "alpha", "bias", "reset", "last_only", "rows"), CASES)
def test_the_sum_over_steps_is_the_gradient_of_bptt(
    nonlinearity, alpha, bias, reset, last_only, rows
):
    net = network(nonlinearity, bias, alpha)
    x, hx = randn(T, rows, I), randn(rows, H, seed=2).requires_grad_()
    problem = net, x, losses(last_only, rows), hx, resets(rows) if reset else None
    got = by_rtrl(*problem)
    assert_all_close(net, got, by_loop(*problem))
    assert_all_close(net, got, by_bptt(*problem))


@pytest.mark.parametrize("nonlinearity", VALUES)
def test_many_steps(nonlinearity):
    """200 steps of wider layers, whose C_t shrink vectors: a term's roundings shrink with it."""
    torch.manual_seed(0)
    net = RNN(5, 17, nonlinearity=nonlinearity, dtype=torch.float64)
    x, g = randn(200, 2, 5), randn(200, 2, 17, seed=1)
    assert_all_close(net, by_rtrl(net, x, g), by_bptt(net, x, g))


def test_states_are_those_of_the_layer():
    net = network(alpha=0.3)
    x, hx, reset = randn(T, B, I), randn(B, H, seed=2), resets()
    output, _ = net(x, hx[None], reset=reset)
    for method in ("exact", "snap1"):
        trainer = RTRL(net, method)
        trainer.start(hx)
        states = torch.stack([trainer.step(x[t], reset[t]) for t in range(T)])
        assert_close("states", states, output)


@pytest.mark.parametrize("cls", [RNN, nn.RNN, RNNCell, nn.RNNCell])
@pytest.mark.parametrize("bias", [False, True])
def test_every_kind_of_cell(cls, bias):
    net = network(cls=cls, bias=bias)
    x, g, hx = randn(T, B, I), losses(), randn(B, H, seed=2).requires_grad_()
    assert_all_close(net, by_rtrl(net, x, g, hx), by_loop(net, x, g, hx))


def test_one_row_without_a_batch():
    net, g, reset = network(), losses(rows=1), resets(1)
    x, hx = randn(T, 1, I), randn(1, H, seed=2).requires_grad_()
    flat = hx.detach()[0].requires_grad_()
    got = by_rtrl(net, x[:, 0], g[:, 0], flat, reset[:, 0])
    *expected, grad_hx = by_loop(net, x, g, hx, reset)
    assert_all_close(net, got, [*expected, grad_hx[0]])
    assert RTRL(net).step(x[0, 0]).shape == (H,)


@pytest.mark.parametrize("hx", [False, True])
@pytest.mark.parametrize("shape", [None, (), (H,), (1, H)], ids=str)
def test_a_learned_initial_state_and_a_learned_alpha(hx, shape):
    """h0 takes the place of zeros at the start, unless hx is given, and at every reset."""
    net = network(alpha=0.3)
    net.h0 = nn.Parameter(randn(1, H, seed=4))
    if shape is not None:
        net.alpha = nn.Parameter(torch.rand(shape, dtype=torch.float64) * 0.8 + 0.1)
    hx = randn(B, H, seed=2).requires_grad_() if hx else None
    x, g, reset = randn(T, B, I), losses(), resets()
    expected = by_loop(net, x, g, hx, reset)
    assert all(gradient.abs().max() > 1e-3 for gradient in expected)
    assert_all_close(net, by_rtrl(net, x, g, hx, reset), expected)


def test_an_alpha_per_unit_that_is_not_learned():
    net = network(alpha=0.3)
    del net.alpha
    net.register_buffer("alpha", torch.tensor([0.1, 0.4, 0.7, 1.0], dtype=torch.float64))
    x, g = randn(T, B, I), losses()
    assert_all_close(net, by_rtrl(net, x, g), by_loop(net, x, g))


def test_finite_differences():
    """Central ones with a step of e = 1e-5.

    Truncation: e^2 = 1e-10 times a third derivative of order ten. Rounding: 1e-16 / e = 1e-11 of
    the loss, which is below ten.
    """
    net = network("sigmoid", alpha=0.6)
    x, g, hx, reset = randn(T, B, I), losses(), randn(B, H, seed=2), resets()

    @torch.no_grad()
    def loss():
        trainer = RTRL(net)
        trainer.start(hx)
        return sum((trainer.step(x[t], reset[t]) * g[t]).sum() for t in range(T)).item()

    leaves = [*net.parameters(), hx.requires_grad_()]
    gradients = by_rtrl(net, x, g, hx, reset)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        flat, step = leaf.data.view(-1), 1e-5
        for n in range(0, len(flat), 3):
            kept = flat[n].item()
            values = []
            for moved in (kept + step, kept - step):
                flat[n] = moved
                values.append(loss())
            flat[n] = kept
            difference = (values[0] - values[1]) / (2 * step)
            assert difference == pytest.approx(gradient.view(-1)[n].item(), abs=3e-9)


# --- SnAp-1, and weights that change between steps ------------------------------------------------


def by_jacobians(net, x, g, hx, mask, change=lambda step: None):
    """Gradients of one row, from S_t = mask (dh_t/dh_{t-1} S_{t-1} + dh_t/dtheta).

    Both factors are autograd's Jacobians of one step of nn.RNNCell; theta is all its parameters in
    one vector.
    """
    names, shapes = zip(*((name, p.shape) for name, p in net.named_parameters()), strict=True)
    sizes = [shape.numel() for shape in shapes]
    S, h, total = torch.zeros(H, sum(sizes), dtype=torch.float64), hx, 0
    for t in range(len(x)):

        def one_step(h, theta, t=t):
            parts = map(torch.Tensor.view, theta.split(sizes), shapes)
            values = dict(zip(names, parts, strict=True))
            return torch.func.functional_call(net, values, (x[t], h))

        theta = torch.cat([p.detach().flatten() for p in net.parameters()])
        across, at_once = torch.autograd.functional.jacobian(one_step, (h, theta))
        S = mask * (across @ S + at_once)
        h = one_step(h, theta).detach()
        total = total + g[t] @ S
        change(t)
    return [part.view(shape) for part, shape in zip(total.split(sizes), shapes, strict=True)]


def own_parameters(net):
    """(H, P) of zeros and ones: which entries of theta belong to which unit."""
    unit = torch.cat([torch.arange(H).repeat_interleave(p.numel() // H) for p in net.parameters()])
    return (unit == torch.arange(H)[:, None]).double()


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("method", ["exact", "snap1"])
def test_the_sensitivity_by_one_step_jacobians(method, nonlinearity):
    net = network(nonlinearity, cls=nn.RNNCell)
    x, g, hx = randn(T, I), losses(rows=1)[:, 0], randn(H, seed=2)
    mask = own_parameters(net) if method == "snap1" else 1
    got = by_rtrl(net, x, g, hx, method=method)[:4]
    assert_all_close(net, got, by_jacobians(net, x, g, hx, mask))
    other = by_rtrl(net, x, g, hx, method="exact" if method == "snap1" else "snap1")
    assert (got[1] - other[1]).abs().max() > 0.1 * got[1].abs().max()


@pytest.mark.parametrize("alpha", [1.0, 0.3])
@pytest.mark.parametrize("nonlinearity", VALUES)
def test_snap1_is_exact_where_the_recurrent_matrix_is_diagonal(nonlinearity, alpha):
    """No unit then acts on another; entries beside the diagonal have a gradient all the same."""
    net = network(nonlinearity, alpha=alpha)
    net.h0 = nn.Parameter(randn(1, H, seed=4))
    net.weight_hh_l0.data = torch.diag(torch.tensor([0.9, -0.5, 0.3, 0.7], dtype=torch.float64))
    x, g, hx = randn(T, B, I), losses(), randn(B, H, seed=2).requires_grad_()
    exact = by_rtrl(net, x, g, hx, resets())
    assert_all_close(net, by_rtrl(net, x, g, hx, resets(), method="snap1"), exact)


@pytest.mark.parametrize("method", ["exact", "snap1"])
def test_weights_that_change_at_every_step(method):
    """S_t then holds every step's derivative at the weights of that step."""
    net = network(cls=nn.RNNCell)
    x, g, hx = randn(T, I), losses(rows=1)[:, 0], randn(H, seed=2)
    before = copy.deepcopy(net.state_dict())

    def change(step):
        for n, p in enumerate(net.parameters()):
            p.data += 0.1 * randn(*p.shape, seed=10 * step + n)

    mask = own_parameters(net) if method == "snap1" else 1
    expected = by_jacobians(net, x, g, hx, mask, change)
    assert not torch.equal(net.weight_hh, before["weight_hh"])
    net.load_state_dict(before)
    net.zero_grad()
    trainer = RTRL(net, method)
    trainer.start(hx)
    for t in range(T):
        (trainer.step(x[t]) * g[t]).sum().backward()
        change(t)
    assert_all_close(net, [p.grad for p in net.parameters()], expected)


def test_an_optimizer_step_at_every_time_step_learns():
    """The next value of a sine from the one before it: its square error falls to a hundredth."""
    torch.manual_seed(0)
    cell, readout = RNNCell(1, 8), nn.Linear(8, 1)
    optimizer = torch.optim.Adam([*cell.parameters(), *readout.parameters()], lr=0.01)
    trainer, errors = RTRL(cell), []
    wave = torch.sin(0.3 * torch.arange(801.0))[:, None, None]
    for x, target in itertools.pairwise(wave):
        loss = nn.functional.mse_loss(readout(trainer.step(x)), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(loss.item())
    assert sum(errors[-50:]) < 0.01 * sum(errors[:50])


# --- as a part of autograd ------------------------------------------------------------------------


def test_one_backward_of_all_steps_is_the_sum():
    net, x, g = network(), randn(T, B, I), losses()
    expected = by_rtrl(net, x, g)
    trainer = RTRL(net)
    loss = sum((trainer.step(x[t]) * g[t]).sum() for t in range(T))
    assert_all_close(net, torch.autograd.grad(loss, list(net.parameters())), expected)


def test_a_readout_on_top_and_a_frozen_parameter():
    net, readout, x = network(), nn.Linear(H, 2, dtype=torch.float64), randn(T, B, I)
    net.weight_ih_l0.requires_grad_(False)
    trainer = RTRL(net)
    loss = sum(readout(trainer.step(x[t])).square().sum() for t in range(T))
    loss.backward()
    assert net.weight_ih_l0.grad is None
    leaves = [*list(net.parameters())[1:], *readout.parameters()]
    output, _ = net(x)
    expected = torch.autograd.grad(readout(output).square().sum(), leaves)
    assert_all_close(net, [leaf.grad for leaf in leaves], expected)


def test_steps_without_gradients_are_carried_on():
    net, x, g = network(), randn(T, B, I), losses(last_only=True)
    trainer = RTRL(net)
    with torch.no_grad():
        for t in range(T - 1):
            assert not trainer.step(x[t]).requires_grad
    (trainer.step(x[-1]) * g[-1]).sum().backward()
    assert_all_close(net, [p.grad for p in net.parameters()], by_bptt(net, x, g))


def test_a_state_is_a_tensor_of_its_own():
    net, x = network(), randn(2, B, I)
    with torch.no_grad():
        trainer, spoilt = RTRL(net), RTRL(net)
        trainer.step(x[0])
        spoilt.step(x[0]).fill_(9)
        assert torch.equal(trainer.step(x[1]), spoilt.step(x[1]))


def test_what_a_reset_drops_may_be_infinite():
    net = network("identity")
    x = randn(T, B, I)
    x[1, 0] = torch.inf
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[3, 0] = True
    trainer = RTRL(net)
    for t in range(T):
        h = trainer.step(x[t], reset[t])
    h.sum().backward()
    clean = x.clone()
    clean[1, 0] = 0
    expected = by_loop(net, clean, torch.ones(T, B, H) * (torch.arange(T) == T - 1)[:, None, None],
                       reset=reset)  # fmt: skip
    assert_all_close(net, [p.grad for p in net.parameters()], expected)


def test_start_forgets():
    net, x, g = network(), randn(T, B, I), losses()
    expected = by_rtrl(net, x, g)
    trainer = RTRL(net)
    trainer.step(randn(5, I))
    trainer.start()
    assert trainer.nbytes == 0
    loss = sum((trainer.step(x[t]) * g[t]).sum() for t in range(T))
    assert_all_close(net, torch.autograd.grad(loss, list(net.parameters())), expected)


def test_gradients_reach_what_a_parametrization_is_made_of():
    net, x, g = network(cls=RNNCell), randn(T, B, I), losses()
    parametrizations.weight_norm(net, "weight_hh")
    got = by_rtrl(net, x, g)
    h, total = None, 0
    for t in range(T):
        h = net(x[t], h)
        total = total + (h * g[t]).sum()
    assert_all_close(net, got, torch.autograd.grad(total, list(net.parameters())))


def test_autocast_changes_nothing():
    net, x, g = network().float(), randn(T, B, I).float(), losses().float()
    expected = by_rtrl(net, x, g)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = by_rtrl(net, x, g)
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


def test_a_second_derivative_raises():
    net = network()
    (gradient,) = torch.autograd.grad(
        RTRL(net).step(randn(B, I)).square().sum(), net.weight_hh_l0, create_graph=True
    )
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_memory_is_as_stated_and_does_not_grow(dtype):
    net = RNN(I, H, dtype=dtype)
    for method, per_row in (("exact", H * H * (I + H + 1)), ("snap1", H * (I + H + 1))):
        trainer = RTRL(net, method)
        for _ in range(20):
            h = trainer.step(torch.zeros(B, I, dtype=dtype))
            assert h.dtype == dtype
            assert trainer.nbytes == B * per_row * dtype.itemsize


@pytest.mark.parametrize("method", ["exact", "snap1"])
@pytest.mark.parametrize(("rows", "features"), [(0, 3), (2, 0), (0, 0)])
def test_sizes_of_zero(rows, features, method):
    cell = RNNCell(features, 4)
    trainer = RTRL(cell, method)
    for _ in range(2):
        h = trainer.step(torch.zeros(rows, features), torch.zeros(rows, dtype=torch.bool))
    h.sum().backward()
    assert h.shape == (rows, 4)
    assert cell.weight_ih.grad.shape == (4, features)
    assert (cell.bias_hh.grad != 0).any() == (rows > 0)


def test_example_in_the_docstring():
    failed, tried = doctest.testmod(rtrl, extraglobs={"torch": torch})
    assert tried > 0
    assert failed == 0


def test_example_in_the_documentation():
    page = (Path(__file__).parents[1] / "docs" / "rtrl.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    names = {}
    exec(block, names)
    assert names["h"].shape == (8, 32)
    assert names["rtrl"].nbytes == 4 * 8 * 32**2 * (3 + 32 + 1)


# --- wrong inputs ---------------------------------------------------------------------------------


class Derived(nn.RNNCell):
    pass


WRONG_CELLS = {
    "LSTM": (lambda: nn.LSTM(3, 4), TypeError, "an RNNCell or an RNN.*got torch.nn.*LSTM"),
    "GRUCell": (lambda: nn.GRUCell(3, 4), TypeError, "got torch.nn.*GRUCell"),
    "derived": (lambda: Derived(3, 4), TypeError, "not of a class derived from it.*Derived"),
    "no module": (lambda: "tanh", TypeError, "got builtins.str"),
    "bfloat16": (lambda: RNN(3, 4, dtype=torch.bfloat16), TypeError, "float32 or torch.float64"),
    "layers": (lambda: RNN(3, 4, num_layers=2), ValueError, "num_layers=1, got 2: .*use BPTT"),
    "both ways": (lambda: nn.RNN(3, 4, bidirectional=True), ValueError, "bidirectional=False"),
    "truncate": (lambda: RNN(3, 4, truncate=5), ValueError, "truncate=None, got 5: .*use BPTT"),
    "clip": (lambda: RNN(3, 4, clip_grad_h=1.0), ValueError, "clip_grad_h=None, got 1.0"),
    "nonlinearity": (lambda: RNNCell(3, 4, True, "cos"), ValueError, "Unknown nonlinearity 'cos'"),
}


@pytest.mark.parametrize("kind", WRONG_CELLS)
def test_wrong_cells(kind):
    make, error, message = WRONG_CELLS[kind]
    with pytest.raises(error, match=f"(?s){message}"):
        RTRL(make())


@pytest.mark.parametrize("option", ["checkpoint", "recurrent_dropout", "noise"])
def test_an_option_of_the_layer_that_rtrl_does_not_have(option):
    net = RNN(3, 4)
    setattr(net, option, 0.5)
    with pytest.raises(ValueError, match=f"cell must have {option}=.*, got 0.5"):
        RTRL(net)


@pytest.mark.parametrize("make", [RNN, RNNCell, nn.RNN, nn.RNNCell])
@pytest.mark.parametrize("kind", [prune.identity, nn.utils.spectral_norm])
def test_weights_of_a_forward_pre_hook_are_refused(make, kind):
    """At once, or where the hook came later; when it has gone, and beside other hooks, all goes."""
    cell = make(3, 4)
    weight = "weight_hh" if isinstance(cell, nn.RNNCellBase) else "weight_hh_l0"
    cell.register_forward_pre_hook(lambda module, args: None)
    trainer = RTRL(cell)
    trainer.step(torch.zeros(2, 3))
    kind(cell, weight)
    message = f"cell must have {weight} as a parameter, got one that a forward pre-hook computes"
    for call in (lambda: RTRL(cell), lambda: trainer.step(torch.zeros(2, 3))):
        with pytest.raises(ValueError, match=message):
            call()
    {prune.identity: prune.remove}.get(kind, nn.utils.remove_spectral_norm)(cell, weight)
    for _ in range(2):
        trainer.step(torch.zeros(2, 3)).sum().backward()


def test_a_wrong_method():
    with pytest.raises(ValueError, match="method must be 'exact' or 'snap1', got 'snap2'"):
        RTRL(network(), "snap2")


WRONG_STEPS = {  # x, reset, after a first step of (B, I)
    "list": (lambda: [1.0] * I, None, TypeError, "x must be a tensor of torch.float64, got list"),
    "dtype": (lambda: torch.zeros(B, I), None, TypeError, "float64, got torch.float32"),
    "device": (lambda: randn(B, I).to("meta"), None, ValueError, "device of cell.*cpu.*got meta"),
    "features": (lambda: randn(B, I + 1), None, ValueError, r"expected I = 4, got \(3, 5\)"),
    "sequence": (lambda: randn(T, B, I), None, ValueError, r"\(B, I\) or \(I,\)"),
    "gradient": (lambda: randn(B, I).requires_grad_(), None, ValueError, r"x.detach\(\)"),
    "rows": (lambda: randn(B + 1, I), None, ValueError, r"expected 3, got 4: start\(\)"),
    "reset dtype": (lambda: randn(B, I), torch.zeros(B), TypeError, "reset must be a tensor of"),
    "reset shape": (
        *(lambda: randn(B, I), torch.zeros(B + 1, dtype=torch.bool), ValueError),
        r"reset must have one entry per row, expected \(3,\), got \(4,\)",
    ),
}


@pytest.mark.parametrize("kind", WRONG_STEPS)
def test_wrong_steps_change_nothing(kind):
    make, reset, error, message = WRONG_STEPS[kind]
    trainer, other, x = RTRL(network()), RTRL(network()), randn(2, B, I)
    trainer.step(x[0])
    other.step(x[0])
    with pytest.raises(error, match=message):
        trainer.step(make(), reset)
    assert torch.equal(trainer.step(x[1]), other.step(x[1]))


def test_a_cell_that_changed_its_dtype():
    net = network()
    trainer = RTRL(net)
    trainer.step(randn(B, I))
    net.float()
    with pytest.raises(TypeError, match="x after the first step must be"):
        trainer.step(randn(B, I).float())


WRONG_STARTS = {
    "list": (lambda: [0.0] * H, TypeError, "hx must be a tensor of torch.float64, got list"),
    "dtype": (lambda: torch.zeros(B, H), TypeError, "got torch.float32"),
    "device": (lambda: randn(B, H).to("meta"), ValueError, "got meta"),
    "features": (lambda: randn(B, H + 1), ValueError, r"expected H = 4, got \(3, 5\)"),
    "stacked": (lambda: randn(1, B, H), ValueError, r"\(B, H\) or \(H,\)"),
    "no leaf": (lambda: randn(B, H).requires_grad_() * 2, ValueError, "must be a leaf"),
}


@pytest.mark.parametrize("kind", WRONG_STARTS)
def test_wrong_starts(kind):
    make, error, message = WRONG_STARTS[kind]
    with pytest.raises(error, match=message):
        RTRL(network()).start(make())


def test_rows_that_are_not_those_of_hx():
    trainer = RTRL(network())
    trainer.start(randn(B, H))
    with pytest.raises(ValueError, match=r"rows of hx, expected \(3, 4\), got \(5, 4\)"):
        trainer.step(randn(5, I))
    with pytest.raises(ValueError, match=r"rows of hx, expected \(3, 4\), got \(4,\)"):
        trainer.step(randn(I))


def test_the_way_round_for_a_computed_hx():
    """What the message for a computed hx advises."""
    net, x, g = network(), randn(T, B, I), losses()
    seed = randn(B, H, seed=2).requires_grad_()
    leaf = (seed * 2).detach().requires_grad_()
    by_rtrl(net, x, g, leaf)
    (seed * 2).backward(leaf.grad)
    output, _ = net(x, (seed * 2)[None])
    assert_close("seed", seed.grad, torch.autograd.grad((output * g).sum(), seed)[0])


def test_public_name():
    assert torch_bptt.rtrl.RTRL is RTRL
