"""RNN under autocast, grad modes, torch.func, parametrizations and threads."""

import copy
import gc
import resource
import threading

import plain
import pytest
import torch
from pairs import assert_same, assert_same_run, pair, randn, run
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import pack_padded_sequence

from torch_bptt import RNN, RNNCell

# ---- autocast and dtypes


def bfloat16_close(got, expected):
    """Inputs, weights and each step's sum and result round to bfloat16: by 2^-9 of at most 4 each,
    over 5 steps of 2 layers, whose weights do not amplify."""
    torch.testing.assert_close(got, expected, rtol=0, atol=5 * 2 * 4 * 2**-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("with_hx", [False, True])
def test_autocast_narrows_what_nn_rnn_narrows(dtype, with_hx):
    ours, theirs = (module.float() for module in pair(3, 4, 2, bidirectional=True))
    results = []
    for module in (ours, theirs):
        input = randn(5, 2, 3).to(dtype).requires_grad_()
        hx = randn(4, 2, 4).float() if with_hx else None
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output, h_n = module(input, hx)
        results.append((output, h_n))
        (output.float().sum() + h_n.float().sum()).backward()
        assert input.grad.dtype == dtype
        assert all(parameter.grad.dtype == torch.float32 for parameter in module.parameters())
    for got, expected in zip(*results, strict=True):
        assert got.dtype == expected.dtype == torch.bfloat16
        bfloat16_close(got.float(), expected.float())


@pytest.mark.parametrize("form", ["packed", "lengths"])
def test_autocast_of_rows_of_different_lengths(form):
    ours, theirs = (module.float() for module in pair(3, 4, 2))
    input, hx, lengths = randn(5, 3, 3).float(), randn(2, 3, 4).float(), [2, 5, 1]
    packed = pack_padded_sequence(input, lengths, enforce_sorted=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = theirs(packed, hx)[1]
        got = ours(packed, hx)[1] if form == "packed" else ours(input, hx, lengths=lengths)[1]
    assert got.dtype == expected.dtype == torch.bfloat16
    bfloat16_close(got.float(), expected.float())


def test_autocast_leaves_float64_and_other_devices_alone():
    ours, _ = pair(3, 4, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ours(randn(5, 2, 3))[0].dtype == torch.float64
        assert (
            RNN(3, 4, device="meta")(torch.ones(5, 2, 3, device="meta"))[0].dtype == torch.float32
        )
        with torch.autocast("cpu", enabled=False):
            assert ours.float()(torch.ones(5, 2, 3))[0].dtype == torch.float32


def test_meta_device():
    rnn = RNN(3, 4, 2, bidirectional=True, batch_first=True, device="meta")
    output, h_n = rnn(torch.empty(2, 5, 3, device="meta"), torch.empty(4, 2, 4, device="meta"))
    assert (output.shape, h_n.shape) == ((2, 5, 8), (4, 2, 4))
    for lengths in ([3, 0], [0, 0]):
        output, h_n = rnn(torch.empty(2, 5, 3, device="meta"), lengths=lengths)
        assert (output.shape, h_n.shape) == ((2, 5, 8), (4, 2, 4))
    (output.sum() + h_n.sum()).backward()
    assert rnn.weight_hh_l1_reverse.grad.shape == (4, 4)


# ---- grad modes


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda m: m.__name__)
@pytest.mark.parametrize("options", [{}, {"lengths": [2, 5]}], ids=str)
def test_grad_modes(mode, options):
    ours, _ = pair(3, 4, 2, bidirectional=True)
    expected = ours(randn(5, 2, 3), **options)
    with mode():
        got = ours(randn(5, 2, 3), **options)
    for mine, other in zip(got, expected, strict=True):
        assert not mine.requires_grad
        assert_same("result", mine, other.detach())
    if mode is torch.inference_mode:
        assert got[0].is_inference()


def test_parameters_made_in_inference_mode():
    with torch.inference_mode():
        rnn = RNN(3, 4, dtype=torch.float64)
        assert rnn(randn(5, 2, 3))[0].shape == (5, 2, 4)


def test_retain_graph_and_backward_twice():
    ours, theirs = pair(3, 4, 2)
    for module in (ours, theirs):
        loss = module(randn(5, 2, 3))[0].pow(2).sum()
        loss.backward(retain_graph=True)
        loss.backward()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_same("gradient", mine.grad, other.grad)


@pytest.mark.parametrize("layout", ["batch", "packed"])
def test_gradient_penalty(layout):
    """The second derivative that cuDNN refuses: the gradient of the norm of a gradient."""
    ours, theirs = pair(3, 4, 2, bidirectional=True)
    gradients = []
    for module in (ours, theirs):
        x = randn(5, 2, 3).requires_grad_()
        input = x if layout == "batch" else pack_padded_sequence(x, [5, 3])
        output, h_n = module(input)
        loss = (output if layout == "batch" else output.data).pow(2).sum() + h_n.sum()
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        gradients.append(torch.autograd.grad(first.norm(), [x, *module.parameters()]))
    for mine, other in zip(*gradients, strict=True):
        assert_same("second derivative", mine, other)


def test_second_derivative_through_lengths_and_reset():
    ours, _ = pair(3, 4, 2, bidirectional=True)
    reset = torch.zeros(4, 3, dtype=torch.bool)
    reset[2, 1] = True
    inputs = (randn(4, 3, 3).requires_grad_(), randn(4, 3, 4).requires_grad_())

    def call(input, hx):
        return ours(input, hx, lengths=[2, 4, 0], reset=reset)

    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


# ---- torch.func


def named(module):
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def loss_of(module, parameters, *inputs):
    output, h_n = functional_call(module, parameters, inputs)
    return output.pow(2).sum() + h_n.sum()


def test_functional_call_uses_the_given_parameters():
    ours, theirs = pair(3, 4, 2)
    fresh = {name: randn(*p.shape, seed=9) for name, p in ours.named_parameters()}
    got, expected = (functional_call(m, fresh, (randn(5, 2, 3),)) for m in (ours, theirs))
    assert_same("output", got[0], expected[0])
    before = ours(randn(5, 2, 3))[0]
    assert not torch.allclose(before, got[0])
    assert_same("output with its own parameters", before, theirs(randn(5, 2, 3))[0])


def test_grad_jacobians_and_hessian():
    ours, theirs = pair(2, 3)
    x, results = randn(3, 1, 2), []
    for module in (ours, theirs):
        parameters = named(module)

        def loss(x, weight, module=module, parameters=parameters):
            return loss_of(module, {**parameters, "weight_hh_l0": weight}, x)

        weight = parameters["weight_hh_l0"]
        results.append(
            (
                grad(loss, argnums=1)(x, weight),
                jacrev(lambda x, m=module: m(x)[0])(x),
                jacfwd(lambda x, m=module: m(x)[0])(x),
                hessian(loss, argnums=1)(x, weight),
                jvp(lambda x, m=module: m(x)[0], (x,), (torch.ones_like(x),))[1],
                vjp(lambda x, m=module: m(x)[0], x)[1](torch.ones(3, 1, 3, dtype=x.dtype))[0],
            )
        )
    for mine, other in zip(*results, strict=True):
        assert_same("derivative", mine, other)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_gradient_of_each_sample(layers, bidirectional):
    """vmap over grad, which torch.nn.RNN refuses, is a loop over the samples."""
    ours, _ = pair(3, 4, layers, bidirectional=bidirectional)
    samples, parameters = randn(6, 5, 3), named(ours)
    got = vmap(grad(lambda p, x: loss_of(ours, p, x)), (None, 0))(parameters, samples)
    for i, sample in enumerate(samples):
        expected = grad(lambda p, x=sample: loss_of(ours, p, x))(parameters)
        for name in parameters:
            assert_same(name, got[name][i], expected[name])


OPTIONS = [{}, {"num_layers": 2, "bidirectional": True}, {"alpha": 0.4, "truncate": 2}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("penalty", ["grad", "vmap of grad", "ensemble", "samples of an ensemble"])
def test_autograd_comes_back_to_what_torch_func_has_differentiated(options, penalty):
    """torch.func computes a gradient by the fused operator; here it is differentiated after all."""
    net = RNN(2, 3, dtype=torch.float64, **options)
    x = randn(4, 5, 2).requires_grad_()  # 4 samples

    def loss(run, p, x):
        output, h_n = run(p, x)
        return output.pow(2).sum() + h_n.sum()

    def ours(p, x):
        return functional_call(net, p, (x,))

    def loop(p, x):
        copy = RNN(2, 3, dtype=torch.float64, **options)
        for name, value in p.items():
            delattr(copy, name)
            setattr(copy, name, value)
        output, h_n = plain.run(copy, x[:, None])
        return output[:, 0], h_n[:, 0]

    stacked = {
        name: torch.stack([p, -p]).detach().requires_grad_() for name, p in net.named_parameters()
    }
    leaves = [x, *stacked.values()]

    def chosen(network, samples):
        return {name: p[network] for name, p in stacked.items()}, x[samples]

    of_sample = grad(lambda p, x: loss(ours, p, x))
    if penalty == "grad":
        got = [of_sample(*chosen(0, 0))]
        which = [(0, 0)]
    elif penalty == "vmap of grad":
        got = unstacked(vmap(of_sample, (None, 0))(*chosen(0, slice(None))))
        which = [(0, i) for i in range(4)]
    elif penalty == "ensemble":
        got = unstacked(vmap(of_sample, (0, None))(stacked, x[0]))
        which = [(0, 0), (1, 0)]
    else:
        nested = vmap(vmap(of_sample, (None, 0)), (0, None))(stacked, x)
        got = [g for network in unstacked(nested) for g in unstacked(network)]
        which = [(network, i) for network in range(2) for i in range(4)]
    expected = []
    for pair_of in which:
        p, sample = chosen(*pair_of)
        grads = torch.autograd.grad(loss(loop, p, sample), list(p.values()), create_graph=True)
        expected.append(dict(zip(p, grads, strict=True)))
    for mine, other in zip(got, expected, strict=True):
        for name in stacked:
            assert_same(name, mine[name], other[name])
    totals = [
        sum(g.pow(2).sum() for each in grads for g in each.values()) for grads in (got, expected)
    ]
    results = [torch.autograd.grad(t, leaves, materialize_grads=True) for t in totals]
    for name, mine, other in zip(["x", *stacked], *results, strict=True):
        assert_same(f"second derivative of {name}", mine, other)


def unstacked(tensors):
    sizes = {len(t) for t in tensors.values()}
    return [{name: t[i] for name, t in tensors.items()} for i in range(sizes.pop())]


def test_autograd_inside_of_torch_func():
    """create_graph at the level that torch.func.grad then differentiates."""
    net, x = RNN(2, 3, dtype=torch.float64), randn(5, 1, 2)

    def norm_of_gradient(weight, run):
        net_with = RNN(2, 3, dtype=torch.float64)
        net_with.load_state_dict(net.state_dict())
        del net_with.weight_hh_l0
        net_with.weight_hh_l0 = weight
        output, _ = run(net_with, x)
        (inner,) = torch.autograd.grad(output.pow(2).sum(), weight, create_graph=True)
        return inner.pow(2).sum() + output.sum()

    weight = net.weight_hh_l0.detach()
    got = grad(lambda w: norm_of_gradient(w, lambda net, x: net(x)))(weight)
    assert_same("weight_hh", got, grad(lambda w: norm_of_gradient(w, plain.run))(weight))


def test_vmap_over_inputs_states_and_networks():
    ours, _ = pair(3, 4, 2)
    x, hx = randn(6, 5, 2, 3), randn(6, 2, 2, 4)
    got = vmap(ours)(x, hx)
    networks = [RNN(3, 4, 2, dtype=torch.float64) for _ in range(6)]
    stacked, _ = torch.func.stack_module_state(networks)
    many = vmap(lambda p, x: functional_call(ours, p, (x,))[0])(stacked, x)
    shared = vmap(lambda p: functional_call(ours, p, (x[0],))[0])(stacked)
    for i in range(6):
        expected = ours(x[i], hx[i])
        assert_same("output", got[0][i], expected[0])
        assert_same("h_n", got[1][i], expected[1])
        assert_same("output of a network", many[i], networks[i](x[i])[0])
        assert_same("output of a network on one input", shared[i], networks[i](x[0])[0])


def test_vmap_with_lengths_and_reset():
    ours, _ = pair(3, 4, bidirectional=True)
    x, reset = randn(6, 5, 2, 3), torch.zeros(5, 2, dtype=torch.bool)
    reset[2, 0] = True
    got = vmap(lambda x: ours(x, lengths=[2, 5], reset=reset)[0])(x)
    for i in range(6):
        assert_same("output", got[i], ours(x[i], lengths=[2, 5], reset=reset)[0])


def test_vmap_over_a_cell():
    cell = RNNCell(3, 4, dtype=torch.float64)
    x, h = randn(6, 2, 3), randn(6, 2, 4)
    got = vmap(cell)(x, h)
    for i in range(6):
        assert_same("state", got[i], cell(x[i], h[i]))


# ---- parametrizations and pruning


class Symmetric(nn.Module):
    def forward(self, weight):
        return weight.triu() + weight.triu(1).T


PARAMETRIZE = {
    "own": lambda m: parametrize.register_parametrization(m, "weight_hh_l0", Symmetric()),
    "orthogonal": lambda m: parametrizations.orthogonal(m, "weight_hh_l0"),
    "spectral_norm": lambda m: parametrizations.spectral_norm(m, "weight_hh_l0"),
    "weight_norm": lambda m: parametrizations.weight_norm(m, "weight_hh_l0"),
    "of a bias": lambda m: parametrize.register_parametrization(m, "bias_hh_l1", nn.Softplus()),
}


@pytest.mark.parametrize("apply", PARAMETRIZE.values(), ids=PARAMETRIZE)
def test_parametrizations(apply):
    ours, theirs = pair(3, 4, 2)
    for module in (ours, theirs):
        torch.manual_seed(0)
        apply(module)
        module.eval()  # in training every look at spectral_norm's weight is one more iteration
    assert isinstance(ours, RNN)
    assert all(isinstance(weight, torch.Tensor) for weight in ours._flat_weights)
    assert_same_run(run(ours, randn(5, 2, 3)), run(theirs, randn(5, 2, 3)))
    with torch.no_grad():
        for parameter in (*ours.parameters(), *theirs.parameters()):
            parameter.mul_(1.5)
    assert_same_run(run(ours, randn(5, 2, 3)), run(theirs, randn(5, 2, 3)))
    copied = copy.deepcopy(ours)
    assert_same_run(run(copied, randn(5, 2, 3)), run(theirs, randn(5, 2, 3)))


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_old_weight_norm_learns():
    ours, theirs = pair(3, 4, 2)
    for module in (ours, theirs):
        nn.utils.weight_norm(module, "weight_hh_l0")
        assert {"weight_hh_l0_g", "weight_hh_l0_v"} <= dict(module.named_parameters()).keys()
    assert_same_run(run(ours, randn(5, 2, 3)), run(theirs, randn(5, 2, 3)))
    before = ours(randn(5, 2, 3))[0]
    with torch.no_grad():
        for module in (ours, theirs):
            module.weight_hh_l0_g.mul_(2)
    assert_same_run(run(ours, randn(5, 2, 3)), run(theirs, randn(5, 2, 3)))
    assert not torch.allclose(before, ours(randn(5, 2, 3))[0])
    nn.utils.remove_weight_norm(ours, "weight_hh_l0")
    assert_same("output", ours(randn(5, 2, 3))[0], theirs(randn(5, 2, 3))[0])


def test_pruning():
    ours, theirs = pair(3, 4, 2)
    for module in (ours, theirs):
        prune.l1_unstructured(module, "weight_hh_l0", amount=0.5)
        assert module.weight_hh_l0.eq(0).sum() == 8
    assert_same_run(run(ours, randn(5, 2, 3)), run(theirs, randn(5, 2, 3)))
    prune.remove(ours, "weight_hh_l0")
    assert_same("output", ours(randn(5, 2, 3))[0], theirs(randn(5, 2, 3))[0])


# ---- threads


def test_many_threads_call_one_module():
    ours, _ = pair(8, 40, 2, bidirectional=True)
    input = randn(20, 13, 8)
    expected = run(ours, input)
    results, failures = {}, []

    def work(i):
        try:
            for _ in range(3):
                results[i] = ours(input)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for output, h_n in results.values():
        assert torch.equal(output, expected.output)
        assert torch.equal(h_n, expected.h_n)


def test_the_number_of_threads_does_not_change_a_bit():
    ours, _ = pair(8, 150, 2, bidirectional=True)
    input, before = randn(20, 26, 8), torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            runs.append(run(ours, input))
    finally:
        torch.set_num_threads(before)
    for (name, one), (_, two) in zip(*(r.tensors() for r in runs), strict=True):
        assert torch.equal(one, two), name


# ---- torch.jit and torch.export


class Head(nn.Module):
    def __init__(self, rnn, cell):
        super().__init__()
        self.rnn, self.cell = rnn, cell

    def forward(self, x):
        output, h_n = self.rnn(x)
        return output, self.cell(x[0], h_n[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_script_compiles_nn_rnn_and_says_so():
    model = Head(RNN(3, 4), RNNCell(3, 4))
    expected = model(torch.ones(5, 2, 3))
    with pytest.warns(UserWarning, match=r"compiles RNN(Cell)? as torch\.nn\.RNN") as caught:
        scripted = torch.jit.script(model)
    assert sum(warning.category is UserWarning for warning in caught) == 2
    assert [type(module) for module in model.children()] == [nn.RNN, nn.RNNCell]
    for got, other in zip(scripted(torch.ones(5, 2, 3)), expected, strict=True):
        assert_same("result", got, other, limit=6e-6)  # fewer than 100 float32 roundings
    with pytest.raises(ValueError, match=r"alpha must be 1\.0"):
        torch.jit.script(RNN(3, 4, alpha=0.5))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_trace():
    ours, _ = pair(3, 4, 2, bidirectional=True)
    traced = torch.jit.trace(ours, randn(5, 2, 3))
    for got, expected in zip(traced(randn(7, 2, 3)), ours(randn(7, 2, 3)), strict=True):
        assert_same("result", got, expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("dimension", [0, 1], ids=["steps", "batch"])
def test_export_with_a_dynamic_size(dimension):
    ours, _ = pair(3, 4, 2, bidirectional=True)
    size = torch.export.Dim("size", min=2)
    shapes = {"input": {dimension: size}}
    program = torch.export.export(ours, (randn(5, 3, 3),), dynamic_shapes=shapes)
    other = randn(9, 3, 3) if dimension == 0 else randn(5, 7, 3)
    for got, expected in zip(program.module()(other), ours(other), strict=True):
        assert_same("result", got, expected)


# ---- activation checkpointing


def test_activation_checkpointing_leaves_nothing_behind():
    """It stops the second forward by an exception; what was made until then must go."""
    rnn, input = RNN(16, 128), torch.zeros(2000, 16, 16)  # an output of 15.6 MiB

    def step():
        output, _ = torch.utils.checkpoint.checkpoint(rnn, input, use_reentrant=False)
        output.sum().backward()

    step(), step()
    before = resident()
    for _ in range(10):
        step()
    assert resident() - before < 80 * 2**20, "of ten outputs more than five are still there"


def resident():
    """Bytes of this process in memory."""
    gc.collect()
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()
