"""JAX: jitted `lax.scan`, with the products of the input hoisted out of the scan.

XLA runs in as many threads as the process had processors when it started; see threads.py.
"""

import torch
from torch import Tensor

from providers.peer import Peer
from torch_bptt.bench import Case, Problem, Step


class JaxScan(Peer):
    name = "jax.lax.scan"
    needs = ("jax",)

    def unable(self, case: Case, dtype: torch.dtype, backward: bool) -> str | None:
        if case.uneven:
            return "no packed sequences"
        if dtype == torch.float64:
            return "no float64, unless all of JAX is switched to it"
        return None

    def prepare(self, problem: Problem, backward: bool) -> Step:
        import jax
        from jax import lax
        from jax import numpy as jnp

        case = problem.case
        activation = {"tanh": jnp.tanh, "relu": jax.nn.relu}[case.nonlinearity]

        def scan(x, h0, w_ih, w_hh, b_ih, b_hh, reverse):
            """One layer in one direction."""

            def step(h, drive):
                h = activation(drive + h @ w_hh.T)
                return h, h

            return lax.scan(step, h0, x @ w_ih.T + (b_ih + b_hh), reverse=reverse)

        def forward(x, h0, parameters):
            h_n = []
            for _ in range(case.num_layers):
                outputs = []
                for direction in range(case.directions):
                    at = len(h_n)
                    weights = parameters[4 * at : 4 * at + 4]
                    h, output = scan(x, h0[at], *weights, reverse=direction == 1)
                    h_n.append(h)
                    outputs.append(output)
                x = jnp.concatenate(outputs, axis=-1)
            return x, jnp.stack(h_n)

        def train(grad_output, *inputs):
            (output, h_n), vjp = jax.vjp(forward, *inputs)
            grad_x, grad_h0, grads = vjp((grad_output, jnp.zeros_like(h_n)))
            return output, h_n, grad_x, grad_h0, *grads

        # Copies: XLA may still hold an input when Python ends, and must not call torch then.
        parameters, x, h0, grad_output = jax.tree.map(
            lambda tensor: jnp.array(jnp.from_dlpack(tensor), copy=True),
            (tuple(problem.state.values()), problem.x, problem.h0, problem.grad_output),
        )
        inputs = (grad_output, x, h0, parameters) if backward else (x, h0, parameters)
        compiled = jax.jit(train if backward else forward).lower(*inputs).compile()
        return lambda: jax.block_until_ready(compiled(*inputs))

    def tensors(self, results: tuple) -> tuple[Tensor, ...]:
        return tuple(map(torch.from_dlpack, results))
