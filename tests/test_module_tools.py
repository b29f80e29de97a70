"""What PyTorch does to a module: parametrizations, pruning, conversion, saving, hooks, tracing,
counting. Every form of call gives, and learns, what a loop in plain PyTorch does."""

import io
import pickle

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
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode

import torch_bptt

every_form = pytest.mark.parametrize("form", FORMS)
as_nn_rnn = pytest.mark.parametrize("form", OF_NN_RNN)


def matrices(net):
    """Names of W_ih and W_hh of every layer and direction."""
    return [name for name, _ in net.named_parameters() if name.startswith("weight")]


def recurrent(net):
    return [name for name in matrices(net) if name.startswith("weight_hh")]


def train(subject, call, updates=4):
    """The losses of some updates of all parameters."""
    optimizer = torch.optim.SGD(subject.net.parameters(), lr=0.005)
    losses = []
    for _ in range(updates):
        optimizer.zero_grad()
        loss = sum((part - 0.3).square().sum() for part in call(*subject.tensors))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def learned(form, change):
    """A changed module after some updates, which another one, run as the loop, has as well."""
    ours, loop = Subject(form), Subject(form)
    for subject in (ours, loop):
        torch.manual_seed(0)
        change(subject.net)
    losses = [train(ours, ours.call), train(loop, loop.loop)]
    assert losses[0][-1] < losses[0][0]
    assert_same("losses", *map(torch.tensor, losses))
    states = ours.net.state_dict(), loop.net.state_dict()
    assert states[0].keys() == states[1].keys()
    for name in states[0]:
        assert_same(name, states[0][name], states[1][name])
    return ours


# ---- weights that are computed -------------------------------------------------------------------

# Each look at a weight is one step of spectral_norm's iteration while training: that the numbers
# are the loop's says that a call looks once.
PARAMETRIZE = {
    "orthogonal": (parametrizations.orthogonal, recurrent),
    "spectral_norm": (parametrizations.spectral_norm, matrices),
    "weight_norm": (parametrizations.weight_norm, matrices),
}


@pytest.mark.parametrize("kind", PARAMETRIZE)
@every_form
def test_parametrized_weights_learn(form, kind):
    apply, which = PARAMETRIZE[kind]

    def change(net):
        for name in which(net):
            apply(net, name)

    net = learned(form, change).net
    assert parametrize.is_parametrized(net)
    if kind == "orthogonal":
        weight = net.weight_hh if form == "cell" else net.weight_hh_l0
        assert_same("W W^T", weight @ weight.T, torch.eye(H, dtype=weight.dtype))


@every_form
def test_pruned_weights_learn_and_stay_pruned(form):
    def change(net):
        chosen = [(net, name) for name in matrices(net)]
        prune.global_unstructured(chosen, prune.L1Unstructured, amount=0.4)

    subject = learned(form, change)
    names = [name.removesuffix("_orig") for name in matrices(subject.net)]
    masks = [getattr(subject.net, f"{name}_mask") for name in names]
    assert sum(int((mask == 0).sum()) for mask in masks) > 0.3 * sum(map(torch.numel, masks))
    for name, mask in zip(names, masks, strict=True):
        prune.remove(subject.net, name)
        assert torch.equal(subject.net.get_parameter(name) == 0, mask == 0)
    assert_same_results(
        subject.call(*subject.tensors), subject.loop(*subject.tensors), subject.leaves
    )


# ---- conversion ----------------------------------------------------------------------------------


