"""reference.py against autograd and torch.nn.RNN: what all other tests rest on.

The independent truth for options that nn.RNN lacks is ``loop_by_rows``: one row at a time, its
steps in a Python list, truncation by detach and clipping by a gradient hook. It shares no line and
no idea of layout with reference.py.
"""

import dataclasses

import pytest
import torch
from cases import EVERYTHING, Case, Problem, grid, lengths, problem, sized
from torch.nn.utils.rnn import PackedSequence

from torch_bptt import reference

ACTIVATIONS = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "identity": lambda z: z,
}


def loop_by_rows(p, *inputs):
    """(h, h_n) of the given tensors with a problem's options, by autograd operations alone."""
    (x, h0, weight_ih, weight_hh, bias_ih, bias_hh), others = p.named(inputs)
    alpha, restart = others["alpha"], others["restart"]
    case = p.case
    row_lengths = lengths(case) if case.packed else [case.T] * case.B
    offsets = [0, *p.batch_sizes.cumsum(0).tolist()] if case.packed else None

    def of_row(state, b):
        return state.view(-1, case.H)[b]

    def of_step(rows, t, b):
        return rows[offsets[t] + b] if case.packed else rows[t, b]

    states, finals = {}, []
    for b, length in enumerate(row_lengths):
        state = torch.zeros_like(weight_hh[0]) if h0 is None else of_row(h0, b)
        for s, t in enumerate(reversed(range(length)) if case.reverse else range(length)):
            if case.truncate and s > 0 and s % case.truncate == 0:
                state = state.detach()
            if case.keep and not p.keep[t, b]:
                state = torch.zeros_like(state) if restart is None else of_row(restart, b)
            entering = state if p.mask is None else of_row(p.mask, b) * state
            z = weight_ih @ of_step(x, t, b) + weight_hh @ entering
            z = z if bias_ih is None else z + bias_ih + bias_hh
            z = z if p.noise is None else z + of_step(p.noise, t, b)
            y = ACTIVATIONS[case.activation](z)
            state = y if alpha is None else (1 - alpha) * state + alpha * y
            if case.clip is not None and state.requires_grad:
                state.register_hook(lambda grad: grad.clamp(-case.clip, case.clip))
            states[t, b] = state
        finals.append(state)
    h_n = torch.stack(finals) if finals else weight_hh[:0]
    h_n = h_n if case.packed else h_n.unsqueeze(0)
    if not states:
        return x @ weight_ih.T, h_n
    rows = torch.stack([states[key] for key in sorted(states)])
    return (rows if case.packed else rows.view(case.T, case.B, case.H)), h_n


def assert_close(got, expected, name):
    # float64, fewer than 100 roundings in a chain that does not amplify, entries of order 1 to 100.
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11, msg=lambda m: f"{name}: {m}")


def forward_and_gradients(p):
    """The hand-written pair: (h, h_n) and the eight results of backward."""
    h, h_n, f = reference.rnn_forward(*p.operands, **p.forward_options)
    grads = reference.rnn_backward(
        p.grad_h,
        p.grad_h_n,
        p.x,
        p.h0,
        h,
        f,
        p.weight_ih,
        p.weight_hh,
        **p.backward_options,
        wanted=[True] * 8,
    )
    return (h, h_n), grads


def by_input(grads):
    """name of an input -> its gradient: both biases have the same."""
    *of_four, of_bias, of_alpha, of_restart, _norms = grads
    given = (*of_four, of_bias, of_bias, of_alpha, of_restart)
    return dict(zip(Problem.INPUTS, given, strict=True))


def check_against_loop(case):
    p = problem(case)
    outputs, grads = forward_and_gradients(p)
    leaves = [t if t is None else t.clone().requires_grad_() for t in p.inputs]
    expected = loop_by_rows(p, *leaves)
    for name, got, want in zip(("h", "h_n"), outputs, expected, strict=True):
        assert_close(got, want.detach(), name)
    asked = [leaf for leaf in leaves if leaf is not None]
    truth = torch.autograd.grad(expected, asked, (p.grad_h, p.grad_h_n), materialize_grads=True)
    kept = [name for name, leaf in zip(p.names, leaves, strict=True) if leaf is not None]
    for name, want in zip(kept, truth, strict=True):
        assert_close(by_input(grads)[name], want, name)


@pytest.mark.parametrize("case", grid(Case(T=5, B=3, I=2, H=4)), ids=str)
def test_gradients_by_hand_are_autograds(case):
    check_against_loop(case)


