"""autograd.rnn_layer: derivatives of every order, and everything PyTorch may ask of a function.

Derivatives are judged by finite differences (gradcheck) where they are derivatives of the result,
and by autograd through ``loop_by_rows`` where truncation or clipping says otherwise.
"""

import subprocess
import sys
import textwrap

import pytest
import torch
from cases import EVERYTHING, Case, Problem, computed, grid, one_step, problem
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import normal
from test_reference import loop_by_rows
from tolerances import error_of, floor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from torch_bptt import reference
from torch_bptt.autograd import Options, rnn_layer

TINY = Case(T=4, B=2, I=2, H=3)
NAMES = Problem.INPUTS


def run_layer(
    *operands, batch_sizes=None, keep=None, alpha=None, restart=None, mask=None, noise=None,
    probe=None, **options,
):  # fmt: skip
    links = batch_sizes, keep, Options(**options)
    return rnn_layer(*operands, *links, alpha, restart, mask, noise, probe)


def layer(p):
    """The function under test with a problem's options, of the tensors with a gradient alone."""

    return lambda *inputs: call(p, inputs)


def call(p, inputs, **changes):
    operands, others = p.named(inputs)
    return run_layer(*operands, **p.layer_options | others | changes)


def by_loop(p):
    return lambda *inputs: loop_by_rows(p, *inputs)


def by_reference(p):
    def function(*inputs):
        operands, others = p.named(inputs)
        return reference.rnn_forward(*operands, **p.forward_options | others)[:2]

    return function


def leaves(p):
    return [t if t is None else t.clone().requires_grad_() for t in p.inputs]


def assert_close(got, expected, what=""):
    # float64 and fewer than 1000 roundings in a network that does not amplify.
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10, msg=lambda m: f"{what}: {m}")


# --- derivatives of the result: finite differences ------------------------------------------------

FORWARD_AND_REVERSE = {
    "check_forward_ad": True,
    "check_batched_grad": True,
    "check_batched_forward_grad": True,
    "check_undefined_grad": True,
}


@pytest.mark.parametrize("case", grid(TINY, truncate=0, clip=None), ids=str)
def test_gradcheck(case):
    p = problem(case)
    assert gradcheck(layer(p), leaves(p), **FORWARD_AND_REVERSE)


@pytest.mark.parametrize(
    "absent", [{"h0": False}, {"bias": False}, {"h0": False, "bias": False}], ids=str
)
@pytest.mark.parametrize(
    "options", [{}, {"alpha": 0.3, "packed": True, "keep": True, "reverse": True}], ids=str
)
def test_gradcheck_without_h0_or_bias(options, absent):
    p = problem(TINY.but(**options, **absent))
    assert gradcheck(layer(p), leaves(p), **FORWARD_AND_REVERSE)
    assert gradgradcheck(layer(p), leaves(p), fast_mode=True)


