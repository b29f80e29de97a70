"""MAML: initial weights from which a few steps of gradient descent learn a new task.

A task is a filter that nobody names: the input u_t is white noise, and the answer is a sum of the
last inputs with coefficients of the task's own,

    y_t = c_1 u_{t-1} + ... + c_D u_{t-D}.

The inputs say nothing about c, so a network trained on all tasks at once can only answer their
mean, zero. What tasks share is what it takes to solve any of them: to hold the last D inputs where
the readout can find them. MAML (Finn, Abbeel and Levine 2017) trains for exactly that. Its loss is
taken *after* a few steps of gradient descent on some sequences of a task, on other sequences of
that task, and its gradient goes back through these steps: a second derivative through time.

That is two transforms of torch.func: `grad` inside `adapt`, and `vmap` over the tasks, each of
which has weights of its own from the first step on. Read `adapt` and `meta_loss` first.

Symbols: T steps of a sequence, K sequences of a task to learn from, D delays, H hidden units.

    python examples/maml.py          # less than a minute on one core
    python examples/maml.py --delays 6 --steps 2000
    python examples/maml.py --help
"""

import argparse
import copy
from pathlib import Path

import torch
from command_line import Parser, count, make_folder, positive, require, run
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import mse_loss

from torch_bptt import RNN

Weights = dict[str, Tensor]
RATES = (0.01, 0.03, 0.1, 0.3, 1.0)  # tried for networks that were not trained to be adapted


class Filter(nn.Module):
    """u (T, K, 1) -> y (T, K, 1)."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.rnn = RNN(1, hidden)
        self.readout = nn.Linear(hidden, 1)

    def forward(self, u: Tensor) -> Tensor:
        output, _ = self.rnn(u)
        return self.readout(output)


class Tasks:
    """Draws tasks; of each K sequences to adapt to and K others to be judged by."""

    def __init__(self, args: argparse.Namespace, seed: int) -> None:
        self.args, self.random = args, torch.Generator().manual_seed(seed)

    def __call__(self, number: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """u and y to adapt to, u and y to be judged by: each (number, T, K, 1)."""
        steps, sequences, delays = self.args.length, self.args.sequences, self.args.delays
        c = torch.randn(number, delays, generator=self.random) / delays**0.5
        u = torch.randn(number, steps, 2 * sequences, 1, generator=self.random)
        y = torch.zeros_like(u)
        for k in range(1, min(delays + 1, steps)):
            y[:, k:] += c[:, k - 1, None, None, None] * u[:, :-k]
        return *(part[:, :, :sequences] for part in (u, y)), *(
            part[:, :, sequences:] for part in (u, y)
        )


def loss(network: Filter, weights: Weights, u: Tensor, y: Tensor) -> Tensor:
    return mse_loss(functional_call(network, weights, (u,)), y)


def adapt(
    network: Filter, weights: Weights, u: Tensor, y: Tensor, rate: float, steps: int
) -> list[Weights]:
    """Gradient descent on one task: the weights before every step and after the last one."""
    every = [weights]
    for _ in range(steps):
        slope = grad(lambda weights: loss(network, weights, u, y))(every[-1])
        every.append({name: w - rate * slope[name] for name, w in every[-1].items()})
    return every


def meta_loss(
    network: Filter, weights: Weights, tasks: tuple[Tensor, ...], rate: float, steps: int
) -> Tensor:
    """What the tasks' other sequences cost after 0, 1, ... steps, mean over tasks: (steps + 1,)."""

    def of_one(u: Tensor, y: Tensor, u_other: Tensor, y_other: Tensor) -> Tensor:
        every = adapt(network, weights, u, y, rate, steps)
        return torch.stack([loss(network, adapted, u_other, y_other) for adapted in every])

    return vmap(of_one)(*tasks).mean(0)


