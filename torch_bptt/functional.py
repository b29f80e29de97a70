"""The RNN as functions: ``rnn`` for one layer in one direction, ``run`` for a whole stack of
layers.

Inside, time comes first and rows are dense (T, B, I) or packed (N, I); everything callers may hand
over instead (batch_first, one unbatched sequence, a PackedSequence, lengths in any order) is turned
into one of the two by ``run`` and turned back at its end. There is no loop over time here.
"""

import functools
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from torch_bptt import checks, reference
from torch_bptt._values import are_mapped, number
from torch_bptt.autograd import Options, rnn_layer
from torch_bptt.checkpoint import run_in_stretches
from torch_bptt.padded import Padding
from torch_bptt.ragged import Ragged

__all__ = ["rnn"]


class Layer(NamedTuple):
    """One layer in one direction: its weights, and what else is of its own.

    alpha: a number, or (H,) or () for a tensor; None means 1, Elman's network.
    restart: (H,) what rows restart from; None means zeros.
    mask: (B, H) factors of the state in the recurrent product; None means ones.
    """

    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    alpha: Tensor | float | None = None
    restart: Tensor | None = None
    mask: Tensor | None = None


class Draws(NamedTuple):
    """What is drawn at random in a call; all zero when not training.

    dropout: probability of a zero in the output of every layer but the last.
    recurrent_dropout: probability that a unit is zero in the recurrent products of a sequence.
    noise: standard deviation of what is added to the argument of f.
    generator: what dropout and noise draw from; None means torch's own of the device.
    """

    dropout: float = 0.0
    recurrent_dropout: float = 0.0
    noise: float = 0.0
    generator: torch.Generator | None = None


NO_DRAWS = Draws()


