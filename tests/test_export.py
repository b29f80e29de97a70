"""torch.export and AOTInductor: made here, run in a process of its own, compared with a loop."""

import os
import subprocess
import sys
from pathlib import Path

import plain
import pytest
import torch
from pairs import assert_same, randn
from torch import nn
from torch.export import Dim

import torch_bptt

# PyTorch's own: what it still compiles the old way, and how it copies its own trees.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is:FutureWarning"),
]
ROOT = Path(torch_bptt.__file__).parent.parent
I, H = 3, 5  # noqa: E741
SHAPES = [(7, 6), (2, 9), (30, 2), (1, 4), (4, 1), (1, 1)]


def uniform(module):
    for parameter in module.double().parameters():
        nn.init.uniform_(parameter, -0.4, 0.4)
    return module


class Everything(nn.Module):
    """RNNs with all that takes part in a forward pass, functional.rnn and RNNCell, stacked."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.plain = torch_bptt.RNN(I, H)
        self.rnn = torch_bptt.RNN(H, H, 2, bidirectional=True, alpha=0.3, learn_h0=True)
        self.functional = torch_bptt.RNN(2 * H, H, nonlinearity="sigmoid")
        self.cell = torch_bptt.RNNCell(H, H, nonlinearity="relu")
        uniform(self)

    def forward(self, x, hx, lengths, reset):
        x, _ = self.plain(x, hx)
        x, h_n = self.rnn(x, lengths=lengths, reset=reset)
        weights = [getattr(self.functional, name) for name in self.functional._all_weights[0]]
        x, last = torch_bptt.functional.rnn(x, None, *weights, nonlinearity="sigmoid")
        return x, h_n, self.cell(last, hx[0])

    def expected(self, x, hx, lengths, reset):
        x, _ = plain.run(self.plain, x, hx)
        x, h_n = plain.run(self.rnn, x, lengths=lengths, reset=reset)
        x, last = plain.run(self.functional, x)
        cell = self.cell
        z = last[0] @ cell.weight_ih.T + hx[0] @ cell.weight_hh.T + cell.bias_ih + cell.bias_hh
        return x, h_n, torch.relu(z)


def arguments(steps, rows):
    pick = torch.Generator().manual_seed(steps)
    return (
        randn(steps, rows, I),
        randn(1, rows, H, seed=1),
        torch.randint(0, steps + 1, (rows,), generator=pick),
        torch.rand(steps, rows, generator=pick) < 0.3,
    )


def exported(model, strict=False):
    steps, rows = Dim("steps", min=1), Dim("rows", min=1)
    shapes = {0: steps, 1: rows}, {1: rows}, {0: rows}, {0: steps, 1: rows}
    return torch.export.export(model, arguments(*SHAPES[0]), dynamic_shapes=shapes, strict=strict)


def check(model, call):
    for shape in SHAPES:
        given = arguments(*shape)
        for index, (got, expected) in enumerate(
            zip(call(*given), model.expected(*given), strict=True)
        ):
            assert_same(f"result {index} of {shape}", got, expected)


@pytest.mark.parametrize("strict", [False, True])
def test_exported(strict):
    model = Everything()
    check(model, exported(model, strict).module())


def test_an_exported_layer_is_one_node():
    shapes = ({0: Dim("steps"), 1: Dim("rows")},)
    program = torch.export.export(
        torch_bptt.RNN(I, H), (torch.randn(7, 6, I),), None, dynamic_shapes=shapes
    )
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    assert [str(node.target) for node in calls if "getitem" not in node.name] == [
        "torch_bptt.rnn.default"
    ]


def test_exported_programs_train():
    model = torch_bptt.RNN(I, H).double()
    x = randn(7, 6, I)
    program = torch.export.export(model, (x,)).module()
    for call in (program, lambda x: plain.run(model, x)):
        call(x)[0].pow(2).sum().backward()
    for name, parameter in program.named_parameters():
        assert_same(f"gradient of {name}", parameter.grad, model.get_parameter(name).grad)


RUN_FRESH = """
import sys, torch
import torch_bptt  # which registers the operators

kind, file, given, results = sys.argv[1:]
load = {
    "export": lambda: torch.export.load(file).module(),
    "aoti": lambda: torch._inductor.aoti_load_package(file),
}[kind]
call = load()
with torch.no_grad():
    torch.save([tuple(call(*each)) for each in torch.load(given)], results)
"""


@pytest.mark.parametrize("kind", ["export", "aoti"])
def test_in_a_fresh_process(kind, tmp_path):
    model = Everything()
    file, given, results = (str(tmp_path / name) for name in ("model.pt2", "given", "results"))
    torch.save([arguments(*shape) for shape in SHAPES], given)
    if kind == "export":
        torch.export.save(exported(model), file)
    else:
        with torch.no_grad():
            torch._inductor.aoti_compile_and_package(exported(model), package_path=file)
    subprocess.run(
        [sys.executable, "-c", RUN_FRESH, kind, file, given, results],
        check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    results = iter(torch.load(results))
    check(model, lambda *_: next(results))


def test_lengths_beyond_the_input_are_seen_when_it_runs():
    call = exported(Everything()).module()
    x, hx, lengths, reset = arguments(*SHAPES[0])
    with pytest.raises(RuntimeError, match="lengths must lie within the steps of input"):
        call(x, hx, lengths + 8, reset)


def test_what_has_no_trace_is_named():
    net = torch_bptt.RNN(I, H, checkpoint=True)
    with pytest.raises(NotImplementedError, match="checkpoint must be None"):
        torch.export.export(net, (torch.randn(7, 6, I),))
