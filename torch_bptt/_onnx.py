"""One layer as an ONNX operator, RNN: what ``autograd.rnn_layer`` is inside torch.onnx.export."""

import torch
from torch import Tensor

_activations = {"tanh": "Tanh", "relu": "Relu", "sigmoid": "Sigmoid", "identity": "Affine"}


@torch.compiler.assume_constant_result  # torch.compile takes is_in_onnx_export for False
def exporting() -> bool:
    return torch.onnx.is_in_onnx_export()


def rnn_layer(
    x, h0, weight_ih, weight_hh, bias_ih, bias_hh, batch_sizes, keep, options, alpha=None,
    restart=None, mask=None, noise=None, probe=None,
):  # fmt: skip
    """Arguments and results of ``autograd.rnn_layer``; options about gradients have no part.

    Raises:
        NotImplementedError: ONNX cannot say it; the message names the argument.
    """
    _refuse("input must not be a PackedSequence", batch_sizes)
    _refuse("reset and lengths must be None", keep)
    _refuse("alpha must be 1", alpha)
    _refuse("recurrent_dropout must be 0, or the model in eval mode,", mask)
    _refuse("noise must be 0, or the model in eval mode,", noise)
    rows, state = (x, h0) if x.dim() == 3 else (x[None], None if h0 is None else h0[None])
    steps, batch, _ = rows.shape
    hidden = weight_hh.shape[0]
    biases = [weight_hh.new_zeros(hidden) if bias is None else bias for bias in (bias_ih, bias_hh)]
    output, h_n = torch.onnx.ops.symbolic_multi_out(
        "::RNN",
        (rows, weight_ih[None], weight_hh[None], torch.cat(biases)[None], None, state),
        {
            "hidden_size": hidden,
            "direction": "reverse" if options.reverse else "forward",
            "activations": [_activations[options.activation]],
            "activation_alpha": [1.0],  # of Affine, alpha z + beta; the others have no such numbers
            "activation_beta": [0.0],
        },
        dtypes=(x.dtype, x.dtype),
        shapes=((steps, 1, batch, hidden), (1, batch, hidden)),
    )
    output = output.squeeze(1)
    return (output, h_n) if x.dim() == 3 else (output.squeeze(0), h_n.squeeze(0))


def _refuse(expected: str, given: Tensor | None) -> None:
    if given is not None:
        raise NotImplementedError(
            f"torch.onnx.export: {expected} as ONNX's operator RNN knows nothing else"
        )
