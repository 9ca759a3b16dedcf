"""Sources of documents: text, jsonl and json files, TFDS datasets and named corpora, as one stream of raw items.

A source only reads; the workers decode and check (`text_of`).
"""

import functools
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from etils import epath

from diffusionlm.data import corpora
from diffusionlm.errors import UserError, suggest

TEXT_ENDINGS = (".txt", ".md", ".txt.gz", ".md.gz")  # one document a file
JSON_ENDINGS = (".jsonl", ".jsonl.gz")  # one document a line
LIST_ENDINGS = (".json", ".json.gz")  # a list of documents; a directory of texts does not include them
_DIALOGUES = ".jsonl and .json"
TFDS_NAME = re.compile(r"tfds:(?P<name>[^:]+(:[\d*]+\.[\d*]+\.[\d*]+)?)(:(?P<split>.+))?")
DEFAULT_FRACTION = 0.01  # held out if neither a validation source nor a fraction is given


class Item(NamedTuple):
    """One document, raw."""

    location: str  # for messages: file:line, file, or the example's name
    payload: bytes
    is_json: bool  # a JSON object, not the text itself
    progress: int  # bytes of the source that this item used up


class Source(Protocol):
    """A finite stream of items in a fixed order."""

    @property
    def total(self) -> int:
        """The sum of the items' progress, for the progress bar; an estimate for TFDS."""
        ...

    def describe(self) -> Any:
        """Return what identifies the source, in JSON types."""
        ...

    def __iter__(self) -> Iterator[Item]: ...


class Files:
    """Text files (a document each), jsonl (a document a line) and json (a list of documents), in this order."""

    def __init__(self, paths: Sequence[epath.Path]):
        self.paths = paths
        self._sizes = [path.stat().length for path in paths]
        self.total = sum(self._sizes)

    def describe(self) -> Any:
        """Return the names and sizes of the files."""
        return [[path.name, size] for path, size in zip(self.paths, self._sizes, strict=True)]

    def __iter__(self) -> Iterator[Item]:
        for path in self.paths:
            location = str(path)
            try:
                with path.open("rb") as raw, gzip.open(raw) if path.suffix == ".gz" else raw as stream:
                    if path.name.endswith(JSON_ENDINGS):
                        position = 0
                        for number, line in enumerate(stream, start=1):
                            location = f"{path}:{number}"
                            before, position = position, raw.tell()
                            yield Item(location, line, True, position - before)
                    elif path.name.endswith(LIST_ENDINGS):
                        yield from _list_items(location, stream.read())
                    else:
                        yield Item(location, stream.read(), False, raw.tell())
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise UserError(
                    f"{location}: damaged gzip data after this point ({error}); fetch the file again"
                ) from error
            except OSError as error:
                raise UserError(f"cannot read {str(path)!r}: {error.strerror or error}") from error


