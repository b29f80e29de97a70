"""init.orthogonal_ and init.identity_: what they write, what they leave alone, what they refuse."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import torch_bptt
from torch_bptt.init import identity_, orthogonal_

MODULES = {
    "RNN": lambda **o: torch_bptt.RNN(3, 17, nonlinearity="relu", **o),
    "RNN, all of it": lambda **o: torch_bptt.RNN(3, 17, num_layers=3, bidirectional=True, **o),
    "RNN without biases": lambda **o: torch_bptt.RNN(3, 17, num_layers=2, bias=False, **o),
    "RNN, one unit": lambda **o: torch_bptt.RNN(1, 1, alpha=0.5, **o),
    "RNNCell": lambda **o: torch_bptt.RNNCell(3, 17, **o),
    "RNNCell without biases": lambda **o: torch_bptt.RNNCell(3, 17, bias=False, **o),
    "nn.RNN": lambda **o: nn.RNN(3, 17, num_layers=2, bidirectional=True, **o),
    "nn.RNNCell": lambda **o: nn.RNNCell(3, 17, **o),
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

modules = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def parameters(module, kind):
    """Copies in numpy and float64, by name, of the parameters whose names begin with kind."""
    named = module.named_parameters()
    return {n: p.detach().double().clone().numpy() for n, p in named if n.startswith(kind)}


def assert_only_written(module, before):
    """Biases are zero, W_ih is what it was before; the caller looks at W_hh."""
    after = parameters(module, "")
    assert after.keys() == before.keys()
    for name, value in after.items():
        if name.startswith("bias"):
            assert before[name].any(), name
            assert not value.any(), name
        elif not name.startswith("weight_hh"):
            np.testing.assert_array_equal(value, before[name], err_msg=name)


@dtypes
@modules
def test_orthogonal(make, dtype):
    torch.manual_seed(0)
    module = make(dtype=dtype)
    before = parameters(module, "")
    assert orthogonal_(module, 1.5) is module
    weights = parameters(module, "weight_hh")
    assert len(weights) == len(parameters(module, "weight_ih")) > 0
    for name, weight in weights.items():
        # Every entry of the product is a sum of H terms w w' of a matrix whose entries are off by
        # eps |w| (storing) and about H eps (Householder's QR, in float32 at least); rows have the
        # length 1.5, so that the sum is off by at most 2 * 1.5^2 (eps + H eps').
        size = len(weight)
        eps = torch.finfo(dtype).eps
        allowed = 4.5 * (eps + size * min(eps, torch.finfo(torch.float32).eps))
        np.testing.assert_allclose(
            weight.T @ weight, 1.5**2 * np.eye(size), rtol=0, atol=allowed, err_msg=name
        )
        assert module.get_parameter(name).dtype is dtype
    assert_only_written(module, before)


def test_orthogonal_matrices_are_those_of_torch_and_differ():
    """The same numbers in the same order as torch.nn.init; no two layers or directions alike."""
    rnn = torch_bptt.RNN(3, 17, num_layers=2, bidirectional=True)
    orthogonal_(rnn, 0.7, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    weights = parameters(rnn, "weight_hh")
    assert list(weights) == [
        "weight_hh_l0", "weight_hh_l0_reverse", "weight_hh_l1", "weight_hh_l1_reverse",
    ]  # fmt: skip
    for weight in weights.values():
        expected = nn.init.orthogonal_(torch.empty(17, 17), 0.7, generator)
        np.testing.assert_array_equal(weight, expected.double().numpy())
    for one, other in itertools.combinations(weights.values(), 2):
        assert abs(one - other).max() > 0.1


def test_orthogonal_is_not_always_a_rotation():
    """Haar's measure: half of the determinants are -1, and entries have the variance 1/H."""
    generator = torch.Generator().manual_seed(0)
    cell = torch_bptt.RNNCell(1, 4)
    draws = np.stack(
        [parameters(orthogonal_(cell, 1, generator), "weight_hh")["weight_hh"] for _ in range(400)]
    )
    # 400 coins: five standard deviations are 5 * 10. Of 400 orthogonal matrices the mean of any
    # entry is off by 5 * 0.5 / 20.
    assert abs((np.linalg.det(draws) > 0).sum() - 200) < 50
    assert abs(draws.mean(0)).max() < 0.125
    np.testing.assert_allclose((draws**2).sum(1), 1, atol=1e-5)


@dtypes
@modules
def test_identity(make, dtype):
    torch.manual_seed(0)
    module = make(dtype=dtype)
    before = parameters(module, "")
    assert identity_(module, 0.75) is module
    weights = parameters(module, "weight_hh")
    assert len(weights) == len(parameters(module, "weight_ih")) > 0
    for name, weight in weights.items():
        np.testing.assert_array_equal(weight, 0.75 * np.eye(len(weight)), err_msg=name)
    assert_only_written(module, before)


