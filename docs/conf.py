"""The configuration of Sphinx; CONTRIBUTING.md has the command that builds the pages."""

import os
import shutil
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

from diffusionlm.version import __version__

DOCS = Path(__file__).parent

project = "diffusionlm"
author = "The diffusionlm authors"
copyright = "2026, The diffusionlm authors"  # noqa: A001 the name that Sphinx reads
release = version = __version__

extensions = [
    "myst_nb",  # pages in Markdown, and notebooks
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinxcontrib.mermaid",
]
exclude_patterns = ["_build", "results/models"]

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
myst_fence_as_directive = ["mermaid"]
nb_execution_mode = "off"  # the tests run the notebooks

autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
napoleon_numpy_docstring = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88

html_theme = "sphinx_book_theme"
html_title = "diffusionlm"
html_static_path = ["static"]
html_css_files = ["pages.css"]
html_theme_options = {
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "home_page_in_toc": True,
}
copybutton_prompt_text = "$ "

# Links to the documentation of other projects need the network, and a build does not: set this variable to have them.
if os.environ.get("DIFFUSIONLM_DOCS_INTERSPHINX"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "numpy": ("https://numpy.org/doc/stable", None),
        "jax": ("https://docs.jax.dev/en/latest", None),
        "flax": ("https://flax-linen.readthedocs.io/en/latest", None),
        "optax": ("https://optax.readthedocs.io/en/latest", None),
    }

# Files beside docs/ that the pages link to, and the pages that include them here.
OUTSIDE = {
    "../experiments/LOG.md": "log.md",
    "../tpu_scripts/README.md": "tpu_scripts.md",
    "../CONTRIBUTING.md": "contributing.md",
    "../README.md": "index.md",
}


def _link_to_included_pages(app: Sphinx, name: str, source: list[str]) -> None:
    """Point links at a file outside docs/ to the page that includes it."""
    for file, page in OUTSIDE.items():
        up = "../" * name.count("/")
        source[0] = source[0].replace(f"]({up}{file}", f"]({up}{page}")


def _open_reports(app: Sphinx, tree: nodes.document, name: str) -> None:
    """Turn links to HTML reports, which Sphinx makes downloads, into links that open them."""
    for node in list(tree.findall(addnodes.download_reference)):
        if (target := node["reftarget"]).endswith(".html"):
            node.replace_self(nodes.reference("", "", *node.children, refuri=target))


def _copy_reports(app: Sphinx, error: Exception | None) -> None:
    """Copy the HTML reports, which stand alone, to where the pages link to them."""
    if error is None and app.builder.format == "html":
        for report in DOCS.glob("results/*/*.html"):
            target = Path(app.outdir) / report.relative_to(DOCS)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(report, target)


def setup(app: Sphinx) -> None:
    """Connect the functions above to Sphinx."""
    app.connect("source-read", _link_to_included_pages)
    app.connect("doctree-read", lambda app, tree: _open_reports(app, tree, app.env.docname))
    app.connect("build-finished", _copy_reports)
