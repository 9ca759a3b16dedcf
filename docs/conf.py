"""The configuration of Sphinx; CONTRIBUTING.md has the command that builds the pages."""

import dataclasses
import inspect
import os
import re
import shutil
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

from diffusionlm.version import __version__

DOCS = Path(__file__).parent.resolve()
ROOT = DOCS.parent

project = "diffusionlm"
author = "The diffusionlm authors"
copyright = "2026, The diffusionlm authors"
release = version = __version__

extensions = [
    "myst_nb",  # pages in Markdown, and notebooks
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinxcontrib.mermaid",
]
exclude_patterns = ["_build", "results/models"]

default_role = "code"  # what docstrings write between single backticks
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

html_math_renderer = "mathml"  # which browsers show without a script and without a network
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
    "navbar_persistent": [],  # the search field is in the sidebar
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

PLAIN = (bool, int, float, str)  # the defaults that are shown

# Files beside docs/ that are pages of the site, too; the pages of these names in docs/ only point to them.
INCLUDED = {"log": "experiments/LOG.md", "tpu_scripts": "tpu_scripts/README.md", "contributing": "CONTRIBUTING.md"}
LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")


def _include(app: Sphinx, name: str, source: list[str]) -> None:
    """Take the text of an included page from its file, and point links at such files to the pages."""
    file = ROOT / INCLUDED[name] if name in INCLUDED else DOCS / f"{name}.md"
    pages = {ROOT / path: f"{page}.md" for page, path in INCLUDED.items()} | {ROOT / "README.md": "index.md"}

    def link(match: re.Match[str]) -> str:
        target = (file.parent / match[1]).resolve()
        path = DOCS / pages[target] if target in pages else target
        return f"]({os.path.relpath(path, (DOCS / name).parent)}{match[2] or ''})"

    text = file.read_text() if name in INCLUDED else source[0]
    if name in INCLUDED or any(path.name in text for path in pages):
        source[0] = LINK.sub(link, text)


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


def _show_inline(translator: HTML5Translator, node: nodes.math) -> None:
    """Show an equation within a line."""
    translator.body.append(convert(node.astext()))
    raise nodes.SkipNode


def _show_block(translator: HTML5Translator, node: nodes.math_block) -> None:
    """Show an equation by itself."""
    translator.body.append(f'<div class="math">{convert(node.astext(), display="block")}</div>')
    raise nodes.SkipNode


def _comments(cls: type) -> dict[str, str]:
    """Return the comments at the fields of a class, which the command line shows as help, too."""
    comments, before = {}, []
    for line in inspect.getsource(cls).splitlines():
        if comment := re.fullmatch(r"    # (.*)", line):
            before.append(comment[1])
            continue
        if field := re.fullmatch(r"    (\w+): [^#]*?(?:  # (.*))?", line):
            comments[field[1]] = field[2] or " ".join(before)
        before = []
    return comments


def _describe_fields(app: Sphinx, what: str, name: str, value: object, options: object, lines: list[str]) -> None:
    """Add the fields of a dataclass or named tuple to its description, with their defaults and comments."""
    if not isinstance(value, type) or not (dataclasses.is_dataclass(value) or hasattr(value, "_fields")):
        return
    comments = _comments(value)
    names = [field.name for field in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else value._fields
    if not any(comments.get(field) for field in names):
        return
    defaults = {field: getattr(value, field) for field in names if isinstance(getattr(value, field, None), PLAIN)}
    lines += ["", "Fields:", ""]
    for field in names:
        default = f" = ``{defaults[field]!r}``" if field in defaults else ""
        comment = re.sub(r"(`[^`]+`)|([*|_\\])", lambda match: match[1] or "\\" + match[2], comments.get(field, ""))
        lines.append(f"* ``{field}``{default}" + (f": {comment}" if comment else ""))
    lines.append("")


def _shorten_signature(app: Sphinx, what: str, name: str, value: object, *_: object) -> tuple[str, None] | None:
    """Leave the fields of a configuration, which its description lists, out of its signature."""
    listed = what == "class" and dataclasses.is_dataclass(value) and any(_comments(value).values())
    return ("(...)", None) if listed else None


def _skip_listed_fields(app: Sphinx, what: str, name: str, value: object, skip: bool, options: object) -> bool | None:
    """Leave out fields of named tuples as members, since the description of the tuple lists them."""
    return True if type(value).__name__ == "_tuplegetter" else None


def setup(app: Sphinx) -> None:
    """Connect the functions above to Sphinx."""
    app.add_html_math_renderer("mathml", (_show_inline, None), (_show_block, None))
    app.connect("source-read", _include)
    app.connect("autodoc-process-docstring", _describe_fields)
    app.connect("autodoc-process-signature", _shorten_signature)
    app.connect("autodoc-skip-member", _skip_listed_fields)
    app.connect("doctree-read", lambda app, tree: _open_reports(app, tree, app.env.docname))
    app.connect("build-finished", _copy_reports)