@pytest.mark.parametrize(
    "options", [{}, EVERYTHING, {"bias": False, "h0": False}], ids=["plain", "everything", "bare"]
)
@pytest.mark.parametrize(
    "size", [(1, 1, 1, 1), (1, 3, 2, 4), (7, 1, 3, 5), (3, 0, 2, 4), (9, 6, 2, 3)], ids=str
)
def test_edges(size, options):
    packed = options.get("packed", False) and size[1] > 0
    check_against_loop(Case(*size, **(options | {"packed": packed})))


@pytest.mark.parametrize("case", grid(Case(T=5, B=3, I=2, H=4), clip=None, truncate=0), ids=str)
def test_autograd_through_the_loop(case):
    """rnn_forward itself is differentiable, so that tests can take its derivatives of any order."""
    p = problem(case)
    leaves = [t.clone().requires_grad_() for t in p.inputs]
    operands, others = p.named(leaves)
    h, h_n, _ = reference.rnn_forward(*operands, **p.forward_options | others)
    grads = (p.grad_h, p.grad_h_n)
    got = torch.autograd.grad((h, h_n), leaves, grads, materialize_grads=True)
    _, by_hand = forward_and_gradients(p)
    for name, grad in zip(p.names, got, strict=True):
        assert_close(grad, by_input(by_hand)[name], name)


@pytest.mark.parametrize("case", grid(Case(T=5, B=3, I=2, H=4), activation="tanh"), ids=str)
def test_norms_are_those_of_the_gradient_of_every_state(case):
    """That is what reaches a state from its own step and from all later ones."""
    p = problem(case)
    leaves = [t if t is None else t.clone().requires_grad_() for t in p.inputs]
    found = {}
    h, h_n = loop_by_rows(p, *leaves)
    rows = h.grad_fn.next_functions  # the rows that torch.stack was given, in memory order
    rows = rows if case.packed else rows[0][0].next_functions
    for i, (row, _) in enumerate(rows):
        row.register_prehook(lambda grads, i=i: found.__setitem__(i, grads[0].norm()))
    torch.autograd.backward((h, h_n), (p.grad_h, p.grad_h_n))
    _, (*_, norms) = forward_and_gradients(p)
    assert_close(norms.flatten(), torch.stack([found[i] for i in range(norms.numel())]), "norms")


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_against_nn_rnn(nonlinearity, packed, reverse):
    """The second direction of a bidirectional nn.RNN is ours with reverse."""
    p = problem(Case(T=6, B=5, I=3, H=4, activation=nonlinearity, packed=packed, reverse=reverse))
    rnn = torch.nn.RNN(3, 4, nonlinearity=nonlinearity, bidirectional=True, dtype=torch.float64)
    suffix = "_reverse" if reverse else ""
    own = {
        name: getattr(rnn, f"{name}_l0{suffix}")
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    }
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(getattr(p, name))
    x, h0 = p.x.clone().requires_grad_(), p.h0.clone().requires_grad_()
    output, h_n = rnn(
        PackedSequence(x, p.batch_sizes) if packed else x, h0.view(1, 5, 4).repeat(2, 1, 1)
    )
    output = output.data if packed else output
    output, h_n = output[..., 4 * reverse : 4 * reverse + 4], h_n[int(reverse)].view_as(h0)
    leaves = (x, h0, *own.values())
    truth = torch.autograd.grad((output, h_n), leaves, (p.grad_h, p.grad_h_n))
    outputs, grads = forward_and_gradients(p)
    for name, got, want in zip(("h", "h_n"), outputs, (output, h_n), strict=True):
        assert_close(got, want.detach(), name)
    for name, want in zip(p.OPERANDS, truth, strict=True):
        assert_close(by_input(grads)[name], want, name)


@pytest.mark.parametrize(
    "case", grid(Case(T=5, B=3, I=2, H=4), activation="tanh", clip=None), ids=str
)
def test_adjoint_and_tangent_are_transposes(case):
    """<adjoint(g), (c, q0)> = <g, tangent(c, q0)>: one number that every entry of both enters."""
    p = problem(case)
    c, q0 = p.grad_h.roll(1, -1), p.grad_h_n
    d, d0, d_restart = reference.adjoint_scan(p.grad_h, p.gate, p.weight_hh, **p.adjoint_options)
    q = reference.tangent_scan(c, q0, p.gate, p.weight_hh, **p.tangent_options)
    product = (d * c).sum() + (d0 * q0).sum()
    product += 0 if p.restart is None else (d_restart * p.restart).sum()
    assert_close(product, (p.grad_h * q).sum(), "inner product")


