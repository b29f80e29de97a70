"""Products of Jacobians, exponents and weights against autograd, numpy and powers of matrices."""

import doctest
import math
import sys

import numpy as np
import pytest
import torch
from pairs import randn
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from torch_bptt import RNN, diagnose

ACTIVATIONS = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "identity": lambda z: z,
}


def linear(weight, activation="identity", bias=0.0, alpha=1.0):
    """One layer with this W_hh; every unit gets the one input and its bias."""
    weight = torch.as_tensor(weight, dtype=torch.float64)
    rnn = RNN(1, len(weight), nonlinearity=activation, alpha=alpha).double()
    with torch.no_grad():
        rnn.weight_hh_l0.copy_(weight)
        rnn.weight_ih_l0.fill_(1)
        rnn.bias_ih_l0.copy_(torch.as_tensor(bias, dtype=torch.float64))
        rnn.bias_hh_l0.zero_()
    return rnn


def orthogonal(size, seed=0):
    return torch.linalg.qr(randn(size, size, seed=seed)).Q


def jacobians(rnn, x, hx):
    """{(layer, reverse): [J_0, J_1, ...]} of one row by autograd, in the order of processing."""
    inputs, found = x, {}
    directions = (False, True) if rnn.bidirectional else (False,)
    for layer in range(rnn.num_layers):
        outputs = []
        for reverse in directions:
            ending = f"_l{layer}{'_reverse' if reverse else ''}"
            names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            w_ih, w_hh, b_ih, b_hh = (getattr(rnn, name + ending).detach() for name in names)
            alpha = torch.as_tensor(rnn.alpha, dtype=torch.float64).detach()
            alpha = alpha[len(found)] if alpha.dim() == 2 else alpha

            def step(h, x, alpha=alpha, w_ih=w_ih, w_hh=w_hh, b=b_ih + b_hh):
                f = ACTIVATIONS[rnn.nonlinearity](w_ih @ x + w_hh @ h + b)
                return (1 - alpha) * h + alpha * f

            h, states, own = hx[len(found)], {}, []
            for t in range(len(x))[:: -1 if reverse else 1]:
                own.append(torch.autograd.functional.jacobian(lambda h, x=inputs[t]: step(h, x), h))
                h = states[t] = step(h, inputs[t])
            found[layer, reverse] = own
            outputs.append(torch.stack([states[t] for t in range(len(x))]))
        inputs = torch.cat(outputs, -1)
    return found


