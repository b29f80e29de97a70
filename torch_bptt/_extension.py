"""Loads the compiled part, or says why it does not load.

Importing this module registers ``torch.ops.torch_bptt.*`` and leaves the facts about the build in
``_C``.
"""

import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

BUILD = "pip install --no-build-isolation .   (or, in a clone: python setup.py build_ext --inplace)"


def explain(error: BaseException, folder: Path = Path(__file__).parent) -> str:
    """Why ``_C`` did not load: the versions seen, then the likely causes in order, then the cure.

    Arguments:
        error: what importing it raised.
        folder: where the compiled file should be.
    """
    found = sorted(path.name for path in folder.glob("_C.*") if path.suffix in (".so", ".dylib"))
    fitting = [name for name in found if name.removeprefix("_C") in EXTENSION_SUFFIXES]
    if not found:
        cause = "it was not built: there is no compiled _C here"
    elif not fitting:
        cause = f"it was built for another Python: this one looks for _C{EXTENSION_SUFFIXES[0]}"
    else:
        cause = (
            f"it was built against another version of torch than {torch.__version__} "
            "or with another C++ ABI; or a library it needs is missing"
        )
    return (
        "torch_bptt: the compiled extension torch_bptt._C does not load.\n"
        f"  error:   {error}\n"
        f"  python:  {sys.version.split()[0]} at {sys.executable}\n"
        f"  torch:   {torch.__version__}\n"
        f"  folder:  {folder}, with {', '.join(found) or 'no compiled file'}\n"
        f"  Likely:  {cause}\n"
        f"  Cure:    build it with this Python and this torch: {BUILD}"
    )


try:
    import torch_bptt._C as _C
except ImportError as error:
    raise ImportError(explain(error)) from error

__all__ = ["_C"]
