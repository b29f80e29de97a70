"""Learning at every step of an endless stream: RTRL, SnAp-1 and truncated BPTT side by side.

The stream is made of blocks, and a network predicts its next symbol:

    cue      one of two symbols, at random
    noise    `delay` symbols, each one of two others, at random
    ask      always the same
    cue      again, and the next block begins

The cue after `ask` is known to whoever remembers the block's first symbol; everything else is
known (ask) or chance (noise). There is no end, no pause and no second look: after every symbol the
weights change. How can a network learn to remember like that?

- Truncated BPTT keeps the last k inputs and goes back through them, k steps of work for every
  update. When the answer is due the cue is delay + 1 steps old: a gradient reaches it only with
  k = delay + 2 or more.
- RTRL carries along how each unit depends on each parameter, through the whole past: no window to
  choose, for B H times the memory of the parameters. SnAp-1 carries only what stays within a unit,
  for B times.

All four networks begin with the same weights, see the same stream and make the same number of
updates. Read `Learner.learn` first.

Symbols: B streams are read in parallel, H hidden units, k steps of the window.

    python examples/online_learning.py          # one or two minutes on one core
    python examples/online_learning.py --delay 6 --steps 40000
    python examples/online_learning.py --help
"""

import argparse
import copy
import math
import statistics
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import torch
from command_line import Parser, count, make_folder, positive, require, run
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from torch_bptt import RNN
from torch_bptt.rtrl import RTRL

CUES, NOISE, ASK, SYMBOLS = (0, 1), (2, 3), 4, 5
CLIP = 1.0  # largest norm of the gradient of an update
MEAN = 100  # answers that a point of the curves is the mean of
CHANCE = 1.0  # bits that the answer costs whoever does not remember the cue

# Of this thread, which does all the work: what else the machine does is not counted.
processor_time = time.thread_time


class Stream:
    """B endless streams in step: every call gives the next symbol of each, (B,) int64."""

    def __init__(self, batch: int, delay: int, seed: int) -> None:
        self.batch, self.delay = batch, delay
        self.random = torch.Generator().manual_seed(seed)
        self.position = -1  # in the block, of the symbol given last

    @property
    def answer_is_due(self) -> bool:
        """Whether the symbol given last was `ask`."""
        return self.position == self.delay + 1

    def __call__(self) -> Tensor:
        self.position = (self.position + 1) % (self.delay + 3)
        if self.position == 0:
            self.cue = self._either(CUES)
        if self.position in (0, self.delay + 2):
            return self.cue
        if self.position == self.delay + 1:
            return torch.full((self.batch,), ASK)
        return self._either(NOISE)

    def _either(self, symbols: tuple[int, int]) -> Tensor:
        return torch.randint(symbols[0], symbols[1] + 1, (self.batch,), generator=self.random)


class Window:
    """Truncated BPTT as an online method: h_t with a gradient that reaches the last k inputs.

    Each of the k steps is run again with the weights of today, from the state k steps ago.
    """

    def __init__(self, rnn: RNN, k: int) -> None:
        self.rnn = rnn
        self.inputs: deque[Tensor] = deque(maxlen=k)  # x_{t-k+1} ... x_t
        self.states: deque[Tensor] = deque(maxlen=k)  # h_{t-k} ... h_{t-1}

    def step(self, x: Tensor) -> Tensor:
        """x (B, I) -> h (B, H)."""
        if not self.states:
            self.states.append(x.new_zeros(1, len(x), self.rnn.hidden_size))
        self.inputs.append(x)
        output, h = self.rnn(torch.stack(tuple(self.inputs)), self.states[0])
        self.states.append(h.detach())
        return output[-1]

    @property
    def nbytes(self) -> int:
        """What is kept between steps."""
        return sum(tensor.nbytes for tensor in (*self.inputs, *self.states))


class Learner:
    """A network, the method that gives its state a gradient, an optimizer, and what it achieved."""

    def __init__(self, name: str, rnn: RNN, readout: nn.Linear, method: Callable, lr: float):
        self.name = name
        rnn, self.readout = copy.deepcopy((rnn, readout))
        self.method = method(rnn)
        self.parameters = [*rnn.parameters(), *self.readout.parameters()]
        # amsgrad: else Adam's steps grow where gradients have been small for long, as most are once
        # the stream is known, and the next large one makes the network forget.
        self.optimizer = torch.optim.Adam(self.parameters, lr=lr, amsgrad=True)
        self.answers: list[float] = []  # bits that each answer cost

    def learn(self, symbol: Tensor, following: Tensor) -> Tensor:
        """Read a symbol, predict the following one, learn from it. Returns the loss in bits."""
        h = self.method.step(one_hot(symbol, SYMBOLS).float())
        loss = cross_entropy(self.readout(h), following)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self.optimizer.step()
        return loss.detach() / math.log(2)

    def bits(self) -> float:
        """Mean of the last answers."""
        return statistics.fmean(self.answers[-MEAN:])


