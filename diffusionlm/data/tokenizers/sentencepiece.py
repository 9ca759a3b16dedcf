"""Tokenizers of the SentencePiece library: trained here, or read from a tokenizer.model."""

import base64
import functools
import hashlib
import io
import re
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import sentencepiece

from diffusionlm.data.tokenizers import sentencepiece_proto
from diffusionlm.data.tokenizers.base import SPACE_MARK
from diffusionlm.data.tokenizers.chunks import AT_SPACES, Chunks
from diffusionlm.errors import UserError
from diffusionlm.untrusted import read_bytes

SENTENCEPIECE_FILE = "tokenizer.model"


class SentencePieceTokenizer:
    """A SentencePiece model, trained by `train_sentencepiece` or elsewhere.

    With `lossless` models, which include those trained here, `decode(encode(text)) == text` and `token_bytes` counts
    every byte of every text. A model from elsewhere that rewrites text or adds a leading space keeps doing so, and its
    `token_bytes` count that space, which `decode` takes off again. Inside a text no space is added or taken off.

    Args:
      model: the serialized model, the content of a `tokenizer.model` file.

    Raises:
      UserError: `model` is not a SentencePiece model.
    """

    kind: ClassVar[str] = "sentencepiece"

    def __init__(self, model: bytes):
        self._serialized = model
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
            proto = sentencepiece_proto.Model.FromString(model)
        except Exception as error:  # the library's RuntimeError, or protobuf's DecodeError
            raise UserError(
                f"not a SentencePiece model ({len(model)} bytes): give the content of a tokenizer.model file"
            ) from error
        normalizer = proto.normalizer_spec
        self._lossless_inside = proto.trainer_spec.byte_fallback and not normalizer.precompiled_charsmap
        self._keeps_whitespace = not normalizer.remove_extra_whitespaces
        self.lossless = self._lossless_inside and self._keeps_whitespace and not normalizer.add_dummy_prefix
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.vocab_size: int = self._model.get_piece_size()
        self.bos_id, self.eos_id, pad_id = (
            i if i >= 0 else None for i in (self._model.bos_id(), self._model.eos_id(), self._model.pad_id())
        )
        self.pad_id = self.eos_id if pad_id is None else pad_id
        self._single_tokens = {
            p.piece: i
            for i, p in enumerate(proto.pieces)
            if p.type in (sentencepiece_proto.CONTROL, sentencepiece_proto.USER_DEFINED)
        }
        self.controls = tuple(p.piece for p in proto.pieces if p.type == sentencepiece_proto.CONTROL)
        # Control pieces in a text are encoded as text, and runs of spaces and line breaks are text.
        defined = [p.piece for p in proto.pieces if p.type == sentencepiece_proto.USER_DEFINED]
        self.marks = tuple(piece for piece in defined if piece.replace(SPACE_MARK, " ").strip())
        # Without pieces that go on after a space, pairs are merged between spaces alone.
        crossing = any(SPACE_MARK in p.piece.lstrip(SPACE_MARK) for p in proto.pieces)
        self._ends_at_spaces = proto.trainer_spec.model_type == sentencepiece_proto.BPE and not (crossing or defined)

    @classmethod
    def from_file(cls, path: str) -> Self:
        """Read a tokenizer.model.

        Raises:
          UserError: there is no such file, or it is not a SentencePiece model.
        """
        try:
            return cls(read_bytes(path))
        except OSError as error:
            raise UserError(f"cannot read the tokenizer {path!r}: {error.strerror}") from error

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """See `Tokenizer`."""
        try:
            model = base64.b64decode(values["model"], validate=True)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                "the stored sentencepiece tokenizer has no readable model; restore the original file"
            ) from error
        sha256, recorded = hashlib.sha256(model).hexdigest(), values.get("sha256")
        if sha256 != recorded:
            raise UserError(
                f"the stored tokenizer is damaged: sha256 {sha256}, not {recorded}; restore the original file"
            )
        return cls(model)

    def __reduce__(self):
        return type(self), (self._serialized,)

    def to_dict(self) -> dict[str, Any]:
        """See `Tokenizer`."""
        return {"kind": self.kind, "sha256": self.sha256, "model": base64.b64encode(self._serialized).decode()}

    def files(self) -> dict[str, bytes]:
        """See `Tokenizer`."""
        return {SENTENCEPIECE_FILE: self._serialized}

    def encode(self, text: str, *, inside: bool = False, special: bool = False) -> list[int]:
        """See `Tokenizer`; after a control token a text begins."""
        if not special or not self.controls:
            return self._encode_text(text, inside)
        ids: list[int] = []
        for part in re.split(f"({'|'.join(map(re.escape, self.controls))})", text):
            if part in self._single_tokens:
                ids.append(self._single_tokens[part])
                inside = False
            elif part:
                ids += self._encode_text(part, inside)
        return ids

    def _encode_text(self, text: str, inside: bool) -> list[int]:
        model = self._inner if inside else self._model
        if not self._lossless_inside or not (inside or self._keeps_whitespace):
            return model.encode(text)
        first, *rest = text.split(SPACE_MARK)
        ids = self._encode_part(first, model)
        for part in rest:  # SentencePiece would take the mark itself for a space
            ids += self._space_mark_ids
            ids += self._encode_part(part, self._inner)
        return ids

    def _encode_part(self, text: str, model: sentencepiece.SentencePieceProcessor) -> list[int]:
        """Return the ids of a text without marks, of which the model may treat the beginning in its own way."""
        if not self._ends_at_spaces:
            return model.encode(text)
        begin = AT_SPACES.match(text)
        size = begin.end() if begin and model is not self._inner else 0
        return (model.encode(text[:size]) if size else []) + self._chunks.encode(text[size:])

    @functools.cached_property
    def _chunks(self) -> Chunks:
        return Chunks(AT_SPACES, self._inner.encode)

    @functools.cached_property
    def _inner(self) -> sentencepiece.SentencePieceProcessor:
        """The model as it is inside a text, where spaces are what they are."""
        proto = sentencepiece_proto.Model.FromString(self._serialized)
        normalizer = proto.normalizer_spec
        if not normalizer.add_dummy_prefix and not normalizer.remove_extra_whitespaces:
            return self._model
        normalizer.add_dummy_prefix = normalizer.remove_extra_whitespaces = False
        return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())

    @functools.cached_property
    def _space_mark_ids(self) -> list[int]:
        return [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]

    def decode(self, ids: Sequence[int], *, inside: bool = False) -> str:
        """See `Tokenizer`."""
        model = self._inner if inside else self._model
        return model.decode([int(i) for i in ids if i < self.vocab_size])

    def token_bytes(self) -> np.ndarray:
        """See `Tokenizer`."""
        return np.array([self._count_bytes(i) for i in range(self.vocab_size)], np.int32)

    def _count_bytes(self, i: int) -> int:
        if self._model.is_control(i) or self._model.is_unknown(i):
            return 0
        if self._model.is_byte(i):
            return 1
        return len(self._model.id_to_piece(i).replace(SPACE_MARK, " ").encode())

    def piece_id(self, piece: str) -> int | None:
        """See `Tokenizer`."""
        return self._single_tokens.get(piece)