@pytest.mark.parametrize("case", grid(Case(T=5, B=3, I=2, H=4), clip=None), ids=str)
def test_tangent_is_the_derivative(case):
    """It is forward-mode autograd's tangent of the loop, which detaches where it is truncated."""
    p = problem(case)
    h, _, f = reference.rnn_forward(*p.operands, **p.forward_options)
    gate = reference.activations[case.activation][1](h if p.alpha is None else f)
    gate = gate if p.alpha is None else p.alpha * gate
    x_dot, q0 = p.x.roll(1, -1), p.grad_h_n
    restart = {"restart": None if p.restart is None else q0.roll(1, -1)}
    got = reference.tangent_scan(
        gate * (x_dot @ p.weight_ih.T), q0, gate, p.weight_hh, **p.tangent_options | restart
    )
    moved = {"x": x_dot, "h0": q0, **({} if p.restart is None else restart)}
    _, want = torch.func.jvp(
        lambda moved: loop_by_rows(p, *(moved.get(n, getattr(p, n)) for n in p.names))[0],
        ({name: getattr(p, name) for name in moved},),
        (moved,),
    )
    assert_close(got, want, "tangent")


@pytest.mark.parametrize("case", [Case(), Case(**EVERYTHING)], ids=str)
def test_unwanted_gradients_are_empty(case):
    p = problem(case)
    h, _, f = reference.rnn_forward(*p.operands, **p.forward_options)
    arguments = (p.grad_h, p.grad_h_n, p.x, p.h0, h, f, p.weight_ih, p.weight_hh)
    _, everything = forward_and_gradients(p)
    for flags in range(256):
        wanted = [bool(flags >> i & 1) for i in range(8)]
        got = reference.rnn_backward(*arguments, **p.backward_options, wanted=wanted)
        for want, part, whole in zip(wanted, got, everything, strict=True):
            assert torch.equal(part, whole) if want else part.shape == (0,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_dtype(dtype):
    """It stays in the dtype it is given."""
    for case in sized(**EVERYTHING):
        outputs, (*grads, of_alpha, of_restart, norms) = forward_and_gradients(problem(case, dtype))
        assert {t.dtype for t in (*outputs, *grads, of_restart, norms)} == {dtype}
        assert of_alpha.dtype == torch.float32


def test_no_steps():
    """T = 0: no output, the state passes through, and so does its gradient."""
    for packed in (False, True):
        case = Case(T=0, B=0 if packed else 3, H=4, packed=packed)
        p = problem(case)
        (h, h_n), (grad_x, grad_h0, *grads) = forward_and_gradients(p)
        assert h.numel() == 0
        assert h.shape[-1] == 4
        assert grad_x.shape == p.x.shape
        assert torch.equal(h_n, p.h0)
        assert torch.equal(grad_h0, p.grad_h_n)
        assert all(not grad.any() for grad in grads)


def test_forgetting_forgets_what_is_not_finite():
    """A row that restarts leaves nothing of its state behind, and a = 1 takes no 0 * inf of it."""
    h0 = torch.tensor([[[torch.inf, torch.nan]]])
    one = torch.ones(1, 1, 2)
    restart = {"activation": "tanh", "alpha": torch.tensor([0.5, 0.5])}
    restart["keep"] = torch.tensor([[False]])
    h, _, _ = reference.rnn_forward(one, h0, torch.eye(2), torch.eye(2), None, None, **restart)
    assert torch.equal(h, 0.5 * torch.tanh(one))
    one = torch.ones(1, 1, 1)
    weights = one[0], one[0], None, None
    h, _, _ = reference.rnn_forward(one, one * torch.inf, *weights, activation="tanh")
    assert h.item() == 1


@pytest.mark.parametrize(
    "case", [Case(), Case(alpha=0.3), Case(packed=True, reverse=True), Case(keep=True)], ids=str
)
def test_a_relu_that_is_off_stops_infinite_gradients(case):
    """As torch.relu's own derivative does, which is a selection and not a product."""
    p = problem(case.but(activation="relu"))
    h, _, f = reference.rnn_forward(*p.operands, **p.forward_options)
    off = (h if p.alpha is None else f) == 0
    assert 0.1 < off.double().mean() < 0.9
    p = dataclasses.replace(p, grad_h=torch.where(off, torch.inf, p.grad_h))
    leaves = [t if t is None else t.clone().requires_grad_() for t in p.inputs]
    given = [(name, leaf) for name, leaf in zip(p.names, leaves, strict=True) if leaf is not None]
    output = loop_by_rows(p, *leaves)
    truth = torch.autograd.grad(output, [leaf for _, leaf in given], (p.grad_h, p.grad_h_n))
    grads = by_input(forward_and_gradients(p)[1])
    for (name, _), want in zip(given, truth, strict=True):
        torch.testing.assert_close(grads[name], want, rtol=1e-11, atol=1e-11, equal_nan=True)
    # Without a leak nothing else carries them on.
    assert p.alpha is not None or all(want.isfinite().all() for want in truth)
