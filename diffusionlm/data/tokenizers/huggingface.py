"""Tokenizers of released models in Hugging Face's files: `tokenizer.json`, or a vocabulary with BPE merges."""

import base64
import functools
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from diffusionlm.errors import UserError

WHITESPACE = "\u2581"  # what stands for a space inside pieces that are no bytes
DEFINITION = "tokenizer.json"
VOCAB, MERGES, ADDED = "vocab.json", "merges.txt", "added_tokens.json"
SETTINGS, SPECIAL = "tokenizer_config.json", "special_tokens_map.json"
_BESIDE = (SETTINGS, SPECIAL, "chat_template.jinja")  # what goes with either form
_ORIGINAL = {VOCAB: "encoder.json", MERGES: "vocab.bpe"}  # as OpenAI named GPT-2's
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


class Family(NamedTuple):
    """What a vocabulary with merges does not say of itself."""

    normalizer: dict | None
    pre_tokenizer: dict
    special: dict[str, str]  # control tokens by role, where no file names them


_END = "<|endoftext|>"
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
# Qwen2 cuts at contractions, a word with one sign before it, single digits, signs, line breaks, and runs of space.
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_CUT = {"type": "Split", "pattern": {"Regex": _QWEN2_WORDS}, "behavior": "Isolated", "invert": False}
FAMILIES = {
    "gpt2": Family(None, _BYTES | {"use_regex": True}, {"bos": _END, "eos": _END}),
    "qwen2": Family(
        {"type": "NFC"},
        {"type": "Sequence", "pretokenizers": [_QWEN2_CUT, _BYTES | {"use_regex": False}]},
        {"eos": _END, "pad": _END},
    ),
}
# Dream goes on from Qwen2.5 and has its tokenizer under a name of its own.
CLASSES = {"GPT2Tokenizer": "gpt2", "Qwen2Tokenizer": "qwen2", "DreamTokenizer": "qwen2"}


