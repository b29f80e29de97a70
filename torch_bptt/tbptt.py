"""tbptt: train on a long sequence with truncated backpropagation through time.

Every k1 steps the losses of those k1 steps go back through the last k2 steps. The module is called
on pieces of the sequence, never on single steps; there is no loop over time here.
"""

import numbers
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from torch_bptt import checks
from torch_bptt.rnn import RNN

# A tensor, or tuples, lists and dicts of tensors; None where there is nothing.
Tensors: TypeAlias = Tensor | tuple | list | dict | None


def tbptt(
    module: Callable[..., tuple[Tensors, Tensors]],
    input: Tensors,
    target: Tensors,
    loss_fn: Callable[[Any, Any], Tensor],
    *,
    k1: int,
    k2: int | None = None,
    hx: Tensors = None,
    optimizer: torch.optim.Optimizer | None = None,
    batch_first: bool | None = None,
    lengths: Sequence[int] | Tensor | None = None,
    reset: Tensor | None = None,
    before_update: Callable[[], object] | None = None,
    progress: Callable[[int, Tensor, int], object] | None = None,
) -> tuple[Tensor, Tensors]:
    """Go once through a sequence with truncated backpropagation through time, BPTT(k2; k1).

    After steps k1, 2 k1, ... and after the last one there is an update:

        loss = loss_fn(output[t - k1:t], target[t - k1:t])     the steps since the last update
        gradient of loss through steps t - k2, ..., t - 1      older steps are constants
        before_update(), optimizer.step()

    A loss more than k2 steps old (k1 > k2) counts in ``loss`` and gives no gradient. Where windows
    overlap (k1 < k2) an update runs its window again, with the weights as they are then, from the
    state that the update before found at its beginning. The last update takes the steps that are
    left, k1 or fewer, and goes as far back from the first of them as the others do. With k1 and k2
    at least T this is backpropagation through the whole sequence. See docs/truncated-bptt.md.

    Arguments:
        module: maps (input, hx) of a piece of the sequence to (output, hx) and accepts None for hx;
            torch_bptt.RNN, torch.nn.RNN, GRU, LSTM, a module that contains one, or any function. It
            must run forward in time.
        input: (T, B, ...), (B, T, ...) with batch_first; or tuples, lists, dicts of such tensors,
            all of which are cut along time. T >= 1.
        target: likewise; None if loss_fn needs none.
        loss_fn: maps the output and the target of the steps since the last update to one number, a
            tensor of shape (). What it averages or sums over is its own affair.
        k1: steps between updates, at least 1.
        k2: steps that a gradient goes through, at least 1; None means k1.
        hx: the state before the first step, whatever module takes: a tensor, (h, c), ...; None is
            handed on as None. If it requires a gradient, it gets that of the windows that begin at
            step 0.
        optimizer: at every update its zero_grad() is called before backward, its step() after. None
            leaves the parameters alone: the gradients of all updates add up in their ``grad``.
        batch_first: True says that time is dimension 1 of input, target, output and reset, False
            that it is dimension 0. None means what the layers inside module say, else False.
        lengths: (B,) integers from 0 to T, the steps of each row that exist. module gets the share
            of every piece as ``lengths=``. loss_fn has to ignore what lies past the end of a row.
        reset: (T, B) bool, (B, T) with batch_first: module gets its part as ``reset=``.
        before_update: called after every backward, before optimizer.step(): the place to clip
            gradients.
        progress: called after every update as progress(step, loss, updates): the steps done, the
            loss of this update, a tensor of shape () without gradient, and the updates done.
    Returns:
        loss: (), the mean over the updates, weighed by their steps: where loss_fn is a mean over
            steps, the mean over all T. Each is taken with the weights before its update. No
            gradient. Of the dtype of the losses; narrow ones are added up in float32.
        hx: the state after the last step, without gradient, for the next call; the backward pass
            of that call does not come back into this one.
    Raises:
        ValueError, TypeError: an argument, or what module or loss_fn returned, does not fit; the
            message names it, what was expected and what it got.
        RuntimeError: the loss does not depend on anything that requires a gradient.
    Example:
        >>> rnn, x = RNN(3, 4), torch.randn(100, 2, 3)
        >>> optimizer = torch.optim.SGD(rnn.parameters(), lr=0.1)
        >>> loss, hx = tbptt(rnn, x, torch.zeros(100, 2, 4), nn.functional.mse_loss,
        ...                  k1=10, k2=20, optimizer=optimizer)
        >>> loss.shape, hx.shape
        (torch.Size([]), torch.Size([1, 2, 4]))

    Source:
        Williams and Peng (1990), An efficient gradient-based algorithm for on-line training of
        recurrent network trajectories: BPTT(h; h') with h = k2 and h' = k1.
    """
    k2 = k1 if k2 is None else k2
    _check_counts(k1=k1, k2=k2)
    _check_module(module, k1, k2)
    _check_optimizer(optimizer)
    time = 1 if _is_batch_first(module, batch_first) else 0
    steps = _count_steps(time, input=input, target=target, reset=reset)
    windows = _windows(steps, k1, k2)
    _check_graphs(windows, input=input, target=target, hx=hx)
    lengths = _check_lengths(lengths, input, steps, time)

    def cut(tensors, begin, end):
        return _map(lambda tensor: tensor.narrow(time, begin, end - begin), tensors)

    def run(begin, end, state):
        options = {}
        if lengths is not None:
            options["lengths"] = (lengths - begin).clamp(0, end - begin)
        if reset is not None:
            options["reset"] = cut(reset, begin, end)
        result = module(cut(input, begin, end), state, **options)
        _check_result(result, end - begin, time)
        return result

    losses = []
    for last, start, following, end in windows:
        outputs, state = [], hx
        # A gap without gradient (k1 > k2), the window up to where the following one begins, and the
        # rest of it (k1 < k2): in every combination of k1 and k2 at most two of them are not empty.
        for begin, stop in ((last, start), (start, following), (following, end)):
            if begin >= stop:
                continue
            with torch.set_grad_enabled(begin >= start and torch.is_grad_enabled()):
                output, state = run(begin, stop, state)
            if stop <= following:
                hx = _map(Tensor.detach, state)
            if stop > last:
                outputs.append(cut(output, max(last - begin, 0), stop - begin))
        output = outputs[0] if len(outputs) == 1 else _map(lambda *o: torch.cat(o, time), *outputs)
        loss = loss_fn(output, cut(target, last, end))
        _check_loss(loss)

        if optimizer is not None:
            optimizer.zero_grad()
        loss.backward()
        if before_update is not None:
            before_update()
        if optimizer is not None:
            optimizer.step()
        # Under torch.autocast around this call, narrow copies of weights as they were.
        torch.clear_autocast_cache()
        losses.append(loss.detach())
        if progress is not None:
            progress(end, losses[-1], len(losses))
    return _mean(torch.stack(losses), [end - last for last, _, _, end in windows]), hx


