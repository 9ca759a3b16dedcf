"""Text to token ids and back, behind one small interface.

A tokenizer travels inside datasets and checkpoints as the plain dictionary of `to_dict`, whole and with its hash, so
that neither needs a file beside it. A further kind is one class, its entry in `KINDS` and, if it has files, in `FILES`.
"""

import base64
import functools
import hashlib
import io
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import sentencepiece
from etils import epath
from sentencepiece import sentencepiece_model_pb2

from diffusionlm.data.tokenizers import huggingface as hf_tokenizer
from diffusionlm.data.tokenizers.huggingface import WHITESPACE, HuggingFaceTokenizer
from diffusionlm.errors import UserError, suggest

SENTENCEPIECE_FILE = "tokenizer.model"


class Tokenizer(Protocol):
    """What the rest of the library asks of a tokenizer."""

    kind: ClassVar[str]  # the key of `KINDS`
    vocab_size: int  # ids are 0 .. vocab_size - 1
    bos_id: int | None  # starts a document, where the model has such a piece
    eos_id: int | None  # ends a document; never produced by `encode`
    pad_id: int | None  # fills what is not text; EOS where there is no piece of its own, as SMDM and LLaDA pad
    sha256: str  # equal for equal tokenizers
    # what `encode` makes one token that is no text of, whatever stands around it, such as the mask of a chat model
    marks: tuple[str, ...]

    @classmethod
    def from_dict(cls, values: dict) -> "Tokenizer":
        """Rebuilds what `to_dict` gave; `UserError` where it is damaged."""
        ...

    def to_dict(self) -> dict:
        """Everything needed to rebuild it, in JSON types."""
        ...

    def files(self) -> dict[str, bytes]:
        """File name -> content: what other programs need to load it; {} where it has no files."""
        ...

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without BOS or EOS."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; control ids and those beyond the vocabulary stand for nothing, broken UTF-8 for U+FFFD."""
        ...

    def token_bytes(self) -> np.ndarray:
        """int32 (vocab_size,): the UTF-8 bytes of text that each id stands for; 0 for control ids."""
        ...

    def piece_id(self, piece: str) -> int | None:
        """The id of a piece that is one token whatever stands around it, such as `<|eot_id|>`; None without it."""
        ...


class ByteTokenizer:
    """One id per UTF-8 byte: 0-255 are the bytes, 256 is EOS and padding; there is no BOS."""

    kind = "byte"
    vocab_size = 257
    bos_id = None
    eos_id = 256
    pad_id = 256
    sha256 = hashlib.sha256(b"diffusionlm byte tokenizer, EOS 256").hexdigest()
    marks = ()

    @classmethod
    def from_dict(cls, values: dict) -> "ByteTokenizer":
        return cls()

    def to_dict(self) -> dict:
        return {"kind": self.kind, "sha256": self.sha256}

    def files(self) -> dict[str, bytes]:
        return {}

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def token_bytes(self) -> np.ndarray:
        return (np.arange(self.vocab_size) < 256).astype(np.int32)

    def piece_id(self, piece: str) -> int | None:
        return None


