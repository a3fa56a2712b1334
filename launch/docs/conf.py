"""The site of `make docs`: the Markdown files where they stand, and an API page from docstrings."""

from __future__ import annotations

import shutil
from pathlib import Path

from sphinx.application import Sphinx

import sharded_shampoo4
from sharded_shampoo4.integrations.quiet import quiet

quiet()  # autodoc imports transformers and DeepSpeed
project = "sharded_shampoo4"
copyright = "the sharded_shampoo4 authors"
release = sharded_shampoo4.__version__

PAGES = [
    "integrations/README",
    "launch/hyperparameters",
    "launch/docs/api",
    "launch/README",
    "launch/clusters",
    "launch/RESULTS",
    "sharded_shampoo4/README",
    ".github/CONTRIBUTING",
    "CHANGELOG",
]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "README"
include_patterns = [f"{page}.*" for page in (root_doc, *PAGES)]
exclude_patterns = [
    ".[!g]*",
    ".git",
    "build",
    "runs",
    "tests",
]  # without this Sphinx looks through virtual environments
myst_heading_anchors = 3  # the anchors that GitHub gives to headings

smartquotes = False  # quotes are code: method="soap"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
autodoc_mock_imports = ["axolotl", "timm", "torchtitan"]  # which need not be installed to read about them
maximum_signature_line_length = 88

html_theme = "furo"
html_title = f"sharded_shampoo4 {release}"
html_static_path = ["static"]
html_css_files = ["wide.css"]
html_copy_source = False


def add_contents(app: Sphinx, page: str, source: list[str]) -> None:
    """Put the list of pages, which the sidebar shows, at the end of the front page."""
    if page == root_doc:
        source[0] += "\n```{toctree}\n:hidden:\n\n" + "\n".join(PAGES) + "\n```\n"


def show_code(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Let indented blocks of a module's docstring be code, as they are in the file."""
    if what != "module":
        return
    for number in range(len(lines) - 1, 1, -1):
        before = lines[number - 2]
        if lines[number].startswith("    ") and not lines[number - 1] and before[:1].strip() and before != "::":
            lines[number:number] = ["::", ""]


def make_index(app: Sphinx, error: Exception | None) -> None:
    """Let the front page also be what a browser opens first."""
    front = Path(app.outdir) / f"{root_doc}.html"
    if error is None and front.exists():
        shutil.copy(front, front.with_name("index.html"))


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", add_contents)
    app.connect("autodoc-process-docstring", show_code)
    app.connect("build-finished", make_index)
