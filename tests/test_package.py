"""The package as a whole: names, examples, what it says about itself and when it cannot load."""

import importlib.machinery
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import torch_bptt
from torch_bptt import __main__, _extension

ROOT = Path(__file__).parent.parent


def test_public_names_and_version():
    assert all(hasattr(torch_bptt, name) for name in torch_bptt.__all__)
    # pyproject.toml takes the version from here, so that it stands in one place.
    assert re.fullmatch(r"\d+\.\d+\.\d+", torch_bptt.__version__)


def test_the_import_brings_no_compiler_along():
    """torch._dynamo alone takes seconds; only who compiles should wait for it."""
    command = "import sys, torch_bptt; print(*sys.modules)"
    printed = subprocess.run(
        [sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert "torch_bptt" in printed
    assert not {"torch._dynamo", "torch._inductor", "torch.onnx", "matplotlib"} & set(printed)


def test_info():
    command = [sys.executable, "-m", "torch_bptt", "info"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    facts = dict(line.split("  ", 1) for line in printed.splitlines())
    facts = {name: value.strip() for name, value in facts.items()}
    assert facts["torch_bptt"] == torch_bptt.__version__
    assert facts["torch"] == torch.__version__
    assert facts["instruction set chosen"] in facts["instruction sets found"].split(", ")
    assert "relu" in facts["nonlinearities"]


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["info", "nonsense"]], ids=str)
def test_wrong_commands_end_with_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        __main__.main(arguments)
    assert caught.value.code == 2
    assert "usage: python -m torch_bptt" in capsys.readouterr().err


def test_all_nonlinearities_are_in_the_reference():
    assert set(_extension._C.activations()) == set(torch_bptt.reference.activations)


@pytest.mark.parametrize(
    ("files", "cause"),
    [
        ([], "it was not built"),
        (["_C.pyi"], "it was not built"),
        (["_C.cpython-27-arm.so"], "it was built for another Python"),
        (
            [f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}"],
            "it was built against another version of torch than",
        ),
    ],
    ids=["nothing", "a stub", "another Python", "another torch"],
)
def test_an_extension_that_does_not_load_is_explained(files, cause, tmp_path):
    for name in files:
        (tmp_path / name).touch()
    text = _extension.explain(ImportError("undefined symbol: c10"), tmp_path)
    assert f"Likely:  {cause}" in text
    for fact in ("undefined symbol: c10", torch.__version__, sys.version.split()[0], "pip install"):
        assert fact in text


def test_an_extension_that_does_not_load_raises_import_error(tmp_path):
    """A copy of the package without its compiled part."""
    package = tmp_path / "torch_bptt"
    package.mkdir()
    for path in (ROOT / "torch_bptt").glob("*.py"):
        (package / path.name).write_text(path.read_text())
    code = "import sys; sys.path.insert(0, sys.argv[1]); import torch_bptt"
    command = [sys.executable, "-P", "-c", code, str(tmp_path)]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 1
    assert (
        "ImportError: torch_bptt: the compiled extension torch_bptt._C does not load" in run.stderr
    )
    assert "it was not built" in run.stderr