def rnn(
    input: Tensor | PackedSequence,
    hx: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    batch_first: bool = False,
    reverse: bool = False,
    lengths: Sequence[int] | Tensor | int | None = None,
    reset: Tensor | None = None,
    alpha: float | Tensor = 1.0,
    truncate: int | None = None,
    clip_grad_h: float | None = None,
    checkpoint: bool | int | None = None,
    need_output: bool = True,
    restart: Tensor | None = None,
    recurrent_dropout: float = 0.0,
    noise: float = 0.0,
) -> tuple[Tensor | PackedSequence | None, Tensor]:
    """Run one Elman layer over a whole sequence, in one direction.

        h_t = (1 - alpha) h_{t-1} + alpha f(x_t W_ih^T + b_ih + h_{t-1} W_hh^T + b_hh)

    Arguments:
        input: (T, B, I); (B, T, I) with batch_first; (T, I), one sequence without a batch; or a
            PackedSequence of such rows. float32, float64, bfloat16 or float16. complex64 and
            complex128 also work, but through a loop over time in plain PyTorch
            (``torch_bptt.reference``), at its speed; the first such call warns.
        hx: state before the first step, (B, H), or (H,) for one sequence, rows in the caller's
            order; None means zeros.
        weight_ih, weight_hh: (H, I) and (H, H), dtype and device of input.
        bias_ih, bias_hh: (H,), either may be None; only their sum matters.
        nonlinearity: f, one of 'tanh', 'relu', 'sigmoid', 'identity'.
        batch_first: input, output and reset are (B, T, ...). Ignored for one sequence and for a
            PackedSequence.
        reverse: run from the last step to the first.
        lengths: the steps of each row that exist, (B,) integers in any order, a list or an int64
            tensor, each between 0 and T; an int for one sequence. Output past the end of a row is
            zero. A row of length 0 keeps its state: its h_n is its hx. Not together with a
            PackedSequence, which has lengths of its own.
        reset: (T, B) bool, (B, T) with batch_first, (T,) for one sequence; for a PackedSequence
            always (T, B) with rows in the order before sorting. True at [t, b]: before step t row b
            starts from zero, so reset cuts a row into segments, each run as a sequence of its own.
            Running forward, reset at step 0 drops hx; running in reverse, hx enters at the row's
            last step and always counts. (A flag ``done[t]`` that says that step t was the last of
            an episode is ``reset[t + 1]``.)
        alpha: the leak, a number in (0, 1]; 1 is Elman's network. Leaky rate units with time
            constant tau, in the units of the time step dt, have alpha = dt / tau. A tensor, () or
            (H,), one for each unit, gets a gradient; that its values lie in (0, 1] is the caller's
            care, for to look at them would wait for the device.
        truncate: k >= 1, truncated backpropagation: no gradient crosses from a row's step k, 2k,
            ... to the one before, as if the state were detached there. None never cuts.
        clip_grad_h: c > 0 clamps the gradient of every state to [-c, c] during backpropagation.
            None does not. A second derivative through it raises.
        checkpoint: c >= 1, the steps between two states that are kept for backpropagation, which
            computes the others again; True means ceil(sqrt(T)). Results are the same to rounding;
            docs/memory.md has what it takes and gives. None keeps every state.
        need_output: False returns None for the output. Memory then does not grow with T where no
            gradient is recorded, and as T / c + c with checkpoint.
        restart: the state that rows start from after a reset, (H,), dtype and device of input; None
            means zeros.
        recurrent_dropout: probability p, in [0, 1), that a unit counts as zero in the recurrent
            products of a sequence, h_{t-1} W_hh^T. Each sequence draws its units once, for all
            steps, and the others count 1 / (1 - p) times. The leak sees them all.
        noise: standard deviation of the Gaussian numbers that are added to the argument of f, one
            for every step, sequence and unit.
    Returns:
        output: every state, shaped as input with H in place of I; a PackedSequence if input is one;
            None without need_output.
        h_n: the state after each row's last step (its first step when reverse), (B, H) or (H,).
    Raises:
        ValueError, TypeError, RuntimeError: an argument does not fit; the message names it, what
            was expected and what it got. Where torch.nn.RNN has a message for it, type and words
            are torch.nn.RNN's.
    Example:
        >>> output, h_n = rnn(torch.randn(5, 3, 2), None, torch.randn(4, 2), torch.randn(4, 4))
        >>> output.shape, h_n.shape
        (torch.Size([5, 3, 4]), torch.Size([3, 4]))

    Source:
        Elman (1990), Finding structure in time; Werbos (1990), Backpropagation through time: what
        it does and how to do it; the clamp: Graves (2013), Generating sequences with recurrent
        neural networks; one mask a sequence: Gal and Ghahramani (2016), A theoretically grounded
        application of dropout in recurrent neural networks.
    """
    checks.check_nonlinearity(nonlinearity)
    checks.check_options("rnn", alpha, truncate, clip_grad_h, recurrent_dropout, noise)
    if isinstance(alpha, Tensor):
        checks.check_alpha("rnn", alpha, ((), (len(weight_hh),)))
    if restart is not None:
        checks.check_restart(restart, input, len(weight_hh))
    checks.check_checkpoint("rnn", checkpoint)
    rows = checks.check_input(input, weight_ih, weight_ih.shape[-1], batch_first, hx)
    if hx is not None:
        one = not isinstance(input, PackedSequence) and input.dim() == 2
        checks.check_hidden(hx, (len(weight_hh),) if one else (rows, len(weight_hh)))
        hx = hx.unsqueeze(0)
    own = None if not isinstance(alpha, Tensor) and alpha == 1 else alpha
    layers = [Layer(weight_ih, weight_hh, bias_ih, bias_hh, own, restart)]
    options = [Options(nonlinearity, reverse, truncate or 0, clip_grad_h)]
    draws = Draws(0.0, recurrent_dropout, noise)
    output, h_n = run(
        input, hx, layers, options, batch_first, draws, lengths, reset, checkpoint, need_output
    )
    return output, h_n.squeeze(0)


