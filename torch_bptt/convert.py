"""convert: every torch.nn.RNN and torch.nn.RNNCell inside a model, replaced."""

from torch import nn

from torch_bptt.rnn import RNN, RNNCell, plain_class

replacements = {nn.RNN: RNN, nn.RNNCell: RNNCell}


def convert(model: nn.Module) -> nn.Module:
    """Replace every torch.nn.RNN and torch.nn.RNNCell inside ``model`` by ours, in place.

    Parameters, buffers and hooks are shared (see ``RNN.from_torch``): an optimizer made before
    stays valid, and a checkpoint fits before and after. A module used in several places is replaced
    by one module in all of them. Classes derived from torch.nn.RNN or torch.nn.RNNCell are left
    alone, since their forward may be different; so are modules that the model does not own as
    submodules (in a plain list, for example).

    Arguments:
        model: any torch.nn.Module.
    Returns:
        model; or, if model itself is a torch.nn.RNN or torch.nn.RNNCell, the module that replaces
        it.
    Raises:
        TypeError: model is not a torch.nn.Module.
        ValueError: what torch.compile returned for one of them is in model: it would run it still.
    Example:
        >>> model = convert(nn.Sequential(nn.RNN(3, 4)))
        >>> type(model[0]).__module__
        'torch_bptt.rnn'
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert: model must be a torch.nn.Module, got {type(model).__name__}")
    converted = {}

    def replace(module):
        ours = replacements.get(plain_class(module))
        if ours is not None and module not in converted:
            converted[module] = ours.from_torch(module)
        return converted.get(module, module)

    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is None:
                continue
            if type(parent).__name__ == "OptimizedModule" and plain_class(child) in replacements:
                raise ValueError(
                    "convert: model must be converted before it is compiled, got a "
                    f"{type(child).__name__} in what torch.compile returned"
                )
            parent._modules[name] = replace(child)
    return replace(model)
