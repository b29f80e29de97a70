"""Distributed training on PyTorch's own engine, and examples/train_ddp.py.

Two processes on one machine talk through gloo. To start them is what takes the time, so this file
is also a script for torchrun: all functions `check_...` run in both processes of one start, and the
tests look at what they returned.

`test_distributed.py killed-at N ...` is the example as it is, except that the last process of the
first attempt is killed when N updates are made.
"""

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import traceback
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import torch_bptt

SCRIPT = Path(__file__).parents[1] / "examples" / "train_ddp.py"
OPTIONS = {
    "strategy": "ddp", "rows": 37, "T": 9, "hidden": 12, "layers": 2, "batch": 8, "lr": 1e-3,
    "noise": 0.0, "precision": "float32", "device": "cpu", "seed": 3,
}  # fmt: skip

STRATEGIES = ("ddp", "static", "fsdp")

# Sums over fewer than 2^10 terms of order 1, in another order: at most 2^10 roundings of 1e-16.
ROUNDING = 1e-12


# --- in both processes ----------------------------------------------------------------------------


def plain_rnn(model: nn.Module, x: Tensor, lengths: Tensor) -> Tensor:
    """The example's network from its definition, row by row, step by step: logits (B, SYMBOLS)."""
    own = dict(model.named_parameters())
    layers = sum(name.startswith("rnn.weight_hh") for name in own)
    logits = []
    for row, length in zip(x, lengths.tolist(), strict=True):
        h = list(own["rnn.h0"])
        for x_t in row[:length]:
            below = x_t
            for k in range(layers):
                W_ih, W_hh = own[f"rnn.weight_ih_l{k}"], own[f"rnn.weight_hh_l{k}"]
                bias = own[f"rnn.bias_ih_l{k}"] + own[f"rnn.bias_hh_l{k}"]
                below = h[k] = torch.tanh(W_ih @ below + W_hh @ h[k] + bias)
        logits.append(own["readout.weight"] @ h[-1] + own["readout.bias"])
    return torch.stack(logits)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gradients(model: nn.Module) -> dict[str, Tensor]:
    named = model.named_parameters()
    return {name.removeprefix("module."): whole(p.grad) for name, p in named}


def relative(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference, over the largest number."""
    assert got.keys() == expected.keys()
    differences = max((got[name] - expected[name]).abs().max() for name in expected)
    return float(differences / max(grad.abs().max() for grad in expected.values()))


class Example:
    """The example's names, and a trainer of it in float64."""

    def __init__(self) -> None:
        vars(self).update(runpy.run_path(str(SCRIPT)))

    def trainer(self, **options: object):
        return self.Trainer(Namespace(**{**OPTIONS, **options}))


def check_gradients(example: Example, strategy: str) -> list[tuple[int, float]]:
    """An epoch, from the same weights as the definition: (rows of the batch, difference)."""
    trainer = example.trainer(strategy=strategy)
    alone = example.Recall(OPTIONS["hidden"], OPTIONS["layers"], 0.0)
    x, lengths, symbol = trainer.data
    order = torch.randperm(OPTIONS["rows"], generator=torch.Generator().manual_seed(3))
    found = []
    for rows in order.split(OPTIONS["batch"]):
        weights = get_model_state_dict(trainer.model)
        alone.load_state_dict({name: whole(weight) for name, weight in weights.items()})
        alone.zero_grad()
        loss = cross_entropy(plain_rnn(alone, x[rows], lengths[rows]), symbol[rows])
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in alone.parameters()]).norm()
        for p in alone.parameters():  # as clip_grad_norm_, which adds 1e-6 to the norm
            p.grad *= min(1, 1 / (norm + 1e-6))
        got_loss, got_norm = trainer.update()
        assert abs(got_loss - loss) < ROUNDING
        assert abs(got_norm - norm) < ROUNDING * max(1, norm)
        found.append((len(rows), relative(gradients(trainer.model), gradients(alone))))
    assert trainer.shares.state_dict() == {"epoch": 1, "position": 0}
    return found


def check_same_weights(example: Example, strategy: str) -> bool:
    """After three epochs, each with a batch that leaves a process idle: all have the same bits."""
    trainer = example.trainer(strategy=strategy, rows=19)
    for _ in range(9):
        trainer.update()
    mine = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    others = [torch.empty_like(mine) for _ in range(trainer.world)]
    dist.all_gather(others, mine)
    return all(torch.equal(mine, other) for other in others)


