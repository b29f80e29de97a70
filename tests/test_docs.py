"""The documentation is true: its code prints what it shows, its links lead somewhere, the lines it
quotes are there, its figures are those that the scripts draw, and examples in docstrings run."""

import contextlib
import doctest
import importlib
import io
import pkgutil
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

import torch_bptt

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS / "_ext"))
import sources  # noqa: E402

PAGES = sorted(DOCS.glob("*.md"))
MARKDOWN = [*PAGES, *sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("*/README.md"))]
MODULES = sorted(
    f"torch_bptt.{module.name}"
    for module in pkgutil.iter_modules(torch_bptt.__path__)
    if module.name not in ("_C", "__main__")
)
# ```python and, directly below it, what it prints: ```text. Where nothing stands below, it may
# print what it likes.
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)


def name(path):
    return str(path.relative_to(ROOT))


def blocks(page):
    """(code with the line numbers of the page, what it prints or None) of every block."""
    text = page.read_text()
    for block in BLOCK.finditer(text):
        lines_before = text.count("\n", 0, block.start(1))
        yield compile("\n" * lines_before + block[1], name(page), "exec"), block[2]


@pytest.fixture
def own_torch():
    """A random state that is always the same; what a page sets in torch ends with it."""
    dtype = torch.get_default_dtype()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
    torch.set_default_dtype(dtype)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if BLOCK.search(page.read_text())], ids=name
)
@pytest.mark.usefixtures("own_torch")
def test_code_prints_what_stands_below_it(page):
    names = {"__name__": page.stem}
    for code, expected in blocks(page):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, names)
        assert expected is None or printed.getvalue() == expected


def test_the_tutorial_shows_all_that_is_printed():
    found = BLOCK.findall((DOCS / "tutorial.md").read_text())
    assert len(found) > 20
    assert all(bool(shown) == ("print(" in code) for code, shown in found)


def anchors(page):
    """What GitHub and Sphinx make of the headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", MARKDOWN, ids=name)
def test_links_lead_somewhere(page):
    for match, path, anchor, _ in sources.links(page):
        # Sphinx makes pages of files alone; where GitHub shows a page, a folder may be linked.
        found = Path.is_file if page in PAGES else Path.exists
        assert path is None or found(path), match[0]
        target = page if match[1].startswith("#") else path
        if anchor and target and target.suffix == ".md":
            assert anchor in anchors(target), match[0]


@pytest.mark.parametrize("page", MARKDOWN, ids=name)
def test_what_is_quoted_stands_in_the_file(page):
    for match, path, _, quotations in sources.links(page):
        for quotation in quotations if path else []:
            assert sources.line_of(path, quotation), f"{match[0]}: {quotation} is not there"


def test_every_section_of_the_tutorial_names_its_code_and_its_test():
    """From the first formula on, up to the texts, where formulas are corrected and not computed."""
    tutorial = (DOCS / "tutorial.md").read_text()
    sections = re.split(r"^## ", tutorial, flags=re.MULTILINE)
    titles = [section.split("\n", 1)[0] for section in sections]
    first, last = titles.index("The adjoint"), titles.index("Where the texts err")
    for title, section in zip(titles[first:last], sections[first:last], strict=True):
        for kind in ("Code", "Test"):
            assert re.search(rf"^{kind}: \[.*\]\(", section, re.MULTILINE), f"{title}: no {kind}"


def test_formulas_survive_github():
    """GitHub reads a backslash before punctuation as Markdown before it reads it as TeX."""
    for page in PAGES:
        prose = re.sub(r"^```.*?^```$|`[^`\n]*`", "", page.read_text(), flags=re.M | re.S)
        for formula in re.findall(r"\$\$.*?\$\$|\$[^$]*\$", prose, re.DOTALL):
            assert not re.search(r"\\[^A-Za-z]", formula), f"{name(page)}: {formula}"


def test_figures_are_those_of_the_scripts_and_shown(monkeypatch):
    monkeypatch.syspath_prepend(DOCS / "figures")
    drawn = {}
    for script in ("curves", "diagrams"):
        drawn |= runpy.run_path(str(DOCS / "figures" / f"{script}.py"))["FIGURES"]
    assert drawn.keys() == {path.name for path in (DOCS / "figures").glob("*.svg")}
    for figure, draw in drawn.items():
        assert draw().svg() == (DOCS / "figures" / figure).read_text(), f"{figure}: make figures"
    assert drawn.keys() <= {
        path.name for page in PAGES for _, path, _, _ in sources.links(page) if path
    }


@pytest.mark.parametrize("module", MODULES)
def test_examples_in_docstrings_run(module, own_torch):
    failed, _ = doctest.testmod(importlib.import_module(module), extraglobs={"torch": torch})
    assert failed == 0


def test_public_names_have_an_example_and_are_in_the_api():
    api = (DOCS / "api.md").read_text()
    for public in set(torch_bptt.__all__) - {"__version__"}:
        assert re.search(rf"^\.\. auto\w+:: (torch_bptt\.)?{public}\b", api, re.MULTILINE), public
        found = getattr(torch_bptt, public)
        if callable(found):
            assert ">>> " in found.__doc__, f"{public} has no example"