def run(
    input, hx, layers, options, batch_first, draws, lengths, reset, checkpoint, need_output,
    observer=None,
):  # fmt: skip
    """Run a stack of layers, each in every direction: what ``rnn`` and ``RNN`` share.

    Arguments:
        input, batch_first, lengths, reset: as in ``rnn``; input is checked.
        hx: (L * D, B, H), or (L * D, H) for one sequence, or None; checked, in the order of layers.
        layers: L * D of them, the directions of layer 0 first.
        options: those of each direction, the same for all layers; checked.
        draws: what is random, a probability and a deviation; zero in eval mode.
        observer: gets to see every layer and direction; see ``diagnose``.
        checkpoint, need_output: as in ``rnn``; checkpoint is checked.
    Returns:
        output, with D * H features, or None, and h_n, shaped as hx.
    """
    checks.check_need_output(need_output)
    if observer is not None and torch.compiler.is_compiling():
        raise NotImplementedError(
            "gradient_flow: the model must not be compiled, as nobody sees its layers then, got "
            "one in torch.compile or torch.export: watch the model itself"
        )
    if observer is not None and not (checkpoint is None and need_output):
        raise NotImplementedError(
            "gradient_flow: checkpoint must be None and need_output True, as nothing may be "
            f"computed twice or left out, got {checkpoint!r} and {need_output!r}"
        )

    def stack(x, hx, batch_sizes, reset, padding=None):
        network = _with_masks(layers, draws, x, batch_sizes)
        call = network, options, draws, x, hx, batch_sizes, _keep(reset, options)
        over = _stack
        if padding is not None:
            over = functools.partial(_stack, padding=padding)
        elif isinstance(batch_sizes, Ragged):
            over = functools.partial(_stack_ragged, need_output=need_output)
        if checkpoint is None and need_output:
            return over(*call, observer)
        return run_in_stretches(over, *call, checkpoint, need_output)

    if isinstance(input, PackedSequence):
        checks.check_no_lengths(lengths)
        return _run_packed(stack, input, hx, reset)
    if reset is not None:
        checks.check_reset(reset, input.shape[:-1], input.device)
    if input.dim() == 3:
        return _run_batch(stack, input, hx, lengths, reset, batch_first)
    hx, reset = (None if tensor is None else tensor.unsqueeze(1) for tensor in (hx, reset))
    output, h_n = _run_batch(stack, input.unsqueeze(1), hx, lengths, reset, False)
    return output if output is None else output.squeeze(1), h_n.squeeze(1)


def _run_batch(stack, input, hx, lengths, reset, batch_first):
    steps = input.shape[1 if batch_first else 0]
    if steps == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    if batch_first and reset is not None:
        reset = reset.T
    if lengths is not None:
        noted = checks.values_are_unknown(input)
        lengths = checks.check_lengths(
            lengths, steps, input.shape[0 if batch_first else 1], input.device if noted else None
        )
    x = input.transpose(0, 1) if batch_first else input
    if lengths is None:
        output, h_n = stack(x, hx, None, reset)
    elif noted or are_mapped(lengths):
        padding = Padding.of(lengths.to(input.device), steps)
        x, reset = padding.clear(x), None if reset is None else reset & padding.existing
        output, h_n = stack(x, hx, None, reset, padding)
    else:
        output, h_n = _run_ragged(stack, x, hx, lengths, reset)
    return output.transpose(0, 1) if batch_first and output is not None else output, h_n


def _run_packed(stack, input, hx, reset):
    data, batch_sizes, order, inverse = input
    if reset is not None:
        rows = torch.arange(checks.count_rows(input, reset=reset), device="cpu")
        existing = rows < batch_sizes[:, None]
        checks.check_reset(reset, existing.shape, data.device)
        reset = reset if order is None else reset.index_select(1, order)
        reset = reset & existing.to(data.device)
    hx = hx if hx is None or order is None else hx.index_select(1, order)
    output, h_n = stack(data, hx, batch_sizes, reset)
    h_n = h_n if inverse is None else h_n.index_select(1, inverse)
    if output is not None:
        output = PackedSequence(output, batch_sizes, order, inverse)
    return output, h_n


