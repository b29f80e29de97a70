"""The adding problem: whether an RNN can learn is decided before training, by W_hh.

    step     0     1     2     3    ...
    number  0.31  0.85  0.12  0.56  ...     uniform in [0, 1]
    marker   0     1     0     0    ...     1 at two steps, one in each half
    target: the sum of the two marked numbers, asked for after the last step

A network that ignores its input does best by always answering 1: its mean squared error is the
variance of the sum of two uniform numbers, 1/6 = 0.167. To do better, the gradient of the error
after the last step must reach the marked steps, up to T steps back.

Here networks of relu units are trained on the same batches, with the same options, for T = 150 and
T = 400. They differ in W_hh and in the biases and in nothing else:

    default     as torch.nn.RNN draws them, uniform in +-1/sqrt(H)
    orthogonal  W_hh = a random orthogonal matrix, biases 0 (Saxe et al., 2014)
    identity    W_hh = identity, biases 0: an IRNN (Le, Jaitly and Hinton, 2015)

The picture shows the learning curves and, beside them, the norm of dL/dh_t against t before the
first update. What it has to say is in examples/README.md.

The problem is from Hochreiter and Schmidhuber (1997), Long short-term memory, in the form that Le
et al. gave it: all sequences are of one length, and each half has one mark. One thing is ours: the
numbers enter the network as u - 1/2. Units that forget nothing add up what comes in; without the
shift that is a drift which grows with T, and at T = 400 it ruined the training.

Symbols: T steps, B batch, H hidden size.

    python examples/adding_problem.py            # three or four minutes on one core
    python examples/adding_problem.py --quick    # seconds: tiny, to see that everything runs
    python examples/adding_problem.py --help
"""

import argparse
import copy
import csv
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import torch
from command_line import Parser, count, fail, make_folder, natural, positive, require, run
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import torch_bptt
from torch_bptt.init import identity_, orthogonal_

INITS = {  # the only difference between the networks
    "default": lambda rnn: rnn,
    "orthogonal": orthogonal_,
    "identity": identity_,
}
COLOURS = {"default": "#8a97a8", "orthogonal": "#1f6fb4", "identity": "#c8102e"}

# (longest T, training steps, learning rate), found by a small search with one seed.
SCHEDULES = [(250, 4000, 1e-4), (math.inf, 8000, 3e-4)]
QUICK = {"lengths": [10, 20], "hidden": 16, "batch": 16, "steps": 300, "lr": 3e-3}

BASELINE = 1 / 6  # error of always answering 1
CLIP = 1.0  # largest norm of the gradient: without, a single batch can ruin an IRNN
TEST_ROWS = 2000  # sequences that nobody trains on
FLOW_ROWS = 32  # sequences that the gradient of the states is looked at with
WINDOW = 50  # training steps whose mean loss is one point of a curve


# --- the problem ----------------------------------------------------------------------------------


