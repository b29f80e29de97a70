"""What a call costs beyond its kernels, counted: nodes of the autograd graph, operators, views."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from torch_bptt import RNN, RNNCell

CALLS = {
    "RNN": (RNN(3, 4), (torch.randn(5, 2, 3),)),
    "RNN with hx": (RNN(3, 4), (torch.randn(5, 2, 3), torch.randn(1, 2, 4))),
    "RNNCell": (RNNCell(3, 4), (torch.randn(2, 3),)),
    "RNNCell with hx": (RNNCell(3, 4), (torch.randn(2, 3), torch.randn(2, 4))),
}


class Operators(TorchDispatchMode):
    """Notes every operator that runs, but for autograd's own: it detaches an output it saves."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name() != "aten::detach":
            self.seen.append(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("module", "inputs"), CALLS.values(), ids=CALLS)
def test_one_operator_forward_and_one_backward(module, inputs):
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    leaves = [*inputs, *module.parameters()]
    with Operators() as forward:
        result = module(*inputs)
    outputs = result if isinstance(result, tuple) else (result,)
    directions = [torch.ones_like(output) for output in outputs]
    with Operators() as backward:
        torch.autograd.grad(outputs, leaves, directions)
    assert forward.seen == ["torch_bptt::rnn_forward"]
    # The copy is the second bias's gradient.
    assert backward.seen == ["torch_bptt::rnn_backward", "aten::clone"]


@pytest.mark.parametrize(("module", "inputs"), CALLS.values(), ids=CALLS)
def test_one_node_between_results_and_leaves(module, inputs):
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    result = module(*inputs)
    outputs = result if isinstance(result, tuple) else (result,)
    (node,) = {output.grad_fn for output in outputs}
    assert "RNNNode" in node.name()  # in C++; the Function in Python takes longer
    reached = [edge.variable for edge, _ in node.next_functions if edge is not None]
    leaves = [*inputs, *module.parameters()]
    assert {id(tensor) for tensor in reached} == {id(tensor) for tensor in leaves}
    assert not any(output._is_view() for output in outputs)


@pytest.mark.parametrize(("module", "inputs"), CALLS.values(), ids=CALLS)
def test_one_operator_without_a_graph(module, inputs):
    with torch.no_grad(), Operators() as forward:
        module(*inputs)
    assert forward.seen == ["torch_bptt::rnn_forward"]
