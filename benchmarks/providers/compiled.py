"""torch.nn.RNN under torch.compile, which unrolls the loop over time and compiles every step."""

import warnings

import torch
from torch import Tensor, nn

from torch_bptt.bench import Case, ModuleProvider, Problem, Step

LONGEST = 100  # steps; at 100 it compiles for minutes already


class CompiledRNN(nn.RNN):
    @torch.compile(fullgraph=True)
    def forward(self, x: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x, h0)


class Compiled(ModuleProvider):
    def __init__(self) -> None:
        super().__init__("torch.compile", CompiledRNN, torch.__version__)

    def unable(self, case: Case, dtype: torch.dtype, backward: bool) -> str | None:
        if case.T > LONGEST:
            return f"at most {LONGEST} steps: the time to compile grows with them"
        if case.uneven:
            return "no packed sequences"
        return None

    def prepare(self, problem: Problem, backward: bool) -> Step:
        torch.compiler.reset()
        # Else it leaves nn.RNN as it is, and what an earlier run compiled would be taken from disk.
        torch._dynamo.config.allow_rnn = True
        torch._inductor.config.force_disable_caches = True
        warnings.filterwarnings("ignore", "dynamo_pgo force disabled")
        return super().prepare(problem, backward)
