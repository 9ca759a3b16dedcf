"""Tokenizers as Hugging Face's libraries store them: tokenizer.json, or the older vocab.json with merges.txt."""

import base64
import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffusionlm.errors import UserError

TOKENIZER = "tokenizer.json"
PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))  # vocabulary and merges, in either's names
# What else belongs to a tokenizer and travels with it.
COMPANIONS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "chat_template.jinja",
)
WHITESPACE = "\u2581"  # what metaspace tokenizers write for a space
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
# How texts are cut into words before bytes are merged, where there is no tokenizer.json that says it.
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CLASSES = {"GPT2Tokenizer": "gpt2", "Qwen2Tokenizer": "qwen2", "DreamTokenizer": "qwen2"}


class HuggingFaceTokenizer:
    """A byte-level BPE tokenizer (GPT-2, Qwen2) or one of metaspaces and bytes (LLaMA, Mistral).

    Text is text: what looks like a special token is encoded letter by letter. Added tokens that are not special are
    `marks`. Where a leading space is added to texts, `token_bytes` count it.

    Args:
      files: contents by name: `tokenizer.json`, or a vocabulary and its merges, and any of `COMPANIONS`.

    Raises:
      UserError: files that are damaged or contradict each other, or a tokenizer of another kind.
    """

    kind = "huggingface"

    def __init__(self, files: Mapping[str, bytes]):
        self._files = dict(sorted(files.items()))
        digest = hashlib.sha256()
        for name, content in self._files.items():
            digest.update(f"{name} {len(content)}\n".encode() + content)
        self.sha256 = digest.hexdigest()
        self._settings = self._json("tokenizer_config.json") | self._json("special_tokens_map.json")
        try:
            self._library = self._read() if TOKENIZER in files else self._assembled()
            described = json.loads(self._library.to_str())
        except UserError:
            raise
        except Exception as error:  # the library raises a bare Exception
            raise UserError(f"the tokenizer's files cannot be read: {' '.join(str(error).split())}") from error
        self._library.encode_special_tokens = True  # special tokens in a text are text
        self._library.no_truncation()
        self._library.no_padding()
        self._byte_level = "ByteLevel" in _types(described.get("decoder"))
        if not self._byte_level and not {"ByteFallback", "Metaspace"} & _types(described.get("decoder")):
            raise UserError(
                f"a tokenizer of kind {described['model'].get('type')} with another decoder than ByteLevel, Metaspace "
                "or ByteFallback, which this version cannot count bytes of; use another tokenizer"
            )
        self._added = {one["id"]: one for one in described["added_tokens"]}
        self._ids = self._library.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._ids.values()) + 1
        self.bos_id, self.eos_id, pad_id = (self._named(f"{name}_token") for name in ("bos", "eos", "pad"))
        self.pad_id = self.eos_id if pad_id is None else pad_id
        unknown = described["model"].get("unk_token")
        self._special_ids = {i for i, one in self._added.items() if one["special"]}
        self._never = self._special_ids - {self._ids.get(unknown)}

    @classmethod
    def from_file(cls, path: str) -> "HuggingFaceTokenizer":
        """The tokenizer of a tokenizer.json and of the files beside it."""
        found = cls.from_directory(Path(path).parent) if Path(path).name == TOKENIZER else None
        if found is None:
            raise UserError(f"cannot read the tokenizer {path!r}: no such file; give a {TOKENIZER}")
        return found

    @classmethod
    def from_directory(cls, directory: Path) -> "HuggingFaceTokenizer | None":
        """The tokenizer whose files are in a directory; None where there are none."""
        whole = next((one for one in ((TOKENIZER,), *PAIRS) if all((directory / n).is_file() for n in one)), None)
        if whole is None:
            return None
        names = [*whole, *(name for name in COMPANIONS if (directory / name).is_file())]
        return cls({name: (directory / name).read_bytes() for name in names})

    @classmethod
    def from_dict(cls, values: dict) -> "HuggingFaceTokenizer":
        try:
            files = {name: base64.b64decode(text, validate=True) for name, text in values["files"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError("the stored tokenizer has no readable files; restore the original file") from error
        tokenizer = cls(files)
        if tokenizer.sha256 != values.get("sha256"):
            raise UserError(
                f"the stored tokenizer is damaged: sha256 {tokenizer.sha256}, not {values.get('sha256')}; restore the "
                "original file"
            )
        return tokenizer

    def __reduce__(self):
        return type(self), (self._files,)

    def to_dict(self) -> dict:
        files = {name: base64.b64encode(content).decode() for name, content in self._files.items()}
        return {"kind": self.kind, "sha256": self.sha256, "files": files}

    def files(self) -> dict[str, bytes]:
        return dict(self._files)

    def encode(self, text: str) -> list[int]:
        ids = self._library.encode(text, add_special_tokens=False).ids
        if found := self._never.intersection(ids):
            piece = self._library.id_to_token(min(found))
            raise UserError(f"a text holds {piece!r}, which is a token of its own and no text; remove it")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        # By itself the library writes a special token out whose text it has normalised.
        text_ids = [int(i) for i in ids if int(i) not in self._special_ids]
        return self._library.decode(text_ids, skip_special_tokens=False)

    def token_bytes(self) -> np.ndarray:
        counts = np.zeros(self.vocab_size, np.int32)
        for piece, i in self._ids.items():
            counts[i] = self._bytes_of(piece, self._added.get(i))
        return counts

    def piece_id(self, piece: str) -> int | None:
        i = self._ids.get(piece)
        return i if i in self._added else None

    @functools.cached_property
    def marks(self) -> tuple[str, ...]:
        return tuple(one["content"] for one in self._added.values() if not one["special"] and one["content"].strip())

    def _bytes_of(self, piece: str, added: Mapping[str, Any] | None) -> int:
        if added is not None:
            return 0 if added["special"] else len(piece.encode())
        if self._byte_level:  # a letter for each byte
            return len(piece)
        return 1 if _BYTE.fullmatch(piece) else len(piece.replace(WHITESPACE, " ").encode())

    def _named(self, name: str) -> int | None:
        """The id of "eos_token", for instance, which is told as a text or as {"content": a text}."""
        told = self._settings.get(name)
        piece = told.get("content") if isinstance(told, dict) else told
        return self._ids.get(piece)

    def _json(self, name: str) -> dict:
        try:
            told = json.loads(self._files.get(name, b"{}"))
        except ValueError as error:
            raise UserError(f"the tokenizer's {name} is damaged: {error}; restore it") from error
        return told if isinstance(told, dict) else {}

    def _read(self) -> Any:
        from tokenizers import Tokenizer  # here, as what only looks at settings needs none

        return Tokenizer.from_str(self._files[TOKENIZER].decode())

    def _assembled(self) -> Any:
        """From vocabulary and merges, as the library's own class of this name would."""
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

        asked = self._settings.get("tokenizer_class", "GPT2Tokenizer").removesuffix("Fast")
        if asked not in _CLASSES:
            raise UserError(
                f"tokenizer_config.json names the class {asked}, and this version makes {', '.join(_CLASSES)} of a "
                f"vocabulary and merges; give a {TOKENIZER}"
            )
        names = next(pair for pair in PAIRS if all(name in self._files for name in pair))
        vocabulary = json.loads(self._files[names[0]])
        lines = self._files[names[1]].decode().split("\n")
        merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
        library = Tokenizer(models.BPE(vocabulary, merges))
        if _CLASSES[asked] == "qwen2":
            library.normalizer = normalizers.NFC()
            library.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(_QWEN2_WORDS), "isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            )
        else:
            library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        library.decoder = decoders.ByteLevel()
        added = self._to_add(vocabulary)
        for i, token in sorted(added.items()):
            if not token["special"]:
                library.add_tokens([AddedToken(token["content"], special=False, normalized=False)])
            else:
                library.add_special_tokens([AddedToken(token["content"], special=True, normalized=False)])
            if library.token_to_id(token["content"]) != i:
                raise UserError(
                    f"the added token {token['content']!r} has id {i}, and would get "
                    f"{library.token_to_id(token['content'])}; give a {TOKENIZER}"
                )
        return library

    def _to_add(self, vocabulary: Mapping[str, int]) -> dict[int, dict]:
        """Tokens beside those that merges make, by id."""
        added = {int(i): token for i, token in self._settings.get("added_tokens_decoder", {}).items()}
        for content, i in self._json("added_tokens.json").items():
            added.setdefault(i, {"content": content, "special": True})
        if "<|endoftext|>" in vocabulary:  # GPT-2's only one, which no file of its own names
            added.setdefault(vocabulary["<|endoftext|>"], {"content": "<|endoftext|>", "special": True})
            for name in ("bos_token", "eos_token"):
                self._settings.setdefault(name, "<|endoftext|>")
        return {i: {"special": False, **token} for i, token in added.items()}


def _types(part: Any) -> set[str]:
    """The types of a part of a tokenizer.json and of all within it."""
    if isinstance(part, list):
        return set().union(*map(_types, part))
    if not isinstance(part, dict):
        return set()
    return {part.get("type")} | set().union(*map(_types, part.values()))
