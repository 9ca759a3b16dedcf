"""The parsed content of a tokenizer.json."""

import functools
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from diffusionlm import schema
from diffusionlm.data.tokenizers.base import SPACE_MARK
from diffusionlm.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as LibraryTokenizer

Definition = dict[str, Any]
_Id = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]


class _Token(msgspec.Struct):
    """The part of an added token that is read here; a definition has more fields, which the library reads."""

    id: _Id
    content: str
    special: bool = False


class _Step(msgspec.Struct):
    """A normalizer, a pre-tokenizer or a decoder, or a sequence of them."""

    type: str
    normalizers: list["_Step"] = []
    pretokenizers: list["_Step"] = []
    decoders: list["_Step"] = []
    pattern: dict[str, str] | str | None = None
    content: str | None = None
    replacement: str | None = None


class _Model(msgspec.Struct):
    vocab: dict[str, _Id]
    unk_token: str | None = None


class _Definition(msgspec.Struct):
    model: _Model
    added_tokens: list[_Token] | None = None
    normalizer: _Step | None = None
    pre_tokenizer: _Step | None = None
    decoder: _Step | None = None


def require_types(definition: Definition, source: str) -> None:
    """Refuse a definition in which a part that is read here has another type than in the library's files.

    Raises:
      UserError: there is such a part; the message begins with `source`.
    """
    schema.convert(definition, _Definition, source)


def added_token(content: str, i: int) -> dict[str, Any]:
    """Return an added token without any flags."""
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return {"id": i, "content": content, **dict.fromkeys(flags, False)}


def all_pieces(definition: Definition) -> dict[str, int]:
    """Return the ids of all pieces, added tokens included."""
    return definition["model"]["vocab"] | {token["content"]: token["id"] for token in definition["added_tokens"]}


def make_special(definition: Definition, texts: set[str], pieces: Mapping[str, int]) -> None:
    """Turn those of `texts` that are `pieces` into special tokens, in place."""
    added = {token["content"]: token for token in definition["added_tokens"]}
    for text in texts & set(pieces):
        added.setdefault(text, added_token(text, pieces[text]))["special"] = True
    definition["added_tokens"] = sorted(added.values(), key=lambda token: token["id"])


def build(definition: Definition, *, special: bool = False) -> "LibraryTokenizer":
    """Return the tokenizer of the `tokenizers` library.

    Args:
      definition: the definition.
      special: special tokens in a text are their tokens, and not text.

    Raises:
      UserError: the library refuses the definition.
    """
    from tokenizers import Tokenizer  # here, because only released models need it

    try:
        tokenizer = Tokenizer.from_str(json.dumps(definition))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"the tokenizer's files are damaged, or newer than `tokenizers` here: {error}") from error
    tokenizer.encode_special_tokens = not special
    return tokenizer


@functools.cache
def byte_alphabet() -> frozenset[str]:
    """Return the characters that stand for the 256 bytes in byte-level pieces."""
    from tokenizers.pre_tokenizers import ByteLevel

    return frozenset(ByteLevel.alphabet())


def decoders_of(definition: Definition) -> tuple[bool, dict[str, dict[str, Any]]]:
    """Return a flag, True if pieces are bytes, and the decoders by type.

    Raises:
      UserError: the decoders are of another kind, for which the bytes of a token are not known.
    """
    decoders = {step["type"]: step for step in steps(definition.get("decoder"), "decoders")}
    if set(decoders) - {"Fuse"} == {"ByteLevel"}:
        return True, decoders
    replaces = "Metaspace" in decoders or "String" in decoders.get("Replace", {}).get("pattern", {})
    if not replaces or set(decoders) - {"Replace", "Metaspace", "ByteFallback", "Fuse", "Strip"}:
        raise UserError(
            f"tokenizer.json decodes by {' and '.join(decoders) or 'nothing'}, for which the bytes of a token are not "
            "known; use a tokenizer with byte-level or SentencePiece-like pieces"
        )
    return False, decoders


def without_prefix(definition: Definition) -> Definition:
    """Return a copy that neither puts a space before a text nor takes one off: the tokenizer inside a text."""
    normalizers = [step for step in steps(definition.get("normalizer"), "normalizers") if step["type"] != "Prepend"]
    decoders = [step for step in steps(definition.get("decoder"), "decoders") if step["type"] != "Strip"]
    cutters = steps(definition.get("pre_tokenizer"), "pretokenizers")
    return definition | {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": list(map(_unprefixed, cutters))},
        "decoder": {"type": "Sequence", "decoders": list(map(_unprefixed, decoders))},
    }


def is_prefixed(definition: Definition) -> bool:
    """Return True if a space is put before a text, or taken off one, so that the inside of a text is encoded apart."""
    normalizers = steps(definition.get("normalizer"), "normalizers")
    decoders = list(steps(definition.get("decoder"), "decoders"))
    cutters = list(steps(definition.get("pre_tokenizer"), "pretokenizers"))
    return (
        any(step["type"] == "Prepend" for step in normalizers)
        or any(step["type"] == "Strip" for step in decoders)
        or any(step["type"] == "Metaspace" and step.get("prepend_scheme") != "never" for step in cutters + decoders)
        or any(step.get("add_prefix_space") for step in cutters if step["type"] == "ByteLevel")
    )


def _unprefixed(step: dict[str, Any]) -> dict[str, Any]:
    """Return a step that cuts or joins words, without the space before the first."""
    if step["type"] == "Metaspace":
        return step | {"prepend_scheme": "never", "add_prefix_space": False}
    return step | {"add_prefix_space": False} if "add_prefix_space" in step else step


def is_lossless(definition: Definition, *, byte_level: bool, splits_at_mark: bool) -> bool:
    """Return True if decoding the ids of any text gives it back, and its bytes are counted exactly.

    Args:
      definition: the definition.
      byte_level: whether pieces are bytes.
      splits_at_mark: whether the caller encodes U+2581, the mark that stands for a space, by its bytes.
    """
    pieces = all_pieces(definition)
    normalizers = list(steps(definition.get("normalizer"), "normalizers"))
    cutters = list(steps(definition.get("pre_tokenizer"), "pretokenizers"))
    keep = {"ByteLevel", "Split", "Digits", "Punctuation", "Metaspace"}  # others drop whitespace
    if any(step["type"] not in keep or step.get("behavior") == "Removed" for step in cutters):
        return False
    if byte_level:
        return not normalizers and not is_prefixed(definition) and byte_alphabet() <= set(pieces)
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}
    prefix = is_prefixed(definition)
    all_bytes = all(f"<0x{byte:02X}>" in pieces for byte in range(256))
    return splits_at_mark and all_bytes and not prefix and all(step == spaces for step in normalizers)


def steps(part: Mapping[str, Any] | None, inside: str) -> Iterator[dict[str, Any]]:
    """Yield the simple normalizers, pre-tokenizers or decoders that `part` is made of."""
    if part is not None and part["type"] == "Sequence":
        for step in part[inside]:
            yield from steps(step, inside)
    elif part is not None:
        yield dict(part)