def _list_items(location: str, content: bytes) -> Iterator[Item]:
    """Yield the members of a JSON list, each as a line of jsonl."""
    try:
        members = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{location}: invalid JSON: {error}") from error
    if not isinstance(members, list):
        raise UserError(
            f"{location}: a JSON {type(members).__name__}, not a list of objects; name lines of JSON .jsonl"
        )
    for i, member in enumerate(members):
        yield Item(f"{location}[{i}]", json.dumps(member).encode(), True, len(content) // len(members))


class Texts:
    """Documents that a function makes when they are first needed."""

    def __init__(self, name: Any, make: Callable[[], Sequence[Item]]):
        self._name, self._make = name, functools.cache(make)

    @property
    def total(self) -> int:
        """The sum of the items' progress."""
        return sum(item.progress for item in self._make())

    def describe(self) -> Any:
        """Return the name."""
        return self._name

    def __iter__(self) -> Iterator[Item]:
        return iter(self._make())


class Tfds:
    """The text feature of a split of any TFDS dataset, which is downloaded and prepared as ArrayRecord if need be.

    Raises:
      UserError: the split cannot be loaded, or has no such feature.
    """

    def __init__(self, name: str, split: str, text_field: str):
        import tensorflow_datasets as tfds  # here, because the workers of a file source do not need it

        self._name, self._split, self._field = name, split, text_field
        try:
            builder: Any = tfds.builder(name, file_format="array_record")
            builder.download_and_prepare()
            self._examples = builder.as_data_source(split)
        except Exception as error:  # builders of third parties raise anything
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"cannot load split {split!r} of tfds:{name}: {reason or type(error).__name__}") from error
        if text_field not in builder.info.features:
            known = suggest(text_field, builder.info.features)
            raise UserError(f"tfds:{name} has no feature {text_field!r}{known}; choose it with text_field")
        self._version = str(builder.version)
        self._bytes = builder.info.dataset_size // max(1, sum(s.num_examples for s in builder.info.splits.values()))
        self.total = self._bytes * len(self._examples)

    def describe(self) -> Any:
        """Return the dataset, its version and the split."""
        return {"tfds": self._name, "version": self._version, "split": self._split}

    def __iter__(self) -> Iterator[Item]:
        for i in range(len(self._examples)):
            text = self._examples[i][self._field]
            location = f"tfds:{self._name}:{self._split}[{i}]"
            if not isinstance(text, str | bytes):
                raise UserError(
                    f"{location}: feature {self._field!r} is {type(text).__name__}, not text; choose text_field"
                )
            yield Item(location, text.encode() if isinstance(text, str) else text, False, self._bytes)


def resolve(spec: str | Sequence[str], text_field: str | None) -> Mapping[str, Source]:
    """Return the sources of a specification by split; only corpora have a validation split of their own.

    Args:
      spec: a registered corpus, `tfds:NAME[:split]`, or one or several files, directories (their text and jsonl files,
        not those of directories below) or glob patterns.
      text_field: the TFDS feature that holds the text; None: dialogues, of jsonl and json files, also those of a
        directory.

    Raises:
      UserError: there is nothing, or nothing of a known kind.
    """
    if text_field is None and isinstance(spec, str) and (TFDS_NAME.fullmatch(spec) or spec in corpora.CORPORA.names()):
        raise UserError(f"format=sft reads {_DIALOGUES} files, not {spec}; give such files")
    if text_field is not None and isinstance(spec, str) and (match := TFDS_NAME.fullmatch(spec)):
        return {"train": Tfds(match["name"], match["split"] or "train", text_field)}
    if isinstance(spec, str) and spec in corpora.CORPORA.names():
        load = functools.cache(functools.partial(corpora.get, spec))
        return {split: _corpus_source(spec, split, load) for split in ("train", "validation")}
    specs = [spec] if isinstance(spec, str) else spec
    return {"train": Files([path for name in specs for path in _expand(str(name), dialogues=text_field is None)])}


def resolve_splits(
    source: str | Sequence[str], validation: str | Sequence[str] | None, fraction: float | None, text_field: str | None
) -> tuple[Mapping[str, Source], float]:
    """Return the sources by split, and the fraction of the documents of "train" to hold out by their hash.

    A single text file is only one document: its last part is held out instead, from a line break on.

    Args:
      source: a specification (see `resolve`).
      validation: another for the validation split, or None.
      fraction: of the documents to hold out, or None.
      text_field: as in `resolve`.

    Raises:
      UserError: the arguments contradict each other, or as in `resolve`.
    """
    if fraction is not None and not 0 <= fraction < 1:
        raise UserError(f"validation_fraction={fraction} must lie in [0, 1)")
    if fraction and validation:
        raise UserError(f"validation={validation!r} and validation_fraction={fraction} exclude each other; drop one")
    sources = resolve(source, text_field)
    train = sources["train"]
    if validation:
        held_out = resolve(validation, text_field)
        return {"train": train, "validation": held_out.get("validation", held_out["train"])}, 0.0
    if "validation" in sources:
        if fraction is not None:
            raise UserError(f"{source} has its own validation split; drop validation_fraction={fraction}")
        return sources, 0.0
    fraction = DEFAULT_FRACTION if fraction is None else fraction
    if fraction and isinstance(train, Files) and len(train.paths) == 1 and train.paths[0].name.endswith(TEXT_ENDINGS):
        return _head_and_tail(train, fraction), 0.0
    return sources, float(fraction)