class HuggingFaceTokenizer:
    """The tokenizer of a released model, run by the `tokenizers` library.

    Pieces are bytes (GPT-2, Qwen2, LLaMA 3), or text with U+2581 for a space and perhaps pieces of single bytes (LLaMA,
    Mistral). Control tokens, which are those that are flagged as special or that have a role (BOS, EOS, mask, ...),
    come out of no text: one that is written in a text is encoded as any other text. Added tokens that are not special
    are text, as in their own library: `encode` finds them and `decode` writes them.

    `lossless` ones give `decode(encode(text)) == text` and count every byte of every text. Others rewrite some texts
    (Qwen2 composes accents) or add a leading space that `decode` takes off again, and that their `token_bytes` count.

    Args:
      files: names and contents, with `tokenizer.json`, or with `vocab.json` and `merges.txt`.
      family: of a vocabulary with merges, the key of `FAMILIES`; "" with `tokenizer.json`.
      ids: of BOS, EOS and padding, None for what there is not.

    Raises:
      UserError: a file that is damaged, or pieces of another kind.
    """

    kind = "huggingface"

    def __init__(self, files: Mapping[str, bytes], family: str, ids: Sequence[int | None]):
        self._contents, self._family = dict(files), family
        self.bos_id, self.eos_id, pad_id = ids
        self.pad_id = self.eos_id if pad_id is None else pad_id
        self.sha256 = _digest(files, family, (self.bos_id, self.eos_id, self.pad_id))
        definition = _definition(files, family)
        pieces = _pieces(definition)
        texts = {i: piece for piece, i in pieces.items()}
        roles = {texts.get(i) for i in (self.bos_id, self.eos_id, self.pad_id)}
        _add_special(definition, {name for name in roles if name is not None}, pieces)
        self._added = {one["content"]: one for one in definition["added_tokens"]}
        self.vocab_size = max(pieces.values()) + 1
        self._by_bytes, self._decoders = _decoders(definition)
        self._library = _build(definition)
        for content, one in self._added.items():
            if self._library.token_to_id(content) != one["id"]:
                raise UserError(f"the added token {content!r} has the id {one['id']}, which leaves a gap in the ids")
        # Otherwise the character itself, in a text, would be taken for a space.
        self._whitespace_ids = [pieces.get(f"<0x{byte:02X}>") for byte in WHITESPACE.encode()]
        self._splits = not self._by_bytes and "ByteFallback" in self._decoders and None not in self._whitespace_ids
        self._inner = _build(_without_prefix(definition)) if self._splits else None
        self.lossless = _is_lossless(definition, pieces, self._by_bytes, self._splits)

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], config: Mapping[str, Any]) -> "HuggingFaceTokenizer":
        """The tokenizer of these files; `config` is the model's config.json, for what they leave open.

        Raises:
          UserError: as of the class, or merges of a tokenizer whose way of cutting texts into words is not known.
        """
        family = "" if DEFINITION in files else _family(files, config)
        pieces, named = _pieces(_definition(files, family)), _named(files)
        usual = FAMILIES[family].special if family else {}

        def id_of(role: str) -> int | None:
            if f"{role}_token" in named:  # also where it says that there is none
                return pieces.get(named[f"{role}_token"])
            told = config.get(f"{role}_token_id")
            told = told[0] if isinstance(told, list) and told else told
            return told if told in pieces.values() else pieces.get(usual.get(role))

        return cls(files, family, [id_of(role) for role in ("bos", "eos", "pad")])

    @classmethod
    def from_dict(cls, values: dict) -> "HuggingFaceTokenizer":
        try:
            files = {name: base64.b64decode(text, validate=True) for name, text in values["files"].items()}
            family, ids, recorded = values["family"], values["ids"], values["sha256"]
            found = _digest(files, family, ids)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(
                "the stored huggingface tokenizer has no readable files; restore the original file"
            ) from error
        if found != recorded:
            raise UserError(
                f"the stored tokenizer is damaged: sha256 {found}, not {recorded}; restore the original file"
            )
        return cls(files, family, ids)

    def __reduce__(self):
        return type(self), (self._contents, self._family, (self.bos_id, self.eos_id, self.pad_id))

    def to_dict(self) -> dict:
        return {
            "kind": self.kind,
            "sha256": self.sha256,
            "family": self._family,
            "ids": [self.bos_id, self.eos_id, self.pad_id],
            "files": {name: base64.b64encode(content).decode() for name, content in sorted(self._contents.items())},
        }

    def files(self) -> dict[str, bytes]:
        return dict(self._contents)

    def encode(self, text: str) -> list[int]:
        first, *rest = text.split(WHITESPACE) if self._splits else [text]
        ids = self._library.encode(first, add_special_tokens=False).ids
        for part in rest:
            ids += self._whitespace_ids
            ids += self._inner.encode(part, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._library.decode([int(i) for i in ids], skip_special_tokens=True)

    def token_bytes(self) -> np.ndarray:
        found = np.zeros(self.vocab_size, np.int32)
        for piece, i in self._library.get_vocab(with_added_tokens=True).items():
            if not (piece in self._added and self._added[piece]["special"]):
                found[i] = self._bytes_of(piece)
        return found

    def piece_id(self, piece: str) -> int | None:
        return self._added[piece]["id"] if piece in self._added else None

    @functools.cached_property
    def marks(self) -> tuple[str, ...]:
        # Runs of spaces and line breaks, which some tokenizers add, are text.
        texts = [content for content, one in self._added.items() if not one["special"]]
        return tuple(text for text in texts if text.replace(WHITESPACE, " ").strip())

    def _bytes_of(self, piece: str) -> int:
        if self._by_bytes:  # a character a byte; the decoder takes a piece with any other character for plain text
            return len(piece) if _alphabet().issuperset(piece) else len(piece.encode())
        if "ByteFallback" in self._decoders and _BYTE_PIECE.fullmatch(piece):
            return 1
        for decoder in self._decoders.values():
            if decoder["type"] == "Replace":
                piece = piece.replace(decoder["pattern"]["String"], decoder["content"])
            elif decoder["type"] == "Metaspace":
                piece = piece.replace(decoder["replacement"], " ")
        return len(piece.encode())


def read_files(directory: epath.Path, definition: str = DEFINITION) -> dict[str, bytes]:
    """The files of a tokenizer in a model's directory, under the names that `tokenizer.json` and its like go by; or {}.

    Raises:
      UserError: a file that cannot be read.
    """
    if (directory / definition).exists():
        names = {DEFINITION: definition}
    else:
        pairs = ({VOCAB: VOCAB, MERGES: MERGES}, _ORIGINAL)
        names = next((pair for pair in pairs if all((directory / name).exists() for name in pair.values())), {})
        names = names and {**names, ADDED: ADDED}
    if not names:
        return {}
    names = {**names, **{name: name for name in _BESIDE}}
    try:
        found = {ours: directory / theirs for ours, theirs in names.items()}
        return {name: path.read_bytes() for name, path in found.items() if path.exists()}
    except OSError as error:
        raise UserError(f"cannot read the tokenizer in {str(directory)!r}: {error.strerror}") from error


def parse_json(content: bytes, name: str) -> dict:
    """A JSON object; `UserError` for anything else."""
    try:
        found = json.loads(content.decode("utf-8-sig"))
        if not isinstance(found, dict):
            raise ValueError(f"a JSON {type(found).__name__}, not an object")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} of the tokenizer is damaged ({error}); fetch it again") from error
    return found


