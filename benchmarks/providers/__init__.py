"""The implementations that are compared, by name; each is a `torch_bptt.bench.Provider`.

To add one, write a file beside this one and list it here. What it needs beyond torch it imports in
`prepare`, so that the others run where it is not installed. It runs in the threads that torch was
told to use.
"""

import torch
from torch import nn

from providers.compiled import Compiled
from providers.jax_scan import JaxScan
from providers.onednn import OneDNN
from providers.onnx_runtime import OnnxRuntime
from torch_bptt.bench import BASELINE, OURS, ModuleProvider

CUDNN_VERSION = f"{torch.__version__}, cuDNN {torch.backends.cudnn.version()}"
CUDNN = ModuleProvider("cuDNN", nn.RNN, CUDNN_VERSION, device="cuda")

PROVIDERS = {
    provider.name: provider
    for provider in (BASELINE, CUDNN, OURS, OneDNN(), JaxScan(), OnnxRuntime(), Compiled())
}
# What a run takes that was not told; torch.compile needs minutes for each case.
DEFAULT = [name for name in PROVIDERS if name != "torch.compile"]