def train_sentencepiece(texts: Iterable[str], vocab_size: int) -> SentencePieceTokenizer:
    """Train a lossless byte-pair-encoding model with exactly `vocab_size` pieces; equal texts give equal models.

    Ids: 0 unknown (never produced), 1 BOS, 2 EOS, 3-258 the bytes, then the learned pieces. Pieces never cross a line
    break, which is a byte piece itself. Nothing is normalised, and runs of whitespace may become pieces.

    Raises:
      UserError: the text is too small, or has too many different characters, for that many pieces.
    """
    lines = [line for text in texts for line in text.splitlines() if line]  # SentencePiece hides a generator's errors
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=1 << 30,  # the default silently skips longer lines
            minloglevel=2,
        )
    except RuntimeError as error:
        if largest := re.search(r"value <= (\d+)", str(error)):
            reason = f"is more pieces than this text yields; use at most {largest[1]}, or more text"
        elif smallest := re.search(r"required_chars\. \d+ vs (\d+)", str(error)):
            reason = f"is too small for the 256 bytes and the characters of this text; use at least {smallest[1]}"
        else:
            reason = "cannot be reached: there is no text to train on"
        raise UserError(f"vocab_size={vocab_size} of a SentencePiece tokenizer {reason}") from error
    return SentencePieceTokenizer(model.getvalue())
