"""What PyTorch puts around the call of a module: precisions, modes and hooks of autograd, fake
tensors. Under each of them every form of call gives the numbers of a loop in plain PyTorch."""

import functools

import numpy as np
import pytest
import torch
from pairs import assert_same, randn
from subjects import (
    FORMS,
    LENGTHS,
    OF_NN_RNN,
    ROWS,
    STEPS,
    H,
    I,
    Subject,
    assert_same_bits,
    assert_same_results,
    gradients,
    make,
)  # fmt: skip
from torch import nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import torch_bptt

HAS_CUDA = torch.cuda.is_available() and torch._C._dispatch_has_kernel_for_dispatch_key(
    "torch_bptt::rnn_forward", "CUDA"
)
needs_cuda = pytest.mark.skipif(not HAS_CUDA, reason="needs a GPU, and a build for it")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]
every_form = pytest.mark.parametrize("form", FORMS)


def assert_as_the_loop(subject):
    got, expected = subject.call(*subject.tensors), subject.loop(*subject.tensors)
    assert_same_results(got, expected, subject.leaves)


@every_form
def test_without_anything_around_it(form):
    """If this fails, so do most of the others."""
    assert_as_the_loop(Subject(form))


# ---- precisions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
@every_form
def test_autocast(form, narrow, device):
    """Results are narrow, gradients as wide as what they belong to, as with torch.nn.RNN."""
    subjects = [Subject(form, torch.float32, device)]
    if form in OF_NN_RNN:
        subjects.append(Subject(form, torch.float32, device, nn))
    exact = Subject(form, device=device)
    expected = exact.loop(*exact.tensors)
    for subject in subjects:
        with torch.autocast(device, dtype=narrow):
            got = subject.call(*subject.tensors)
        assert [part.dtype for part in got] == [narrow] * len(got)
        for part, other in zip(got, expected, strict=True):
            # A step rounds inputs, weights, sum and result, each by eps / 2 of numbers of order 1
            # (x reaches 3.2, and meets weights below 0.35), in each of two layers; and no step
            # amplifies what came before, as the matrices have norms below 1.
            limit = STEPS * 2 * 4 * torch.finfo(narrow).eps / 2
            torch.testing.assert_close(part.double(), other, rtol=0, atol=limit)
        for leaf, gradient in zip(subject.leaves, gradients(got, subject.leaves), strict=True):
            assert gradient.dtype == leaf.dtype == torch.float32
            assert gradient.isfinite().all()


@every_form
def test_grad_scaler(form):
    """Scaled by a power of two and back: training is that of the loop without a scaler."""
    ours, plain = Subject(form), Subject(form)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizers = [torch.optim.SGD(each.net.parameters(), lr=0.1) for each in (ours, plain)]
    for _ in range(3):
        for subject, call, optimizer in zip(
            (ours, plain), (ours.call, plain.loop), optimizers, strict=True
        ):
            optimizer.zero_grad()
            loss = sum(part.square().sum() for part in call(*subject.tensors))
            if subject is ours:
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
            else:
                loss.backward()
                optimizer.step()
    for mine, other in zip(ours.net.parameters(), plain.net.parameters(), strict=True):
        assert_same("parameter", mine, other)
    assert scaler.get_scale() == 2.0**10


@every_form
def test_grad_scaler_skips_an_update_that_is_not_finite(form):
    subject = Subject(form)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = torch.optim.SGD(subject.net.parameters(), lr=0.1)
    before = [parameter.clone() for parameter in subject.net.parameters()]
    with torch.no_grad():
        subject.x[0, 1, 0] = torch.inf
    scaler.scale(sum(part.sum() for part in subject.call(*subject.tensors))).backward()
    scaler.step(optimizer)
    scaler.update()
    assert_same_bits(subject.net.parameters(), before)
    assert scaler.get_scale() == 2.0**9


