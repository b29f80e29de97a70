"""Bad input: the words of torch.nn.RNN where it has some, one clear message where it has none."""

import warnings

import pytest
import torch
from pairs import randn
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import torch_bptt
from torch_bptt import RNN, RNNCell, functional


def raised(call):
    """The exception that call raises."""
    with pytest.raises(Exception) as caught:  # noqa: PT011 - the caller compares type and text
        call()
    return caught.value


# ---- the same mistake, the same type and words as torch.nn.RNN

BAD_ARGUMENTS = {
    "proj_size": lambda cls: cls(3, 4, proj_size=2),
    "proj_size 0": lambda cls: cls(3, 4, proj_size=0),
    "dropout text": lambda cls: cls(3, 4, dropout="a"),
    "dropout text of a number": lambda cls: cls(3, 4, dropout="0.5"),
    "dropout None": lambda cls: cls(3, 4, dropout=None),
    "dropout bool": lambda cls: cls(3, 4, dropout=True),
    "dropout below 0": lambda cls: cls(3, 4, dropout=-0.1),
    "dropout above 1": lambda cls: cls(3, 4, dropout=1.1),
    "bias int": lambda cls: cls(3, 4, bias=1),
    "batch_first int": lambda cls: cls(3, 4, batch_first=1),
    "input_size float": lambda cls: cls(3.0, 4),
    "input_size 0": lambda cls: cls(0, 4),
    "hidden_size float": lambda cls: cls(3, 4.0),
    "hidden_size 0": lambda cls: cls(3, 0),
    "num_layers 0": lambda cls: cls(3, 4, 0),
    "num_layers float": lambda cls: cls(3, 4, 1.5),
    "num_layers text": lambda cls: cls(3, 4, "a"),
    "dropout before bias": lambda cls: cls(3, 4, dropout=2, bias=1),
    "bias before batch_first": lambda cls: cls(3, 4, bias=1, batch_first=1),
    "input_size before hidden_size": lambda cls: cls(0, 0),
    "hidden_size before num_layers": lambda cls: cls(3, 0, 0),
}


