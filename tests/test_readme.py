"""README.md is true: its examples run as written, and the files it names are there.

By itself, `python tests/test_readme.py` runs the first example and shows what it prints.
"""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
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


if __name__ == "__main__":
    exec(next(examples()), {})