def _run_ragged(stack, x, hx, lengths, reset):
    """Run the rows that have steps; past their ends output is zero, and h_n of the others is hx."""
    steps, rows, device = *x.shape[:2], x.device
    ragged = Ragged.of(lengths)
    order = ragged.order.to(device)
    state = None if hx is None else hx.index_select(1, order)
    if reset is not None:
        reset = reset[: len(ragged)].index_select(1, order) & ragged.existing().to(device)
    if len(order):
        output, h_n = stack(x, state, ragged, reset)
    else:  # A step of no rows has the right dtypes, and gives every gradient, zero.
        output, h_n = stack(x[:1, :0], state, None, None)
    hx = h_n.new_zeros(h_n.shape[0], rows, h_n.shape[2]) if hx is None else hx.to(h_n.dtype)
    h_n = hx.index_copy(1, order, h_n)
    if output is not None and output.shape[:2] != x.shape[:2]:
        output = F.pad(output, (0, 0, 0, rows - output.shape[1], 0, steps - output.shape[0]))
    return output, h_n


def _with_masks(layers, draws, x, batch_sizes):
    """The layers with masks for every sequence, drawn once for all of its steps."""
    if not draws.recurrent_dropout:
        return layers
    rows = x.shape[1] if batch_sizes is None else number(batch_sizes[0])
    return [
        own._replace(mask=F.dropout(x.new_ones(rows, len(own.weight_hh)), draws.recurrent_dropout))
        for own in layers
    ]


def _stack(layers, options, draws, x, hx, batch_sizes, keep, observer=None, padding=None):
    """All layers over time-major rows; keep has one tensor, or None, per direction."""
    packed = batch_sizes is not None
    states, h_n = _split(hx, len(layers), packed), []
    for first in range(0, len(layers), len(options)):
        outputs = []
        for direction, own in enumerate(options):
            index = first + direction
            if padding is not None:
                output, last = padding.run(
                    layer, x, states[index], layers[index], keep[direction], own, draws
                )
                outputs.append(output)
                h_n.append(last)
                continue
            probe = None if observer is None else observer.probe(x)
            output, last = layer(
                x, states[index], layers[index], batch_sizes, keep[direction], own, draws, probe
            )  # fmt: skip
            if observer is not None:
                observer.record(index, output, probe, batch_sizes, own.reverse)
            outputs.append(output)
            h_n.append(last)
        x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        if draws.dropout and first + len(options) < len(layers):
            x = _dropout(x, draws)
    return x, _join(h_n, packed)


def _stack_ragged(
    layers, options, draws, x, hx, ragged, keep, observer=None, need_output=True
):  # fmt: skip
    """``_stack`` over the rows of a dense x that have steps; output is zero where none is."""
    data, batch_sizes, unpack = ragged.pack(x)
    output, h_n = _stack(layers, options, draws, data, hx, batch_sizes, keep, observer)
    return unpack(output) if need_output else None, h_n


# One state of many is (1, B, H), or (B, H) where rows are packed. Where there is but one, every
# view that is not taken saves 4 us of a call and its backward.


def _split(hx, count, packed):
    if hx is None:
        return [None] * count
    if packed:
        return hx.unbind(0)
    return [hx] if count == 1 else hx.split(1)


def _join(states, packed):
    if packed:
        return torch.stack(states)
    return states[0] if len(states) == 1 else torch.cat(states)


def layer(x, h0, network, batch_sizes, keep, options, draws=NO_DRAWS, probe=None):
    """One layer in one direction over time-major rows: what rnn_layer does not do."""
    weight_ih, weight_hh, bias_ih, bias_hh, alpha, restart, mask = network
    if torch._C._is_any_autocast_enabled():
        tensors = (x, h0, weight_ih, weight_hh, bias_ih, bias_hh, restart)
        x, h0, weight_ih, weight_hh, bias_ih, bias_hh, restart = _autocast(tensors)
    checks.check_alike(x, h0, weight_ih, weight_hh, bias_ih, bias_hh)
    run_layer = _complex_layer if x.is_complex() else rnn_layer
    if torch.compiler.is_compiling():
        run_layer = _traced_layer(x)
    # A call is not made where an option is not in use: each takes a tenth of a microsecond.
    return run_layer(
        x, h0, weight_ih, weight_hh, bias_ih, bias_hh, batch_sizes, keep, options,
        None if alpha is None else _alpha(alpha, x, len(weight_hh)),
        None if restart is None or keep is None else _state(restart, x, batch_sizes),
        None if mask is None else _state(mask, x, batch_sizes),
        _noise(draws, x, len(weight_hh)) if draws.noise else None,
        probe,
    )  # fmt: skip


