"""Several processes train one torch_bptt.RNN, with PyTorch's DistributedDataParallel or FSDP2.

    torchrun --nproc-per-node 2 examples/train_ddp.py                     # some seconds
    torchrun --nproc-per-node 2 examples/train_ddp.py --strategy fsdp --out out/fsdp
    python examples/train_ddp.py                                          # one process, no torchrun

The task: each sequence begins with one of four symbols, noise follows for a time that differs from
sequence to sequence, and at its end the network has to say which symbol it was.

    step     0     1     2     3    ...  length - 1
    input  symbol noise noise noise ...    noise      answer: the symbol

The number of processes changes neither which sequences a batch has nor, to rounding, the gradient.
Training goes on from the last checkpoint in --out if there is one, with any number of processes and
any strategy, so it survives the death of a worker. docs/distributed.md has more.

Symbols: T steps, B batch, H hidden size.
"""

import argparse
import functools
import hashlib
import importlib.util
import math
import os
import shutil
import statistics
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import NoReturn, TextIO

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import torch_bptt
from torch_bptt.init import orthogonal_

SYMBOLS = 4
NOISE = 0.1  # standard deviation of the input after the symbol
CLIP = 1.0  # largest norm of the gradient
KEEP = 2  # checkpoints that are kept
PATIENCE = timedelta(minutes=5)  # with a process that hangs; one that dies is noticed at once


def fail(message: str) -> NoReturn:
    """End with exit code 2 and one line, not one from every process."""
    if os.environ.get("RANK", "0") == "0":
        print(f"train_ddp.py: error: {message}", file=sys.stderr)
    sys.exit(2)


# --- the task and the network ---------------------------------------------------------------------


def sequences(rows: int, T: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """x (rows, T, SYMBOLS), lengths (rows,) from T/2 to T, symbol (rows,): the same everywhere."""
    generator = torch.Generator().manual_seed(seed)
    symbol = torch.randint(SYMBOLS, (rows,), generator=generator)
    lengths = torch.randint((T + 1) // 2, T + 1, (rows,), generator=generator)
    x = NOISE * torch.randn(rows, T, SYMBOLS, generator=generator)
    x[:, 0] = nn.functional.one_hot(symbol, SYMBOLS)
    return x, lengths, symbol


class Recall(nn.Module):
    """A recurrent network and a linear read-out of the state after each row's last step."""

    def __init__(self, hidden: int, layers: int, noise: float) -> None:
        super().__init__()
        more = {"batch_first": True, "learn_h0": True, "noise": noise}
        self.rnn = torch_bptt.RNN(SYMBOLS, hidden, layers, **more)
        self.readout = nn.Linear(hidden, SYMBOLS)
        orthogonal_(self.rnn)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """x (B, T, SYMBOLS), lengths (B,) -> logits (B, SYMBOLS)."""
        # hx is None in every call, so every call uses h0. DDP waits for the gradient of every
        # parameter: where only some calls pass hx it needs find_unused_parameters=True.
        _, h_n = self.rnn(x, lengths=lengths)
        return self.readout(h_n[-1])


def distribute(model: nn.Module, args: argparse.Namespace) -> nn.Module:
    """The model as one of all processes; gradients are means over them."""
    if args.strategy == "fsdp":
        mesh = init_device_mesh(args.device, (dist.get_world_size(),))
        policy = MixedPrecisionPolicy()
        if args.precision == "bfloat16":
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        return fully_shard(model, mesh=mesh, mp_policy=policy)
    return DistributedDataParallel(model, static_graph=args.strategy == "static")


# --- which process reads what ---------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def shuffled(rows: int, seed: int) -> Tensor:
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed))


class Shares:
    """In each epoch all rows in a new order, in batches, each batch cut into a share per process.

    The batches depend on the seed alone. Shares are equal, except in the last batch of an epoch,
    where the first processes take full ones and the last may get none.
    """

    def __init__(self, rows: int, batch: int, seed: int, rank: int, world: int) -> None:
        self.rows, self.batch, self.seed = rows, batch, seed
        self.start, self.share = rank * batch // world, batch // world
        self.epoch = self.position = 0  # what comes next

    def take(self) -> tuple[Tensor, int]:
        """This process's rows of the next batch, and how many rows the batch has in all."""
        order = shuffled(self.rows, self.seed + self.epoch)
        batch = order[self.position : self.position + self.batch]
        self.position += len(batch)
        if self.position == self.rows:
            self.epoch, self.position = self.epoch + 1, 0
        return batch[self.start : self.start + self.share], len(batch)

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]


# --- training -------------------------------------------------------------------------------------