@pytest.mark.parametrize("options", [{}, {"alpha": 0.3, "keep": True, "reverse": True}], ids=str)
def test_gradcheck_of_one_step(options):
    p = one_step(problem(TINY.but(T=1, **options)))
    assert gradcheck(layer(p), leaves(p), **FORWARD_AND_REVERSE)
    assert gradgradcheck(layer(p), leaves(p), check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("case", grid(TINY, truncate=0, clip=None), ids=str)
def test_gradgradcheck(case):
    """Random projections of the second derivative, reverse over reverse and forward over
    reverse.
    """
    p = problem(case)
    assert gradgradcheck(layer(p), leaves(p), check_fwd_over_rev=True, fast_mode=True)


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(
    st.builds(
        Case,
        T=st.integers(1, 4),
        B=st.integers(1, 3),
        I=st.integers(1, 3),
        H=st.integers(1, 3),
        activation=st.sampled_from(["tanh", "relu", "sigmoid", "identity"]),
        alpha=st.sampled_from([1.0, 0.3]) | st.floats(0.05, 1.0),
        packed=st.booleans(),
        keep=st.booleans(),
        extra=st.booleans(),
        reverse=st.booleans(),
        bias=st.booleans(),
        h0=st.booleans(),
    ),
    st.integers(0, 1000),
)
def test_any_options_pass_both_checks(case, seed):
    p = problem(case, seed=seed)
    assert gradcheck(layer(p), leaves(p), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(layer(p), leaves(p), check_fwd_over_rev=True)


# --- what truncation and clipping define: autograd through a loop that detaches and clamps
# ----------


def derivatives(function, p, order):
    """Results and gradients up to an order, each of a random projection of the ones before."""
    random = torch.Generator().manual_seed(1)
    inputs = leaves(p)
    asked = [t for t in inputs if t is not None]
    results = list(function(*inputs))
    everything = [results]
    for _ in range(order):
        last = everything[-1]
        directions = [normal(t, random) for t in last]
        scalar = sum((t * v).sum() for t, v in zip(last, directions, strict=True))
        options = {"create_graph": order > 1, "materialize_grads": True}
        everything.append(list(torch.autograd.grad(scalar, asked, **options)))
    return everything


@pytest.mark.parametrize(
    "case",
    [
        *grid(TINY, activation="tanh", clip=None),
        *grid(TINY, packed=True, keep=True, reverse=True, clip=None),
        TINY.but(bias=False, h0=False, truncate=2),
        TINY.but(T=1),
        TINY.but(T=7, truncate=3, keep=True),
    ],
    ids=str,
)
def test_three_derivatives_are_those_of_the_loop(case):
    p = problem(case)
    got, expected = derivatives(layer(p), p, 3), derivatives(by_loop(p), p, 3)
    for order, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_close(a, b, f"derivative {order}, tensor {i}")


@pytest.mark.parametrize("case", grid(Case(B=3, H=5), clip=0.5), ids=str)
def test_clipped_gradients_are_those_of_the_loop(case):
    p = problem(case)
    for ours, theirs in zip(
        derivatives(layer(p), p, 1), derivatives(by_loop(p), p, 1), strict=True
    ):
        for a, b in zip(ours, theirs, strict=True):
            assert_close(a, b)


def test_clipping_has_no_second_derivative():
    p = problem(TINY.but(clip=0.5))
    inputs = leaves(p)
    output, _ = layer(p)(*inputs)
    (first,) = torch.autograd.grad(output.square().sum(), inputs[0], create_graph=True)
    (unclipped,) = torch.autograd.grad(by_loop(p)(*inputs)[0].square().sum(), inputs[0])
    assert_close(first, unclipped)
    with pytest.raises(NotImplementedError, match="clip"):
        torch.autograd.grad(first.sum(), inputs[0])


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("options", [{}, {"alpha": 0.3, "keep": True, "clip": 0.5}], ids=str)
def test_truncation_is_a_loop_of_calls_that_detaches(options, reverse):
    """Bit for bit where the order of sums is the same: everywhere but in the weights' gradients."""
    p = problem(Case(T=8, B=7, H=17, reverse=reverse, truncate=2, **options), torch.float32)
    inputs = leaves(p)
    whole = layer(p)(*inputs)
    directions = (p.grad_h, p.grad_h_n)
    expected = torch.autograd.grad(whole, inputs, directions)

    x, state, *others = inputs
    outputs = {}
    for start in (6, 4, 2, 0) if reverse else (0, 2, 4, 6):
        part = slice(start, start + 2)
        keep = None if p.keep is None else p.keep[part]
        outputs[start], state = call(p, (x[part], state, *others), keep=keep, truncate=0)
        final, state = state, state.detach()
    output = torch.cat([outputs[start] for start in sorted(outputs)])
    got = torch.autograd.grad((output, final), inputs, directions)

    for a, b in zip((output, final, *got[:2]), (*whole, *expected[:2]), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(got[2:], expected[2:], strict=True):
        assert error_of(a, b).max() <= floor(a.dtype, K=56, scale=b.abs().max().item())


@pytest.mark.parametrize("clip", [None, 0.5])  # the gradient of h0 is not clamped
def test_state_carried_between_calls_carries_its_gradient(clip):
    p = problem(Case(T=8, B=3, keep=True, clip=clip))
    inputs = leaves(p)
    x, h0, *others = inputs
    whole = layer(p)(*inputs)
    expected = torch.autograd.grad(whole, inputs, (p.grad_h, p.grad_h_n))
    one, state = call(p, (x[:3], h0, *others), keep=p.keep[:3])
    two, state = call(p, (x[3:], state, *others), keep=p.keep[3:])
    got = torch.autograd.grad((torch.cat([one, two]), state), inputs, (p.grad_h, p.grad_h_n))
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b)


# --- forward mode ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case", [*grid(TINY, activation="tanh", clip=None), TINY.but(activation="relu")], ids=str
)
def test_jvp_is_that_of_the_loop(case):
    p = problem(case)
    tangents = tuple(t.flip(0).contiguous() for t in p.inputs)
    got = jvp(layer(p), p.inputs, tangents)
    assert_close(got, jvp(by_loop(p), p.inputs, tangents))


@pytest.mark.parametrize("case", grid(TINY, activation="tanh", clip=None), ids=str)
def test_mixed_second_derivatives_are_those_of_the_loop(case):
    """Forward over reverse and reverse over forward."""
    p = problem(case)
    tangents = tuple(t.flip(0).contiguous() for t in p.inputs)
    every_input = tuple(range(6))

    def second(function):
        def loss(*inputs):
            output, h_n = function(*inputs)
            return (output * p.grad_h).square().sum() + (h_n * p.grad_h_n).sum()

        def slope(*inputs):
            return jvp(loss, inputs, tangents)[1]

        forward_over_reverse = jvp(grad(loss, every_input), p.inputs, tangents)[1]
        reverse_over_forward = grad(slope, every_input)(*p.inputs)
        return (*forward_over_reverse, *reverse_over_forward)

    for i, (a, b) in enumerate(zip(second(layer(p)), second(by_loop(p)), strict=True)):
        assert_close(a, b, f"part {i}")


@pytest.mark.parametrize("case", grid(TINY, activation="tanh", clip=None), ids=str)
def test_forward_over_forward_is_that_of_the_loop(case):
    """PyTorch alone would drop terms: it switches forward mode off around a Function's rule."""
    p = problem(case)
    tangents = tuple(t.flip(0).contiguous() for t in p.inputs)

    def second(function):
        def slope(*inputs):
            return jvp(function, inputs, tangents)

        return jvp(slope, p.inputs, p.inputs)

    got, expected = second(layer(p)), second(by_loop(p))
    for a, b in zip((*got[0], *got[1]), (*expected[0], *expected[1]), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_jvp_along_one_argument(name):
    p = problem(TINY.but(alpha=0.3, keep=True, extra=True))
    at = p.names.index(name)
    tangent = p.inputs[at].flip(0)

    def dual_result(function):
        with forward_ad.dual_level():
            inputs = list(p.inputs)
            inputs[at] = forward_ad.make_dual(inputs[at], tangent)
            return [forward_ad.unpack_dual(t).tangent for t in function(*inputs)]

    assert_close(dual_result(layer(p)), dual_result(by_loop(p)))


# --- vmap -----------------------------------------------------------------------------------------

WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
DIMS = {
    "x": {"x": 0},
    "h0": {"h0": 0},
    "weights": dict.fromkeys(WEIGHTS, 0),
    "weight_hh": {"weight_hh": 0},
    "one_bias": {"bias_hh": 0},
    "alpha": {"alpha": 0},
    "restart": {"restart": 0},
    "all": dict.fromkeys(NAMES, 0),
    "other_dims": dict.fromkeys(NAMES, 1) | {"h0": 2, "weight_hh": -1},
}


def in_dims(p, dims):
    return tuple(dims.get(name) for name in p.names)


def batched(p, dims, n=3):
    """Inputs with n variants along the given dimensions, and the n calls they stand for."""
    inputs, calls = [], [[] for _ in range(n)]
    for seed, (tensor, dim) in enumerate(zip(p.inputs, in_dims(p, dims), strict=True)):
        if dim is None:
            inputs.append(tensor)
            variants = [tensor] * n
        else:
            scale = 1 + torch.arange(n, dtype=tensor.dtype).view(n, *[1] * tensor.dim()) / (
                3 + seed
            )
            inputs.append((tensor * scale).movedim(0, dim))
            variants = list(tensor * scale)
        for call, variant in zip(calls, variants, strict=True):
            call.append(variant)
    return inputs, calls


def stacked(results):
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True))


