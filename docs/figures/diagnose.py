"""The pictures of docs/diagnose.md: runs the code on that page and saves what it draws.

python docs/figures/diagnose.py
"""

import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

HERE = Path(__file__).parent
PAGE = HERE.parent / "diagnose.md"
NAMES = "diagnose-gradient", "diagnose-spectrum"  # in the order in which the page draws them


def main() -> None:
    pyplot.rcParams.update(
        {"figure.figsize": (7, 3.6), "figure.constrained_layout.use": True, "savefig.dpi": 100}
    )
    names: dict[str, object] = {}
    for block in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        exec(block, names)
    for number, name in zip(pyplot.get_fignums(), NAMES, strict=True):
        pyplot.figure(number).savefig(HERE / f"{name}.png")


if __name__ == "__main__":
    main()
