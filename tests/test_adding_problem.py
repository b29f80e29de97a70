"""examples/adding_problem.py: the problem, the gradients it draws, and a tiny run as users run it.

To add a wrong request, add a line to BAD_OPTIONS.
"""

import csv
import re
import runpy
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scripts
import torch

pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

SCRIPT = scripts.EXAMPLES / "adding_problem.py"
run = partial(scripts.run, SCRIPT)
INITS = ("default", "orthogonal", "identity")


@pytest.fixture(scope="module")
def example() -> SimpleNamespace:
    """The names of the script, without running it."""
    return SimpleNamespace(**runpy.run_path(str(SCRIPT)))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """One run from beginning to end: its folder and what it printed."""
    out = tmp_path_factory.mktemp("finished")
    return out, run("--quick", "--threads", 1, "--out", out).stdout


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("T", [2, 3, 10, 151])
def test_the_problem_is_the_adding_problem(example: SimpleNamespace, T: int) -> None:
    x, target = example.adding(T, 500, torch.Generator().manual_seed(0))
    assert x.shape == (T, 500, 2)
    assert target.shape == (500,)
    numbers, markers = x.double().numpy().transpose(2, 0, 1)
    numbers += 0.5
    assert 0 <= numbers.min() < 0.02 < 0.98 < numbers.max() <= 1
    assert np.isin(markers, (0, 1)).all()
    assert (markers[: T // 2].sum(0) == 1).all()
    assert (markers[T // 2 :].sum(0) == 1).all()
    if T == 10:
        assert (markers.sum(1) > 0).all(), "every step is marked in some row"
    # Two float32 numbers, each shifted by 1/2 on its way, then added: each rounds to 6e-8 of 1.
    np.testing.assert_allclose((numbers * markers).sum(0), target, rtol=0, atol=3e-7)


def test_the_baseline(example: SimpleNamespace) -> None:
    _, target = example.adding(4, 100_000, torch.Generator().manual_seed(0))
    # The variance of (u1 + u2 - 1)^2 is 1/15 - 1/36: a standard error of 0.0006; five of them.
    assert abs(((target - 1) ** 2).mean().item() - example.BASELINE) < 0.0032


def test_networks_differ_in_recurrent_weights_and_biases_alone(example: SimpleNamespace) -> None:
    states = {}
    for init in INITS:
        torch.manual_seed(5)
        states[init] = example.Adder(init, 30).state_dict()
    default, orthogonal, identity = states.values()
    differ = {"rnn.weight_hh_l0", "rnn.bias_ih_l0", "rnn.bias_hh_l0"}
    for other in (orthogonal, identity):
        assert {n for n, value in default.items() if not torch.equal(value, other[n])} == differ
    assert torch.equal(identity["rnn.weight_hh_l0"], torch.eye(30))
    W = orthogonal["rnn.weight_hh_l0"]
    torch.testing.assert_close(W @ W.T, torch.eye(30), rtol=0, atol=1e-4)


@pytest.mark.parametrize("init", INITS)
def test_gradients_of_the_states(example: SimpleNamespace, init: str) -> None:
    """Against the definition in numpy: d_{T-1} = 2 (answer - target) v, d_{t-1} = (f' d_t) W."""
    torch.manual_seed(0)
    model = example.Adder(init, 6)
    x, target = example.adding(9, 4, torch.Generator().manual_seed(1))
    got = example.gradient_flow(model, x, target)

    W_ih, W_hh, b_ih, b_hh, v, c = (p.detach().double().numpy() for p in model.parameters())
    h, slopes = np.zeros((4, 6)), []
    for x_t in x.double().numpy():
        h = np.maximum(x_t @ W_ih.T + b_ih + h @ W_hh.T + b_hh, 0)
        slopes.append(h > 0)
    d = 2 * (h @ v.T + c - target.double().numpy()[:, None]) * v
    norms = [np.linalg.norm(d, axis=1)]
    for slope in slopes[:0:-1]:
        d = (slope * d) @ W_hh
        norms.append(np.linalg.norm(d, axis=1))
    assert got.shape == (9, 4)
    np.testing.assert_allclose(got, norms[::-1], rtol=1e-12, atol=1e-15)
    assert next(model.parameters()).dtype is torch.float32, "the model itself was changed"
    assert all(p.grad is None for p in model.parameters())


def test_numbers_of_the_curves(example: SimpleNamespace) -> None:
    losses = [float(n) for n in range(120)]
    assert example.curve(losses) == [(50, 24.5), (100, 74.5)]
    assert example.curve(losses[:3]) == [(3, 1.0)]
    norms = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 1.0]])
    assert example.flow(norms).tolist() == [5, 0, 1]


def test_end_to_end(finished: tuple[Path, str], example: SimpleNamespace) -> None:
    out, stdout = finished
    assert len(stdout.splitlines()) < 40, "a log must not be flooded"
    assert [int(n) for n in re.findall(r"^ *(\d+) %", stdout, re.MULTILINE)] == [
        *range(10, 101, 10)
    ]
    assert "error on 2000 new sequences; always answering 1 has 0.167" in stdout

    errors = {
        (row["T"], row["init"]): float(row["test_error"]) for row in table(out / "errors.csv")
    }
    assert list(errors) == [(T, init) for T in ("10", "20") for init in INITS]
    for init in INITS:
        printed = re.search(rf"^{init} +(\d\.\d+) \( *\d+%\) +(\d\.\d+) ", stdout, re.MULTILINE)
        expected = [f"{errors[T, init]:.4f}" for T in ("10", "20")]
        assert list(printed.groups()) == expected

    curves = table(out / "curves.csv")
    assert [int(row["step"]) for row in curves] == 6 * [50, 100, 150, 200, 250, 300]
    gradients = table(out / "gradients.csv")
    assert len(gradients) == 3 * (10 + 20)
    last = [float(row["relative_norm"]) for row in gradients if int(row["t"]) == int(row["T"]) - 1]
    assert last == 6 * [1.0]


def test_what_the_example_says(finished: tuple[Path, str], example: SimpleNamespace) -> None:
    """Tiny, but the same: default loses the gradient and learns nothing, identity keeps both."""
    out, _ = finished
    errors = {
        (row["T"], row["init"]): float(row["test_error"]) for row in table(out / "errors.csv")
    }
    first = {
        (row["T"], row["init"]): float(row["relative_norm"])
        for row in table(out / "gradients.csv")
        if row["t"] == "0"
    }
    assert errors["10", "identity"] < example.BASELINE / 4
    assert errors["20", "default"] > example.BASELINE / 2
    assert errors["20", "identity"] < errors["20", "default"] / 2
    assert first["20", "default"] < 1e-5
    assert 0.1 < first["20", "identity"] <= 1


def test_the_picture(finished: tuple[Path, str], example: SimpleNamespace) -> None:
    from matplotlib import image

    pixels = image.imread(finished[0] / "adding_problem.png")  # (height, width, 4), 0 to 1
    assert min(pixels.shape[:2]) > 800
    height, width = (size // 2 for size in pixels.shape[:2])
    # All three curves in each of the four panels: a line is at least some hundred pixels.
    for top, left in ((0, 0), (0, width), (height, 0), (height, width)):
        panel = pixels[top : top + height, left : left + width, :3]
        for colour in example.COLOURS.values():
            wanted = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
            assert (abs(panel - wanted).max(axis=-1) < 0.02).sum() > 300, (top, left, colour)


def test_a_ruined_training_ends_with_a_line(tmp_path: Path) -> None:
    options = ["--lengths", 5, "--hidden", 4, "--lr", 1e30, "--no-plot", "--out", tmp_path]
    stderr = run(*options, code=1).stderr
    assert re.fullmatch(
        r"adding_problem.py: error: T = 5, default: the loss became (inf|nan); "
        r"try a smaller --lr\n",
        stderr,
    )


BAD_OPTIONS = {  # options, what the message says
    "lengths": ("--lengths 1", "argument --lengths: invalid length value: '1'"),
    "hidden": ("--hidden 0", "argument --hidden: invalid count value: '0'"),
    "steps": ("--steps many", "argument --steps: invalid count value: 'many'"),
    "lr": ("--lr nan", "argument --lr: invalid positive value: 'nan'"),
    "seed": ("--seed -1", "argument --seed: invalid seed value: '-1'"),
    "unknown": ("--speed 9", "unrecognized arguments: --speed 9"),
}


@pytest.mark.parametrize("kind", BAD_OPTIONS)
def test_bad_options(kind: str) -> None:
    options, message = BAD_OPTIONS[kind]
    assert message in scripts.error_of(SCRIPT, *options.split())
