"""The scripts in examples/: run as users run them, and their answers to wrong requests."""

import contextlib
import io
import os
import runpy
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

import torch_bptt

EXAMPLES = Path(__file__).parents[1] / "examples"


def environment() -> dict[str, str]:
    """A script must find the torch_bptt that is under test, installed or built in place."""
    package = str(Path(torch_bptt.__file__).parents[1])
    path = os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path}


def run(script: Path, *options: object, code: int = 0) -> subprocess.CompletedProcess:
    """A process of its own, without a terminal, that must end with this exit code."""
    done = subprocess.run(
        [sys.executable, str(script), *map(str, options)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def error_of(script: Path, *options: object) -> str:
    """The one line with which a script answers a wrong request.

    In this process, because importing torch takes seconds.
    """
    stderr = io.StringIO()
    with (
        mock.patch.object(sys, "argv", [str(script), *map(str, options)]),
        contextlib.redirect_stderr(stderr),
        torch.random.fork_rng(),
        pytest.raises(SystemExit) as exit,
    ):
        runpy.run_path(str(script), run_name="__main__")
    assert exit.value.code == 2
    return one_line(script, stderr.getvalue())


def one_line(script: Path, stderr: str) -> str:
    assert stderr.startswith(f"{script.name}: error: ")
    assert stderr.count("\n") == 1, f"more than one line:\n{stderr}"
    return stderr
