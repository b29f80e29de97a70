"""What ``torch.ops.torch_bptt.*`` need beyond their kernels: shapes without data, and vmap rules.

The operators themselves are in ``csrc``; ``csrc/binding.cpp`` has their schemas.
"""

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter

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


def join_rows(tensor: Tensor, dim: int | None, size: int, where: int) -> Tensor:
    """Joins the mapped dimension to dimension ``where`` (from the end), as its fastest part."""
    tensor = in_front(tensor, dim, size).movedim(0, where)
    return tensor.flatten(tensor.dim() + where - 1, tensor.dim() + where)


def split_rows(tensor: Tensor, size: int, where: int) -> tuple[Tensor, int]:
    """Undoes ``join_rows``; the dimension to map over comes with the tensor."""
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


def _vmap(op, size, args, in_dims):
    """An operator for all samples: its results, and the dimension of each to map over."""
    if size == 0:
        return _vmap_over_none(op, args, in_dims)
    arguments = [a.name for a in op._schema.arguments]
    args = dict(zip(arguments, args, strict=True))
    dims = dict(zip(arguments, in_dims, strict=True))
    mapped = {a for a, dim in dims.items() if dim is not None}
    name = op._opname
    if "batch_sizes" in mapped:
        raise NotImplementedError(f"{name}: vmap over batch_sizes is not supported")
    if "f" in args and args["alpha"] is None:
        args["f"] = None  # it may be there, with shape (0,)
    way = _fold_rows if mapped <= ROWS.keys() else _side_by_side
    args, apart = way(args, dims, size)
    outputs = op(*args.values())
    if isinstance(outputs, Tensor):
        outputs = (outputs,)
    return [
        (o, None) if o.shape == (0,) else apart(kind, o)  # not wanted
        for kind, o in zip(RESULTS[name], outputs, strict=True)
    ]


def _vmap_over_none(op, args, in_dims):
    """What one sample of zeros gives, without that sample: only shapes and dtypes count."""
    one = [
        arg if dim is None else arg.new_zeros((*arg.shape[:dim], 1, *arg.shape[dim + 1 :]))
        for arg, dim in zip(args, in_dims, strict=True)
    ]
    return [
        (o if dim is None else o.narrow(dim, 0, 0), dim) for o, dim in _vmap(op, 1, one, in_dims)
    ]


def _fold_rows(args, dims, size):
    parts = args.get("parts", 0)
    networks = args["weight_hh"].dim() - 2
    for a in ROWS.keys() & args.keys():
        if args[a] is not None:
            args[a] = join_rows(args[a], dims[a], size, ROWS[a])
    if args["batch_sizes"] is not None:
        args["batch_sizes"] = args["batch_sizes"] * size
    if "parts" in args:
        args["parts"] = max(parts, 1) * size

    def apart(kind, output):
        if kind == "rows":
            return split_rows(output, size, -2)
        if kind == "numbers":
            return split_rows(output, size, -1)
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


def _register(library, op) -> None:
    """What torch.library.register_vmap does, in half the time: its search for tensors inside of
    other arguments takes longer than the kernels of a small network."""
    defaults = [a.default_value for a in op._schema.arguments]

    def kernel(*args):
        interpreter = retrieve_current_functorch_interpreter()
        level = interpreter.level()
        args = [
            _functorch._unwrap_batched(a, level) if isinstance(a, Tensor) else (a, None)
            for a in (*args, *defaults[len(args) :])
        ]
        values, dims = zip(*args, strict=True)
        with torch._C._ExcludeDispatchKeyGuard(_BATCHED):
            if not any(dim is not None for dim in dims):
                return op(*values)
            results = [
                o if dim is None else _functorch._add_batch_dim(o, dim, level)
                for o, dim in _vmap(op, interpreter.batch_size(), values, dims)
            ]
        return results[0] if len(results) == 1 else tuple(results)

    library.impl(op._opname, kernel, "FuncTorchBatched")


_BATCHED = torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchBatched)
_library = torch.library.Library("torch_bptt", "IMPL")  # what it registers lives as long as it does
for _name in RESULTS:
    _register(_library, getattr(ops, _name).default)
