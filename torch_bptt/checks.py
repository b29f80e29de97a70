"""Checks of arguments, and the words for them: argument, what was expected, what came.

Where torch.nn.RNN has a message for the same mistake, type and words are torch.nn.RNN's.
"""

import math
import numbers

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx._symbolic_trace import is_fx_symbolic_tracing
from torch.nn.utils.rnn import PackedSequence

from torch_bptt._extension import _C
from torch_bptt._values import are_mapped, number, unwrapped

nonlinearities = tuple(_C.activations())


def check_alike(input, hx, weight_ih, weight_hh, bias_ih, bias_hh):
    """One device, one dtype, and biases that do not broadcast; other shapes the operator checks."""
    device, dtype = input.device, input.dtype
    for tensor in (hx, weight_ih, weight_hh, bias_ih, bias_hh):
        if tensor is not None and (tensor.dtype is not dtype or tensor.device != device):
            _explain_unlike(locals())
    if bias_ih is not None and bias_hh is not None and bias_ih.shape != bias_hh.shape:
        raise RuntimeError(
            "bias_ih and bias_hh must have the same shape, expected that of one row of "
            f"weight_hh, got {tuple(bias_ih.shape)} and {tuple(bias_hh.shape)}"
        )


def _explain_unlike(tensors):
    """tensors by name, of which some may be None: which two do not go together, devices first."""
    device, dtype = tensors["input"].device, tensors["input"].dtype
    names = ("hx", "weight_ih", "weight_hh", "bias_ih", "bias_hh")
    others = [(name, tensors[name]) for name in names if tensors[name] is not None]
    for name, tensor in others:
        if tensor.device != device:
            kind = "hidden" if name == "hx" else "parameter"
            raise RuntimeError(
                f"Input and {kind} tensors are not at the same device, "
                f"found input tensor at {device} and {kind} tensor at {tensor.device} ({name})"
            )
    for name, tensor in others:
        if tensor.dtype != dtype:
            raise RuntimeError(
                f"input and {name} must have the same dtype, but got {dtype} and {tensor.dtype}"
            )


def check_input(input, weight_ih, input_size, batch_first, hx=None):
    """Dimensions, dtype and features of input; returns its number of rows, 1 for one sequence."""
    packed = isinstance(input, PackedSequence)
    data = input.data if packed else input
    dims = data.dim()
    if not packed and dims not in (2, 3):
        raise ValueError(f"RNN: Expected input to be 2D or 3D, got {dims}D tensor instead")
    if data.dtype != weight_ih.dtype and not torch._C._is_any_autocast_enabled():
        raise ValueError(
            f"RNN input dtype ({data.dtype}) does not match weight dtype ({weight_ih.dtype}). "
            f"Convert input: input.to({weight_ih.dtype}), "
            f"or convert model: model.to({data.dtype})"
        )
    if packed and dims != 2:
        raise RuntimeError(f"input must have 2 dimensions, got {dims}")
    if data.shape[-1] != input_size:
        raise RuntimeError(
            "input.size(-1) must be equal to input_size. "
            f"Expected {input_size}, got {data.shape[-1]}"
        )
    if packed:
        return count_rows(input, hx)
    return 1 if dims == 2 else data.shape[0 if batch_first else 1]


def count_rows(packed, hx=None, reset=None):
    """The sequences of a PackedSequence.

    Where torch traces the program it knows no values, so shapes have to say it; where they are
    those of hx or reset, the operator checks them when it runs.
    """
    if torch.compiler.is_compiling():
        for tensor, rows in ((packed.sorted_indices, 0), (hx, -2), (reset, -1)):
            if tensor is not None:
                return tensor.shape[rows]
    return number(packed.batch_sizes[0])


def check_hidden(hx, expected):
    """hx of ``rnn`` and of ``RNN``."""
    if hx.shape != expected:
        raise RuntimeError(f"Expected hidden size {expected}, got {list(hx.shape)}")


def check_stacked_hidden(input, hx, expected):
    """hx of ``RNN``: expected is (L*D, B, H), and for one sequence hx is (L*D, H)."""
    if not isinstance(input, PackedSequence):
        if hx.dim() != input.dim():
            kind = "unbatched 2-D" if input.dim() == 2 else "batched 3-D"
            raise RuntimeError(
                f"For {kind} input, hx should also be {input.dim()}-D but got {hx.dim()}-D tensor"
            )
        hx = hx.unsqueeze(1) if hx.dim() == 2 else hx
    check_hidden(hx, expected)


