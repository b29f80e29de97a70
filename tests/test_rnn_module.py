"""torch_bptt.RNN on whole sequences, and as a module, against torch.nn.RNN."""

import copy
import io
import pickle
import warnings
import weakref

import hypothesis.strategies as st
import pytest
import tolerances
import torch
from hypothesis import given
from pairs import assert_same, assert_same_run, examples, networks_with_input, pair, randn, run
from torch import nn

import torch_bptt
from torch_bptt import RNN

ALL = ("tanh", "relu", "sigmoid", "identity")


# ---- numbers


@examples
@given(networks_with_input())
def test_output_and_gradients_are_those_of_nn_rnn(drawn):
    network, input, hx = drawn
    ours, theirs = pair(**network)
    assert_same_run(run(ours, input, hx), run(theirs, input, hx))


@examples
@given(
    networks_with_input(min_layers=2),
    st.sampled_from([0.3, 1.0]),
    st.booleans(),
    st.integers(0, 3),
)
def test_dropout_masks_are_those_of_nn_rnn(drawn, p, training, seed):
    network, input, hx = drawn
    ours, theirs = pair(**network, dropout=p)
    ours.train(training), theirs.train(training)
    assert_same_run(run(ours, input, hx, seed=seed), run(theirs, input, hx, seed=seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_other_dtypes_are_as_exact_as_nn_rnn(nonlinearity, dtype):
    ours, theirs = pair(7, 33, 2, nonlinearity, bidirectional=True)
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    truth = copy.deepcopy(theirs).double()
    input, hx = randn(9, 5, 7).to(dtype), randn(4, 5, 33, seed=1).to(dtype)
    runs = (run(m, input.to(m.weight_ih_l0.dtype), hx.to(m.weight_ih_l0.dtype))
            for m in (ours, truth, theirs))  # fmt: skip
    for (name, got), (_, exact), (_, plain) in zip(*(r.tensors() for r in runs), strict=True):
        # The longest sum: the bias gradient, over all steps and rows; else the inputs of a cell.
        error = tolerances.largest_error(plain, exact)
        tolerances.close_to_truth(name, got, exact, error, K=2 * 33 + 33)


@pytest.mark.parametrize("nonlinearity", ALL)
@pytest.mark.parametrize("alpha", [1.0, 0.25])
def test_nonlinearities_and_leak_follow_the_equation(nonlinearity, alpha):
    f = {"identity": lambda z: z}.get(nonlinearity) or getattr(torch, nonlinearity)
    ours = RNN(3, 4, nonlinearity=nonlinearity, alpha=alpha, dtype=torch.float64)
    input, hx = randn(5, 2, 3), randn(1, 2, 4)

    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            for name, parameter in ours.named_parameters():
                self.register_parameter(name, parameter)

        def forward(self, input, hx):
            h, steps = hx[0], []
            for x in input:
                z = x @ self.weight_ih_l0.T + self.bias_ih_l0
                z = z + h @ self.weight_hh_l0.T + self.bias_hh_l0
                h = (1 - alpha) * h + alpha * f(z)
                steps.append(h)
            return torch.stack(steps), h[None]

    assert_same_run(run(ours, input, hx), run(Loop(), input, hx))


@pytest.mark.parametrize("k", [1, 2, 3, 7])
def test_truncate_is_a_loop_that_detaches(k):
    ours, theirs = pair(3, 4)
    ours.truncate = k
    input, hx = randn(7, 2, 3), randn(1, 2, 4)

    def chunks(input, h):
        outputs = []
        for first in range(0, len(input), k):
            output, h = theirs(input[first : first + k], h if first == 0 else h.detach())
            outputs.append(output)
        return torch.cat(outputs), h

    chunks.named_parameters = theirs.named_parameters
    assert_same_run(run(ours, input, hx), run(chunks, input, hx))


def test_clip_grad_h_clamps_the_gradient_of_every_state():
    ours, theirs = pair(3, 4)
    ours.clip_grad_h = 0.2
    input, hx = randn(6, 2, 3), randn(1, 2, 4)

    def loop(input, h):
        outputs = []
        for x in input.split(1):
            h = theirs(x, h)[1].clone()
            h.register_hook(lambda grad: grad.clamp(-0.2, 0.2))
            outputs.append(h)
        return torch.cat(outputs), h

    loop.named_parameters = theirs.named_parameters
    assert_same_run(run(ours, input, hx), run(loop, input, hx))


@pytest.mark.parametrize(
    "options", [{"alpha": 0.5}, {"truncate": 2}, {"clip_grad_h": 0.1}], ids=str
)
def test_options_reach_every_layer_and_direction(options):
    ours = RNN(3, 4, 2, bidirectional=True, dtype=torch.float64, **options)
    plain = RNN.from_torch(
        ours.__class__(3, 4, 2, bidirectional=True, dtype=torch.float64).to_torch()
    )
    plain.load_state_dict(ours.state_dict())
    input, hx = randn(6, 2, 3), randn(4, 2, 4)

    def by_hand(input, hx):
        h_n = []
        for layer in range(2):
            outputs = []
            for direction, suffix in enumerate(["", "_reverse"]):
                weights = [
                    getattr(plain, f"{name}_l{layer}{suffix}")
                    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
                ]
                output, last = torch_bptt.functional.rnn(
                    input, hx[2 * layer + direction], *weights, reverse=direction == 1, **options
                )
                outputs.append(output)
                h_n.append(last)
            input = torch.cat(outputs, -1)
        return input, torch.stack(h_n)

    by_hand.named_parameters = plain.named_parameters
    got = run(ours, input, hx)
    assert_same_run(got, run(by_hand, input, hx))
    without = run(plain, input, hx)
    assert not torch.allclose(got.gradients["grad of hx"], without.gradients["grad of hx"])


@pytest.mark.parametrize("batch_first", [False, True])
def test_functional_is_one_layer_in_one_direction(batch_first):
    ours, _ = pair(3, 4, bidirectional=True, batch_first=batch_first)
    input, hx = randn(5, 2, 3), randn(2, 2, 4)
    input = input.transpose(0, 1) if batch_first else input
    output, h_n = ours(input, hx)
    for direction, suffix in enumerate(["", "_reverse"]):
        weights = [getattr(ours, f"{n}_l0{suffix}") for n in ("weight_ih", "weight_hh")]
        biases = [getattr(ours, f"{n}_l0{suffix}") for n in ("bias_ih", "bias_hh")]
        options = {"batch_first": batch_first, "reverse": direction == 1}
        for bias in (biases, [biases[0] + biases[1]], [None, biases[0] + biases[1]]):
            got = torch_bptt.functional.rnn(input, hx[direction], *weights, *bias, **options)
            assert_same("output", got[0], output[..., 4 * direction : 4 * direction + 4])
            assert_same("h_n", got[1], h_n[direction])
        one = input[0] if batch_first else input[:, 0]
        got = torch_bptt.functional.rnn(one, hx[direction, 0], *weights, *biases, **options)
        assert_same("h_n of one sequence", got[1], h_n[direction, 0])


def test_one_step_at_a_time_equals_the_whole_call():
    ours, _ = pair(3, 4, 2)
    input, h = randn(6, 2, 3), randn(2, 2, 4)
    output, h_n = ours(input, h)
    for t in range(6):
        step, h = ours(input[t : t + 1], h)
        assert_same(f"output at {t}", step[0], output[t])
    assert_same("h_n", h, h_n)


def test_same_call_same_bits():
    ours, _ = pair(5, 37, 2, bidirectional=True)
    first, second = (run(ours, randn(9, 7, 5), randn(4, 7, 37)) for _ in range(2))
    for (name, a), (_, b) in zip(first.tensors(), second.tensors(), strict=True):
        tolerances.same_bits(name, a, b)


def test_complex_numbers_run_and_say_how():
    torch_bptt.functional._warn_of_complex.cache_clear()
    theirs = nn.RNN(3, 4, 2, bidirectional=True, dtype=torch.complex128)
    ours = RNN.from_torch(theirs)
    input = randn(5, 2, 3).to(torch.complex128) * (1 + 0.5j)
    with pytest.warns(UserWarning, match="no kernels for complex numbers"):
        got = ours(input)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        ours(input)
    for name, mine, other in zip(("output", "h_n"), got, theirs(input), strict=True):
        assert_same(name, mine, other)
    got = torch.autograd.grad(got[0].abs().sum(), list(ours.parameters()))
    expected = torch.autograd.grad(theirs(input)[0].abs().sum(), list(theirs.parameters()))
    for mine, other in zip(got, expected, strict=True):
        assert_same("gradient", mine, other)
    ours.truncate = 2
    with pytest.raises(NotImplementedError, match="truncate must be None for a complex input"):
        ours(input)


# ---- what takes part in the gradient


@pytest.mark.parametrize("wanted", ["input", "hx", "weight_ih_l0", "weight_hh_l1", "bias_ih_l1"])
def test_a_gradient_for_one_alone(wanted):
    ours, theirs = pair(3, 4, 2)
    gradients = []
    for module in (ours, theirs):
        tensors = {"input": randn(5, 2, 3), "hx": randn(2, 2, 4), **dict(module.named_parameters())}
        for tensor in tensors.values():
            tensor.requires_grad_(False)
        tensors[wanted].requires_grad_()
        output, _ = module(tensors["input"], tensors["hx"])
        gradients.append(torch.autograd.grad(output.sum(), tensors[wanted])[0])
    assert_same(wanted, *gradients)


@pytest.mark.parametrize("used", [0, 1], ids=["output", "h_n"])
def test_only_one_result_used(used):
    ours, theirs = pair(3, 4, 2, bidirectional=True)
    gradients = []
    for module in (ours, theirs):
        input, hx = randn(5, 2, 3).requires_grad_(), randn(4, 2, 4).requires_grad_()
        loss = module(input, hx)[used].pow(2).sum()
        leaves = [input, hx, *module.parameters()]
        gradients.append(torch.autograd.grad(loss, leaves))
    for mine, other in zip(*gradients, strict=True):
        assert_same("gradient", mine, other)


def test_output_and_h_n_share_no_memory():
    ours, _ = pair(3, 4)
    with torch.no_grad():
        hx = randn(1, 2, 4)
        output, h_n = ours(randn(5, 2, 3), hx)
        before = output.clone()
        h_n.fill_(7)
    assert torch.equal(output, before)
    assert torch.equal(hx, randn(1, 2, 4))


def test_h_n_may_change_in_place_before_backward():
    ours, theirs = pair(3, 4)
    gradients = []
    for module in (ours, theirs):
        output, h_n = module(randn(5, 2, 3))
        h_n.mul_(2)
        loss = output.sum() + h_n.sum()
        gradients.append(torch.autograd.grad(loss, module.weight_hh_l0)[0])
    assert_same("grad of weight_hh_l0", *gradients)


def test_changing_the_output_in_place_before_backward_raises():
    ours, _ = pair(3, 4)
    output, _ = ours(randn(5, 2, 3))
    output.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_batch_of_no_rows(bidirectional):
    ours, theirs = pair(3, 4, 2, bidirectional=bidirectional)
    got, expected = (run(m, randn(5, 0, 3)) for m in (ours, theirs))
    assert_same_run(got, expected)
    assert got.gradients["grad of weight_hh_l0"].eq(0).all()


def test_gradients_accumulate_over_backward_passes():
    ours, theirs = pair(3, 4)
    for module in (ours, theirs):
        for seed in range(2):
            module(randn(5, 2, 3, seed=seed))[0].sum().backward()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_same("accumulated gradient", mine.grad, other.grad)
    # Both biases have the same gradient, but not in the same memory.
    assert ours.bias_ih_l0.grad.data_ptr() != ours.bias_hh_l0.grad.data_ptr()


STRIDES = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "strided": lambda x: x.repeat(1, 1, 2)[..., ::2],
    "every other row": lambda x: x.repeat(1, 2, 1)[:, ::2],
    "offset": lambda x: torch.cat([x, x])[len(x) :],
    "expanded rows": lambda x: x[:, :1].expand(-1, x.shape[1], -1),
    "expanded steps": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("make", STRIDES.values(), ids=STRIDES)
@pytest.mark.parametrize("layers", [1, 2])
def test_any_strides(make, layers):
    ours, theirs = pair(3, 4, layers)
    input, hx = make(randn(5, 2, 3)), make(randn(5, 2, 4))[:layers]
    assert_same_run(run(ours, input, hx), run(theirs, input, hx))


# ---- as a module


@pytest.mark.parametrize("nonlinearity", ALL)
def test_same_seed_same_weights_and_no_other_draw(nonlinearity):
    options = {"alpha": 0.5, "truncate": 3, "clip_grad_h": 1.0}
    torch.manual_seed(5)
    theirs, state = nn.RNN(3, 4, 2, bidirectional=True), torch.get_rng_state()
    torch.manual_seed(5)
    ours = RNN(3, 4, 2, nonlinearity, bidirectional=True, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)
    ours.reset_parameters()
    theirs.reset_parameters()
    assert not torch.equal(ours.weight_hh_l0, theirs.weight_hh_l0)


def test_positional_arguments_stand_where_documented():
    rnn = RNN(3, 4, 2, "relu", False, True, 0.5, True, "meta", torch.float64)
    assert (rnn.input_size, rnn.hidden_size, rnn.num_layers) == (3, 4, 2)
    assert (rnn.nonlinearity, rnn.mode, rnn.bias, rnn.batch_first) == (
        "relu",
        "RNN_RELU",
        False,
        True,
    )
    assert (rnn.dropout, rnn.bidirectional) == (0.5, True)
    assert (rnn.weight_ih_l0.device.type, rnn.weight_ih_l0.dtype) == ("meta", torch.float64)


@pytest.mark.parametrize("bias", [True, False])
def test_attributes_are_those_of_nn_rnn(bias):
    ours, theirs = pair(3, 4, 2, bidirectional=1, bias=bias)
    names = {name for name in vars(theirs) if name not in ("_flat_weights", "_flat_weight_refs")}
    assert {"mode", "nonlinearity", "proj_size", "_all_weights", "_flat_weights_names"} <= names
    for name in names - {"_parameters"}:
        mine, other = getattr(ours, name), getattr(theirs, name)
        assert mine == other, name
        assert type(mine) is type(other), name
    for mine, other in zip(ours.all_weights, theirs.all_weights, strict=True):
        assert [weight.shape for weight in mine] == [weight.shape for weight in other]
    assert all(a is b for a, b in zip(ours._flat_weights, ours.parameters(), strict=True))
    assert isinstance(ours, nn.RNNBase)
    ours.flatten_parameters()


@pytest.mark.parametrize("nonlinearity", ALL)
def test_mode_names_the_nonlinearity(nonlinearity):
    assert RNN(3, 4, nonlinearity=nonlinearity).mode == f"RNN_{nonlinearity.upper()}"


def test_repr():
    same = {
        "num_layers": 2,
        "bias": False,
        "batch_first": True,
        "dropout": 0.5,
        "bidirectional": True,
    }
    assert repr(RNN(3, 4, **same)) == repr(nn.RNN(3, 4, **same))
    assert repr(RNN(3, 4)) == "RNN(3, 4)"
    more = {"nonlinearity": "relu", "alpha": 0.5, "truncate": 3, "clip_grad_h": 1.0}
    assert repr(RNN(3, 4, **more)) == (
        "RNN(3, 4, nonlinearity=relu, alpha=0.5, truncate=3, clip_grad_h=1.0)"
    )


def test_state_dict_goes_both_ways():
    ours, theirs = RNN(3, 4, 2, bidirectional=True), nn.RNN(3, 4, 2, bidirectional=True)
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(theirs.weight_hh_l1_reverse, ours.weight_hh_l1_reverse)
    ours.load_state_dict(nn.RNN(3, 4, 2, bidirectional=True).state_dict(), assign=True)
    assert not torch.equal(theirs.weight_hh_l1_reverse, ours.weight_hh_l1_reverse)
    with pytest.raises(RuntimeError, match=r"Missing key.*weight_ih_l1"):
        ours.load_state_dict(nn.RNN(3, 4, bidirectional=True).state_dict())


def test_assigning_a_parameter_takes_effect():
    ours, theirs = pair(3, 4, 2)
    fresh = nn.Parameter(randn(4, 4))
    for module in (ours, theirs):
        module(randn(5, 2, 3))
        module.weight_hh_l1 = fresh
        assert module._flat_weights[5] is fresh
    assert_same_run(run(ours, randn(5, 2, 3)), run(theirs, randn(5, 2, 3)))


def test_tied_weights():
    ours, theirs = pair(4, 4, 2)
    for module in (ours, theirs):
        module.weight_hh_l1 = module.weight_hh_l0
        module.weight_ih_l1 = module.weight_ih_l0
    assert len(list(ours.parameters())) == 6
    assert_same_run(run(ours, randn(5, 2, 4)), run(theirs, randn(5, 2, 4)))


def test_a_deleted_parameter_is_missed():
    ours, _ = pair(3, 4, 2)
    del ours.weight_hh_l1
    with pytest.raises(AttributeError, match="weight_hh_l1"):
        ours(randn(5, 2, 3))


@pytest.mark.parametrize("how", ["pickle", "torch.save", "deepcopy"])
def test_copies_are_independent_and_whole(how):
    ours = RNN(3, 4, 2, "sigmoid", alpha=0.5, truncate=2, clip_grad_h=0.3, dtype=torch.float64)
    ours.eval()
    if how == "pickle":
        copied = pickle.loads(pickle.dumps(ours))
    elif how == "torch.save":
        file = io.BytesIO()
        torch.save(ours, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    else:
        copied = copy.deepcopy(ours)
    assert repr(copied) == repr(ours)
    assert copied.training is False
    assert_same_run(run(copied, randn(5, 2, 3)), run(ours, randn(5, 2, 3)))
    with torch.no_grad():
        copied.weight_hh_l0.zero_()
    assert ours.weight_hh_l0.abs().sum() > 0
    assert copied._flat_weights[1] is copied.weight_hh_l0


def test_states_saved_before_an_option_existed_still_load():
    state = RNN(3, 4).__getstate__()
    for name in ("alpha", "truncate", "clip_grad_h", "proj_size"):
        del state[name]
    old = RNN.__new__(RNN)
    old.__setstate__(state)
    assert (old.alpha, old.truncate, old.clip_grad_h, old.proj_size) == (1.0, None, None, 0)
    old(torch.ones(5, 2, 3))


def test_to_moves_parameters_and_flat_weights():
    ours = RNN(3, 4).to(torch.float64)
    assert all(weight.dtype == torch.float64 for weight in ours._flat_weights)
    assert ours(randn(5, 2, 3))[0].dtype == torch.float64


def test_replicas_for_data_parallel_have_their_own_weights():
    ours, _ = pair(3, 4)
    replica = ours._replicate_for_data_parallel()
    replica.weight_hh_l0 = nn.Parameter(torch.zeros(4, 4, dtype=torch.float64))
    assert ours.weight_hh_l0.abs().sum() > 0
    assert replica._flat_weights[1].abs().sum() == 0


@pytest.mark.parametrize("training", [True, False])
def test_from_torch_and_to_torch_share_everything(training):
    _, theirs = pair(3, 4, 2, "relu", batch_first=True, dropout=0.5, bidirectional=True)
    theirs.train(training)
    theirs.bias_hh_l0.requires_grad_(False)
    state = torch.get_rng_state()
    ours = RNN.from_torch(theirs)
    back = ours.to_torch()
    assert torch.equal(torch.get_rng_state(), state)
    assert type(ours) is RNN
    assert type(back) is nn.RNN
    assert repr(back) == repr(theirs)
    for module in (ours, back):
        assert module.training is training
        assert all(a is b for a, b in zip(module.parameters(), theirs.parameters(), strict=True))
        module(randn(2, 5, 3))
    theirs.bias_hh_l0.requires_grad_()
    assert_same_run(run(ours, randn(2, 5, 3)), run(theirs, randn(2, 5, 3)))
    assert_same_run(run(back, randn(2, 5, 3)), run(theirs, randn(2, 5, 3)))
    # Assigning a parameter to one leaves the other alone.
    ours.weight_hh_l0 = nn.Parameter(torch.zeros(4, 4))
    assert theirs.weight_hh_l0.abs().sum() > 0


def test_from_torch_carries_hooks_and_their_handles():
    _, theirs = pair(3, 4)
    calls = []
    handle = theirs.register_forward_hook(lambda module, args, output: calls.append(type(module)))
    ours = RNN.from_torch(theirs)
    ours(randn(5, 2, 3))
    handle.remove()
    ours(randn(5, 2, 3))
    assert calls == [RNN]


def test_from_torch_carries_parametrizations():
    _, theirs = pair(3, 4)
    nn.utils.parametrizations.orthogonal(theirs, "weight_hh_l0")
    ours = RNN.from_torch(theirs)
    assert isinstance(ours, RNN)
    assert_same_run(run(ours, randn(5, 2, 3)), run(theirs, randn(5, 2, 3)))
    nn.utils.parametrize.remove_parametrizations(ours, "weight_hh_l0")
    assert type(ours) is RNN


# ---- gradients as tensors, and what may happen to tensors before backward


@pytest.mark.parametrize("mode", ["backward", "create_graph", "func"])
@pytest.mark.parametrize("cell", [False, True])
@pytest.mark.parametrize("loss", [torch.sqrt, torch.special.entr], ids=["sqrt", "entr"])
def test_relus_that_are_off_stop_infinite_gradients(loss, cell, mode):
    """d sqrt(h)/dh is infinite at h = 0, and goes no further, as in nn.RNN."""
    ours, theirs = pair(3, 4, nonlinearity="relu")
    if cell:
        theirs = nn.RNNCell(3, 4, nonlinearity="relu", dtype=torch.float64)
        ours = torch_bptt.convert(copy.deepcopy(theirs))
    x = randn(20, 3) if cell else randn(20, 2, 3)

    def gradients(module):
        parameters = dict(module.named_parameters())

        def total(parameters):
            output = torch.func.functional_call(module, parameters, (x,))
            output = output if cell else output[0]
            assert 0.1 < (output == 0).double().mean() < 0.9
            return loss(output).sum()

        if mode == "func":
            return tuple(torch.func.grad(total)(parameters).values())
        graph = mode == "create_graph"
        return torch.autograd.grad(total(parameters), parameters.values(), create_graph=graph)

    for (name, _), got, want in zip(
        theirs.named_parameters(), gradients(ours), gradients(theirs), strict=True
    ):
        assert want.isfinite().all()
        assert_same(name, got.detach(), want.detach())


@pytest.mark.parametrize("mode", ["backward", "create_graph", "func", "compiled"])
@pytest.mark.parametrize("options", [{}, {"alpha": 0.5}, {"truncate": 2}], ids=str)
def test_each_bias_has_a_gradient_of_its_own(options, mode):
    """Who scales gradients in place, as clipping by hand does, does it once to each."""
    ours = RNN(3, 4, **options)
    x, parameters = torch.randn(5, 2, 3), dict(ours.named_parameters())

    def total(parameters):
        return torch.func.functional_call(ours, parameters, (x,))[0].sum()

    if mode == "func":
        gradients = torch.func.grad(total)(parameters)
    else:
        call = torch.compile(total, backend="aot_eager") if mode == "compiled" else total
        graph = mode == "create_graph"
        found = torch.autograd.grad(call(parameters), parameters.values(), create_graph=graph)
        gradients = dict(zip(parameters, found, strict=True))
    of_ih, of_hh = gradients["bias_ih_l0"].detach(), gradients["bias_hh_l0"].detach()
    assert torch.equal(of_ih, of_hh)
    of_ih.mul_(2)
    assert torch.equal(of_ih, 2 * of_hh)


def frozen_with_x_reused(module):
    module.requires_grad_(False)
    x, hx = randn(4, 3, 5), randn(1, 3, 7).requires_grad_()
    output, _ = module(x, hx)
    x.zero_()
    return torch.autograd.grad(output.sum(), hx)


def frozen_on_inference_tensors(module):
    module.requires_grad_(False)
    hx = randn(1, 3, 7).requires_grad_()
    with torch.inference_mode():
        x = randn(4, 3, 5)
    return torch.autograd.grad(module(x, hx)[0].sum(), hx)


def weight_ih_changed(module):
    output, _ = module(randn(4, 3, 5))
    with torch.no_grad():
        module.weight_ih_l0.mul_(0.9)
    return torch.autograd.grad(output.sum(), module.parameters())


@pytest.mark.parametrize(
    "use",
    [frozen_with_x_reused, frozen_on_inference_tensors, weight_ih_changed],
    ids=lambda use: use.__name__,
)
def test_what_backward_does_not_read_may_change(use):
    """x is read for the gradient of weight_ih alone, and weight_ih for that of x."""
    ours, theirs = pair(5, 7)
    for got, want in zip(use(ours), use(theirs), strict=True):
        assert_same(use.__name__, got, want)


def test_a_frozen_weight_ih_lets_the_input_go():
    ours, _ = pair(5, 7)
    ours.weight_ih_l0.requires_grad_(False)
    x = randn(4, 3, 5)
    seen = weakref.ref(x.untyped_storage())
    output, _ = ours(x)
    del x
    assert seen() is None
    output.sum().backward()


@pytest.mark.parametrize("name", ["weight_hh", "input", "weight_hh before backward"])
def test_memory_that_was_given_back_is_an_error(name):
    """As FSDP gives back that of a weight which it reshards; to read it would be a crash."""
    ours, _ = pair(64, 64)
    x = randn(50, 8, 64)
    memory = (x if name == "input" else ours.weight_hh_l0).untyped_storage()
    if "before" in name:
        output, _ = ours(x)
        memory.resize_(0)
        with pytest.raises(RuntimeError, match="must have its memory, expected a storage of at"):
            output.sum().backward()
    else:
        memory.resize_(0)
        with pytest.raises(RuntimeError, match="must have its memory, expected a storage of at"):
            ours(x)
