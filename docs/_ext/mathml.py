"""Formulas as MathML, which browsers draw by themselves: the pages load nothing from elsewhere."""

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging

logger = logging.getLogger(__name__)


def write(translator, node, block):
    formula = node.astext().replace("'", r"^\prime ")  # which docutils leaves on the line
    try:
        translator.body.append(tex2mathml(formula, as_block=block))
    except MathError as error:
        logger.warning("formula %r: %s", formula, error, location=node)
    raise nodes.SkipNode


def setup(app):
    app.add_html_math_renderer(
        "mathml",
        (lambda translator, node: write(translator, node, False), None),
        (lambda translator, node: write(translator, node, True), None),
    )
    return {"parallel_read_safe": True, "parallel_write_safe": True}
