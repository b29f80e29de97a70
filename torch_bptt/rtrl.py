"""RTRL: the gradient of an RNN carried forward in time, for learning at every step of a stream.

BPTT keeps the past and walks back through it. RTRL keeps, for the present state alone, how much
every unit depends on every parameter, and brings that along from step to step. There is no kernel
and no autograd through time in it: it is a second opinion on the gradients of both.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from torch_bptt import checks
from torch_bptt.reference import activations
from torch_bptt.rnn import RNN, RNNCell, look_up, plain_class

__all__ = ["RTRL"]


class RTRL:
    """Real-time recurrent learning, exact or by its diagonal approximation SnAp-1.

        h_t = (1 - a) h_{t-1} + a f(z_t),    z_t = x_t W_ih^T + b_ih + b_hh + h_{t-1} W_hh^T
        S_t = C_t S_{t-1} + B_t              S_t = dh_t/dtheta, zero before the first step
        C_t = diag(1 - a) + diag(G_t) W_hh   dh_t/dh_{t-1}, where G_t = a f'(z_t)
        B_t = G_t [x_t, h_{t-1}, 1]          what W_ih, W_hh and b of a unit do to it at once

    ``step`` returns h_t as a tensor whose backward multiplies dL/dh_t by S_t. So the gradient of a
    loss at step t, over the whole past, reaches the parameters by ``loss.backward()``, and an
    optimizer may step at every time step. What is kept does not grow with time.

    SnAp-1 drops at every step what the parameters of a unit do to the other units, so that only the
    diagonal of C_t carries S_t on. Its gradient is exact where W_hh is diagonal, else biased.

    With J = I + H + 1, and one column more each for an alpha that is a tensor and for an initial
    state that is learned:

        method    numbers in S_t    multiplications per step
        exact     B H^2 J           B H^3 J
        snap1     B H J             B H J

    During a step the new S_t stands beside the old one. A loss that waits for its backward keeps
    the S_t that it was made with.

    Arguments:
        cell: an RNNCell, or an RNN of one layer and one direction, of torch_bptt or of torch.nn, in
            float32 or float64. alpha and h0 of torch_bptt.RNN are taken into account, and learned
            if they are parameters. Nothing else of the module plays a part, hooks and batch_first
            included: its forward is not called. So weights that a forward pre-hook computes, as
            pruning and the old spectral_norm and weight_norm have it, are refused.
        method: 'exact' or 'snap1'.
    Attributes:
        cell, method: as given.
    Raises:
        TypeError: cell is none of these, or of another dtype.
        ValueError: cell has an option, or weights of a forward pre-hook, that do not go with RTRL;
            method is unknown.
    Example:
        >>> cell, readout = RNNCell(3, 8), nn.Linear(8, 1)
        >>> optimizer = torch.optim.SGD([*cell.parameters(), *readout.parameters()], lr=0.01)
        >>> rtrl = RTRL(cell)
        >>> for x, target in zip(torch.randn(100, 2, 3), torch.randn(100, 2, 1)):
        ...     loss = nn.functional.mse_loss(readout(rtrl.step(x)), target)
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
        >>> rtrl.nbytes  # 4 B H^2 (I + H + 1)
        6144

    Notes:
        Where parameters change at every step, the older terms of S_t were taken at older values:
        the gradient is then exact only in the limit of small learning rates (Williams and Zipser,
        1989).

        x_t gets no gradient: through h_t it has a part in losses that are yet to come. An x that
        requires one is refused. Second derivatives raise.
    Source:
        Williams and Zipser (1989), A learning algorithm for continually running fully recurrent
        neural networks; SnAp-1: Menick et al. (2021), A practical sparse approximation for real
        time recurrent learning.
    """

    def __init__(self, cell: nn.Module, method: str = "exact") -> None:
        _check_cell(cell)
        checks.check_choice("RTRL", "method", method, _METHODS)
        self.cell = cell
        self.method = method
        self.start()

    def start(self, hx: Tensor | None = None) -> None:
        """Forget the state and its sensitivity: the next step is the first one.

        Arguments:
            hx: the state before that step, (B, H), or (H,) without a batch, dtype and device of
                cell. If it requires a gradient it gets one, from the losses of all steps. None
                means the h0 of cell, or zeros.
        Raises:
            TypeError: hx is not a tensor of that dtype.
            ValueError: a wrong shape or device; hx requires a gradient and is not a leaf.
        """
        if hx is not None:
            _check_hx(hx, self._parameters().weight_hh)
        self._hx = hx
        self._from_hx = None  # (B,) bool: the rows whose past still begins with hx
        self._state = None  # (B, H)
        self._sensitivity = None  # S of that state, in the shape of the method

    def step(self, x: Tensor, reset: Tensor | None = None) -> Tensor:
        """Go on by one step.

        Arguments:
            x: input of this step, (B, I), or (I,) without a batch, dtype and device of cell.
            reset: (B,) bool, or () without a batch: rows that start anew before this step, from the
                h0 of cell or from zeros; reset[t] of ``torch_bptt.RNN``.
        Returns:
            h_t, (B, H) or (H,). It requires a gradient if a parameter does and gradients are
            enabled; the sensitivity is carried on in either case.
        Raises:
            TypeError: a wrong dtype.
            ValueError: a wrong shape or device, other rows than at the step before, an x that
                requires a gradient, or a cell that has got weights of a forward pre-hook.
        """
        theta = self._parameters()
        _check_step(x, reset, theta.weight_ih, self._hx, self._state)
        batched = x.dim() == 2
        if not batched:
            x, reset = x[None], None if reset is None else reset[None]
        learns_initial = theta.initial is not None or (
            self._hx is not None and self._hx.requires_grad
        )
        columns = [x.shape[1], len(theta.weight_hh), 1]
        columns += [int(isinstance(theta.alpha, Tensor)), int(learns_initial)]
        theta = theta._replace(initial=self._initial(x, reset, theta))
        method = _METHODS[self.method]
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            p, S = self._arrive(method, reset, theta.initial, columns)
            h, S = _advance(method, _nonlinearity(self.cell), theta, x, p, S)
        self._state, self._sensitivity = h, S
        h = _Differentiable.apply(h, S, method, columns, *theta)
        return h if batched else h[0]

    @property
    def nbytes(self) -> int:
        """Size of the sensitivity that goes from step to step, in bytes; 0 before the first."""
        return 0 if self._sensitivity is None else self._sensitivity.nbytes

    def _parameters(self):
        """As they are now: assignments and parametrizations replace them between steps."""
        cell = self.cell
        _check_hooks(cell)
        weights = [*look_up(cell, _names(cell)), None, None][:4]
        alpha = getattr(cell, "alpha", 1.0)
        if isinstance(alpha, Tensor):
            alpha = alpha.reshape(-1).expand(len(weights[1]))
        return _Parameters(*weights, alpha, getattr(cell, "h0", None))

    def _initial(self, x, reset, theta):
        """The state (B, H) that each row begins with, now or at its last reset.

        Made anew at every step, so that every loss has a graph of its own to go back through.
        """
        shape = len(x), len(theta.weight_hh)
        own = x.new_zeros(shape) if theta.initial is None else theta.initial.expand(shape)
        if self._hx is None:
            return own
        if self._from_hx is None:
            self._from_hx = x.new_ones(len(x), dtype=torch.bool)
        if reset is not None:
            self._from_hx = self._from_hx & ~reset
        return torch.where(self._from_hx[:, None], self._hx, own)

    def _arrive(self, method, reset, initial, columns):
        """p_t and its S: those of the step before, except in rows that begin."""
        p, S = self._state, self._sensitivity
        if p is None:
            p, S = initial, method.zeros(initial, sum(columns))
            reset = torch.ones_like(initial[:, 0], dtype=torch.bool)
        if reset is None:
            return p, S
        # Replaced, not multiplied by zero: what is dropped may be infinite.
        p = torch.where(reset[:, None], initial, p)
        S = S.masked_fill(reset.view(-1, *[1] * (S.dim() - 1)), 0)
        if columns[-1]:
            method.own(S)[reset, :, -1] = 1
        return p, S


class _Parameters(NamedTuple):
    """theta: what h_t depends on, apart from the inputs."""

    weight_ih: Tensor  # (H, I)
    weight_hh: Tensor  # (H, H)
    bias_ih: Tensor | None  # (H,)
    bias_hh: Tensor | None  # (H,)
    alpha: Tensor | float  # (H,), or one number that is not learned
    initial: Tensor | None  # (1, H), the learned h0; in a step (B, H), what each row began with


def _advance(method, nonlinearity, theta, x, p, S):
    """h_t and S_t from p_t and S_{t-1}."""
    value, slope = activations[nonlinearity]
    z = x @ theta.weight_ih.T + p @ theta.weight_hh.T
    for bias in (theta.bias_ih, theta.bias_hh):
        z = z if bias is None else z + bias
    y, a = value(z), theta.alpha
    gate, learns_alpha = a * slope(y), isinstance(a, Tensor)
    # As in the reference, alpha = 1 forgets the state even if it is infinite.
    h = y if not learns_alpha and a == 1 else (1 - a) * p + a * y

    S = method.carry(1 - a, gate, theta.weight_hh, S)
    inputs = torch.cat([x, p, torch.ones_like(p[:, :1])], 1)
    own, width = method.own(S), inputs.shape[1]
    own[..., :width] += gate[..., None] * inputs[:, None]
    if learns_alpha:
        own[..., width] += y - p
    return h, S


class _Exact:
    """S[b, k, i, j] = dh_k/dtheta_ij of row b, theta_i being what belongs to unit i."""

    @staticmethod
    def zeros(state, columns):
        return state.new_zeros(*state.shape, state.shape[1], columns)

    @staticmethod
    def own(S):
        """What the parameters of a unit do to that unit: a view, (B, H, J)."""
        return S.diagonal(dim1=1, dim2=2).mT

    @staticmethod
    def carry(leak, gate, weight_hh, S):
        jacobian = gate[..., None] * weight_hh
        jacobian.diagonal(dim1=1, dim2=2).add_(leak)
        return torch.bmm(jacobian, S.flatten(2)).view_as(S)

    @staticmethod
    def pull(d, S):
        """dL/dtheta of each row, (B, H, J), from d = dL/dh."""
        return torch.bmm(d[:, None], S.flatten(2)).view(*d.shape, S.shape[-1])


class _Diagonal:
    """S[b, i, j] = dh_i/dtheta_ij; what it does to other units is dropped."""

    @staticmethod
    def zeros(state, columns):
        return state.new_zeros(*state.shape, columns)

    @staticmethod
    def own(S):
        return S

    @staticmethod
    def carry(leak, gate, weight_hh, S):
        return (leak + gate * weight_hh.diagonal())[..., None] * S

    @staticmethod
    def pull(d, S):
        return d[..., None] * S


_METHODS = {"exact": _Exact, "snap1": _Diagonal}


class _Differentiable(torch.autograd.Function):
    """The state as a function of theta, whose derivative is known: S."""

    @staticmethod
    def forward(ctx, state, S, method, columns, *theta):
        ctx.save_for_backward(S)
        ctx.method, ctx.columns = method, columns
        return state.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, d):
        (S,) = ctx.saved_tensors
        with torch.autocast(d.device.type, enabled=False):
            by_row = ctx.method.pull(d, S)
            *own, alpha, _ = by_row.sum(0).split(ctx.columns, -1)
        weight_ih, weight_hh, bias = own
        bias, alpha, initial = bias[:, 0], alpha.sum(-1), by_row[..., -1]
        grads = weight_ih, weight_hh, bias, bias, alpha, initial
        wanted = ctx.needs_input_grad[4:]
        return *[None] * 4, *(g if want else None for g, want in zip(grads, wanted, strict=True))


# --- what goes with RTRL --------------------------------------------------------------------------

# Options of torch_bptt.RNN: the value that means "not in use", and why no other will do.
_OPTIONS = {
    "truncate": (None, "RTRL goes back nowhere, so that there is nothing to cut"),
    "clip_grad_h": (None, "the gradient of a state is never carried from step to step"),
    "checkpoint": (None, "no states are kept that it could spare"),
    "recurrent_dropout": (0.0, "RTRL draws no masks"),
    "noise": (0.0, "RTRL draws no noise"),
}


def _names(cell):
    """Of its weights, and of its biases where it has them."""
    if isinstance(cell, nn.RNNBase):
        return cell._all_weights[0]
    return ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def _nonlinearity(cell):
    if isinstance(cell, nn.RNNBase):
        return cell.mode.removeprefix("RNN_").lower()
    return cell.nonlinearity


def _check_cell(cell):
    cls = plain_class(cell)
    if cls not in (RNN, RNNCell, nn.RNN, nn.RNNCell):
        raise TypeError(
            "RTRL: cell must be an RNNCell or an RNN, of torch_bptt or torch.nn, itself and not "
            f"of a class derived from it, got {cls.__module__}.{cls.__name__}"
        )
    checks.check_nonlinearity(_nonlinearity(cell))
    if isinstance(cell, nn.RNNBase):
        for name, value in (("num_layers", 1), ("bidirectional", False)):
            _check_option(cell, name, value, "the sensitivity of one layer running upward is known")
        for name, (value, why) in _OPTIONS.items():
            _check_option(cell, name, value, why)
    _check_hooks(cell)
    dtype = next(cell.parameters()).dtype
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"RTRL: cell must be of torch.float32 or torch.float64, got {dtype}")


def _check_hooks(cell):
    """Where a forward pre-hook computes a weight, what is found is that of the last call."""
    if not cell._forward_pre_hooks:
        return
    for name in (*_names(cell), "alpha", "h0"):
        if isinstance(vars(cell).get(name), Tensor):
            raise ValueError(
                f"RTRL: cell must have {name} as a parameter, got one that a forward pre-hook "
                "computes, which RTRL never calls: use torch.nn.utils.parametrizations instead of "
                "the old spectral_norm and weight_norm, and prune.remove, or a parametrization "
                "that multiplies by the mask, instead of pruning"
            )


def _check_option(cell, name, value, why):
    got = getattr(cell, name, value)
    if got != value:
        raise ValueError(
            f"RTRL: cell must have {name}={value}, got {got}: {why}. For this network use BPTT, "
            "torch_bptt.RNN itself"
        )


def _check_like(name, got, dtype, device):
    if not isinstance(got, Tensor) or got.dtype != dtype:
        kind = got.dtype if isinstance(got, Tensor) else type(got).__name__
        raise TypeError(f"{name} must be a tensor of {dtype}, got {kind}")
    if got.device != device:
        raise ValueError(
            f"{name} must be on the device of cell, expected {device}, got {got.device}"
        )


def _check_hx(hx, weight_hh):
    _check_like("RTRL.start: hx", hx, weight_hh.dtype, weight_hh.device)
    if hx.dim() not in (1, 2) or hx.shape[-1] != len(weight_hh):
        raise ValueError(
            f"RTRL.start: hx must be (B, H) or (H,), expected H = {len(weight_hh)}, "
            f"got {tuple(hx.shape)}"
        )
    if hx.requires_grad and not hx.is_leaf:
        raise ValueError(
            "RTRL.start: hx must be a leaf if it requires a gradient, as every step goes back to "
            "it anew, got one that was computed: hand over leaf = hx.detach().requires_grad_(), "
            "and in the end call hx.backward(leaf.grad)"
        )


def _check_step(x, reset, weight_ih, hx, state):
    _check_like("RTRL.step: x", x, weight_ih.dtype, weight_ih.device)
    features = weight_ih.shape[1]
    if x.dim() not in (1, 2) or x.shape[-1] != features:
        raise ValueError(
            f"RTRL.step: x must be (B, I) or (I,), expected I = {features}, got {tuple(x.shape)}"
        )
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "RTRL.step: x must not require a gradient, as its part in later losses is not known "
            "yet: hand over x.detach(), or train what made x by BPTT"
        )
    if state is None and hx is not None and hx.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            "RTRL.step: x must have the rows of hx, "
            f"expected {(*hx.shape[:-1], features)}, got {tuple(x.shape)}"
        )
    if state is not None:
        _check_like("RTRL.step: x after the first step", x, state.dtype, state.device)
        rows = len(x) if x.dim() == 2 else 1
        if rows != len(state):
            raise ValueError(
                "RTRL.step: x must have the rows of the step before, "
                f"expected {len(state)}, got {rows}: start() begins anew with others"
            )
    if reset is not None:
        _check_like("RTRL.step: reset", reset, torch.bool, x.device)
        if reset.shape != x.shape[:-1]:
            raise ValueError(
                "RTRL.step: reset must have one entry per row, "
                f"expected {tuple(x.shape[:-1])}, got {tuple(reset.shape)}"
            )