def text_of(item: Item, text_field: str) -> str:
    """Return the text of a document, "" for a blank line of jsonl.

    Raises:
      ValueError: the item is malformed; the message is the reason.
    """
    if not item.is_json:
        return _decode(item)
    record = record_of(item)
    if record is None:
        return ""
    if text_field not in record:
        raise ValueError(f"no field {text_field!r}{suggest(text_field, record)}")
    return checked_text(f"field {text_field!r}", record[text_field])


def record_of(item: Item) -> dict | None:
    """Return the JSON object of an item, None for a blank line.

    Raises:
      ValueError: the item is malformed; the message is the reason.
    """
    if not (text := _decode(item)).strip():
        return None
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"invalid JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"a JSON {type(record).__name__}, not an object")
    return record


def checked_text(name: str, value: Any) -> str:
    """Return `value` if it is text that UTF-8 can encode.

    Raises:
      ValueError: it is not; the message says so of `name`.
    """
    if not isinstance(value, str):
        raise ValueError(f"{name} is {type(value).__name__}, not a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} has half a surrogate pair at character {error.start}") from error
    return value


def _decode(item: Item) -> str:
    try:
        return item.payload.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"invalid UTF-8 at byte {error.start}") from error


def _expand(spec: str, dialogues: bool) -> list[epath.Path]:
    """Return the files that a path, directory or pattern stands for, sorted."""
    endings = TEXT_ENDINGS + JSON_ENDINGS + LIST_ENDINGS
    path = epath.Path(spec)
    if path.is_dir():
        included = JSON_ENDINGS + LIST_ENDINGS if dialogues else TEXT_ENDINGS + JSON_ENDINGS
        files = [file for file in path.iterdir() if file.name.endswith(included)]
    elif path.exists():
        files = [path]
    else:
        files = [file for file in path.parent.glob(path.name) if file.is_file()]
    if not files:
        hint = suggest(spec, corpora.CORPORA.names())
        raise UserError(f"no such text, jsonl file, directory with them, pattern or corpus: {spec!r}{hint}")
    for file in files:
        if dialogues and file.name.endswith(TEXT_ENDINGS):
            raise UserError(f"format=sft reads {_DIALOGUES} files, not {str(file)!r}; give such files")
        if not file.name.endswith(endings):
            raise UserError(f"{str(file)!r} is of an unknown kind; allowed endings: {', '.join(endings)}")
    return sorted(files)


def _corpus_source(name: str, split: str, load: Callable[[], dict[str, list[corpora.Document]]]) -> Texts:
    def items() -> list[Item]:
        texts = [(document.name, document.text.encode()) for document in load()[split]]
        return [Item(f"{name}:{title}", text, False, len(text)) for title, text in texts]

    return Texts({"corpus": name, "split": split}, items)


def _head_and_tail(source: Files, fraction: float) -> Mapping[str, Source]:
    (item,) = source
    text = item.payload
    cut = text.rfind(b"\n", 0, int(len(text) * (1 - fraction))) + 1
    if not cut:
        raise UserError(f"{item.location} has no line break to hold out its end at; name a validation file instead")
    parts = {"train": text[:cut], "validation": text[cut:]}
    name = {"files": source.describe(), "tail": fraction}
    items = {split: [item._replace(payload=part, progress=len(part))] for split, part in parts.items()}
    return {split: Texts(name, functools.partial(items.__getitem__, split)) for split in parts}
