"""In a notebook: progress and pictures in the cell without ipywidgets, and texts as they are."""

import re
import sys
from types import SimpleNamespace

import pytest
from support.notebook_cell import cell  # noqa: F401

from diffusionlm import notebook, progress
from diffusionlm.console import Console
from diffusionlm.data.prepare import prepare

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def clock(monkeypatch):
    """Return a clock that stands still until it is moved."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


def words(page):
    """Return the text of HTML."""
    return " ".join(re.sub(r"<[^>]*>", "", page).split())


def test_a_notebook_is_a_shell_with_a_kernel(cell, monkeypatch):  # noqa: F811
    assert notebook.in_notebook()
    monkeypatch.delattr(cell.shell, "kernel")  # as in IPython's terminal
    assert not notebook.in_notebook()
    monkeypatch.delitem(sys.modules, "IPython")
    assert not notebook.in_notebook()


def test_progress_is_one_output_that_changes_and_stays(cell, clock, capsys):  # noqa: F811
    with progress.Progress("train", 5) as bar:
        for completed in range(1, 6):
            clock.seconds += 1
            bar.update(completed, f"loss {completed}.5")
    (output,) = cell.outputs()
    assert words(output["text/html"]).startswith("train") and "5/5 loss 5.5" in words(output["text/html"])
    assert any("2/5 loss 2.5" in words(drawn["data"]["text/html"]) for drawn in cell.drawn)
    assert capsys.readouterr() == ("", "")  # no warning that a package is missing, and no line


def test_the_bar_of_one_run_of_many_goes_away(cell, clock):  # noqa: F811
    with progress.Progress("train", 5, stay=False) as bar:
        bar.update(5, "")
    assert [output["text/html"] for output in cell.outputs()] == [""]


def test_what_is_said_stays_beside_the_bar(cell, clock):  # noqa: F811
    with progress.Progress("train", 5) as bar:
        bar.say("<b>resuming</b> [red]from step 2")
        bar.update(5, "")
    texts = [words(output["text/html"]) for output in cell.outputs()]
    assert "&lt;b&gt;resuming&lt;/b&gt; [red]from step 2" in texts and any("5/5" in text for text in texts)


def test_pictures_take_a_small_share_of_the_time(cell, clock):  # noqa: F811
    drawn = []

    def picture():
        clock.seconds += 0.25
        drawn.append(clock.seconds)
        return PNG + str(len(drawn)).encode()

    with progress.Progress("train", 100, picture=picture) as bar:
        for completed in range(1, 101):
            clock.seconds += 0.5
            bar.update(completed, "")
    # 50 seconds of steps: at most a twentieth of the time goes to pictures of 0.25 s, and one more shows the end.
    assert len(drawn) == 50 / 5 + 1
    assert sum("image/png" in output for output in cell.outputs()) == 1


def test_without_matplotlib_there_are_lines(cell, clock):  # noqa: F811
    def picture():
        raise ModuleNotFoundError("No module named 'matplotlib'")

    with progress.Progress("train", 3, picture=picture) as bar:
        for completed in (1, 2, 3):
            clock.seconds += 40
            bar.update(completed, f"loss {completed}.0")
    texts = [words(output["text/html"]) for output in cell.outputs()]
    assert "train 2/3 loss 2.0 ETA 40s" in texts and not any("image/png" in output for output in cell.outputs())


def test_quiet_shows_nothing(cell, clock):  # noqa: F811
    with progress.Progress("train", 3, quiet=True, picture=lambda: pytest.fail("quiet")) as bar:
        bar.update(3, "")
        bar.say("a line")
    assert not cell.drawn


def test_preparing_data_shows_bars_and_the_summary(cell, tmp_path):  # noqa: F811
    (tmp_path / "text.txt").write_text("A little cat sat. " * 200)
    prepare(
        str(tmp_path / "text.txt"),
        tmp_path / "prepared",
        sequence_length=16,
        tokenizer="byte",
        validation_fraction=0.0,
        validation=str(tmp_path / "text.txt"),
        workers=1,
    )
    texts = [words(output["text/html"]) for output in cell.outputs()]
    assert "encoding" in texts[0] and "writing" in texts[0]
    assert any("records of 17 tokens" in text for text in texts[1:])


def test_a_table_shows_texts_as_they_are():
    page = notebook.table("<i>", {"a<b": "<script>"})
    assert "<script>" not in page and "<i>" not in page and words(page) == "&lt;i&gt;a&lt;b&lt;script&gt;"


def test_a_long_line_is_folded(cell):  # noqa: F811
    Console(stderr=True).print("x" * 300, soft_wrap=True)
    (output,) = cell.outputs()
    assert max(map(len, re.sub(r"<[^>]*>", "", output["text/html"]).splitlines())) <= 115
    assert output["text/html"].count("x") - output["text/html"].count("overflow-x") >= 300