def build(args: argparse.Namespace) -> list[Learner]:
    """The same network once for each method."""
    torch.manual_seed(args.seed)
    rnn, readout = RNN(SYMBOLS, args.hidden, alpha=args.alpha), nn.Linear(args.hidden, SYMBOLS)
    methods = {
        "RTRL": RTRL,
        "SnAp-1": lambda rnn: RTRL(rnn, "snap1"),
        f"BPTT, window {args.window}": lambda rnn: Window(rnn, args.window),
        f"BPTT, window {args.delay + 2}": lambda rnn: Window(rnn, args.delay + 2),
    }
    return [Learner(name, rnn, readout, method, args.lr) for name, method in methods.items()]


def train(learners: list[Learner], args: argparse.Namespace) -> None:
    """All learners in turn, symbol by symbol. A bar on a terminal, elsewhere a line per tenth."""
    from tqdm import tqdm

    stream = Stream(args.batch, args.delay, args.seed)
    symbol = stream()
    bar = tqdm(total=args.steps, desc="updates", disable=None)
    for step in range(1, args.steps + 1):
        due = stream.answer_is_due
        following = stream()
        for learner in learners:
            bits = learner.learn(symbol, following)
            if due:
                learner.answers.append(bits.item())
        symbol = following
        tenth = 10 * step // args.steps > 10 * (step - 1) // args.steps
        if due or tenth:
            figures = "   ".join(f"{each.name} {each.bits():.3f}" for each in learners)
            bar.set_postfix_str(figures, refresh=False)
            if tenth and bar.disable:
                print(f"update {step}/{args.steps}   bits per answer: {figures}", flush=True)
        bar.update()
    bar.close()


def updates_to_learn(answers: list[float], args: argparse.Namespace) -> int | None:
    """Updates until MEAN answers in a row cost less than half of chance on average."""
    if len(answers) < MEAN:
        return None
    means = torch.tensor(answers).unfold(0, MEAN, 1).mean(1)
    below = (means < CHANCE / 2).nonzero()
    return (int(below[0]) + MEAN) * (args.delay + 3) if len(below) else None


def report(learners: list[Learner], args: argparse.Namespace) -> None:
    print(f"\n{'':16}{'bits per answer':>16}{'below 0.5 after':>20}{'kept':>14}")
    for each in learners:
        after = updates_to_learn(each.answers, args)
        learned = f"{after:,} updates" if after else "never here"
        print(f"{each.name:16}{each.bits():>16.3f}{learned:>20}{each.method.nbytes:>12,} B")
    print(f"Bits: mean of the last {MEAN} answers, where {CHANCE:.0f} is chance.")
    print("Kept: from one step to the next, besides the weights.")


def measure_cost(
    sizes: list[int], repeats: int, args: argparse.Namespace
) -> dict[str, dict[int, tuple[float, int]]]:
    """name -> H -> (seconds of processor time of one step and its backward, bytes kept)."""
    cost: dict[str, dict[int, tuple[float, int]]] = {}
    x = torch.randn(args.batch, SYMBOLS)
    for hidden in sizes:
        for each in build(argparse.Namespace(**{**vars(args), "hidden": hidden})):
            seconds = []
            for _ in range(args.delay + 2 + repeats):
                begin = processor_time()
                each.method.step(x).sum().backward()
                seconds.append(processor_time() - begin)
            median = statistics.median(seconds[args.delay + 2 :])  # from there windows are full
            cost.setdefault(each.name, {})[hidden] = median, each.method.nbytes
    return cost


def report_cost(cost: dict[str, dict[int, tuple[float, int]]], args: argparse.Namespace) -> None:
    print(f"\none step and its backward, B = {args.batch}: us of processor time | bytes kept")
    print(f"{'':16}" + "".join(f"{f'H = {hidden}':>22}" for hidden in next(iter(cost.values()))))
    for name, by_size in cost.items():
        cells = (f"{seconds * 1e6:,.0f} | {size:,}" for seconds, size in by_size.values())
        print(f"{name:16}" + "".join(f"{cell:>22}" for cell in cells))


