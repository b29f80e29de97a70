"""A leaky rate network that obeys Dale's law learns a perceptual decision: usual loop, fused loop.

The animal, here a network, looks at moving dots and says whether they move left or right. How many
of the dots move together is the coherence. While it fixates it gets two streams of noisy evidence,
one for each direction; it must add them up over a second, hold the result through a delay, and
answer when the fixation mark goes out (Roitman and Shadlen, 2002; Song, Yang and Wang, 2016).

The network has excitatory and inhibitory units, 4 to 1, with time constant tau:

    tau dr/dt = -r + relu(W r + W_in u + b + noise)         in Euler's steps, alpha = dt / tau:
    r_t = (1 - alpha) r_{t-1} + alpha relu(W r_{t-1} + W_in u_t + b + sqrt(2 / alpha) sigma xi_t)

In W column j holds what unit j sends to all others. Dale's law: all its signs are the same. `Dale`
keeps it during training; it is a parametrization of PyTorch, and the recurrent layer knows nothing
about it. Inputs are excitatory, and so are the units that are read out.

To read it: `LoopRNN` is how such a network is usually written, and `RateNetwork` has the one line
that takes its place. In the end both run side by side, to compare states, gradients and time.

Symbols: T steps per trial, B trials, H units.

    python examples/perceptual_decision.py          # less than a minute on two cores
    python examples/perceptual_decision.py --units 200 --steps 2000 --seed 1
    python examples/perceptual_decision.py --help
"""

import argparse
import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from command_line import Parser, count, fail, make_folder, natural, require, run
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from torch.nn.utils import clip_grad_norm_, parametrize

import torch_bptt

DT, TAU = 10.0, 100.0  # ms
ALPHA = DT / TAU

# One trial, ms: mark on, dots, delay (drawn anew for each trial), answer until the end.
FIXATION, STIMULUS, DELAY, TRIAL = 200, 1000, (200, 500), 2000
GRACE = 100  # ms after the mark goes out in which nothing is asked of the network
FIXATION_COUNTS = 0.01  # per step, next to 1 in the answer: it is long, and easy to learn
STEPS = int(TRIAL / DT)  # T
STIMULUS_STEPS = slice(int(FIXATION / DT), int((FIXATION + STIMULUS) / DT))

COHERENCES = (0.0, 0.032, 0.064, 0.128, 0.256, 0.512)
# White noise of the evidence and inside every unit: what it adds up to does not depend on dt if a
# single step has these deviations.
INPUT_NOISE = 0.2 * math.sqrt(2 / ALPHA)
UNIT_NOISE = 0.05 * math.sqrt(2 / ALPHA)

INPUTS = ("fixation mark", "left", "right")
FIXATE, LEFT, RIGHT = range(3)  # what the network may do, and the rows of the read-out

RATES_OF = 200  # trials of each coherence whose rates are analysed

SPECTRAL_RADIUS = 1.2  # of W before training
LEARNING_RATE = 5e-3  # at first; it falls to zero along half a cosine
CLIP = 0.1  # largest norm of the gradient


# --- the task -------------------------------------------------------------------------------------


@dataclass
class Trials:
    """B trials.

    Attributes:
        stimulus: (T, B, 3), what the network sees: the mark and the evidence for left and right.
        target: (T, B) int64, what it has to do: FIXATE, then LEFT or RIGHT.
        counts: (T, B) float, how much the target counts: little while the mark is on, which is
            long and easy; 0 in the grace period; 1 while the answer is given.
        coherence: (B,), of the motion to the right; negative: to the left.
        rightward: (B,) bool, the correct answer; at coherence 0 there is none, and it is drawn.
    """

    stimulus: Tensor
    target: Tensor
    counts: Tensor
    coherence: Tensor
    rightward: Tensor

    @classmethod
    def draw(cls, strength: Tensor, noise: float = INPUT_NOISE) -> "Trials":
        """Trials of these strengths, (B,), the coherence without its sign: the sides are drawn."""
        batch = len(strength)
        rightward = torch.rand(batch) < 0.5
        coherence = torch.where(rightward, strength, -strength)
        step = torch.arange(STEPS)[:, None]
        low, high = (int((FIXATION + STIMULUS + delay) / DT) for delay in DELAY)
        go = torch.randint(low, high + 1, (batch,))

        stimulus = torch.zeros(STEPS, batch, len(INPUTS))
        stimulus[..., FIXATE] = (step < go).float()
        dots = stimulus[STIMULUS_STEPS]
        dots[..., LEFT], dots[..., RIGHT] = (1 - coherence) / 2, (1 + coherence) / 2
        dots[..., LEFT:] += noise * torch.randn(dots[..., LEFT:].shape)

        target = torch.where(step < go, FIXATE, torch.where(rightward, RIGHT, LEFT))
        counts = torch.where(step < go, FIXATION_COUNTS, (step >= go + int(GRACE / DT)).float())
        return cls(stimulus, target, counts, coherence, rightward)

    @classmethod
    def mixed(cls, batch: int) -> "Trials":
        return cls.draw(torch.tensor(COHERENCES)[torch.randint(len(COHERENCES), (batch,))])