class Trainer:
    """Everything that a checkpoint has to hold, and the update."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, args.device
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        torch.manual_seed(args.seed)  # the same weights in every process
        model = Recall(args.hidden, args.layers, args.noise).to(args.device)
        self.model = distribute(model, args)
        self.optimizer = torch.optim.Adam(self.model.parameters(), args.lr)
        self.data = [part.to(args.device) for part in sequences(args.rows, args.T, args.seed)]
        self.shares = Shares(args.rows, args.batch, args.seed, self.rank, self.world)
        self.step = 0  # updates made

    def update(self) -> tuple[float, float]:
        """One step of training on the next batch -> its loss and the norm of its gradient."""
        rows, total = self.shares.take()
        # Random numbers are a function of seed, step and process, so that none have to be saved.
        key = f"{self.args.seed} {self.step} {self.rank}".encode()
        torch.manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:4], "big"))
        self.optimizer.zero_grad()
        loss = self.add_gradient(rows, total)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.step += 1
        dist.all_reduce(loss)  # for the record only
        return loss.item(), (norm.full_tensor() if self.args.strategy == "fsdp" else norm).item()

    def add_gradient(self, rows: Tensor, total: int) -> Tensor:
        """The gradient of the mean over all rows of the batch, in every process -> own part of it.

        Where the batch leaves a process without rows, DDP has join(): the idle one answers the
        calls of the others. It gets no gradient that way, and its optimizer would fall behind, so
        the first process, which always has rows, sends it. FSDP has no join, and a static graph
        must not begin in one: there a call with B = 0 rows takes part and adds nothing.
        """
        idle = total <= self.shares.share * (self.world - 1)  # somebody is, and all know it
        if not idle or self.args.strategy != "ddp":
            return self.backward(rows, total)
        with self.model.join(divide_by_initial_world_size=True):
            loss = self.backward(rows, total) if len(rows) else torch.zeros((), device=self.device)
        for parameter in self.model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
            dist.broadcast(parameter.grad, src=0)
        return loss

    def backward(self, rows: Tensor, total: int) -> Tensor:
        loss = cross_entropy(*self.run(self.data, rows), reduction="sum") / total
        # The strategies take the mean over processes, and what is needed here is the sum.
        (loss * self.world).backward()
        return loss.detach()

    def run(self, data: list[Tensor], rows: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and right answers of some rows."""
        x, lengths, symbol = (part[rows] for part in data)
        narrow = self.args.precision == "bfloat16" and self.args.strategy != "fsdp"
        with torch.autocast(self.device, torch.bfloat16, enabled=narrow):
            logits = self.model(x, lengths)
        return logits.to(torch.get_default_dtype()), symbol  # a loss is never narrow

    @torch.no_grad()
    def accuracy(self) -> float:
        """The fraction of right answers on sequences that nobody trains on."""
        self.model.eval()
        data = [part.to(self.device) for part in sequences(1000, self.args.T, self.args.seed + 1)]
        logits, symbol = self.run(data, torch.arange(self.rank, 1000, self.world))
        right = (logits.argmax(1) == symbol).sum()
        dist.all_reduce(right)
        self.model.train()
        return right.item() / 1000


# --- checkpoints ----------------------------------------------------------------------------------

MUST_MATCH = ("rows", "T", "hidden", "layers", "batch", "lr", "noise", "precision", "seed")


