"""The gradient on its way back through one layer, in numbers.

``_watch`` gets the norms; what all of ``diagnose`` asks of a module is here, too.
"""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from torch_bptt.reference import activations
from torch_bptt.rnn import RNN

# The largest slope of each activation, sup |f'|.
STEEPEST = {"tanh": 1.0, "relu": 1.0, "sigmoid": 0.25, "identity": 1.0}
# A unit counts as saturated where its slope is below this share of the largest one.
SATURATED = 0.1


def watched(model: nn.Module, function: str) -> dict[str, RNN]:
    """The RNNs of model by their names, or an error in the name of ``function``."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be a torch.nn.Module, got {type(model).__name__}")
    found = {name: module for name, module in model.named_modules() if isinstance(module, RNN)}
    if not found:
        theirs = [name for name, module in model.named_modules() if isinstance(module, nn.RNN)]
        got = f"torch.nn.RNN ({theirs[0] or 'model itself'})" if theirs else "none"
        advice = ": replace it with torch_bptt.convert(model)" if theirs else ""
        raise ValueError(
            f"{function}: model must be or contain a torch_bptt.RNN, got {got}{advice}"
        )
    return found


def activation_of(module: RNN) -> str:
    return module.mode.removeprefix("RNN_").lower()


def alpha_of(module: RNN, index: int) -> Tensor:
    """The leak of layer and direction ``index``, () or (H,), in float64."""
    device = module.alpha.device if isinstance(module.alpha, Tensor) else "cpu"
    alpha = torch.as_tensor(module.alpha, dtype=torch.float64, device=device).detach()
    return alpha[index] if alpha.dim() == 2 else alpha


def label(module: str, layer: int, reverse: bool) -> str:
    """A layer and direction for people: 'rnn, layer 1 reverse'."""
    return f"{module}{', ' if module else ''}layer {layer}{' reverse' if reverse else ''}"


class Place(NamedTuple):
    """Where in the sequence: step t and row b, as the caller counts them."""

    step: int
    row: int


@dataclass(frozen=True, eq=False)
class LayerFlow:
    """One layer in one direction, in one call of its module.

    Attributes:
        module: name of the module in ``model.named_modules()``; "" is the model itself.
        call: which call of that module within the ``with`` block, from 0.
        layer, reverse: which layer, from 0, and whether it runs from the last step to the first.
        activation: 'tanh', 'relu', 'sigmoid' or 'identity'.
        norms: (T, B), the Euclidean norm over H of dL/dh_t, the whole gradient of that state, on
            the CPU; NaN at steps that do not exist. float32, float64 where the module is.
        states: (T, B, H), h_t, on the CPU; NaN at steps that do not exist.
        lengths: (B,), the steps of each row that exist.
        alpha: the leak, () or (H,), float64.
        reset: (T, B) bool, or None, as the module was given it.
    """

    module: str
    call: int
    layer: int
    reverse: bool
    activation: str
    norms: Tensor
    states: Tensor
    lengths: Tensor
    alpha: Tensor
    reset: Tensor | None

    @property
    def label(self) -> str:
        """A name for people: 'rnn, layer 0', 'rnn, layer 1 reverse, call 2'."""
        call = f", call {self.call}" if self.call else ""
        return label(self.module, self.layer, self.reverse) + call

    @property
    def rms_by_step(self) -> Tensor:
        """(T,) float64: root mean square over rows of the norms at step t; NaN where no row is."""
        there = torch.arange(len(self.norms), device="cpu")[:, None] < self.lengths
        return _log_rms(self.norms.double().log(), there).exp()

    @functools.cached_property
    def log_norms(self) -> Tensor:
        """(longest row,) float64: log of the root mean square over rows, by steps back.

        Entry j belongs to the step that backpropagation reaches after j steps: j before the last
        one of each row (in reverse, j after the first). The mean is over rows that are so long.
        """
        longest = int(self.lengths.max()) if len(self.lengths) else 0
        back = torch.arange(longest, device="cpu")[:, None]
        there = back < self.lengths
        step = back.expand(there.shape) if self.reverse else self.lengths - 1 - back
        return _log_rms(self.norms.double().gather(0, step.clamp(min=0)).log(), there)

    @functools.cached_property
    def _slope(self):
        logs = self.log_norms
        back = torch.arange(len(logs), dtype=logs.dtype, device="cpu")
        usable = logs.isfinite() & (logs >= math.log(torch.finfo(self.norms.dtype).tiny))
        if usable.sum() < 2:
            return None
        logs, back = logs[usable], back[usable] - back[usable].mean()
        return (back * logs).sum() / back.square().sum()

    @property
    def growth(self) -> float | None:
        """The factor by which the norm changes per step back: exp of the slope of log_norms.

        Fitted by least squares to the steps where the norm is finite and not zero (for float32, at
        least 1.2e-38); None where those are fewer than two.
        """
        return None if self._slope is None else self._slope.exp().item()

    @property
    def half_life(self) -> float | None:
        """Steps back in which the norm halves; None where it does not shrink."""
        slope = self._slope
        return math.log(2) / -slope.item() if slope is not None and slope < 0 else None

    @property
    def doubling(self) -> float | None:
        """Steps back in which the norm doubles; None where it does not grow."""
        slope = self._slope
        return math.log(2) / slope.item() if slope is not None and slope > 0 else None

    @property
    def largest(self) -> float | None:
        """The largest norm, root mean square over rows; None where there is no step."""
        return self.log_norms.max().exp().item() if len(self.log_norms) else None

    @property
    def left(self) -> float | None:
        """The norm where backpropagation arrives last, over the norm at its largest.

        None where no gradient came or some of it is not finite.
        """
        logs = self.log_norms
        return (logs[-1] - logs.max()).exp().item() if self._sound else None

    @property
    def grown(self) -> float | None:
        """The norm at its largest, over the first one that is not zero on the way back.

        None where no gradient came or some of it is not finite.
        """
        logs = self.log_norms
        return (logs.max() - logs[logs > -math.inf][0]).exp().item() if self._sound else None

    @property
    def reach(self) -> int | None:
        """How many steps back there is a gradient that is not zero; None where there is none."""
        back = (self.log_norms != -math.inf).nonzero()
        return int(back.max()) if len(back) else None

    @property
    def _sound(self):
        return self.reach is not None and bool((self.log_norms < math.inf).all())

    @functools.cached_property
    def slopes(self) -> Tensor:
        """(T, B, H): f'(z_t) divided by its largest value, in [0, 1].

        NaN at steps that do not exist, and with alpha < 1 where the output does not tell the state
        that arrived: at a row's first step and after a reset.
        """
        f = self.states if self.states.dtype == torch.float64 else self.states.float()
        if not (self.alpha == 1).all():
            alpha, p = self.alpha.to(f.dtype), self._arriving(f)
            driven = f - (1 - alpha) * p
            # h is rounded to its dtype: below that f(z) is zero, and for relu the side matters.
            noise = torch.finfo(self.states.dtype).eps * f.abs()
            f = torch.where(driven.abs() <= noise, 0, driven / alpha)
        _, slope = activations[self.activation]
        return torch.where(f.isnan(), math.nan, slope(f) / STEEPEST[self.activation])

    def _arriving(self, h):
        """p_t, as far as it is in the output; else NaN."""
        unknown = torch.full_like(h[:1], math.nan)
        cut = torch.tensor(False, device="cpu") if self.reset is None else self.reset[..., None]
        if self.reverse:  # a reset before t keeps the state of t from t - 1
            return torch.cat((torch.where(cut, math.nan, h)[1:], unknown))
        return torch.where(cut, math.nan, torch.cat((unknown, h[:-1])))

    @property
    def saturated(self) -> float | None:
        """The share of all (step, row, unit) where the slope is below 0.1 of its largest value.

        For relu, where the unit is off. None where no slope is known.
        """
        known = self.slopes[~self.slopes.isnan()]
        return (known < SATURATED).double().mean().item() if len(known) else None

    @property
    def saturated_by_step(self) -> Tensor:
        """(T,) float64: as ``saturated``, step by step; NaN where no slope is known."""
        known = ~self.slopes.isnan()
        low = (known & (self.slopes < SATURATED)).sum((1, 2))
        return low.double() / known.sum((1, 2))

    @property
    def dead(self) -> float | None:
        """The share of units that are saturated at every step of every row."""
        known = ~self.slopes.isnan()
        if not known.any():
            return None
        always = known.any(1).any(0) & ~(self.slopes >= SATURATED).any(1).any(0)
        return always.double().mean().item()

    @property
    def first_bad_state(self) -> Place | None:
        """The first step, in the order of processing, with an h_t that is NaN or infinite."""
        return self._first(~self.states.isfinite().all(-1), self.reverse)

    @property
    def first_bad_gradient(self) -> Place | None:
        """The first step that backpropagation reaches where the norm is NaN or infinite."""
        return self._first(~self.norms.isfinite(), not self.reverse)

    def _first(self, bad: Tensor, downward: bool) -> Place | None:
        exists = torch.arange(len(bad), device="cpu")[:, None] < self.lengths
        places = (bad & exists).nonzero()
        if not len(places):
            return None
        step = places[:, 0].max() if downward else places[:, 0].min()
        return Place(int(step), int(places[places[:, 0] == step][0, 1]))


def _log_rms(logs: Tensor, there: Tensor) -> Tensor:
    """Log of the root mean square over rows that are there, from logs: squares may be too large or
    too small for a float64, their logs are not."""
    squares = torch.logsumexp(2 * torch.where(there, logs, -math.inf), 1)
    return (squares - there.sum(1).double().log()) / 2
