"""Text in chunks whose ids do not depend on what surrounds them, so that a chunk that comes again is looked up.

Most words of a text came before, and looking them up is several times quicker than encoding them. A chunk ends only
where no token can go on, so the ids are those of the whole text.
"""

import re
from collections.abc import Callable
from itertools import chain

from diffusionlm.data.tokenizers.definition import Definition, steps

# A chunk ends where one space stands between two characters of ASCII that are no spaces.
_TO_SPACE = r"(?s:.)+?(?:(?<=[!-~])(?= [!-~])|\Z)"
AT_SPACES = re.compile(rf" ?[!-~]++(?= [!-~])|{_TO_SPACE}")
# And between a run of letters of ASCII and any other character of ASCII.
AT_WORDS = re.compile(rf" ?[A-Za-z]++(?=[\n -~])|{_TO_SPACE}")
LONGEST = 32  # characters of a chunk that is kept
MOST_KEPT = 1 << 18  # chunks, which take about 60 MB

# Expressions that cut texts into words, which are encoded one by one. In all of them a space is the first character of
# its word or stands among white space, and letters are followed by nothing else in their word.
_BEGIN, _END = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|", r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
_KNOWN = tuple(rf"{_BEGIN}\p{{N}}{digits}|{_END}(?!\S)|\s+" for digits in ("", "{1,3}"))  # Qwen2's, LLaMA 3's


class Chunks:
    """The ids of chunks that came before.

    Args:
      pattern: of chunks, `AT_SPACES` or `AT_WORDS`.
      encode: returns the ids of a chunk.
    """

    def __init__(self, pattern: re.Pattern[str], encode: Callable[[str], list[int]]):
        self._cut, self._encode = pattern.findall, encode
        self._kept: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        chunks, kept, long = self._cut(text), self._kept, {}
        for chunk in set(chunks).difference(kept):
            (kept if len(chunk) <= LONGEST else long)[chunk] = self._encode(chunk)
        if len(kept) > MOST_KEPT:
            self._kept = {}  # another thread may still read the old one
        if not long:
            return list(chain.from_iterable(map(kept.__getitem__, chunks)))
        return list(chain.from_iterable(long[chunk] if chunk in long else kept[chunk] for chunk in chunks))


def ends_at_words(definition: Definition) -> bool:
    """Return True if `AT_WORDS` gives chunks that the tokenizer of a definition encodes by themselves."""
    model = definition["model"]
    if model.get("type", "BPE") != "BPE" or model.get("dropout"):
        return False
    if any(step["type"] != "NFC" for step in steps(definition.get("normalizer"), "normalizers")):
        return False
    if any(not token["special"] for token in definition["added_tokens"]):
        return False
    cutters = list(steps(definition.get("pre_tokenizer"), "pretokenizers"))
    if not cutters or cutters[-1]["type"] != "ByteLevel" or cutters[-1]["add_prefix_space"]:
        return False
    if cutters[-1].get("use_regex", True):  # that of GPT-2
        return len(cutters) == 1
    first = cutters[0] | {"invert": cutters[0].get("invert", False)}
    return len(cutters) == 2 and first in [
        {"type": "Split", "pattern": {"Regex": known}, "behavior": "Isolated", "invert": False} for known in _KNOWN
    ]
