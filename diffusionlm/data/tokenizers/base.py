"""The interface of a tokenizer."""

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol, Self

import numpy as np

from diffusionlm.errors import UserError

SPACE_MARK = "\u2581"  # stands for a space inside pieces of text


class Tokenizer(Protocol):
    """Text to token ids and back.

    Attributes:
      kind: the key of `tokenizers.KINDS`.
      vocab_size: ids are 0 to vocab_size - 1.
      bos_id: starts a document; None without such a piece.
      eos_id: ends a document; `encode` never produces it.
      pad_id: fills what is not text; it is EOS where there is no piece of its own, as SMDM and LLaDA pad.
      sha256: equal for equal tokenizers.
      marks: strings, such as the mask of a chat model, that `encode` turns into one token although they are not text.
      controls: the control tokens that have a written form, such as `<|endoftext|>`; `encode` takes them for text
        unless it is told otherwise.
    """

    kind: ClassVar[str]
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    sha256: str
    marks: tuple[str, ...]
    controls: tuple[str, ...]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Rebuild a tokenizer from its `to_dict`.

        Raises:
          UserError: the values are damaged.
        """
        ...

    def to_dict(self) -> dict[str, Any]:
        """Return everything needed to rebuild the tokenizer, in JSON types."""
        ...

    def files(self) -> dict[str, bytes]:
        """Return the files that other programs need to load it, by name; {} if it has none."""
        ...

    def encode(self, text: str, *, inside: bool = False, special: bool = False) -> list[int]:
        """Return the ids of `text`, without BOS or EOS.

        Args:
          text: a text, or a part of one.
          inside: the text continues another, so that a tokenizer that puts a space before every text puts none.
          special: `controls` in the text are their tokens, as in the released models' own libraries.
        """
        ...

    def decode(self, ids: Sequence[int], *, inside: bool = False) -> str:
        """Return the text of `ids`.

        Control ids and ids beyond the vocabulary stand for nothing, broken UTF-8 for U+FFFD.

        Args:
          ids: token ids.
          inside: the text continues another, so that a space at its start is its own. What `encode` makes of a part
            inside a text, this turns back into it, if the vocabulary can write all of its characters.
        """
        ...

    def token_bytes(self) -> np.ndarray:
        """Return the UTF-8 bytes of text that each id stands for, 0 for control ids: int32 (vocab_size,)."""
        ...

    def piece_id(self, piece: str) -> int | None:
        """Return the id of a piece that is one token whatever surrounds it, such as `<|eot_id|>`, or None."""
        ...


def require_eos(tokenizer: Tokenizer, name: str = "") -> int:
    """Return the EOS id.

    Raises:
      UserError: the tokenizer, called `name` in the message, has none.
    """
    if tokenizer.eos_id is None:
        name = name or f"of kind {tokenizer.kind}"
        raise UserError(f"tokenizer {name} has no EOS piece, which ends every document; use one that has")
    return tokenizer.eos_id
