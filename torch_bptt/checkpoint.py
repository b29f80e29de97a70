"""Long sequences in stretches of c steps: what lies inside a stretch is computed again when
backward wants it, so that only the states between stretches, and one stretch, are held.

    forward     h0 -> stretch -> state -> stretch -> state -> ... -> h_n        states are kept
    backward    the last stretch first: run it once more from its state, with a graph; the gradient
                of the state it ended in becomes that of the state it started from

Of T steps that is T / c states and c steps, least for c = sqrt(T). A stretch is one call of
``functional._stack``, all layers at once.

torch.utils.checkpoint around every stretch gives the same, but takes longer, keeps small tensors
between those that it frees, which malloc then cannot use again, needs a second copy of the output
to join its parts, and adds up the gradients of bfloat16 weights in bfloat16.
"""

import contextlib
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import Function
from torch.utils import _pytree as pytree

from torch_bptt import autograd, checks

# Numbers in the output of one stretch where nothing is kept: 1 MiB of float32, beside which the
# time of a call is little.
AT_ONCE = 2**18


def run_in_stretches(
    stack, layers, options, draws, x, hx, batch_sizes, keep, checkpoint, need_output
):
    """What ``stack`` returns, holding less meanwhile; None for an output that is not needed.

    Arguments:
        stack: runs all layers, called with the arguments that follow it, up to keep.
        batch_sizes: of a packed x, or a ``Ragged`` for the rows of a dense one.
        checkpoint: None, True for c = ceil(sqrt(T)), or c; checked.
    """
    directions, hidden = len(options), len(layers[0].weight_hh)
    if checkpoint is not None:
        checks.check_checkpoint("RNN", checkpoint, len(layers) // directions, directions)
        _refuse_transforms()
        _refuse_uneven_cuts(options, batch_sizes)
    # A second bidirectional layer waits for the whole output of the first.
    whole = autograd.transformed() or len(layers) > directions > 1
    if not whole:
        steps, rows = (
            x.shape[:2] if batch_sizes is None else (len(batch_sizes), int(batch_sizes[0]))
        )
        graph = torch.is_grad_enabled() and _any_requires_grad((x, hx, layers, options))
        if graph:
            length = stretch_length(checkpoint, steps)
            whole = checkpoint is None
        else:
            length = max(1, AT_ONCE // max(1, rows * hidden))
            whole = need_output or steps <= length
    if whole:
        output, h_n = stack(layers, options, draws, x, hx, batch_sizes, keep)
        return output if need_output else None, h_n

    x = x[:steps] if x.dim() == 3 else x  # no row of a ``Ragged`` has more
    hx = x.new_zeros(len(layers), rows, hidden) if hx is None else hx
    outputs, states = [], []
    for way, h0 in enumerate(hx.chunk(directions)):
        tensors, put_back = take_tensors((layers[way::directions], options[way]))
        stretches = cut(x, batch_sizes, keep[way], length, options[way])
        plan = _Plan(put_back, draws, stretches, need_output, stack)
        output, h_n = (Checkpointed.apply if graph else run_stretches)(plan, x, h0, *tensors)
        outputs.append(output)
        states.append(h_n)
    if directions == 1:
        return output, h_n
    return torch.cat(outputs, -1) if need_output else None, torch.cat(states)


def stretch_length(checkpoint, steps):
    """c, from the option as it was given; ``cut`` may round it."""
    return math.isqrt(steps - 1) + 1 if checkpoint is True else checkpoint


def _any_requires_grad(tree):
    return any(tensor.requires_grad for tensor in take_tensors(tree)[0])


def take_tensors(tree):
    """The tensors in nested lists and tuples, and what puts others in their places."""
    leaves, structure = pytree.tree_flatten(tree)
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    tensors = [leaves[place] for place in places]
    leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def put_back(others):
        filled = list(leaves)
        for place, other in zip(places, others, strict=True):
            filled[place] = other
        return pytree.tree_unflatten(filled, structure)

    return tensors, put_back


def _refuse_transforms():
    if autograd.transformed():
        raise NotImplementedError(
            "checkpoint must be None under transforms (torch.func, forward mode, torch.compile, "
            "torch.export, torch.jit.trace), as its backward runs autograd once more, which they "
            "do not see; torch.compiler.disable(module) leaves the module out of a compiled model"
        )


def _refuse_mapped_gradients(*grads):
    for grad in grads:
        if grad is not None and (
            _functorch.is_legacy_batchedtensor(grad) or _functorch.is_batchedtensor(grad)
        ):
            raise NotImplementedError(
                "checkpoint must be None where gradients are mapped over (is_grads_batched=True, "
                "vectorize=True, torch.func.vmap), as backward writes into tensors of its own; or "
                "call backward once for each"
            )


def _refuse_uneven_cuts(options, batch_sizes):
    """Running in reverse rows of different lengths start, and are cut, at different steps."""
    uneven = batch_sizes is not None and batch_sizes[0] != batch_sizes[-1]
    for own in options:
        if uneven and own.reverse and 0 < own.truncate < len(batch_sizes):
            raise NotImplementedError(
                "checkpoint must be None for truncate in reverse over rows of different lengths, "
                "whose cuts lie at different steps; or sort rows into batches of equal length"
            )


# ---- the cut of time -----------------------------------------------------------------------------


class _Stretch(NamedTuple):
    """Some steps of all sequences that have any there.

    rows: its part of x, along the first dimension.
    batch: how many sequences; the others have ended, or in reverse not begun.
    batch_sizes, keep: of its steps and sequences.
    cut: whether truncation stops the gradient of the state that arrives.
    """

    rows: slice
    batch: int
    batch_sizes: Tensor | None
    keep: Tensor | None
    cut: bool


def cut(x, batch_sizes, keep, length, options):
    """All steps in stretches of ``length``, in the order they are run.

    The kernel counts the steps of truncation from where its call starts. So a stretch is a part of
    what lies between two cuts or, length being rounded up, several of these pieces.
    """
    dense, steps = x.dim() == 3, len(x if batch_sizes is None else batch_sizes)
    piece = options.truncate or steps
    length = length if length <= piece else piece * math.ceil(length / piece)
    piece = max(piece, length)
    begins = [
        begin
        for first in range(0, steps, piece)
        for begin in range(first, min(first + piece, steps), length)
    ]
    offsets = range(steps + 1) if dense else [0, *batch_sizes.cumsum(0).tolist()]
    stretches = []
    for begin, end in zip(begins, [*begins[1:], steps], strict=True):
        first, last = (steps - end, steps - begin) if options.reverse else (begin, end)
        batch = x.shape[1] if batch_sizes is None else int(batch_sizes[first])
        stretches.append(
            _Stretch(
                rows=slice(offsets[first], offsets[last]),
                batch=batch,
                batch_sizes=None if batch_sizes is None else batch_sizes[first:last],
                keep=None if keep is None else keep[first:last, :batch],
                cut=bool(options.truncate) and begin > 0 and begin % options.truncate == 0,
            )
        )
    return stretches


# ---- running it ----------------------------------------------------------------------------------


class _Plan(NamedTuple):
    """One direction of a call: what runs, on which stretches, in their order."""

    put_back: Callable
    draws: NamedTuple
    stretches: list[_Stretch]
    need_output: bool
    stack: Callable

    def run(self, stretch, x, arriving, network, draws):
        """The output of a stretch and the last states of its sequences."""
        layers, options = network
        return self.stack(
            layers, [options], draws, x, arriving, stretch.batch_sizes, [stretch.keep]
        )


def _replace(state, rows):
    """state with new first rows: the others have none in this stretch."""
    batch = rows.shape[1]
    if batch == state.shape[1]:
        return rows
    return torch.cat([rows, state[:, batch:].to(rows.dtype)], 1)


def run_stretches(plan, x, h0, *tensors, draws=None, note=lambda number, state: None):
    """The output, if it is needed, and h_n; ``note`` gets the state before every stretch."""
    network, output, state = plan.put_back(tensors), None, h0
    draws = plan.draws if draws is None else draws
    for number, stretch in enumerate(plan.stretches):
        note(number, state)
        arriving = state[:, : stretch.batch]
        part, last = plan.run(stretch, x[stretch.rows], arriving, network, draws)
        state = _replace(state, last)
        if plan.need_output:
            output = part.new_empty(*x.shape[:-1], part.shape[-1]) if output is None else output
            output[stretch.rows] = part
        del part  # before the next one is there, too
    return output, state


class Checkpointed(Function):
    """x, h0 and the tensors of the layers -> output or None, h_n."""

    @staticmethod
    def forward(ctx, plan, x, h0, *tensors):
        # What is kept is kept in one place. Small tensors that stay, among large ones that go,
        # would cut up the memory that malloc has for the next stretch: with three layers it took
        # hundreds of megabytes more.
        count, states, numbers = len(plan.stretches), None, None
        draws = _seeded(plan.draws, x.device)
        if draws.generator is not None:
            numbers = draws.generator.get_state().repeat(count, 1)

        def note(number, state):
            nonlocal states
            if number == 1:
                states = state.new_empty(count - 1, *state.shape)
            if number > 0:
                states[number - 1] = state
            if numbers is not None:
                numbers[number] = draws.generator.get_state()

        output, h_n = run_stretches(plan, x, h0, *tensors, draws=draws, note=note)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, h0, *tensors, states)
        ctx.plan, ctx.numbers, ctx.autocast = plan, numbers, _autocast(x.device.type)
        return output, h_n

    @staticmethod
    def backward(ctx, grad_output, grad_h_n):
        wanted = ctx.needs_input_grad[1:]
        if grad_output is None and grad_h_n is None:
            return (None,) * (1 + len(wanted))
        _refuse_mapped_gradients(grad_output, grad_h_n)
        *inputs, states = ctx.saved_tensors
        if torch.is_grad_enabled():
            grads = _backward_with_graph(ctx, grad_output, grad_h_n, inputs, wanted)
        else:
            grads = _backward(ctx, grad_output, grad_h_n, inputs, states, wanted)
        return None, *grads


def _backward(ctx, grad_output, grad_h_n, inputs, states, wanted):
    """The gradients of inputs, x, h0 and tensors, None where not wanted."""
    x, h0, *tensors = inputs
    of_x, of_h0, *of_tensors = wanted
    tensors = [
        tensor.detach().requires_grad_(of) for tensor, of in zip(tensors, of_tensors, strict=True)
    ]
    network, chosen = ctx.plan.put_back(tensors), [t for t in tensors if t.requires_grad]
    sums, grad_x = [_zero_sum(tensor) for tensor in chosen], torch.empty_like(x) if of_x else None
    d = torch.zeros_like(h0) if grad_h_n is None else grad_h_n
    for number, stretch in reversed(list(enumerate(ctx.plan.stretches))):
        arriving = states[number - 1] if number else h0
        arriving = arriving[:, : stretch.batch].detach().requires_grad_()
        part = x[stretch.rows].detach().requires_grad_(of_x)
        ends = d[:, : stretch.batch], None if grad_output is None else grad_output[stretch.rows]
        leaves = [arriving, *([part] if of_x else []), *chosen]
        grad, *grads = _backward_of_one(ctx, number, part, arriving, network, leaves, ends)
        d = _replace(d, torch.zeros_like(grad) if stretch.cut else grad)
        if of_x:
            grad_x[stretch.rows] = grads.pop(0)
        for total, grad in zip(sums, grads, strict=True):
            if grad is not None:
                total += grad
    of_chosen = iter([total.to(tensor.dtype) for total, tensor in zip(sums, chosen, strict=True)])
    return grad_x, d if of_h0 else None, *(next(of_chosen) if of else None for of in of_tensors)


def _backward_of_one(ctx, number, x, arriving, network, leaves, ends):
    """The gradients of leaves from those of the last states and the output of one stretch.

    Whatever the stretch holds is free again on return.
    """
    with torch.enable_grad():
        output, last = _run_again(ctx, number, x, arriving, network)
    d, grad_output = ends
    results, grads = ([last], [d]) if grad_output is None else ([last, output], [d, grad_output])
    return torch.autograd.grad(results, leaves, grads, allow_unused=True)


def _zero_sum(tensor):
    """What gradients of tensor are added up in: T / c roundings to bfloat16 would be too many."""
    narrow = tensor.dtype in (torch.bfloat16, torch.float16)
    return torch.zeros_like(tensor, dtype=torch.float32 if narrow else None, requires_grad=False)


def _backward_with_graph(ctx, grad_output, grad_h_n, inputs, wanted):
    """As ``_backward``, but differentiable; all stretches are then held at the same time."""
    # The graph ends at these views, even where one of the inputs depends on another.
    views = [tensor.view_as(tensor) for tensor in inputs]
    x, state, *tensors = views
    network, parts = ctx.plan.put_back(tensors), {}
    # Slices would make a gradient of the size of x each; split makes one for all.
    bounds = sorted((s.rows.start, s.rows.stop) for s in ctx.plan.stretches)
    x_parts = x.split([stop - start for start, stop in bounds])
    x_parts = {start: part for (start, _), part in zip(bounds, x_parts, strict=True)}
    for number, stretch in enumerate(ctx.plan.stretches):
        first, arriving = stretch.rows.start, state[:, : stretch.batch]
        arriving = arriving.detach() if stretch.cut else arriving
        parts[first], last = _run_again(ctx, number, x_parts[first], arriving, network)
        state = _replace(state, last)
    ends = [(state, grad_h_n)]
    if grad_output is not None:
        ends.append((torch.cat([parts[first] for first in sorted(parts)]), grad_output))
    ends = [(end, grad) for end, grad in ends if grad is not None and end.requires_grad]
    chosen = [view for view, of in zip(views, wanted, strict=True) if of]
    if ends:
        results, grads = zip(*ends, strict=True)
        found = torch.autograd.grad(
            results, chosen, grads, create_graph=True, materialize_grads=True
        )
    else:  # the only input is h0, and truncation keeps its gradient from h_n
        found = [torch.zeros_like(view) for view in chosen]
    found = iter(found)
    return [next(found) if of else None for of in wanted]


# ---- the second run has what the first one had ---------------------------------------------------


def _run_again(ctx, number, x, arriving, network):
    """A stretch in the state of autocast, and with the random numbers, of forward."""
    plan, draws = ctx.plan, ctx.plan.draws
    if ctx.numbers is not None:
        draws = draws._replace(generator=torch.Generator(x.device))
        # A clone, as PyTorch 2.13 ignores where in its storage a view begins.
        draws.generator.set_state(ctx.numbers[number].clone())
    with ctx.autocast():
        return plan.run(plan.stretches[number], x, arriving, network, draws)


def _seeded(draws, device):
    """draws with a generator of their own, if a stretch draws at all; masks of whole sequences are
    drawn before.

    To set torch's own back in backward would change what other threads draw from it meanwhile, and
    they what is drawn here.
    """
    if not (draws.dropout or draws.noise):
        return draws
    seed = torch.randint(2**63 - 1, (), device=device).item()
    return draws._replace(generator=torch.Generator(device).manual_seed(seed))


def _autocast(device):
    """The present state of autocast, as a function that returns a context manager."""
    if not torch.amp.is_autocast_available(device):
        return contextlib.nullcontext
    return functools.partial(
        torch.autocast,
        device,
        dtype=torch.get_autocast_dtype(device),
        enabled=torch.is_autocast_enabled(device),
        cache_enabled=torch.is_autocast_cache_enabled(),
    )