def _mean(losses, steps):
    """Of the losses of all updates, each weighed by its steps: in float32 where they are narrower,
    as in float16 a sum over 65505 steps is infinite."""
    wide = losses.to(torch.promote_types(losses.dtype, torch.float32))
    return ((wide * wide.new_tensor(steps)).sum() / sum(steps)).to(losses.dtype)


def _windows(steps, k1, k2):
    """Of every update: the steps done before, where its window begins, where the following window
    begins or, if sooner, this one ends, and its end."""
    done = [*range(0, steps, k1)]
    ends = [*done[1:], steps]
    # The steps since the last update and the k2 - k1 before them; k2 in all, if the former are k1.
    starts = [max(0, t - k2, last - max(0, k2 - k1)) for last, t in zip(done, ends, strict=True)]
    following = [min(start, t) for start, t in zip([*starts[1:], steps], ends, strict=True)]
    return list(zip(done, starts, following, ends, strict=True))


def _map(function, *trees):
    """function of the tensors in the same place of trees, which are built alike."""
    first = trees[0]
    if isinstance(first, dict):
        return {key: _map(function, *(tree[key] for tree in trees)) for key in first}
    if isinstance(first, (tuple, list)):
        parts = [_map(function, *parts) for parts in zip(*trees, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    return None if first is None else function(*trees)


def _tensors(name, tree):
    """The tensors in tree, one by one."""
    if isinstance(tree, PackedSequence):
        raise TypeError(
            f"tbptt: {name} must be a tensor, as packed rows cannot be cut along time, "
            "got a PackedSequence: pad it, and give lengths"
        )
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list, dict)):
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors(name, part)
    elif tree is not None:
        raise TypeError(
            f"tbptt: {name} must be a tensor or tuples, lists and dicts of tensors, "
            f"got {type(tree).__name__}"
        )


def _check_counts(**counts):
    for name, count in counts.items():
        checks.check_number(
            "tbptt", name, count, numbers.Integral, "a positive int", lambda k: k >= 1
        )


