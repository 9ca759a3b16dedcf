"""The terminal shows every text as it is, whoever wrote it: no markup, no emoji codes, no escape sequences."""

import errno
import io
import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from diffusionlm import console, progress
from diffusionlm.untrusted import printable

ALPHABET = st.sampled_from("ab[]/\\:@#=\x1b\x9b\x07\r\b\u202e\u2066\ud800é")
TRICKS = ["[/", "[b]x", ":warning:", "[link=x]y", "\\[b]", "\\"]
TEXT = st.one_of(st.text(ALPHABET, max_size=20), st.sampled_from(TRICKS))


def printed(*renderables, **options):
    """Return what a console writes that has no terminal."""
    stream = io.StringIO()
    output = console.Console(file=stream, width=200, highlight=False)
    for renderable in renderables:
        output.print(renderable, **options)
    return stream.getvalue()


@given(TEXT)
@example("\x1b]0;title\x07")
def test_a_string_is_printed_as_it_is(text):
    assert printed(text, soft_wrap=True) == printable(text) + "\n"
    shown = printed(Text(text), soft_wrap=True)  # rich itself drops some control characters of a `Text`
    assert shown == printable(shown, "\n") and (text != printable(text) or shown == text + "\n")


@given(TEXT)
def test_a_table_shows_its_texts_as_they_are(text):
    table = Table(text, title=text, caption=text, show_lines=True, box=None)
    table.add_row(text)
    lines = [line.strip() for line in printed(table).splitlines()]
    assert [line for line in lines if line] == [printable(text).strip()] * 4 * bool(printable(text).strip())


def test_a_panel_shows_its_body_as_it_is():
    assert "[/b] \\x1b[2J" in printed(Panel(Text("[/b] \x1b[2J"), title=Text("[/")))


@pytest.mark.parametrize("terminal", [True, False])
def test_titles_and_notes_of_progress_are_shown_as_they_are(terminal, monkeypatch):
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", "200")
    with progress.Progress("[/title :bug:", 2) as bar:
        bar.update(2, "[/note")
        bar.note("[/red")
        bar.say("[/said \x1b[2J")
    shown = stream.getvalue()
    assert "[/title :bug:" in shown and "[/said \\x1b[2J" in shown and "\x1b[2J" not in shown


@given(TEXT)
def test_a_line_is_written_as_it_is(text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", io.StringIO())
        console.write(text)
        assert sys.stdout.getvalue() == printable(text) + "\n"


@pytest.mark.parametrize("show", [console.write, lambda text: console.Console().print(text)])
def test_a_stream_that_cannot_be_written_is_named(show, monkeypatch):
    def full(text):
        raise OSError(errno.ENOSPC, "No space left on device")

    stream = io.StringIO()
    stream.write = full
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(OSError) as error:
        show("text")
    assert error.value.filename == "standard output"
