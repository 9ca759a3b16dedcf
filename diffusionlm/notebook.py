"""Notebooks such as Jupyter and Colab: whether this process serves one, and outputs of a cell that change.

Nothing here needs ipywidgets, which not every notebook has.
"""

import base64
import html
import sys
from collections.abc import Mapping
from typing import Any


def in_notebook() -> bool:
    """Return True if what this process displays appears in a notebook; IPython in a terminal is none."""
    get_ipython = getattr(sys.modules.get("IPython"), "get_ipython", None)  # who runs a notebook has imported it
    return get_ipython is not None and getattr(get_ipython(), "kernel", None) is not None


class Output:
    """An output of the cell that runs, whose content can be replaced."""

    def __init__(self) -> None:
        self._handle: Any = None  # of IPython, once there is something to see

    def show_html(self, content: str, text: str) -> None:
        """Show HTML, or the plain text where a front end has no HTML."""
        self._show({"text/html": content, "text/plain": text})

    def show_png(self, content: bytes, text: str) -> None:
        """Show a picture, or the plain text where a front end has no pictures."""
        self._show({"image/png": base64.b64encode(content).decode(), "text/plain": text})

    def _show(self, bundle: dict[str, str]) -> None:
        from IPython.display import display

        if self._handle is None:
            self._handle = display(bundle, raw=True, display_id=True)
        else:
            self._handle.update(bundle, raw=True)


def show(value: Any) -> None:
    """Display a value in the cell that runs, as its last expression would be."""
    from IPython.display import display

    display(value)


def table(title: str, rows: Mapping[str, Any]) -> str:
    """Return a title and named values as HTML, in which every text is shown as it is."""
    cells = "".join(
        f'<tr><th style="text-align:left">{html.escape(name)}</th>'
        f'<td style="text-align:left">{html.escape(str(value))}</td></tr>'
        for name, value in rows.items()
    )
    return f"<table><caption><b>{html.escape(title)}</b></caption>{cells}</table>"
