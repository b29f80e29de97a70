"""What ``torch.ops.torch_bptt.*`` need beyond their kernels: shapes without data, and vmap rules.

The operators themselves are in ``csrc``; ``csrc/binding.cpp`` has their schemas.
"""

import functools

import torch
from torch import Tensor

import torch_bptt._extension  # noqa: F401  registers the operators

ops = torch.ops.torch_bptt


# ---- shapes: the meta device, torch.compile, torch.export ----------------------------------------


def _state_shape(
    data: Tensor, batch_sizes: Tensor | None, weight_hh: Tensor, h0: Tensor | None = None
) -> tuple[int, ...]:
    if h0 is not None:
        return h0.shape
    if batch_sizes is None:
        batch = data.shape[-2]
    else:
        batch = batch_sizes[0].item() if batch_sizes.shape[0] else 0  # len() would fix T in a trace
    *networks, hidden, _ = weight_hh.shape
    steps = () if data.dim() - len(networks) == 2 else (1,)
    return (*networks, *steps, batch, hidden)


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
    h = x.new_empty((*x.shape[:-1], weight_hh.shape[-1]))
    h_n = x.new_empty(_state_shape(x, batch_sizes, weight_hh, h0))
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
    keep=None,
    alpha=None,
    restart=None,
    mask=None,
    reverse=False,
    truncate=0,
    clip=None,
    parts=0,
):
    *networks, hidden, _ = weight_hh.shape
    state = _state_shape(x, batch_sizes, weight_hh, h0) if wanted[1] or wanted[6] else ()
    grad_x = torch.empty_like(x)
    if x.shape[-1] > 1 and grad_x.stride(-1) != 1:
        grad_x = x.new_empty(x.shape)
    sums = (*networks, parts) if parts else (*networks,)
    outputs = (
        grad_x,
        x.new_empty(state),
        x.new_empty((*sums, hidden, x.shape[-1])),
        x.new_empty((*sums, hidden, hidden)),
        x.new_empty((*sums, hidden)),
        x.new_empty((*sums, hidden), dtype=_computed(x)),
        x.new_empty(state),
        x.new_empty(x.shape[:-1], dtype=_computed(x)),
    )
    return tuple(o if w else o.new_empty((0,)) for o, w in zip(outputs, wanted, strict=True))


@torch.library.register_fake("torch_bptt::adjoint_scan")
def _(g, gate, weight_hh, batch_sizes=None, *options):
    state = _state_shape(g, batch_sizes, weight_hh)
    return g.new_empty(g.shape), g.new_empty(state), g.new_empty(state)


@torch.library.register_fake("torch_bptt::tangent_scan")
def _(c, *others):
    return c.new_empty(c.shape)


# ---- vmap ----------------------------------------------------------------------------------------
#
# Two ways, one call each. Where only rows are mapped, the mapped dimension joins the batch, as its
# fastest part: row b of sample s becomes row b * size + s; of sums over rows, as the gradients of
# weights are, there is then one for each sample (``parts``). Where weights are mapped, a network
# for each of them runs side by side.


def in_front(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """With the mapped dimension in front; expanded where it has none."""
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def fold(tensor: Tensor, dim: int | None, size: int, where: int) -> Tensor:
    """Joins the mapped dimension to dimension ``where`` (from the end), as its fastest part."""
    tensor = in_front(tensor, dim, size).movedim(0, where)
    return tensor.flatten(tensor.dim() + where - 1, tensor.dim() + where)


def unfold(tensor: Tensor, size: int, where: int) -> tuple[Tensor, int]:
    """Undoes ``fold``; the dimension to map over comes with the tensor."""
    rows = tensor.shape[where]
    tensor = tensor.unflatten(where, (rows // size, size))
    return tensor, tensor.dim() + where


# The arguments that have a row for each of the batch, and where: counted from their end.
ROWS = {"keep": -1, "probe": -1} | dict.fromkeys(
    ("x", "h0", "h", "f", "restart", "mask", "noise", "grad_h", "grad_h_n", "g", "gate", "c", "q0"),
    -2,
)

# What each result has: "rows" of features, "numbers", one for each row, or "sums" over all rows.
RESULTS = {
    "rnn": ("rows",) * 2,
    "rnn_with_f": ("rows",) * 3,
    "rnn_forward": ("rows",) * 3,
    "rnn_backward": ("rows",) * 2 + ("sums",) * 4 + ("rows", "numbers"),
    "adjoint_scan": ("rows",) * 3,
    "tangent_scan": ("rows",),
}


def _vmap(name: str, info, in_dims, *values):
    """An operator for all samples: its results, and the dimension of each to map over."""
    op = getattr(ops, name).default
    arguments = op._schema.arguments
    args = {a.name: a.default_value for a in arguments}
    args |= zip(args, values, strict=False)
    dims = dict.fromkeys(args) | dict(zip(args, in_dims, strict=False))
    mapped = {a for a, dim in dims.items() if isinstance(dim, int)}
    if "batch_sizes" in mapped:
        raise NotImplementedError(f"{name}: vmap over batch_sizes is not supported")
    if "f" in args and args["alpha"] is None:
        args["f"] = None  # it may be there, with shape (0,)
    way = _fold_rows if mapped <= ROWS.keys() else _side_by_side
    args, apart = way(args, dims, info.batch_size)
    outputs = op(*args.values())
    if isinstance(outputs, Tensor):
        return apart("rows", outputs)
    each = [
        (o, None) if o.shape == (0,) else apart(kind, o)  # not wanted
        for kind, o in zip(RESULTS[name], outputs, strict=True)
    ]
    return tuple(o for o, _ in each), tuple(dim for _, dim in each)


def _fold_rows(args, dims, size):
    parts = args.get("parts", 0)
    networks = args["weight_hh"].dim() - 2
    for a in ROWS.keys() & args.keys():
        if args[a] is not None:
            args[a] = fold(args[a], dims[a], size, ROWS[a])
    if args["batch_sizes"] is not None:
        args["batch_sizes"] = args["batch_sizes"] * size
    if "parts" in args:
        args["parts"] = max(parts, 1) * size

    def apart(kind, output):
        if kind == "rows":
            return unfold(output, size, -2)
        if kind == "numbers":
            return unfold(output, size, -1)
        if parts == 0:  # sums are (networks, parts, ...)
            return output, networks
        return output.unflatten(networks, (parts, size)), networks + 1

    return args, apart


def _side_by_side(args, dims, size):
    nested = args["weight_hh"].dim() - (dims["weight_hh"] is not None) == 3
    for a, value in args.items():
        if isinstance(value, Tensor) and a != "batch_sizes":
            value = in_front(value, dims[a], size)
            args[a] = value.flatten(0, 1) if nested else value

    def apart(_, output):
        return output.unflatten(0, (size, -1)) if nested else output, 0

    return args, apart


for _name in RESULTS:
    torch.library.register_vmap(f"torch_bptt::{_name}", functools.partial(_vmap, _name))
