"""Training documents that share text with evaluation files: they are left out, and listed.

As in the appendix of the GPT-3 paper (arXiv 2005.14165, appendix C), documents share text if they have a run of so many
words in common: 13 by default. Words are compared in lower case and composed (NFKC), without punctuation; in scripts
without spaces, such as Chinese, Japanese and Thai, every character counts as a word.
"""

import functools
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from diffusionlm.data.items import Item, record_of
from diffusionlm.data.jobs import read_array, write_array
from diffusionlm.data.text_files import Files, expand
from diffusionlm.errors import UserError
from diffusionlm.storage import write_atomically

REASON = "decontaminate"
# Lao and Thai, Burmese, Khmer, kana, and Chinese characters.
_ALONE = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_ALONE}]|[^\W{_ALONE}]+")
_FACTOR = 0x9E3779B97F4A7C15  # odd, so that no word of a run is lost modulo 2**64
_HASHES, _PLACES, _SETTINGS = (f"parts/contamination{end}" for end in (".npy", "_places.npy", ".json"))


class Index(NamedTuple):
    """The runs of words of all evaluation files."""

    hashes_N: np.ndarray  # uint64, sorted
    places_N: np.ndarray  # the number, in `locations`, of a text in which each run is
    locations: Sequence[str]
    words: int  # of a run

    def match(self, text: str) -> dict[str, str] | None:
        """Return the first run of words of a text that an evaluation file has, and where; None if there is none."""
        words = words_of(text)
        hashes_R = runs(words, self.words)
        if not len(self.hashes_N) or not len(hashes_R):
            return None
        slots_R = np.minimum(np.searchsorted(self.hashes_N, hashes_R), len(self.hashes_N) - 1)
        shared_R = np.flatnonzero(self.hashes_N[slots_R] == hashes_R)
        if not len(shared_R):
            return None
        first = int(shared_R[0])
        location = self.locations[int(self.places_N[slots_R[first]])]
        return {"words": " ".join(words[first : first + self.words]), "evaluation": location}


def words_of(text: str) -> list[str]:
    """Return the words of a text as they are compared."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


def runs(words: Sequence[str], length: int) -> np.ndarray:
    """Return a hash of every run of `length` words, uint64 (len(words) - length + 1,), or nothing."""
    if len(words) < length:
        return np.empty(0, np.uint64)
    hashes_W = np.array([_word_hash(word) for word in words], np.uint64)
    total_R = np.zeros(len(words) - length + 1, np.uint64)
    for offset in range(length):
        total_R = total_R * np.uint64(_FACTOR) + hashes_W[offset : offset + len(total_R)]
    return total_R


@functools.lru_cache(maxsize=1 << 20)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest())


def build(specs: Sequence[str], words: int, directory: epath.Path) -> tuple[int, int]:
    """Write the runs of words of evaluation files into the directory of jobs, where `read` reads them.

    Args:
      specs: files, directories or patterns; of records, every field that is text counts.
      words: of a run.
      directory: of jobs.

    Returns:
      The number of texts, and of those that are too short to have a run.

    Raises:
      UserError: there are no such files, or one cannot be read.
    """
    hashes, places, locations, short = [np.empty(0, np.uint64)], [np.empty(0, np.int64)], [], 0
    for location, text in _texts(specs):
        hashes_R = np.unique(runs(words_of(text), words))
        short += not len(hashes_R)
        hashes.append(hashes_R)
        places.append(np.full(len(hashes_R), len(locations)))
        locations.append(location)
    hashes_N, first_N = np.unique(np.concatenate(hashes), return_index=True)
    if not len(hashes_N):
        raise UserError(
            f"no text of decontaminate={', '.join(map(str, specs))} has {words} words; give other files, or a smaller "
            "--contamination_words"
        )
    write_array(directory / _HASHES, hashes_N)
    write_array(directory / _PLACES, np.concatenate(places)[first_N])
    write_atomically(directory / _SETTINGS, json.dumps({"words": words, "locations": locations}))
    return len(locations), short


@functools.lru_cache(maxsize=1)
def read(directory: str) -> Index | None:
    """Return the runs of words that `build` wrote there, None if it did not."""
    folder = epath.Path(directory)
    if not (folder / _SETTINGS).exists():
        return None
    settings = json.loads((folder / _SETTINGS).read_text())
    return Index(read_array(folder / _HASHES), read_array(folder / _PLACES), **settings)


def files(specs: Sequence[str]) -> Files:
    """Return the evaluation files; raise `UserError` if there are none."""
    return Files([path for spec in specs for path in expand(str(spec), dialogues=False)])


def _texts(specs: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the location and the content of every text, or text field of a record."""
    for item in files(specs):
        try:
            for text in _texts_of(item):
                yield str(item.location), text
        except ValueError as error:
            raise UserError(f"{item.location}: {error}; correct the evaluation file") from error


def _texts_of(item: Item) -> Iterator[str]:
    if item.is_json:
        yield from _strings(record_of(item))
        return
    try:
        yield item.payload.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"invalid UTF-8 at byte {error.start}") from error


def _strings(value: Any) -> Iterator[str]:
    """Yield every text inside a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for member in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(member)