OPTIONS = {"packed": True, "alpha": 0.3, "keep": True, "reverse": True, "extra": True}
VMAPPED = [
    (dims, case)
    for dims in DIMS
    for case in (TINY, TINY.but(**OPTIONS, truncate=2))
    if case.extra or dims not in ("alpha", "restart")
]


@pytest.mark.parametrize(("dims", "case"), VMAPPED, ids=str)
def test_vmap(case, dims):
    p, dims = problem(case), DIMS[dims]
    inputs, calls = batched(p, dims)
    got = vmap(layer(p), in_dims=in_dims(p, dims))(*inputs)
    assert_close(got, stacked(by_reference(p)(*call) for call in calls))


@pytest.mark.parametrize("packed", [False, True])
def test_vmap_over_mask_and_noise(packed):
    """As when each sample draws its own."""
    p = problem(TINY.but(**OPTIONS | {"packed": packed}))
    scale = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
    each = [(p.mask * s, p.noise * s) for s in scale]

    def gradients(mask, noise):
        def loss(*inputs):
            return sum(t.square().sum() for t in call(p, inputs, mask=mask, noise=noise))

        return grad(loss, argnums=tuple(range(len(p.inputs))))(*p.inputs)

    got = vmap(gradients)(*(torch.stack(part) for part in zip(*each, strict=True)))
    assert_close(got, stacked(gradients(*one) for one in each))


