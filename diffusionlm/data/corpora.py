"""Named corpora that need no download, such as `python_docs`, the documentation in Python and installed packages.

A new corpus is one registered function that returns its documents by split.
"""

import ast
import contextlib
import gc
import hashlib
import importlib.util
import inspect
import re
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffusionlm.registry import Registry

PACKAGES = ("numpy", "scipy", "jax", "flax", "optax")  # besides the standard library; those that are installed
SKIPPED = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "site-packages",
    "dist-packages",
    "ensurepip",
    "pydoc_data",
    "_vendor",
}
VALIDATION_SHARE = 0.05  # of the modules
PROSE_SHARE = 0.15  # of a file; files with fewer docstrings take most of the time to parse and hold little text
TRIPLE_QUOTED = re.compile(rb"\"\"\"(.*?)\"\"\"|'''(.*?)'''", re.DOTALL)
NON_LETTERS = re.compile(r"[\W\d_]+")
BOILERPLATE = 40  # letters; a paragraph at least this long is kept only at its first occurrence


@dataclass(frozen=True)
class Document:
    """A text of a corpus."""

    name: str  # module:definition, or another description of where the text comes from
    text: str


CORPORA: Registry[dict[str, list[Document]]] = Registry("corpus")


def get(name: str) -> dict[str, list[Document]]:
    """Return the documents of a corpus by split, "train" and "validation".

    Raises:
      UserError: the name is unknown.
    """
    return CORPORA.get(name)


@CORPORA.register("python_docs")
def python_docs() -> dict[str, list[Document]]:
    """Collect docstrings of the standard library and of installed packages, and the topics of Python's `help`.

    Sources are parsed, never run. A document is the text of one top-level class or function, module head or help topic.
    Whole modules (and topics) are held out by a hash of their name, so machines agree. Of paragraphs that differ only
    in case, digits and punctuation the first is kept, so none is in both splits.
    """
    splits: dict[str, list[Document]] = {"train": [], "validation": []}
    seen: set[str] = set()
    for module, documents in _help_topics() + _modules():
        draw = int.from_bytes(hashlib.sha256(module.encode()).digest()[:8]) / 2**64
        split = splits["validation" if draw < VALIDATION_SHARE else "train"]
        for document in documents:
            if text := _unseen(document.text, seen):
                split.append(Document(document.name, text))
    return splits


def _help_topics() -> list[tuple[str, list[Document]]]:
    if not importlib.util.find_spec("pydoc_data"):  # some distributions package it separately
        return []
    from pydoc_data.topics import topics

    texts = {f"help:{topic}": text for topic, text in topics.items()}
    return [(name, [Document(name, text.strip("\n") + "\n")]) for name, text in sorted(texts.items())]


def _modules() -> list[tuple[str, list[Document]]]:
    roots = [("", Path(sysconfig.get_path("stdlib")))]
    for package in PACKAGES:
        if (spec := importlib.util.find_spec(package)) and spec.submodule_search_locations:
            roots.append((package, Path(spec.submodule_search_locations[0])))
    modules = []
    with _no_garbage_collection():
        for package, root in roots:
            for file in sorted(root.rglob("*.py")):
                parts = file.relative_to(root).with_suffix("").parts
                if not SKIPPED.intersection(parts) and not file.name.endswith("_test.py"):
                    module = ".".join([package, *parts]).strip(".").removesuffix(".__init__")
                    modules.append((module, list(_docstrings(module, file))))
    return modules


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Suspend collection: syntax trees have no cycles, and each collection would visit all that JAX has loaded."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _docstrings(module: str, file: Path) -> Iterator[Document]:
    """Yield one document for the module head and one for each top-level definition, with all that it contains."""
    try:
        source = file.read_bytes()
        prose = sum(len(a) + len(b) for a, b in TRIPLE_QUOTED.findall(source))
        if prose < PROSE_SHARE * len(source):
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's files
            tree = ast.parse(source)
    except (SyntaxError, ValueError, OSError):
        return
    if head := ast.get_docstring(tree):
        yield Document(module, head + "\n")
    for node in _statements(tree.body):
        if texts := list(_texts(node)):
            yield Document(f"{module}:{getattr(node, 'name', node.lineno)}", "\n\n".join(texts) + "\n")


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements of a body, including those under a condition."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With):
            for block in ("body", "handlers", "orelse", "finalbody"):
                yield from _statements(getattr(node, block, ()))


def _texts(node: ast.stmt) -> Iterator[str]:
    """Yield the docstring of a definition and of those inside it, or the text that numpy attaches with `add_newdoc`."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        if text := ast.get_docstring(node):
            yield text
        for inner in _statements(node.body):
            yield from _texts(inner)
    elif (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and "add_newdoc" in ast.unparse(node.value.func)
    ):
        constants = [a.value for a in ast.walk(node.value.args[-1]) if isinstance(a, ast.Constant)]
        yield from (inspect.cleandoc(c) for c in constants if isinstance(c, str) and "\n" in c)


def _unseen(text: str, seen: set[str]) -> str:
    """Return `text` without its `seen` paragraphs, and add the others to them; "" if only short ones remain."""
    kept, has_new = [], False
    for paragraph in re.split(r"\n[ \t]*\n", text.strip("\n")):
        letters = NON_LETTERS.sub("", paragraph.lower())
        if len(letters) >= BOILERPLATE:
            if letters in seen:
                continue
            seen.add(letters)
            has_new = True
        kept.append(paragraph)
    return "\n\n".join(kept) + "\n" if has_new else ""