def check_idle_first(example: Example, strategy: str) -> float:
    """The batch that leaves a process idle, as the first one after a restart."""
    trainers = [example.trainer(strategy=s, rows=19) for s in (strategy, "fsdp")]
    for trainer in trainers:
        trainer.shares.load_state_dict({"epoch": 0, "position": 16})
        for _ in range(4):
            trainer.update()
    return relative(*(gradients(trainer.model) for trainer in trainers))


def check_autocast(example: Example, strategy: str) -> tuple[float, float]:
    """Losses of the first update, bfloat16 and float32, and how far its gradients are apart."""
    torch.set_default_dtype(torch.float32)
    trainers = [example.trainer(strategy=strategy, precision=p) for p in ("bfloat16", "float32")]
    losses = [trainer.update()[0] for trainer in trainers]
    assert losses[0] != losses[1], "nothing was narrow"
    return abs(losses[0] - losses[1]), relative(*(gradients(t.model) for t in trainers))


def check_dtypes(example: Example, strategy: str) -> str:
    """Of the state that the recurrent layer returns, and of the gradient of its weights."""
    torch.set_default_dtype(torch.float32)
    trainer = example.trainer(strategy=strategy, precision="bfloat16")
    inner = trainer.model if strategy == "fsdp" else trainer.model.module
    seen = []
    inner.rnn.register_forward_hook(lambda module, inputs, outputs: seen.append(outputs[1].dtype))
    trainer.update()
    return f"{seen[0]} {inner.rnn.weight_hh_l0.grad.dtype}".replace("torch.", "")


def check_h0_out_of_use(options: dict[str, bool]) -> str:
    """learn_h0, and hx given in every call: h0 is a parameter without a gradient."""
    torch.manual_seed(0)
    rnn = torch_bptt.RNN(3, 4, learn_h0=True)
    model = DistributedDataParallel(rnn, **options)

    def train() -> None:
        for _ in range(3):
            model(torch.randn(5, 2, 3), torch.zeros(1, 2, 4))[1].sum().backward()

    if not options:
        with pytest.raises(RuntimeError, match="find_unused_parameters=True"):
            train()
        return "refused"
    train()
    assert rnn.h0.grad is None
    return "trained"


def check_sharded_layers() -> float:
    """Layers that are sharded one by one, as large ones are; against the same, not sharded."""

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([torch_bptt.RNN(n, 6) for n in (3, 6)])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x, _ = layer(x)
            return x

    torch.manual_seed(0)
    alone, sharded = Stack(), Stack()
    sharded.load_state_dict(alone.state_dict())
    mesh = init_device_mesh("cpu", (2,))
    for module in (*sharded.layers, sharded):
        fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy())
    x = torch.randn(7, 4, 3)
    alone(x).sum().backward()
    sharded(x[:, dist.get_rank() :: 2]).mul(2).sum().backward()
    return relative(gradients(sharded), gradients(alone))


