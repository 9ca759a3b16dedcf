"""Stories: where a text is cut into sentences, and where tokens are cut at the seams between its parts."""

import re

import numpy as np
import pytest
from support.stories import STORIES

from diffusionlm.data import tokenizers
from diffusionlm.evaluation import stories
from diffusionlm.evaluation.stories import Row, Story


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A b. C d! E f? G h. I j. K l.", Story("A b. C d!", " E f?", " G h. I j.")),
        (' "A!" said B. "C..." \nD?! "E." F', Story('"A!" said B.', ' "C..."', ' \nD?! "E."')),
        ("One. Two. Three. Four. Five", Story("One. Two.", " Three.", " Four. Five")),
        ("It cost 3.50 at x.com. B. C. D. E.", Story("It cost 3.50 at x.com. B.", " C.", " D. E.")),
        ("One. Two. Three. Four.", None),
        ("No end", None),
    ],
)
def test_sentences(text, expected):
    assert stories.cut(text) == expected


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (("A.", "B.", "C."), ("A.", " B.", " C.")),
        (("A. ", "B.\n", "C."), ("A.", " B.", "\nC.")),
        (("", "B.", ""), ("", "B.", "")),
        (("A.", " B.", " C."), ("A.", " B.", " C.")),
    ],
)
def test_parts_are_joined_by_one_space(parts, expected):
    assert stories.join_parts(*parts) == expected


class Pairs:
    """Two characters a token, whatever they are; the ids are the texts' code points, packed."""

    def encode(self, text, inside=False):
        return [int.from_bytes(text[k : k + 2].encode(), "big") for k in range(0, len(text), 2)]

    def token_bytes(self):
        return np.array([1 if i < 256 else 2 for i in range(1 << 16)], np.int32)


def test_seams_between_tokens_keep_the_tokens_of_the_whole():
    sizes = Pairs().token_bytes()
    whole = Pairs().encode("abcdefgh")
    assert stories.encode_story(Story("ab", "cdef", "gh"), Pairs(), sizes)[1] == Row(whole[:1], whole[1:3], whole[3:])
    parts = Row(*map(Pairs().encode, ("abc", "def", "gh")))
    assert stories.encode_story(Story("abc", "def", "gh"), Pairs(), sizes)[1] == parts  # where a token has both sides


class Words:
    """A tokenizer whose tokens are the matches of a pattern; an id is the length of its match."""

    def __init__(self, pattern):
        self.pattern, self.texts = pattern, []

    def encode(self, text, inside=False):
        found = re.findall(self.pattern, text)
        self.texts += [one for one in found if one not in self.texts]
        return [100 * self.texts.index(one) + len(one) for one in found]

    def token_bytes(self):
        return np.arange(10_000) % 100


@pytest.mark.parametrize(
    ("pattern", "placed"),
    [
        (r" ?[^ ]+| ", ("He ran.", " She sat.", " It was.")),
        (r"[^ ]+ ?| ", ("He ran. ", "She sat. ", "It was.")),
        (r" ?[a-zA-Z]+\.(?: [A-Z][a-z]+)?| ?[^ ]+| ", ("He ran.", " She sat.", " It was.")),  # ". She" is one token
        (r"[a-zA-Z]+\. (?:[A-Z][a-z]+ )?|[^ ]+ ?| ", ("He ran. ", "She sat. ", "It was.")),  # ". She " is one
    ],
)
def test_white_space_at_a_seam_goes_where_the_vocabulary_has_it(pattern, placed):
    tokenizer = Words(pattern)
    story = Story("He ran.", " She sat.", " It was.")
    found, row = stories.encode_story(story, tokenizer, tokenizer.token_bytes())
    assert found == placed and row == Row(*map(tokenizer.encode, placed))


def test_a_space_that_the_tokenizer_adds_stands_before_the_whole_story_alone():
    class Spaced(Pairs):
        def encode(self, text, inside=False):
            return super().encode(" " + text if text and not inside else text)

    tokenizer, sizes = Spaced(), Spaced().token_bytes()
    whole = tokenizer.encode("a bc de")  # " a", " b", "c ", "de"
    assert stories.encode_story(Story("a", " b", "c de"), tokenizer, sizes)[1] == Row(whole[:1], whole[1:2], whole[2:])
    story = Story("ab", "c", " d")  # " a", "bc", " d"
    parts = Row(tokenizer.encode("ab"), tokenizer.encode("c", inside=True), tokenizer.encode(" d", inside=True))
    assert stories.encode_story(story, tokenizer, sizes) == (story, parts)


def test_seams_of_learnt_pieces():
    texts = [story.before + story.middle + story.after for story in STORIES] * 5
    tokenizer = tokenizers.train_sentencepiece(texts, 300)
    for story in STORIES:
        placed, row = stories.encode_story(story, tokenizer, tokenizer.token_bytes())
        assert placed == story
        assert [tokenizer.decode(ids) for ids in row] == list(story)
        assert [*row.before, *row.middle, *row.after] == tokenizer.encode("".join(story))
