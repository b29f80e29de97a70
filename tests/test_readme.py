"""README.md is true: its examples run as written, and the files it names are there.

By itself, `python tests/test_readme.py` runs the first example and shows what it prints.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs" / "_ext"))
import sources  # noqa: E402

README = (ROOT / "README.md").read_text()


def examples():
    """The Python blocks as code objects, with the line numbers of README.md."""
    for block in re.finditer(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL):
        lines_before = README.count("\n", 0, block.start(1))
        yield compile("\n" * lines_before + block[1], "README.md", "exec")


def test_examples_run_in_their_order():
    names = {}
    blocks = list(examples())
    assert len(blocks) >= 3
    for block in blocks:
        exec(block, names)


def test_files_it_names_exist():
    named = set(re.findall(r"`([\w./]+\.(?:py|h|cpp|md))`", README))
    named |= set(re.findall(r"^ +(\w+\.py) ", README, re.MULTILINE))
    folders = [ROOT, ROOT / "csrc", ROOT / "torch_bptt"]
    assert named
    assert not [name for name in named if not any((folder / name).exists() for folder in folders)]


def rows():
    """The table of what works: (name, ours, on the CPU, cuDNN, tests) of every row."""
    section = README.split("## What works, here and in torch.nn.RNN\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")][2:]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    assert all(len(row) == 5 for row in cells)
    return [row for row in cells if not row[0].startswith("**")]


def named(cell):
    """{file: tests} that a cell links; that they exist, tests/test_docs.py sees for every link."""
    found = {}
    for match in sources.LINK.finditer(cell):
        path = ROOT / match[1]
        found[path.stem] = re.findall(r"`([^`]+)`", match[2])
        for test in found[path.stem]:
            assert sources.line_of(path, test), f"{path.name} has no {test}"
    return found


def test_every_row_of_what_works_names_its_tests():
    """One of ours; and where something is said of torch.nn.RNN, one of it."""
    assert len(rows()) > 40
    for name, _, cpu, _, tests in rows():
        files = named(tests)
        for found in files.values():
            assert found, f"{name}: a link without a test"
            assert all(test.startswith("test_") for test in found), name
        assert files.keys() - {"test_nn_rnn"}, f"{name}: no test of ours"
        said = cpu != "–"
        assert not said or files.keys() & {"test_nn_rnn", "test_onnx", "test_transforms"}, name


def test_the_errors_that_the_table_quotes_are_those_that_a_test_sees():
    seen = (ROOT / "tests" / "test_nn_rnn.py").read_text()
    quoted = [words for row in rows() for words in re.findall(r'"([^"]{9,})"', row[2])]
    assert len(quoted) > 8
    assert not [words for words in quoted if words not in seen]


def test_what_cudnn_is_said_to_lack_has_a_source():
    section = README.split("## What works, here and in torch.nn.RNN\n")[1]
    for name, _, cpu, cudnn, _ in rows():
        if cudnn not in ("yes", "–", "no"):
            letter = re.search(r"<sup>(\w)</sup>$", cudnn)
            assert letter, f"{name}: no source"
            assert f"\n- {letter[1]}: " in section, name
        if cudnn == "no" or cudnn.endswith("c</sup>"):
            assert cpu.startswith("no"), f"{name}: not refused on the CPU"


if __name__ == "__main__":
    exec(next(examples()), {})