def _parts(module):
    return list(module.modules()) if isinstance(module, nn.Module) else []


def _check_module(module, k1, k2):
    if not callable(module):
        raise TypeError(f"tbptt: module must be callable, got {type(module).__name__}")
    for part in _parts(module):
        if isinstance(part, nn.RNNBase) and part.bidirectional:
            raise ValueError(
                "tbptt: module must run forward in time, as the other direction would start anew "
                f"in every piece, got {type(part).__name__} with bidirectional=True (if that is "
                "not along time, hand over a function that calls module)"
            )
        if isinstance(part, RNN) and part.truncate is not None and k1 < k2:
            raise ValueError(
                "tbptt: with k1 < k2 module must not cut the gradient inside the window, expected "
                f"truncate=None, got truncate={part.truncate}"
            )


def _is_batch_first(module, given):
    """Cut along the batch by mistake, most modules would run and learn something else."""
    own = getattr(module, "batch_first", None)
    if given is None:
        found = (
            {own} if own is not None else {getattr(m, "batch_first", None) for m in _parts(module)}
        )
        if {True, False} <= found:
            raise ValueError(
                "tbptt: batch_first must be given, as module has layers of either kind, got None"
            )
        return True in found
    if own is not None and own != given:
        raise ValueError(f"tbptt: batch_first must be that of module, expected {own}, got {given}")
    return given


def _check_optimizer(optimizer):
    missing = [n for n in ("zero_grad", "step") if not callable(getattr(optimizer, n, None))]
    if optimizer is not None and missing:
        raise TypeError(
            "tbptt: optimizer must be None or have zero_grad() and step(), "
            f"got {type(optimizer).__name__}"
        )


def _count_steps(time, **trees):
    """The number of steps of all tensors, of which the first tree has at least one."""
    steps = None
    for name, tree in trees.items():
        for tensor in _tensors(name, tree):
            if tensor.dim() <= time:
                raise ValueError(
                    f"tbptt: {name} must have time as dimension {time}, got {tuple(tensor.shape)}"
                )
            steps = tensor.shape[time] if steps is None else steps
            if tensor.shape[time] != steps:
                raise ValueError(
                    f"tbptt: {name} must have as many steps as input, "
                    f"expected {steps} in dimension {time}, got {tuple(tensor.shape)}"
                )
        if steps is None:
            raise TypeError(f"tbptt: {name} must be a tensor, got none: {tree!r}")
        if steps == 0:
            raise ValueError(f"tbptt: {name} must have at least one step, got 0")
    return steps


def _check_graphs(windows, **trees):
    """What a tensor was computed from can be gone back through once, so by one update only."""
    for name, tree in trees.items():
        updates = sum(start == 0 or name != "hx" for _, start, _, _ in windows)
        for tensor in _tensors(name, tree):
            if tensor.grad_fn is not None and updates > 1:
                raise ValueError(
                    f"tbptt: {name} must not be computed from what requires a gradient, as "
                    f"{updates} updates would go back through that computation: let module do it, "
                    f"or detach {name}; got a tensor with grad_fn={tensor.grad_fn.name()}"
                )


def _check_lengths(lengths, input, steps, time):
    if lengths is None:
        return None
    tensor = next(_tensors("input", input))
    if tensor.dim() < 2:
        raise ValueError(f"tbptt: with lengths input must have a batch, got {tuple(tensor.shape)}")
    return checks.check_lengths(lengths, steps, tensor.shape[1 - time])


def _check_result(result, steps, time):
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(f"tbptt: module must return (output, hx), got {type(result).__name__}")
    list(_tensors("hx of module", result[1]))  # raises at what is no tensor
    for tensor in _tensors("output of module", result[0]):
        if tensor.dim() <= time or tensor.shape[time] != steps:
            raise ValueError(
                "tbptt: output of module must have as many steps as its input, "
                f"expected {steps} in dimension {time}, got {tuple(tensor.shape)}"
            )


def _check_loss(loss):
    if not isinstance(loss, Tensor):
        raise TypeError(f"tbptt: loss_fn must return a tensor, got {type(loss).__name__}")
    if loss.dim() > 0:
        raise ValueError(
            f"tbptt: loss_fn must return one number, of shape (), got {tuple(loss.shape)}"
        )
    if not loss.requires_grad:
        raise RuntimeError(
            "tbptt: the loss must depend on parameters that require a gradient, with grad mode on, "
            "got one without"
        )
