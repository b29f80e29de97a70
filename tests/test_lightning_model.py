"""examples/lightning_model.py: as a user runs it, and what its steps compute."""

import csv
import re
import runpy

import pytest
import scripts
import torch
from pairs import assert_same
from torch import nn

lightning = pytest.importorskip("lightning", reason="needs Lightning: make test-frameworks")
pytest.importorskip("tqdm")

# Lightning's own, of how it looks at nested batches.
pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is:FutureWarning")
SCRIPT = scripts.EXAMPLES / "lightning_model.py"
QUICK = ["--delay", 2, "--T", 30, "--batches", 20, "--epochs", 3, "--k", 6, "--hidden", 32]


@pytest.fixture(scope="module")
def example():
    return runpy.run_path(str(SCRIPT))


@pytest.mark.parametrize("updates", ["one", "many"])
def test_it_learns(updates, tmp_path):
    done = scripts.run(SCRIPT, *QUICK, "--updates", updates, "--out", tmp_path)
    assert done.stderr == ""
    assert re.findall(r"^epoch (\d)/3   loss [\d.]+   right [\d.]+$", done.stdout, re.M) == [
        "1", "2", "3",
    ]  # fmt: skip
    right = float(re.search(r"right answers on new sequences: ([\d.]+)%", done.stdout)[1])
    assert right > 90, done.stdout
    # 20 batches in each of 3 epochs; with many updates, one each 6 of 30 steps.
    made = int(re.search(r"^updates: (\d+);", done.stdout, re.M)[1])
    assert made == 60 * (1 if updates == "one" else 5)
    with open(tmp_path / "version_0" / "metrics.csv", newline="") as lines:
        losses = [float(line["loss"]) for line in csv.DictReader(lines) if line["loss"]]
    assert losses[-1] < losses[0] / 2


def test_a_checkpoint_is_the_module(example, tmp_path):
    module = example["Echo"](8, 6, 1e-3)
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=1, default_root_dir=tmp_path, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    batches = example["Echoes"](2, 3, 10, 2, seed=0, fixed=False)
    trainer.fit(module, batches, batches)
    trainer.save_checkpoint(tmp_path / "net.ckpt")
    loaded = example["Echo"].load_from_checkpoint(tmp_path / "net.ckpt", weights_only=True)
    assert loaded.rnn.truncate == 6
    x, _ = next(iter(example["Echoes"](1, 3, 10, 2, seed=1, fixed=True)))
    assert torch.equal(loaded(x)[0], module(x)[0])


def test_the_answer_is_the_symbol_of_before(example):
    batches = example["Echoes"](2, 3, 10, 4, seed=0, fixed=True)
    one, two = batches
    assert not torch.equal(one[0], two[0])
    assert all(torch.equal(a, b) for a, b in zip(one, next(iter(batches)), strict=True))
    x, answers = one
    assert x.shape == (3, 10, 4)
    assert torch.equal(answers[:, 4:], x.argmax(-1)[:, :-4])
    assert answers[:, :4].eq(0).all()


def loop(module, x, hx=None, k=None):
    """The logits and the last state from the definition, the state detached every k steps."""
    w_ih, w_hh, b_ih, b_hh = module.rnn.all_weights[0]
    h = x.new_zeros(len(x), len(w_hh)) if hx is None else hx
    states = []
    for t in range(x.shape[1]):
        if k and t and t % k == 0:
            h = h.detach()
        h = torch.tanh(x[:, t] @ w_ih.T + b_ih + h @ w_hh.T + b_hh)
        states.append(h)
    return module.readout(torch.stack(states, 1)), h


def test_one_update_has_the_gradient_of_a_loop_that_detaches(example):
    torch.manual_seed(0)
    module = example["Echo"](5, 3, 1e-3).double()
    module.log = lambda *args, **options: None  # there is no Trainer
    x, answers = next(iter(example["Echoes"](1, 2, 8, 2, seed=0, fixed=True)))
    got = module.training_step((x.double(), answers), 0)
    logits, _ = loop(module, x.double(), k=3)
    expected = nn.functional.cross_entropy(logits.mT, answers) / torch.tensor(2.0).double().log()
    assert_same("loss", got, expected)
    parameters = list(module.parameters())
    for mine, other in zip(
        torch.autograd.grad(got, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        assert_same("gradient", mine, other)


def test_many_updates_are_those_of_a_loop_over_windows(example):
    """An update every 3 steps, from a gradient over the last 6, run again with today's weights."""
    torch.manual_seed(0)
    module, plain = (example["EchoWithManyUpdates"](5, 3, 1e-3).double() for _ in range(2))
    plain.load_state_dict(module.state_dict())
    optimizer = torch.optim.SGD(module.parameters(), lr=0.3)
    module.log = lambda *args, **options: None
    module.optimizers = lambda: optimizer
    x, answers = next(iter(example["Echoes"](1, 2, 8, 2, seed=0, fixed=True)))
    x = x.double()
    module.training_step((x, answers), 0)

    state, optimizer = None, torch.optim.SGD(plain.parameters(), lr=0.3)
    # The window of each update, and what of it is new; the state before a window is the one that
    # the update before found there.
    for begin, new, end in ((0, 0, 3), (0, 3, 6), (3, 6, 8)):
        logits, _ = loop(plain, x[:, begin:end], state)
        following = begin if begin == new == 0 else begin + 3
        if following > begin:
            with torch.no_grad():
                _, state = loop(plain, x[:, begin:following], state)
        loss = nn.functional.cross_entropy(logits[:, new - begin :].mT, answers[:, new:end])
        optimizer.zero_grad()
        (loss / torch.tensor(2.0).double().log()).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
    for (name, mine), other in zip(module.named_parameters(), plain.parameters(), strict=True):
        assert_same(name, mine, other)


WRONG = {
    "updates": ("--updates two", "argument --updates: invalid choice: 'two'"),
    "k": ("--k 0", "argument --k: invalid count value: '0'"),
    "delay": ("--delay 100", "--delay must be below --T 100, got 100"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_options(kind):
    options, message = WRONG[kind]
    assert message in scripts.error_of(SCRIPT, *options.split())