def checks() -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, what to call) of each. The last leaves DDP in the middle of a reduction."""
    example = Example()
    for strategy in STRATEGIES:
        for check in (check_gradients, check_idle_first, check_autocast, check_dtypes):
            yield f"{check.__name__} {strategy}", partial(check, example, strategy)
    for strategy in ("ddp", "static"):  # with fsdp there is one copy
        yield f"check_same_weights {strategy}", partial(check_same_weights, example, strategy)
    yield "check_sharded_layers", check_sharded_layers
    for option in ("static_graph", "find_unused_parameters"):
        yield f"check_h0_out_of_use {option}", partial(check_h0_out_of_use, {option: True})
    yield "check_h0_out_of_use neither", partial(check_h0_out_of_use, {})


def be_a_worker(path: str) -> None:
    """Run all checks. One that fails says where, and so does not hide those that came before."""
    warnings.simplefilter("error")
    dist.init_process_group("gloo")
    results = {}
    for name, check in checks():
        torch.set_default_dtype(torch.float64)
        try:
            results[name] = check()
        except Exception:
            results[name] = traceback.format_exc()
        Path(path, f"{dist.get_rank()}.json").write_text(json.dumps(results))
    os._exit(0)  # past the reduction that the last check has left open


def be_killed_at(step: int) -> None:
    """The example, one of whose processes is killed by the system before it makes an update."""
    example = runpy.run_path(str(SCRIPT), run_name="example")
    update = example["Trainer"].update

    def update_or_die(self):
        last = self.rank == self.world - 1
        if last and self.step == step and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return update(self)

    example["Trainer"].update = update_or_die
    example["main"]()


# --- the tests ------------------------------------------------------------------------------------


# The second is what the example asks for, so that a restart finds no addresses of the dead.
SETTINGS = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def run(command: list[object]) -> subprocess.CompletedProcess:
    """The scripts must find the torch_bptt that is under test, installed or built in place."""
    path = os.pathsep.join(
        [str(Path(torch_bptt.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    )
    return subprocess.run(
        list(map(str, [sys.executable, *command])),
        env={**os.environ, "PYTHONPATH": path, **SETTINGS},
        capture_output=True,
        text=True,
        timeout=60,
    )


def torchrun(*command: object, max_restarts: int = 0) -> subprocess.CompletedProcess:
    # Standalone: a free port, so that runs beside each other do not meet.
    options = ["--standalone", "--nproc-per-node=2", f"--max-restarts={max_restarts}"]
    return run(["-m", "torch.distributed.run", *options, *command])


def done(process: subprocess.CompletedProcess) -> str:
    assert process.returncode == 0, f"{process.stdout}\n{process.stderr}"
    return process.stdout


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    """What the checks returned in either process."""
    path = tmp_path_factory.mktemp("checks")
    process = torchrun(__file__, "worker", path)
    results = [json.loads((path / f"{rank}.json").read_text()) for rank in (0, 1)]
    # A check that failed in one process alone may have ended the other.
    failed = [found for one in results for found in one.values() if "Traceback" in str(found)]
    assert not failed, failed[0]
    done(process)
    return results


@pytest.fixture
def result(results: list[dict[str, object]]):
    """A function: name of a check -> what it returned, the same in both processes."""

    def result(name: str) -> object:
        one, other = (of_rank[name] for of_rank in results)
        assert one == other
        return one

    return result


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_are_those_of_one_process(strategy: str, result) -> None:
    """Loss, norm and clipped gradient of every update of an epoch; the last batch has 5 of 8 rows,
    so 4 and 1."""
    sizes, differences = zip(*result(f"check_gradients {strategy}"), strict=True)
    assert sizes == (8, 8, 8, 8, 5)
    assert max(differences) < ROUNDING


@pytest.mark.parametrize("strategy", ["ddp", "static"])
def test_an_idle_process_does_not_fall_behind(strategy: str, result) -> None:
    assert result(f"check_same_weights {strategy}") is True


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_idle_process_at_the_first_update(strategy: str, result) -> None:
    assert result(f"check_idle_first {strategy}") < ROUNDING


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bfloat16(strategy: str, result) -> None:
    """Autocast under DDP, MixedPrecisionPolicy under FSDP2: 8 bits, so 2^-8 a rounding.

    A number passes a rounding in each of at most 2 * 9 steps, up and down: were all of them the
    same way, 36 * 2^-8 = 0.14. A wrong gradient differs by about 1.
    """
    loss, gradient = result(f"check_autocast {strategy}")
    assert 0 < loss < 0.14
    assert 0 < gradient < 0.14
    assert result(f"check_dtypes {strategy}") == "bfloat16 float32"


def test_layers_sharded_one_by_one(result) -> None:
    assert result("check_sharded_layers") < ROUNDING


def test_a_learned_initial_state_out_of_use(result) -> None:
    assert result("check_h0_out_of_use static_graph") == "trained"
    assert result("check_h0_out_of_use find_unused_parameters") == "trained"
    assert result("check_h0_out_of_use neither") == "refused"


# 7 updates an epoch: six of 16 rows, one of 4, which leave the second process idle.
SIZES = ["--rows=100", "--T=8", "--hidden=16", "--batch=16", "--epochs=5", "--lr=0.01"]
SIZES += ["--save-every=8"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Two processes from beginning to end, with noise: the folder and what was printed."""
    out = tmp_path_factory.mktemp("uninterrupted")
    return out, done(torchrun(SCRIPT, *SIZES, "--noise=0.05", "--out", out))


def metrics(out: Path) -> Tensor:
    """(updates, 4): step, epoch, loss, norm."""
    head, *lines = (out / "metrics.csv").read_text().splitlines()
    assert head == "step,epoch,loss,grad_norm"
    return torch.tensor([[float(number) for number in line.split(",")] for line in lines])


