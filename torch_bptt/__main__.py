"""python -m torch_bptt info | bench: what a bug report needs; how fast this machine is."""

import argparse
import os
import platform

import torch

import torch_bptt
from torch_bptt import bench
from torch_bptt._extension import _C


def info() -> str:
    """Versions, the build, instruction sets and threads, one fact a line."""
    facts = {
        "torch_bptt": torch_bptt.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{f"build: {name}": value for name, value in _C.build_info().items()},
        "nonlinearities": ", ".join(_C.activations()),
        "instruction sets found": ", ".join(_C.isas()),
        "instruction set chosen": _C.isa(),
        "TORCH_BPTT_ISA": os.environ.get("TORCH_BPTT_ISA", "not set"),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} processors",
    }
    width = max(map(len, facts)) + 2
    return "\n".join(f"{name:<{width}}{value}" for name, value in facts.items())


def main(arguments: list[str] | None = None) -> None:
    """Run one command; its own options follow it (bench --help)."""
    parser = argparse.ArgumentParser(prog="python -m torch_bptt")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, build, instruction sets, threads")
    commands.add_parser("bench", add_help=False, help="time against torch.nn.RNN; see bench --help")
    chosen, rest = parser.parse_known_args(arguments)
    if chosen.command == "bench":
        bench.main(rest)
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    else:
        print(info())


if __name__ == "__main__":
    main()
