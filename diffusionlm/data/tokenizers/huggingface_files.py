"""The files of a tokenizer in Hugging Face's formats, and the one definition (a tokenizer.json) that they amount to."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from diffusionlm import untrusted
from diffusionlm.data.tokenizers.definition import added_token, all_pieces, make_special, require_types
from diffusionlm.errors import UserError, suggest
from diffusionlm.untrusted import printable, read_bytes

DEFINITION_FILE = "tokenizer.json"
VOCAB_FILE, MERGES_FILE, ADDED_FILE = "vocab.json", "merges.txt", "added_tokens.json"
SETTINGS_FILE, SPECIAL_FILE = "tokenizer_config.json", "special_tokens_map.json"
_EXTRA_FILES = (SETTINGS_FILE, SPECIAL_FILE, "chat_template.jinja")  # accompany either form
FILE_NAMES = (DEFINITION_FILE, VOCAB_FILE, MERGES_FILE, ADDED_FILE, *_EXTRA_FILES)  # by which files are stored
_OPENAI_NAMES = {VOCAB_FILE: "encoder.json", MERGES_FILE: "vocab.bpe"}  # of GPT-2's original release
CONFIG_FILE = "config.json"  # of the model
READ_NAMES = (*FILE_NAMES, *_OPENAI_NAMES.values(), CONFIG_FILE)  # of all files that `read_files` and its callers read


class Family(NamedTuple):
    """The settings that a vocabulary with merges leaves open: cutting texts into words, and special tokens."""

    normalizer: dict[str, Any] | None
    pre_tokenizer: dict[str, Any]
    special: dict[str, str]  # control tokens by role, used where no file names them


_END = "<|endoftext|>"
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
# Qwen2 cuts at contractions, a word with one sign before it, single digits, signs, line breaks, and runs of spaces.
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
# Dream continues Qwen2.5 and has its tokenizer under another name.
CLASSES = {"GPT2Tokenizer": "gpt2", "Qwen2Tokenizer": "qwen2", "DreamTokenizer": "qwen2"}


def read_files(directory: epath.Path, definition: str = DEFINITION_FILE) -> dict[str, bytes]:
    """Read the files of a tokenizer in a model's directory.

    Args:
      directory: where they are.
      definition: the name there of what is called tokenizer.json here.

    Returns:
      Contents by name: `tokenizer.json`, or else `vocab.json` and `merges.txt`, with the settings beside them; {} if
      the directory has neither.

    Raises:
      UserError: a file cannot be read.
    """
    if (directory / definition).exists():
        names = {DEFINITION_FILE: definition}
    else:
        pairs = ({VOCAB_FILE: VOCAB_FILE, MERGES_FILE: MERGES_FILE}, _OPENAI_NAMES)
        names = next((pair for pair in pairs if all((directory / name).exists() for name in pair.values())), {})
        if not names:
            return {}
        names = {**names, ADDED_FILE: ADDED_FILE}
    names = {**names, **{name: name for name in _EXTRA_FILES}}
    try:
        paths = {name: directory / stored_name for name, stored_name in names.items()}
        return {name: read_bytes(path) for name, path in paths.items() if path.exists()}
    except OSError as error:
        raise UserError(f"cannot read the tokenizer in {str(directory)!r}: {error.strerror or error}") from error


def require_known(files: Mapping[str, Any], family: Any) -> None:
    """Refuse a stored tokenizer with files that none of ours has: `export` writes each by its name.

    Raises:
      UserError: a name is unknown, or the files that the family needs are missing.
    """
    for name in files:
        if name not in FILE_NAMES:
            raise UserError(
                f"the stored tokenizer names the file {printable(repr(name))}, which must be one of "
                f"{', '.join(FILE_NAMES)}; restore the original file"
            )
    if family not in ("", *FAMILIES):
        raise UserError(
            f"the stored tokenizer is damaged, it has family={printable(repr(family))}"
            f"{suggest(str(family), FAMILIES)}; restore the original file"
        )
    for name in (VOCAB_FILE, MERGES_FILE) if family else (DEFINITION_FILE,):
        if name not in files:
            raise UserError(f"the stored tokenizer is damaged, it lacks {name}; restore the original file")


def read_settings(directory: epath.Path) -> dict[str, bytes]:
    """Return the contents of the files with settings that accompany a tokenizer, by name."""
    paths = {name: directory / name for name in (SETTINGS_FILE, SPECIAL_FILE)}
    return {name: untrusted.read_bytes(path) for name, path in paths.items() if path.exists()}


def parse_json(content: bytes, name: str) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
      UserError: the content of the file called `name` is anything else.
    """
    try:
        values = json.loads(content.decode("utf-8-sig"))
        if not isinstance(values, dict):
            raise ValueError(f"a JSON {type(values).__name__}, not an object")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} of the tokenizer is damaged ({error}); fetch it again") from error
    return values


def digest(files: Mapping[str, bytes], family: str, ids: Sequence[int | None]) -> str:
    """Return the sha256 that equal files, family and ids of (BOS, EOS, padding) share."""
    contents = sorted((name, hashlib.sha256(content).hexdigest()) for name, content in files.items())
    return hashlib.sha256(json.dumps([family, list(ids), contents]).encode()).hexdigest()


