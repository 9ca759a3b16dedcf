"""Stories with a part to fill in: reading them, cutting them in three parts, and encoding them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from diffusionlm.data.items import Item, checked_text, lacks_field, record_of, text_of
from diffusionlm.data.sources import Source
from diffusionlm.data.tokenizers import Tokenizer
from diffusionlm.errors import UserError

PARTS = ("before", "middle", "after")
SENTENCES = 5  # of a story that is cut; the third is the middle
# A sentence ends with a run of these and perhaps a closing quote or bracket, before white space. That cuts after "Mr."
# too, and not where a writer forgot the space.
_SENTENCE_END = re.compile(r"[.!?\u2026]+[\"'\u201d\u2019)\]]*(?=\s)")


class Story(NamedTuple):
    """A text in three parts, which give the text when they are put together."""

    before: str
    middle: str
    after: str


class Row(NamedTuple):
    """The tokens of a story's parts, without a start token."""

    before: list[int]
    middle: list[int]
    after: list[int]


@dataclass
class Stories:
    """The first stories of a source, in order; while they are read, `too_short` counts those that cannot be cut."""

    source: Source
    field: str
    limit: int | None = None
    too_short: int = 0

    def __iter__(self) -> Iterator[Story]:
        n = 0
        for item in self.source:
            if n == self.limit:
                return
            try:
                story = _read_story(item, self.field)
            except ValueError as error:
                raise UserError(f"{item.location}: {error}") from error
            n += story is None or story.middle != ""  # a blank line is no story
            if story is None:
                self.too_short += 1
            elif story.middle:
                yield story


def _read_story(item: Item, field: str) -> Story | None:
    """Return the story that an item holds, with an empty middle for a blank line; None if it has too few sentences."""
    record = record_of(item) if item.is_json else None
    if record is not None and set(PARTS) & set(record):
        if missing := [name for name in PARTS if name not in record]:
            raise ValueError(f"a story with a field {next(iter(set(PARTS) & set(record)))!r} and no {missing[0]!r}")
        before, middle, after = (checked_text(f"field {name!r}", record[name]) for name in PARTS)
        if not middle.strip():
            raise ValueError("field 'middle' is empty; there is nothing to fill in")
        return join_parts(before, middle, after)
    if record is not None and field not in record:
        parts = ", ".join(map(repr, PARTS))
        raise ValueError(f"{lacks_field(field, record)}; give a whole story in it or in --field NAME, or {parts}")
    text = text_of(item, field)
    return cut(text) if text.strip() else Story("", "", "")


def join_parts(before: str, middle: str, after: str) -> Story:
    """Return a story of these parts.

    One space is put where two of them meet without white space, and all white space goes to the part after it.
    """
    if before and not before[-1].isspace() and not middle[0].isspace():
        middle = " " + middle
    if after and not middle[-1].isspace() and not after[0].isspace():
        after = " " + after
    head, body = before.rstrip(), middle.rstrip()
    return Story(head, before[len(head) :] + body, middle[len(body) :] + after)


def cut(text: str) -> Story | None:
    """Cut the first five sentences of a text, of which the third is the middle; None if there are fewer."""
    text = text.strip()
    ends = [match.end() for match in _SENTENCE_END.finditer(text)][:SENTENCES]
    if len(ends) < SENTENCES and (not ends or ends[-1] < len(text)):
        ends.append(len(text))  # with or without a full stop
    if len(ends) < SENTENCES:
        return None
    return Story(text[: ends[1]], text[ends[1] : ends[2]], text[ends[2] : ends[4]])


def encode_story(story: Story, tokenizer: Tokenizer, sizes: np.ndarray) -> tuple[Story, Row]:
    """Encode a story: as a whole, where tokens end at the seams, or else part by part.

    White space at a seam goes to the side where the vocabulary has it: before words, as most do, or after them.

    Args:
      story: the text.
      tokenizer: the model's tokenizer.
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
        parts = (tokenizer.encode(part, inside=True) for part in story[1:])
        return story, Row(tokenizer.encode(story.before), *parts)
    i, j = (int(seam[0]) for seam in seams)
    return story, Row(whole[:i], whole[i:j], whole[j:])


def _ends_words_with_space(text: str, ends: np.ndarray) -> bool:
    """Return True if more tokens of a text end after white space than before it."""
    offset = ends[-1] - len(text.encode())  # of a tokenizer that begins every text with a space
    runs = [[len(text[:place].encode()) for place in match.span()] for match in re.finditer(r"\s+", text)]
    before, after = (np.isin(side, ends - offset).sum() for side in np.reshape(runs, (-1, 2)).T)
    return bool(after > before)


def _with_space_before_seams(story: Story) -> Story:
    middle, after = story.middle.lstrip(), story.after.lstrip()
    first, second = (part[: len(part) - len(bare)] for part, bare in ((story.middle, middle), (story.after, after)))
    return Story(story.before + first, middle + second, after)
