"""gradient_flow: the size of dL/dh_t at every step, written down by the backward that runs anyway.

``gradient_flow`` gives every RNN of a model an observer. In forward the observer hands each layer
and direction a probe, zeros of one number per row of the sequence; backward puts the norms of
dL/dh_t where the gradient of the probe would go. The rest of this file puts rows back where the
caller had them (time-major, in the caller's order) and says in numbers what happened.
"""

import contextlib
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from torch_bptt import checks
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
    alpha = torch.as_tensor(module.alpha, dtype=torch.float64).detach()
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
        there = torch.arange(len(self.norms))[:, None] < self.lengths
        return _log_rms(self.norms.double().log(), there).exp()

    @functools.cached_property
    def log_norms(self) -> Tensor:
        """(longest row,) float64: log of the root mean square over rows, by steps back.

        Entry j belongs to the step that backpropagation reaches after j steps: j before the last
        one of each row (in reverse, j after the first). The mean is over rows that are so long.
        """
        back = torch.arange(int(self.lengths.max()) if len(self.lengths) else 0)[:, None]
        there = back < self.lengths
        step = back.expand(there.shape) if self.reverse else self.lengths - 1 - back
        return _log_rms(self.norms.double().gather(0, step.clamp(min=0)).log(), there)

    @functools.cached_property
    def _slope(self):
        logs = self.log_norms
        back = torch.arange(len(logs), dtype=logs.dtype)
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
            # h is the rounded sum of two rounded terms: within a few roundings f(z) is zero, and
            # for relu it matters on which side.
            noise = 8 * torch.finfo(self.states.dtype).eps * (f.abs() + p.abs())
            f = torch.where(driven.abs() <= noise, 0, driven / alpha)
        _, slope = activations[self.activation]
        return torch.where(f.isnan(), math.nan, slope(f) / STEEPEST[self.activation])

    def _arriving(self, h):
        """p_t, as far as it is in the output; else NaN."""
        unknown = torch.full_like(h[:1], math.nan)
        cut = torch.tensor(False) if self.reset is None else self.reset[..., None]
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
        exists = torch.arange(len(bad))[:, None] < self.lengths
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


class GradientFlow:
    """What ``gradient_flow`` saw: a sequence of ``LayerFlow``, in the order of the forward pass."""

    def __init__(self, model: nn.Module):
        self.model = model
        self._records: list[_Record] = []

    @property
    def layers(self) -> list[LayerFlow]:
        """One for each layer and direction of each call of each RNN.

        Raises:
            RuntimeError: no RNN ran, backward did not run, or it ran twice through one forward.
        """
        if not self._records:
            raise RuntimeError(
                "gradient_flow: the model must run inside the `with` block, got no call of an RNN"
            )
        if all(record.probe.grad is None for record in self._records):
            raise RuntimeError(
                "gradient_flow: loss.backward() must have run on a loss that depends on an RNN, "
                "with gradients enabled, got no gradient of a state "
                "(torch.autograd.grad asks for others only)"
            )
        twice = [record for record in self._records if len(record.backwards) > 1]
        if twice:
            raise RuntimeError(
                "gradient_flow: backward must run once for each forward, got "
                f"{len(twice[0].backwards)} times through one: norms of different losses do not "
                "add up to the norm of their sum"
            )
        return [record.flow() for record in self._records]

    @property
    def probes(self) -> list[Tensor]:
        """The tensors whose gradients are the norms: ``torch.autograd.backward(loss, inputs=...)``
        with them leaves the gradients of all parameters alone."""
        return [record.probe for record in self._records]

    def __iter__(self) -> Iterator[LayerFlow]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, index: int) -> LayerFlow:
        return self.layers[index]

    def plot(self, ax=None):
        """The norm of dL/dh_t over t, one line for each layer, on a logarithmic axis.

        Arguments:
            ax: matplotlib Axes to draw on; None makes a figure.
        Returns:
            The Axes.
        Raises:
            ModuleNotFoundError: there is no matplotlib.
        """
        from torch_bptt import _plots

        return _plots.gradient_flow(self.layers, ax)

    def plot_saturation(self, ax=None):
        """The share of saturated units over t, one line for each layer; as ``plot``."""
        from torch_bptt import _plots

        return _plots.saturation(self.layers, ax)


@contextlib.contextmanager
def gradient_flow(model: nn.Module) -> Iterator[GradientFlow]:
    """Watch the gradient of every state of every RNN in ``model``, for one forward and backward.

    Backward computes d_t = dL/dh_t for every step in any case, so that its norms cost next to
    nothing. The gradients of everything else are what they are without. States are kept until the
    result is dropped.

    Arguments:
        model: a torch.nn.Module that is or contains torch_bptt.RNN, of whatever input layout:
            batch_first, one sequence, PackedSequence, lengths.
    Returns:
        A context manager that gives a ``GradientFlow``. Run forward inside the ``with`` block, and
        backward there or later; read it after backward.
    Raises:
        TypeError, ValueError: there is no torch_bptt.RNN to watch.
        RuntimeError: a module is watched already; on reading, backward has not run.
    Example:
        >>> from torch_bptt import RNN
        >>> _ = torch.manual_seed(0)
        >>> model = RNN(3, 16)
        >>> with gradient_flow(model) as flow:
        ...     output, h_n = model(torch.randn(50, 4, 3))
        ...     output[-1].sum().backward()
        >>> flow[0].norms.shape
        torch.Size([50, 4])
        >>> print(f"halves every {flow[0].half_life:.1f} steps")
        halves every 1.0 steps

    Source:
        Bengio, Simard and Frasconi (1994), Learning long-term dependencies with gradient descent is
        difficult; Pascanu, Mikolov and Bengio (2013), On the difficulty of training recurrent
        neural networks.
    """
    modules = watched(model, "gradient_flow")
    for name, module in modules.items():
        if type(module).forward is not RNN.forward:
            raise TypeError(
                "gradient_flow: a class derived from torch_bptt.RNN must keep its forward, "
                f"got {type(module).__name__}: give it an RNN as a submodule instead"
            )
        if module._observer is not None:
            raise RuntimeError(
                f"gradient_flow: {name or 'model'} must be watched once at a time, "
                "got a `with` block inside another"
            )
    flow = GradientFlow(model)
    with contextlib.ExitStack() as exits:
        for name, module in modules.items():
            observer = _Observer(flow._records, name, module)
            hook = module.register_forward_pre_hook(observer.called, with_kwargs=True)
            module._observer = observer
            exits.callback(setattr, module, "_observer", None)
            exits.callback(hook.remove)
        yield flow


