"""examples/maml.py: its tasks, its gradient through gradient steps, and that it learns to learn."""

import argparse
import re
import runpy

import pytest
import scripts
import torch

pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

SCRIPT = scripts.EXAMPLES / "maml.py"
ARGS = argparse.Namespace(
    steps=60, tasks=8, inner_steps=2, rate=0.1, delays=2, sequences=4, length=10, hidden=16,
    lr=1e-2, judged=50, seed=0,
)  # fmt: skip


@pytest.fixture(scope="module")
def example():
    return runpy.run_path(str(SCRIPT))


def test_end_to_end(tmp_path):
    """A process of its own, where neither a terminal nor a screen is there."""
    done = scripts.run(SCRIPT, "--quick", "--out", tmp_path)
    assert done.stderr == ""
    assert (tmp_path / "maml.png").read_bytes().startswith(b"\x89PNG")
    assert f"picture: {tmp_path / 'maml.png'}" in done.stdout
    assert "MAML: update 20/20" in done.stdout
    for name in ("MAML", "trained on all tasks", "not trained"):
        assert re.search(rf"^{name} +[\d.]+( +[\d.]+){{4}}$", done.stdout, re.M), done.stdout


def test_the_tasks(example):
    """The answers are what a convolution gives, and new tasks are others."""
    tasks = example["Tasks"](ARGS, 0)
    u, y, u_other, y_other = tasks(3)
    assert u.shape == y.shape == u_other.shape == y_other.shape == (3, 10, 4, 1)
    for task in range(3):
        # The coefficients by least squares from one sequence, and with them all the others.
        def past(u, task=task):
            flat = torch.nn.functional.pad(u[task, ..., 0], (0, 0, 2, 0))  # (2 + T, K)
            return torch.stack([flat[1:-1], flat[:-2]], -1)  # u_{t-1}, u_{t-2}

        c = torch.linalg.lstsq(past(u)[:, 0], y[task, :, 0]).solution
        # float32: an answer is a sum of two terms of order 1, the solution of 10 rows as good.
        torch.testing.assert_close(past(u) @ c, y[task], rtol=0, atol=1e-5)
        torch.testing.assert_close(past(u_other) @ c, y_other[task], rtol=0, atol=1e-5)
    assert not torch.allclose(tasks(3)[0], u)


def test_the_gradient_through_gradient_steps(example):
    """Against one task at a time, with a loop over time, and autograd.grad for every inner step."""
    torch.manual_seed(0)
    network = example["Filter"](5).double()
    tasks = tuple(part.double() for part in example["Tasks"](ARGS, 0)(3))
    weights = dict(network.named_parameters())
    losses = example["meta_loss"](network, weights, tasks, 0.3, 2)
    got = torch.autograd.grad(losses[-1], weights.values())

    def loss(weights, u, y):
        w_ih, w_hh, b_ih, b_hh, readout, bias = weights
        h, total = torch.zeros(u.shape[1], 5, dtype=u.dtype), 0
        for u_t, y_t in zip(u, y, strict=True):
            h = torch.tanh(u_t @ w_ih.T + h @ w_hh.T + b_ih + b_hh)
            total = total + (h @ readout.T + bias - y_t).square().sum()
        return total / y.numel()

    every = []
    for u, y, u_other, y_other in zip(*tasks, strict=True):
        adapted = list(weights.values())
        for _ in range(2):
            slopes = torch.autograd.grad(loss(adapted, u, y), adapted, create_graph=True)
            adapted = [w - 0.3 * slope for w, slope in zip(adapted, slopes, strict=True)]
        every.append(loss(adapted, u_other, y_other))
    expected = torch.stack(every).mean()
    # float64, 10 steps and three passes through them, numbers of order 1: below 1e3 roundings.
    torch.testing.assert_close(losses[-1], expected, rtol=0, atol=1e-12)
    for mine, other in zip(got, torch.autograd.grad(expected, list(weights.values())), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


def test_it_learns_to_learn(example, capsys):
    """After as many updates, what adapts best is what was trained to."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        networks = [example["Filter"](ARGS.hidden) for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    example["train"](networks[0], ARGS.inner_steps, ARGS, "MAML")
    example["train"](networks[1], 0, ARGS, "all")
    _, maml = example["judge"](networks[0], (ARGS.rate,), ARGS)
    _, pretrained = example["judge"](networks[1], example["RATES"], ARGS)
    assert len(maml) == 1 + 2 * ARGS.inner_steps
    assert maml[ARGS.inner_steps] < 0.5 * pretrained[ARGS.inner_steps]
    assert maml[ARGS.inner_steps] < 0.3 * maml[0]


WRONG = {
    "steps": ("--steps 0", "argument --steps: invalid count value: '0'"),
    "rate": ("--rate inf", "argument --rate: invalid positive value: 'inf'"),
    "length": ("--length 4", "--length must be above --delays = 4, got 4"),
    "unknown": ("--speed 9", "unrecognized arguments: --speed 9"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_options(kind):
    options, message = WRONG[kind]
    assert message in scripts.error_of(SCRIPT, *options.split())