def ideal_observer(coherence: Tensor) -> Tensor:
    """Probability that whoever adds up all the evidence, and forgets nothing, answers right.

    The difference of the two streams has mean c and variance 2 s^2 at each of N steps.
    """
    steps = STIMULUS_STEPS.stop - STIMULUS_STEPS.start
    return torch.special.ndtr(coherence * math.sqrt(steps / 2) / INPUT_NOISE)


# --- the network ----------------------------------------------------------------------------------


class Dale(nn.Module):
    """Parametrization of a weight: |V|, times fixed signs, (H,) for the units that send.

    With (H, H) also single synapses may be missing: their sign is 0.
    """

    def __init__(self, sign: Tensor) -> None:
        super().__init__()
        self.register_buffer("sign", sign)

    def forward(self, raw: Tensor) -> Tensor:
        return raw.abs() * self.sign

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight.abs()


def balanced_weights(excitatory: int, inhibitory: int) -> Tensor:
    """Random weights, (H, H), whose excitation and inhibition cancel on average."""
    weight = torch.rand(excitatory + inhibitory, excitatory + inhibitory)
    weight[:, excitatory:] *= -excitatory / inhibitory
    weight.fill_diagonal_(0)
    return weight * (SPECTRAL_RADIUS / torch.linalg.eigvals(weight).abs().max())


