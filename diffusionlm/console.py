"""The terminal: every text is shown as it is, whoever wrote it; nothing in it is markup, an emoji code or a command.

All output of the package goes through `write` or a `Console` of this module, so callers need not know which text is
foreign. JSON is printed as it is: it escapes control characters itself.
"""

import contextlib
import io
import sys
from collections.abc import Iterable
from typing import Any

import rich.console
from rich.segment import Segment
from rich.text import Text

from diffusionlm.errors import naming
from diffusionlm.notebook import in_notebook
from diffusionlm.untrusted import printable

KEPT = "\n\t"  # control characters that lay text out


HTML = '<pre style="white-space:pre-wrap;line-height:1.2;margin:0">{code}</pre>'  # of what a notebook shows


class Console(rich.console.Console):
    """A rich console that shows strings as they are; style them with `style=` or `rich.text.Text`.

    In a notebook, what goes to stdout or stderr is displayed in the cell.
    """

    def __init__(self, **options: Any):
        displayed = in_notebook() and options.get("file") in (None, sys.stdout, sys.stderr)
        super().__init__(markup=False, emoji=False, force_jupyter=displayed, **options)

    def render(
        self, renderable: rich.console.RenderableType, options: rich.console.ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Yield the segments of anything that is printed, with control characters in their text escaped."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text, KEPT))

    def render_str(self, text: str, **options: Any) -> Text:
        """Return the text of a string that is printed, such as a cell of a table, which is measured by it."""
        return super().render_str(printable(text, KEPT), **options)

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as `rich.console.Console` does; the error of a write that fails names the stream."""
        if self.is_jupyter:  # which folds no long lines
            options.pop("soft_wrap", None)
            options.setdefault("overflow", "fold")
        with naming("standard error" if self.stderr else "standard output"):
            super().print(*objects, **options)

    def busy(self, text: str) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which a terminal or a notebook shows what is being done; elsewhere nothing is shown."""
        if self.is_jupyter:  # where a spinner of rich needs ipywidgets
            self.print(text, style="dim")
        return self.status(text) if self.is_terminal else contextlib.nullcontext()

    def to_html(self, renderable: rich.console.RenderableType) -> str:
        """Return anything that can be printed as HTML, with the width of this console."""
        page = Console(file=io.StringIO(), record=True, width=self.width, color_system="truecolor")
        page.print(renderable)
        return page.export_html(inline_styles=True, code_format=HTML)


def write(text: Any = "", *, error: bool = False, flush: bool = False) -> None:
    """Print a line, or several, on stdout or stderr.

    Raises:
      OSError: the stream cannot be written to; the error names it.
    """
    with naming("standard error" if error else "standard output"):
        print(printable(text, KEPT), file=sys.stderr if error else sys.stdout, flush=flush)
