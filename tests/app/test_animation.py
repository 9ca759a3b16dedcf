"""The animated picture shows the trace: one frame a state, masks that turn into text, and nothing behind its end."""

import io

import numpy as np
from PIL import Image

from diffusionlm.app import animation, colours
from diffusionlm.data.tokenizers import ByteTokenizer
from diffusionlm.pretrained.webpage import Section, events
from diffusionlm.sampling.state import Trace

MASK_ID, EOS = 300, 256


def section(text: bytes, left: list[set[int]], title="A", confidence=0.5) -> Section:
    final = np.array([*text, EOS], np.int32)
    masked = np.array([[n in positions for n in range(len(final))] for positions in left])
    states = Trace(np.where(masked, MASK_ID, final), masked, np.where(masked, 0, confidence).astype(np.float32))
    return Section(title, "Say: ", text.decode(), states, events(states), "note")


def frames(*sections, ends=(EOS,)):
    picture = Image.open(io.BytesIO(animation.gif(sections, ByteTokenizer(), ends=ends)))
    shown = []
    for i in range(picture.n_frames):
        picture.seek(i)
        shown.append((picture.convert("RGB"), picture.info["duration"]))
    return shown


def count(picture, colour, tolerance=6):
    return int((abs(np.asarray(picture, int) - np.array(colour)).max(-1) <= tolerance).sum())


def test_every_state_is_a_frame_and_the_last_stays():
    three = frames(section(b"abc", [{0, 1, 2, 3}, {0, 2, 3}, {3}, set()]))
    durations = [duration for _, duration in three]
    assert len(three) == 4 and durations[-1] > 1000 + durations[0] and len(set(durations[:-1])) == 1


def test_tokens_have_the_colour_of_their_confidence():
    for confidence in (0.1, 0.9):
        start, end = (
            picture for picture, _ in frames(section(b"abcdef", [set(range(7)), set()], confidence=confidence))
        )
        expected = colours.colour(confidence)
        assert count(start, expected) == 0 and count(end, expected) > 200


def test_two_traces_are_side_by_side_and_the_shorter_waits():
    one = section(b"abc", [{0, 1, 2, 3}, set()])
    two = section(b"abc", [{0, 1, 2, 3}, {0, 1, 3}, {0, 3}, set()])
    alone, both = frames(one), frames(one, two)
    assert len(both) == 4 and both[0][0].width > 1.9 * alone[0][0].width
    left = [np.asarray(picture.crop((0, 0, animation.WIDTH, picture.height))) for picture, _ in both]
    assert (left[0] != left[1]).any()
    colour = colours.colour(0.5)
    assert [count(Image.fromarray(a), colour) > 50 for a in left] == [False, True, True, True]


def test_nothing_is_drawn_behind_the_end():
    text = b"ab" + b"c" * 40
    whole = frames(section(text, [set(range(43)), set()]))[-1][0]
    cut = section(text, [set(range(43)), set()])
    cut.trace.tokens[1, 2] = EOS
    assert count(frames(cut)[-1][0], colours.colour(0.5)) < count(whole, colours.colour(0.5)) / 5


def test_words_are_whole_and_lines_break_where_the_text_does():
    assert animation._words("a  b\n\nc ") == ["a", "  b\n", "\n", "c", " "]