@pytest.fixture
def precision():
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("value", ["high", "medium"])
@pytest.mark.parametrize("given", [(), ("lengths", "reset")], ids=["batch", "lengths and reset"])
def test_float32_matmul_precision_changes_no_bit(given, value, precision):
    """Of sizes for which PyTorch's own products change where the processor allows it; see
    test_nn_rnn.py. On the CPU float32 is float32 in the fused loops, forward and backward.
    Derivatives of derivatives have products of PyTorch's between the loops, which follow."""
    net, x = torch_bptt.RNN(256, 256, 2, bidirectional=True), torch.randn(12, 64, 256)
    everything = {"lengths": torch.arange(64) % 13, "reset": torch.rand(12, 64) < 0.1}
    runs = []
    for setting in ("highest", value):
        precision(setting)
        results = net(x, **{name: everything[name] for name in given})
        runs.append((*results, *gradients(results, list(net.parameters()))))
    assert_same_bits(*runs)


def test_second_derivatives_follow_the_precision_of_float32_products(precision):
    a = torch.randn(256, 256)
    net, x = torch_bptt.RNN(256, 256), torch.randn(12, 64, 256, requires_grad=True)
    products, seconds = [], []
    for setting in ("highest", "medium"):
        precision(setting)
        products.append(a @ a)
        (first,) = torch.autograd.grad(net(x)[0].square().sum(), x, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), net.weight_hh_l0)[0])
    assert torch.equal(*products) == torch.equal(*seconds)