def adding(T: int, B: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """B sequences: x (T, B, 2), which holds the numbers less 1/2 and the markers; target (B,)."""
    numbers = torch.rand(T, B, generator=generator)
    rows = torch.arange(B)
    first = torch.randint(0, T // 2, (B,), generator=generator)
    second = torch.randint(T // 2, T, (B,), generator=generator)
    markers = torch.zeros(T, B)
    markers[first, rows] = 1
    markers[second, rows] = 1
    x = torch.stack([numbers - 0.5, markers], dim=2)
    return x, numbers[first, rows] + numbers[second, rows]


class Adder(nn.Module):
    """One recurrent layer of relu units, and a linear read-out of the last state."""

    def __init__(self, init: str, hidden: int) -> None:
        super().__init__()
        self.rnn = torch_bptt.RNN(2, hidden, nonlinearity="relu")
        self.readout = nn.Linear(hidden, 1)
        INITS[init](self.rnn)  # last: what was drawn before is the same for all

    def forward(self, x: Tensor) -> Tensor:
        """x (T, B, 2) -> answer (B,)."""
        _, h_n = self.rnn(x)
        return self.readout(h_n[0]).squeeze(1)


# --- training -------------------------------------------------------------------------------------


@dataclass
class Result:
    """What came of one network on sequences of T steps."""

    T: int
    init: str
    gradient: Tensor  # (T, B): norms of dL/dh_t before training, by row
    losses: list[float] = field(default_factory=list)  # of each training step
    error: float = math.nan  # mean squared, on sequences that were not trained on


def schedule(T: int, args: argparse.Namespace) -> tuple[int, float]:
    """Training steps and learning rate for sequences of T steps."""
    steps, rate = next((steps, rate) for longest, steps, rate in SCHEDULES if longest >= T)
    return args.steps or steps, args.lr or rate


def train(T: int, init: str, args: argparse.Namespace, progress: "Progress") -> Result:
    """Train one network from beginning to end. The data depends on T and the seed alone."""
    steps, rate = schedule(T, args)
    torch.manual_seed(args.seed)
    model = Adder(init, args.hidden)
    optimizer = torch.optim.Adam(model.parameters(), rate)
    data = torch.Generator().manual_seed(args.seed + 1)
    held_out = adding(T, TEST_ROWS, data)
    result = Result(T, init, gradient_flow(model, *adding(T, FLOW_ROWS, data)))
    for _ in range(steps):
        x, target = adding(T, args.batch, data)
        loss = mse_loss(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        # Where the state grows without bound, the squares of gradients overflow in the norm.
        nn.utils.clip_grad_value_(model.parameters(), 1e3)
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        result.losses.append(loss.item())
        if not math.isfinite(result.losses[-1]):
            fail(f"T = {T}, {init}: the loss became {result.losses[-1]}; try a smaller --lr", 1)
        progress.step(result)
    with torch.no_grad():
        x, target = held_out
        result.error = mse_loss(model(x), target).item()
    return result


def gradient_flow(model: Adder, x: Tensor, target: Tensor) -> Tensor:
    """Norms of dL_b/dh_t for every step t and row b, (T, B); L_b is the squared error of row b.

    In float64, as they soon leave the range of float32.
    """
    model = copy.deepcopy(model).double()
    with torch_bptt.diagnose.gradient_flow(model) as flow:
        # The sum over rows: they do not mix, so row b of a gradient belongs to row b's error.
        mse_loss(model(x.double()), target.double(), reduction="sum").backward()
    return flow[0].norms


class Progress:
    """One bar for the whole run on a terminal; elsewhere, as in a log, a line per tenth of it."""

    def __init__(self, args: argparse.Namespace) -> None:
        from tqdm import tqdm

        self.tqdm = tqdm
        self.steps = {T: schedule(T, args)[0] for T in args.lengths}
        # Counted in steps through time, which is what takes the time.
        self.total = len(INITS) * sum(T * self.steps[T] for T in args.lengths)
        layout = "{desc:<20}{percentage:3.0f}%|{bar}| {elapsed}, {remaining} left{postfix}"
        self.bar = tqdm(total=self.total, bar_format=layout, disable=None)
        self.done = 0

    def step(self, result: Result) -> None:
        before, self.done = self.done, self.done + result.T
        trained, steps = len(result.losses), self.steps[result.T]
        if trained % 10 == 0 or trained == steps:
            mean = statistics.fmean(result.losses[-WINDOW:])
            self.bar.set_description_str(f"T = {result.T}, {result.init}", refresh=False)
            self.bar.set_postfix_str(f"loss {mean:.4f}", refresh=False)
        self.bar.update(result.T)
        tenth = 10 * self.done // self.total
        if self.bar.disable and tenth > 10 * before // self.total:
            mean = statistics.fmean(result.losses[-WINDOW:])
            where = f"T = {result.T}, {result.init}, step {trained}/{steps}"
            print(f"{10 * tenth:3} %   {where}: loss {mean:.4f}", flush=True)

    def close(self) -> None:
        self.bar.close()


# --- what came of it ------------------------------------------------------------------------------


def curve(losses: list[float]) -> list[tuple[int, float]]:
    """Means of the loss over windows that do not overlap: (last step of the window, mean)."""
    window = min(WINDOW, len(losses))
    ends = range(window, len(losses) + 1, window)
    return [(end, statistics.fmean(losses[end - window : end])) for end in ends]


def flow(gradient: Tensor) -> Tensor:
    """(T, B) norms -> (T,): the root of their mean square over rows, the last step's as unit."""
    by_step = gradient.square().mean(1).sqrt()
    return by_step / by_step[-1]


def write_csv(results: list[Result], args: argparse.Namespace) -> None:
    """errors.csv, curves.csv and gradients.csv: all the numbers that are printed and drawn."""
    errors = [(r.T, r.init, r.error) for r in results]
    curves = [(r.T, r.init, step, loss) for r in results for step, loss in curve(r.losses)]
    gradients = [
        (r.T, r.init, t, norm) for r in results for t, norm in enumerate(flow(r.gradient).tolist())
    ]
    tables = {
        "errors": (("T", "init", "test_error"), errors),
        "curves": (("T", "init", "step", "mean_loss"), curves),
        "gradients": (("T", "init", "t", "relative_norm"), gradients),
    }
    for name, (head, rows) in tables.items():
        with open(args.out / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(head)
            writer.writerows(rows)


def report(results: list[Result], args: argparse.Namespace) -> None:
    """Print the errors, and of the gradient at the last step what arrives at the first."""
    print(f"\nerror on {TEST_ROWS} new sequences; always answering 1 has {BASELINE:.3f}")
    print(f"{'':12}" + "".join(f"{f'T = {T}':>24}" for T in args.lengths))
    for init in INITS:
        errors = (result.error for result in results if result.init == init)
        cells = (f"{error:.4f} ({error / BASELINE:4.0%})" for error in errors)
        print(f"{init:12}" + "".join(f"{cell:>24}" for cell in cells))
    print("\nof the gradient dL/dh of the last state, this much arrived at the first, untrained:")
    for init in INITS:
        left = (flow(result.gradient)[0] for result in results if result.init == init)
        # The squares of still smaller norms are zero in float64.
        cells = (f"{norm:.1e}" if norm > 1e-150 else "below 1e-150" for norm in left)
        print(f"{init:12}" + "".join(f"{cell:>24}" for cell in cells))


def draw(results: list[Result], args: argparse.Namespace) -> Path:
    """For each T a row: learning curves, and the gradient at every state before training."""
    import matplotlib

    matplotlib.use("Agg")  # draws to a file, needs no screen
    from matplotlib import pyplot

    pyplot.rcParams.update(
        {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}
    )
    pyplot.rcParams.update({"grid.color": "#e8e8e8", "legend.frameon": False, "font.size": 10.5})
    rows = len(args.lengths)
    figure, axes = pyplot.subplots(
        rows, 2, figsize=(12, 4.2 * rows), layout="constrained", squeeze=False
    )
    sizes = f"H = {args.hidden}, B = {args.batch}, Adam"
    figure.suptitle(f"The adding problem, relu units, {sizes}", fontweight="bold")
    for T, (learning, gradient) in zip(args.lengths, axes, strict=True):
        learning.axhline(BASELINE, color="#333333", linestyle=":", label="always answering 1")
        for result in results:
            if result.T == T:
                style = {"color": COLOURS[result.init], "label": result.init}
                learning.semilogy(*zip(*curve(result.losses), strict=True), **style)
                gradient.semilogy(flow(result.gradient), linewidth=2, **style)
        rate = schedule(T, args)[1]
        title = f"T = {T}, learning rate {rate:g}: what is learned"
        learning.set(title=title, xlabel="training step", ylim=(5e-4, 2))
        learning.set(ylabel=f"squared error (mean of {WINDOW} steps)")
        gradient.axhline(torch.finfo(torch.float32).eps, color="#333333", linestyle=":")
        gradient.text(0, 2e-7, "below: lost in the rounding of float32", fontsize=9, va="bottom")
        gradient.set(title=f"T = {T}: why. The gradient before training", xlabel="step t")
        gradient.set(ylabel=r"$|dL/dh_t|\;/\;|dL/dh_{T-1}|$", ylim=(1e-20, 100))
        learning.legend(loc="lower left")
    path = args.out / "adding_problem.png"
    figure.savefig(path, dpi=130)
    return path


# --- the command line -----------------------------------------------------------------------------


def length(text: str) -> int:
    if count(text) < 2:
        raise ValueError
    return int(text)


def seed(text: str) -> int:
    return natural(text)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        description="Train RNNs on the adding problem from three initialisations.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--lengths", type=length, nargs="+", metavar="T", default=[150, 400], help="of sequences")
    add("--hidden", type=count, metavar="H", default=100, help="units")
    add("--batch", type=count, metavar="B", default=32, help="sequences per training step")
    add("--steps", type=count, metavar="N", help="training steps; None: 4000, above T = 250 8000")
    add("--lr", type=positive, metavar="RATE", help="of Adam; None: 1e-4, above T = 250 3e-4")
    add("--quick", action="store_true", help="tiny sizes in place of those above, for seconds")
    add("--seed", type=seed, metavar="N", default=0, help="of the initial weights and the data")
    add("--threads", type=count, metavar="N", help="CPU threads; None: PyTorch's own choice")
    add("--out", type=Path, metavar="DIR", default="out/adding_problem", help="folder of results")
    add("--no-plot", action="store_true", help="draw no picture")
    args = parser.parse_args()
    if args.quick:
        vars(args).update(QUICK)
    return args


def main() -> int:
    args = parse_arguments()
    require(["tqdm"] if args.no_plot else ["tqdm", "matplotlib"])
    if args.threads:
        torch.set_num_threads(args.threads)
    make_folder(args.out)

    progress = Progress(args)
    results = [train(T, init, args, progress) for T in args.lengths for init in INITS]
    progress.close()
    report(results, args)
    write_csv(results, args)
    print(f"\nnumbers: {args.out}/errors.csv, curves.csv, gradients.csv")
    if not args.no_plot:
        print(f"picture: {draw(results, args)}")
    return 0


if __name__ == "__main__":
    run(main)
