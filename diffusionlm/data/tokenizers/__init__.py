"""Tokenizers: text to token ids and back, behind one small interface, `Tokenizer`.

A tokenizer travels inside datasets and checkpoints as the plain dictionary of `to_dict`, whole and with its hash, so
neither needs a file beside it. A new kind is one class, and its entry in `KINDS` and, if it has files, in `FILES`.
"""

import os
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import msgspec
from etils import epath

from diffusionlm import hub, schema, untrusted
from diffusionlm.data.tokenizers.base import Tokenizer, require_eos
from diffusionlm.data.tokenizers.byte import ByteTokenizer
from diffusionlm.data.tokenizers.huggingface import HuggingFaceTokenizer
from diffusionlm.data.tokenizers.huggingface_files import (
    ADDED_FILE,
    CONFIG_FILE,
    DEFINITION_FILE,
    READ_NAMES,
    parse_json,
    read_files,
)
from diffusionlm.data.tokenizers.sentencepiece import SENTENCEPIECE_FILE, SentencePieceTokenizer, train_sentencepiece
from diffusionlm.errors import UserError, suggest
from diffusionlm.storage import run_path
from diffusionlm.untrusted import read_bytes

__all__ = [
    "FILES",
    "HUB_FILES",
    "KINDS",
    "ByteTokenizer",
    "HuggingFaceTokenizer",
    "SentencePieceTokenizer",
    "Tokenizer",
    "from_dict",
    "load",
    "load_directory",
    "no_tokenizer",
    "require_eos",
    "train_sentencepiece",
]

HUB_FILES = (*READ_NAMES, SENTENCEPIECE_FILE)  # what is fetched of a repository on the Hub for its tokenizer


def from_dict(values: Mapping[str, Any]) -> Tokenizer:
    """Rebuild a tokenizer from its `to_dict`.

    Raises:
      UserError: the kind is unknown, a field is missing, unknown or of another type, or the content does not have the
        recorded hash.
    """
    kind = values.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise UserError(f"unknown tokenizer kind {untrusted.printable(repr(kind))[:60]}{suggest(str(kind), KINDS)}")
    if kind in _STORED:
        try:
            schema.convert(dict(values), _STORED[kind], f"the stored {kind} tokenizer")
        except UserError as error:
            raise UserError(f"{error}; it is damaged: restore the original file") from error
    tokenizer = KINDS[kind].from_dict(dict(values))
    if tokenizer.sha256 != values["sha256"]:
        recorded = untrusted.printable(values["sha256"])
        raise UserError(
            f"the stored {kind} tokenizer is damaged: sha256 {tokenizer.sha256}, not {recorded}; restore the original "
            "file"
        )
    return tokenizer


def load(name: str) -> Tokenizer:
    """Return a tokenizer by name.

    Args:
      name: `byte`, a file that one of the kinds reads (see `FILES`), the directory of a released model, or the address
        of one on the Hugging Face Hub, of which only these files are fetched (hf://OWNER/NAME, see `hub`).

    Raises:
      UserError: there is no such tokenizer, it cannot be read, or the Hub refuses.
    """
    if name == ByteTokenizer.kind:
        return ByteTokenizer()
    if hub.is_address(name):
        fetched = hub.fetch(name, HUB_FILES)
        if (tokenizer := load_directory(fetched.path)) is None:
            raise no_tokenizer(fetched.address)
        return tokenizer
    if run_path(name).is_dir() and (tokenizer := load_directory(name)):
        return tokenizer
    for ending, read in FILES.items():
        if name.endswith(ending):
            return read(name)
    raise UserError(
        f"unknown tokenizer {name!r}; use byte, sentencepiece (trained on the data), a file ({', '.join(FILES)}), "
        "the directory of a released model, or hf://OWNER/NAME"
    )


def no_tokenizer(address: hub.Address) -> UserError:
    """Return the error for a repository on the Hub of which no tokenizer is on the disk."""
    return UserError(
        f"{address} is not on this disk whole (connect, so that the rest is fetched), or holds no tokenizer: no "
        f"{DEFINITION_FILE}, vocabulary with merges or {SENTENCEPIECE_FILE}; give another repository, or a file"
    )


def load_directory(path: epath.PathLike, config: Mapping[str, Any] | None = None) -> Tokenizer | None:
    """Return the tokenizer in a released model's directory, or None if there is none.

    Its files are `tokenizer.json`; or else `vocab.json` and `merges.txt` (of GPT-2 also `encoder.json` and
    `vocab.bpe`); or else `tokenizer.model`; with `tokenizer_config.json`, `special_tokens_map.json` and
    `added_tokens.json`.

    Args:
      path: the directory.
      config: the content of the model's config.json, whose `bos_token_id`, `eos_token_id`, `pad_token_id` and
        `model_type` count where the files say nothing; None: the one in the directory, if any.

    Raises:
      UserError: a file is damaged, or the tokenizer is of an unknown kind.
    """
    directory = run_path(path)
    if files := read_files(directory):
        return HuggingFaceTokenizer.from_files(files, _read_config(directory) if config is None else config)
    if not (directory / SENTENCEPIECE_FILE).exists():
        return None
    tokenizer = SentencePieceTokenizer.from_file(os.fspath(directory / SENTENCEPIECE_FILE))
    added_file = directory / ADDED_FILE
    added = parse_json(read_bytes(added_file), added_file.name) if added_file.exists() else {}
    if beyond := [piece for piece, i in added.items() if i >= tokenizer.vocab_size]:
        raise UserError(
            f"{ADDED_FILE} in {str(path)!r} adds {beyond[0]!r} to {SENTENCEPIECE_FILE}, which only a "
            f"{DEFINITION_FILE} can hold; add that file"
        )
    return tokenizer


def _load_definition(path: str) -> Tokenizer:
    """Return the tokenizer of a tokenizer.json, with the settings beside it."""
    file = run_path(path)
    files = read_files(file.parent, file.name)
    if DEFINITION_FILE not in files:
        raise UserError(f"cannot read the tokenizer {path!r}: No such file or directory")
    return HuggingFaceTokenizer.from_files(files, _read_config(file.parent))


def _read_config(directory: epath.Path) -> dict[str, Any]:
    file = directory / CONFIG_FILE
    return parse_json(read_bytes(file), file.name) if file.exists() else {}


KINDS: dict[str, type[Tokenizer]] = {
    cls.kind: cls for cls in (ByteTokenizer, SentencePieceTokenizer, HuggingFaceTokenizer)
}
_Id = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]


class _Byte(schema.Record, frozen=True):
    kind: str
    sha256: schema.Sha256


class _SentencePiece(_Byte, frozen=True):
    model: str  # base64


class _HuggingFace(_Byte, frozen=True):
    family: str
    ids: tuple[_Id | None, _Id | None, _Id | None]  # of BOS, EOS and padding
    files: dict[str, str]  # base64 by name


_STORED: dict[str, type[schema.Record]] = {  # the fields of `to_dict`, by kind
    ByteTokenizer.kind: _Byte,
    SentencePieceTokenizer.kind: _SentencePiece,
    HuggingFaceTokenizer.kind: _HuggingFace,
}
FILES: dict[str, Callable[[str], Tokenizer]] = {  # by the end of the file's name
    ".model": SentencePieceTokenizer.from_file,
    DEFINITION_FILE: _load_definition,
}