def check_cell(input, hx, weight_ih, weight_hh, nonlinearity):
    """Everything about one step of ``RNNCell`` but dtypes and devices."""
    if input.dim() not in (1, 2):
        raise ValueError(f"RNNCell: Expected input to be 1D or 2D, got {input.dim()}D instead")
    if hx is not None and hx.dim() not in (1, 2):
        raise ValueError(f"RNNCell: Expected hidden to be 1D or 2D, got {hx.dim()}D instead")
    if nonlinearity not in nonlinearities:
        raise RuntimeError(f"Unknown nonlinearity: {nonlinearity}")
    if input.shape[-1] != weight_ih.shape[1]:
        raise RuntimeError(
            "input has inconsistent input_size: "
            f"got {input.shape[-1]} expected {weight_ih.shape[1]}"
        )
    if hx is None:
        return
    if input.dim() == 2 and input.shape[0] != hx.shape[0]:
        raise RuntimeError(
            f"Input batch size {input.shape[0]} doesn't match hidden0 batch size {hx.shape[0]}"
        )
    # As torch.nn.RNNCell counts: one dimension for the batch, whether hx has it or not.
    sizes = hx.shape[1:] if input.dim() == 2 else hx.shape
    if sizes != weight_hh.shape[1:]:
        got = sizes[0] if sizes[:1] != weight_hh.shape[1:] and sizes else tuple(hx.shape)
        raise RuntimeError(
            f"hidden0 has inconsistent hidden_size: got {got}, expected {weight_hh.shape[1]}"
        )


def check_choice(operation, name, value, choices):
    """value is one of choices, which are strings."""
    if value not in choices:
        expected = " or ".join(map(repr, choices))
        raise ValueError(f"{operation}: {name} must be {expected}, got {value!r}")


def check_count(operation, name, value):
    """value is an int of at least 1."""
    check_number(operation, name, value, numbers.Integral, "an int of at least 1", lambda n: n >= 1)


def check_reset(reset, shape, device):
    """reset against the steps and rows of input."""
    if not isinstance(reset, torch.Tensor):
        raise TypeError(f"reset must be a tensor, expected torch.bool, got {type(reset).__name__}")
    if reset.dtype != torch.bool:
        raise TypeError(f"reset must be a bool tensor, expected torch.bool, got {reset.dtype}")
    if reset.shape != torch.Size(shape):
        raise ValueError(
            "reset must have one entry per step and row, "
            f"expected {tuple(shape)}, got {tuple(reset.shape)}"
        )
    if reset.device != device:
        raise RuntimeError(
            f"reset must be on the device of input, expected {device}, got {reset.device}"
        )


def check_no_lengths(lengths):
    """lengths beside a PackedSequence."""
    if lengths is not None:
        raise ValueError(
            "lengths must be None when input is a PackedSequence, which has lengths of its own, "
            f"got {lengths!r}"
        )


def values_are_unknown(input):
    """Whether the program is noted rather than run, so that no shape may depend on a value."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or is_fx_symbolic_tracing()  # by make_fx, which torch.func.linearize uses
        or isinstance(input, FakeTensor)
    )


def check_lengths(lengths, steps, rows, device=None):
    """lengths as (B,) int64 on the CPU; one number will do for one row.

    Where values are unknown the caller gives a device: lengths go there, and are looked at when the
    program runs. Lengths that torch.func maps over stay where they are.
    """
    traced, mapped = device is not None, are_mapped(lengths)

    def expected():  # called where it is wanted, as a number in a string is a constant to a trace
        return f"lengths must be integers, one per row, expected ({rows},) torch.int64"

    try:
        given = torch.as_tensor(lengths, device=device if traced or mapped else "cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{expected()}, got {lengths!r}") from error
    fractional = given.is_floating_point() or given.is_complex() or given.dtype == torch.bool
    if given.numel() and fractional:  # an empty list is of torch's default dtype
        raise TypeError(f"{expected()}, got {given.dtype}")
    if given.shape != (rows,) and not (given.dim() == 0 and rows == 1):
        raise ValueError(f"{expected()}, got {tuple(given.shape)}")
    given = given.to(torch.int64).reshape(rows)
    if torch.jit.is_tracing():  # it drops an assertion, as nothing uses a result of it
        return torch.arange(steps + 1, device=given.device).index_select(0, given)
    if traced:
        message = "lengths must lie within the steps of input, expected 0 to the number of steps"
        torch._assert_async(((given >= 0) & (given <= steps)).all(), message)
        return given
    values = unwrapped(given) if mapped else given
    wrong = ((values < 0) | (values > steps)).nonzero()
    if len(wrong):
        place = tuple(wrong[0].tolist())
        row = "a row of a sample" if mapped else f"row {place[0]}"
        raise ValueError(
            "lengths must lie within the steps of input, "
            f"expected 0 to {steps}, got {values[place].tolist()} in {row}"
        )
    return given


def check_nonlinearity(name):
    """Raise torch.nn.RNN's ValueError for a name that is not in ``nonlinearities``."""
    if name not in nonlinearities:
        more = ", ".join(repr(other) for other in nonlinearities if other not in ("tanh", "relu"))
        raise ValueError(
            f"Unknown nonlinearity '{name}'. Select from 'tanh' or 'relu', or torch_bptt's {more}."
        )