@pytest.mark.parametrize("make", BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_arguments_as_nn_rnn(make):
    mine, other = (raised(lambda cls=cls: make(cls)) for cls in (RNN, nn.RNN))
    assert (type(mine), str(mine)) == (type(other), str(other))


def test_dropout_with_one_layer_warns_as_nn_rnn():
    messages = []
    for cls in (RNN, nn.RNN):
        with pytest.warns(UserWarning, match="dropout option adds dropout after all but") as caught:
            cls(3, 4, dropout=0.5)
        messages.append([str(warning.message) for warning in caught])
    assert messages[0] == messages[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RNN(3, 4, 2, dropout=0.5)


@pytest.mark.parametrize("name", ["xyz", "TANH", "", None, 3])
def test_unknown_nonlinearity(name):
    mine, other = (raised(lambda c=cls: c(3, 4, nonlinearity=name)) for cls in (RNN, nn.RNN))
    assert type(mine) is type(other)
    assert str(mine).startswith(str(other).removesuffix("."))
    assert "sigmoid" in str(mine)


def test_unknown_and_repeated_arguments():
    with pytest.raises(TypeError, match="got an unexpected keyword argument 'foo'"):
        RNN(3, 4, foo=1)
    with pytest.raises(TypeError, match="nonlinearity"):
        RNN(3, 4, 1, "tanh", nonlinearity="relu")
    with pytest.raises(TypeError, match="hidden_size"):
        RNN(3)


def unsorted_rows():
    return pack_padded_sequence(randn(5, 3, 3), [2, 5, 4], enforce_sorted=False)


def sorted_rows():
    return pack_padded_sequence(randn(5, 3, 3), [5, 4, 2])


BAD_INPUTS = {
    "1-D": lambda: (randn(3),),
    "4-D": lambda: (randn(1, 5, 2, 3),),
    "dtype": lambda: (randn(5, 2, 3).float(),),
    "dtype of packed": lambda: (sorted_rows().to(torch.float32),),
    "integers": lambda: (randn(5, 2, 3).long(),),
    "complex": lambda: (randn(5, 2, 3).to(torch.complex128),),
    "features": lambda: (randn(5, 2, 7),),
    "features of one": lambda: (randn(5, 7),),
    "features of packed": lambda: (pack_padded_sequence(randn(5, 2, 7), [5, 2]),),
    "dtype before features": lambda: (randn(5, 2, 7).float(),),
    "no steps": lambda: (randn(0, 2, 3),),
    "no steps of one": lambda: (randn(0, 3),),
    "packed 3-D": lambda: (PackedSequence(randn(5, 2, 3), torch.tensor([3, 2])),),
    "hx 2-D for a batch": lambda: (randn(5, 2, 3), randn(4, 4)),
    "hx 4-D for a batch": lambda: (randn(5, 2, 3), randn(1, 4, 2, 4)),
    "hx 3-D for one": lambda: (randn(5, 3), randn(4, 1, 4)),
    "hx layers": lambda: (randn(5, 2, 3), randn(2, 2, 4)),
    "hx rows": lambda: (randn(5, 2, 3), randn(4, 3, 4)),
    "hx features": lambda: (randn(5, 2, 3), randn(4, 2, 5)),
    "hx of one": lambda: (randn(5, 3), randn(3, 4)),
    "hx of packed, few rows": lambda: (sorted_rows(), randn(4, 2, 4)),
    "hx of packed, many rows": lambda: (sorted_rows(), randn(4, 4, 4)),
    "hx of packed, 2-D": lambda: (sorted_rows(), randn(4, 4)),
    "hx tuple": lambda: (randn(5, 2, 3), (randn(4, 2, 4),)),
    "None": lambda: (None,),
    "hx on meta": lambda: (randn(5, 2, 3), randn(4, 2, 4).to("meta")),
}


@pytest.mark.parametrize("make", BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_inputs_as_nn_rnn(make):
    mine, other = (
        raised(lambda cls=cls: cls(3, 4, 2, bidirectional=True).double()(*make()))
        for cls in (RNN, nn.RNN)
    )
    assert type(mine) is type(other)
    assert str(mine).removesuffix(" (hx)") == str(other)


def test_batch_first_reads_rows_first():
    for cls in (RNN, nn.RNN):
        with pytest.raises(
            RuntimeError, match=r"Expected hidden size \(1, 5, 4\), got \[1, 2, 4\]"
        ):
            cls(3, 4, batch_first=True).double()(randn(5, 2, 3), randn(1, 2, 4))


# ---- where torch.nn.RNN is silent or speaks of something else, ours does not


@pytest.mark.parametrize("rows", [2, 4])
def test_hx_with_wrong_rows_for_unsorted_packed(rows):
    """torch.nn.RNN cuts an hx with too many rows and fails inside with too few."""
    with pytest.raises(
        RuntimeError, match=rf"Expected hidden size \(1, 3, 4\), got \[1, {rows}, 4\]"
    ):
        RNN(3, 4).double()(unsorted_rows(), randn(1, rows, 4))


def test_dtype_of_hx_and_of_other_parameters():
    rnn = RNN(3, 4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"input and hx must have the same dtype, but got"):
        rnn(randn(5, 2, 3), randn(1, 2, 4).float())
    rnn.weight_hh_l0 = nn.Parameter(rnn.weight_hh_l0.float())
    with pytest.raises(RuntimeError, match="input and weight_hh must have the same dtype"):
        rnn(randn(5, 2, 3))


def test_devices():
    with pytest.raises(
        RuntimeError, match="Input and parameter tensors are not at the same device"
    ):
        RNN(3, 4, device="meta")(torch.ones(5, 2, 3))
    with pytest.raises(
        RuntimeError, match="Input and parameter tensors are not at the same device"
    ):
        RNNCell(3, 4, device="meta")(torch.ones(2, 3))


def test_dtypes_under_autocast():
    """float64 is not narrowed, so that it meets bfloat16: torch.nn.RNN raises, and so do we."""
    for cls in (RNN, nn.RNN):
        with (
            torch.autocast("cpu", dtype=torch.bfloat16),
            pytest.raises(RuntimeError, match="must have the same dtype, but got"),
        ):
            cls(3, 4)(randn(5, 2, 3))


LENGTHS = {
    "too long": ([5, 6], ValueError, "expected 0 to 5, got 6 in row 1"),
    "negative": ([-1, 5], ValueError, "expected 0 to 5, got -1 in row 0"),
    "too few": ([5], ValueError, r"expected \(2,\) torch.int64, got \(1,\)"),
    "too many": ([5, 5, 5], ValueError, r"expected \(2,\) torch.int64, got \(3,\)"),
    "a number": (5, ValueError, r"expected \(2,\) torch.int64, got \(\)"),
    "2-D": ([[5, 5]], ValueError, r"expected \(2,\) torch.int64, got \(1, 2\)"),
    "none of two": ([], ValueError, r"expected \(2,\) torch.int64, got \(0,\)"),
    "float": ([5.0, 5.0], TypeError, r"expected \(2,\) torch.int64, got torch.float32"),
    "not a number": ([5.0, float("nan")], TypeError, "torch.int64, got torch.float32"),
    "bool": ([True, True], TypeError, r"expected \(2,\) torch.int64, got torch.bool"),
    "text": (["a", "b"], TypeError, r"expected \(2,\) torch.int64, got \['a', 'b'\]"),
    "ragged": ([[1], [1, 2]], TypeError, r"expected \(2,\) torch.int64, got \[\[1\], \[1, 2\]\]"),
    "beyond int64": ([2**70, 1], TypeError, r"expected \(2,\) torch.int64, got \[1180591"),
}


@pytest.mark.parametrize(("lengths", "kind", "words"), LENGTHS.values(), ids=LENGTHS)
def test_lengths(lengths, kind, words):
    with pytest.raises(kind, match=f"lengths must .*{words}"):
        RNN(3, 4).double()(randn(5, 2, 3), lengths=lengths)


def test_lengths_of_no_steps_or_of_packed():
    with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0 in RNN"):
        RNN(3, 4).double()(randn(0, 2, 3), lengths=[0, 0])
    with pytest.raises(ValueError, match="lengths must be None when input is a PackedSequence"):
        RNN(3, 4).double()(sorted_rows(), lengths=[5, 4, 2])


RESETS = {
    "transposed": (torch.zeros(2, 5, dtype=torch.bool), ValueError, r"\(5, 2\), got \(2, 5\)"),
    "one row": (torch.zeros(5, 1, dtype=torch.bool), ValueError, r"\(5, 2\), got \(5, 1\)"),
    "1-D": (torch.zeros(5, dtype=torch.bool), ValueError, r"\(5, 2\), got \(5,\)"),
    "float": (torch.zeros(5, 2), TypeError, "expected torch.bool, got torch.float32"),
    "uint8": (torch.zeros(5, 2).byte(), TypeError, "expected torch.bool, got torch.uint8"),
    "list": ([[False] * 2] * 5, TypeError, "expected torch.bool, got list"),
    "meta": (torch.zeros(5, 2, dtype=torch.bool, device="meta"), RuntimeError, "cpu, got meta"),
}


@pytest.mark.parametrize(("reset", "kind", "words"), RESETS.values(), ids=RESETS)
def test_reset(reset, kind, words):
    with pytest.raises(kind, match=f"reset must .*{words}"):
        RNN(3, 4).double()(randn(5, 2, 3), reset=reset)


def test_reset_of_other_layouts():
    reset = torch.zeros(5, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"reset must .*expected \(2, 5\), got \(5, 2\)"):
        RNN(3, 4, batch_first=True).double()(randn(2, 5, 3), reset=reset)
    with pytest.raises(ValueError, match=r"reset must .*expected \(5,\), got \(5, 2\)"):
        RNN(3, 4).double()(randn(5, 3), reset=reset)
    with pytest.raises(ValueError, match=r"reset must .*expected \(5, 3\), got \(5, 2\)"):
        RNN(3, 4).double()(sorted_rows(), reset=reset)


OPTIONS = {
    "alpha 0": ({"alpha": 0}, ValueError, r"alpha must be a number in \(0, 1\], got 0"),
    "alpha 2": ({"alpha": 2.0}, ValueError, r"alpha must be a number in \(0, 1\], got 2.0"),
    "alpha nan": ({"alpha": float("nan")}, ValueError, r"alpha must be .*, got nan"),
    "alpha text": ({"alpha": "a"}, TypeError, "alpha must be .*, got 'a'"),
    "alpha None": ({"alpha": None}, TypeError, "alpha must be .*, got None"),
    "alpha bool": ({"alpha": True}, TypeError, "alpha must be .*, got True"),
    "truncate 0": ({"truncate": 0}, ValueError, "truncate must be .* at least 1, got 0"),
    "truncate -1": ({"truncate": -1}, ValueError, "truncate must be .* at least 1, got -1"),
    "truncate float": ({"truncate": 2.0}, TypeError, "truncate must be .*, got 2.0"),
    "truncate bool": ({"truncate": True}, TypeError, "truncate must be .*, got True"),
    "clip 0": ({"clip_grad_h": 0}, ValueError, "clip_grad_h must be .* above 0, got 0"),
    "clip -1": ({"clip_grad_h": -1.0}, ValueError, "clip_grad_h must be .* above 0, got -1.0"),
    "clip nan": ({"clip_grad_h": float("nan")}, ValueError, "clip_grad_h must be .*, got nan"),
    "clip text": ({"clip_grad_h": "a"}, TypeError, "clip_grad_h must be .*, got 'a'"),
}


@pytest.mark.parametrize(("options", "kind", "words"), OPTIONS.values(), ids=OPTIONS)
def test_options(options, kind, words):
    with pytest.raises(kind, match=f"RNN: {words}"):
        RNN(3, 4, **options)
    with pytest.raises(kind, match=f"rnn: {words}"):
        functional.rnn(randn(5, 2, 3), None, randn(4, 3), randn(4, 4), **options)


def test_a_module_keeps_no_alpha_that_was_computed():
    """Its graph would be gone after one backward; of the function it is an argument like others."""
    alpha = torch.sigmoid(torch.zeros(4, requires_grad=True))
    with pytest.raises(ValueError, match=r"RNN: alpha must be a tensor of its own, .* Sigmoid"):
        RNN(3, 4, alpha=alpha)
    RNN(3, 4, alpha=alpha.detach())


def test_options_are_keyword_only():
    with pytest.raises(TypeError, match="positional argument"):
        RNN(3, 4, 1, "tanh", True, False, 0.0, False, None, None, 0.5)
    with pytest.raises(TypeError, match="positional argument"):
        RNN(3, 4)(torch.ones(5, 2, 3), None, [5, 5])


FUNCTIONAL = {
    "nonlinearity": (dict(nonlinearity="xyz"), ValueError, "Unknown nonlinearity 'xyz'"),
    "input dims": (dict(input=randn(3)), ValueError, "2D or 3D, got 1D"),
    "features": (dict(input=randn(5, 2, 7)), RuntimeError, "Expected 3, got 7"),
    "dtype": (dict(input=randn(5, 2, 3).float()), ValueError, "does not match weight dtype"),
    "hx rows": (dict(hx=randn(3, 4)), RuntimeError, r"size \(2, 4\), got \[3, 4\]"),
    "hx dims": (dict(hx=randn(1, 2, 4)), RuntimeError, r"size \(2, 4\), got \[1, 2, 4\]"),
    "hx of one": (dict(input=randn(5, 3)), RuntimeError, r"size \(4,\), got \[2, 4\]"),
    "hx dtype": (dict(hx=randn(2, 4).float()), RuntimeError, "input and hx must have the same"),
    "bias dtype": (dict(bias_hh=randn(4).float()), RuntimeError, "input and bias_hh must have"),
}  # fmt: skip


@pytest.mark.parametrize(("wrong", "kind", "words"), FUNCTIONAL.values(), ids=FUNCTIONAL)
def test_functional(wrong, kind, words):
    right = dict(
        input=randn(5, 2, 3),
        hx=randn(2, 4),
        weight_ih=randn(4, 3),
        weight_hh=randn(4, 4),
        bias_ih=randn(4),
        bias_hh=randn(4),
    )
    functional.rnn(**right)
    with pytest.raises(kind, match=words):
        functional.rnn(**{**right, **wrong})


@pytest.mark.parametrize(
    ("name", "shape"),
    [("weight_hh", (4, 5)), ("weight_hh", (4,)), ("weight_ih", (5, 3)), ("weight_ih", (3,)),
     ("bias_ih", (5,)), ("bias_ih", (1,)), ("bias_hh", (4, 1))],
)  # fmt: skip
def test_functional_with_parameters_of_wrong_shapes(name, shape):
    shapes = {"weight_ih": (4, 3), "weight_hh": (4, 4), "bias_ih": (4,), "bias_hh": (4,)}
    weights = {key: randn(*value) for key, value in {**shapes, name: shape}.items()}
    with pytest.raises((ValueError, RuntimeError), match=r"weight_|bias"):
        functional.rnn(randn(5, 2, 3), None, **weights)


def test_biases_do_not_broadcast():
    rnn = RNN(3, 4, 2)
    rnn.bias_hh_l1 = nn.Parameter(torch.zeros(1))
    with pytest.raises(RuntimeError, match=r"bias_hh must have .* got \(4,\) and \(1,\)"):
        rnn(torch.ones(5, 2, 3))


# ---- RNNCell

BAD_CELL_INPUTS = {
    "input 3-D": lambda: (randn(1, 2, 3),),
    "input 0-D": lambda: (randn(),),
    "hx 3-D": lambda: (randn(2, 3), randn(1, 2, 4)),
    "hx 4-D": lambda: (randn(2, 3), randn(1, 1, 2, 4)),
    "features": lambda: (randn(2, 7),),
    "features of one": lambda: (randn(7),),
    "rows": lambda: (randn(2, 3), randn(5, 4)),
    "hidden": lambda: (randn(2, 3), randn(2, 5)),
    "hidden of one": lambda: (randn(3), randn(5)),
    "hx 2-D for one": lambda: (randn(3), randn(2, 4)),
    "hx 1-D for a batch": lambda: (randn(2, 3), randn(4)),
    "None": lambda: (None,),
    "hx tuple": lambda: (randn(2, 3), (randn(2, 4),)),
}


@pytest.mark.parametrize("make", BAD_CELL_INPUTS.values(), ids=BAD_CELL_INPUTS)
def test_cell_inputs_as_nn_rnn_cell(make):
    mine, other = (
        raised(lambda cls=cls: cls(3, 4).double()(*make())) for cls in (RNNCell, nn.RNNCell)
    )
    assert (type(mine), str(mine)) == (type(other), str(other))


def test_cell_nonlinearity_is_checked_by_forward():
    mine, other = (
        raised(lambda cls=cls: cls(3, 4, nonlinearity="xyz").double()(randn(2, 3)))
        for cls in (RNNCell, nn.RNNCell)
    )
    assert (type(mine), str(mine)) == (type(other), str(other))


@pytest.mark.parametrize("shape", [(4, 4), (1, 4)])
def test_cell_with_a_batch_of_states_for_one_input(shape):
    """torch.nn.RNNCell takes a square hx here and fails inside."""
    with pytest.raises(RuntimeError, match="hidden0 has inconsistent hidden_size"):
        RNNCell(3, 4).double()(randn(3), randn(*shape))


@pytest.mark.parametrize("name", ["input", "hx"])
def test_cell_dtypes(name):
    tensors = {"input": randn(2, 3), "hx": randn(2, 4)}
    tensors[name] = tensors[name].float()
    with pytest.raises(RuntimeError, match="must have the same dtype, but got"):
        RNNCell(3, 4).double()(**tensors)


# ---- to_torch and from_torch


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"nonlinearity": "sigmoid"}, "nonlinearity must be 'tanh' or 'relu'.* got 'sigmoid'"),
        ({"alpha": 0.5}, "alpha must be 1.0.* got 0.5"),
        ({"truncate": 3}, "truncate must be None.* got 3"),
        ({"clip_grad_h": 1.0}, "clip_grad_h must be None.* got 1.0"),
    ],
)
def test_to_torch_refuses_what_it_cannot_express(options, words):
    with pytest.raises(ValueError, match=f"to_torch: {words}"):
        RNN(3, 4, **options).to_torch()
    if "nonlinearity" in options:
        with pytest.raises(ValueError, match=f"to_torch: {words}"):
            RNNCell(3, 4, **options).to_torch()


class Derived(nn.RNN):
    pass


@pytest.mark.parametrize("module", [nn.LSTM(3, 4), nn.RNNCell(3, 4), Derived(3, 4), None], ids=repr)
def test_from_torch_takes_nothing_but_nn_rnn(module):
    with pytest.raises(TypeError, match=r"module must be exactly a torch\.nn.*RNN, got"):
        RNN.from_torch(module)


def test_from_torch_refuses_hooks_bound_to_the_module():
    theirs = nn.RNN(3, 4)
    theirs.register_load_state_dict_pre_hook(lambda module, *args: None)
    with pytest.raises(ValueError, match="module must have no load_state_dict_pre_hook"):
        RNN.from_torch(theirs)


def test_convert_takes_nothing_but_modules():
    with pytest.raises(TypeError, match=r"convert: model must be a torch\.nn\.Module, got int"):
        torch_bptt.convert(3)
