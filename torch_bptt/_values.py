"""Values of tensors that say how long sequences are, which the transforms of torch.func wrap."""

import torch
from torch import Tensor
from torch._C import _functorch


def number(tensor: Tensor) -> int:
    """The one integer in tensor, as a constant: int() would be refused by torch.func.linearize."""
    if torch.compiler.is_compiling() or torch._is_functional_tensor(tensor) or are_mapped(tensor):
        return int(tensor)
    return unwrapped(tensor).tolist()


def are_mapped(lengths: object) -> bool:
    """Whether torch.func.vmap gives each sample lengths of its own."""
    if torch.compiler.is_compiling():  # which takes no transforms, and cannot see through these
        return False
    while isinstance(lengths, Tensor) and _functorch.is_functorch_wrapped_tensor(lengths):
        if _functorch.is_batchedtensor(lengths):
            return True
        lengths = _functorch.get_unwrapped(lengths)
    return False


def unwrapped(tensor: Tensor) -> Tensor:
    """What lies under all transforms; where it is mapped over with dimensions more."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor
