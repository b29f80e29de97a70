"""docs/leaky-units.md is true: its code runs from top to bottom, and its mathematics holds."""

import re
from collections.abc import Iterator
from pathlib import Path
from types import CodeType

import numpy as np
import pytest
import torch

PAGE = (Path(__file__).parents[1] / "docs" / "leaky-units.md").read_text(encoding="utf-8")


def blocks() -> Iterator[CodeType]:
    """The Python blocks, with the line numbers of the page."""
    for found in re.finditer(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL):
        above = "\n" * PAGE.count("\n", 0, found.start(1))
        yield compile(above + found[1], "docs/leaky-units.md", "exec")


@pytest.fixture(scope="module")
def names() -> dict:
    """All names of the page after its code ran."""
    names = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for block in blocks():
            exec(block, names)
    return names


def test_the_code_runs(names: dict) -> None:
    assert len(list(blocks())) >= 10
    assert {"LeakyRNN", "ported", "Dale", "currents", "loss"} <= names.keys()


def test_the_port_has_the_gradients_of_the_loop(names: dict) -> None:
    """float64, T = 50: sums of at most 50 * 4 terms near 1, so 1e-12 is far above rounding."""
    torch.manual_seed(0)
    loop = names["LeakyRNN"](3, 16, 10.0, 100.0).double()
    rnn = names["ported"](loop).double()
    with torch.no_grad():  # ported made float32 copies of float64 weights
        for mine, theirs in zip(
            rnn.parameters(),
            (loop.input2h.weight, loop.h2h.weight, loop.input2h.bias, loop.h2h.bias),
            strict=True,
        ):
            mine.copy_(theirs)  # fmt: skip
    u = torch.randn(50, 4, 3, dtype=torch.float64)
    seed = torch.randn(50, 4, 16, dtype=torch.float64)
    (loop(u)[0] * seed).sum().backward()
    (rnn(u)[0] * seed).sum().backward()
    pairs = {
        "weight_ih_l0": loop.input2h.weight,
        "weight_hh_l0": loop.h2h.weight,
        "bias_ih_l0": loop.input2h.bias,
        "bias_hh_l0": loop.h2h.bias,
    }
    for name, theirs in pairs.items():
        torch.testing.assert_close(getattr(rnn, name).grad, theirs.grad, rtol=1e-12, atol=1e-12)


def current_loop(drive, x, weight, alpha, f):
    """x_t = (1 - alpha) x_{t-1} + alpha (W f(x_{t-1}) + v_t), as it stands on the page."""
    steps = []
    for v in drive:
        x = (1 - alpha) * x + alpha * (f(x) @ weight.T + v)
        steps.append(x)
    return torch.stack(steps)


@pytest.mark.parametrize("nonlinearity", ["relu", "tanh", "sigmoid"])
@pytest.mark.parametrize("alpha", [0.1, 0.7, 1.0])
def test_currents_are_exact(names: dict, nonlinearity: str, alpha: float) -> None:
    """Values and gradients; float64 with |W| ~ 1, T = 60: a contraction, or nearly: 1e-11."""
    torch.manual_seed(1)
    f = getattr(torch, nonlinearity)
    made = [torch.randn(60, 3, 12), torch.randn(3, 12), 0.3 * torch.randn(12, 12)]
    mine, theirs = ([v.double().clone().requires_grad_() for v in made] for _ in range(2))
    x = names["currents"](*mine, alpha, nonlinearity)
    expected = current_loop(*theirs, alpha, f)
    seed = torch.randn_like(x)
    torch.testing.assert_close(x, expected, rtol=1e-11, atol=1e-11)
    (x * seed).sum().backward()
    (expected * seed).sum().backward()
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-11, atol=1e-11)


def test_the_argument_of_f_is_a_current(names: dict) -> None:
    """x_t = z_{t+1} obeys the current's equation with v_t = (c_{t+1} - (1 - a) c_t) / a."""
    rng, a = np.random.default_rng(0), 0.2
    weight, c = 0.3 * rng.standard_normal((8, 8)), rng.standard_normal((40, 8))
    r, z = np.zeros(8), []
    for c_t in c:
        z.append(weight @ r + c_t)
        r = (1 - a) * r + a * np.tanh(z[-1])
    for t in range(39):
        v = (c[t + 1] - (1 - a) * c[t]) / a
        expected = (1 - a) * z[t] + a * (weight @ np.tanh(z[t]) + v)
        np.testing.assert_allclose(z[t + 1], expected, rtol=0, atol=1e-13)


def test_fixed_points_and_their_stability_are_shared() -> None:
    rng = np.random.default_rng(0)
    weight, v = 0.4 * rng.standard_normal((8, 8)) / np.sqrt(8), rng.standard_normal(8)
    r = x = np.zeros(8)
    for _ in range(2000):
        r = 0.9 * r + 0.1 * np.tanh(weight @ r + v)
        x = 0.9 * x + 0.1 * (weight @ np.tanh(x) + v)
    np.testing.assert_allclose(x, weight @ r + v, atol=1e-12)
    np.testing.assert_allclose(r, np.tanh(x), atol=1e-12)
    slopes = np.diag(1 - r * r)
    ours, theirs = (np.linalg.eigvals(m) for m in (slopes @ weight, weight @ slopes))
    np.testing.assert_allclose(np.sort_complex(ours), np.sort_complex(theirs), atol=1e-12)


def test_it_is_not_equivalent_where_the_page_says_so(names: dict) -> None:
    torch.manual_seed(0)
    drive, x_0, weight = (
        torch.randn(shape, dtype=torch.float64) for shape in ((60, 3, 12), (3, 12), (12, 12))
    )
    expected = current_loop(drive, x_0, weight, 0.1, torch.tanh)
    same = torch.eye(12, dtype=torch.float64)
    r, _ = names["functional"].rnn(drive, None, same, weight, alpha=0.1)
    assert (r - expected.tanh()).abs().max() > 0.1, "the same input without the filter"

    # One alpha per unit: the map, written out, misses.
    alpha = torch.linspace(0.05, 0.5, 12, dtype=torch.float64)
    expected = current_loop(drive, x_0, weight, alpha, torch.tanh)
    r, s, misses = torch.zeros_like(x_0), x_0, []
    for v, x in zip(drive, expected, strict=True):
        r = (1 - alpha) * r + alpha * torch.tanh(r @ weight.T + s)
        s = (1 - alpha) * s + alpha * v
        misses.append((r @ weight.T + s - x).abs().max())
    assert max(misses) > 0.1


@pytest.mark.parametrize("alpha", [0.1, 0.5])
def test_noise_inside_f_is_that_much_larger(alpha: float) -> None:
    """White noise s in z, against the current's s, filtered: sqrt((2 - a) / a) times.

    The fluctuation of 4000 x 200 numbers, correlated over 1 / a steps, is known to about 1 %.
    """
    rng, s = np.random.default_rng(0), np.sqrt(2 / alpha)
    x, xs = np.zeros(200), []
    for noise in s * rng.standard_normal((4000, 200)):
        x = (1 - alpha) * x + alpha * noise
        xs.append(x)
    filtered = np.std(xs[200:])
    assert filtered == pytest.approx(np.sqrt(2 / (2 - alpha)), rel=0.02)
    assert s / filtered == pytest.approx(np.sqrt((2 - alpha) / alpha), rel=0.02)


def test_the_files_it_names_exist() -> None:
    root = Path(__file__).parents[1]
    named = set(re.findall(r"`((?:docs|examples|csrc|tests)/[\w./-]+)`", PAGE))
    assert named
    assert not [name for name in named if not (root / name).exists()]
