"""convert: models with torch.nn.RNN inside, before and after."""

import pytest
import torch
from pairs import assert_same, randn
from torch import nn

from torch_bptt import RNN, RNNCell, convert


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.RNN(3, 4, 2, bidirectional=True)
        self.rest = nn.ModuleDict({"deep": nn.ModuleList([nn.RNN(8, 4), nn.Linear(4, 4)])})
        self.cell = nn.RNNCell(4, 4, nonlinearity="relu")
        self.nothing = None
        self.register_module("no_module", None)
        self.again = self.first

    def forward(self, x):
        x, _ = self.first(x)
        x, h = self.rest["deep"][0](x)
        return self.cell(self.rest["deep"][1](x[-1]), h[0]) + self.again(randn(2, 1, 3))[0].sum()


def test_a_model_gives_and_learns_the_same():
    model = Model().double()
    names = list(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = model(randn(5, 2, 3))
    reference = Model().double()
    reference.load_state_dict(model.state_dict())
    reference_optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)

    assert convert(model) is model
    assert [type(m) for m in (model.first, model.rest["deep"][0], model.cell)] == [
        RNN,
        RNN,
        RNNCell,
    ]
    assert type(model.rest["deep"][1]) is nn.Linear
    assert model.again is model.first
    assert model.no_module is None
    assert list(model.state_dict()) == names
    assert_same("output", model(randn(5, 2, 3)), expected)

    for net, step in ((model, optimizer), (reference, reference_optimizer)):
        net(randn(5, 2, 3)).sum().backward()
        step.step()
    assert not torch.equal(model(randn(5, 2, 3)), expected)
    assert_same("output after a step", model(randn(5, 2, 3)), reference(randn(5, 2, 3)))


def test_a_lone_module_is_returned_converted():
    rnn, cell = nn.RNN(3, 4), nn.RNNCell(3, 4)
    assert type(convert(rnn)) is RNN
    assert convert(rnn).weight_hh_l0 is rnn.weight_hh_l0
    assert type(convert(cell)) is RNNCell


def test_twice_is_once():
    model = convert(nn.Sequential(nn.RNN(3, 4)))
    first = model[0]
    assert convert(model)[0] is first


def test_shared_by_two_parents():
    shared = nn.RNN(3, 4)
    model = nn.ModuleList([nn.Sequential(shared), nn.ModuleDict({"a": shared})])
    convert(model)
    assert model[0][0] is model[1]["a"]
    assert type(model[0][0]) is RNN


def test_derived_classes_are_left_alone():
    class Derived(nn.RNN):
        pass

    model = convert(nn.ModuleList([Derived(3, 4), nn.GRU(3, 4), nn.LSTM(3, 4), nn.Linear(3, 4)]))
    assert [type(m) for m in model] == [Derived, nn.GRU, nn.LSTM, nn.Linear]


def test_inside_of_a_derived_class():
    class Holder(nn.RNN):
        def __init__(self):
            super().__init__(3, 4)
            self.inner = nn.RNN(3, 4)

    model = convert(Holder())
    assert type(model) is Holder
    assert type(model.inner) is RNN


def test_parametrized_modules_are_converted():
    model = nn.Sequential(nn.RNN(3, 4).double())
    nn.utils.parametrizations.weight_norm(model[0], "weight_hh_l0")
    expected = model(randn(5, 2, 3))[0]
    convert(model)
    assert isinstance(model[0], RNN)
    assert_same("output", model(randn(5, 2, 3))[0], expected)


def test_training_flag_and_frozen_parameters_stay():
    model = nn.Sequential(nn.RNN(3, 4)).eval()
    model[0].bias_ih_l0.requires_grad_(False)
    convert(model)
    assert not model[0].training
    assert not model[0].bias_ih_l0.requires_grad


def test_a_compiled_module_is_replaced_by_one_that_runs():
    """``nn.Module.compile`` leaves a call in the module that runs the module it was made for."""
    model = nn.Sequential(nn.RNN(3, 4))
    model[0].compile(backend="eager")
    convert(model)
    lengths = torch.tensor([5, 2])
    model[0](randn(5, 2, 3).float(), lengths=lengths)
    theirs = model[0].to_torch()
    assert theirs._compiled_call_impl is None


def test_what_torch_compile_returned_is_refused():
    model = nn.Sequential(torch.compile(nn.RNN(3, 4), backend="eager"))
    with pytest.raises(ValueError, match="must be converted before it is compiled, got a RNN"):
        convert(model)
