"""The rules that keep the parts apart, read from the sources: who may include and import what."""

import ast
import collections
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CSRC, PACKAGE = ROOT / "csrc", ROOT / "torch_bptt"
NATIVE = sorted([*CSRC.rglob("*.cpp"), *CSRC.rglob("*.h"), *CSRC.rglob("*.cu")])
PYTHON = sorted(PACKAGE.glob("*.py"))

INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^">]+)[">]', re.MULTILINE)
# What torch installs; and Python, wherever it shows.
TORCH = re.compile(r"^(torch|ATen|c10|caffe2)/")
KNOWS_PYTHON = re.compile(r"pybind11|\bPy(?!Torch)[A-Z]\w+|Python\.h|torch/(extension|python)\.h")

# The Python side from top to bottom: a module imports from the package only what comes after it.
ORDER = [
    "__main__", "bench", "__init__", "rtrl", "tbptt", "convert", "diagnose", "_watch", "_spectrum",
    "_flow", "_plots", "elman", "init", "rnn", "stretches", "functional", "checkpoint", "padded",
    "ragged", "layout", "head", "_onnx", "checks", "autograd", "_flops", "operators", "_extension",
    "_values", "reference", "_C",
]  # fmt: skip

# What a module uses where it is installed, and does without where it is not.
OPTIONAL = collections.defaultdict(set, {"_plots": {"matplotlib"}})


def where(path):
    return str(path.relative_to(ROOT))


def layer(path):
    """Of a native file: core, cpu, or "" for those directly in csrc."""
    return path.relative_to(CSRC).parent.as_posix().removeprefix(".")


def includes(path):
    """[(is it <...>, name), ...]"""
    return [(bracket == "<", name) for bracket, name in INCLUDE.findall(path.read_text())]


def includes_of_ours(path):
    """The files of csrc that path includes, whether relative to itself or to csrc."""
    for angle, name in includes(path):
        if not angle:
            found = [folder / name for folder in (path.parent, CSRC) if (folder / name).exists()]
            if found:
                yield found[0].resolve()


def imports(path):
    """Every module that a Python file imports, inside functions too, by its full name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{where(path)}: a relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                is_module = (ROOT / full.replace(".", "/")).with_suffix(".py").exists()
                is_module |= full == "torch_bptt._C"
                yield full if is_module else node.module


def test_there_is_something_to_check():
    assert {"core", "cpu", "cuda", ""} <= {layer(path) for path in NATIVE}
    assert any(True for path in NATIVE for _ in includes_of_ours(path))
    assert any(TORCH.match(name) for path in NATIVE for _, name in includes(path))


@pytest.mark.parametrize("path", NATIVE, ids=where)
def test_only_files_directly_in_csrc_know_torch(path):
    if layer(path):
        assert not [name for _, name in includes(path) if TORCH.match(name)]
        assert not re.search(r"\b(torch|at|c10)::", path.read_text())


@pytest.mark.parametrize("path", NATIVE, ids=where)
def test_only_the_binding_knows_python(path):
    if path.name != "binding.cpp":
        assert not KNOWS_PYTHON.search(path.read_text())


@pytest.mark.parametrize("path", NATIVE, ids=where)
def test_core_includes_core_and_a_backend_includes_core_and_itself(path):
    allowed = {"core": {"core"}, "cpu": {"core", "cpu"}, "cuda": {"core", "cuda"}}
    used = {layer(other) for other in includes_of_ours(path)}
    assert used <= allowed.get(layer(path).split("/")[0], {"", "core", "cpu", "cuda"})


@pytest.mark.parametrize("path", NATIVE, ids=where)
def test_a_quoted_include_is_ours(path):
    names = [name for angle, name in includes(path) if not angle]
    assert len(names) == len(list(includes_of_ours(path)))


@pytest.mark.parametrize("path", PYTHON, ids=where)
def test_imports_go_downward(path):
    below = ORDER[ORDER.index(path.stem) + 1 :]
    for name in imports(path):
        package, _, module = name.partition(".")
        if package == "torch_bptt":
            # The package itself is __init__; it is what users import, so only the top may.
            assert (module.split(".")[0] or "__init__") in below, f"{where(path)} imports {name}"


@pytest.mark.parametrize("path", PYTHON, ids=where)
def test_the_package_needs_torch_alone(path):
    used = {name.split(".")[0] for name in imports(path)}
    assert used - set(sys.stdlib_module_names) <= {"torch", "torch_bptt"} | OPTIONAL[path.stem]


def test_the_reference_imports_torch_alone():
    assert set(imports(PACKAGE / "reference.py")) == {"torch"}