@pytest.mark.parametrize(("dims", "case"), VMAPPED, ids=str)
def test_vmap_of_gradients(case, dims):
    p, dims = problem(case), DIMS[dims]
    inputs, calls = batched(p, dims)

    def gradients(function):
        def loss(*inputs):
            output, h_n = function(*inputs)
            return (output * p.grad_h).sum() + (h_n * p.grad_h_n).square().sum()

        return grad(loss, argnums=tuple(range(len(p.inputs))))

    got = vmap(gradients(layer(p)), in_dims=in_dims(p, dims))(*inputs)
    assert_close(got, stacked(gradients(by_loop(p))(*call) for call in calls))


def test_vmap_twice():
    p = problem(TINY)
    x = torch.stack([p.x, 2 * p.x, -p.x])
    weights = torch.stack([p.weight_hh, -p.weight_hh])
    inner = vmap(layer(p), in_dims=in_dims(p, DIMS["x"]))
    x_and_weights = x, p.h0, p.weight_ih, weights, p.bias_ih, p.bias_hh
    got = vmap(inner, in_dims=in_dims(p, DIMS["weight_hh"]))(*x_and_weights)
    for i, w in enumerate(weights):
        for j, data in enumerate(x):
            expected = by_reference(p)(data, p.h0, p.weight_ih, w, p.bias_ih, p.bias_hh)
            assert_close((got[0][i, j], got[1][i, j]), expected)


def test_vmap_of_backward_over_an_empty_f():
    """f is empty without alpha; it is mapped where forward was a call for each sample."""
    p = problem(TINY)
    h, _ = by_reference(p)(*p.inputs)
    grad_h = torch.stack([p.grad_h, -2 * p.grad_h])

    def grad_x(grad_h, f):
        operands = grad_h, None, p.x, p.h0, h, f, p.weight_ih, p.weight_hh
        wanted = [True, *[False] * 7]
        return torch.ops.torch_bptt.rnn_backward(*operands, activation="tanh", wanted=wanted)[0]

    empty = torch.empty(2, 0, dtype=h.dtype)
    assert_close(vmap(grad_x)(grad_h, empty), torch.stack([grad_x(g, empty[0]) for g in grad_h]))


