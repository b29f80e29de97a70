"""examples/online_learning.py: as a user runs it, and its parts against other computations."""

import argparse
import re
import runpy
import sys

import pytest
import scripts
import torch

import torch_bptt

pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

SCRIPT = scripts.EXAMPLES / "online_learning.py"
NAMES = ["RTRL", "SnAp-1", "BPTT, window 3", "BPTT, window 6"]


@pytest.fixture(scope="module")
def example():
    return runpy.run_path(str(SCRIPT))


@pytest.fixture
def main(example, monkeypatch):
    """A function: options -> what main returns, run in this process."""

    def main(*options):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, options)])
        with torch.random.fork_rng():
            return example["main"]()

    return main


def test_as_a_user_runs_it(tmp_path):
    """A process of its own, where neither a terminal nor a screen is there."""
    done = scripts.run(SCRIPT, "--quick", "--out", tmp_path)
    assert done.stderr == ""
    assert (tmp_path / "online_learning.png").read_bytes().startswith(b"\x89PNG")
    assert f"picture: {tmp_path / 'online_learning.png'}" in done.stdout
    learned, cost = done.stdout.split("one step and its backward")
    assert learned.count("update ") >= 10
    assert "update 140/140" in learned
    for name in NAMES:
        row = re.search(rf"^{name} +([\d.]+) +never here +[\d,]+ B$", learned, re.M)
        assert row, f"no row of {name}:\n{learned}"
        assert 0 < float(row[1]) < 10
        assert re.search(rf"^{name} +[\d,]+ \| [\d,]+ +[\d,]+ \| [\d,]+$", cost, re.M)
    # 4 bytes, B = 8, H = 32, I = 5
    assert f" {4 * 8 * 32**2 * (5 + 32 + 1):,} B" in learned
    assert f" {4 * 8 * 32 * (5 + 32 + 1):,} B" in learned


def test_the_stream(example):
    """Two blocks of seven: cue, four of noise, ask, the cue again, which is due after ask."""
    stream = example["Stream"](50, 4, seed=0)
    due, symbols = [], []
    for _ in range(14):
        due.append(stream.position >= 0 and stream.answer_is_due)
        symbols.append(stream())
    assert due == [False] * 6 + [True] + [False] * 6 + [True]
    for block in (symbols[:7], symbols[7:]):
        assert torch.equal(block[0], block[6])
        assert set(block[0].tolist()) == {0, 1}
        assert all(set(noise.tolist()) == {2, 3} for noise in block[1:5])
        assert set(block[5].tolist()) == {4}
    assert not torch.equal(symbols[0], symbols[7])
    assert not torch.equal(symbols[1], symbols[2])


def test_a_window_is_the_truncated_gradient(example):
    """Against a loop that keeps all states and goes back k steps from the last one."""
    torch.manual_seed(0)
    rnn = torch_bptt.RNN(2, 3, alpha=0.5, dtype=torch.float64)
    window, x = example["Window"](rnn, 3), torch.randn(8, 4, 2, dtype=torch.float64)
    for t in range(8):
        output, _ = rnn(x[: t + 1])
        begin = max(0, t - 2)
        before = output[begin - 1].detach()[None] if begin else None
        expected = rnn(x[begin : t + 1], before)[0][-1]
        h = window.step(x[t])
        torch.testing.assert_close(h, output[-1], rtol=0, atol=1e-14)  # states of order 1
        for mine, other in zip(
            torch.autograd.grad(h.square().sum(), rnn.parameters()),
            torch.autograd.grad(expected.square().sum(), rnn.parameters()),
            strict=True,
        ):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)
    assert window.nbytes == 3 * 8 * (4 * 2 + 4 * 3)


def test_all_begin_alike_and_a_long_window_agrees_with_rtrl_at_first(example):
    """Up to the first update the past is within the window, so the gradients are the same."""
    args = argparse.Namespace(hidden=5, alpha=0.5, window=3, delay=4, lr=1e-3, seed=0)
    with torch.random.fork_rng():
        learners = example["build"](args)
    assert [each.name for each in learners] == NAMES
    for each in learners:
        assert all(map(torch.equal, each.parameters, learners[0].parameters))
        assert each.parameters[0] is not learners[0].parameters[0] or each is learners[0]
    x = torch.nn.functional.one_hot(torch.tensor([[0], [2], [3], [2], [3], [4]]), 5).float()
    gradients = []
    for each in learners:
        for t in range(6):
            h = each.method.step(x[t])
        gradients.append(torch.autograd.grad(h.sum(), each.parameters[0])[0])
    # The cue, six steps ago, in column 0: float32, sums of few terms of order 1.
    rtrl, snap1, short, long = (gradient[:, 0] for gradient in gradients)
    torch.testing.assert_close(long, rtrl, rtol=0, atol=1e-5)
    assert rtrl.abs().max() > 1e-3
    assert short.abs().max() == 0
    assert (snap1 - rtrl).abs().max() > 1e-3


def test_updates_to_learn(example):
    args = argparse.Namespace(delay=4)
    answers = [1.0] * 500 + [0.0] * 500
    # The mean of 100 falls below a half with the 51st zero, answer 551, of blocks of 7 symbols.
    assert example["updates_to_learn"](answers, args) == 551 * 7
    assert example["updates_to_learn"]([1.0] * 500, args) is None
    assert example["updates_to_learn"]([0.0] * 99, args) is None


def test_same_seed_same_numbers_and_no_picture(main, capsys, tmp_path):
    lines = []
    for _ in range(2):
        assert main("--quick", "--no-plot", "--out", tmp_path) == 0
        lines.append([line for line in capsys.readouterr().out.splitlines() if "bits per" in line])
    assert lines[0] == lines[1]
    assert not list(tmp_path.iterdir())


WRONG = {
    "steps": ("--steps 0", "argument --steps: invalid count value: '0'"),
    "few steps": ("--steps 69", "--steps must be 10 (delay + 3) = 70 at least, got 69"),
    "window": ("--window 6", "--window must be below delay + 2 = 6, got 6"),
    "lr": ("--lr nan", "argument --lr: invalid positive value: 'nan'"),
    "alpha": ("--alpha 1.5", "argument --alpha: invalid leak value: '1.5'"),
    "unknown": ("--speed 9", "unrecognized arguments: --speed 9"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_options(kind):
    options, message = WRONG[kind]
    assert message in scripts.error_of(SCRIPT, *options.split())
