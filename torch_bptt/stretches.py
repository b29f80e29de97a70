"""Many to many over long sequences: ``checkpoint`` with head and loss inside its stretches.

A network with a loss at every step needs its states only to compute that loss. So a stretch is run
up to the sum of its losses, and again in backward; neither the states of all steps nor their
gradients are ever held, T / c + c of them for stretches of c steps.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from torch_bptt import checkpoint, checks
from torch_bptt.autograd import Options
from torch_bptt.functional import Draws, run
from torch_bptt.head import Criterion, total_loss
from torch_bptt.layout import Layout, pick


def total_in_stretches(
    rnn: nn.Module,
    weight: Tensor,
    bias: Tensor | None,
    layout: Layout,
    input: Tensor | PackedSequence,
    hx: Tensor | None,
    lengths: object,
    reset: Tensor | None,
    target: Tensor,
    counted: Tensor | None,
    criterion: Criterion,
) -> tuple[Tensor, Tensor]:
    """The sum of the losses of all predictions that count, and h_n.

    Arguments:
        rnn: of one direction, with ``checkpoint``.
        weight, bias: of the head.
        input, hx, lengths, reset: those of ``RNN.forward``.
        target, counted: flat, see ``Layout``.
    """
    layers, options, draws, h0 = rnn._network()
    shape = (rnn.num_layers, layout.rows, rnn.hidden_size)
    x, batch_sizes = layout.time_major(input), None
    if hx is None and h0 is not None:
        hx = h0.unsqueeze(1).expand(shape)
    elif hx is None:
        hx = x.new_zeros(shape)
    else:
        checks.check_stacked_hidden(input, hx, shape)
        hx = hx.unsqueeze(1) if layout.one else hx
    if reset is not None:
        checks.check_reset(reset, layout.shape, x.device)
        reset = layout.time_major(reset)
    if layout.packed is not None:
        checks.check_no_lengths(lengths)
        batch_sizes, order, inverse = layout.packed[1:]
        hx = hx if order is None else hx.index_select(1, order)
    elif lengths is not None:
        lengths = checks.check_lengths(lengths, layout.steps, layout.rows)

    length = checkpoint.stretch_length(rnn.checkpoint, layout.steps)
    stretches = checkpoint.cut(x, batch_sizes, reset, length, options[0])
    tensors, put_back = checkpoint.take_tensors((layers, weight, bias))
    plan = _Plan(put_back, draws, stretches, options, lengths, target, counted, criterion)
    tensors = [x, hx, *tensors]
    graph = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    sum_up = checkpoint.Checkpointed.apply if graph else checkpoint.run_stretches
    sums, h_n = sum_up(plan, *tensors)
    if layout.packed is not None and inverse is not None:
        h_n = h_n.index_select(1, inverse)
    return sums.sum(), h_n.squeeze(1) if layout.one else h_n


class _Plan(NamedTuple):
    """What ``Checkpointed`` runs: layers, head and losses of one stretch of steps.

    It expects an output with a row for each of x. The first row of a stretch holds the sum of its
    losses, the others are zero.
    """

    put_back: Callable
    draws: Draws
    stretches: list
    options: list[Options]
    lengths: Tensor | None
    target: Tensor
    counted: Tensor | None
    criterion: Criterion
    need_output: bool = True

    def run(self, stretch, x, arriving, network, draws):
        layers, weight, bias = network
        rows, input, lengths = stretch.rows, x, self.lengths
        if stretch.batch_sizes is not None:
            input = PackedSequence(x, stretch.batch_sizes)
        else:
            if lengths is not None:
                lengths = (lengths - rows.start).clamp(0, len(x))
            rows = slice(rows.start * stretch.batch, rows.stop * stretch.batch)
        output, last = run(
            input, arriving, layers, self.options, False, draws, lengths, stretch.keep,
            checkpoint=None, need_output=True,
        )  # fmt: skip
        states = output.data if stretch.batch_sizes is not None else output.flatten(0, 1)
        counted = self.counted
        if counted is not None:
            ends = torch.searchsorted(counted, counted.new_tensor([rows.start, rows.stop]))
            counted = counted[slice(*ends.tolist())] - rows.start
        states, target = pick(states, counted), pick(self.target[rows], counted)
        total = total_loss(states, target, weight, bias, self.criterion)
        sums = F.pad(total.view(1), (0, rows.stop - rows.start - 1))
        return sums.view(*x.shape[:-1], 1), last
