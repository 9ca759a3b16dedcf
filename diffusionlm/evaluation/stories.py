"""Stories with a part to fill in: read, cut, and as tokens."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from diffusionlm.data.sources import Item, Source, checked_text, record_of, text_of
from diffusionlm.data.tokenizers.kinds import Tokenizer
from diffusionlm.errors import UserError

PARTS = ("before", "middle", "after")
SENTENCES = 5  # of a story that is cut; the third is the middle
# A sentence ends with a run of these and perhaps a closing quote or bracket, before white space. That cuts after "Mr."
# too, and not where a writer forgot the space.
_SENTENCE_END = re.compile(r"[.!?\u2026]+[\"'\u201d\u2019)\]]*(?=\s)")


class Story(NamedTuple):
    """A text in three parts, which give it back when they are joined."""

    before: str
    middle: str
    after: str


class Row(NamedTuple):
    """A story's tokens, without a start token."""

    before: list[int]
    middle: list[int]
    after: list[int]


@dataclass
class Stories:
    """The stories of a source, in order; while they are read, `too_short` counts those that cannot be cut."""

    source: Source
    field: str
    too_short: int = 0

    def __iter__(self) -> Iterator[Story]:
        for item in self.source:
            try:
                found = _story(item, self.field)
            except ValueError as error:
                raise UserError(f"{item.location}: {error}") from error
            if found is None:
                self.too_short += 1
            elif found.middle:
                yield found


def _story(item: Item, field: str) -> Story | None:
    """The story that an item holds, with an empty middle for a blank line; None for one of too few sentences."""
    record = record_of(item) if item.is_json else None
    if record is not None and set(PARTS) & set(record):
        if missing := [name for name in PARTS if name not in record]:
            raise ValueError(f"a story with a field {next(iter(set(PARTS) & set(record)))!r} and no {missing[0]!r}")
        parts = [checked_text(f"field {name!r}", record[name]) for name in PARTS]
        if not parts[1].strip():
            raise ValueError("field 'middle' is empty; there is nothing to fill in")
        return joined(*parts)
    text = text_of(item, field)
    return cut(text) if text.strip() else Story("", "", "")


def joined(before: str, middle: str, after: str) -> Story:
    """A story of parts: one space where two of them meet without white space, and all space before what follows it."""
    if before and not before[-1].isspace() and not middle[0].isspace():
        middle = " " + middle
    if after and not middle[-1].isspace() and not after[0].isspace():
        after = " " + after
    head, body = before.rstrip(), middle.rstrip()
    return Story(head, before[len(head) :] + body, middle[len(body) :] + after)


def cut(text: str) -> Story | None:
    """The first five sentences of a text, of which the third is the middle; None where there are fewer."""
    text = text.strip()
    ends = [found.end() for found in _SENTENCE_END.finditer(text)][:SENTENCES]
    if len(ends) < SENTENCES and (not ends or ends[-1] < len(text)):
        ends.append(len(text))  # with or without a full stop
    if len(ends) < SENTENCES:
        return None
    return Story(text[: ends[1]], text[ends[1] : ends[2]], text[ends[2] : ends[4]])


def encode(story: Story, tokenizer: Tokenizer, sizes: np.ndarray) -> tuple[Story, Row]:
    """A story and its tokens: those of the whole text, where tokens end at the seams, else those of each part.

    White space at a seam goes to the side where the vocabulary has it: before words, as most do, or behind them.

    Args:
      story: the text.
      tokenizer: of the model.
      sizes: its `token_bytes()`.

    Returns:
      The story with its white space in that place, and the tokens of its parts.
    """
    text = "".join(story)
    whole = tokenizer.encode(text)
    ends = np.concatenate([[0], np.cumsum(sizes[whole])])
    if _ends_words_with_space(text, ends):
        story = _with_space_before_seams(story)
    # By the bytes of tokens rather than of text, as some tokenizers begin every text with a space.
    until = (story.before, story.before + story.middle)
    seams = [np.flatnonzero(ends == sizes[tokenizer.encode(part)].sum()) for part in until]
    if not all(map(len, seams)):
        parts = (_inner(part, tokenizer, sizes) for part in story[1:])
        return story, Row(tokenizer.encode(story.before), *parts)
    i, j = (int(seam[0]) for seam in seams)
    return story, Row(whole[:i], whole[i:j], whole[j:])


def _ends_words_with_space(text: str, ends: np.ndarray) -> bool:
    """Whether more tokens of a text end behind white space than before it."""
    offset = ends[-1] - len(text.encode())  # of a tokenizer that begins every text with a space
    runs = [[len(text[:place].encode()) for place in found.span()] for found in re.finditer(r"\s+", text)]
    before, behind = (np.isin(side, ends - offset).sum() for side in np.reshape(runs, (-1, 2)).T)
    return bool(behind > before)


def _with_space_before_seams(story: Story) -> Story:
    middle, after = story.middle.lstrip(), story.after.lstrip()
    first, second = (part[: len(part) - len(bare)] for part, bare in ((story.middle, middle), (story.after, after)))
    return Story(story.before + first, middle + second, after)


def _inner(text: str, tokenizer: Tokenizer, sizes: np.ndarray) -> list[int]:
    """A part that follows another: where the tokenizer begins texts with a space itself, that is the part's own."""
    bare = tokenizer.encode(text[1:])
    spaced = text.startswith(" ") and sizes[bare].sum() == len(text.encode())
    return bare if spaced else tokenizer.encode(text)