@pytest.mark.parametrize("window", [1, 4, 11, None])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"nonlinearity": "relu"},
        {"nonlinearity": "sigmoid", "alpha": 0.25},
        {"nonlinearity": "identity", "bidirectional": True},
        {"num_layers": 2, "bidirectional": True, "alpha": 0.6},
        {"alpha": torch.tensor([0.1, 0.4, 0.7, 1.0])},
        {"num_layers": 2, "alpha": torch.tensor([[0.1, 0.4, 0.7, 1.0], [1.0, 1, 0.5, 0.5]])},
        {"recurrent_dropout": 0.5, "noise": 0.1, "truncate": 2, "clip_grad_h": 1e-3},
    ],
    ids=str,
)
def test_singular_values_are_those_of_the_products_by_autograd(options, window):
    torch.manual_seed(0)
    rnn = RNN(3, 4, **options).double()
    x, hx = randn(11, 2, 3), randn(rnn.num_layers * (1 + rnn.bidirectional), 2, 4, seed=1)
    spectrum = diagnose.jacobian_spectrum(rnn, x, hx, window=window)
    window = window or 11
    for b in range(2):
        expected = jacobians(rnn, x[:, b], hx[:, b])
        assert [(own.layer, own.reverse) for own in spectrum] == list(expected)
        for own, steps in zip(spectrum, expected.values(), strict=True):
            assert own.singular_values.shape == (11 // window, 2, 4)
            for w in range(11 // window):
                product = np.eye(4)
                for jacobian in steps[w * window : (w + 1) * window]:
                    product = jacobian.numpy() @ product
                values = np.linalg.svd(product, compute_uv=False)
                # Products of 11 matrices with entries of order 1: rounding in the ones that are
                # much smaller than the largest is relative to that.
                np.testing.assert_allclose(
                    own.singular_values[w, b], values, rtol=1e-9, atol=1e-13 * values[0]
                )


def test_one_sequence_batch_first_float32_and_no_hx():
    torch.manual_seed(0)
    rnn = RNN(3, 4).double()
    x = randn(9, 2, 3)
    expected = diagnose.jacobian_spectrum(rnn, x, torch.zeros(1, 2, 4).double(), exponents=4)[0]
    cases = {
        "no hx": (rnn, x, None),
        "one": (rnn, x[:, 0], torch.zeros(1, 4).double()),
    }
    rnn_batch_first = RNN(3, 4, batch_first=True).double()
    rnn_batch_first.load_state_dict(rnn.state_dict())
    cases["batch_first"] = rnn_batch_first, x.transpose(0, 1), None
    cases["one, batch_first"] = rnn_batch_first, x[:, 0], None
    for name, (module, input, hx) in cases.items():
        got = diagnose.jacobian_spectrum(module, input, hx, exponents=4)[0]
        rows = slice(0, 1) if name.startswith("one") else slice(None)
        for attribute in ("log_singular_values", "lyapunov"):
            mine, other = getattr(got, attribute), getattr(expected, attribute)
            other = other[:, rows] if attribute == "log_singular_values" else other[rows]
            torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)

    # Parameters that float32 holds exactly: the network is then the same one.
    narrow = RNN(3, 4)
    narrow.load_state_dict(rnn.state_dict())
    wide = RNN(3, 4).double()
    wide.load_state_dict(narrow.state_dict())
    got = diagnose.jacobian_spectrum(narrow, x.float())[0].singular_values
    expected = diagnose.jacobian_spectrum(wide, x.float().double())[0].singular_values
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    assert narrow.weight_hh_l0.dtype == torch.float32


def test_long_windows_neither_overflow_nor_vanish():
    x = torch.zeros(3000, 1, 1).double()
    for factor in (0.5, 2.0):  # 2^3000 is far outside of float64
        layer = diagnose.jacobian_spectrum(linear(factor * orthogonal(5)), x, exponents=5)[0]
        # Every step rounds by a few 1e-16.
        expected = torch.full((1, 1, 5), 3000 * math.log(factor), dtype=torch.float64)
        torch.testing.assert_close(layer.log_singular_values, expected, rtol=1e-9, atol=0)
        torch.testing.assert_close(layer.lyapunov, expected[0] / 3000, rtol=1e-9, atol=0)
        torch.testing.assert_close(
            layer.rates, torch.full((1, 1, 5), factor).double(), rtol=1e-9, atol=0
        )


def test_what_float64_cannot_tell_from_zero_is_zero():
    x = torch.zeros(30, 1, 1).double()
    layer = diagnose.jacobian_spectrum(linear(torch.diag(torch.tensor([1.0, 0.1]))), x)[0]
    assert layer.singular_values.tolist() == [[[1, 0]]]  # 1e-30 next to 1
    assert layer.log_singular_values[0, 0, 1] == -math.inf
    dead = linear(orthogonal(3), "relu", bias=[-9.0, -9, -9])
    layer = diagnose.jacobian_spectrum(dead, x, window=1, exponents=3)[0]
    assert (layer.log_singular_values == -math.inf).all()
    assert (layer.lyapunov == -math.inf).all()
    half = linear(orthogonal(3), "relu", bias=[9.0, -9, 9])
    layer = diagnose.jacobian_spectrum(half, x + 9, window=1, exponents=3)[0]
    assert (layer.lyapunov == -math.inf).tolist() == [[False, False, True]]
    flat = orthogonal(3) @ torch.diag(torch.tensor([1.0, 1, 0]).double()) @ orthogonal(3, seed=1)
    layer = diagnose.jacobian_spectrum(linear(flat), x, exponents=3)[0]
    assert (layer.lyapunov == -math.inf).tolist() == [[False, False, True]]


def test_exponents_add_up_to_the_mean_of_log_det():
    torch.manual_seed(0)
    rnn = RNN(3, 4, alpha=0.5).double()
    x, hx = randn(20, 1, 3), randn(1, 1, 4, seed=1)
    own = jacobians(rnn, x[:, 0], hx[:, 0])[0, False]
    volumes = [np.linalg.slogdet(jacobian.numpy())[1] for jacobian in own]
    got = diagnose.jacobian_spectrum(rnn, x, hx, exponents=4)[0].lyapunov
    assert got.sum().item() == pytest.approx(np.mean(volumes), abs=1e-12)
    got = diagnose.jacobian_spectrum(rnn, x, hx, exponents=4, skip=5)[0].lyapunov
    assert got.sum().item() == pytest.approx(np.mean(volumes[5:]), abs=1e-12)


def test_exponents_are_those_of_another_start_once_the_axes_have_turned():
    """Axes from any start turn to the same ones, at e^(difference of two exponents) per step."""
    torch.manual_seed(0)
    rnn = RNN(2, 4).double()
    with torch.no_grad():
        rnn.weight_hh_l0.mul_(3)
    x, hx, skip = randn(500, 1, 2), randn(1, 1, 4, seed=1), 300
    axes, total = np.eye(4), np.zeros(4)
    for t, jacobian in enumerate(jacobians(rnn, x[:, 0], hx[:, 0])[0, False]):
        axes, triangle = np.linalg.qr(jacobian.numpy() @ axes)
        total += (t >= skip) * np.log(abs(np.diag(triangle)))
    expected = total / 200
    gaps = expected[:-1] - expected[1:]
    assert np.exp(-skip * gaps.min()) < 1e-10
    got = diagnose.jacobian_spectrum(rnn, x, hx, exponents=3, skip=skip)[0].lyapunov
    np.testing.assert_allclose(got[0], expected[:3], rtol=0, atol=1e-9)


def test_exponents_of_a_linear_network_are_the_logs_of_its_eigenvalues():
    basis, moduli = randn(4, 4), torch.tensor([1.2, 0.9, 0.5, 0.1]).double()
    weight = basis @ torch.diag(moduli) @ basis.inverse()
    # Axes turn by at least 0.9/1.2 per step: 1e-12 is left after 100 steps.
    layer = diagnose.jacobian_spectrum(linear(weight), randn(200, 1, 1), exponents=4, skip=100)[0]
    np.testing.assert_allclose(layer.lyapunov[0], moduli.log(), rtol=0, atol=1e-9)


# What a text says about linear networks, and where it does not hold.


def norms_back(rnn, steps, row):
    """Norms of dL/dh_t for L = row . h_T, from the last step back, by autograd through a loop."""
    h = torch.zeros(rnn.hidden_size).double().requires_grad_()
    states = []
    w_ih, w_hh, b = rnn.weight_ih_l0, rnn.weight_hh_l0, rnn.bias_ih_l0 + rnn.bias_hh_l0
    for _ in range(steps):
        h = ACTIVATIONS[rnn.nonlinearity](w_ih @ torch.ones(1).double() + w_hh @ h + b)
        states.append(h)
    return [g.norm().item() for g in torch.autograd.grad(h @ row, states)][::-1]


@pytest.mark.parametrize("radius", [0.9, 1.1])
def test_linear_gradients_vanish_below_radius_1_and_explode_above(radius):
    weight = randn(6, 6)
    weight *= radius / np.abs(np.linalg.eigvals(weight.numpy())).max()
    rnn, steps = linear(weight), 300
    assert diagnose.weights(rnn)[0].spectral_radius == pytest.approx(radius, rel=1e-12)
    with diagnose.gradient_flow(rnn) as flow:
        output, _ = rnn(torch.ones(steps, 1, 1).double())
        output[-1, 0, 0].backward()
    got = flow[0].norms[:, 0].flip(0)
    power, expected = np.eye(6)[0], []
    for _ in range(steps):
        expected.append(np.linalg.norm(power))
        power = weight.T.numpy() @ power
    # 300 products of 6 terms, each of which rounds by 1.1e-16 of numbers below 10 times the sum.
    np.testing.assert_allclose(got, expected, rtol=1e-9)
    assert got[-1] < 1e-10 if radius < 1 else got[-1] > 1e10
    # The largest exponent says the same at once.
    exponent = diagnose.jacobian_spectrum(rnn, torch.ones(steps, 1, 1), skip=150)[0].lyapunov
    assert (exponent < 0) == (radius < 1)


def test_counterexample_radius_below_1_grows_at_first():
    rnn = linear([[0.9, 10], [0, 0.9]])
    assert diagnose.weights(rnn)[0].spectral_radius == pytest.approx(0.9, rel=1e-12)
    said = {1: 10.1, 5: 32.8, 10: 38.7, 50: 2.9}
    for k, value in said.items():
        layer = diagnose.jacobian_spectrum(rnn, randn(k, 1, 1))[0]
        got = layer.singular_values[0, 0, 0].item()
        assert round(got, 1) == value
        power = np.linalg.matrix_power([[0.9, 10], [0, 0.9]], k)
        assert got == pytest.approx(np.linalg.norm(power, 2), rel=1e-12)


def test_counterexample_radius_below_1_explodes_with_a_nonlinearity():
    rnn = linear([[1.5, -2], [1, -1]], "relu", bias=[1.0, -1e9])
    assert diagnose.weights(rnn)[0].spectral_radius == pytest.approx(math.sqrt(0.5), rel=1e-12)
    layer = diagnose.jacobian_spectrum(rnn, torch.ones(40, 1, 1), window=40, exponents=2, skip=1)[0]
    # With the second unit off, J = [[1.5, -2], [0, 0]], and J^k = 1.5^(k-1) J.
    expected = 1.5**39 * math.hypot(1.5, 2)
    assert layer.singular_values[0, 0].tolist() == pytest.approx([expected, 0], rel=1e-12)
    assert layer.lyapunov[0].tolist() == pytest.approx([math.log(1.5), -math.inf], rel=1e-12)
    report = diagnose.report(rnn, lambda: rnn(torch.ones(40, 1, 1).double())[0][-1, 0, 0])
    assert any("explodes" in finding for finding in report.findings)
    assert report.as_dict()["layers"][0]["growth"] == pytest.approx(1.5, rel=1e-2)


@pytest.mark.parametrize("activation", ["tanh", "relu", "sigmoid", "identity"])
@pytest.mark.parametrize("seed", range(5))
def test_a_bound_below_1_bounds_the_gradient(activation, seed):
    weight = randn(5, 5, seed=seed)
    steepest = 0.25 if activation == "sigmoid" else 1
    weight *= 0.95 / (steepest * np.linalg.norm(weight.numpy(), 2))
    rnn = linear(weight, activation, bias=randn(5, seed=seed + 100))
    bound = diagnose.weights(rnn)[0].bound
    assert bound == pytest.approx(0.95, rel=1e-12)
    row = randn(5, seed=seed + 200)
    norms = norms_back(rnn, 100, row)
    limits = [row.norm().item() * bound**k for k in range(100)]
    assert all(got <= limit * (1 + 1e-12) for got, limit in zip(norms, limits, strict=True))
    layer = diagnose.jacobian_spectrum(rnn, torch.ones(100, 1, 1))[0]
    assert layer.rates.max() <= bound * (1 + 1e-12)


def test_weights_are_those_of_numpy():
    torch.manual_seed(0)
    rnn = RNN(3, 7, 2, bidirectional=True, nonlinearity="sigmoid", alpha=0.3)
    found = diagnose.weights(nn.Sequential(rnn))
    endings = ["_l0", "_l0_reverse", "_l1", "_l1_reverse"]
    assert [own.label for own in found] == [
        "0, layer 0", "0, layer 0 reverse", "0, layer 1", "0, layer 1 reverse",
    ]  # fmt: skip
    for own, ending in zip(found, endings, strict=True):
        weight = getattr(rnn, f"weight_hh{ending}").detach().double().numpy()
        moduli = np.sort(abs(np.linalg.eigvals(weight)))[::-1]
        np.testing.assert_allclose(own.eigenvalues.abs(), moduli, rtol=1e-12)
        assert own.spectral_radius == pytest.approx(moduli[0], rel=1e-12)
        sigma_max = np.linalg.norm(weight, 2)
        assert own.sigma_max == pytest.approx(sigma_max, rel=1e-12)
        assert own.bound == pytest.approx(0.7 + 0.3 / 4 * sigma_max, rel=1e-12)


def test_the_bound_with_a_leak_of_its_own_for_each_unit():
    alpha = torch.tensor([[0.1, 0.4, 0.7, 1.0], [1.0, 1, 0.5, 0.5]]).double()
    rnn = RNN(3, 4, 2, alpha=alpha).double()
    for own, a in zip(diagnose.weights(rnn), alpha, strict=True):
        weight = getattr(rnn, f"weight_hh_l{own.layer}").detach()
        expected = (1 - a).max().item() + np.linalg.norm(np.diag(a) @ weight.numpy(), 2)
        assert own.bound == pytest.approx(expected, rel=1e-12)
        for seed in range(20):  # no slopes in [0, 1] give a longer Jacobian
            slopes = randn(4, seed=seed).abs().clamp(max=1)
            jacobian = torch.diag(1 - a) + (a * slopes)[:, None] * weight
            assert np.linalg.norm(jacobian.numpy(), 2) <= own.bound


def test_hx_is_the_learned_one_when_none_is_given():
    torch.manual_seed(0)
    rnn = RNN(3, 4, 2, learn_h0=True).double()
    nn.init.normal_(rnn.h0)
    x = randn(6, 2, 3)
    got = diagnose.jacobian_spectrum(rnn, x)
    expected = diagnose.jacobian_spectrum(rnn, x, rnn.h0[:, None].expand(2, 2, 4))
    for mine, other in zip(got, expected, strict=True):
        assert torch.equal(mine.singular_values, other.singular_values)


def test_weights_that_are_not_finite():
    rnn = linear([[math.nan, 1], [0, 1]])
    (own,) = diagnose.weights(rnn)
    assert math.isnan(own.spectral_radius)
    assert math.isnan(own.sigma_max)
    assert math.isnan(own.bound)


def test_no_rows():
    layer = diagnose.jacobian_spectrum(RNN(3, 4), torch.zeros(5, 0, 3), window=2, exponents=2)[0]
    assert layer.singular_values.shape == (2, 0, 4)
    assert layer.lyapunov.shape == (0, 2)


X = torch.zeros(6, 2, 3)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((nn.RNN(3, 4), X), {}, TypeError, r"got torch.nn.modules.rnn.RNN: RNN.from_torch\(rnn\)"),
        ((nn.Linear(3, 4), X), {}, TypeError, "rnn must be a torch_bptt.RNN, got .*Linear$"),
        ((RNN(3, 4), pack_sequence([X[:, 0]])), {}, TypeError, "input must be .* PackedSequence"),
        ((RNN(3, 4), X.long()), {}, TypeError, "floating dtype, got torch.int64"),
        ((RNN(3, 4), X[..., :2]), {}, RuntimeError, "Expected 3, got 2"),
        ((RNN(3, 4), X[:0]), {}, RuntimeError, "sequence length to be larger than 0"),
        ((RNN(3, 4), X, torch.zeros(1, 3, 4)), {}, RuntimeError, "Expected hidden size"),
        ((RNN(3, 4), X), {"window": 0}, ValueError, "window must be an int from 1 to 6, got 0"),
        ((RNN(3, 4), X), {"window": 7}, ValueError, "window must be an int from 1 to 6, got 7"),
        ((RNN(3, 4), X), {"window": 2.0}, TypeError, "window must be an int .*, got 2.0"),
        ((RNN(3, 4), X), {"exponents": 5}, ValueError, "from 1 to 4, got 5"),
        ((RNN(3, 4), X), {"exponents": True}, TypeError, "from 1 to 4, got True"),
        ((RNN(3, 4), X), {"skip": 6}, ValueError, "skip must be an int from 0 to 5, got 6"),
        ((RNN(3, 4), X * math.nan), {}, RuntimeError, "finite, got nan in layer 0 at step 0"),
    ],
)
def test_errors_of_jacobian_spectrum(arguments, options, error, words):
    with pytest.raises(error, match=words):
        diagnose.jacobian_spectrum(*arguments, **options)


def test_examples_in_docstrings_run():
    module = sys.modules["torch_bptt._spectrum"]
    failed, tried = doctest.testmod(module, extraglobs={"torch": torch})
    assert tried > 0
    assert failed == 0