class _Observer:
    """What an RNN talks to while it runs: ``called`` once, then ``probe`` and ``record`` for each
    layer and direction."""

    def __init__(self, records: list["_Record"], name: str, module: RNN):
        self.records, self.name, self.module = records, name, module
        self.calls = 0
        self.arguments = None  # of the call that is about to run
        self.layout = None  # of the call that runs

    def called(self, _, args, kwargs):
        self.arguments = args, kwargs

    def probe(self, like: Tensor) -> Tensor:
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        return torch.zeros(like.shape[:-1], dtype=dtype, device=like.device, requires_grad=True)

    def record(self, index, output, probe, batch_sizes, reverse):
        if index == 0:
            self.layout = self._arrange(batch_sizes)
            self.calls += 1
        directions = 2 if self.module.bidirectional else 1
        backwards: list[bool] = []
        probe.register_hook(lambda _: backwards.append(True))
        self.records.append(
            _Record(
                self.name, self.calls - 1, index // directions, reverse,
                activation_of(self.module), alpha_of(self.module, index).cpu().clone(),
                output.detach(), probe, self.layout, backwards,
            )
        )  # fmt: skip

    def _arrange(self, batch_sizes):
        arguments, self.arguments = self.arguments, None
        if arguments is None:
            raise RuntimeError(
                "gradient_flow: call the module, module(input), got module.forward(input)"
            )
        args, kwargs = arguments
        return _Layout.of(self.module.batch_first, batch_sizes, *args, **kwargs)


@dataclass(frozen=True)
class _Layout:
    """Where the rows that a layer sees, sorted and packed perhaps, are in the caller's (T, B).

    place: (step, row) of each packed row; None where rows are (T, B) as they come.
    reset: (T, B) or None.
    """

    steps: int
    lengths: Tensor
    place: tuple[Tensor, Tensor] | None
    reset: Tensor | None

    @classmethod
    def of(cls, batch_first, batch_sizes, input, hx=None, *, lengths=None, reset=None, **_):
        """From the arguments of a forward that accepted them, and the batch_sizes it made."""
        reset = None if reset is None else reset.cpu()
        if isinstance(input, PackedSequence):
            steps, rows, order = len(batch_sizes), int(batch_sizes[0]), input.sorted_indices
            order = torch.arange(rows) if order is None else order.cpu()
        else:
            if input.dim() == 2:
                input, reset = input.unsqueeze(1), None if reset is None else reset.unsqueeze(1)
            elif batch_first:
                input, reset = input.transpose(0, 1), None if reset is None else reset.T
            steps, rows = input.shape[:2]
            if lengths is None:
                return cls(steps, torch.full((rows,), steps), None, reset)
            # As functional.run sorts them, ties included.
            lengths, order = checks.check_lengths(lengths, steps, rows).sort(descending=True)
            order = order[lengths > 0]
        # Where no row has a step, there are no packed rows and no batch_sizes either.
        sizes = torch.empty(0, dtype=torch.int64) if batch_sizes is None else batch_sizes
        step, column = (torch.arange(len(order)) < sizes[:, None]).nonzero(as_tuple=True)
        lengths = torch.zeros(rows, dtype=torch.int64)
        lengths[order] = torch.bincount(column, minlength=len(order))
        return cls(steps, lengths, (step, order[column]), reset)

    def spread(self, rows: Tensor, *features: int) -> Tensor:
        """What a layer has for each row -> (T, B, *features) on the CPU, NaN where no step is."""
        if self.place is None:
            return rows.cpu()
        full = rows.new_full((self.steps, len(self.lengths), *features), math.nan, device="cpu")
        return full.index_put(self.place, rows.cpu().reshape(-1, *features))


@dataclass(frozen=True)
class _Record:
    """What the observer was told of one layer in one direction; ``flow`` makes sense of it."""

    module: str
    call: int
    layer: int
    reverse: bool
    activation: str
    alpha: Tensor
    output: Tensor
    probe: Tensor
    layout: _Layout
    backwards: list[bool]

    def flow(self) -> LayerFlow:
        # Backward of the loss did not come by here: the gradient is zero.
        norms = torch.zeros_like(self.probe) if self.probe.grad is None else self.probe.grad
        layout = self.layout
        return LayerFlow(
            self.module, self.call, self.layer, self.reverse, self.activation,
            layout.spread(norms), layout.spread(self.output, self.output.shape[-1]),
            layout.lengths, self.alpha, layout.reset,
        )  # fmt: skip