def _digest(files: Mapping[str, bytes], family: str, ids: Sequence[int | None]) -> str:
    contents = sorted((name, hashlib.sha256(content).hexdigest()) for name, content in files.items())
    return hashlib.sha256(json.dumps([family, list(ids), contents]).encode()).hexdigest()


def _family(files: Mapping[str, bytes], config: Mapping[str, Any]) -> str:
    settings = parse_json(files[SETTINGS], SETTINGS) if SETTINGS in files else {}
    name = settings.get("tokenizer_class")
    if name is None:  # GPT-2's own files name no class
        family = config.get("model_type", "gpt2" if SETTINGS not in files else None)
        name = f"of a model of type {family!r}"
    else:
        family = CLASSES.get(str(name).removesuffix("Fast"))
    if family not in FAMILIES:
        raise UserError(
            f"{VOCAB} and {MERGES} of the tokenizer {name} do not say how texts are cut into words, which is known "
            f"here for {', '.join(CLASSES)}; add its {DEFINITION}"
        )
    return family


def _named(files: Mapping[str, bytes]) -> dict[str, str | None]:
    """The control tokens that the settings name, by role."""
    found = {}
    for name in (SPECIAL, SETTINGS):  # the latter is what their own library goes by
        for role, value in (parse_json(files[name], name) if name in files else {}).items():
            several = value if isinstance(value, list) else [value]
            texts = [one.get("content") if isinstance(one, dict) else one for one in several]
            if role in ("additional_special_tokens", "extra_special_tokens"):
                found |= {text: text for text in texts if isinstance(text, str)}
            elif role.endswith("_token") and (value is None or texts and isinstance(texts[0], str)):
                found[role] = texts[0]  # and not `add_bos_token`, which is a truth value
    return found


def _definition(files: Mapping[str, bytes], family: str) -> dict:
    """The content of a tokenizer.json, with all added tokens, in which everything with a role is special."""
    if family:
        definition = _of_merges(files, FAMILIES[family])
    else:
        definition = parse_json(files[DEFINITION], DEFINITION)
    if not isinstance(definition.get("model"), dict) or not definition["model"].get("vocab"):
        raise UserError(f"{DEFINITION} of the tokenizer is damaged (no vocabulary); fetch it again")
    # Others, such as unigrams, may find a control token in a text as if it were a word.
    if (kind := definition["model"].get("type", "BPE")) != "BPE" or not isinstance(definition["model"]["vocab"], dict):
        raise UserError(f"{DEFINITION} holds a {kind} model; only those of byte pair encoding (BPE) are known here")
    # Texts are encoded whole, always alike, and without start or end tokens.
    definition |= {"truncation": None, "padding": None, "post_processor": None}
    definition["model"].pop("dropout", None)
    try:
        added = _all_added(definition, files, family)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"the added tokens of the tokenizer are damaged ({error!r}); fetch its files again") from error
    definition["added_tokens"] = list(added.values())
    roles = {text for text in _named(files).values() if text}
    roles |= {definition["model"]["unk_token"]} if definition["model"].get("unk_token") else set()
    _add_special(definition, roles, _pieces(definition))
    return definition


def _of_merges(files: Mapping[str, bytes], family: Family) -> dict:
    vocab = parse_json(files[VOCAB], VOCAB)
    lines = files[MERGES].decode("utf-8", errors="replace").splitlines()
    pairs = [line.split(" ") for line in lines if line.strip() and not line.startswith("#version")]
    if bad := [pair for pair in pairs if len(pair) != 2 or "".join(pair) not in vocab]:
        raise UserError(f"{MERGES} of the tokenizer is damaged: {' '.join(bad[0])!r} is no merge of {VOCAB}")
    model = {"type": "BPE", "vocab": vocab, "merges": pairs}
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": family.normalizer,
        "pre_tokenizer": family.pre_tokenizer,
        "decoder": _BYTES,
        "model": model,
    }


