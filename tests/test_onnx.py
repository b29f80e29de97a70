"""torch.onnx.export, run in ONNX Runtime. requirements-onnx.txt has what it takes."""

import os

import pytest
import torch
from torch import nn
from torch.export import Dim

import torch_bptt

pytest.importorskip("onnxscript", reason="needs onnxscript: make test-onnx")
onnx = pytest.importorskip("onnx", reason="needs onnx: make test-onnx")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime: make test-onnx")

# PyTorch's own, and those of the libraries that it exports with.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:Exporting a model to ONNX with a batch_size:UserWarning"),
]
I, H = 3, 5  # noqa: E741
SHAPES = [(7, 6), (12, 2), (1, 4), (4, 1)]


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")


class Run(nn.Module):
    """A call with arguments of its own."""

    def __init__(self, module, **arguments):
        super().__init__()
        self.module, self.arguments = module, arguments

    def forward(self, x):
        return self.module(x, **{name: make(x) for name, make in self.arguments.items()})


class TwoSteps(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x):
        h = self.cell(x[0])
        return self.cell(x[-1], h), h


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = torch_bptt.RNN(I, H)

    def forward(self, x):
        weights = [getattr(self.net, name) for name in self.net._all_weights[0]]
        return torch_bptt.functional.rnn(x, None, *weights, reverse=True, nonlinearity="sigmoid")


def export(model, path, dynamic=True, **options):
    shapes = ({0: Dim("steps"), 1: Dim("rows")},) if dynamic else None
    torch.onnx.export(
        model.eval(), (torch.randn(*SHAPES[0], I),), path, input_names=["x"], verbose=False,
        **({"dynamic_shapes": shapes} if options.get("dynamo", True) else {}), **options,
    )  # fmt: skip
    return [node.op_type for node in onnx.load(path).graph.node]


def check(model, path, shapes):
    """Against the model itself, in float32: ONNX Runtime has no RNN of float64."""
    session = onnxruntime.InferenceSession(path)
    for shape in shapes:
        x = torch.randn(*shape, I)
        with torch.no_grad():
            expected = model(x)
        for got, wanted in zip(session.run(None, {"x": x.numpy()}), expected, strict=True):
            # Both add at most 10 + 2 products a step, in float32: 12 steps with states below 1
            # and matrices that stretch less than 2 steps' worth of 5e-6 in all.
            torch.testing.assert_close(torch.from_numpy(got), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        (torch_bptt.RNN(I, H), 1),
        (torch_bptt.RNN(I, H, bias=False, nonlinearity="relu", truncate=3, clip_grad_h=1.0), 1),
        (torch_bptt.RNN(I, H, 2, bidirectional=True, nonlinearity="sigmoid", learn_h0=True), 4),
        (torch_bptt.RNN(I, H, 2, dropout=0.5, recurrent_dropout=0.5, noise=0.1), 2),
        (Run(torch_bptt.RNN(I, H, nonlinearity="identity"),
             hx=lambda x: x.new_ones(1, x.shape[1], H)), 1),
        (TwoSteps(torch_bptt.RNNCell(I, H)), 2),
        (Functional(), 1),
    ],
    ids=str,
)  # fmt: skip
def test_every_layer_is_one_operator_for_all_shapes(model, layers, tmp_path):
    path = str(tmp_path / "model.onnx")
    assert export(model, path).count("RNN") == layers
    check(model, path, SHAPES)


def test_numbers_are_those_of_a_loop(tmp_path):
    """Not only the module's own: a loop from the definition says the same."""
    import plain

    net, path = torch_bptt.RNN(I, H, 2, bidirectional=True, learn_h0=True), str(tmp_path / "m")
    nn.init.uniform_(net.h0)
    export(net, path)
    session = onnxruntime.InferenceSession(path)
    x = torch.randn(12, 2, I)
    for got, wanted in zip(session.run(None, {"x": x.numpy()}), plain.run(net, x), strict=True):
        torch.testing.assert_close(torch.from_numpy(got), wanted.detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dynamo", [True, False])
def test_to_torch(dynamo, tmp_path):
    """PyTorch exports torch.nn.RNN for the length it sees, or in the old way for all."""
    net, path = torch_bptt.RNN(I, H, 2, bidirectional=True), str(tmp_path / "model.onnx")
    export(net.to_torch(), path, dynamic=False, dynamo=dynamo)
    check(net, path, SHAPES[:1])


def test_nn_rnn_is_exported_for_the_length_it_sees(tmp_path):
    """Whatever dynamic_shapes says: the file is refused sequences of another length."""
    path = str(tmp_path / "model.onnx")
    assert "RNN" not in export(nn.RNN(I, H), path)
    session = onnxruntime.InferenceSession(path)
    steps, rows = SHAPES[0]
    assert session.run(None, {"x": torch.zeros(steps, rows + 1, I).numpy()})[0].shape[0] == steps
    with pytest.raises(Exception, match=f"Got: {steps + 1} Expected: {steps}"):
        session.run(None, {"x": torch.zeros(steps + 1, rows, I).numpy()})


REFUSED = [
    ("alpha must be 1", torch_bptt.RNN(I, H, alpha=0.5)),
    ("reset and lengths must be None", Run(torch_bptt.RNN(I, H), reset=lambda x: x[..., 0] > 0)),
    (
        "reset and lengths must be None",
        Run(torch_bptt.RNN(I, H), lengths=lambda x: (x[0, :, 0] > 0).long()),
    ),
    ("checkpoint must be None", torch_bptt.RNN(I, H, checkpoint=3)),
    ("input must be real", torch_bptt.RNN(I, H, dtype=torch.complex64)),
]


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature:UserWarning")
@pytest.mark.parametrize(("message", "model"), REFUSED, ids=[m for m, _ in REFUSED])
def test_what_onnx_cannot_say_is_refused_by_name(message, model, tmp_path):
    dtype = next(model.parameters()).dtype
    with pytest.raises(Exception, match=message):
        torch.onnx.export(
            model.eval(), (torch.randn(7, 6, I).to(dtype),), str(tmp_path / "m"), verbose=False
        )
    assert not os.listdir(tmp_path)


def test_the_old_exporter_is_refused_by_name(tmp_path):
    model = TwoSteps(torch_bptt.RNNCell(I, H))
    with pytest.raises(NotImplementedError, match="dynamo must be True"):
        export(model, str(tmp_path / "m"), dynamic=False, dynamo=False)
