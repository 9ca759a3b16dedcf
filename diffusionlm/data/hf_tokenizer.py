"""Tokenizers of released models: `tokenizer.json`, or the vocabulary and merges of GPT-2 and Qwen2."""

import base64
import functools
import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from diffusionlm.errors import UserError

WHITESPACE = "\u2581"  # what stands for a space inside the pieces of LLaMA and Mistral
# What other programs need to load it; of GPT-2 also under the names of its first release.
FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "encoder.json",
    "vocab.bpe",
    "added_tokens.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
)
PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
# How Qwen2 cuts a text into words, from its tokenizer.json.
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class HFTokenizer:
    """A tokenizer as Hugging Face's `tokenizers` has it, in the files that it came in.

    Special tokens that stand in a text are text: `<|endoftext|>` in a prompt ends nothing. Added tokens that are not
    special, such as `<tool_call>`, are one token wherever they stand (`marks`).

    Args:
      files: name -> content, of `FILES`.
      ids: of "bos", "eos" and "pad" where the files say nothing of them.

    Raises:
      UserError: a file is damaged, or of a kind that is not known here.
    """

    kind = "huggingface"

    def __init__(self, files: Mapping[str, bytes], ids: Mapping[str, int | None]):
        self._files, self._ids = dict(files), dict(ids)
        try:
            self._described, self._tokenizer = _built(self._files)
            settings = [
                json.loads(files.get(name, b"{}")) for name in ("tokenizer_config.json", "special_tokens_map.json")
            ]
        except UserError:
            raise
        except Exception as error:  # the library raises its own, without a type
            raise UserError(f"the tokenizer files ({', '.join(files)}) cannot be read: {error}") from error
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._added = {i: token for i, token in self._tokenizer.get_added_tokens_decoder().items()}
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.bos_id, self.eos_id, pad_id = (self._named(kind, settings) for kind in ("bos", "eos", "pad"))
        self.pad_id = self.eos_id if pad_id is None else pad_id
        told = {name: hashlib.sha256(content).hexdigest() for name, content in self._files.items()}
        self.sha256 = hashlib.sha256(json.dumps([told, self._ids], sort_keys=True).encode()).hexdigest()
        self.marks = tuple(
            token.content for token in self._added.values() if not token.special and token.content.strip()
        )

    @classmethod
    def from_directory(cls, path: Path, config: Mapping[str, Any]) -> "HFTokenizer | None":
        """That of a model's directory; None where there is none. `config`: its config.json, for ids."""
        has = {name: path / name for name in FILES if (path / name).exists()}
        if "tokenizer.json" not in has and not any(set(pair) <= set(has) for pair in PAIRS):
            return None
        try:
            files = {name: file.read_bytes() for name, file in has.items()}
        except OSError as error:
            raise UserError(f"cannot read the tokenizer in {path}: {error.strerror}") from error
        ids = {kind: config.get(f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
        return cls(files, {kind: i[0] if isinstance(i, list) and i else i for kind, i in ids.items()})

    @classmethod
    def from_dict(cls, values: dict) -> "HFTokenizer":
        try:
            files = {name: zlib.decompress(base64.b64decode(text)) for name, text in values["files"].items()}
            found = cls(files, values["ids"])
        except (KeyError, TypeError, ValueError, AttributeError, zlib.error) as error:
            raise UserError("the stored tokenizer has no readable files; restore the original checkpoint") from error
        if found.sha256 != (recorded := values.get("sha256")):
            raise UserError(
                f"the stored tokenizer is damaged: sha256 {found.sha256}, not {recorded}; restore the original file"
            )
        return found

    def __reduce__(self):
        return type(self), (self._files, self._ids)

    def to_dict(self) -> dict:
        files = {name: base64.b64encode(zlib.compress(text, 9)).decode() for name, text in self._files.items()}
        return {"kind": self.kind, "sha256": self.sha256, "ids": self._ids, "files": files}

    def files(self) -> dict[str, bytes]:
        return dict(self._files)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids if i < self.vocab_size], skip_special_tokens=True)

    def token_bytes(self) -> np.ndarray:
        counts = np.zeros(self.vocab_size, np.int32)
        for token, i in self._tokenizer.get_vocab(with_added_tokens=True).items():
            counts[i] = self._bytes_of(i, token)
        return counts

    def piece_id(self, piece: str) -> int | None:
        return next((i for i, token in self._added.items() if token.content == piece), None)

    def _bytes_of(self, i: int, token: str) -> int:
        if i in self._added:
            return 0 if self._added[i].special else len(token.encode())
        if self._byte_level:
            return len(token)  # a character stands for a byte
        if self._byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return 1
        return 0 if token == self._described["model"].get("unk_token") else len(token.replace(WHITESPACE, " ").encode())

    @functools.cached_property
    def _byte_level(self) -> bool:
        return "ByteLevel" in _types(self._described.get("decoder"))

    @functools.cached_property
    def _byte_fallback(self) -> bool:
        return "ByteFallback" in _types(self._described.get("decoder"))

    def _named(self, kind: str, settings: Sequence[Mapping[str, Any]]) -> int | None:
        """The id of the token that a text begins, ends or is filled up with."""
        for one in settings:
            if f"{kind}_token" not in one:
                continue
            token = one[f"{kind}_token"]
            content = token.get("content") if isinstance(token, dict) else token
            return None if content is None else self._tokenizer.token_to_id(content)
        return self._ids.get(kind)


