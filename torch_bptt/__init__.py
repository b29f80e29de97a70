"""torch_bptt: torch.nn.RNN with fused backpropagation through time. Change one import."""

import torch_bptt._flops  # noqa: F401  what the operators count for
from torch_bptt import diagnose, functional, init, reference, rtrl
from torch_bptt.convert import convert
from torch_bptt.elman import ElmanNetwork
from torch_bptt.rnn import RNN, RNNCell
from torch_bptt.tbptt import tbptt

__version__ = "0.1.0"
__all__ = [
    "RNN", "ElmanNetwork", "RNNCell", "__version__", "convert", "diagnose", "functional",
    "init", "reference", "rtrl", "tbptt",
]  # fmt: skip