def found(folder: Path) -> list[Path]:
    """The finished checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.suffix != ".partial")


def snapshot(trainer: Trainer) -> dict:
    model, optimizer = get_state_dict(trainer.model, trainer.optimizer)
    progress = {"step": trainer.step, **trainer.shares.state_dict()}
    options = {name: getattr(trainer.args, name) for name in MUST_MATCH}
    return {"model": model, "optimizer": optimizer, "progress": progress, "options": options}


def save(trainer: Trainer) -> None:
    """Every process writes its part; the folder gets its name when all of it is on the disk."""
    folder = trainer.args.out / "checkpoints"
    path = folder / f"step-{trainer.step:08}"
    partial = path.with_suffix(".partial")
    if trainer.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)  # of a run that died while it wrote
    dist.barrier()
    dcp.save(snapshot(trainer), checkpoint_id=partial)
    if trainer.rank == 0:
        os.replace(partial, path)
        for old in found(folder)[:-KEEP]:
            shutil.rmtree(old)
    dist.barrier()


def resume(trainer: Trainer) -> None:
    """Go on from the last checkpoint, if there is one, whoever wrote it."""
    checkpoints = found(trainer.args.out / "checkpoints")
    if not checkpoints:
        return
    state = snapshot(trainer)  # says what to read, and gives it a place
    made_with = {"options": state.pop("options")}
    dcp.load(made_with, checkpoint_id=checkpoints[-1])
    for name, value in made_with["options"].items():
        own = getattr(trainer.args, name)
        if own != value:
            fail(f"{checkpoints[-1]} was made with --{name} {value}, this run has {own}")
    dcp.load(state, checkpoint_id=checkpoints[-1])
    saved = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
    set_state_dict(trainer.model, trainer.optimizer, **saved)
    trainer.step = state["progress"].pop("step")
    trainer.shares.load_state_dict(state["progress"])


def open_record(path: Path, step: int) -> TextIO:
    """metrics.csv, a line per update. Those after the checkpoint are made again, so they go."""
    lines = ["step,epoch,loss,grad_norm\n"]
    if step:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[: step + 1]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(lines), encoding="utf-8")
    os.replace(partial, path)
    return open(path, "a", encoding="utf-8", buffering=1)


# --- the command line -----------------------------------------------------------------------------


def count(text: str) -> int:
    if not 0 < int(text) < 2**22:
        raise ValueError
    return int(text)


def positive(text: str) -> float:
    if not 0 < float(text) < math.inf:
        raise ValueError
    return float(text)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        fail(f"{message} (see --help)")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--strategy", choices=["ddp", "static", "fsdp"], default="ddp", help="see docs")
    add("--rows", type=count, metavar="N", default=2000, help="sequences to learn from")
    add("--T", type=count, default=20, help="steps of the longest sequence")
    add("--hidden", type=count, metavar="H", default=64, help="units of a layer")
    add("--layers", type=count, metavar="L", default=1, help="recurrent layers")
    add("--batch", type=count, metavar="B", default=64, help="rows per update, of all processes")
    add("--epochs", type=count, metavar="N", default=10, help="passes over the sequences")
    add("--lr", type=positive, metavar="RATE", default=1e-3, help="learning rate of Adam")
    add("--noise", type=float, default=0.0, help="on the states while training, see torch_bptt.RNN")
    add("--precision", choices=["float32", "bfloat16"], default="float32", help="of the network")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: nccl, a GPU per process")
    add("--seed", type=count, metavar="N", default=1, help="of weights, data and noise")
    add("--save-every", type=count, metavar="N", default=50, help="updates between checkpoints")
    add("--out", type=Path, metavar="DIR", default="out/train_ddp", help="folder of results")
    args = parser.parse_args()
    if args.rows < args.batch:
        fail(f"--rows must be at least --batch {args.batch}, got {args.rows}")
    if args.batch % (world := int(os.environ.get("WORLD_SIZE", "1"))):
        fail(f"--batch must be a multiple of the number of processes, {world}, got {args.batch}")
    # Otherwise all attempts share one store, where a new one can find addresses of the dead.
    own = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
    if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0" and os.environ.get(own) != "1":
        fail(f"--max-restarts needs {own}=1 in the environment")
    return args


def start(args: argparse.Namespace) -> None:
    """Join the processes that torchrun started; without it, be the only one."""
    if args.device == "cuda":
        if not torch.cuda.is_available():
            fail("--device cuda: torch finds no GPU")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "nccl" if args.device == "cuda" else "gloo"
    if dist.is_torchelastic_launched():
        dist.init_process_group(backend, timeout=PATIENCE)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def train(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    trainer = Trainer(args)
    resume(trainer)
    steps = args.epochs * math.ceil(args.rows / args.batch)
    if first := trainer.rank == 0:
        lines = open_record(args.out / "metrics.csv", trainer.step)
        print(f"{args.strategy}, processes: {trainer.world}; ", end="")
        print(f"start after update {trainer.step} of {steps}", flush=True)
    bar = tqdm(total=steps, initial=trainer.step, disable=None if first else True, unit="update")
    seconds = []
    while trainer.step < steps:
        began, epoch = time.perf_counter(), trainer.shares.epoch
        loss, norm = trainer.update()
        seconds.append(time.perf_counter() - began)
        if not math.isfinite(loss):  # the same number in every process
            fail(f"update {trainer.step}: the loss became {loss}; try a smaller --lr")
        if first:
            lines.write(f"{trainer.step},{epoch},{loss},{norm}\n")
            bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            if bar.disable and trainer.step * 10 // steps > (trainer.step - 1) * 10 // steps:
                print(f"update {trainer.step}/{steps}: loss {loss:.4f}", flush=True)
        bar.update()
        if trainer.step % args.save_every == 0 or trainer.step == steps:
            save(trainer)
    bar.close()
    accuracy = trainer.accuracy()
    if first:
        lines.close()
        if seconds:
            print(f"median time of an update: {1e3 * statistics.median(seconds):.2f} ms")
        print(f"right answers on new sequences: {accuracy:.1%}; guessing has {1 / SYMBOLS:.0%}")
        print(f"numbers: {args.out}/metrics.csv; checkpoints: {args.out}/checkpoints")
    return 0


@record
def main() -> None:
    args = parse_arguments()
    if not importlib.util.find_spec("tqdm"):
        fail("this example needs tqdm: pip install tqdm")
    try:
        (args.out / "checkpoints").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"cannot make the folder {error.filename}: {error.strerror}")
    start(args)
    try:
        code = train(args)
    except SystemExit as stop:
        code = stop.code
    except RuntimeError:
        # Mostly the end of another process. torchrun looks every tenth of a second, and names the
        # first it finds dead: this one waits, and is ended by torchrun while it does.
        time.sleep(2)
        raise
    dist.destroy_process_group()
    # While Python ends, threads of gloo can abort it, so it does not get there.
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
