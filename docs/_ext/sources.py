"""Links from a page to a source file: where they lead, and to which line.

A link may be followed by quotations from the file, in backticks:

    [csrc/core/cell.h](../csrc/core/cell.h): `V leak(V alpha, V p, V y)`

Each has to be found there, white space aside; a name ``test_...`` has to be that of a test. So a
link says what it points at without a line number, which nobody would keep up to date.
tests/test_docs.py checks this for all pages. In the HTML the link leads to the line of the first
quotation, in a page made from the file.
"""

import os
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
# `[words](target)` and the quotations after it: : `one`, `two`
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)((?:[:,]?\s+`[^`]+`)*)")
LANGUAGES = {".py": "python", ".h": "cpp", ".cpp": "cpp", ".md": "markdown"}


def links(page):
    """(match, path of the file or None, anchor, quotations) of every link of a Markdown file."""
    for match in LINK.finditer(page.read_text()):
        target, _, anchor = match[1].partition("#")
        path = None
        if target and not re.match(r"\w+:", target):
            path = Path(os.path.normpath(page.parent / target))
        yield match, path, anchor, re.findall(r"`([^`]+)`", match[2])


def line_of(path, quotation):
    """The number of the line on which a quotation begins in a file, None if it is not there."""
    pattern = r"\s+".join(re.escape(word) for word in quotation.split())
    if re.fullmatch(r"test_\w+", quotation):
        pattern = rf"def {pattern}\("
    elif re.fullmatch(r"\w+", quotation):
        pattern = rf"\b{pattern}\b"
    text = path.read_text()
    found = re.search(pattern, text)
    return text.count("\n", 0, found.start()) + 1 if found else None


# ---- for Sphinx


def pages_of(app):
    return sorted(Path(app.srcdir).rglob("*.md"))


def is_source(app, path):
    """Whether a link's target is a file that Sphinx has no page or picture of."""
    if path is None or not path.is_file():
        return False
    return not (path.is_relative_to(app.srcdir) and path.suffix in (".md", ".svg", ".png"))


def rewrite(app, docname, content):
    """Point the links of a page to sources at the pages made below."""
    page = Path(app.env.doc2path(docname))
    text, done, parts = page.read_text(), 0, []
    up = "../" * docname.count("/")
    for match, path, _, quotations in links(page):
        if is_source(app, path):
            name = path.relative_to(ROOT).as_posix()
            target = app.config.source_pages.get(name)
            if target is None:
                line = line_of(path, quotations[0]) if quotations else 1
                target = f"source:{up}sources/{name}.html#L{line}"
            parts += [text[done : match.start(1)], target]
            done = match.end(1)
    content[0] = "".join([*parts, text[done:]])


def source_pages(app):
    """A page for every file that is linked, each line with an anchor."""
    linked = {path for page in pages_of(app) for _, path, _, _ in links(page)}
    for path in sorted(path for path in linked if is_source(app, path)):
        name = path.relative_to(ROOT).as_posix()
        if name in app.config.source_pages:
            continue
        language = LANGUAGES.get(path.suffix, "none")
        block = app.builder.highlighter.highlight_block(path.read_text(), language)
        start, lines = block.split("<pre>", 1)
        lines = [f'<span id="L{i}">{line}</span>' for i, line in enumerate(lines.split("\n"), 1)]
        body = f"<h1><code>{name}</code></h1>{start}<pre>" + "\n".join(lines)
        yield f"sources/{name}", {"title": name, "body": body}, "page.html"


def setup(app):
    # Files outside of docs/ that a page there includes: path -> page.
    app.add_config_value("source_pages", {}, "env")
    app.connect("source-read", rewrite)
    app.connect("html-collect-pages", source_pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
