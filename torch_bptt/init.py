"""Initial recurrent weights that carry the gradient over many steps.

From step t back to t - 1 the gradient of the state is multiplied by f'(z_t) W_hh. As torch.nn.RNN
draws W_hh, with a spectral radius of about 1/sqrt(3) = 0.58, the gradient loses a factor of a
million in 25 steps. The two matrices here lose nothing. Both functions write

    W_hh of every layer and direction,    b_ih = b_hh = 0,

in place and outside autograd, as torch.nn.init does, and touch nothing else: W_ih stays as it was
drawn, and so do other parameters. The biases are part of it because a recurrence that forgets
nothing adds a constant up, step by step, until it drowns the input.
"""

import math
import numbers

import torch
from torch import Tensor, nn

from torch_bptt import checks
from torch_bptt.rnn import RNN, RNNCell

__all__ = ["identity_", "orthogonal_"]


@torch.no_grad()
def orthogonal_(
    rnn: nn.Module, gain: float = 1.0, generator: torch.Generator | None = None
) -> nn.Module:
    """Make every W_hh ``gain`` times a random orthogonal matrix, and every bias zero.

        W_hh^T W_hh = gain^2 * identity    b_ih = b_hh = 0

    All singular values are ``gain``: with gain = 1 the product with W_hh changes no length, and a
    gradient shrinks by the slopes f'(z) alone. Those of tanh and identity are 1 at z = 0. relu
    stops the gradient of about every other unit; sqrt(2) makes up for that on average, but for some
    draws the state then grows exponentially with T. With alpha < 1 the matrix that counts,
    (1 - alpha) + alpha f'(z) W_hh, is not orthogonal.

    Each matrix is drawn as ``torch.nn.init.orthogonal_(weight_hh, gain)`` draws it, in the order of
    the parameters.

    Arguments:
        rnn: torch_bptt.RNN, torch_bptt.RNNCell, torch.nn.RNN or torch.nn.RNNCell, or of a class
            derived from one of them.
        gain: the length of every row and column of W_hh, any finite number.
        generator: source of the random numbers; None means PyTorch's default generator.
    Returns:
        rnn itself.
    Raises:
        TypeError: rnn or gain is something else.
        ValueError: gain is not finite; or a W_hh or bias is not a plain parameter, because it is
            parametrized or pruned. rnn is then as it was.
    Example:
        >>> rnn = orthogonal_(RNN(2, 50, num_layers=2))
        >>> product = rnn.weight_hh_l1.T @ rnn.weight_hh_l1
        >>> torch.allclose(product, torch.eye(50), atol=1e-5)
        True

    Source:
        Saxe, McClelland and Ganguli (2014), Exact solutions to the nonlinear dynamics of learning
        in deep linear neural networks.
    """
    checks.check_number("orthogonal_", "gain", gain, numbers.Real, "a finite number", math.isfinite)
    for weight in _without_biases("orthogonal_", rnn):
        # The QR decomposition behind it knows no 16-bit numbers.
        drawn = torch.empty_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        weight.copy_(nn.init.orthogonal_(drawn, gain, generator))
    return rnn


@torch.no_grad()
def identity_(rnn: nn.Module, scale: float = 1.0) -> nn.Module:
    """Make every W_hh ``scale`` times the identity, and every bias zero: with relu, an IRNN.

        W_hh = scale * identity    b_ih = b_hh = 0

    With relu and scale = 1 a unit keeps what it has and adds what comes in, and the gradient of a
    unit that is on goes back unchanged, with any alpha. A scale in (0, 1) forgets: without input a
    relu unit then decays with a time constant of -1 / ln(scale) steps (for alpha = 1).

    The paper also draws W_ih from a narrow Gaussian; that is one line more,
    ``torch.nn.init.normal_(rnn.weight_ih_l0, std=0.001)``.

    Arguments:
        rnn: as ``orthogonal_`` has it.
        scale: the diagonal of W_hh, any finite number.
    Returns:
        rnn itself.
    Raises:
        TypeError: rnn or scale is something else.
        ValueError: scale is not finite; or a W_hh or bias is not a plain parameter, because it is
            parametrized or pruned. rnn is then as it was.
    Example:
        >>> rnn = identity_(RNN(2, 3, nonlinearity="relu"))
        >>> rnn.weight_hh_l0.tolist(), rnn.bias_hh_l0.tolist()
        ([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], [0.0, 0.0, 0.0])

    Source:
        Le, Jaitly and Hinton (2015), A simple way to initialize recurrent networks of rectified
        linear units.
    """
    checks.check_number("identity_", "scale", scale, numbers.Real, "a finite number", math.isfinite)
    for weight in _without_biases("identity_", rnn):
        nn.init.eye_(weight).mul_(scale)
    return rnn


def _without_biases(operation: str, rnn: nn.Module) -> list[Tensor]:
    """Make the biases of all layers and directions zero, if all is well; return every W_hh."""
    if not isinstance(rnn, (RNN, RNNCell, nn.RNN, nn.RNNCell)):
        raise TypeError(
            f"{operation}: rnn must be an RNN or RNNCell of torch_bptt or torch.nn, "
            f"got {type(rnn).__name__}"
        )
    cell = [["weight_hh", "bias_ih", "bias_hh"] if rnn.bias else ["weight_hh"]]
    names = [name for layer in getattr(rnn, "_all_weights", cell) for name in layer]
    recurrent, biases = (
        [_plain(operation, rnn, name) for name in names if name.startswith(kind)]
        for kind in ("weight_hh", "bias")
    )
    for bias in biases:
        bias.zero_()
    return recurrent


def _plain(operation, rnn, name):
    if name not in rnn._parameters:
        raise ValueError(
            f"{operation}: {name} must be a plain parameter, got one that is parametrized or "
            f"pruned: call {operation} first, parametrize or prune after it"
        )
    return rnn._parameters[name]