def checkpoints(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def test_the_example_learns(uninterrupted: tuple[Path, str]) -> None:
    out, stdout = uninterrupted
    steps, epochs, losses, _ = metrics(out).T
    assert steps.tolist() == list(range(1, 36))
    assert epochs.tolist() == [epoch for epoch in range(5) for _ in range(7)]
    assert losses[-7:].mean() < losses[:7].mean() / 2
    assert float(re.search(r"sequences: (\d+\.\d)%; guessing has 25%", stdout)[1]) > 60
    assert re.search(r"^median time of an update: \d+\.\d\d ms$", stdout, re.MULTILINE)
    assert checkpoints(out) == ["step-00000032", "step-00000035"]
    assert len(stdout.splitlines()) < 20, "a log must not be flooded"


def test_a_killed_worker_is_replaced_and_nothing_is_lost(
    uninterrupted: tuple[Path, str], tmp_path: Path
) -> None:
    """Killed after update 21, restarted from the checkpoint of update 16: the same bits."""
    options = ["killed-at", 21, *SIZES, "--noise=0.05", "--out", tmp_path]
    process = torchrun(__file__, *options, max_restarts=1)
    assert "start after update 16 of 35" in done(process)
    assert "exitcode: -9" in process.stderr
    out, stdout = uninterrupted
    assert (tmp_path / "metrics.csv").read_bytes() == (out / "metrics.csv").read_bytes()
    answers = r"right answers .*"
    assert re.search(answers, process.stdout)[0] == re.search(answers, stdout)[0]


def test_a_killed_worker_ends_the_job_and_any_number_goes_on(tmp_path: Path) -> None:
    """Two processes until one is killed, one process for a while, two again; against one alone."""
    out, alone = tmp_path / "out", tmp_path / "alone"
    process = torchrun(__file__, "killed-at", 11, *SIZES, "--out", out)
    assert process.returncode != 0
    assert re.search(r"rank +: 1 \(local_rank: 1\)\s+exitcode +: -9 .*SIGKILL", process.stderr)
    assert checkpoints(out) == ["step-00000008"]
    # A run that dies while it writes leaves its folder. The metrics are ahead of the checkpoint.
    (out / "checkpoints" / "step-00000016.partial").mkdir()
    (out / "checkpoints" / "step-00000016.partial" / "__0_0.distcp").write_bytes(b"half a file")
    assert len(metrics(out)) == 11

    stdout = done(run([SCRIPT, *SIZES, "--epochs=3", "--out", out]))
    assert "ddp, processes: 1; start after update 8 of 21" in stdout
    stdout = done(torchrun(SCRIPT, *SIZES, "--strategy=fsdp", "--out", out))
    assert "fsdp, processes: 2; start after update 21 of 35" in stdout
    assert checkpoints(out) == ["step-00000032", "step-00000035"]

    done(run([SCRIPT, *SIZES, "--out", alone]))
    got, expected = metrics(out), metrics(alone)
    assert torch.equal(got[:, :2], expected[:, :2])
    # Rounding of float32, 6e-8, grows from update to update, in these 35 to some 1e-6. A batch that
    # is lost or comes twice changes the loss by more than 1e-2.
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=0)


BAD_OPTIONS = {  # options, what the message says
    "rows": ("--rows 5 --batch 6", "--rows must be at least --batch 6, got 5"),
    "batch": ("--batch 7", "--batch must be a multiple of the number of processes, 2, got 7"),
    "strategy": ("--strategy zero", "argument --strategy: invalid choice: 'zero'"),
    "hidden": ("--hidden 0", "argument --hidden: invalid count value: '0'"),
    "lr": ("--lr nan", "argument --lr: invalid positive value: 'nan'"),
    "out": ("--out FILE/x", "cannot make the folder"),
    "restarts": ("", "--max-restarts needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"),
}


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("kind", BAD_OPTIONS)
def test_bad_options(
    kind: str,
    rank: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """One line, from one process."""
    options, message = BAD_OPTIONS[kind]
    (tmp_path / "file").touch()
    options = options.replace("FILE", str(tmp_path / "file")).split()
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options])
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", str(int(kind == "restarts")))
    monkeypatch.delenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", raising=False)
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(SCRIPT))["main"].__wrapped__()  # record() would change fault handlers
    assert exit.value.code == 2
    stderr = capsys.readouterr().err
    assert stderr.count("\n") == (rank == "0")
    assert rank != "0" or message in stderr


def test_a_checkpoint_that_does_not_fit(uninterrupted: tuple[Path, str]) -> None:
    out, _ = uninterrupted
    process = run([SCRIPT, *SIZES, "--noise=0.05", "--hidden=17", "--out", out])
    assert process.returncode == 2
    assert process.stderr == (
        f"train_ddp.py: error: {out}/checkpoints/step-00000035 was made with --hidden 16, "
        "this run has 17\n"
    )


if __name__ == "__main__":
    if sys.argv[1] == "worker":
        be_a_worker(sys.argv[2])
    else:
        step = int(sys.argv[2])
        sys.argv = [str(SCRIPT), *sys.argv[3:]]
        be_killed_at(step)