def _traced_layer(x):
    """What runs in the place of ``rnn_layer`` where torch traces the program."""
    from torch_bptt import _onnx  # not before, as it loads torch.compile, which takes seconds

    if x.is_complex():
        raise NotImplementedError(
            "torch.compile: input must be real, as complex numbers run in a loop in Python, "
            f"got {x.dtype}: torch.compiler.disable(module) leaves the module out"
        )
    return _onnx.rnn_layer if _onnx.exporting() else rnn_layer


def _noise(draws, x, hidden):
    shape, where = (*x.shape[:-1], hidden), {"dtype": x.dtype, "device": x.device}
    return torch.normal(0.0, draws.noise, shape, generator=draws.generator, **where)


def _dropout(x, draws):
    """As F.dropout, which takes no generator."""
    if draws.generator is None:
        return F.dropout(x, draws.dropout)
    kept = 1 - draws.dropout
    mask = torch.empty_like(x).bernoulli_(kept, generator=draws.generator)
    return x * (mask / kept if kept else mask)


def _alpha(alpha, x, hidden):
    """One leak for each unit, in the type that x is computed in."""
    dtype = torch.float64 if x.dtype in (torch.float64, torch.complex128) else torch.float32
    if isinstance(alpha, Tensor):
        return alpha.to(dtype).expand(hidden)
    return x.new_full((hidden,), alpha, dtype=dtype)


def _state(tensor, x, batch_sizes):
    """(H,) or (B, H) as a state beside x, of which the first rows are there."""
    rows = x.shape[-2] if batch_sizes is None else number(batch_sizes[0])
    state = tensor.expand(rows, -1) if tensor.dim() == 1 else tensor[:rows]
    return state.to(x.dtype) if batch_sizes is not None else state.to(x.dtype).unsqueeze(0)


def _autocast(tensors):
    """As the products inside torch.nn.RNN: every floating tensor but float64 becomes narrow."""
    device = tensors[0].device.type
    if torch.compiler.is_compiling():  # torch 2.11 cannot trace the other
        available = device != "meta"
    else:
        available = torch.amp.is_autocast_available(device)
    if not (available and torch.is_autocast_enabled(device)):
        return tensors
    narrow = torch.get_autocast_dtype(device)

    def cast(tensor):
        wide = tensor is None or tensor.dtype == torch.float64 or not tensor.is_floating_point()
        return tensor if wide else tensor.to(narrow)

    return [cast(tensor) for tensor in tensors]


@functools.cache
def _warn_of_complex():
    warnings.warn(
        "torch_bptt has no kernels for complex numbers: a loop over time in plain PyTorch runs",
        stacklevel=2,
    )


def _complex_layer(
    x, h0, weight_ih, weight_hh, bias_ih, bias_hh, batch_sizes, keep, options, alpha, restart, mask,
    noise, probe,
):  # fmt: skip
    activation, reverse, truncate, clip = options
    if truncate or clip is not None:
        option = "truncate" if truncate else "clip_grad_h"
        raise NotImplementedError(
            f"{option} must be None for a complex input, got {truncate or clip}"
        )
    if probe is not None:
        raise NotImplementedError(f"gradient_flow: input must be real, got {x.dtype}")
    _warn_of_complex()
    weights = weight_ih, weight_hh, bias_ih, bias_hh
    output, h_n, _ = reference.rnn_forward(
        x, h0, *weights, activation, batch_sizes, keep, alpha, restart, mask, noise, reverse
    )
    return output, h_n


def _keep(reset, options):
    """reset, (T, B) and False where the row does not exist, as one keep, (T, B), per direction.

    Between steps t-1 and t nothing crosses in either direction where reset[t]: running upward the
    state arrives at t, running downward at t-1. What arrives at a row's last step running downward
    is hx, which is kept.
    """
    if reset is None:
        return [None] * len(options)
    keep = ~reset
    if not any(own.reverse for own in options):
        return [keep] * len(options)
    last = torch.arange(keep.shape[0], device=keep.device) == keep.shape[0] - 1
    upward = keep.roll(-1, 0) | last[:, None]
    return [upward if own.reverse else keep for own in options]