@pytest.fixture
def deterministic():
    """Tensors made without values hold NaN then: whoever reads one shows it."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@every_form
@pytest.mark.usefixtures("deterministic")
def test_deterministic_algorithms(form):
    subject = Subject(form)
    assert_as_the_loop(subject)
    runs = []
    for _ in range(2):
        results = subject.call(*subject.tensors)
        first = gradients(results, subject.leaves, create_graph=True)
        runs.append((*results, *first, *gradients(first, subject.leaves)))
    assert_same_bits(*runs)


# ---- what autograd offers ------------------------------------------------------------------------


@every_form
def test_anomaly_mode_names_the_layer_and_shows_its_call(form):
    """Saturated units have a slope of 0, and 0 times an infinite gradient is NaN."""
    subject = Subject(form)
    with torch.no_grad():
        for leaf in subject.net.parameters():
            leaf.mul_(1e6)
    with torch.autograd.set_detect_anomaly(True):
        results = subject.call(*subject.tensors)
        infinite = [torch.full_like(part, torch.inf) for part in results]
        with (
            pytest.warns(UserWarning, match="Traceback of forward call") as caught,
            pytest.raises(RuntimeError, match=r"Function '.*RNNNode.*' returned nan values"),
        ):
            torch.autograd.grad(results, subject.leaves, infinite, allow_unused=True)
    shown = "".join(str(warning.message) for warning in caught)
    assert "results = subject.call(*subject.tensors)" in shown
    assert "rnn.py" in shown


@every_form
def test_saved_tensor_hooks(form):
    subject = Subject(form)
    packed, unpacked = [], []

    def pack(tensor):
        packed.append(tuple(tensor.shape))
        return tensor.detach().numpy().tobytes(), tensor.dtype, tensor.shape

    def unpack(kept):
        data, dtype, shape = kept
        unpacked.append(tuple(shape))
        kind = {torch.float64: np.float64, torch.int64: np.int64, torch.bool: np.bool_}[dtype]
        return torch.from_numpy(np.frombuffer(data, kind).copy()).view(shape)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        got = subject.call(*subject.tensors)
    assert not unpacked
    assert_same_results(got, subject.loop(*subject.tensors), subject.leaves)
    assert (H, H) in packed
    assert (H, H) in unpacked


@every_form
def test_save_on_cpu(form):
    subject = Subject(form)
    with torch.autograd.graph.save_on_cpu():
        got = subject.call(*subject.tensors)
    assert_same_results(got, subject.loop(*subject.tensors), subject.leaves)


@every_form
def test_mutation_of_saved_tensors_where_it_is_allowed(form):
    subject = Subject(form)
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        got = subject.call(*subject.tensors)
        kept = [part.clone() for part in got]
        with torch.no_grad():
            for part in got:
                part.zero_()
        expected = subject.loop(*subject.tensors)
        assert_same_results(kept, expected, subject.leaves)


@every_form
def test_hooks_of_tensors(form):
    """On results, leaves and several tensors at once: what they see is the loop's, and what they
    return is taken."""
    subject, seen = Subject(form), {}
    for way, call in (("got", subject.call), ("expected", subject.loop)):
        results = call(*subject.tensors)
        seen[way] = seen_here = []
        results[0].register_hook(lambda grad: 2 * grad)
        results[0].retain_grad()
        handles = [
            leaf.register_post_accumulate_grad_hook(lambda leaf, seen=seen_here: seen.append(1))
            for leaf in subject.leaves
        ]
        handles.append(
            torch.autograd.graph.register_multi_grad_hook(
                results, lambda grads, seen=seen_here: seen.extend(grads)
            )
        )
        sum(part.square().sum() for part in results).backward()
        seen_here.append(results[0].grad)
        seen_here.extend(leaf.grad for leaf in subject.leaves if leaf.grad is not None)
        for handle in handles:
            handle.remove()
        subject.net.zero_grad()
        subject.x.grad = None
        if subject.hx is not None:
            subject.hx.grad = None
    for mine, other in zip(seen["got"], seen["expected"], strict=True):
        if isinstance(mine, torch.Tensor):
            assert_same("gradient", mine, other)
        else:
            assert mine == other


# ---- derivatives of other kinds ------------------------------------------------------------------

# Not packed: PyTorch's own pack_padded_sequence has neither forward mode nor vmap. lengths= has.
not_packed = pytest.mark.parametrize("form", [form for form in FORMS if form != "packed"])


def plain_tensors(subject):
    return tuple(tensor.detach() for tensor in subject.tensors)


def squares(call, *others):
    """One number, as a function of the input alone."""
    return lambda x: sum(part.square().sum() for part in call(x, *others))


@every_form
def test_backward_in_eval_mode(form):
    subject = Subject(form)
    subject.net.eval()
    assert_as_the_loop(subject)


@every_form
def test_gradient_of_a_gradient(form):
    """Through lengths, packing, resets and truncation alike."""
    subject = Subject(form)
    found = []
    for call in (subject.call, subject.loop):
        results = call(*subject.tensors)
        first = gradients(results, subject.leaves, create_graph=True)
        found.append(gradients([part.square() for part in first], subject.leaves))
    for mine, other in zip(*found, strict=True):
        assert_same("second derivative", mine, other)


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")  # linearize's
@not_packed
def test_forward_mode(form):
    subject = Subject(form)
    given = plain_tensors(subject)
    along = tuple(randn(*tensor.shape, seed=5) for tensor in given)
    expected, slopes = torch.func.jvp(subject.loop, given, along)
    for results, tangents in (
        torch.func.jvp(subject.call, given, along),
        (subject.call(*given), torch.func.linearize(subject.call, *given)[1](*along)),
    ):
        for mine, other in zip((*results, *tangents), (*expected, *slopes), strict=True):
            assert_same("result or tangent", mine, other)


@not_packed
def test_hessian(form):
    subject = Subject(form)
    x, *others = plain_tensors(subject)
    got, expected = (
        torch.func.hessian(squares(call, *others))(x) for call in (subject.call, subject.loop)
    )
    assert_same("hessian", got, expected)


@not_packed
def test_vmap_over_inputs_and_their_gradients(form):
    subject = Subject(form)
    x, *others = plain_tensors(subject)
    many = torch.stack([x, -2 * x, x.flip(0)])
    got = torch.func.vmap(lambda x: subject.call(x, *others))(many)
    slopes = torch.func.vmap(torch.func.grad(squares(subject.call, *others)))(many)
    for i, x in enumerate(many):
        for mine, other in zip(got, subject.loop(x, *others), strict=True):
            assert_same("result", mine[i], other)
        assert_same("slope", slopes[i], torch.func.grad(squares(subject.loop, *others))(x))


# ---- activation checkpointing --------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@every_form
def test_activation_checkpointing(form, reentrant):
    subject = Subject(form)
    got = checkpoint(subject.call, *subject.tensors, use_reentrant=reentrant)
    expected = subject.loop(*subject.tensors)
    if not reentrant:
        return assert_same_results(got, expected, subject.leaves)
    # The reentrant kind knows backward() alone.
    for results in (got, expected):
        subject.net.zero_grad()
        subject.x.grad = None
        sum(part.square().sum() for part in results).backward()
        found = [leaf.grad.clone() for leaf in (subject.x, *subject.net.parameters())]
        if results is got:
            mine = found
    for a, b in zip(mine, found, strict=True):
        assert_same("gradient", a, b)


class Operators(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("saved", [True, False])
@every_form
def test_selective_checkpointing_sees_a_layer_as_one_operator(form, saved):
    """What is kept is not computed again; what is not, is, once."""
    subject = Subject(form)

    def policy(context, operator, *args, **kwargs):
        keep = saved and operator is torch.ops.torch_bptt.rnn_forward.default
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    with Operators() as forward:
        got = checkpoint(subject.call, *subject.tensors, use_reentrant=False, context_fn=contexts)
    expected = subject.loop(*subject.tensors)
    with Operators() as backward:
        found = gradients(got, subject.leaves)
    for mine, other in zip(found, gradients(expected, subject.leaves), strict=True):
        assert_same("gradient", mine, other)
    layers = forward.seen.count("torch_bptt::rnn_forward")
    assert layers == (1 if subject.cell else len(subject.net._all_weights))
    assert backward.seen.count("torch_bptt::rnn_forward") == (0 if saved else layers)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_same_numbers_again(reentrant):
    net = torch_bptt.RNN(I, H, 2, dropout=0.5, recurrent_dropout=0.3, noise=0.2)
    x, runs = torch.randn(STEPS, ROWS, I, requires_grad=True), []
    for call in (net, functools.partial(checkpoint, net, use_reentrant=reentrant)):
        net.zero_grad()
        torch.manual_seed(1)
        output, h_n = call(x)
        output.square().sum().backward()
        runs.append([output, h_n, *(parameter.grad for parameter in net.parameters())])
    assert_same_bits(*runs)


# ---- tensors without values ----------------------------------------------------------------------


@every_form
def test_meta_tensors_have_the_shapes_of_real_ones(form):
    subject = Subject(form)
    expected = subject.call(*subject.tensors)
    expected = [*expected, *gradients(expected, subject.leaves)]
    if "packed" in subject.given:  # packing reads its lengths on the CPU
        packed = pack_padded_sequence(subject.x, LENGTHS, enforce_sorted=False)
        net, hx = subject.net.to("meta"), subject.hx.to("meta")
        output, h_n = net(packed._replace(data=packed.data.to("meta")), hx)
        assert (output.data.shape, h_n.shape) == ((sum(LENGTHS), 2 * H), expected[1].shape)
        return
    subject.to("meta", torch.float64)
    got = subject.call(*subject.tensors)
    total = sum(part.sum() for part in got)
    grads = torch.autograd.grad(total, subject.leaves, materialize_grads=True)
    for mine, other in zip((*got, *grads), expected, strict=True):
        assert (mine.device.type, mine.shape, mine.dtype) == ("meta", other.shape, other.dtype)


@every_form
def test_fake_tensors_have_the_shapes_of_real_ones(form):
    real = Subject(form)
    expected = real.call(*real.tensors)
    expected = [*expected, *gradients(expected, real.leaves)]
    with FakeTensorMode(allow_non_fake_inputs=True):
        real.net = make(form, dtype=torch.float64)
        real.x = torch.empty(STEPS, ROWS, I, dtype=torch.float64, requires_grad=True)
        if real.hx is not None:
            real.hx = torch.empty(real.hx.shape, dtype=torch.float64, requires_grad=True)
        if "packed" in real.given:  # PyTorch's own: shapes depend on what the lengths are
            with pytest.raises(DynamicOutputShapeException, match="_pack_padded_sequence"):
                real.call(*real.tensors)
            return
        got = real.call(*real.tensors)
        total = sum(part.sum() for part in got)
        grads = torch.autograd.grad(total, real.leaves, materialize_grads=True)
    for mine, other in zip((*got, *grads), expected, strict=True):
        assert type(mine).__name__ == "FakeTensor"
        assert (mine.shape, mine.dtype) == (other.shape, other.dtype)
