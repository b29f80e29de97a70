"""Derivatives of the Elman layer of every order, from three recurrences (``csrc/README.md``).

    forward   h_t = (1 - a) p_t + a f(u_t + (m p_t) W^T)            p_t: the state arriving at t
    adjoint   d_t = g_t + (1 - a) d_{t+1} + m ((G_{t+1} d_{t+1}) W)  G_t = a f'(z_t)
    tangent   q_t = c_t + (1 - a) q_{t-1} + G_t ((m q_{t-1}) W^T)

Backward of forward is an adjoint, its jvp a tangent; backward of adjoint is a tangent, backward of
tangent an adjoint. What stands between them (gates, sums over rows) are ordinary tensor operations,
so autograd closes the circle and no derivative has a formula of its own.
"""

import dataclasses
import functools
import itertools
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._C import _functorch
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch.autograd import Function

from torch_bptt._values import number
from torch_bptt.operators import RESULTS, ROWS, ops, split_rows
from torch_bptt.reference import STOPPING, activations


class Options(NamedTuple):
    """What is no tensor about a layer; one argument of its Function, as each costs 0.1 us there.

    activation: a key of ``reference.activations``.
    reverse: from the last step of each row to its first.
    truncate: cut the gradient after every so many steps; 0 never.
    clip: clamp dL/dh_t to [-clip, clip] at every step; first derivatives only.
    """

    activation: str
    reverse: bool = False
    truncate: int = 0
    clip: float | None = None


class Leaf:
    """Options as an argument of a Function, which torch.func does not take apart.

    A tuple or list that holds no tensor counts as one tangent, but as several dimensions to map
    over, which torch.func.jvp over vmap would not accept.
    """

    __slots__ = ("options",)

    def __init__(self, options: Options):
        self.options = options

    def __repr__(self):  # torch.jit.trace writes it down, and compares two traces
        return f"Leaf({self.options})"