def test_gradients_of_each_sample():
    """The per-sample gradients of the recipe for differential privacy."""
    p = problem(Case(B=4))

    def loss(weight_hh, x, h0, function):
        biases = p.bias_ih, p.bias_hh
        output, _ = function(x[:, None], h0[:, None], p.weight_ih, weight_hh, *biases)
        return output.square().sum()

    got = vmap(lambda x, h0: grad(loss)(p.weight_hh, x, h0, layer(p)), in_dims=1)(p.x, p.h0)
    for row in range(4):
        weight_hh = p.weight_hh.clone().requires_grad_()
        value = loss(weight_hh, p.x[:, row], p.h0[:, row], by_reference(p))
        assert_close(got[row], torch.autograd.grad(value, weight_hh)[0])


@pytest.mark.parametrize(
    ("name", "case"),
    [
        *((name, TINY) for name in Problem.OPERANDS),
        *((name, TINY.but(**OPTIONS)) for name in NAMES),
    ],
    ids=str,
)
def test_jacobians_and_hessian(case, name):
    p = problem(case)
    at = p.names.index(name)

    def of_one(function):
        def value(tensor):
            inputs = list(p.inputs)
            inputs[at] = tensor
            return function(*inputs)

        return value

    def scalar(function):
        return lambda tensor: sum(t.square().sum() for t in of_one(function)(tensor))

    tensor = p.inputs[at]
    expected = torch.autograd.functional.jacobian(of_one(by_reference(p)), tensor)
    assert_close(jacrev(of_one(layer(p)))(tensor), expected)
    assert_close(jacfwd(of_one(layer(p)))(tensor), expected)
    expected = torch.autograd.functional.hessian(scalar(by_reference(p)), tensor)
    assert_close(hessian(scalar(layer(p)))(tensor), expected)
    assert_close(jacrev(jacrev(scalar(layer(p))))(tensor), expected)


# --- what autograd may ask ------------------------------------------------------------------------


@pytest.mark.parametrize("case", [Case(B=3), Case(B=3, **EVERYTHING)], ids=str)
@pytest.mark.parametrize("used", [0, 1], ids=["output", "h_n"])
def test_only_one_result_is_used(case, used):
    p = problem(case)
    results, inputs = [], leaves(p)
    for function in (layer(p), by_loop(p)):
        result = function(*inputs)[used]
        direction = (p.grad_h, p.grad_h_n)[used]
        results.append(torch.autograd.grad(result, inputs, direction, materialize_grads=True))
    assert_close(*results)


def test_gradient_of_a_sum_has_stride_zero():
    p = problem(Case(B=3))
    inputs = leaves(p)
    got = torch.autograd.grad(layer(p)(*inputs)[0].sum(), inputs)
    assert_close(got, torch.autograd.grad(by_loop(p)(*inputs)[0].sum(), inputs))


def test_backward_twice_gives_the_same_bits():
    p = problem(Case(**EVERYTHING), torch.float32)
    inputs = leaves(p)
    results = layer(p)(*inputs)
    directions = (p.grad_h, p.grad_h_n)
    first = torch.autograd.grad(results, inputs, directions, retain_graph=True)
    second = torch.autograd.grad(results, inputs, directions)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(results, inputs, directions)


@pytest.mark.parametrize("order", [1, 2])
def test_output_changed_in_place_is_noticed(order):
    p = problem(TINY)
    inputs = leaves(p)
    output, _ = layer(p)(*inputs)
    output.mul_(2) if order == 1 else output.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("name", ["x", "weight_hh"])