def train(network: Filter, inner_steps: int, args: argparse.Namespace, name: str) -> list[float]:
    """Adam on the loss after inner_steps, of which 0 is training on all tasks at once."""
    from tqdm import tqdm

    tasks, losses = Tasks(args, args.seed), []
    weights = dict(network.named_parameters())
    optimizer = torch.optim.Adam(weights.values(), lr=args.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    bar = tqdm(total=args.steps, desc=name, disable=None)
    for step in range(1, args.steps + 1):
        value = meta_loss(network, weights, tasks(args.tasks), args.rate, inner_steps)[-1]
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(value.item())
        bar.set_postfix_str(f"loss {losses[-1]:.3f}", refresh=False)
        bar.update()
        if bar.disable and 10 * step // args.steps > 10 * (step - 1) // args.steps:
            print(f"{name}: update {step}/{args.steps}   loss {losses[-1]:.3f}", flush=True)
    bar.close()
    return losses


@torch.no_grad()
def judge(
    network: Filter, rates: tuple[float, ...], args: argparse.Namespace
) -> tuple[float, Tensor]:
    """The best of the rates, and with it the loss on new tasks after 0, 1, ... steps."""
    weights, steps = dict(network.named_parameters()), 2 * args.inner_steps
    choose, new = (Tasks(args, args.seed + n)(args.judged) for n in (1, 2))
    after = [meta_loss(network, weights, choose, rate, args.inner_steps)[-1] for rate in rates]
    rate = rates[int(torch.stack(after).nan_to_num(torch.inf).argmin())]
    return rate, meta_loss(network, weights, new, rate, steps)


def report(judged: dict[str, tuple[float, Tensor]], args: argparse.Namespace) -> None:
    steps = sorted({0, 1, args.inner_steps, 2 * args.inner_steps})
    print(f"\nloss on {args.judged} new tasks (answering 0 has 1) after steps of gradient descent")
    print(f"{'':24}{'rate':>6}" + "".join(f"{n:>9}" for n in steps))
    for name, (rate, losses) in judged.items():
        print(f"{name:24}{rate:>6g}" + "".join(f"{losses[n]:>9.3f}" for n in steps))


def draw(
    learned: dict[str, list[float]],
    judged: dict[str, tuple[float, Tensor]],
    args: argparse.Namespace,
) -> Path:
    """Two panels: training, and adapting to new tasks."""
    import matplotlib

    matplotlib.use("Agg")  # draws to a file, needs no screen
    from matplotlib import pyplot

    pyplot.rcParams.update(
        {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}
    )
    pyplot.rcParams.update({"grid.color": "#e8e8e8", "legend.frameon": False, "font.size": 10.5})
    figure, (training, adapting) = pyplot.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    figure.suptitle(
        f"Tasks of {args.delays} delays, {args.sequences} sequences of {args.length} steps each",
        fontweight="bold",
    )
    colours = dict(zip(judged, ["#c8102e", "#1f6fb4", "#a9b4c2"], strict=True))
    for name, losses in learned.items():
        training.plot(range(1, len(losses) + 1), losses, color=colours[name], label=name)
    training.set(title="Training", xlabel="updates", ylabel="loss of an update", yscale="log")
    for name, (rate, losses) in judged.items():
        label = f"{name}, rate {rate:g}"
        adapting.plot(losses, "o-", markersize=4, color=colours[name], label=label)
    adapting.axvline(args.inner_steps, color="#777777", linestyle=":", label="trained for")
    adapting.set(title="A new task", xlabel="steps of gradient descent", ylabel="loss")
    adapting.set_ylim(0, 1.5)
    for axis in (training, adapting):
        axis.legend()
    path = args.out / "maml.png"
    figure.savefig(path, dpi=130)
    return path


# --- the command line -----------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        description="MAML: initial weights from which a few steps of gradient descent learn a new "
        "task, beside training on all tasks at once.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--steps", type=count, metavar="N", default=500, help="updates of each network")
    add("--tasks", type=count, metavar="N", default=16, help="tasks of an update")
    add("--inner-steps", type=count, metavar="N", default=3, help="steps to learn a task in")
    add("--rate", type=positive, metavar="RATE", default=0.1, help="of these steps")
    add("--delays", type=count, metavar="D", default=4, help="coefficients of a task")
    add("--sequences", type=count, metavar="K", default=4, help="of a task, to learn from")
    add("--length", type=count, metavar="T", default=20, help="steps of a sequence")
    add("--hidden", type=count, metavar="H", default=32, help="units")
    add("--lr", type=positive, metavar="RATE", default=3e-3, help="of Adam")
    add("--judged", type=count, metavar="N", default=200, help="new tasks to judge by")
    add("--seed", type=int, metavar="N", default=0, help="of the weights and the tasks")
    add("--quick", action="store_true", help="few updates, to see that it runs")
    add("--out", type=Path, metavar="DIR", default="out/maml", help="of the picture")
    add("--no-plot", action="store_true", help="draw no picture")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.judged = 20, 20
    if args.length <= args.delays:
        parser.error(f"--length must be above --delays = {args.delays}, got {args.length}")
    return args


def main() -> int:
    args = parse_arguments()
    require(["tqdm"] if args.no_plot else ["tqdm", "matplotlib"])
    make_folder(args.out)
    torch.set_num_threads(1)  # the products are small
    torch.manual_seed(args.seed)
    scratch = Filter(args.hidden)
    maml, pretrained = copy.deepcopy(scratch), copy.deepcopy(scratch)
    learned = {
        "MAML": train(maml, args.inner_steps, args, "MAML"),
        "trained on all tasks": train(pretrained, 0, args, "trained on all tasks"),
    }
    judged = {
        "MAML": judge(maml, (args.rate,), args),
        "trained on all tasks": judge(pretrained, RATES, args),
        "not trained": judge(scratch, RATES, args),
    }
    report(judged, args)
    if not args.no_plot:
        print(f"\npicture: {draw(learned, judged, args)}")
    return 0


if __name__ == "__main__":
    run(main)