def _all_added(definition: dict, files: Mapping[str, bytes], family: str) -> dict[str, dict]:
    """Added tokens by content, from all files that list some."""
    # They are looked for in the text as it is: where a normalizer puts a space before them, the library would neither
    # find them everywhere nor know them again in `decode`.
    added = {one["content"]: one | {"normalized": False} for one in definition.get("added_tokens") or []}
    if ADDED in files and family:
        added |= {text: _added(text, i) for text, i in parse_json(files[ADDED], ADDED).items()}
    settings = parse_json(files[SETTINGS], SETTINGS) if SETTINGS in files else {}
    for i, one in (settings.get("added_tokens_decoder") or {}).items():
        known = added.setdefault(one["content"], _added(one["content"], int(i)) | one | {"normalized": False})
        known["special"] |= one.get("special", False)
    return added


def _added(content: str, i: int) -> dict:
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return {"id": i, "content": content, **dict.fromkeys(flags, False)}


def _pieces(definition: dict) -> dict[str, int]:
    """All ids by piece, those of added tokens too."""
    return definition["model"]["vocab"] | {one["content"]: one["id"] for one in definition["added_tokens"]}


def _add_special(definition: dict, roles: set[str], pieces: Mapping[str, int]) -> None:
    """Makes special tokens of these pieces."""
    added = {one["content"]: one for one in definition["added_tokens"]}
    for text in roles & set(pieces):
        added.setdefault(text, _added(text, pieces[text]))["special"] = True
    definition["added_tokens"] = sorted(added.values(), key=lambda one: one["id"])


def _build(definition: dict) -> Any:
    from tokenizers import Tokenizer  # here, because only models from elsewhere need it

    try:
        found = Tokenizer.from_str(json.dumps(definition))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"the tokenizer's files are damaged, or newer than `tokenizers` here: {error}") from error
    found.encode_special_tokens = True  # as text
    return found


@functools.cache
def _alphabet() -> frozenset[str]:
    """The characters that stand for the 256 bytes."""
    from tokenizers.pre_tokenizers import ByteLevel

    return frozenset(ByteLevel.alphabet())


def _steps(part: dict | None, inside: str) -> Iterator[dict]:
    """A normalizer, pre-tokenizer or decoder as the simple ones that it is made of."""
    if part is not None and part["type"] == "Sequence":
        for one in part[inside]:
            yield from _steps(one, inside)
    elif part is not None:
        yield part


def _decoders(definition: dict) -> tuple[bool, dict[str, dict]]:
    """Whether pieces are bytes, and the decoders by type."""
    found = {one["type"]: one for one in _steps(definition.get("decoder"), "decoders")}
    if set(found) - {"Fuse"} == {"ByteLevel"}:
        return True, found
    replaces = "Metaspace" in found or "String" in found.get("Replace", {}).get("pattern", {})
    if not replaces or set(found) - {"Replace", "Metaspace", "ByteFallback", "Fuse", "Strip"}:
        raise UserError(
            f"{DEFINITION} decodes by {' and '.join(found) or 'nothing'}, for which the bytes of a token are not "
            "known; use a tokenizer with byte-level or SentencePiece-like pieces"
        )
    return False, found


def _without_prefix(definition: dict) -> dict:
    """One that does not begin a text with a space of its own."""
    normalizers = [one for one in _steps(definition.get("normalizer"), "normalizers") if one["type"] != "Prepend"]
    cutters = [
        {**one, "prepend_scheme": "never", "add_prefix_space": False} if one["type"] == "Metaspace" else one
        for one in _steps(definition.get("pre_tokenizer"), "pretokenizers")
    ]
    return definition | {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": cutters},
    }


def _is_lossless(definition: dict, pieces: Mapping[str, int], by_bytes: bool, splits: bool) -> bool:
    normalizers = list(_steps(definition.get("normalizer"), "normalizers"))
    cutters = list(_steps(definition.get("pre_tokenizer"), "pretokenizers"))
    keep = {"ByteLevel", "Split", "Digits", "Punctuation", "Metaspace"}
    if any(one["type"] not in keep or one.get("behavior") == "Removed" for one in cutters):  # drop white space
        return False
    if by_bytes:
        prefix = any(one.get("add_prefix_space") for one in cutters)
        return not normalizers and not prefix and _alphabet() <= set(pieces)
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": WHITESPACE}
    prefix = any(one["type"] == "Metaspace" and one.get("prepend_scheme") != "never" for one in cutters)
    whole = all(f"<0x{byte:02X}>" in pieces for byte in range(256))
    return splits and whole and not prefix and all(one == spaces for one in normalizers)