def test_input_changed_in_place_is_noticed(name):
    p = problem(TINY)
    inputs = leaves(p)
    output, _ = layer(p)(*inputs)
    with torch.no_grad():
        inputs[NAMES.index(name)].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_h_n_is_a_tensor_of_its_own():
    p = problem(TINY)
    output, h_n = layer(p)(*leaves(p))
    kept = output.detach().clone()
    with torch.no_grad():
        h_n.zero_()
    assert torch.equal(output, kept)


class Wanted(TorchDispatchMode):
    """Notes which gradients rnn_backward is asked for."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name() == "torch_bptt::rnn_backward":
            names = [argument.name for argument in function._schema.arguments]
            self.seen.append(list(args[names.index("wanted")]))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("flags", range(1, 256))
def test_only_wanted_gradients_are_computed(flags):
    p = problem(TINY.but(alpha=0.3, keep=True, extra=True))
    wanted = [bool(flags >> i & 1) for i in range(8)]
    inputs = [t.clone().requires_grad_(want) for t, want in zip(p.inputs, wanted, strict=True)]
    output, h_n = layer(p)(*inputs)
    with Wanted() as notes:
        torch.autograd.backward((output, h_n), (p.grad_h, p.grad_h_n))
    assert notes.seen == [[*wanted[:4], wanted[4] or wanted[5], *wanted[6:], False]]
    inputs_of_loop = leaves(p)
    expected = torch.autograd.grad(
        by_loop(p)(*inputs_of_loop), inputs_of_loop, (p.grad_h, p.grad_h_n)
    )
    for want, tensor, truth in zip(wanted, inputs, expected, strict=True):
        if want:
            assert_close(tensor.grad, truth)
        else:
            assert tensor.grad is None


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_a_graph(context):
    p = problem(TINY, torch.float32)
    expected = layer(p)(*leaves(p))
    with context():
        got = layer(p)(*leaves(p))
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
        assert not a.requires_grad
        assert b.requires_grad


def test_no_gradient_is_asked_of_constants():
    output, h_n = layer(problem(TINY))(*problem(TINY).inputs)
    assert not output.requires_grad
    assert not h_n.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_have_the_dtype_of_their_tensors(dtype):
    p = problem(Case(**EVERYTHING), dtype)
    inputs = leaves(p)
    output, h_n = layer(p)(*inputs)
    torch.autograd.backward((output, h_n), (p.grad_h, p.grad_h_n))
    assert {t.dtype for t in (output, h_n)} == {dtype}
    for name, tensor in zip(p.names, inputs, strict=True):
        assert tensor.grad.dtype == (torch.float32 if name == "alpha" else dtype)
        assert tensor.grad.shape == tensor.shape


# --- the probe ------------------------------------------------------------------------------------


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [Case(), Case(**EVERYTHING), Case(B=1), Case(B=0)], ids=str)
def test_the_gradient_of_the_probe_is_the_norm_of_every_states(case, dtype, create_graph):
    p = problem(case, dtype)
    probe = torch.zeros(p.x.shape[:-1], dtype=computed(dtype), requires_grad=True)
    inputs = leaves(p)
    results = call(p, inputs, probe=probe)
    assert_close(results, call(p, inputs), "the probe changes nothing")
    (norms,) = torch.autograd.grad(
        results, [probe], (p.grad_h, p.grad_h_n), create_graph=create_graph
    )
    exact = p.to(torch.float64)
    h, _, f = (
        t.detach().double()
        for t in torch.ops.torch_bptt.rnn_forward(*p.operands, **p.forward_options)
    )
    given = exact.grad_h, exact.grad_h_n, exact.x, exact.h0, h, f, exact.weight_ih, exact.weight_hh
    *_, expected = reference.rnn_backward(*given, **exact.backward_options, wanted=[True] * 8)
    # Chains of fewer than 100 roundings, here in networks that do not amplify.
    limit = 100 * torch.finfo(dtype).eps
    torch.testing.assert_close(norms.double(), expected, rtol=limit, atol=limit)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [0.0, 1e-36, 1e-30, 1e-19, 1e19, 1e30, torch.inf])
def test_norms_neither_overflow_nor_vanish(size, dtype, create_graph):
    """Of entries whose squares do, in float32."""
    size = size if dtype == torch.float32 else size**7
    p = problem(Case(T=1, activation="identity"), dtype)
    probe = torch.zeros(1, 7, dtype=dtype, requires_grad=True)
    output, _ = call(p, p.inputs, probe=probe)
    (norms,) = torch.autograd.grad(output, [probe], size * p.grad_h, create_graph=create_graph)
    expected = size * torch.linalg.vector_norm(p.grad_h, dim=-1)
    torch.testing.assert_close(norms, expected, rtol=20 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize(
    ("probe", "words"),
    [
        (torch.zeros(5, 6), r"expected \[5, 7\], got \[5, 6\]"),
        (torch.zeros(5, 7).double(), "Double"),
    ],
    ids=["shape", "dtype"],
)
def test_a_probe_that_does_not_fit(probe, words):
    p = problem(Case(), torch.float32)
    with pytest.raises((ValueError, RuntimeError), match=f"probe.*{words}"):
        call(p, p.inputs, probe=probe.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_differentiable_path_agrees_with_the_fused_one(dtype):
    """create_graph takes other operators for the first gradient; only rounding may tell."""
    p = problem(Case(T=6, B=3, I=4, H=17), dtype)
    inputs = leaves(p)
    results = layer(p)(*inputs)
    directions = (p.grad_h, p.grad_h_n)
    fused = torch.autograd.grad(results, inputs, directions, retain_graph=True)
    graph = torch.autograd.grad(results, inputs, directions, create_graph=True)
    # Both round the gradient of the drive to dtype once per step: 6 steps, each forgetting a
    # little.
    for a, b in zip(fused, graph, strict=True):
        torch.testing.assert_close(
            a, b, rtol=0, atol=6 * torch.finfo(dtype).eps * a.abs().max().item()
        )


@pytest.mark.parametrize("size", [{"B": 0}, {"T": 1}, {"B": 1}], ids=str)
def test_edges(size):
    p = problem(TINY.but(**size))
    assert_close(derivatives(layer(p), p, 2), derivatives(by_reference(p), p, 2))


@pytest.mark.parametrize("rows", [0, 1])
def test_edges_of_one_step(rows):
    p = one_step(problem(TINY.but(T=1, B=rows)))
    assert_close(derivatives(layer(p), p, 2), derivatives(by_reference(p), p, 2))


def test_no_steps():
    p = problem(TINY.but(T=0))
    assert_close(derivatives(layer(p), p, 1), derivatives(by_reference(p), p, 1))


# --- memory ---------------------------------------------------------------------------------------

TRAIN_ONE_STEP = """
    import resource, torch
    from torch_bptt.autograd import Options, rnn_layer

    T, B, I, H = 2000, 64, 64, 256
    MIB = 2**20

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    def inputs(T):
        shapes = (T, B, I), (1, B, H), (H, I), (H, H), (H,), (H,)
        return [torch.full(shape, 0.01).requires_grad_() for shape in shapes]

    def train(tensors, grad_output):
        output, h_n = rnn_layer(*tensors, None, None, Options("tanh"))
        output.backward(grad_output)
        return output

    train(inputs(2), torch.ones(2, B, H))  # what the first call of anything sets up
    tensors, grad_output = inputs(T), torch.ones(T, B, H)
    before = resident()
    output = train(tensors, grad_output)
    with open("/proc/self/status") as file:  # not ru_maxrss, which begins with the parent's
        peak = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    gradients = sum(t.grad.nbytes for t in tensors)
    print((peak - before - output.nbytes - gradients) / output.nbytes)
"""


@pytest.mark.cpu
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_training_memory():
    """Beyond inputs, outputs and gradients at most half the bytes of the output, at any moment."""
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(TRAIN_ONE_STEP)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) <= 0.5
