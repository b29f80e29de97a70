"""What ``torch.ops.torch_bptt.*`` need beyond their kernels: shapes without data, and vmap rules.

The operators themselves are in ``csrc``; ``csrc/binding.cpp`` has their schemas.
"""

import torch
from torch import Tensor

import torch_bptt._extension  # noqa: F401  registers the operators

ops = torch.ops.torch_bptt


# ---- shapes: the meta device, torch.compile, torch.export ----------------------------------------


def _state_shape(
    data: Tensor, batch_sizes: Tensor | None, hidden: int, h0: Tensor | None = None
) -> tuple[int, ...]:
    if h0 is not None:
        return h0.shape
    if batch_sizes is None:
        batch = data.shape[-2]
    else:
        batch = batch_sizes[0].item() if batch_sizes.shape[0] else 0  # len() would fix T in a trace
    return (batch, hidden) if data.dim() == 2 else (1, batch, hidden)


def _computed(x: Tensor) -> torch.dtype:
    """The type that x is computed in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.library.register_fake("torch_bptt::rnn_forward")
def _(
    x,
    h0,
    weight_ih,
    weight_hh,
    bias_ih,
    bias_hh,
    activation,
    batch_sizes=None,
    keep=None,
    alpha=None,
    *options,
):
    hidden = weight_hh.shape[0]
    h = x.new_empty((*x.shape[:-1], hidden))
    h_n = x.new_empty(_state_shape(x, batch_sizes, hidden, h0))
    return h, h_n, x.new_empty((0,)) if alpha is None else torch.empty_like(h)


@torch.library.register_fake("torch_bptt::rnn_backward")
def _(
    grad_h,
    grad_h_n,
    x,
    h0,
    h,
    f,
    weight_ih,
    weight_hh,
    activation,
    wanted,
    batch_sizes=None,
    *options,
):
    hidden = weight_hh.shape[0]
    state = _state_shape(x, batch_sizes, hidden, h0) if wanted[1] or wanted[6] else ()
    grad_x = torch.empty_like(x)
    if x.shape[-1] > 1 and grad_x.stride(-1) != 1:
        grad_x = x.new_empty(x.shape)
    outputs = (
        grad_x,
        x.new_empty(state),
        x.new_empty(weight_ih.shape),
        x.new_empty(weight_hh.shape),
        x.new_empty((hidden,)),
        x.new_empty((hidden,), dtype=_computed(x)),
        x.new_empty(state),
        x.new_empty(x.shape[:-1], dtype=_computed(x)),
    )
    return tuple(o if w else o.new_empty((0,)) for o, w in zip(outputs, wanted, strict=True))


@torch.library.register_fake("torch_bptt::adjoint_scan")
def _(g, gate, weight_hh, batch_sizes=None, *options):
    state = _state_shape(g, batch_sizes, g.shape[-1])
    return g.new_empty(g.shape), g.new_empty(state), g.new_empty(state)


@torch.library.register_fake("torch_bptt::tangent_scan")
def _(c, *others):
    return c.new_empty(c.shape)


# ---- vmap ----------------------------------------------------------------------------------------
#
# With the same weights for all, the mapped dimension joins the batch: one call over B * G rows.
# With weights of their own, or weight gradients of their own, each of the G is a call.


def _fold(tensor: Tensor | None, dim: int | None, size: int, where: int) -> Tensor | None:
    """Joins the mapped dimension to dimension ``where`` (from the end), as its fastest part."""
    if tensor is None:
        return None
    tensor = (
        tensor.unsqueeze(0).expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    )
    tensor = tensor.movedim(0, where)
    return tensor.flatten(tensor.dim() + where - 1, tensor.dim() + where)


def _unfold(tensor: Tensor, size: int) -> tuple[Tensor, int | None]:
    """Undoes ``_fold`` for rows of features; the dimension to map over comes with it."""
    if tensor.dim() == 1:  # not wanted, empty
        return tensor, None
    tensor = tensor.unflatten(-2, (-1, size) if tensor.shape[-2] else (0, size))
    return tensor, tensor.dim() - 2


def _register(name: str, rows: set[str], may_fold) -> None:
    """Registers the vmap rule of an operator.

    Arguments:
        name: the operator.
        rows: its arguments that hold rows of features, which the mapped dimension can join.
        may_fold: whether one call will do with these arguments, if nothing but rows is mapped.
    """
    op = getattr(ops, name)
    arguments = [a.name for a in op.default._schema.arguments]

    def rule(info, in_dims, *args):
        size = info.batch_size
        args = dict(zip(arguments, args, strict=False))
        dims = dict(zip(arguments, in_dims, strict=False))
        mapped = {a for a, dim in dims.items() if isinstance(dim, int)}
        if "batch_sizes" in mapped:
            raise NotImplementedError(f"{name}: vmap over batch_sizes is not supported")
        if mapped <= rows | {"keep"} and may_fold(args):
            for a in rows & args.keys():
                tensor, dim = args[a], dims[a]
                if tensor is not None and tensor.dim() - (dim is not None) == 1:
                    args[a] = tensor.new_empty((0,))  # f, empty without alpha
                else:
                    args[a] = _fold(tensor, dim, size, -2)
            args["keep"] = _fold(args.get("keep"), dims.get("keep"), size, -1)
            if args.get("batch_sizes") is not None:
                args["batch_sizes"] = args["batch_sizes"] * size
            outputs = op(**args)
            if isinstance(outputs, Tensor):
                return _unfold(outputs, size)
            folded = [_unfold(o, size) for o in outputs]
            return tuple(o for o, _ in folded), tuple(dim for _, dim in folded)
        calls = [
            op(**{a: v.select(dims[a], i) if a in mapped else v for a, v in args.items()})
            for i in range(size)
        ]
        if isinstance(calls[0], Tensor):
            return torch.stack(calls), 0
        return tuple(torch.stack(each) for each in zip(*calls, strict=True)), (0,) * len(calls[0])

    torch.library.register_vmap(f"torch_bptt::{name}", rule)


def _are_rows(wanted: list[bool]) -> bool:
    """Whether only such gradients are wanted of rnn_backward as have rows of features."""
    _x, _h0, weight_ih, weight_hh, bias, alpha, _restart, norms = wanted
    return not (weight_ih or weight_hh or bias or alpha or norms)


_register("rnn_forward", {"x", "h0", "restart", "mask", "noise"}, lambda args: True)
_register(
    "rnn_backward",
    {"grad_h", "grad_h_n", "x", "h0", "h", "f", "restart", "mask"},
    lambda args: _are_rows(args["wanted"]),
)
_register("adjoint_scan", {"g", "gate", "mask"}, lambda args: True)
_register("tangent_scan", {"c", "q0", "gate", "restart", "mask"}, lambda args: True)
