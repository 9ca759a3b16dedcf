"""Stream words: token ids whose top bit marks the start of a document or of a part of a dialogue."""

from collections.abc import Iterable
from typing import NamedTuple, Self

import numpy as np

from diffusionlm.data.tokenizers import Tokenizer


class Codec(NamedTuple):
    """A tokenizer with what turns its ids into words."""

    tokenizer: Tokenizer
    token_bytes: np.ndarray  # of the tokenizer: int32 (vocab_size,)
    word: np.dtype  # of the token stream

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Self:
        """Return the codec of a tokenizer."""
        return cls(tokenizer, tokenizer.token_bytes(), word_type(tokenizer.vocab_size))


class Counts(NamedTuple):
    """Counts of documents; of dialogues, they are of the answers."""

    documents: int = 0
    tokens: int = 0  # with the EOS of each document or answer
    raw_bytes: int = 0  # UTF-8 bytes of the text
    token_bytes: int = 0  # bytes that the tokens stand for
    too_long: int = 0  # answers that are left out

    @classmethod
    def sum(cls, counts: Iterable["Counts"]) -> Self:
        """Return the sum of each count."""
        return cls(*(sum(column) for column in zip(*counts, strict=True)))


class EncodedDocument(NamedTuple):
    """A document as tokens."""

    key: str  # decides by its hash whether the document is held out
    words: np.ndarray
    counts: Counts


def word_type(vocab_size: int) -> np.dtype:
    """Return the dtype of the words of a vocabulary: one bit wider than the ids need, and little-endian."""
    return np.dtype("<u2" if vocab_size <= 1 << 15 else "<u4")


def mark_starts(words: np.ndarray, indices: np.ndarray | int) -> None:
    """Set the top bit of the words at `indices`, in place."""
    words[indices] |= words.dtype.type(1 << _top_bit(words))


def split_words(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the token ids, and 1 where a part begins and 0 elsewhere, both of the words' shape and dtype."""
    bit = _top_bit(words)
    return words & ((1 << bit) - 1), words >> bit


def _top_bit(words: np.ndarray) -> int:
    return 8 * words.itemsize - 1