class SentencePieceTokenizer:
    """A SentencePiece model, trained by `train_sentencepiece` or elsewhere.

    `lossless` models (ours are) give `decode(encode(text)) == text` and count every byte of every text. A model from
    elsewhere that rewrites text or adds a leading space keeps doing so, and its `token_bytes` count what it decodes to
    before that space is taken off again.

    Args:
      model: the serialized model, the content of a `tokenizer.model` file.

    Raises:
      UserError: `model` is not a SentencePiece model.
    """

    kind = "sentencepiece"

    def __init__(self, model: bytes):
        self._serialized = model
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
            proto = sentencepiece_model_pb2.ModelProto.FromString(model)
        except Exception as error:  # RuntimeError of the library or DecodeError of protobuf
            raise UserError(
                f"not a SentencePiece model ({len(model)} bytes): give the content of a tokenizer.model file"
            ) from error
        normalizer = proto.normalizer_spec
        self.lossless = (
            proto.trainer_spec.byte_fallback
            and not normalizer.precompiled_charsmap
            and not normalizer.add_dummy_prefix
            and not normalizer.remove_extra_whitespaces
        )
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.vocab_size = self._model.get_piece_size()
        self.bos_id, self.eos_id, pad_id = (
            i if i >= 0 else None for i in (self._model.bos_id(), self._model.eos_id(), self._model.pad_id())
        )
        self.pad_id = self.eos_id if pad_id is None else pad_id

    @classmethod
    def from_file(cls, path: str) -> "SentencePieceTokenizer":
        try:
            return cls(Path(path).read_bytes())
        except OSError as error:
            raise UserError(f"cannot read the tokenizer {path!r}: {error.strerror}") from error

    @classmethod
    def from_dict(cls, values: dict) -> "SentencePieceTokenizer":
        try:
            model = base64.b64decode(values["model"], validate=True)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                "the stored sentencepiece tokenizer has no readable model; restore the original file"
            ) from error
        found, recorded = hashlib.sha256(model).hexdigest(), values.get("sha256")
        if found != recorded:
            raise UserError(
                f"the stored tokenizer is damaged: sha256 {found}, not {recorded}; restore the original file"
            )
        return cls(model)

    def __reduce__(self):
        return type(self), (self._serialized,)

    def to_dict(self) -> dict:
        return {"kind": self.kind, "sha256": self.sha256, "model": base64.b64encode(self._serialized).decode()}

    def files(self) -> dict[str, bytes]:
        return {SENTENCEPIECE_FILE: self._serialized}

    def encode(self, text: str) -> list[int]:
        if not self.lossless:
            return self._model.encode(text)
        first, *rest = text.split(WHITESPACE)
        ids = self._model.encode(first)
        for part in rest:  # SentencePiece would take the character itself for a space
            ids += self._whitespace_ids
            ids += self._model.encode(part)
        return ids

    @functools.cached_property
    def _whitespace_ids(self) -> list[int]:
        return [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in WHITESPACE.encode()]

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([int(i) for i in ids if i < self.vocab_size])

    def token_bytes(self) -> np.ndarray:
        return np.array([self._bytes_of(i) for i in range(self.vocab_size)], np.int32)

    def piece_id(self, piece: str) -> int | None:
        i = self._model.piece_to_id(piece)
        kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
        return i if self._kinds[i] in (kinds.CONTROL, kinds.USER_DEFINED) else None

    @functools.cached_property
    def marks(self) -> tuple[str, ...]:
        # A text's control pieces are encoded as any other text. Runs of spaces and line breaks are text.
        defined = sentencepiece_model_pb2.ModelProto.SentencePiece.USER_DEFINED
        pieces = [self._model.id_to_piece(i) for i, kind in enumerate(self._kinds) if kind == defined]
        return tuple(piece for piece in pieces if piece.replace(WHITESPACE, " ").strip())

    @functools.cached_property
    def _kinds(self) -> list[int]:
        return [piece.type for piece in sentencepiece_model_pb2.ModelProto.FromString(self._serialized).pieces]

    def _bytes_of(self, i: int) -> int:
        if self._model.is_control(i) or self._model.is_unknown(i):
            return 0
        if self._model.is_byte(i):
            return 1
        return len(self._model.id_to_piece(i).replace(WHITESPACE, " ").encode())


def _of_definition(path: str) -> Tokenizer:
    """The tokenizer of a tokenizer.json, with the settings beside it."""
    file = epath.Path(path)
    files = hf_tokenizer.read_files(file.parent, file.name)
    if hf_tokenizer.DEFINITION not in files:
        raise UserError(f"cannot read the tokenizer {path!r}: No such file or directory")
    return HuggingFaceTokenizer.from_files(files, _config_of(file.parent))


