"""ONNX Runtime: the forward pass as a graph of ONNX's operator RNN, weights as constants."""

import torch
from torch import Tensor

from providers.peer import Peer
from torch_bptt.bench import Case, Problem, Step


class OnnxRuntime(Peer):
    name = "onnxruntime"
    needs = ("onnxruntime", "onnx")

    def unable(self, case: Case, dtype: torch.dtype, backward: bool) -> str | None:
        if backward:
            return "forward only"
        if case.uneven:
            return "no packed sequences"
        if dtype != torch.float32:
            return "float32 only"
        return None

    def prepare(self, problem: Problem, backward: bool) -> Step:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(
            graph(problem), options, providers=["CPUExecutionProvider"]
        )
        inputs = {"x": problem.x.numpy(), "h0": problem.h0.numpy()}
        return lambda: session.run(["output", "h_n"], inputs)

    def tensors(self, results: list) -> tuple[Tensor, ...]:
        return tuple(map(torch.from_numpy, results))


def graph(problem: Problem) -> bytes:
    """The model: for each layer an RNN, whose output (T, D, B, H) is brought to (T, B, D * H)."""
    from onnx import TensorProto, helper, numpy_helper

    case, D = problem.case, problem.case.directions
    activation = {"tanh": "Tanh", "relu": "Relu"}[case.nonlinearity]
    parameters = list(problem.state.values())
    constants = {"shape": torch.tensor([0, 0, D * case.H])}
    layers = range(case.num_layers)
    states = ["h0_" + str(n) for n in layers], ["h_n_" + str(n) for n in layers]
    nodes = [helper.make_node("Split", ["h0"], states[0], axis=0, num_outputs=case.num_layers)]
    x = "x"
    for n, h0, h_n in zip(layers, *states, strict=True):
        output = f"output_{n}" if n + 1 < case.num_layers else "output"
        of_layer = parameters[4 * D * n : 4 * D * (n + 1)]
        w_ih, w_hh, b_ih, b_hh = (torch.stack(of_layer[kind::4]) for kind in range(4))
        weights = {f"w_ih_{n}": w_ih, f"w_hh_{n}": w_hh, f"b_{n}": torch.cat([b_ih, b_hh], dim=1)}
        constants |= weights
        nodes += [
            helper.make_node(
                "RNN",
                [x, *weights, "", h0],
                [f"steps_{n}", h_n],
                hidden_size=case.H,
                activations=[activation] * D,
                direction="bidirectional" if D == 2 else "forward",
            ),
            helper.make_node("Transpose", [f"steps_{n}"], [f"rows_{n}"], perm=(0, 2, 1, 3)),
            helper.make_node("Reshape", [f"rows_{n}", "shape"], [output]),
        ]
        x = output
    nodes.append(helper.make_node("Concat", states[1], ["h_n"], axis=0))

    def described(**tensors: torch.Size) -> list:
        float32 = TensorProto.FLOAT
        return [helper.make_tensor_value_info(n, float32, shape) for n, shape in tensors.items()]

    model = helper.make_model(
        helper.make_graph(
            nodes,
            case.name,
            described(x=problem.x.shape, h0=problem.h0.shape),
            described(output=problem.grad_output.shape, h_n=problem.h0.shape),
            [numpy_helper.from_array(value.numpy(), name) for name, value in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=8,
    )
    return model.SerializeToString()
