"""A denoising in the terminal: what is shown of a trace."""

import io

import numpy as np
import pytest
from rich.console import Console

from diffusionlm.data.tokenizers import ByteTokenizer
from diffusionlm.pretrained import terminal
from diffusionlm.sampling.state import Trace

TEXT = "ab\ncd"
# The positions that are still masked in each frame.
LEFT = [{0, 1, 2, 3, 4}, {0, 2, 4}, {2}, set()]
MASK_ID = 300


@pytest.fixture
def trace():
    final = np.array(list(TEXT.encode()), np.int32)
    masked = np.array([[i in left for i in range(len(final))] for left in LEFT])
    return Trace(np.where(masked, MASK_ID, final), masked)


def shown(console: Console) -> str:
    return console.file.getvalue()


def test_masks_are_blocks_and_line_breaks_stay(trace):
    pieces = terminal.token_texts(trace.tokens[-1], ByteTokenizer())
    frames = [terminal.frame(trace, i, pieces, prompt="> ").plain for i in range(4)]
    assert frames == ["> ░░░\n░░", "> ░b░\nc░", "> ab░\ncd", "> ab\ncd"]


def test_what_a_step_reveals_is_highlighted_once(trace):
    pieces = terminal.token_texts(trace.tokens[-1], ByteTokenizer())

    def highlighted(i: int) -> str:
        text = terminal.frame(trace, i, pieces)
        return "".join(text.plain[span.start : span.end] for span in text.spans if "green" in str(span.style))

    assert [highlighted(i) for i in range(4)] == ["", "bc", "ad", "\n"]


def test_a_file_gets_stills_without_escape_codes(trace):
    console = Console(file=io.StringIO(), width=60)
    terminal.show(trace, ByteTokenizer(), prompt="> ", console=console)
    assert "\x1b" not in shown(console)
    assert shown(console).startswith("step 0/3\n> ░░░\n░░\n") and shown(console).endswith("step 3/3\n> ab\ncd\n")


def test_a_terminal_gets_an_animation_that_ends_with_the_text(trace):
    console = Console(file=io.StringIO(), width=60, force_terminal=True, color_system=None)
    terminal.show(trace, ByteTokenizer(), console=console, seconds=0.0)
    last = shown(console).split("step 3/3")[0].split("step 2/3")[-1]
    assert "ab" in last and "cd" in last and "░" not in last
    assert "step 1/3, 3 masked" in shown(console)


def test_square_brackets_in_a_text_are_not_markup():
    final = np.array(list(b"[red]x"), np.int32)
    trace = Trace(np.stack([final, final]), np.zeros((2, 6), bool))
    console = Console(file=io.StringIO(), width=60)
    terminal.show(trace, ByteTokenizer(), prompt="[bold]", console=console)
    assert "[bold][red]x" in shown(console)


def test_pieces_keep_their_leading_space():
    class Words:
        words = ["a", " b", " c"]

        def decode(self, ids, inside=False):
            text = "".join(self.words[i] for i in ids)
            return text if inside else text.removeprefix(" ")

    assert terminal.token_texts(np.array([1, 2, 1]), Words()) == [" b", " c", " b"]


def test_a_token_that_will_be_taken_back_is_shown_while_it_is_there():
    """The first position gets x, loses it, and gets a."""
    trace = Trace(
        np.array([[MASK_ID, MASK_ID], [ord("x"), MASK_ID], [MASK_ID, ord("b")], [ord("a"), ord("b")]]),
        np.array([[True, True], [False, True], [True, False], [False, False]]),
    )
    console = Console(file=io.StringIO(), width=60)
    terminal.show(trace, ByteTokenizer(), console=console)
    assert [line for line in shown(console).splitlines() if "step" not in line] == ["░░", "x░", "░b", "ab"]


def test_a_character_of_several_tokens_is_shown_whole():
    broken = [0xE2, 0x82]  # the euro without its last byte
    tokens = np.array([*"é€".encode(), *broken, ord("a"), *"😀".encode()])
    pieces = terminal.token_texts(tokens, ByteTokenizer())
    assert pieces == ["é", "", "€", "", "", "\ufffd", "\ufffd", "a", "😀", "", "", ""]
    assert "".join(pieces) == "é€\ufffd\ufffda😀"


def trace_of(final: list[int], left: list[set[int]]) -> Trace:
    """Return a trace whose positions in `left[i]` are masks in frame i."""
    masked = np.array([[n in positions for n in range(len(final))] for positions in left])
    return Trace(np.where(masked, MASK_ID, final), masked)


EOS = 10  # a line break here, so that its text would show


def test_the_end_of_a_text_is_a_mark_and_nothing_behind_it_is_shown():
    """Position 3 ends the text before the positions around it are revealed; then position 1 ends it."""
    trace = trace_of([97, EOS, 98, EOS, 99], [{0, 1, 2, 3, 4}, {0, 1, 2, 4}, {1}, set()])
    console = Console(file=io.StringIO(), width=60)
    terminal.show(trace, ByteTokenizer(), console=console, ends=(EOS,))
    lines = [line for line in shown(console).splitlines() if "step" not in line]
    assert lines == ["░░░░░", "░░░⟨eos⟩", "a░b⟨eos⟩", "a⟨eos⟩"]


def test_a_text_with_gaps_goes_on_behind_the_end_of_a_gap_and_a_given_token_ends_nothing():
    trace = trace_of([EOS, 97, EOS, 98, 99, EOS, 100], [{1, 2, 3, 5, 6}, set()])
    assert terminal.behind_end(trace, 0, (EOS,)) == [False] * 7
    assert terminal.behind_end(trace, 1, (EOS,)) == [False, False, False, True, False, False, True]
    assert terminal.behind_end(trace, 1, ()) == [False] * 7
