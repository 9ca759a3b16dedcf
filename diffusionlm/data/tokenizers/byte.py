"""A tokenizer that needs no training: one id per byte."""

import hashlib
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import numpy as np


class ByteTokenizer:
    """One id per UTF-8 byte: 0 to 255 are the bytes, 256 is EOS and padding; there is no BOS."""

    kind: ClassVar[str] = "byte"
    vocab_size = 257
    bos_id: int | None = None
    eos_id: int | None = 256
    pad_id: int | None = 256
    sha256 = hashlib.sha256(b"diffusionlm byte tokenizer, EOS 256").hexdigest()
    marks: tuple[str, ...] = ()
    controls: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Return the byte tokenizer; there is only one."""
        return cls()

    def to_dict(self) -> dict[str, Any]:
        """See `Tokenizer`."""
        return {"kind": self.kind, "sha256": self.sha256}

    def files(self) -> dict[str, bytes]:
        """See `Tokenizer`."""
        return {}

    def encode(self, text: str, *, inside: bool = False, special: bool = False) -> list[int]:
        """See `Tokenizer`."""
        return list(text.encode())

    def decode(self, ids: Sequence[int], *, inside: bool = False) -> str:
        """See `Tokenizer`."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def token_bytes(self) -> np.ndarray:
        """See `Tokenizer`."""
        return (np.arange(self.vocab_size) < 256).astype(np.int32)

    def piece_id(self, piece: str) -> int | None:
        """Return None: no piece but EOS is a token of its own, and that has no text."""
        return None
