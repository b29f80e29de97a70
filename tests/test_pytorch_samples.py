"""PyTorch's own samples for nn.RNN and nn.RNNCell, with our classes in their place.

The samples and what is checked on them are those of PyTorch's test/test_modules.py for the entries
of nn.RNN and nn.RNNCell in torch.testing._internal.common_modules, without its expected failures.
That module is private: it is the torch of requirements.txt that these tests are for.
"""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

import torch_bptt

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what PyTorch's test code imports
    from torch.testing._internal.common_modules import ModuleErrorEnum, module_db
    from torch.testing._internal.common_utils import freeze_rng_state

OURS = {nn.RNN: torch_bptt.RNN, nn.RNNCell: torch_bptt.RNNCell}
INFO = {info.module_cls: info for info in module_db if info.module_cls in OURS}
DTYPES = [torch.float32, torch.float64]


def samples(theirs, dtype=torch.float64, requires_grad=False, **options):
    """[(arguments of the constructor, arguments of forward, reference function), ...]"""
    torch.manual_seed(0)
    if theirs is nn.RNN:
        options["with_packed_sequence"] = options.get("with_packed_sequence", True)
    given = {"device": torch.get_default_device(), "dtype": dtype, "requires_grad": requires_grad}
    with torch.device("cpu"):  # the lengths of packed sequences are to stay there
        inputs = INFO[theirs].module_inputs_func(INFO[theirs], training=True, **given, **options)
    assert len(inputs) >= 3
    return [(s.constructor_input, s.forward_input, s.reference_fn) for s in inputs]


def build(theirs, arguments, dtype=torch.float64):
    torch.manual_seed(1)
    return OURS[theirs](*arguments.args, **arguments.kwargs).to(dtype)


def tensors(value):
    """All tensors in what forward takes or returns."""
    if isinstance(value, PackedSequence):
        return [value.data]
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for part in value for tensor in tensors(part)] if value is not None else []


classes = pytest.mark.parametrize("theirs", OURS, ids=lambda cls: cls.__name__)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@classes
def test_the_entries_are_there(theirs):
    assert INFO[theirs].dtypes == tuple(DTYPES) or set(INFO[theirs].dtypes) >= set(DTYPES)
    assert INFO[theirs].supports_gradgrad
    assert INFO[theirs].gradcheck_nondet_tol == 0


@classes
@dtypes
def test_forward(theirs, dtype):
    for arguments, forward, reference in samples(theirs, dtype):
        module = build(theirs, arguments, dtype)
        with freeze_rng_state():
            output = module(*forward.args, **forward.kwargs)
        if not isinstance(forward.args[0], PackedSequence):  # the reference knows only tensors
            expected = reference(module, *forward.args, **forward.kwargs)
            torch.testing.assert_close(output, expected)
        plain = theirs(*arguments.args, **arguments.kwargs).to(dtype)
        plain.load_state_dict(module.state_dict())
        expected = plain(*forward.args, **forward.kwargs)
        torch.testing.assert_close(tensors(output), tensors(expected))


@classes
@dtypes
def test_factory_arguments(theirs, dtype):
    for arguments, _, _ in samples(theirs, dtype):
        for device in ("cpu", "meta"):
            module = OURS[theirs](*arguments.args, **arguments.kwargs, device=device, dtype=dtype)
            assert {p.dtype for p in module.parameters()} == {dtype}
            assert {p.device.type for p in module.parameters()} == {device}
            with torch.device(device):
                module = OURS[theirs](*arguments.args, **arguments.kwargs)
            assert {p.device.type for p in module.parameters()} == {device}
        module = module.to_empty(device="cpu").to(dtype)
        assert {(p.device.type, p.dtype) for p in module.parameters()} == {("cpu", dtype)}


@classes
def test_repr_and_str(theirs):
    for arguments, _, _ in samples(theirs):
        module = build(theirs, arguments)
        assert repr(module) == str(module)
        assert repr(module).startswith(theirs.__name__)


