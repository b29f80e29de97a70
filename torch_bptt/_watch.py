"""gradient_flow: the norms of dL/dh_t, written down by the backward that runs anyway.

``gradient_flow`` gives every RNN of a model an observer. In forward the observer hands each layer
and direction a probe, zeros of one number per row of the sequence; backward puts the norms of
dL/dh_t where the gradient of the probe would go. What comes back is put where the caller had it:
time-major, rows in the caller's order.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from torch_bptt import checks
from torch_bptt._flow import LayerFlow, activation_of, alpha_of, watched
from torch_bptt.rnn import RNN


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

    Backward computes d_t = dL/dh_t for every step in any case; its norms are one pass over it more.
    The gradients of everything else are what they are without. States are kept until the result is
    dropped.

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
    if any(hasattr(part, "_orig_mod") or part._compiled_call_impl for part in model.modules()):
        raise ValueError(
            "gradient_flow: model must be the one that was given to torch.compile, "
            "got what torch.compile made of it"
        )
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
            order = torch.arange(rows, device="cpu") if order is None else order.cpu()
        else:
            if input.dim() == 2:
                input, reset = input.unsqueeze(1), None if reset is None else reset.unsqueeze(1)
            elif batch_first:
                input, reset = input.transpose(0, 1), None if reset is None else reset.T
            steps, rows = input.shape[:2]
            if lengths is None:
                return cls(steps, torch.full((rows,), steps, device="cpu"), None, reset)
            # As functional.run sorts them, ties included.
            lengths, order = checks.check_lengths(lengths, steps, rows).sort(descending=True)
            order = order[lengths > 0]
        # Where no row has a step, there are no packed rows and no batch_sizes either.
        sizes = (
            torch.empty(0, dtype=torch.int64, device="cpu") if batch_sizes is None else batch_sizes
        )
        columns = torch.arange(len(order), device="cpu")
        step, column = (columns < sizes[:, None]).nonzero(as_tuple=True)
        lengths = torch.zeros(rows, dtype=torch.int64, device="cpu")
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
