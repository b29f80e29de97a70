"""Sphinx: `make docs` builds the pages into build/docs, with warnings as errors."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]

import torch_bptt  # noqa: E402

project = "torch_bptt"
author = "torch_bptt authors"
copyright = author
version = release = torch_bptt.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "docstrings", "mathml", "sources"]
exclude_patterns = ["requirements.txt"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
myst_url_schemes = {"http": None, "https": None, "source": "{{path}}#{{fragment}}"}
html_math_renderer = "mathml"
source_pages = {"csrc/README.md": "compiled-part.md"}

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
# Names of our own must be found. Those of Python and PyTorch are not looked up, so that building
# needs no network.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!torch_bptt\b).*")]

html_theme = "furo"
html_title = f"torch_bptt {version}"
html_show_sphinx = False
html_copy_source = False
