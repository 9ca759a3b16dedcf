"""Tokenizers of released models in Hugging Face's files: `tokenizer.json`, or a vocabulary with BPE merges."""

import base64
import functools
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from diffusionlm.data.tokenizers.base import SPACE_MARK
from diffusionlm.data.tokenizers.chunks import AT_WORDS, Chunks, ends_at_words
from diffusionlm.data.tokenizers.definition import (
    all_pieces,
    build,
    byte_alphabet,
    decoders_of,
    is_lossless,
    is_prefixed,
    make_special,
    without_prefix,
)
from diffusionlm.data.tokenizers.huggingface_files import (
    FAMILIES,
    control_tokens,
    definition_of,
    digest,
    family_of,
    require_known,
)
from diffusionlm.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as LibraryTokenizer

_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


class HuggingFaceTokenizer:
    """The tokenizer of a released model, run by the `tokenizers` library.

    Pieces are bytes (GPT-2, Qwen2, LLaMA 3), or text with U+2581 for a space and perhaps pieces of single bytes (LLaMA,
    Mistral). Control tokens, which are those that are flagged as special or that have a role (BOS, EOS, mask, ...),
    never result from text: one that is written in a text is encoded like any other. Added tokens that are not special
    are text, as in their own library: `encode` finds them and `decode` writes them.

    `lossless` tokenizers give `decode(encode(text)) == text` and count every byte of every text. Others rewrite some
    texts (Qwen2 composes accents) or add a leading space, which `decode` takes off again and `token_bytes` counts.
    Inside a text no space is added or taken off.

    Args:
      files: contents by name, with `tokenizer.json`, or with `vocab.json` and `merges.txt`.
      family: for a vocabulary with merges, the key of `FAMILIES`; "" with `tokenizer.json`.
      ids: the ids of BOS, EOS and padding, None for each that does not exist.

    Raises:
      UserError: a file is damaged, or the pieces are of another kind.
    """

    kind: ClassVar[str] = "huggingface"

    def __init__(self, files: Mapping[str, bytes], family: str, ids: Sequence[int | None]):
        self._contents, self._family = dict(files), family
        self.bos_id, self.eos_id, pad_id = ids
        self.pad_id = self.eos_id if pad_id is None else pad_id
        self.sha256 = digest(files, family, (self.bos_id, self.eos_id, self.pad_id))
        definition = self._definition()
        pieces = all_pieces(definition)
        self._added: dict[str, dict[str, Any]] = {token["content"]: token for token in definition["added_tokens"]}
        # Runs of spaces and line breaks, which some tokenizers add, are text.
        ordinary = [content for content, token in self._added.items() if not token["special"]]
        self.marks = tuple(text for text in ordinary if text.replace(SPACE_MARK, " ").strip())
        self.vocab_size = max(pieces.values()) + 1
        self.controls = tuple(content for content, token in self._added.items() if token["special"])
        self._byte_level, self._decoders = decoders_of(definition)
        self._prefixed = is_prefixed(definition)
        self._library = build(definition)
        self._variants = {(False, False): self._library}
        whole = functools.partial(_encode, self._library)
        self._encode = Chunks(AT_WORDS, whole).encode if ends_at_words(definition) else whole
        for content, token in self._added.items():
            if self._library.token_to_id(content) != token["id"]:
                raise UserError(f"the added token {content!r} has the id {token['id']}, which leaves a gap in the ids")
        # Encoded by its bytes, because the character itself, in a text, would be taken for a space.
        mark_ids = [pieces.get(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        self._mark_ids = [i for i in mark_ids if i is not None]
        splits = not self._byte_level and "ByteFallback" in self._decoders and None not in mark_ids
        self._splits_at_mark = splits
        self.lossless = is_lossless(definition, byte_level=self._byte_level, splits_at_mark=splits)

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], config: Mapping[str, Any]) -> Self:
        """Return the tokenizer of these files.

        Args:
          files: from `read_files`.
          config: the content of the model's config.json, for what the files leave open.

        Raises:
          UserError: as the class does, or these are the merges of a tokenizer whose way of cutting texts into words is
            not known.
        """
        family = family_of(files, config)
        pieces, control = all_pieces(definition_of(files, family)), control_tokens(files)
        usual = FAMILIES[family].special if family else {}

        def id_of(role: str) -> int | None:
            if f"{role}_token" in control:  # also where the files say that there is none
                return pieces.get(control[f"{role}_token"] or "")
            value = config.get(f"{role}_token_id")  # an id, or several
            first: Any = value[0] if isinstance(value, list) and value else value
            return first if first in pieces.values() else pieces.get(usual.get(role, ""))

        return cls(files, family, [id_of(role) for role in ("bos", "eos", "pad")])

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """See `Tokenizer`."""
        try:
            files = {name: base64.b64decode(text, validate=True) for name, text in values["files"].items()}
            family, ids, recorded = values["family"], values["ids"], values["sha256"]
            require_known(files, family)
            sha256 = digest(files, family, ids)
        except UserError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(
                "the stored huggingface tokenizer has no readable files; restore the original file"
            ) from error
        if sha256 != recorded:
            raise UserError(
                f"the stored tokenizer is damaged: sha256 {sha256}, not {recorded}; restore the original file"
            )
        return cls(files, family, ids)

    def __reduce__(self):
        return type(self), (self._contents, self._family, (self.bos_id, self.eos_id, self.pad_id))

    def to_dict(self) -> dict[str, Any]:
        """See `Tokenizer`."""
        return {
            "kind": self.kind,
            "sha256": self.sha256,
            "family": self._family,
            "ids": [self.bos_id, self.eos_id, self.pad_id],
            "files": {name: base64.b64encode(content).decode() for name, content in sorted(self._contents.items())},
        }

    def files(self) -> dict[str, bytes]:
        """See `Tokenizer`."""
        return dict(self._contents)

    def encode(self, text: str, *, inside: bool = False, special: bool = False) -> list[int]:
        """See `Tokenizer`."""
        if not special and not (inside and self._prefixed) and not self._splits_at_mark:
            return self._encode(text)
        library = self._variant(inside=inside, special=special)
        if not self._splits_at_mark or SPACE_MARK not in text:
            return _encode(library, text)
        first, *rest = text.split(SPACE_MARK)
        ids = _encode(library, first)
        for part in rest:
            ids += self._mark_ids
            ids += _encode(self._variant(inside=True, special=special), part)
        return ids

    def decode(self, ids: Sequence[int], *, inside: bool = False) -> str:
        """See `Tokenizer`."""
        library = self._variant(inside=inside, special=False)
        return library.decode([int(i) for i in ids], skip_special_tokens=True)

    def _variant(self, *, inside: bool, special: bool) -> "LibraryTokenizer":
        """Return the library's tokenizer for a text or a part inside one, with or without special tokens in it."""
        key = (inside and self._prefixed, special)
        if key not in self._variants:
            definition = self._definition()
            self._variants[key] = build(without_prefix(definition) if key[0] else definition, special=special)
        return self._variants[key]

    def _definition(self) -> dict[str, Any]:
        """Return the parsed definition, in which every token with a role is special."""
        definition = definition_of(self._contents, self._family)
        pieces = all_pieces(definition)
        texts = {i: piece for piece, i in pieces.items()}
        make_special(definition, {texts[i] for i in (self.bos_id, self.eos_id, self.pad_id) if i in texts}, pieces)
        return definition

    def token_bytes(self) -> np.ndarray:
        """See `Tokenizer`."""
        counts = np.zeros(self.vocab_size, np.int32)
        for piece, i in self._library.get_vocab(with_added_tokens=True).items():
            if not (piece in self._added and self._added[piece]["special"]):
                counts[i] = self._count_bytes(piece)
        return counts

    def piece_id(self, piece: str) -> int | None:
        """See `Tokenizer`."""
        return self._added[piece]["id"] if piece in self._added else None

    def _count_bytes(self, piece: str) -> int:
        if self._byte_level:  # a character a byte; the decoder takes a piece with any other character for plain text
            return len(piece) if byte_alphabet().issuperset(piece) else len(piece.encode())
        if "ByteFallback" in self._decoders and _BYTE_PIECE.fullmatch(piece):
            return 1
        for decoder in self._decoders.values():
            if decoder["type"] == "Replace":
                piece = piece.replace(decoder["pattern"]["String"], decoder["content"])
            elif decoder["type"] == "Metaspace":
                piece = piece.replace(decoder["replacement"], " ")
        return len(piece.encode())


def _encode(library: "LibraryTokenizer", text: str) -> list[int]:
    """Return the ids of a text, without the place of each in the text, which takes time."""
    (encoding,) = library.encode_batch_fast([text], add_special_tokens=False)
    return encoding.ids
