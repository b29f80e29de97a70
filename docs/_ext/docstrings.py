"""Docstrings of this project, as reStructuredText.

A docstring is paragraphs, indented formulas, and sections: a name from SECTIONS with a colon on a
line of its own, and an indented body, which is either entries ``name: words`` or plain words.
"""

import re
from itertools import takewhile

SECTIONS = (
    "Arguments", "Attributes", "Returns", "Yields", "Raises", "Example", "Notes", "Source"
)  # fmt: skip
HEADING = re.compile(rf"({'|'.join(SECTIONS)}):$")
ENTRY = re.compile(r"(\w[\w{}.]*(?:, \w[\w{}.]*)*): +(.*)")


def convert(lines):
    """The lines of a docstring without its indentation -> the lines of reStructuredText."""
    result, lines = [], list(lines)
    while lines:
        line = lines.pop(0)
        heading = HEADING.match(line)
        if not heading and not line.startswith("    "):
            result.append(line)
            continue
        body = [] if heading else [line]
        body += takewhile(lambda inner: not inner or inner.startswith("    "), lines)
        lines = lines[len(body) - (not heading) :]
        body = [inner[4:] for inner in body]
        if not heading:
            result += [".. code-block:: none", "", *("    " + inner for inner in body), ""]
        elif ENTRY.match(body[0]):
            result += [f".. rubric:: {heading[1]}", "", *entries(body), ""]
        else:
            result += [f".. rubric:: {heading[1]}", "", *body, ""]
    return result


def entries(body):
    """``name: words``, continued with more indentation, as a definition list."""
    for line in body:
        entry = ENTRY.match(line)
        if entry:
            yield from ("", f"``{entry[1]}``", "    " + entry[2])
        else:
            yield "    " + line.strip() if line.strip() else ""


def setup(app):
    def process(app, what, name, obj, options, lines):
        lines[:] = convert(lines)

    app.connect("autodoc-process-docstring", process)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