KINDS: dict[str, type[Tokenizer]] = {
    one.kind: one for one in (ByteTokenizer, SentencePieceTokenizer, HuggingFaceTokenizer)
}
FILES: dict[str, Callable[[str], Tokenizer]] = {  # by the name's ending
    ".model": SentencePieceTokenizer.from_file,
    hf_tokenizer.DEFINITION: _of_definition,
}


def from_dict(values: dict) -> Tokenizer:
    """Rebuilds what `to_dict` gave.

    Raises:
      UserError: the kind is unknown, or the content does not have the recorded hash.
    """
    kind = values.get("kind")
    if kind not in KINDS:
        raise UserError(f"unknown tokenizer kind {kind!r}{suggest(str(kind), KINDS)}")
    return KINDS[kind].from_dict(values)


def load(name: str) -> Tokenizer:
    """A tokenizer by name: `byte`, a file that one of the kinds reads (`FILES`), or a released model's directory."""
    if name == ByteTokenizer.kind:
        return ByteTokenizer()
    directory = epath.Path(name)
    if directory.is_dir() and (found := load_directory(directory)):
        return found
    for ending, read in FILES.items():
        if str(name).endswith(ending):
            return read(str(name))
    raise UserError(
        f"unknown tokenizer {str(name)!r}; use byte, sentencepiece (trained on the data), a file ({', '.join(FILES)}) "
        "or the directory of a released model"
    )


def load_directory(path: epath.PathLike, config: dict | None = None) -> Tokenizer | None:
    """The tokenizer in a released model's directory; None where there is none.

    Its files are `tokenizer.json`; or else `vocab.json` and `merges.txt` (of GPT-2 also `encoder.json` and
    `vocab.bpe`); or else `tokenizer.model`; with `tokenizer_config.json`, `special_tokens_map.json` and
    `added_tokens.json`.

    Args:
      path: the directory.
      config: the content of the model's config.json, whose `bos_token_id`, `eos_token_id`, `pad_token_id` and
        `model_type` count where the files say nothing; None: the one in the directory, if any.

    Raises:
      UserError: a damaged file, or a tokenizer of a kind that is not known here.
    """
    directory = epath.Path(path)
    if files := hf_tokenizer.read_files(directory):
        return HuggingFaceTokenizer.from_files(files, _config_of(directory) if config is None else config)
    if not (directory / SENTENCEPIECE_FILE).exists():
        return None
    found = SentencePieceTokenizer.from_file(os.fspath(directory / SENTENCEPIECE_FILE))
    added = directory / hf_tokenizer.ADDED
    more = hf_tokenizer.parse_json(added.read_bytes(), added.name) if added.exists() else {}
    if beyond := [piece for piece, i in more.items() if i >= found.vocab_size]:
        raise UserError(
            f"{added.name} in {str(path)!r} adds {beyond[0]!r} to {SENTENCEPIECE_FILE}, which only a "
            f"{hf_tokenizer.DEFINITION} can hold; add that file"
        )
    return found


def _config_of(directory: epath.Path) -> dict:
    file = directory / "config.json"
    return hf_tokenizer.parse_json(file.read_bytes(), file.name) if file.exists() else {}


def train_sentencepiece(texts: Iterable[str], vocab_size: int) -> SentencePieceTokenizer:
    """Trains a lossless byte-pair-encoding model with exactly `vocab_size` pieces; equal texts give equal models.

    Ids: 0 unknown (never produced), 1 BOS, 2 EOS, 3-258 the bytes, then the learned pieces. Pieces never cross a line
    break, which is a byte piece itself. Nothing is normalised, and whitespace runs may become pieces.

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
        if most := re.search(r"value <= (\d+)", str(error)):
            reason = f"is more pieces than this text yields; use at most {most[1]}, or more text"
        elif least := re.search(r"required_chars\. \d+ vs (\d+)", str(error)):
            reason = f"is too small for the 256 bytes and the characters of this text; use at least {least[1]}"
        else:
            reason = "cannot be reached: there is no text to train on"
        raise UserError(f"vocab_size={vocab_size} of a SentencePiece tokenizer {reason}") from error
    return SentencePieceTokenizer(model.getvalue())