class LoopRNN(nn.Module):
    """Leaky units as they are usually written: every step of every trial passes through Python."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight_ih_l0 = nn.Parameter(torch.empty(hidden_size, input_size))
        self.weight_hh_l0 = nn.Parameter(torch.empty(hidden_size, hidden_size))
        self.bias_ih_l0 = nn.Parameter(torch.empty(hidden_size))
        self.bias_hh_l0 = nn.Parameter(torch.empty(hidden_size))

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """input (T, B, I) -> all states (T, B, H), the last one (B, H)."""
        weight_hh = self.weight_hh_l0  # looked up once: it is computed, by Dale
        state = input.new_zeros(input.shape[1], len(weight_hh))
        output = []
        for u in linear(input, self.weight_ih_l0, self.bias_ih_l0 + self.bias_hh_l0):
            z = u + linear(state, weight_hh)
            if self.training:
                z = z + UNIT_NOISE * torch.randn_like(z)
            state = (1 - ALPHA) * state + ALPHA * torch.relu(z)
            output.append(state)
        return torch.stack(output), state


class RateNetwork(nn.Module):
    """Recurrent units, of which the last fifth inhibits, and a read-out of those that excite."""

    def __init__(self, units: int, loop: bool = False) -> None:
        super().__init__()
        self.excitatory = 4 * units // 5
        inhibitory = units - self.excitatory
        if loop:
            self.rnn = LoopRNN(len(INPUTS), units)
        else:
            self.rnn = torch_bptt.RNN(
                len(INPUTS), units, nonlinearity="relu", alpha=ALPHA, noise=UNIT_NOISE
            )
        self.readout = nn.Linear(units, 3)

        with torch.no_grad():
            # Few strong inputs and many weak ones: units differ in what they see.
            self.rnn.weight_ih_l0.normal_().square_().div_(2)
            self.rnn.weight_hh_l0.copy_(balanced_weights(self.excitatory, inhibitory))
            self.rnn.bias_ih_l0.zero_()
            self.rnn.bias_hh_l0.zero_()
        sign = torch.cat([torch.ones(self.excitatory), -torch.ones(inhibitory)])
        no_self = 1 - torch.eye(units)
        # h @ weight_hh.T makes column j of weight_hh what unit j sends.
        parametrize.register_parametrization(self.rnn, "weight_hh_l0", Dale(sign * no_self))
        parametrize.register_parametrization(self.rnn, "weight_ih_l0", Dale(torch.ones(1)))
        parametrize.register_parametrization(self.readout, "weight", Dale(sign.relu()))

    def forward(self, stimulus: Tensor) -> tuple[Tensor, Tensor]:
        """stimulus (T, B, 3) -> logits of the three actions (T, B, 3), rates (T, B, H)."""
        rates, _ = self.rnn(stimulus)
        return self.readout(rates), rates


def loss_of(logits: Tensor, trials: Trials) -> Tensor:
    """Cross entropy, averaged over the steps that count."""
    losses = cross_entropy(logits.movedim(-1, 1), trials.target, reduction="none")  # (T, B)
    return (losses * trials.counts).sum() / trials.counts.sum()


def answer(logits: Tensor, trials: Trials) -> Tensor:
    """(B,) bool: does the network say right? The larger evidence while the answer is given."""
    answering = trials.counts * (trials.target != FIXATE)
    return ((logits[..., RIGHT] - logits[..., LEFT]) * answering).sum(0) > 0


def train_step(
    network: RateNetwork, optimizer: torch.optim.Optimizer, trials: Trials
) -> tuple[float, Tensor]:
    """One update. Returns the loss before it, and which answers were correct, (B,) bool."""
    logits, _ = network(trials.stimulus)
    loss = loss_of(logits, trials)
    optimizer.zero_grad()
    loss.backward()
    clip_grad_norm_(network.parameters(), CLIP)
    optimizer.step()
    return loss.item(), answer(logits.detach(), trials) == trials.rightward


def adam(network: RateNetwork) -> torch.optim.Optimizer:
    return torch.optim.Adam(network.parameters(), LEARNING_RATE)


@dataclass
class History:
    """Of every training step: the loss; and of its trials (steps, B), strength and correctness."""

    losses: list[float]
    strength: Tensor
    correct: Tensor

    def accuracy(self, strength: float, window: int) -> Tensor:
        """Moving fraction of correct answers at one strength, over so many steps."""
        asked = torch.isclose(self.strength, torch.tensor(strength))
        correct = (asked & self.correct).sum(1).unfold(0, window, 1).sum(1)
        return correct / asked.sum(1).unfold(0, window, 1).sum(1)


def train(network: RateNetwork, args: argparse.Namespace) -> History:
    losses, strength, correct = [], [], []
    optimizer = adam(network)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    for step in progress(args.steps, lambda: f"loss {losses[-1]:.3f}"):
        trials = Trials.mixed(args.batch)
        loss, right = train_step(network, optimizer, trials)
        if not math.isfinite(loss):
            fail(f"the loss of step {step} is {loss}", 1)
        schedule.step()
        losses.append(loss)
        strength.append(trials.coherence.abs())
        correct.append(right)
    return History(losses, torch.stack(strength), torch.stack(correct))


def progress(steps: int, figures: Callable[[], str]) -> Iterator[int]:
    """Counts steps: a bar on a terminal; elsewhere, as in a log, a line for each tenth."""
    from tqdm import tqdm

    bar = tqdm(range(steps), desc="training", disable=None)
    for step in bar:
        yield step
        bar.set_postfix_str(figures(), refresh=False)
        if bar.disable and 10 * (step + 1) // steps > 10 * step // steps:
            print(f"step {step + 1}/{steps}: {figures()}", flush=True)


# --- what was learned -----------------------------------------------------------------------------


@dataclass
class Behaviour:
    """Many trials of one strength.

    Attributes:
        rightward: (B,) bool, the answers.
        fixated: the fraction of the steps with the mark on in which the network chose to fixate.
        rates: (T, B', H), of the first B' trials.
    """

    strength: float
    trials: Trials
    rightward: Tensor
    fixated: float
    rates: Tensor

    @property
    def correct(self) -> float:
        return (self.rightward == self.trials.rightward).float().mean().item()


@torch.no_grad()
def observe(network: RateNetwork, trials_per_strength: int) -> list[Behaviour]:
    """In training mode still: the noise belongs to the network, not to its training."""
    result = []
    for strength in COHERENCES:
        trials = Trials.draw(torch.full((trials_per_strength,), strength))
        logits, rates = network(trials.stimulus)
        fixated = (logits.argmax(-1) == FIXATE)[trials.target == FIXATE].float().mean().item()
        rates = rates[:, :RATES_OF].clone()  # a copy, so that those of all trials are not kept
        result.append(Behaviour(strength, trials, answer(logits, trials), fixated, rates))
    return result


def psychometric(observed: list[Behaviour]) -> tuple[Tensor, Tensor, Tensor]:
    """Signed coherence, the fraction of answers "right" there, and how many trials, each (11,)."""
    coherence = torch.cat([behaviour.trials.coherence for behaviour in observed])
    answers = torch.cat([behaviour.rightward for behaviour in observed]).float()
    # At 0 the sign is drawn, too, and -0 equals 0.
    values, index = coherence.unique(return_inverse=True)
    count = index.bincount().float()
    return values, index.bincount(weights=answers).float() / count, count


def fit_logistic(coherence: Tensor, rightward: Tensor, count: Tensor) -> tuple[float, float] | None:
    """slope and bias of P(right) = sigmoid(slope c + bias), of maximum likelihood, by Newton.

    None where there is no maximum: all answers are the same, or none is wrong.
    """
    design = torch.stack([coherence, torch.ones_like(coherence)], 1).double()
    count, rightward = count.double(), rightward.double()
    fit = torch.zeros(2, dtype=torch.float64)
    for _ in range(50):
        expected = torch.sigmoid(design @ fit)
        gradient = design.T @ (count * (rightward - expected))
        curvature = design.T @ (design * (count * expected * (1 - expected))[:, None])
        step, singular = torch.linalg.solve_ex(curvature, gradient)
        fit += step
        if singular or not fit.isfinite().all():
            return None
        if step.abs().max() < 1e-9:
            return fit[0].item(), fit[1].item()
    return None


def preferring_right(observed: list[Behaviour]) -> Tensor:
    """(H,) bool: the unit's rate rises with coherence. Judged from the first half of the rates."""
    pairs = [(behaviour, behaviour.rates.shape[1] // 2) for behaviour in observed]
    coherence = torch.cat([behaviour.trials.coherence[:half] for behaviour, half in pairs])
    during = torch.cat(
        [behaviour.rates[STIMULUS_STEPS, :half].mean(0) for behaviour, half in pairs]
    )
    return (coherence - coherence.mean()) @ during > 0


def rates_by_choice(
    behaviour: Behaviour, units: Tensor, right: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Mean rate (T,) of units (H,) bool, in trials that end with their preferred answer, and in
    the others; correct trials of the second half. None where there is no such trial."""
    kept = behaviour.rates.shape[1]
    second = slice(kept // 2, kept)
    rates, said = behaviour.rates[:, second], behaviour.rightward[second]
    valid = said == behaviour.trials.rightward[second]
    if behaviour.strength == 0:  # there is nothing to be wrong about
        valid = torch.ones_like(said)
    means = []
    for preferred in (True, False):
        groups = [
            rates[:, valid & (said == (side == preferred))][..., units & (right == side)]
            for side in (True, False)
        ]
        sums = sum(group.sum((1, 2)) for group in groups)
        count = sum(group[0].numel() for group in groups)
        means.append(sums / count if count else None)
    return means[0], means[1]


def check_dale(weight: Tensor, excitatory: int) -> str:
    """Of the trained W, (H, H): the signs of what every unit sends."""
    wrong = (weight[:, :excitatory] < 0).sum() + (weight[:, excitatory:] > 0).sum()
    if wrong or weight.diagonal().any():
        fail(f"Dale's law is broken: {int(wrong)} of {weight.numel()} weights have a wrong sign", 1)
    strong = int((weight.abs() > 0.01 * weight.abs().max()).sum())
    return (
        f"Dale's law holds: of {excitatory} units all {excitatory * (len(weight) - 1)} weights are "
        f">= 0, of {len(weight) - excitatory} units all "
        f"{(len(weight) - excitatory) * (len(weight) - 1)} are <= 0; {strong} are above 1 % of the "
        "largest"
    )


# --- the usual loop and the fused loop side by side -----------------------------------------------


def states_and_gradients(network: RateNetwork, trials: Trials) -> dict[str, Tensor]:
    network.eval()  # without noise, of which both would draw their own
    network.zero_grad()
    logits, rates = network(trials.stimulus)
    loss_of(logits, trials).backward()
    network.train()
    gradients = {name: parameter.grad.clone() for name, parameter in network.named_parameters()}
    return {"rates": rates.detach()} | gradients


def check_agreement(network: RateNetwork, loop: RateNetwork, trials: Trials) -> str:
    """Compare states and gradients of both; fail if rounding does not explain the difference.

    The truth is the loop in float64. The loop in float32 has an error E against it; the fused loop
    adds in another order, and its error is a draw of the same kind. It may be 2 E, plus the
    rounding of one sum, r = eps (1 + ceil(log2 K)) of the largest value, as E may be small by luck;
    the longest sum is a gradient's, over K = T B steps. (A mistake shows in the first digits.)
    """
    exact = copy.deepcopy(loop).double()
    doubled = Trials(**{name: to_double(value) for name, value in vars(trials).items()})
    truth = states_and_gradients(exact, doubled)
    theirs, ours = states_and_gradients(loop, trials), states_and_gradients(network, trials)
    rounding = torch.finfo(torch.float32).eps * (1 + math.ceil(math.log2(trials.counts.numel())))
    worst = 0.0
    for name, value in truth.items():
        scale = value.abs().max().item()
        error = (ours[name].double() - value).abs().max().item()
        bound = 2 * (theirs[name].double() - value).abs().max().item() + rounding * scale
        if not error <= bound:
            fail(f"the loops disagree: {name} by {error:.1e}, bound {bound:.1e}", 1)
        worst = max(worst, error / scale)
    return f"the loops agree: states and all {len(truth) - 1} gradients, to {worst:.0e} relative"


def to_double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def seconds_per_step(
    network: RateNetwork, loop: RateNetwork, args: argparse.Namespace
) -> dict[str, float]:
    """Medians of whole training steps, taken in turns: what else the machine does slows both."""
    from tqdm import tqdm

    pairs = {"loop": (loop, adam(loop)), "torch_bptt": (network, adam(network))}
    seconds = {name: [] for name in pairs}
    for _ in tqdm(range(args.timed), desc="timing", disable=None):
        trials = Trials.mixed(args.batch)
        for name, pair in pairs.items():
            begin = time.perf_counter()
            train_step(*pair, trials)
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


# --- pictures -------------------------------------------------------------------------------------

COLOURS = dict(zip(INPUTS, ("#444444", "#1f6fb4", "#c8102e"), strict=True))
GREY = "#a9b4c2"
MILLISECONDS = torch.arange(STEPS) * DT - FIXATION  # 0 is the onset of the dots
LAYOUT = """
    ABCD
    EBCD
    FGHI
    FGHI
"""


def draw(
    network: RateNetwork,
    before: Tensor,
    history: History,
    observed: list[Behaviour],
    seconds: dict[str, float],
    path: Path,
) -> None:
    """Above: a trial, learning, behaviour, speed. Below: rates of E and I, W before and after."""
    import matplotlib

    matplotlib.use("Agg")  # draws to a file, needs no screen
    from matplotlib import pyplot

    style = {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    with pyplot.rc_context({**style, "font.size": 10}):
        figure, axes = pyplot.subplot_mosaic(LAYOUT, figsize=(20, 9.6), layout="constrained")
        draw_trial(axes["A"], axes["E"], network)
        draw_learning(axes["B"], history)
        draw_psychometric(axes["C"], observed)
        draw_seconds(axes["D"], seconds)
        excitatory = torch.arange(len(before)) < network.excitatory
        right = preferring_right(observed)
        draw_rates(axes["F"], observed, excitatory, right, "Excitatory units")
        draw_rates(axes["G"], observed, ~excitatory, right, "Inhibitory units")
        order = (2 * ~excitatory + right.long()).argsort(stable=True)
        after = network.rnn.weight_hh_l0.detach()
        for key, weight, when in (("H", before, "before"), ("I", after, "after")):
            image = draw_weights(axes[key], weight[order][:, order], f"W {when} training")
            axes[key].axvline(network.excitatory - 0.5, color="k", linewidth=0.8)
            figure.colorbar(image, ax=axes[key], shrink=0.6)
        figure.savefig(path, dpi=110)
        pyplot.close(figure)


@torch.no_grad()
def draw_trial(above, below, network: RateNetwork) -> None:
    trials = Trials.draw(torch.tensor([0.256]))
    probability = network(trials.stimulus)[0].softmax(-1)
    for index, (name, colour) in enumerate(COLOURS.items()):
        above.plot(MILLISECONDS, trials.stimulus[:, 0, index], color=colour, lw=0.8, label=name)
    for index, colour in enumerate(COLOURS.values()):
        below.plot(MILLISECONDS, probability[:, 0, index], color=colour, lw=2)
    side = INPUTS[RIGHT if trials.rightward else LEFT]
    above.set(title=f"One trial, 25.6 % to the {side}: what it sees", xticklabels=[])
    above.legend(loc="upper right", fontsize=8)
    below.set(title="what it does: fixate, left, right", xlabel="ms from the onset of the dots")
    below.set(ylabel="probability", ylim=(-0.05, 1.05))


def draw_learning(axes, history: History) -> None:
    losses, window = torch.tensor(history.losses), max(1, len(history.losses) // 30)
    axes.plot(losses, color=GREY, lw=0.6)
    steps = range(window, len(losses) + 1)
    means = losses.unfold(0, window, 1).mean(1)
    axes.plot(steps, means, "k", label="loss")
    for strength, colour in zip(COHERENCES[1:], shades(), strict=True):
        accuracy = history.accuracy(strength, window)
        axes.plot(steps, accuracy, color=colour, lw=1.2, label=f"{strength:.1%}")
    axes.set(title="Learning: loss, and correct answers by coherence", xlabel="training step")
    axes.set(ylim=(0, 1.2))
    axes.legend(loc="lower left", ncols=3, fontsize=8)


def draw_psychometric(axes, observed: list[Behaviour]) -> None:
    coherence, rightward, count = psychometric(observed)
    fit = fit_logistic(coherence, rightward, count)
    error = (rightward * (1 - rightward) / count).sqrt()
    fine = torch.linspace(-0.55, 0.55, 200)
    axes.plot(100 * fine, ideal_observer(fine), color=GREY, lw=5, label="ideal observer")
    if fit:
        fitted = torch.sigmoid(fit[0] * fine + fit[1])
        axes.plot(100 * fine, fitted, "k", lw=1.2, label="logistic fit")
    axes.errorbar(
        100 * coherence, rightward, error, fmt="o", color=COLOURS["right"], label="network"
    )
    axes.set(title="Psychometric curve", xlabel="coherence, %: left < 0 < right")
    axes.set(ylabel='answers "right"', ylim=(-0.03, 1.03))
    axes.legend(loc="upper left")


def draw_seconds(axes, seconds: dict[str, float]) -> None:
    titles = ("loop in Python", "torch_bptt.RNN")
    milliseconds = [1e3 * value for value in seconds.values()]
    bars = axes.bar(titles, milliseconds, color=(GREY, COLOURS["right"]), width=0.6)
    axes.bar_label(bars, fmt="%.1f ms")
    ratio = milliseconds[0] / milliseconds[1]
    axes.set(title=f"One training step: {ratio:.1f} times faster", ylabel="ms, median")


def draw_rates(axes, observed: list[Behaviour], units: Tensor, right: Tensor, title: str) -> None:
    for behaviour, colour in zip(observed, shades(zero=True), strict=True):
        axes.plot([], [], color=colour, label=f"{behaviour.strength:.1%}")
        for rates, line in zip(rates_by_choice(behaviour, units, right), "-:", strict=True):
            if rates is not None:
                axes.plot(MILLISECONDS, rates, line, color=colour, lw=1.5)
    axes.axvspan(0, STIMULUS, color="#f2f2f2", zorder=0)
    axes.set(title=f"{title}: preferred choice —, other ···", ylabel="mean rate")
    axes.set(xlabel="ms from the onset of the dots")
    axes.legend(title="coherence", fontsize=8, loc="upper left")


def draw_weights(axes, weight: Tensor, title: str):
    limit = weight.abs().quantile(0.99).item()
    image = axes.imshow(weight.numpy(), "RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    axes.set(title=title, xlabel="from: E | I, in each left then right", ylabel="to")
    return image


def shades(zero: bool = False) -> list:
    """One colour for each coherence, from light to dark."""
    from matplotlib import colormaps

    colours = colormaps["viridis_r"](torch.linspace(0.15, 1, len(COHERENCES)).numpy())
    return list(colours if zero else colours[1:])


# --- the command line -----------------------------------------------------------------------------

SIZES = {  # default, with --quick, help
    "units": (100, 50, "recurrent units: four fifths excite, one fifth inhibits"),
    "steps": (2000, 600, "training steps"),
    "batch": (32, 32, "trials per training step"),
    "trials": (1000, 1000, "trials per coherence of the psychometric curve"),
    "timed": (30, 5, "training steps that are timed"),
}


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        description="A leaky rate network with Dale's law learns a perceptual decision."
    )
    add = parser.add_argument
    for name, (full, quick, text) in SIZES.items():
        add(f"--{name}", type=count, metavar="N", help=f"{text} (default {full}; --quick: {quick})")
    add("--seed", type=natural, metavar="N", default=0, help="of weights and trials (default 0)")
    add("--threads", type=count, metavar="N", help="CPU threads (default: PyTorch's own choice)")
    add(
        "--out", type=Path, metavar="DIR", default="out/perceptual_decision", help="for the picture"
    )
    add("--quick", action="store_true", help="a small network that learns in seconds")
    args = parser.parse_args()
    for name, (full, quick, _) in SIZES.items():
        if getattr(args, name) is None:
            setattr(args, name, quick if args.quick else full)
    if args.units % 5:
        parser.error(f"argument --units: must be a multiple of 5 (4 E : 1 I), got {args.units}")
    return args


def main() -> int:
    args = parse_arguments()
    require(["tqdm", "matplotlib"])
    make_folder(args.out)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    network = RateNetwork(args.units)
    print(f"T = {STEPS} steps of {DT:g} ms, B = {args.batch}, H = {args.units}, alpha = {ALPHA:g}")
    before = network.rnn.weight_hh_l0.detach()
    history = train(network, args)
    print(check_dale(network.rnn.weight_hh_l0.detach(), network.excitatory))

    observed = observe(network, args.trials)
    print("\ncoherence    correct    ideal observer")
    for behaviour in observed[1:]:
        ideal = ideal_observer(torch.tensor(behaviour.strength)).item()
        print(f"{behaviour.strength:>8.1%} {behaviour.correct:>11.1%} {ideal:>14.1%}")
    fixated = statistics.fmean(behaviour.fixated for behaviour in observed)
    print(f"while the mark is on it fixates in {fixated:.1%} of the steps")
    fit = fit_logistic(*psychometric(observed))
    if fit:
        print(f"logistic fit: slope {fit[0]:.1f}, so 75 % correct at {math.log(3) / fit[0]:.1%}")
    print()

    loop = RateNetwork(args.units, loop=True)
    loop.load_state_dict(network.state_dict())
    print(check_agreement(network, loop, Trials.mixed(args.batch)))
    seconds = seconds_per_step(copy.deepcopy(network), loop, args)
    milliseconds = "{loop:.1f} ms with the loop in Python, {torch_bptt:.1f} ms with torch_bptt.RNN"
    scaled = {name: 1e3 * value for name, value in seconds.items()}
    print(f"one training step: {milliseconds.format(**scaled)}")
    print(f"speed-up: {seconds['loop'] / seconds['torch_bptt']:.1f} times")

    path = args.out / "perceptual_decision.png"
    draw(network, before, history, observed, seconds, path)
    print(f"\npicture: {path}")
    return 0


if __name__ == "__main__":
    run(main)