@pytest.fixture
def swap():
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@every_form
@pytest.mark.usefixtures("swap")
def test_swapped_parameters(form):
    """The parameters stay the objects they are, so that an optimizer made before goes on."""
    subject = Subject(form, torch.float32)
    before = list(subject.net.parameters())
    fresh = {name: p.double() + 0.01 for name, p in subject.net.state_dict().items()}
    train(subject, subject.call, updates=1)
    subject.net.zero_grad()
    subject.to("cpu", torch.float64)
    subject.net.load_state_dict(fresh)
    assert all(a is b for a, b in zip(subject.net.parameters(), before, strict=True))
    assert all(parameter.dtype == torch.float64 for parameter in before)
    assert_same_results(
        subject.call(*subject.tensors), subject.loop(*subject.tensors), subject.leaves
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_form
def test_to_another_dtype_and_back(form, dtype):
    """A state within the roundings of each step, as in test_surroundings.test_autocast."""
    exact, subject = Subject(form), Subject(form)
    subject.to("cpu", dtype)
    limit = STEPS * 2 * 4 * torch.finfo(dtype).eps / 2
    got, expected = subject.call(*subject.tensors), exact.loop(*exact.tensors)
    for part, other in zip(got, expected, strict=True):
        assert part.dtype == dtype
        torch.testing.assert_close(part.double(), other, rtol=0, atol=limit)
    subject.to("cpu", torch.float64)
    assert_same_results(
        subject.call(*subject.tensors), subject.loop(*subject.tensors), subject.leaves
    )


@pytest.mark.parametrize("how", ["assign", "to_empty", "skip_init"])
@every_form
def test_made_without_values_and_filled_later(form, how):
    subject, other = Subject(form), Subject(form)
    if how == "skip_init":
        options = FORMS[form][0]
        cls = torch_bptt.RNNCell if options is None else torch_bptt.RNN
        net = nn.utils.skip_init(cls, I, H, **options or {}, dtype=torch.float64)
    else:
        with torch.device("meta"):
            net = make(form, dtype=torch.float64)
        assert all(parameter.is_meta for parameter in net.parameters())
        net = net if how == "assign" else net.to_empty(device="cpu")
    net.load_state_dict(subject.net.state_dict(), assign=how == "assign")
    other.net = net
    assert_same_bits(other.call(*other.tensors), subject.call(*subject.tensors))


@pytest.mark.parametrize("learned", [False, True])
def test_made_without_values_a_tensor_alpha_is_set_by_hand(learned):
    """docs/distributed.md: everything else reset_parameters draws, as without the meta device."""
    alpha = torch.linspace(0.1, 0.9, H)
    given = nn.Parameter(alpha.clone()) if learned else alpha.clone()
    torch.manual_seed(0)
    expected = torch_bptt.RNN(I, H, alpha=given, learn_h0=True)
    with torch.device("meta"):
        empty = torch.empty(H)
        net = torch_bptt.RNN(I, H, alpha=nn.Parameter(empty) if learned else empty, learn_h0=True)
    net = net.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in net.state_dict().values():
            tensor.fill_(torch.nan)  # as what the memory held might be
    torch.manual_seed(0)
    net.reset_parameters()
    assert [name for name, value in net.state_dict().items() if value.isnan().any()] == ["alpha"]
    with torch.no_grad():
        net.alpha.copy_(alpha)
    for name, value in expected.state_dict().items():
        assert torch.equal(net.state_dict()[name], value), name


# ---- saving and sharing --------------------------------------------------------------------------


@pytest.mark.parametrize("mmap", [False, True])
@every_form
def test_a_state_dict_loads_with_weights_only(form, mmap, tmp_path):
    subject, other = Subject(form), Subject(form)
    torch.save(subject.net.state_dict(), tmp_path / "state.pt")
    other.net = make(form, dtype=torch.float64)
    state = torch.load(tmp_path / "state.pt", weights_only=True, mmap=mmap)
    other.net.load_state_dict(state, assign=mmap)
    assert_same_bits(other.call(*other.tensors), subject.call(*subject.tensors))


@every_form
def test_a_whole_module_loads_with_weights_only_where_its_class_is_named(form):
    subject, other = Subject(form), Subject(form)
    file = io.BytesIO()
    torch.save(subject.net, file)
    file.seek(0)
    with pytest.raises(pickle.UnpicklingError, match=r"torch_bptt\.rnn\.RNN"):
        torch.load(file, weights_only=True)
    file.seek(0)
    with torch.serialization.safe_globals([type(subject.net)]):
        other.net = torch.load(file, weights_only=True)
    assert_same_bits(other.call(*other.tensors), subject.call(*subject.tensors))
    assert_same_results(other.call(*other.tensors), other.loop(*other.tensors), other.leaves)


def learn_elsewhere(subject):
    train(subject, subject.call, updates=1)


def test_shared_memory():
    """A process that learns on shared parameters teaches this one."""
    shared, alone = Subject("layers and directions"), Subject("layers and directions")
    shared.net.share_memory()
    before = [parameter.detach().clone() for parameter in shared.net.parameters()]
    torch.multiprocessing.spawn(work_on_shared, (shared.net,), nprocs=1)
    learn_elsewhere(alone)
    for parameter, other, old in zip(
        shared.net.parameters(), alone.net.parameters(), before, strict=True
    ):
        assert parameter.is_shared()
        assert_same("parameter", parameter, other)
        assert not torch.equal(parameter, old)


def work_on_shared(rank, net):
    torch.set_num_threads(1)
    subject = Subject("layers and directions")
    subject.net = net
    learn_elsewhere(subject)


# ---- hooks ---------------------------------------------------------------------------------------


def flat(value):
    """The tensors of what a hook is given, None where there is none."""
    if isinstance(value, (tuple, list)):
        return [tensor for part in value for tensor in flat(part)]
    if isinstance(value, dict):
        return [tensor for part in value.values() for tensor in flat(part)]
    return [value]


@as_nn_rnn
def test_hooks_see_what_those_of_nn_rnn_see(form):
    seen = []
    for package in (torch_bptt, nn):
        subject, calls = Subject(form, package=package), []
        net = subject.net

        def note(kind, calls=calls):
            def hook(module, *given):
                calls.append((kind, flat(given)))

            return hook

        net.register_forward_pre_hook(note("forward pre"))
        net.register_forward_hook(note("forward"))
        net.register_full_backward_pre_hook(note("backward pre"))
        net.register_full_backward_hook(note("backward"))
        net.register_state_dict_pre_hook(note("state"))
        results = subject.call(*subject.tensors)
        calls.append(("gradients", gradients(results, subject.leaves)))
        net.state_dict()
        seen.append(calls)
    ours, theirs = seen
    assert [kind for kind, _ in ours] == [kind for kind, _ in theirs]
    assert {"forward pre", "forward", "backward pre", "backward"} <= {kind for kind, _ in ours}
    for (kind, mine), (_, others) in zip(ours, theirs, strict=True):
        for a, b in zip(mine, others, strict=True):
            assert type(a) is type(b)
            if isinstance(a, torch.Tensor) and a.is_floating_point():
                assert_same(kind, a, b)


def test_a_hook_may_change_arguments_and_results():
    subject, changed = Subject("lengths"), Subject("lengths")
    changed.net.register_forward_pre_hook(
        lambda module, args, kwargs: (
            (2 * args[0], *args[1:]),
            {**kwargs, "lengths": [6, 1, 2, 3]},
        ),
        with_kwargs=True,
    )
    changed.net.register_forward_hook(lambda module, args, result: (result[0] + 1, result[1]))
    output, h_n = changed.call(*changed.tensors)
    expected = subject.net(2 * subject.x, subject.hx, lengths=[6, 1, 2, 3])
    assert_same_bits((output, h_n), (expected[0] + 1, expected[1]))


# ---- tracing -------------------------------------------------------------------------------------


class Call(nn.Module):
    """A call whose arguments are all tensors, given by position."""

    def __init__(self, net, names):
        super().__init__()
        self.net, self.names = net, names

    def forward(self, *tensors):
        given = dict(zip(self.names, tensors, strict=True))
        if "packed" not in given:
            return self.net(**given)
        packed = pack_padded_sequence(given["input"], given["packed"], enforce_sorted=False)
        output, h_n = self.net(packed, given["hx"])
        return output.data, h_n


class Output(Call):
    def forward(self, *tensors):
        return super().forward(*tensors)[0]


def arguments(subject, steps, rows):
    """Tensors of another number of steps and rows, by name."""
    pick = torch.Generator().manual_seed(steps * rows)
    states = 1 if subject.cell else len(subject.net._all_weights)
    lengths = torch.randint(1, steps + 1, (rows,), generator=pick)
    lengths[0] = steps
    given = {"input": randn(*([] if subject.cell else [steps]), rows, I)}
    hx = randn(*([] if subject.cell else [states]), rows, H, seed=1)
    others = {"hx": hx, "lengths": lengths, "packed": lengths}
    others["reset"] = torch.rand(steps, rows, generator=pick) < 0.3
    return given | {name: others[name] for name in subject.given}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@every_form
def test_jit_trace_saved_and_loaded_runs_and_learns_for_other_sizes(form, tmp_path):
    """One node for a layer in a direction; time, rows and lengths are those of the call."""
    subject = Subject(form)
    example = arguments(subject, STEPS, ROWS)
    call = Call(subject.net, list(example))
    torch.jit.save(torch.jit.trace(call, tuple(example.values())), tmp_path / "net.pt")
    traced = torch.jit.load(tmp_path / "net.pt")
    layers = 1 if subject.cell else len(subject.net._all_weights)
    assert str(traced.inlined_graph).count("torch_bptt::rnn(") == layers
    for steps, rows in ((STEPS, ROWS), (9, 2), (2, 5)):
        given = arguments(subject, steps, rows)
        given["input"].requires_grad_()
        leaves = [given["input"], *subject.net.parameters()]
        parameters = dict(traced.named_parameters())
        theirs = [given["input"], *(parameters[name] for name, _ in call.named_parameters())]
        got = traced(*given.values())
        if isinstance(got, torch.Tensor):
            got, expected = (got,), (call(*given.values()),)
        else:
            expected = call(*given.values())
        both = gradients(got, theirs), gradients(expected, leaves)
        for mine, other in zip((*got, *both[0]), (*expected, *both[1]), strict=True):
            assert_same("result or gradient", mine, other)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("lengths", [[7, 1], [-1, 1]], ids=str)
def test_jit_trace_looks_at_lengths_when_it_runs(lengths):
    """Also where nothing but the output is used."""
    call = Output(torch_bptt.RNN(I, H, dtype=torch.float64), ["input", "lengths"])
    given = randn(6, 2, I), torch.tensor([6, 1])
    traced = torch.jit.trace(call, given)
    assert_same("output", traced(*given), call(*given))
    with pytest.raises(RuntimeError, match="index out of range"):
        traced(given[0], torch.tensor(lengths))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = torch_bptt.RNN(I, H, 2, alpha=0.3)
        self.cell = torch_bptt.RNNCell(H, H)

    def forward(self, x, h, reset):
        output, h_n = self.rnn(x, h, reset=reset)
        return self.cell(output[-1], h_n[0]) + self.cell(h_n[1])


def test_fx_takes_a_module_for_a_leaf():
    """As it does with modules of torch.nn, whose names it knows."""
    model = Model()
    traced = torch.fx.symbolic_trace(model)
    called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert called == ["rnn", "cell", "cell"]
    for steps, rows in ((6, 4), (3, 1)):
        x, h = torch.randn(steps, rows, I), torch.randn(2, rows, H)
        reset = torch.rand(steps, rows) < 0.3
        assert torch.equal(traced(x, h, reset), model(x, h, reset))
    with pytest.raises(RuntimeError, match="Expected hidden size"):
        traced(x, h[:1], reset)


class OfPacked(nn.Module):
    def __init__(self, package):
        super().__init__()
        self.rnn = package.RNN(I, H)

    def forward(self, data):
        return self.rnn(PackedSequence(data, torch.tensor([3, 2, 1])))[1]


class OfLengths(nn.Module):
    """What is traced is not the input, but how much of it there is."""

    def __init__(self):
        super().__init__()
        self.rnn = torch_bptt.RNN(I, H)
        self.register_buffer("x", torch.randn(STEPS, 2, I))

    def forward(self, length, lengths, reset):
        a = self.rnn(self.x, lengths=[length, 2], need_output=False)[1]
        return a + self.rnn(self.x, lengths=lengths)[1] + self.rnn(self.x, reset=reset)[1]


def test_fx_finds_a_proxy_in_every_argument():
    torch.manual_seed(0)
    for package in (torch_bptt, nn):
        model = OfPacked(package)
        traced, data = torch.fx.symbolic_trace(model), torch.randn(6, I)
        assert [node.op for node in traced.graph.nodes].count("call_module") == 1
        assert torch.equal(traced(data), model(data))
    model = OfLengths()
    traced = torch.fx.symbolic_trace(model)
    for lengths in ([6, 3], [0, 5]):
        given = lengths[0], torch.tensor(lengths), torch.rand(STEPS, 2) < 0.5
        assert torch.equal(traced(*given), model(*given))


def test_fx_notes_the_arguments_that_were_given():
    called = [n for n in torch.fx.symbolic_trace(Model()).graph.nodes if n.op == "call_module"]
    assert [(len(node.args), list(node.kwargs)) for node in called] == [
        (2, ["reset"]),
        (2, []),
        (1, []),
    ]
    called = [n for n in torch.fx.symbolic_trace(OfLengths()).graph.nodes if n.op == "call_module"]
    assert called[0].kwargs["need_output"] is False
    assert [list(node.kwargs)[:1] for node in called] == [["lengths"], ["lengths"], ["reset"]]


class OfConstants(OfLengths):
    def forward(self, x):
        return x + self.rnn(self.x)[0]


def test_fx_makes_a_call_on_constants():
    model = OfConstants()
    expected = model(1)
    traced = torch.fx.symbolic_trace(model)
    assert "call_module" not in [node.op for node in traced.graph.nodes]
    assert torch.equal(traced(1), expected)


@pytest.mark.parametrize("cls", [torch_bptt.RNN, torch_bptt.RNNCell, nn.RNN])
def test_fx_traces_what_contains_a_module_and_not_the_module(cls):
    with pytest.raises(torch.fx.proxy.TraceError):
        torch.fx.symbolic_trace(cls(I, H))
    torch.fx.symbolic_trace(nn.Sequential(cls(I, H)))


# ---- counting ------------------------------------------------------------------------------------


def flops(subject, leaves):
    with FlopCounterMode(display=False) as forward:
        results = subject.call(*subject.tensors)
    with FlopCounterMode(display=False) as backward:
        gradients(results, leaves)
    return forward.get_total_flops(), backward.get_total_flops()


# Not of a packed batch whose hx has no gradient: torch.nn.RNN computes one for the rows that join
# after the first step, and drops it.
@pytest.mark.parametrize(
    ("form", "wanted"),
    [*((form, "all") for form in OF_NN_RNN), ("batch", "parameters"), ("cell", "parameters")],
)
def test_flops_are_those_of_nn_rnn(form, wanted):
    counted = []
    for package in (torch_bptt, nn):
        subject = Subject(form, package=package)
        leaves = subject.leaves if wanted == "all" else list(subject.net.parameters())
        counted.append(flops(subject, leaves))
    assert counted[0] == counted[1]
    assert min(counted[0]) > 0


def test_flops_of_other_forms():
    """Those of the steps that exist. A loop's products: I + H multiply-adds forward for each of
    H units, as many for the weights' gradients and for those of x and the state."""
    rows, states = sum(LENGTHS), 2
    for form in ("lengths", "reset"):
        steps = rows if form == "lengths" else STEPS * ROWS
        forward = 2 * steps * H * (I + H) * states
        subject = Subject(form)
        assert flops(subject, subject.leaves) == (forward, 2 * forward)


@pytest.mark.parametrize("form", ["batch", "layers and directions"])
def test_flops_of_an_ensemble_are_those_of_its_networks(form):
    subject = Subject(form)
    x, *hx = (tensor.detach() for tensor in subject.tensors)
    nets = [subject.net, *(Subject(form).net for _ in range(2))]
    weights, _ = torch.func.stack_module_state(nets)
    weights = {name: weight.detach() for name, weight in weights.items()}

    def slope(weights):
        def loss(weights):
            output, _ = torch.func.functional_call(subject.net, weights, (x, *hx))
            return output.square().sum()

        return torch.func.grad(loss)(weights)

    with FlopCounterMode(display=False) as all_of_them:
        torch.func.vmap(slope)(weights)
    with FlopCounterMode(display=False) as one:
        slope({name: weight[0] for name, weight in weights.items()})
    assert all_of_them.get_total_flops() == 3 * one.get_total_flops() > 0


def test_the_profiler_names_the_operators():
    subject = Subject("batch")
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, acc_events=True) as profile:
        gradients(subject.call(*subject.tensors), subject.leaves)
    found = {event.key for event in profile.key_averages()}
    assert {"torch_bptt::rnn_forward", "torch_bptt::rnn_backward"} <= found
