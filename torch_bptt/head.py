"""What stands on the states of a network: a linear head, an output activation and a loss.

    o = h V^T + c        yhat = g(o)        L = sum over rows of l(yhat, y)

A row is one prediction. Where there are many classes, o is by far the largest tensor of a network,
so ``total_loss`` never holds all of it: a chunk of rows goes from h to L and back to dL/dh, dL/dV
and dL/dc before the next one starts. Of a head that is not linear o is given, and there is no V.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from torch_bptt import checks
from torch_bptt.autograd import transformed

IGNORED = -100  # steps of this class do not count, as in torch.nn.functional.cross_entropy

activations = {
    "identity": lambda o: o,
    "sigmoid": torch.sigmoid,
    "softmax": lambda o: torch.softmax(o, -1),
}

# The loss of each row, (N,), as a function of o, (N, K), the target and g. An entropy is computed
# from o, not from yhat, where it would lose its small probabilities to rounding.
losses = {
    "mse": lambda o, y, g: (g(o) - y).square().mean(-1),
    "half_squared_error": lambda o, y, g: (g(o) - y).square().sum(-1) / 2,
    "cross_entropy": lambda o, y, g: F.cross_entropy(o, y, reduction="none"),
    "binary_cross_entropy": lambda o, y, g: F.binary_cross_entropy_with_logits(
        o, y, reduction="none"
    ).mean(-1),
}
# The output activations with which an entropy makes sense: its own, or none, where o is a logit.
_expected_activation = {
    "cross_entropy": ("identity", "softmax"),
    "binary_cross_entropy": ("identity", "sigmoid"),
}

# A chunk of about 4 MB in float32 stays in cache between the head, the loss and the way back. With
# 64 rows or more the products are no longer bound by reading V (K = 50000: 1.3 times 21 rows).
CHUNK_ELEMENTS, CHUNK_ROWS = 2**20, 64


class Criterion(NamedTuple):
    """What a prediction costs, and how many of them are evaluated at a time.

    loss, activation: a key of ``losses`` and one of ``activations``.
    chunk: predictions; None chooses.
    """

    loss: str
    activation: str
    chunk: int | None = None

    def check(self) -> None:
        """Raise ValueError or TypeError unless loss and activation go together."""
        checks.check_choice("loss", "loss", self.loss, tuple(losses))
        fitting = _expected_activation.get(self.loss, tuple(activations))
        checks.check_choice(f"loss {self.loss!r}", "output_activation", self.activation, fitting)
        if self.chunk is not None:
            checks.check_count("loss", "chunk", self.chunk)

    def of_rows(self, o: Tensor, target: Tensor) -> Tensor:
        """The loss of each row, (N,), in float32 where o is narrower: a sum needs the digits."""
        return losses[self.loss](_wide(o), target, activations[self.activation])

    def rows_at_a_time(self, classes: int) -> int:
        return self.chunk or max(CHUNK_ROWS, CHUNK_ELEMENTS // classes)

    def check_target(self, target: Tensor, like: Tensor) -> tuple:
        """Raise TypeError or ValueError for a target that no shape makes right.

        Arguments:
            like: (..., K), of the dtype and device of the network.
        Returns:
            The shape of one row: () for classes, else (K,).
        """
        if like.is_complex():
            raise TypeError(f"loss: the network must be real, got {like.dtype}")
        if target.requires_grad:
            raise ValueError("loss: target must not require a gradient, got one that does")
        if target.device != like.device:
            raise RuntimeError(
                "loss: target must be on the device of the network, "
                f"expected {like.device}, got {target.device}"
            )
        if self.loss == "cross_entropy" and target.dtype == torch.int64:
            return ()
        dtypes = dict.fromkeys((like.dtype, torch.promote_types(like.dtype, torch.float32)))
        if target.dtype not in dtypes:
            classes = ["torch.int64 for classes"] if self.loss == "cross_entropy" else []
            expected = " or ".join([*classes, *map(str, dtypes)])
            raise TypeError(f"loss {self.loss!r}: target must be {expected}, got {target.dtype}")
        return (like.shape[-1],)


def total_loss(
    states: Tensor, target: Tensor, weight: Tensor | None, bias: Tensor | None, criterion: Criterion
) -> Tensor:
    """The sum of the losses of all rows.

    Arguments:
        states: h, (N, H); o, (N, K), without a weight.
        target: y, (N, K), or (N,) int64 for the classes of 'cross_entropy'.
        weight, bias: V, (K, H), and c, (K,) or None.
    Returns:
        A scalar, in float32 where states are narrower.
    """
    if len(states) <= criterion.rows_at_a_time(_outputs(states, weight)) or transformed():
        return _total(states, weight, bias, target, criterion)
    dtype = _linear(states[:0], weight, bias).dtype  # not that of states under autocast
    tensors = [None if tensor is None else tensor.to(dtype) for tensor in (states, weight, bias)]
    wanted = [
        tensor is not None and tensor.requires_grad and torch.is_grad_enabled()
        for tensor in tensors
    ]
    return TotalLoss.apply(*tensors, target, criterion, wanted)


def _outputs(states, weight):
    """K."""
    return states.shape[-1] if weight is None else len(weight)


def _linear(states, weight, bias):
    return states if weight is None else F.linear(states, weight, bias)


def _total(states, weight, bias, target, criterion):
    return criterion.of_rows(_linear(states, weight, bias), target).sum()


def _wide(tensor):
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class TotalLoss(Function):
    """``_total``, a chunk of rows at a time, and its gradients in the same pass.

    The loss is a scalar, so its gradients are known up to a factor, which backward multiplies in.
    To compute them later the chunks of o would have to be kept, or computed again. That the states
    and V are saved, too, is for a second derivative; they live elsewhere anyway.
    """

    @staticmethod
    def forward(ctx, states, weight, bias, target, criterion, wanted):
        of_states, of_weight, of_bias = wanted
        grad_states = torch.empty_like(states) if of_states else None
        grad_weight = torch.zeros_like(_wide(weight)) if of_weight else None
        grad_bias = torch.zeros_like(_wide(bias)) if of_bias else None
        total = _wide(states.new_zeros(()))
        chunk = criterion.rows_at_a_time(_outputs(states, weight))
        for first in range(0, len(states), chunk):
            rows = slice(first, first + chunk)
            h = states[rows]
            o = _linear(h, weight, bias)
            if not any(wanted):
                total += criterion.of_rows(o, target[rows]).sum()
                continue
            with torch.enable_grad():
                part = criterion.of_rows(o.requires_grad_(), target[rows]).sum()
            (eps,) = torch.autograd.grad(part, o)
            total += part.detach()
            if of_states and weight is None:
                grad_states[rows] = eps
            elif of_states:
                torch.mm(eps, weight, out=grad_states[rows])
            if of_weight and eps.dtype == grad_weight.dtype:
                grad_weight.addmm_(eps.mT, h)
            elif of_weight:
                grad_weight += eps.mT @ h
            if of_bias:
                grad_bias += eps.sum(0, dtype=grad_bias.dtype)
        ctx.save_for_backward(states, weight, bias, target, grad_states, grad_weight, grad_bias)
        ctx.criterion, ctx.wanted = criterion, wanted
        return total

    @staticmethod
    def backward(ctx, grad_total):
        states, weight, bias, target, *gradients = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradients are to be differentiable: all rows at once
            # The graph ends at these views, even where states depend on V, which is then tied.
            views = [
                None if leaf is None else leaf.view_as(leaf) for leaf in (states, weight, bias)
            ]
            total = _total(*views, target, ctx.criterion)
            of = [view for view, wanted in zip(views, ctx.wanted, strict=True) if wanted]
            found = iter(torch.autograd.grad(total, of, grad_total, create_graph=True))
            gradients = [next(found) if wanted else None for wanted in ctx.wanted]
            return *gradients, None, None, None
        scaled = (
            None if gradient is None else (gradient * grad_total).to(states.dtype)
            for gradient in gradients
        )
        return *scaled, None, None, None