def test_an_irnn_of_scale_one_holds_its_state_and_its_gradient():
    """What it is for: 200 steps without input, and neither the state nor its gradient changes."""
    rnn = identity_(torch_bptt.RNN(2, 5, nonlinearity="relu"))
    h0 = torch.rand(1, 3, 5).add_(0.1).requires_grad_()
    _, h_n = rnn(torch.zeros(200, 3, 2), h0)
    (gradient,) = torch.autograd.grad((h_n**2).sum(), h0)
    assert torch.equal(h_n, h0)
    assert torch.equal(gradient, 2 * h0)


def test_an_orthogonal_linear_network_keeps_every_length():
    rnn = orthogonal_(torch_bptt.RNN(2, 9, nonlinearity="identity", bias=False).double())
    h0 = torch.randn(1, 3, 9, dtype=torch.float64, requires_grad=True)
    _, h_n = rnn(torch.zeros(300, 3, 2, dtype=torch.float64), h0)
    seed = torch.randn_like(h_n)
    (gradient,) = torch.autograd.grad(h_n, h0, seed)
    # 300 products, each off by at most about H^2 = 81 roundings of 1.1e-16: 2.7e-12.
    torch.testing.assert_close(h_n.norm(dim=2), h0.norm(dim=2), rtol=3e-12, atol=0)
    torch.testing.assert_close(gradient.norm(dim=2), seed.norm(dim=2), rtol=3e-12, atol=0)


@pytest.mark.parametrize("initialise", [orthogonal_, identity_])
def test_parameters_stay_leaves_and_the_same_objects(initialise):
    rnn = nn.RNN(3, 4)
    rnn.weight_ih_l0.requires_grad_(False)
    before = [(p, p.data_ptr(), p.requires_grad) for p in rnn.parameters()]
    initialise(rnn)
    after = [(p, p.data_ptr(), p.requires_grad) for p in rnn.parameters()]
    assert all(a[0] is b[0] and a[1:] == b[1:] for a, b in zip(after, before, strict=True))
    assert all(p.is_leaf for p in rnn.parameters())


@pytest.mark.parametrize("initialise", [orthogonal_, identity_])
def test_a_derived_class_is_accepted(initialise):
    class Mine(nn.RNN):
        pass

    weight = initialise(Mine(2, 6)).weight_hh_l0
    torch.testing.assert_close(weight @ weight.T, torch.eye(6), rtol=0, atol=1e-5)


@pytest.mark.parametrize("module", [nn.LSTM(2, 3), nn.GRUCell(2, 3), nn.Linear(3, 3), None])
@pytest.mark.parametrize("initialise", [orthogonal_, identity_])
def test_other_modules_are_refused(initialise, module):
    name = type(module).__name__
    message = f"^{initialise.__name__}: rnn must be an RNN or RNNCell .*, got {name}$"
    with pytest.raises(TypeError, match=message):
        initialise(module)


@pytest.mark.parametrize(
    ("factor", "error"),
    [(math.nan, ValueError), (math.inf, ValueError), ("1", TypeError), (True, TypeError)],
)
@pytest.mark.parametrize(("initialise", "name"), [(orthogonal_, "gain"), (identity_, "scale")])
def test_a_bad_factor_is_refused(initialise, name, factor, error):
    message = f"^{initialise.__name__}: {name} must be a finite number, got {factor!r}$"
    with pytest.raises(error, match=message):
        initialise(nn.RNN(2, 3), factor)


REPLACED = {  # how a weight can be something else than a parameter of the module
    "parametrized": lambda rnn, name: parametrizations.spectral_norm(rnn, name),
    "pruned": lambda rnn, name: prune.l1_unstructured(rnn, name, amount=2),
}


@pytest.mark.parametrize("replace", REPLACED.values(), ids=REPLACED)
@pytest.mark.parametrize("initialise", [orthogonal_, identity_])
def test_a_weight_that_is_no_plain_parameter_is_refused(initialise, replace):
    rnn = torch_bptt.RNN(2, 4, num_layers=2)
    replace(rnn, "weight_hh_l1")
    before = parameters(rnn, "")
    message = f"^{initialise.__name__}: weight_hh_l1 must be a plain parameter"
    with pytest.raises(ValueError, match=message):
        initialise(rnn)
    for name, value in parameters(rnn, "").items():
        np.testing.assert_array_equal(value, before[name], err_msg=f"{name} was changed")


@pytest.mark.parametrize("initialise", [orthogonal_, identity_])
def test_only_what_is_written_must_be_plain(initialise):
    rnn = torch_bptt.RNN(2, 4)
    parametrizations.weight_norm(rnn, "weight_ih_l0")
    weight = initialise(rnn).weight_hh_l0
    torch.testing.assert_close(weight @ weight.T, torch.eye(4), rtol=0, atol=1e-5)