def family_of(files: Mapping[str, bytes], config: Mapping[str, Any]) -> str:
    """Return the key of `FAMILIES` for a vocabulary with merges, "" for a tokenizer.json, which needs none.

    Args:
      files: from `read_files`.
      config: the content of the model's config.json.

    Raises:
      UserError: the family is unknown, and so is how its texts are cut into words.
    """
    if DEFINITION_FILE in files:
        return ""
    settings = _optional_json(files, SETTINGS_FILE)
    name = settings.get("tokenizer_class")
    if name is None:  # GPT-2's own files name no class
        family = config.get("model_type", "gpt2" if SETTINGS_FILE not in files else None)
        name = f"of a model of type {family!r}"
    else:
        family = CLASSES.get(str(name).removesuffix("Fast"))
    if family not in FAMILIES:
        raise UserError(
            f"{VOCAB_FILE} and {MERGES_FILE} of the tokenizer {name} do not say how texts are cut into words, which is "
            f"known here for {', '.join(CLASSES)}; add its {DEFINITION_FILE}, which transformers' "
            "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) writes"
        )
    return family


def control_tokens(files: Mapping[str, bytes]) -> dict[str, str | None]:
    """Return the control tokens that the settings name, by role; None where they say that there is none."""
    tokens = {}
    for name in (SPECIAL_FILE, SETTINGS_FILE):  # the latter is the one that transformers uses
        for role, value in _optional_json(files, name).items():
            entries = value if isinstance(value, list) else [value]
            texts = [entry.get("content") if isinstance(entry, dict) else entry for entry in entries]
            if role in ("additional_special_tokens", "extra_special_tokens"):
                tokens |= {text: text for text in texts if isinstance(text, str)}
            elif role.endswith("_token") and (value is None or texts and isinstance(texts[0], str)):
                tokens[role] = texts[0]  # and not `add_bos_token`, which is a truth value
    return tokens


def definition_of(files: Mapping[str, bytes], family: str) -> dict[str, Any]:
    """Return the content of a tokenizer.json with all added tokens, in which everything with a role is special.

    Raises:
      UserError: a file is damaged, or the model is not byte pair encoding.
    """
    if family:
        definition = _definition_of_merges(files, FAMILIES[family])
    else:
        definition = parse_json(files[DEFINITION_FILE], DEFINITION_FILE)
    model = definition.get("model")
    if not isinstance(model, dict) or not model.get("vocab"):
        raise UserError(f"{DEFINITION_FILE} of the tokenizer is damaged (no vocabulary); fetch it again")
    # Others, such as unigrams, may find a control token in a text as if it were a word.
    if (kind := model.get("type", "BPE")) != "BPE" or not isinstance(model["vocab"], dict):
        raise UserError(f"{DEFINITION_FILE} holds a {kind} model; only byte pair encoding (BPE) is supported")
    require_types(definition, f"{VOCAB_FILE if family else DEFINITION_FILE} of the tokenizer")
    # Texts are encoded whole, deterministically, and without start or end tokens.
    definition |= {"truncation": None, "padding": None, "post_processor": None}
    model.pop("dropout", None)
    try:
        added = _added_tokens(definition, files, family)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"the added tokens of the tokenizer are damaged ({error!r}); fetch its files again") from error
    definition["added_tokens"] = list(added.values())
    require_types(definition, "added tokens of the tokenizer")
    special = {text for text in control_tokens(files).values() if text}
    special |= {model["unk_token"]} if model.get("unk_token") else set()
    make_special(definition, special, all_pieces(definition))
    return definition


def _definition_of_merges(files: Mapping[str, bytes], family: Family) -> dict[str, Any]:
    vocab = parse_json(files[VOCAB_FILE], VOCAB_FILE)
    lines = files[MERGES_FILE].decode("utf-8", errors="replace").splitlines()
    pairs = [line.split(" ") for line in lines if line.strip() and not line.startswith("#version")]
    if bad := [pair for pair in pairs if len(pair) != 2 or "".join(pair) not in vocab]:
        raise UserError(
            f"{MERGES_FILE} of the tokenizer is damaged: {' '.join(bad[0])!r} is not a merge of {VOCAB_FILE}"
        )
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": family.normalizer,
        "pre_tokenizer": family.pre_tokenizer,
        "decoder": _BYTES,
        "model": {"type": "BPE", "vocab": vocab, "merges": pairs},
    }


def _added_tokens(definition: dict[str, Any], files: Mapping[str, bytes], family: str) -> dict[str, dict[str, Any]]:
    """Return the added tokens by content, from all files that list some."""
    # `normalized: False` looks for them in the text as it is: where a normalizer puts a space before them, the library
    # would neither find them everywhere nor recognise them in `decode`.
    added = {token["content"]: token | {"normalized": False} for token in definition.get("added_tokens") or []}
    if ADDED_FILE in files and family:
        added |= {text: added_token(text, i) for text, i in parse_json(files[ADDED_FILE], ADDED_FILE).items()}
    for i, token in (_optional_json(files, SETTINGS_FILE).get("added_tokens_decoder") or {}).items():
        default = added_token(token["content"], int(i)) | token | {"normalized": False}
        known = added.setdefault(token["content"], default)
        known["special"] |= token.get("special", False)
    return added


def _optional_json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    return parse_json(files[name], name) if name in files else {}
