"""torch_bptt: torch.nn.RNN with fused backpropagation through time. Change one import."""

from torch_bptt import functional, init, reference
from torch_bptt.convert import convert
from torch_bptt.rnn import RNN, RNNCell

__version__ = "0.1.0"
__all__ = ["RNN", "RNNCell", "__version__", "convert", "functional", "init", "reference"]
