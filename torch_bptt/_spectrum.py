"""What a step does to a small change of the state: weights, products of Jacobians, exponents.

    J_t = dh_t / dh_{t-1} = diag(1-a) + diag(G_t) W_hh        G_t = a f'(z_t), columns as in texts

Backpropagation multiplies by the transpose of J_t once per step, so that whatever J_t J_{t-1} ...
does to the length of a vector is what happens to the gradient. Everything is float64 and plain
tensor operations; loops are over the steps of a window.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from torch_bptt import checks
from torch_bptt._flow import STEEPEST, activation_of, alpha_of, label, watched
from torch_bptt.functional import rnn as run_layer
from torch_bptt.reference import activations
from torch_bptt.rnn import RNN


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """The recurrent matrix of one layer in one direction.

    Attributes:
        module, layer, reverse: whose it is; see ``LayerFlow``.
        eigenvalues: (H,) complex, of W_hh, the largest first.
        spectral_radius: the largest modulus of an eigenvalue.
        sigma_max: the largest singular value of W_hh.
        bound: what a step can at most do to the length of any gradient,
            max(1-a) + sup|f'| sigma_max(diag(a) W_hh), with one alpha 1 - a + a sup|f'| sigma_max.
            Below 1 the gradient vanishes, whatever the input is. Above 1 it says nothing.
        All of them are NaN where W_hh is not finite.
    """

    module: str
    layer: int
    reverse: bool
    eigenvalues: Tensor = field(repr=False)
    spectral_radius: float
    sigma_max: float
    bound: float

    @property
    def label(self) -> str:
        """A name for people: 'rnn, layer 0'."""
        return label(self.module, self.layer, self.reverse)


class Weights(list):
    """What ``weights`` found: a list of ``LayerWeights``."""

    def plot(self, ax=None):
        """The eigenvalues of every W_hh in the complex plane, and the unit circle.

        Arguments:
            ax: matplotlib Axes to draw on; None makes a figure.
        Returns:
            The Axes.
        Raises:
            ModuleNotFoundError: there is no matplotlib.
        """
        from torch_bptt import _plots

        return _plots.eigenvalues(self, ax)


def weights(model: nn.Module) -> Weights:
    """Spectral radius and largest singular value of every W_hh in ``model``, as they are now.

    With a nonlinearity the spectral radius decides nothing, and without one it decides only what
    happens after very many steps: [[.9, 10], [0, .9]] has radius 0.9, and its 10th power stretches
    a vector 38.7-fold. What holds is ``bound``. See ``jacobian_spectrum`` for what happens on the
    data.

    Arguments:
        model: a torch.nn.Module that is or contains torch_bptt.RNN.
    Returns:
        One ``LayerWeights`` for each layer and direction, computed in float64. It takes time in
        proportion to H^3: seconds for H above 1000.
    Raises:
        TypeError, ValueError: there is no torch_bptt.RNN in model.
    Example:
        >>> from torch_bptt import RNN
        >>> model = RNN(3, 16)
        >>> _ = torch.nn.init.orthogonal_(model.weight_hh_l0)
        >>> print(f"{weights(model)[0].spectral_radius:.3f}")
        1.000

    Source:
        Pascanu, Mikolov and Bengio (2013), On the difficulty of training recurrent neural networks.
    """
    found = Weights()
    for name, module in watched(model, "weights").items():
        for index, (layer, reverse) in enumerate(_layers(module)):
            weight = _parameters(module, layer, reverse)[1].cpu()
            alpha, steepest = alpha_of(module, index).cpu(), STEEPEST[activation_of(module)]
            if not weight.isfinite().all():
                nothing = torch.full((len(weight),), complex(math.nan, math.nan), device="cpu")
                found.append(LayerWeights(name, layer, reverse, nothing, *(math.nan,) * 3))
                continue
            eigenvalues = torch.linalg.eigvals(weight)
            order = eigenvalues.abs().sort(descending=True, stable=True).indices
            sigma_max = torch.linalg.matrix_norm(weight, 2)
            driven = torch.linalg.matrix_norm(alpha.expand(len(weight))[:, None] * weight, 2)
            bound = (1 - alpha).max() + steepest * driven
            found.append(
                LayerWeights(
                    name, layer, reverse, eigenvalues[order],
                    eigenvalues.abs().max().item(), sigma_max.item(), bound.item(),
                )
            )  # fmt: skip
    return found


@dataclass(frozen=True, eq=False)
class LayerSpectrum:
    """One layer in one direction, other layers and directions held where they are.

    Attributes:
        layer, reverse: which.
        window: k, the steps in a product.
        log_singular_values: (T // k, B, H), natural logarithms of the singular values of
            J_{s+k-1} ... J_s for s = 0, k, 2k, ... in the order of processing, the largest first.
            -inf where the singular value is zero, or below H 2.2e-16 of the largest, where float64
            does not tell it from zero.
        lyapunov: (B, n), the n largest Lyapunov exponents per step, the largest first: the mean
            growth of the logarithms of the axes of a small ball. -inf where a step flattens an
            axis: to zero, or below H 2.2e-16 of the longest.
    """

    layer: int
    reverse: bool
    window: int
    log_singular_values: Tensor = field(repr=False)
    lyapunov: Tensor = field(repr=False)

    @property
    def label(self) -> str:
        """A name for people: 'layer 0 reverse'."""
        return label("", self.layer, self.reverse)

    @property
    def singular_values(self) -> Tensor:
        """(T // k, B, H): how much a gradient can grow in a window, at most [..., 0]."""
        return self.log_singular_values.exp()

    @property
    def rates(self) -> Tensor:
        """(T // k, B, H): the k-th roots of the singular values, growth per step."""
        return (self.log_singular_values / self.window).exp()


class JacobianSpectrum(list):
    """What ``jacobian_spectrum`` found: a list of ``LayerSpectrum``."""

    def plot(self, ax=None, label: str | None = None):
        """Singular values as growth per step: medians over windows and rows, and their range.

        Arguments:
            ax: matplotlib Axes to draw on; None makes a figure.
            label: for the legend, instead of the names of the layers.
        Returns:
            The Axes.
        Raises:
            ModuleNotFoundError: there is no matplotlib.
        """
        from torch_bptt import _plots

        return _plots.jacobian_spectrum(self, ax, label)


@torch.no_grad()
def jacobian_spectrum(
    rnn: RNN,
    input: Tensor,
    hx: Tensor | None = None,
    *,
    window: int | None = None,
    exponents: int = 1,
    skip: int = 0,
) -> JacobianSpectrum:
    """What the steps of ``rnn`` do to the length of a gradient, direction by direction.

    For each layer and direction, with J_t = dh_t/dh_{t-1} along the states that the network goes
    through on input: singular values of the products of J_t over windows of steps, and the largest
    Lyapunov exponents. The Jacobian of a stack of layers that all run forward is block triangular
    with these J_t on its diagonal: its exponents are those of its layers together.

    The network runs in float64, whatever the dtype of its parameters, and as in evaluation: without
    dropout, noise, truncation and clipping. It takes a Python loop over the k steps of a window,
    with products of H x H matrices for all T/k windows and B rows at once, and one over the T steps
    for the exponents: meant for H up to a few hundred, and few rows.

    Arguments:
        rnn: a torch_bptt.RNN, of any floating dtype.
        input: (T, B, I), (B, T, I) with batch_first, or (T, I), of the dtype of rnn or any other
            floating one.
        hx: as for rnn; None means zeros, or what rnn has learned.
        window: k, from 1 to T; None means T. Steps after the last whole window are left out.
        exponents: how many Lyapunov exponents, n, from 1 to H.
        skip: steps, less than T, that turn the axes but do not count for the exponents.
    Returns:
        One ``LayerSpectrum`` for each layer and direction, on the CPU.
    Raises:
        TypeError, ValueError: an argument does not fit.
        RuntimeError: input and hx do not fit, in the words of the RNN; a state is not finite.
    Example:
        >>> model = RNN(3, 16)
        >>> layer = jacobian_spectrum(model, torch.randn(50, 4, 3), window=10, exponents=2)[0]
        >>> layer.singular_values.shape, layer.lyapunov.shape
        (torch.Size([5, 4, 16]), torch.Size([4, 2]))

    Source:
        Benettin, Galgani, Giorgilli and Strelcyn (1980), Lyapunov characteristic exponents for
        smooth dynamical systems and for Hamiltonian systems; Vogt, Puelma Touzel, Shlizerman and
        Lajoie (2022), On Lyapunov exponents for RNNs.
    """
    x, states = _time_major(rnn, input, hx)
    window = len(x) if window is None else window
    for name, value, low, high in (
        ("window", window, 1, len(x)),
        ("exponents", exponents, 1, rnn.hidden_size),
        ("skip", skip, 0, len(x) - 1),
    ):
        _check_int(name, value, low, high)

    found, outputs = JacobianSpectrum(), []
    for index, (layer, reverse) in enumerate(_layers(rnn)):
        weight_ih, weight_hh, bias_ih, bias_hh = _parameters(rnn, layer, reverse)
        activation, alpha = activation_of(rnn), alpha_of(rnn, index)
        weights = weight_ih, weight_hh, bias_ih, bias_hh
        output, gate = _run(x, states[index], weights, activation, alpha, reverse)
        bad = (~output.isfinite()).nonzero()
        if len(bad):
            raise RuntimeError(
                "jacobian_spectrum: every state must be finite, got "
                f"{output[tuple(bad[0])].item()} in {label('', layer, reverse)} at step {bad[0, 0]}"
            )
        found.append(
            LayerSpectrum(
                layer, reverse, window,
                _log_singular_values(gate, weight_hh, alpha, window).cpu(),
                _lyapunov(gate, weight_hh, alpha, exponents, skip).cpu(),
            )
        )  # fmt: skip
        outputs.append(output)
        if len(outputs) == (2 if rnn.bidirectional else 1):
            x, outputs = torch.cat(outputs, -1), []
    return found


def _layers(module):
    """(layer, reverse) in the order of hx."""
    directions = (False, True) if module.bidirectional else (False,)
    return [(layer, reverse) for layer in range(module.num_layers) for reverse in directions]


def _parameters(module, layer, reverse):
    """weight_ih, weight_hh and the biases, or None for these, in float64."""
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    ending = f"_l{layer}{'_reverse' if reverse else ''}"
    named = [getattr(module, name + ending, None) for name in names]
    return [None if tensor is None else tensor.detach().double() for tensor in named]


def _time_major(rnn, input, hx):
    """input as (T, B, I) and hx as (L * D, B, H), in float64; zeros where hx is None."""
    if not isinstance(rnn, RNN):
        advice = ": RNN.from_torch(rnn) converts it" if isinstance(rnn, nn.RNN) else ""
        raise TypeError(
            "jacobian_spectrum: rnn must be a torch_bptt.RNN, "
            f"got {type(rnn).__module__}.{type(rnn).__name__}{advice}"
        )
    if not isinstance(input, Tensor) or not input.is_floating_point():
        got = input.dtype if isinstance(input, Tensor) else type(input).__name__
        raise TypeError(f"jacobian_spectrum: input must be a tensor of a floating dtype, got {got}")
    input = input.double()
    first = rnn.weight_ih_l0.new_empty((), dtype=torch.float64)
    rows = checks.check_input(input, first, rnn.input_size, rnn.batch_first)
    if input.shape[1 if input.dim() == 3 and rnn.batch_first else 0] == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    size = len(_layers(rnn)), rows, rnn.hidden_size
    if hx is None:
        hx = rnn.h0.double()[:, None].expand(size) if rnn.learn_h0 else input.new_zeros(size)
    else:
        checks.check_stacked_hidden(input, hx, size)
        hx = hx.double().reshape(size)
    if input.dim() == 2:
        return input.unsqueeze(1), hx
    return input.transpose(0, 1) if rnn.batch_first else input, hx


def _check_int(name, value, low, high):
    expected = f"jacobian_spectrum: {name} must be an int from {low} to {high}"
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{expected}, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{expected}, got {value}")


def _run(x, h0, weights, activation, alpha, reverse):
    """Every h_t, (T, B, H) with time upward, and G_t, (T, B, H) in the order of processing."""
    weight_ih, weight_hh, bias_ih, bias_hh = weights
    leak = alpha.item() if alpha.dim() == 0 else alpha
    output, _ = run_layer(x, h0, *weights, nonlinearity=activation, alpha=leak, reverse=reverse)
    p = torch.cat((output[1:], h0[None]) if reverse else (h0[None], output[:-1]))
    z = x @ weight_ih.T + p @ weight_hh.T
    for bias in (bias_ih, bias_hh):
        z = z if bias is None else z + bias
    value, slope = activations[activation]
    gate = alpha * slope(value(z))
    return output, gate.flip(0) if reverse else gate


def _log_singular_values(gate, weight, alpha, window):
    """(T // k, B, H): all windows and rows advance together, one step at a time."""
    steps, rows, size = gate.shape
    count = steps // window
    gates = gate[: count * window].view(count, window, rows, size)
    product = torch.eye(size, dtype=gate.dtype, device=gate.device).expand(count, rows, size, size)
    scale = gate.new_zeros(count, rows)
    for step in range(window):
        product = _step(gates[:, step], weight, alpha, product)
        # Divided by its largest entry, so that long products neither overflow nor vanish.
        largest = product.abs().amax((-2, -1))
        scale = scale + largest.log()
        product = product / torch.where(largest > 0, largest, 1)[..., None, None]
    values = torch.linalg.svdvals(product)
    told = values > size * torch.finfo(values.dtype).eps * values[..., :1]
    return torch.where(told, values.log() + scale[..., None], -math.inf)


def _lyapunov(gate, weight, alpha, count, skip):
    """(B, n): follow n orthogonal axes, orthogonalised at every step, and add up their growth."""
    steps, rows, size = gate.shape
    resolution = size * torch.finfo(gate.dtype).eps
    # Any axes will do but those that a matrix may map to themselves, such as those of the units.
    random = torch.Generator().manual_seed(0)
    start = torch.randn(size, count, generator=random, dtype=gate.dtype, device="cpu")
    axes = torch.linalg.qr(start).Q.to(gate.device).expand(rows, size, count)
    total = gate.new_zeros(rows, count)
    for step in range(steps):
        axes, triangle = torch.linalg.qr(_step(gate[step], weight, alpha, axes))
        if step >= skip:
            growth = triangle.diagonal(dim1=-2, dim2=-1).abs()
            lost = growth < resolution * growth.amax(-1, keepdim=True)
            total = total + torch.where(lost, 0, growth).log()
    return (total / (steps - skip)).sort(descending=True).values


def _step(gate, weight, alpha, columns):
    """J_t times columns, (..., H, n), for gates (..., H)."""
    stay = (1 - alpha)[..., None]
    return stay * columns + gate[..., None] * (weight @ columns)
