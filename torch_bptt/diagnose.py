"""Where the gradient dies: what backpropagation through time does to a network, in numbers.

    print(diagnose.report(model, lambda: criterion(model(x), y)))       in plain words
    with diagnose.gradient_flow(model) as flow: ...                     norms of dL/dh_t
    diagnose.jacobian_spectrum(rnn, x)                                  singular values, exponents
    diagnose.weights(model)                                             spectral radius, sigma_max

``docs/diagnose.md`` has a session. Norms come from ``_watch``, numbers from ``_flow``
and ``_spectrum``, pictures from ``_plots``; the words are here.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from torch_bptt._flow import SATURATED, LayerFlow, Place
from torch_bptt._spectrum import (
    JacobianSpectrum,
    LayerSpectrum,
    LayerWeights,
    Weights,
    jacobian_spectrum,
    weights,
)
from torch_bptt._watch import GradientFlow, gradient_flow

__all__ = [
    "GradientFlow", "JacobianSpectrum", "LayerFlow", "LayerSpectrum", "LayerWeights", "Place",
    "Report", "Weights", "gradient_flow", "jacobian_spectrum", "report", "weights",
]  # fmt: skip

# What is a finding, and marked in the text.
VANISHED = 1e-3  # of the largest norm: less than that is left at the far end
EXPLODED = 1e3  # times the norm where it entered: more than that is its largest norm
MANY_SATURATED = 0.5  # of all (step, row, unit); not for relu, where half of them off is usual
MANY_DEAD = 0.1  # of the units, saturated at every step of every row
SHOWN = 12  # layers and calls in the text; the dictionary has all


class Report:
    """What ``report`` found: print it, or take the numbers from ``as_dict``.

    Attributes:
        flow: the ``GradientFlow``.
        weights: the ``Weights``, as they were when the report was made.
        text: what print shows; lines that begin with "!" are findings.
        findings: those lines, each with the layer it is about.
    """

    def __init__(self, flow: GradientFlow):
        self.flow = flow
        self.weights = weights(flow.model)
        of = {(w.module, w.layer, w.reverse): w for w in self.weights}
        self._entries = []  # (label, numbers, words) for each layer and direction of each call
        for layer in flow.layers:
            numbers = _numbers(layer, of[layer.module, layer.layer, layer.reverse])
            self._entries.append((layer.label, numbers, _words(numbers)))

    @property
    def text(self) -> str:
        lines = []
        for label, numbers, words in self._entries[:SHOWN]:
            size = "{units} {activation} units, {steps} steps, {rows} rows".format(**numbers)
            lines.append(f"{label}: {size}")
            lines += [f"  {'!' if finding else ' '} {sentence}" for finding, sentence in words]
        hidden = [words for _, _, words in self._entries[SHOWN:]]
        if hidden:
            bad = sum(any(finding for finding, _ in words) for words in hidden)
            lines.append(f"and {len(hidden)} more, {bad} of them with findings: see as_dict()")
        return "\n".join(lines)

    @property
    def findings(self) -> list[str]:
        return [
            f"{label}: {sentence}"
            for label, _, words in self._entries
            for finding, sentence in words
            if finding
        ]

    def as_dict(self) -> dict:
        """The numbers behind the text, as plain Python values.

        Returns:
            ``layers``, a list of dictionaries, one for each layer and direction of each call: the
            numbers among the attributes of ``LayerFlow`` and ``LayerWeights`` under their names; T,
            B and H as ``steps``, ``rows`` and ``units``; the longest row less one as
            ``last_step_back``. And ``findings``. None stands for what is not defined; a ``Place``
            is a list.
        """
        return {"layers": [numbers for _, numbers, _ in self._entries], "findings": self.findings}

    def plot(self):
        """Gradient, saturation and eigenvalues side by side.

        Returns:
            The matplotlib Figure.
        Raises:
            ModuleNotFoundError: there is no matplotlib.
        """
        from torch_bptt import _plots

        return _plots.report(self.flow.layers, self.weights)

    def __str__(self) -> str:
        return self.text


def report(model: nn.Module | GradientFlow, loss: Callable[[], Tensor] | None = None) -> Report:
    """What happens to the gradient on its way back through time, layer by layer, in plain words.

    How fast dL/dh_t shrinks or grows per step back and how much of it arrives at the far end; the
    share of saturated and of dead units; spectral radius and largest singular value of W_hh; where
    a state or a gradient is first NaN or infinite. To see how far back a gradient reaches, use a
    loss on the last step alone: with a loss at every step, every step gets a gradient from nearby.

    Arguments:
        model: a torch.nn.Module that is or contains torch_bptt.RNN, and then loss; or what
            ``gradient_flow`` gave, after backward.
        loss: a function without arguments that runs model and returns the loss, one number. It is
            called once, in whatever mode model is; backpropagation then runs as far as the states,
            and the gradients of parameters stay as they are.
    Returns:
        A ``Report``: print it.
    Raises:
        TypeError, ValueError: an argument does not fit; there is no torch_bptt.RNN in model.
        RuntimeError: loss does not depend on an RNN of model.
    Example:
        >>> from torch_bptt import RNN
        >>> _ = torch.manual_seed(0)
        >>> model = RNN(3, 16)
        >>> x = torch.randn(50, 4, 3)
        >>> print(report(model, lambda: model(x)[0][-1].sum()))
        layer 0: 16 tanh units, 50 steps, 4 rows
          ! gradient vanishes: it halves every 1.0 steps back; 7.2e-15 of it is left 49 steps back
            no unit is saturated at any step
            W_hh: spectral radius 0.568, sigma_max 0.961; a step keeps at most 0.961 of a gradient

    Source:
        Pascanu, Mikolov and Bengio (2013), On the difficulty of training recurrent neural networks.
    """
    if isinstance(model, GradientFlow):
        if loss is not None:
            raise ValueError(
                "report: loss must be None when model is a gradient flow, "
                f"which has one already, got {loss!r}"
            )
        return Report(model)
    if not callable(loss) or isinstance(loss, nn.Module):
        raise TypeError(
            "report: loss must be a function without arguments that runs model and returns the "
            f"loss, as in lambda: criterion(model(x), y), got {type(loss).__name__}"
        )
    with gradient_flow(model) as flow, torch.enable_grad():
        value = loss()
    if not isinstance(value, Tensor):
        raise TypeError(f"report: loss must return a tensor, got {type(value).__name__}")
    if value.numel() != 1:
        raise ValueError(f"report: loss must return one number, got shape {tuple(value.shape)}")
    if flow.probes and value.requires_grad:
        torch.autograd.backward(value, inputs=flow.probes)
    return Report(flow)


def _numbers(layer, weights):
    """One layer of ``Report.as_dict``."""
    own = (
        "module", "call", "layer", "reverse", "activation", "growth", "half_life", "doubling",
        "largest", "left", "grown", "reach", "saturated", "dead",
    )  # fmt: skip
    sizes = {name: getattr(weights, name) for name in ("spectral_radius", "sigma_max", "bound")}
    steps, rows, units = layer.states.shape
    places = layer.first_bad_state, layer.first_bad_gradient
    first_bad_state, first_bad_gradient = (place and list(place) for place in places)
    return {
        **{name: getattr(layer, name) for name in own},
        **{name: None if math.isnan(value) else value for name, value in sizes.items()},
        "steps": steps,
        "rows": rows,
        "units": units,
        "last_step_back": len(layer.log_norms) - 1,
        "first_bad_state": first_bad_state,
        "first_bad_gradient": first_bad_gradient,
    }


def _words(numbers):
    """[(is it a finding, sentence), ...] about one layer."""
    about = _of_the_states, _of_the_gradient, _of_the_units, _of_the_weights
    return [words for say in about if (words := say(**numbers)) is not None]


def _of_the_states(*, first_bad_state, **_):
    if first_bad_state is None:
        return None
    step, row = first_bad_state
    return True, f"state is NaN or infinite, first at step {step} in row {row}"


def _of_the_gradient(
    *, largest, growth, half_life, doubling, left, grown, reach, last_step_back,
    first_bad_gradient, **_,
):  # fmt: skip
    if first_bad_gradient:
        step, row = first_bad_gradient
        return True, f"gradient is NaN or infinite, going back first at step {step} in row {row}"
    if reach is None:
        return True, "no gradient arrives: every dL/dh_t is zero"
    if last_step_back == 0:
        return False, f"gradient has norm {largest:.2g} at the only step"
    if growth is None:
        return left < VANISHED, "gradient is there at one step only"
    if left > 1 / 2 and grown < 2:
        return False, f"gradient keeps its size within a factor of 2 over {reach} steps"
    pace = "goes up and down"
    if half_life:
        pace = f"halves every {half_life:.1f} steps back"
    elif doubling:
        pace = f"doubles every {doubling:.1f} steps back"
    if reach < last_step_back:
        rest = f"nothing is left {reach + 1} steps back"
    elif doubling:
        rest = f"{grown:.2g}-fold in all"
    else:
        rest = f"{left:.2g} of it is left {reach} steps back"
    verdicts = ["explodes"] if grown > EXPLODED else []
    verdicts += ["vanishes"] if left < VANISHED else []
    verdict = f"{' and '.join(verdicts)}: it " if verdicts else ""
    return bool(verdicts), f"gradient {verdict}{pace}; {rest}"


def _of_the_units(*, activation, saturated, dead, **_):
    if activation == "identity" or saturated is None:
        return None
    if activation == "relu":
        found = dead > MANY_DEAD
        return found, f"units are off {_percent(saturated)} of the time; {_percent(dead)} are dead"
    if saturated < 0.005:
        return False, f"{'hardly any' if saturated else 'no'} unit is saturated at any step"
    found = saturated > MANY_SATURATED or dead > MANY_DEAD
    meaning = f"slope below {_percent(SATURATED)} of the largest"
    return found, f"{_percent(saturated)} of units saturated ({meaning}), {_percent(dead)} always"


def _of_the_weights(*, spectral_radius, sigma_max, bound, last_step_back, **_):
    if bound is None:
        return True, "W_hh is not finite"
    must_vanish = bound < 1 and bound**last_step_back < VANISHED
    if must_vanish:
        means = f"any gradient vanishes, as a step keeps at most {bound:.3g} of it"
    elif f"{bound:.3g}" == "1":
        means = "no step makes a gradient longer"
    elif bound < 1:
        means = f"a step keeps at most {bound:.3g} of a gradient"
    else:
        means = f"a step can stretch a gradient {bound:.3g}-fold"
    sizes = f"spectral radius {spectral_radius:.3g}, sigma_max {sigma_max:.3g}"
    return must_vanish, f"W_hh: {sizes}; {means}"


def _percent(share):
    return f"{100 * share:.0f} %"