@classes
def test_pickle(theirs):
    for arguments, forward, _ in samples(theirs):
        module = build(theirs, arguments)
        with freeze_rng_state():
            expected = module(*forward.args, **forward.kwargs)
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        for copied in (
            torch.load(file, weights_only=False),
            pickle.loads(pickle.dumps(module)),
            copy.deepcopy(module),
        ):
            with freeze_rng_state():
                output = copied(*forward.args, **forward.kwargs)
            torch.testing.assert_close(tensors(output), tensors(expected), rtol=0, atol=0)


@classes
@pytest.mark.parametrize("which", ["input", "hx", "parameters", "all"])
def test_non_contiguous_tensors(theirs, which):
    def scattered(tensor):
        """The same values with a gap after each."""
        result = torch.stack([tensor, tensor], -1)[..., 0].detach()
        assert tensor.numel() < 2 or not result.is_contiguous()
        return result.requires_grad_(tensor.requires_grad)

    def results(scatter):
        for arguments, forward, _ in samples(
            theirs,
            requires_grad=True,
            **({"with_packed_sequence": False} if theirs is nn.RNN else {}),
        ):
            module = build(theirs, arguments)
            args = list(forward.args)
            for i, kind in enumerate(["input", "hx"][: len(args)]):
                if scatter and which in (kind, "all"):
                    args[i] = scattered(args[i])
            if scatter and which in ("parameters", "all"):
                for name, parameter in list(module.named_parameters()):
                    setattr(module, name, nn.Parameter(scattered(parameter)))
            output = tensors(module(*args))
            yield from output
            grads = [
                scattered(torch.ones_like(o)) if scatter else torch.ones_like(o) for o in output
            ]
            yield from torch.autograd.grad(output, [*args, *module.parameters()], grads)

    for got, expected in zip(results(True), results(False), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)


def grad_samples(theirs):
    """(function of all leaves, leaves) for each sample, so that gradcheck sees every gradient."""
    for arguments, forward, _ in samples(theirs, requires_grad=True):
        module = build(theirs, arguments)
        parameters = dict(module.named_parameters())
        packed = isinstance(forward.args[0], PackedSequence)
        leaves = [forward.args[0].data, *forward.args[1:]] if packed else list(forward.args)

        def call(*leaves, module=module, forward=forward, names=tuple(parameters), packed=packed):
            inputs, weights = leaves[: -len(names)], leaves[-len(names) :]
            if packed:
                inputs = [PackedSequence(inputs[0], *forward.args[0][1:]), *inputs[1:]]
            output = torch.func.functional_call(
                module, dict(zip(names, weights, strict=True)), tuple(inputs)
            )
            return tuple(tensors(output))

        yield call, (*(x.detach().requires_grad_() for x in leaves), *parameters.values())


@classes
def test_grad(theirs):
    for call, leaves in grad_samples(theirs):
        assert torch.autograd.gradcheck(
            call, leaves, check_forward_ad=True, check_batched_grad=True, fast_mode=True
        )


@classes
def test_gradgrad(theirs):
    for call, leaves in grad_samples(theirs):
        assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


@classes
def test_whether_training_matters(theirs):
    """PyTorch deletes the flag: a module whose forward depends on it must miss it."""
    for arguments, forward, _ in samples(theirs):
        module = build(theirs, arguments)
        del module.training
        if INFO[theirs].train_and_eval_differ:
            with pytest.raises(AttributeError, match="'training'"):
                module(*forward.args, **forward.kwargs)
        else:
            module(*forward.args, **forward.kwargs)


@classes
@dtypes
def test_errors(theirs, dtype):
    errors = INFO[theirs].module_error_inputs_func(
        INFO[theirs],
        device=torch.get_default_device(),
        dtype=dtype,
        requires_grad=False,
        training=True,
    )
    assert len(errors) >= 6
    for error in errors:
        arguments = error.module_error_input.constructor_input
        forward = error.module_error_input.forward_input
        if error.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(error.error_type, match=error.error_regex):
                OURS[theirs](*arguments.args, **arguments.kwargs)
        else:
            module = OURS[theirs](*arguments.args, **arguments.kwargs)
            with pytest.raises(error.error_type, match=error.error_regex):
                module(*forward.args, **forward.kwargs)