def rnn_layer(
    x: Tensor,
    h0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    batch_sizes: Tensor | None,
    keep: Tensor | None,
    options: Options,
    alpha: Tensor | None = None,
    restart: Tensor | None = None,
    mask: Tensor | None = None,
    noise: Tensor | None = None,
    probe: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Runs one layer in one direction over a whole sequence.

        h_t = (1 - alpha) p_t + alpha f(x_t W_ih^T + b_ih + noise_t + (mask p_t) W_hh^T + b_hh)

    Arguments:
        x: input (T, B, I), packed (N, I) with ``batch_sizes``, or a single step (B, I); float32,
            float64, bfloat16 or float16, any strides.
        h0: state before the first step, (1, B, H) where x has 3 dimensions, else (B, H); None means
            zeros.
        weight_ih, weight_hh: (H, I) and (H, H), dtype and device of x.
        bias_ih, bias_hh: (H) each, dtype and device of x, or None.
        batch_sizes: rows alive at each step (T), int64 on the CPU, never increasing.
        keep: bool (T, B), False where a row restarts: the state of the step before, or h0, does not
            arrive.
        alpha: (H), the share of the new value in the state of each unit, in (0, 1]; float32, or
            float64 for such an x. None means 1.
        restart: a state as h0, which arrives where a row restarts; None means zeros.
        mask: as h0, factors of the arriving state in the recurrent product; None means ones. It has
            no gradient.
        noise: as output, added to what f is applied to; None means zeros. It has no gradient.
        probe: as x without its features, dtype of alpha. It changes nothing; as its gradient it
            gets the norm of dL/dh_t of every row.

    Returns:
        output, every h_t, as x with H features; h_n, the state after each row's last step, shaped
        as h0.

    Raises:
        ValueError, TypeError, RuntimeError: an argument does not fit; the message names it.
        NotImplementedError: a second derivative with ``clip``.

    Source:
        Elman (1990), Finding structure in time; Werbos (1990), Backpropagation through time.
    """
    tensors = x, h0, weight_ih, weight_hh, bias_ih, bias_hh
    if _needs_function():
        h, h_n, _ = RNNForward.apply(
            *tensors, alpha, restart, probe, batch_sizes, keep, mask, noise, Leaf(options)
        )
        return h, h_n
    activation, reverse, truncate, clip = options
    return ops.rnn.default(
        *tensors, activation, batch_sizes, keep, alpha, restart, mask, noise, probe, reverse,
        truncate, clip,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Links:
    """Which state arrives at which step, moving rows along these links, and gates at their ends.

    Rows are dense (T, B, H) or packed (N, H), states (1, B, H) or (B, H). Everything here is
    linear, differentiable and free of loops over time. ``gate_stops``: see ``stopped``.
    """

    batch_sizes: Tensor | None
    keep: Tensor | None
    mask: Tensor | None
    reverse: bool
    truncate: int
    gate_stops: bool

    @classmethod
    def of(
        cls,
        x: Tensor,
        batch_sizes: Tensor | None,
        keep: Tensor | None,
        mask: Tensor | None,
        options: Options,
    ):
        if batch_sizes is None and x.dim() == 2:  # a single step, which is packed rows as well
            batch_sizes = torch.tensor([len(x)] if len(x) else [], dtype=torch.int64, device="cpu")
        stops = options.activation in STOPPING
        return cls(batch_sizes, keep, mask, options.reverse, options.truncate, stops)

    def arriving(
        self, h: Tensor, h0: Tensor | None, restart: Tensor | None, *, truncated: bool
    ) -> Tensor:
        """p_t: the state of the step before, h0 at a row's first step, restart where not kept."""
        if self.batch_sizes is None:
            first = h.new_zeros((1, *h.shape[1:])) if h0 is None else h0
            order = (h[1:], first) if self.reverse else (first, h[:-1])
            p = torch.cat(order)
        else:
            first = h.new_zeros((self._batch, h.shape[-1])) if h0 is None else h0
            p = torch.cat((h, first)).index_select(0, self._before.to(h.device))
        linked = self._linked(p)
        if linked is not None:
            # The state itself crosses a truncated link, as a value without a gradient.
            p = torch.where(linked[..., None], p, 0 if truncated else p.detach())
        kept = self._kept(p)
        if kept is None:
            return p
        return torch.where(kept[..., None], p, 0 if restart is None else self._rows_of(restart))

    def entering(self, p: Tensor) -> Tensor:
        """m p_t: what is multiplied by W_hh."""
        return p if self.mask is None else self._rows_of(self.mask) * p

    def stopped(self, gate: Tensor, v: Tensor) -> Tensor:
        """What a gate lets through of v: one of zero may stop even what is infinite or NaN."""
        return torch.where(gate == 0, 0, v) if self.gate_stops else v

    def leaving(self, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The transpose of ``arriving``: what each step, h0, and restart get back."""
        kept, linked = self._kept(v), self._linked(v)
        if kept is None:
            v_restart = self._sum_of_rows(torch.zeros_like(v))
        else:
            v_restart = self._sum_of_rows(torch.where(kept[..., None], 0, v))
            v = torch.where(kept[..., None], v, 0)
        if linked is not None:
            v = torch.where(linked[..., None], v, 0)
        zero = torch.zeros_like(v[:1])
        if self.batch_sizes is None:
            if self.reverse:
                return torch.cat((zero, v[:-1])), v[-1:], v_restart
            return torch.cat((v[1:], zero)), v[:1], v_restart
        rows, before = len(v), self._before
        after = torch.full((rows + self._batch,), rows, device="cpu").index_copy(
            0, before, torch.arange(rows, device="cpu")
        )
        moved = torch.cat((v, zero)).index_select(0, after.to(v.device))
        return moved[:rows], moved[rows:], v_restart

    def final(self, h: Tensor) -> Tensor:
        """h_n: the state after each row's last step."""
        if self.batch_sizes is None:
            return h[:1] if self.reverse else h[-1:]
        return h.index_select(0, self._final.to(h.device))

    def add_final(self, g: Tensor, grad_h_n: Tensor) -> Tensor:
        """g with the gradient of h_n added: the transpose of ``final``."""
        if self.batch_sizes is None:
            # A copy from the host would wait for the device, and could not be captured in a graph.
            last = torch.full((1,), 0 if self.reverse else g.shape[0] - 1, device=g.device)
            return g.index_add(0, last, grad_h_n)
        return g.index_add(0, self._final.to(g.device), grad_h_n)

    def _rows_of(self, state: Tensor) -> Tensor:
        """A state as rows: the same at every step."""
        if self.batch_sizes is None:
            return state
        return state.index_select(0, self._columns.to(state.device))

    def _sum_of_rows(self, v: Tensor) -> Tensor:
        """The transpose of ``_rows_of``."""
        if self.batch_sizes is None:
            return v.sum(0, keepdim=True)
        zeros = v.new_zeros((self._batch, v.shape[-1]))
        return zeros.index_add(0, self._columns.to(v.device), v)

    # Packed rows: how many in the batch; of each its step, its column, where its state comes from.

    @property
    def _batch(self) -> int:
        return number(self.batch_sizes[0]) if len(self.batch_sizes) else 0

    @property
    def _steps(self) -> Tensor:
        return torch.repeat_interleave(
            torch.arange(len(self.batch_sizes), device="cpu"), self.batch_sizes
        )

    @property
    def _offsets(self) -> Tensor:
        return torch.cumsum(self.batch_sizes, 0) - self.batch_sizes

    @property
    def _columns(self) -> Tensor:
        steps = self._steps
        return torch.arange(len(steps), device="cpu") - self._offsets[steps]

    @property
    def _lengths(self) -> Tensor:
        return torch.bincount(self._columns)

    @property
    def _before(self) -> Tensor:
        """Row index of the state that arrives; rows + b for h0[b]."""
        steps, columns = self._steps, self._columns
        before = steps + 1 if self.reverse else steps - 1
        exists = (before >= 0) & (before < self._lengths[columns])
        rows = self._offsets[before.clamp(0, len(self.batch_sizes) - 1)] + columns
        return torch.where(exists, rows, len(steps) + columns)

    @property
    def _final(self) -> Tensor:
        columns = torch.arange(self._batch, device="cpu")
        return columns if self.reverse else self._offsets[self._lengths - 1] + columns

    def _kept(self, p: Tensor) -> Tensor | None:
        """False where a row restarts; None if none does."""
        if self.keep is None or self.batch_sizes is None:
            return self.keep
        steps, columns = self._steps, self._columns
        return self.keep[steps.to(p.device), columns.to(p.device)]

    def _linked(self, p: Tensor) -> Tensor | None:
        """False where truncation cuts the gradient; None if nowhere."""
        if not self.truncate:
            return None
        if self.batch_sizes is None:
            own = torch.arange(p.shape[0], device="cpu")[:, None]
            own = p.shape[0] - 1 - own if self.reverse else own
        else:
            own = self._lengths[self._columns] - 1 - self._steps if self.reverse else self._steps
        return ((own == 0) | (own % self.truncate != 0)).to(p.device)


def _refuse_functionalized_forward_mode() -> None:
    levels = _functorch.get_interpreter_stack() or ()
    if any(level.key() == _functorch.TransformType.Functionalize for level in levels):
        raise NotImplementedError(
            "rnn: torch.func.functionalize together with forward mode is not supported, as it has "
            "no rule for torch.autograd.Function; use either alone"
        )


def _refuse_compiled_transforms() -> None:
    """torch.compile either knows no Function with a jvp, or has other gradients than eager."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        raise NotImplementedError(
            "rnn: torch.func transforms and forward mode are not supported inside torch.compile; "
            "leave the transformed function out of it, with torch.compiler.disable"
        )


def _refuse_the_old_onnx_exporter() -> None:
    """It takes the graph of torch.jit.trace, in which a layer is an operator of ours."""
    if torch.onnx.is_in_onnx_export():
        raise NotImplementedError(
            "torch.onnx.export: dynamo must be True, as the other exporter knows no operators "
            "but PyTorch's, got False: or export module.to_torch()"
        )


def transformed() -> bool:
    """Whether torch rewrites, or notes, what runs now."""
    return (
        torch._C._are_functorch_transforms_active()
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or _needs_function()
    )


def _needs_function() -> bool:
    """Whether that takes a Function in Python, as forward mode does.

    Else an operator whose node in the graph is in C++ will do, which takes less time.
    torch.compile, torch.export and the other transforms of torch.func see through it, and
    torch.jit.trace can save it.
    """
    if torch.compiler.is_compiling():
        _refuse_compiled_transforms()
        return False
    if forward_ad._current_level >= 0:
        _refuse_functionalized_forward_mode()
        return True
    if torch.jit.is_tracing():
        _refuse_the_old_onnx_exporter()
    return False


def _differentiates_once() -> bool:
    """Whether nothing but one torch.func.grad (vjp, jacrev) is around.

    It asks for the graph of its backward, which it needs only where autograd outside of it comes
    back to it.
    """
    kinds = [level.key() for level in _functorch.get_interpreter_stack() or ()]
    grads = kinds.count(_functorch.TransformType.Grad)
    return grads == 1 and _functorch.TransformType.Jvp not in kinds


def _rows(tensor: Tensor) -> Tensor:
    """All rows as one matrix. Not by flatten, which is_grads_batched does not know."""
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """Sum over all rows of left^T right: one matrix product."""
    return _rows(left).mT @ _rows(right)


def _in_own_dtype(tensor: Tensor):
    """Products of a derivative keep the dtype of forward, whatever autocast the caller is in."""
    if tensor.device.type == "meta":
        return nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)


def _sum(rows: Tensor, like: Tensor) -> Tensor:
    """Sum over all rows."""
    return _rows(rows).sum(0).to(like.dtype)


def _gate(options: Options, alpha: Tensor | None, h: Tensor, f: Tensor, p: Tensor):
    """G_t = a f'(z_t), and f(z_t), as differentiable functions of h, p and alpha."""
    _, slope = activations[options.activation]
    if alpha is None:
        return slope(h), h
    # f(z_t) has its value from the buffer that forward kept (dividing by a small alpha would lose
    # bits, and the sign of a relu with them) and its derivative from the recurrence.
    alpha = alpha.to(h.dtype)
    derived = (h - (1 - alpha) * p) / alpha
    y = f.detach() + (derived - derived.detach())
    return alpha * slope(y), y


def _nestable(jvp):
    """A jvp rule that forward mode goes through itself, where one runs inside another.

    PyTorch switches forward mode off around rules, so the outer one would take the result for a
    constant. With it on, what forward saved must come without the tangent that the rule is given.
    """

    @functools.wraps(jvp)
    def rule(ctx, *tangents):
        levels = _functorch.get_interpreter_stack() or ()
        if sum(level.key() == _functorch.TransformType.Jvp for level in levels) < 2:
            return jvp(ctx, ctx.saved_tensors, *tangents)
        saved = [None if tensor is None else _primal(tensor) for tensor in ctx.saved_tensors]
        with forward_ad._set_fwd_grad_enabled(True):
            return jvp(ctx, saved, *tangents)

    return staticmethod(rule)


def _primal(tensor: Tensor) -> Tensor:
    """tensor without its innermost tangent; vmap, where it lies further inside, has no rule."""
    interpreter = retrieve_current_functorch_interpreter()
    if interpreter.key() != _functorch.TransformType.Vmap:
        return forward_ad.unpack_dual(tensor).primal
    value, dim = _functorch._unwrap_batched(tensor, interpreter.level())
    with interpreter.lower():
        value = _primal(value)
    return value if dim is None else _functorch._add_batch_dim(value, dim, interpreter.level())


class RNNForward(Function):
    """x, h0, weights -> h, h_n, f(z_t)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x, h0, weight_ih, weight_hh, bias_ih, bias_hh, alpha, restart, probe, batch_sizes, keep,
        mask, noise, leaf,
    ):  # fmt: skip
        options = leaf.options
        h, h_n, f = ops.rnn_forward.default(
            x, h0, weight_ih, weight_hh, bias_ih, bias_hh, options.activation, batch_sizes, keep,
            alpha, restart, mask, noise, options.reverse,
        )  # fmt: skip
        return h, h_n, None if alpha is None else f

    @staticmethod
    def setup_context(ctx, inputs, output):
        (
            x,
            h0,
            weight_ih,
            weight_hh,
            _,
            _,
            alpha,
            restart,
            _,
            batch_sizes,
            keep,
            mask,
            _,
            leaf,
        ) = inputs
        h, _, f = output
        ctx.options = leaf.options
        ctx.set_materialize_grads(False)
        saved = x, h0, weight_ih, weight_hh, batch_sizes, keep, alpha, restart, mask, h, f
        ctx.save_for_backward(*saved)
        if forward_ad._current_level >= 0:
            ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx, grad_h, grad_h_n, _):
        if grad_h is None and grad_h_n is None:
            return (None,) * 14
        wanted = ctx.needs_input_grad[:9]
        backward = _fused_backward
        if torch.is_grad_enabled() or forward_ad._current_level >= 0:
            backward = backward_with_graph
        grads = backward(grad_h, grad_h_n, *ctx.saved_tensors, ctx.options, wanted)
        return *grads, *(None,) * 5

    @_nestable
    def jvp(
        ctx, saved, x_dot, h0_dot, weight_ih_dot, weight_hh_dot, bias_ih_dot, bias_hh_dot,
        alpha_dot, restart_dot, *_,
    ):  # fmt: skip
        x, h0, weight_ih, weight_hh, batch_sizes, keep, alpha, restart, mask, h, f = saved
        links = Links.of(x, batch_sizes, keep, mask, ctx.options)
        with _in_own_dtype(x):
            p = links.arriving(h, h0, restart, truncated=False)
            gate, y = _gate(ctx.options, alpha, h, f, p)
            u_dot = torch.zeros_like(h)
            if x_dot is not None:
                u_dot = u_dot + x_dot @ weight_ih.mT
            if weight_ih_dot is not None:
                u_dot = u_dot + x @ weight_ih_dot.mT
            if weight_hh_dot is not None:
                u_dot = u_dot + links.entering(p) @ weight_hh_dot.mT
            if bias_ih_dot is not None:
                u_dot = u_dot + bias_ih_dot
            if bias_hh_dot is not None:
                u_dot = u_dot + bias_hh_dot
            c = gate * links.stopped(gate, u_dot)
            if alpha_dot is not None:
                c = c + alpha_dot.to(h.dtype) * (y - p)
            q = tangent_scan(c, h0_dot, gate, weight_hh, alpha, restart_dot, links)
            # f counts as constant, see _gate. None would say so, but not under vmap.
            return q, links.final(q), None if f is None else torch.zeros_like(f)


def _fused_backward(
    grad_h, grad_h_n, x, h0, weight_ih, weight_hh, batch_sizes, keep, alpha, restart, mask, h, f,
    options, wanted,
):  # fmt: skip
    """The gradients of x, h0, ... of which wanted has flags, None where not, by one operator.

    They are those of RNNForward's first nine arguments.
    """
    grads = ops.rnn_backward.default(
        grad_h, grad_h_n, x, h0, h, f, weight_ih, weight_hh, options.activation,
        _of_operator(wanted), batch_sizes, keep, alpha, restart, mask, options.reverse,
        options.truncate, options.clip,
    )  # fmt: skip
    return _of_layer(grads, wanted)


def backward_with_graph(
    grad_h, grad_h_n, x, h0, weight_ih, weight_hh, batch_sizes, keep, alpha, restart, mask, h, f,
    options, wanted,
):  # fmt: skip
    """As ``_fused_backward``, but differentiable: an adjoint scan between tensor operations.

    Called from ``csrc/autograd.cpp`` too, with options as a plain tuple.
    """
    options = Options(*options)
    if options.clip is not None and forward_ad._current_level >= 0:
        _refuse_second_derivative_of_clip()
    if options.clip is not None or _differentiates_once():
        return _fused_backward(
            grad_h, grad_h_n, x, h0, weight_ih, weight_hh, batch_sizes, keep, alpha, restart, mask,
            h, f, options, wanted,
        )  # fmt: skip
    grads = _graph(
        grad_h, grad_h_n, x, h0, h, f, weight_ih, weight_hh, batch_sizes, keep, alpha, restart,
        mask, options, _of_operator(wanted), 0,
    )  # fmt: skip
    return _of_layer(grads, wanted)


def second_backward(tensors, options, wanted, parts, needed, grads):
    """The gradients of what the operator rnn_backward reads, None where not needed.

    Called from ``csrc/autograd.cpp``, where the operator was used for its speed and is to be
    differentiated all the same: its results are computed anew, as ``_graph`` of its inputs.

    Arguments:
        tensors: grad_h, grad_h_n, x, h0, h, f, weight_ih, weight_hh, batch_sizes, keep, alpha,
            restart, mask.
        options, wanted, parts: its other arguments.
        needed: a flag for each of the tensors.
        grads: the gradients of its results, None where they have none.
    """
    options = Options(*options)
    if options.clip is not None:
        _refuse_second_derivative_of_clip()
    grads = *grads, None  # norms have none
    given = [grad is not None and flag for grad, flag in zip(grads, wanted, strict=True)]
    differentiable = [i for i, flag in enumerate(needed) if flag]
    result = [None] * len(tensors)
    if not any(given):
        return result

    def results(*inputs):
        mixed = list(tensors)
        for i, tensor in zip(differentiable, inputs, strict=True):
            mixed[i] = tensor
        return tuple(grad for grad in _graph(*mixed, options, given, parts) if grad is not None)

    _, vjp = torch.func.vjp(results, *(tensors[i] for i in differentiable))
    cotangents = tuple(grad for grad, flag in zip(grads, given, strict=True) if flag)
    for i, grad in zip(differentiable, vjp(cotangents), strict=True):
        result[i] = grad
    return result


def _refuse_second_derivative_of_clip():
    raise NotImplementedError(
        "clip_grad_h: a second derivative through clipped gradients is not supported; "
        "use clip_grad_h=None, or clip the parameters' gradients after backward"
    )


def _of_operator(wanted) -> list[bool]:
    """Which results of the operator the layer's arguments need: one will do for both biases."""
    of_x, of_h0, of_weight_ih, of_weight_hh, of_bias_ih, of_bias_hh, *others = wanted
    return [of_x, of_h0, of_weight_ih, of_weight_hh, of_bias_ih or of_bias_hh, *others]


def _of_layer(grads, wanted):
    """Each bias gets a gradient of its own: who scales gradients in place must not do so twice."""
    grad_bias = grads[4]
    grads = (*grads[:5], grad_bias.clone() if wanted[4] and wanted[5] else grad_bias, *grads[5:])
    return tuple(grad if flag else None for grad, flag in zip(grads, wanted, strict=True))


def _graph(
    grad_h, grad_h_n, x, h0, h, f, weight_ih, weight_hh, batch_sizes, keep, alpha, restart, mask,
    options, wanted, parts,
):  # fmt: skip
    """What the operator rnn_backward computes, as a function that can be differentiated."""
    tensors = dict(
        grad_h=grad_h, grad_h_n=grad_h_n, x=x, h0=h0, h=h, f=f, weight_ih=weight_ih,
        weight_hh=weight_hh, keep=keep, alpha=alpha, restart=restart, mask=mask,
    )  # fmt: skip
    if weight_hh.dim() == 3:  # networks side by side
        dims = {name: None if tensor is None else 0 for name, tensor in tensors.items()}
        return _graph_of_each(tensors, dims, 0, 0, batch_sizes, options, wanted, parts)
    if parts:
        dims = dict.fromkeys(tensors)
        for name, where in ROWS.items():
            if tensors.get(name) is not None:
                tensors[name], dims[name] = split_rows(tensors[name], parts, where)
        if batch_sizes is not None:
            batch_sizes = batch_sizes // parts
        grads = _graph_of_each(tensors, dims, -2, -1, batch_sizes, options, wanted, 0)
        return tuple(
            grad.flatten(where - 1, where) if grad is not None and where else grad
            for grad, where in zip(grads, (-2, -2, 0, 0, 0, 0, -2, -1), strict=True)
        )
    of_x, of_h0, of_weight_ih, of_weight_hh, of_bias, of_alpha, of_restart, of_norms = wanted
    links = Links.of(x, batch_sizes, keep, mask, options)
    with _in_own_dtype(x):
        g = torch.zeros_like(h) if grad_h is None else grad_h
        if grad_h_n is not None:
            g = links.add_final(g, grad_h_n)
        p = links.arriving(h, h0, restart, truncated=False)
        gate, y = _gate(options, alpha, h, f, p)
        d, d0, d_restart = adjoint_scan(g, gate, weight_hh, alpha, links)
        du = gate * links.stopped(gate, d)
        return (
            du @ weight_ih if of_x else None,
            d0 if of_h0 else None,
            _outer(du, x) if of_weight_ih else None,
            _outer(du, links.entering(p)) if of_weight_hh else None,
            _rows(du).sum(0) if of_bias else None,
            _sum(d * (y - p), alpha) if of_alpha else None,
            d_restart if of_restart else None,
            _norms(d) if of_norms else None,
        )


def _graph_of_each(tensors, dims, rows_dim, numbers_dim, batch_sizes, options, wanted, parts):
    """``_graph`` mapped over dimensions of its tensors; of its results, rows get theirs there."""
    of_kind = {"rows": rows_dim, "numbers": numbers_dim, "sums": 0}
    out_dims = [of_kind[kind] for kind in RESULTS["rnn_backward"]]

    def results(tensors):
        grads = _graph(
            **tensors, batch_sizes=batch_sizes, options=options, wanted=wanted, parts=parts
        )
        return tuple(grad for grad in grads if grad is not None)

    mapped = torch.vmap(results, (dims,), tuple(itertools.compress(out_dims, wanted)))
    found = iter(mapped(tensors))
    return tuple(next(found) if flag else None for flag in wanted)


def _norms(d: Tensor) -> Tensor:
    """|d_t| of every row, a number to look at and not to differentiate.

    The largest entry is taken out first, so that squares neither overflow nor vanish.
    """
    d = d.detach() if d.dtype == torch.float64 else d.detach().float()
    largest = d.abs().amax(-1, keepdim=True)
    largest = torch.where((largest > 0) & largest.isfinite(), largest, 1)
    return largest.squeeze(-1) * torch.linalg.vector_norm(d / largest, dim=-1)


class AdjointScan(Function):
    """g, gate, weight_hh, alpha -> d, d0, d_restart: linear in g, down in processing order."""

    generate_vmap_rule = True

    @staticmethod
    def forward(g, gate, weight_hh, alpha, batch_sizes, keep, mask, reverse, truncate, stops):
        return ops.adjoint_scan(
            g, gate, weight_hh, batch_sizes, keep, alpha, mask, reverse, truncate, None, stops
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, gate, weight_hh, alpha, batch_sizes, keep, mask, *ctx.links = inputs
        saved = gate, weight_hh, alpha, batch_sizes, keep, mask, output[0]
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx, grad_d, grad_d0, grad_restart):
        gate, weight_hh, alpha, batch_sizes, keep, mask, d = ctx.saved_tensors
        links = Links(batch_sizes, keep, mask, *ctx.links)
        with _in_own_dtype(d):
            q = tangent_scan(grad_d, grad_d0, gate, weight_hh, alpha, grad_restart, links)
            arriving = links.arriving(q, grad_d0, grad_restart, truncated=True)
            return (
                q,
                *_of_linear_loop(
                    ctx.needs_input_grad[1:4], gate, weight_hh, alpha, d, arriving, links
                ),
                *(None,) * 6,
            )

    @_nestable
    def jvp(ctx, saved, g_dot, gate_dot, weight_hh_dot, alpha_dot, *_):
        gate, weight_hh, alpha, batch_sizes, keep, mask, d = saved
        links = Links(batch_sizes, keep, mask, *ctx.links)
        with _in_own_dtype(d):
            moved, passing = torch.zeros_like(d), links.stopped(gate, d)
            if gate_dot is not None:
                moved = moved + (gate_dot * passing) @ weight_hh
            if weight_hh_dot is not None:
                moved = moved + (gate * passing) @ weight_hh_dot
            moved = links.entering(moved)
            if alpha_dot is not None:
                moved = moved - alpha_dot.to(d.dtype) * d
            moved, moved0, moved_restart = links.leaving(moved)
            g_dot = moved if g_dot is None else g_dot + moved
            d_dot, d0_dot, restart_dot = adjoint_scan(g_dot, gate, weight_hh, alpha, links)
            return d_dot, d0_dot + moved0, restart_dot + moved_restart


class TangentScan(Function):
    """c, q0, gate, weight_hh, alpha, restart -> q: linear in c, q0, restart; upward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        c, q0, gate, weight_hh, alpha, restart, batch_sizes, keep, mask, reverse, truncate, stops
    ):
        return ops.tangent_scan(
            c, q0, gate, weight_hh, batch_sizes, keep, alpha, restart, mask, reverse, truncate,
            stops,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, q0, gate, weight_hh, alpha, restart, batch_sizes, keep, mask, *ctx.links = inputs
        saved = q0, gate, weight_hh, alpha, restart, batch_sizes, keep, mask, output
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx, grad_q):
        q0, gate, weight_hh, alpha, restart, batch_sizes, keep, mask, q = ctx.saved_tensors
        links = Links(batch_sizes, keep, mask, *ctx.links)
        of_q0, of_restart = ctx.needs_input_grad[1], ctx.needs_input_grad[5]
        with _in_own_dtype(q):
            d, d0, d_restart = adjoint_scan(grad_q, gate, weight_hh, alpha, links)
            arriving = links.arriving(q, q0, restart, truncated=True)
            return (
                d,
                d0 if of_q0 else None,
                *_of_linear_loop(
                    ctx.needs_input_grad[2:5], gate, weight_hh, alpha, d, arriving, links
                ),
                d_restart if of_restart else None,
                *(None,) * 6,
            )

    @_nestable
    def jvp(ctx, saved, c_dot, q0_dot, gate_dot, weight_hh_dot, alpha_dot, restart_dot, *_):
        q0, gate, weight_hh, alpha, restart, batch_sizes, keep, mask, q = saved
        links = Links(batch_sizes, keep, mask, *ctx.links)
        with _in_own_dtype(q):
            arriving = links.arriving(q, q0, restart, truncated=True)
            entering = links.entering(arriving)
            c_dot = torch.zeros_like(q) if c_dot is None else c_dot
            if gate_dot is not None:
                c_dot = c_dot + gate_dot * links.stopped(gate, entering @ weight_hh.mT)
            if weight_hh_dot is not None:
                c_dot = c_dot + gate * links.stopped(gate, entering @ weight_hh_dot.mT)
            if alpha_dot is not None:
                c_dot = c_dot - alpha_dot.to(q.dtype) * arriving
            return tangent_scan(c_dot, q0_dot, gate, weight_hh, alpha, restart_dot, links)


def _of_linear_loop(wanted, gate, weight_hh, alpha, d, q, links):
    """The gradients of gate, weight_hh and alpha, the same for both scans.

    d is the adjoint and q what arrives of the tangent: one is the input, the other its cotangent.
    """
    of_gate, of_weight, of_alpha = wanted
    entering, passing = links.entering(q), links.stopped(gate, d)
    return (
        passing * (entering @ weight_hh.mT) if of_gate else None,
        _outer(gate * passing, entering) if of_weight else None,
        -_sum(d * q, alpha) if of_alpha else None,
    )


def _apply(function, *args):
    """``function.apply``, also under the vmap that ``torch.autograd.grad(is_grads_batched=True)``
    still has: one older than torch.func's, which loses the graph that a Function records.
    """
    mapped = [isinstance(a, Tensor) and _functorch.is_legacy_batchedtensor(a) for a in args]
    if not any(mapped):
        return function.apply(*args)
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    args = [
        torch._remove_batch_dim(a, level, 1, 0) if m else a
        for a, m in zip(args, mapped, strict=True)
    ]
    outputs = torch.func.vmap(function.apply, tuple(0 if m else None for m in mapped))(*args)
    one = isinstance(outputs, Tensor)
    outputs = [  # which that vmap wants in memory as they are in the order of dimensions
        torch._add_batch_dim(output.clone(memory_format=torch.contiguous_format), 0, level)
        for output in ([outputs] if one else outputs)
    ]
    return outputs[0] if one else tuple(outputs)


def adjoint_scan(g, gate, weight_hh, alpha, links):
    return _apply(
        AdjointScan, g, gate, weight_hh, alpha, links.batch_sizes, links.keep, links.mask,
        links.reverse, links.truncate, links.gate_stops,
    )  # fmt: skip


def tangent_scan(c, q0, gate, weight_hh, alpha, restart, links):
    return _apply(
        TangentScan, c, q0, gate, weight_hh, alpha, restart, links.batch_sizes, links.keep,
        links.mask, links.reverse, links.truncate, links.gate_stops,
    )  # fmt: skip