def draw(
    learners: list[Learner],
    cost: dict[str, dict[int, tuple[float, int]]],
    args: argparse.Namespace,
) -> Path:
    """Three panels: what was learned, time of a step, memory."""
    import matplotlib

    matplotlib.use("Agg")  # draws to a file, needs no screen
    from matplotlib import pyplot

    pyplot.rcParams.update(
        {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}
    )
    pyplot.rcParams.update({"grid.color": "#e8e8e8", "legend.frameon": False, "font.size": 10.5})
    figure, (learned, seconds, kept) = pyplot.subplots(
        1, 3, figsize=(15, 4.8), layout="constrained", width_ratios=[1.6, 1, 1]
    )
    sizes = f"H = {args.hidden}, a = {args.alpha:g}, B = {args.batch}, delay {args.delay}"
    figure.suptitle(f"An update at every step of an endless stream, {sizes}", fontweight="bold")
    colours = ["#c8102e", "#e08a00", "#a9b4c2", "#1f6fb4"]
    for each, colour in zip(learners, colours, strict=True):
        mean = min(MEAN, len(each.answers))
        bits = torch.tensor(each.answers).unfold(0, mean, 1).mean(1)
        updates = [(mean + n) * (args.delay + 3) for n in range(len(bits))]
        style = {"color": colour, "label": each.name}
        learned.plot(updates, bits, **style)
        for axis, index in ((seconds, 0), (kept, 1)):
            values = [measured[index] for measured in cost[each.name].values()]
            axis.loglog(list(cost[each.name]), values, "o-", markersize=4, **style)
    learned.axhline(CHANCE, color="#777777", linestyle=":", label="chance")
    learned.set(title="The cue, asked for after the delay", ylim=(-0.03, 1.5))
    learned.set(xlabel="updates", ylabel=f"bits per answer (mean of {mean})")
    learned.legend()
    seconds.set(title="One step and its backward", ylabel="seconds of processor time")
    kept.set(title="Kept, besides the weights", ylabel="bytes")
    for axis in (seconds, kept):
        units = list(cost[each.name])
        axis.set_xticks(units, map(str, units))
        axis.set_xticks([], minor=True)
        axis.set_xlabel("H")
    path = args.out / "online_learning.png"
    figure.savefig(path, dpi=130)
    return path


# --- the command line -----------------------------------------------------------------------------


def leak(text: str) -> float:
    if not 0 < float(text) <= 1:
        raise ValueError
    return float(text)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        description="Learn to remember on an endless stream, with an update at every step: RTRL, "
        "SnAp-1 and truncated BPTT side by side.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--steps", type=count, metavar="N", default=20000, help="symbols, and updates")
    add("--delay", type=count, metavar="D", default=4, help="symbols between cue and question")
    add("--window", type=count, metavar="K", default=3, help="steps of the shorter BPTT window")
    add("--hidden", type=count, metavar="H", default=32, help="units")
    add("--alpha", type=leak, metavar="A", default=0.5, help="of the units; 1: none is slow")
    add("--batch", type=count, metavar="B", default=8, help="streams read in parallel")
    add("--lr", type=positive, metavar="RATE", default=3e-3, help="learning rate")
    add("--seed", type=int, metavar="N", default=0, help="of the weights and the stream")
    add("--quick", action="store_true", help="few steps and sizes, to see that it runs")
    add("--out", type=Path, metavar="DIR", default="out/online_learning", help="of the picture")
    add("--no-plot", action="store_true", help="draw no picture")
    args = parser.parse_args()
    if args.quick:
        args.steps = 20 * (args.delay + 3)
    if args.steps < 10 * (args.delay + 3):
        parser.error(
            f"--steps must be 10 (delay + 3) = {10 * (args.delay + 3)} at least, got {args.steps}"
        )
    if args.window >= args.delay + 2:
        parser.error(f"--window must be below delay + 2 = {args.delay + 2}, got {args.window}")
    return args


def main() -> int:
    args = parse_arguments()
    require(["tqdm"] if args.no_plot else ["tqdm", "matplotlib"])
    make_folder(args.out)
    torch.set_num_threads(1)  # the products are small
    learners = build(args)
    train(learners, args)
    report(learners, args)
    cost = measure_cost([8, 16] if args.quick else [16, 32, 64, 128], 3 if args.quick else 15, args)
    report_cost(cost, args)
    if not args.no_plot:
        print(f"\npicture: {draw(learners, cost, args)}")
    return 0


if __name__ == "__main__":
    run(main)