def check_options(operation, alpha, truncate, clip_grad_h, recurrent_dropout, noise):
    """Raise TypeError or ValueError unless the options beyond torch.nn.RNN make sense."""
    real = numbers.Real
    if not isinstance(alpha, torch.Tensor):
        check_number(operation, "alpha", alpha, real, "a number in (0, 1]", lambda a: 0 < a <= 1)
    expected = "a number in [0, 1)"
    check_number(
        operation, "recurrent_dropout", recurrent_dropout, real, expected, lambda p: 0 <= p < 1
    )
    expected = "a finite number of at least 0"
    check_number(operation, "noise", noise, real, expected, lambda s: 0 <= s < math.inf)
    if truncate is not None:
        expected = "None or an int of at least 1"
        check_number(operation, "truncate", truncate, numbers.Integral, expected, lambda k: k >= 1)
    if clip_grad_h is not None:
        expected = "None or a number above 0"
        check_number(operation, "clip_grad_h", clip_grad_h, numbers.Real, expected, lambda c: c > 0)


def check_checkpoint(operation, checkpoint, num_layers=1, directions=1):
    """checkpoint as such, and on as many layers and directions."""
    if checkpoint is None:
        return
    if checkpoint is not True:
        expected = "None, True or an int of at least 1"
        check_number(
            operation, "checkpoint", checkpoint, numbers.Integral, expected, lambda c: c >= 1
        )
    if num_layers > 1 and directions > 1:
        raise ValueError(
            f"{operation}: checkpoint must be None for several bidirectional layers, as each needs "
            "all of the output of the one below, expected num_layers=1 or bidirectional=False, "
            f"got num_layers={num_layers} and bidirectional=True"
        )


def check_need_output(need_output):
    if not isinstance(need_output, bool):
        raise TypeError(f"need_output must be a bool, got {need_output!r}")


def check_alpha(operation, alpha, shapes):
    """Shape and dtype of a tensor alpha, not its values."""
    if not alpha.is_floating_point():
        raise TypeError(f"{operation}: alpha must be a floating tensor, got {alpha.dtype}")
    if alpha.shape not in shapes:
        expected = " or ".join(str(shape) for shape in shapes)
        raise ValueError(
            f"{operation}: alpha must have the shape {expected}, got {tuple(alpha.shape)}"
        )


def check_constant_alpha(operation, alpha):
    """Of a module, which keeps it from call to call."""
    if alpha.grad_fn is not None:
        raise ValueError(
            f"{operation}: alpha must be a tensor of its own, expected a parameter or a constant, "
            f"got the result of {alpha.grad_fn.name()}; a parametrization computes it in every call"
        )


def check_alpha_values(operation, alpha):
    """They lie in (0, 1], as far as the tensor has values."""
    if alpha.is_meta:
        return
    wrong = alpha.detach()[~((alpha > 0) & (alpha <= 1))]
    if len(wrong):
        raise ValueError(f"{operation}: alpha must lie in (0, 1], got {wrong[0].item()}")


def check_bool(operation, name, value):
    if not isinstance(value, bool):
        raise TypeError(f"{operation}: {name} must be a bool, got {value!r}")


def check_restart(restart, input, hidden_size):
    """The state that rows start from after a reset."""
    data = input.data if isinstance(input, PackedSequence) else input
    if not isinstance(restart, torch.Tensor):
        raise TypeError(f"restart must be None or a tensor, got {type(restart).__name__}")
    if restart.shape != (hidden_size,):
        raise ValueError(
            f"restart must have the shape ({hidden_size},), got {tuple(restart.shape)}"
        )
    if restart.device != data.device or restart.dtype != data.dtype:
        raise RuntimeError(
            f"restart must be as input, expected {data.dtype} on {data.device}, "
            f"got {restart.dtype} on {restart.device}"
        )


def check_number(operation, name, value, kind, expected, fits):
    """value is of ``kind``, no bool, and fits; ``expected`` says so in words."""
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{operation}: {name} must be {expected}, got {value!r}")
    if not fits(value):
        raise ValueError(f"{operation}: {name} must be {expected}, got {value}")
