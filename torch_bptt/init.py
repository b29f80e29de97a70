"""Initial recurrent weights that carry the gradient over many steps.

Back from step t to step t - 1 the gradient of the state is multiplied by f'(z_t) W_hh. torch.nn.RNN
draws W_hh so that this shrinks it at every step, by a factor of about 0.6 at best, and what lies
50 steps back is not heard any more. Here are the two cures that need no other network, only another
W_hh. As in torch.nn.init, the functions work in place, outside autograd, and return what they are
given.
"""

import math
import numbers

import torch
from torch import Tensor, nn

from torch_bptt.rnn import RNN, RNNCell

INPUT_STD = 0.001  # of W_ih in an IRNN: Le, Jaitly and Hinton (2015), section 4


@torch.no_grad()
def orthogonal_(
    rnn: nn.Module, gain: float = 1.0, generator: torch.Generator | None = None
) -> nn.Module:
    """Make W_hh of every layer and direction ``gain`` times a random orthogonal matrix.

        W_hh^T W_hh = gain^2 * identity

    Every singular value is then ``gain``: the product with W_hh changes no length (gain = 1), and
    the gradient shrinks by the slope f'(z) alone. Only W_hh is touched; each is drawn like
    ``torch.nn.init.orthogonal_(weight_hh)``, in the order of the layers.

    Arguments:
        rnn: torch_bptt.RNN, torch_bptt.RNNCell, torch.nn.RNN or torch.nn.RNNCell, or of a class
            derived from one of them.
        gain: the length of every row and column of W_hh, any finite number.
        generator: source of the random numbers; None means PyTorch's default generator.
    Returns:
        rnn itself.
    Raises:
        TypeError: rnn or gain is something else.
        ValueError: gain is not finite; or a W_hh is not a plain parameter, because it is
            parametrized or pruned.
    Example:
        >>> rnn = orthogonal_(RNN(2, 50, num_layers=2))
        >>> product = rnn.weight_hh_l1.T @ rnn.weight_hh_l1
        >>> torch.allclose(product, torch.eye(50), atol=1e-5)
        True

    Source:
        Saxe, McClelland and Ganguli (2014), Exact solutions to the nonlinear dynamics of learning
        in deep linear neural networks.
    """
    _check_number("orthogonal_", "gain", gain)
    for weight in _parameters("orthogonal_", rnn, "weight_hh"):
        # The QR decomposition behind it knows no 16-bit numbers.
        drawn = torch.empty_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        weight.copy_(nn.init.orthogonal_(drawn, gain, generator))
    return rnn


@torch.no_grad()
def identity_(
    rnn: nn.Module, scale: float = 1.0, generator: torch.Generator | None = None
) -> nn.Module:
    """Make an IRNN: W_hh of every layer and direction is ``scale`` times the identity.

        W_hh = scale * identity    b_ih = b_hh = 0    W_ih ~ N(0, 0.001^2)

    With relu, which the paper means it for, and scale = 1 a unit keeps what it has and adds what
    comes in, and the gradient of an active unit goes back unchanged. A scale below 1 forgets: a
    unit has the time constant -1 / ln(scale) steps. The whole recipe of the paper is carried out,
    on W_hh, W_ih and, where there are any, the biases of every layer; to keep other input weights
    or biases, assign them afterwards.

    Arguments:
        rnn: as ``orthogonal_`` has it.
        scale: the diagonal of W_hh, any finite number.
        generator: source of the random numbers in W_ih; None means PyTorch's default generator.
    Returns:
        rnn itself.
    Raises:
        TypeError: rnn or scale is something else.
        ValueError: scale is not finite; or a weight or bias is not a plain parameter, because it
            is parametrized or pruned.
    Example:
        >>> rnn = identity_(RNN(2, 3, nonlinearity="relu"))
        >>> rnn.weight_hh_l0.tolist(), rnn.bias_hh_l0.tolist()
        ([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], [0.0, 0.0, 0.0])

    Source:
        Le, Jaitly and Hinton (2015), A simple way to initialize recurrent networks of rectified
        linear units.
    """
    _check_number("identity_", "scale", scale)
    # All are looked up before the first is changed: an error leaves rnn as it was.
    recurrent, inputs, biases = (
        _parameters("identity_", rnn, kind) for kind in ("weight_hh", "weight_ih", "bias")
    )
    for weight in recurrent:
        weight.copy_(torch.eye(len(weight)).mul_(scale))
    for weight in inputs:
        weight.normal_(0, INPUT_STD, generator=generator)
    for bias in biases:
        bias.zero_()
    return rnn


def _check_number(operation: str, name: str, value: object) -> None:
    expected = f"{operation}: {name} must be a finite number, got {value!r}"
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(expected)
    if not math.isfinite(value):
        raise ValueError(expected)


def _parameters(operation: str, rnn: nn.Module, kind: str) -> list[Tensor]:
    """The parameters of all layers and directions whose names begin with ``kind``."""
    if not isinstance(rnn, (RNN, RNNCell, nn.RNN, nn.RNNCell)):
        raise TypeError(
            f"{operation}: rnn must be an RNN or RNNCell of torch_bptt or torch.nn, "
            f"got {type(rnn).__name__}"
        )
    cell = [["weight_ih", "weight_hh", "bias_ih", "bias_hh"]]
    names = [name for layer in getattr(rnn, "_all_weights", cell) for name in layer]
    found = []
    for name in names:
        if name.startswith(kind):
            if name not in rnn._parameters:
                raise ValueError(
                    f"{operation}: {name} must be a plain parameter, got one that is parametrized "
                    f"or pruned: call {operation} first, parametrize or prune after it"
                )
            found.append(rnn._parameters[name])
    return [parameter for parameter in found if parameter is not None]