def _types(part: Any) -> set[str]:
    """The types of a decoder and of those that it is made of."""
    if not isinstance(part, dict):
        return set()
    inner = [_types(one) for one in part.get("decoders", [])]
    return {part.get("type", "")}.union(*inner)


def _built(files: Mapping[str, bytes]) -> tuple[dict, Tokenizer]:
    """The tokenizer of some files, and what tokenizer.json says, or would say, of it."""
    if "tokenizer.json" in files:
        found = Tokenizer.from_str(files["tokenizer.json"].decode())
    else:
        found = _from_merges(files)
    described = json.loads(found.to_str())
    if not _types(described.get("decoder")) & {"ByteLevel", "ByteFallback", "Metaspace", "Replace"}:
        raise UserError(
            f"tokenizer.json has decoder {described.get('decoder')}, whose bytes are not known here; known are "
            "byte-level and metaspace tokenizers"
        )
    return described, found


def _from_merges(files: Mapping[str, bytes]) -> Tokenizer:
    vocabulary, merges = next(pair for pair in PAIRS if set(pair) <= set(files))
    told = json.loads(files.get("tokenizer_config.json", b"{}"))
    kind = told.get("tokenizer_class", "GPT2Tokenizer").removesuffix("Fast")
    if kind not in ("GPT2Tokenizer", "Qwen2Tokenizer"):
        raise UserError(
            f"tokenizer_config.json has tokenizer_class={kind!r}; of vocabularies with merges, GPT2Tokenizer and "
            "Qwen2Tokenizer are known here, so make a tokenizer.json of it"
        )
    lines = files[merges].decode().split("\n")
    pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    found = Tokenizer(models.BPE(vocab=json.loads(files[vocabulary]), merges=pairs))
    if kind == "Qwen2Tokenizer":
        found.normalizer = normalizers.NFC()
        words = pre_tokenizers.Split(Regex(QWEN2_WORDS), behavior="isolated")
        found.pre_tokenizer = pre_tokenizers.Sequence(
            [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    else:
        found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    added = json.loads(files.get("added_tokens.json", b"{}"))
    special = {end} | {one["content"] for one in told.get("added_tokens_decoder", {}).values() if one["special"]}
    known = sorted(added, key=added.get) or ([end] if found.token_to_id(end) is not None else [])
    for token in known:
        found.add_tokens([AddedToken(token, special=token in special, normalized=False)])
    return found
