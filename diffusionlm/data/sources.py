"""Sources of documents: files of all formats, TFDS datasets and named corpora, as streams of raw items.

A source only reads, as a whole or in pieces; the workers decode and check (`items`), and choose (`selection`).
"""

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from diffusionlm.data import corpora, formats
from diffusionlm.data.fields import Columns, names
from diffusionlm.data.items import Item
from diffusionlm.data.text_files import PIECE_BYTES, Files, FilesPiece, allowed, expand
from diffusionlm.errors import UserError
from diffusionlm.scalars import real
from diffusionlm.untrusted import printable

TFDS_NAME = re.compile(r"tfds:(?P<name>[^:]+(:[\d*]+\.[\d*]+\.[\d*]+)?)(:(?P<split>.+))?")
UNCUT_BYTES = 1 << 23  # of a file that cannot be cut, which one process reads for the others beyond that
DEFAULT_FRACTION = 0.01  # held out if neither a validation source nor a fraction is given


class Piece(Protocol):
    """A part of a source that a worker reads by itself; it can be pickled, and is small."""

    @property
    def progress(self) -> int:
        """Bytes of the source that it stands for."""
        ...

    def __iter__(self) -> Iterator[Item]:
        """Yield its items in order; raise `UserError` if they cannot be read."""
        ...


class Source(Protocol):
    """A finite stream of items in a fixed order."""

    @property
    def total(self) -> int:
        """The sum of the pieces' progress, for the progress bar; an estimate for TFDS."""
        ...

    def describe(self, known: Mapping[str, str] | None = None) -> Any:
        """Return what identifies the content, in JSON types; see `identity.known_digests` for `known`."""
        ...

    def pieces(self) -> Sequence[Piece]:
        """Return pieces that together hold the items, in order; where they are cut depends on the content alone."""
        ...

    def __iter__(self) -> Iterator[Item]: ...


@dataclass(frozen=True)
class TextsPiece:
    """Documents that are held."""

    items: tuple[Item, ...]

    @property
    def progress(self) -> int:
        """The sum of the items' progress."""
        return sum(item.progress for item in self.items)

    def __iter__(self) -> Iterator[Item]:
        return iter(self.items)


def small(pieces: Iterable[tuple[str, Piece]], cut: bool) -> Iterator[tuple[str, Piece]]:
    """Yield pieces with their splits; those of files that cannot be cut as parts that are read here, if `cut`.

    So several processes of one machine share what one of them unpacks. Machines that are far apart do not.
    """
    for split, piece in pieces:
        if not (cut and isinstance(piece, FilesPiece) and piece.is_whole and piece.progress > UNCUT_BYTES):
            yield split, piece
            continue
        batch, size = [], 0
        for item in piece:
            batch.append(item)
            size += len(item.payload)
            if size >= UNCUT_BYTES // 2:
                yield split, TextsPiece(tuple(batch))
                batch, size = [], 0
        if batch:
            yield split, TextsPiece(tuple(batch))


@dataclass(frozen=True)
class TextPiece:
    """A part of the one document of a text file."""

    file: FilesPiece
    start: int  # byte of the text, unpacked
    stop: int

    @property
    def progress(self) -> int:
        """Its bytes."""
        return self.stop - self.start

    def __iter__(self) -> Iterator[Item]:
        (item,) = self.file
        yield item._replace(payload=item.payload[self.start : self.stop], progress=self.progress)


class TextPart:
    """A part of the one document of a text file, as a source.

    Args:
      piece: the part.
      describe: returns what identifies it, as `Source.describe` does.
    """

    def __init__(self, piece: TextPiece, describe: Callable[[Mapping[str, str] | None], Any]):
        self._piece, self._describe, self.total = piece, describe, piece.progress

    def describe(self, known: Mapping[str, str] | None = None) -> Any:
        """Return what identifies the part."""
        return self._describe(known)

    def pieces(self) -> Sequence[TextPiece]:
        """Return the part."""
        return [self._piece]

    def __iter__(self) -> Iterator[Item]:
        return iter(self._piece)


class Texts:
    """Documents that a function makes when they are first needed.

    Args:
      describe: returns what identifies them, as `Source.describe` does.
      make: returns them.
    """

    def __init__(self, describe: Callable[[Mapping[str, str] | None], Any], make: Callable[[], Sequence[Item]]):
        self._describe, self._make = describe, functools.cache(make)

    @property
    def total(self) -> int:
        """The sum of the items' progress."""
        return sum(item.progress for item in self._make())

    def describe(self, known: Mapping[str, str] | None = None) -> Any:
        """Return what identifies the documents."""
        return self._describe(known)

    def pieces(self) -> Sequence[TextsPiece]:
        """Return all documents as one piece, or nothing if there are none."""
        return [TextsPiece(items)] if (items := tuple(self._make())) else []

    def __iter__(self) -> Iterator[Item]:
        return iter(self._make())


@dataclass(frozen=True)
class TfdsPiece:
    """Consecutive examples of a split of a TFDS dataset on this machine."""

    directory: str  # of the dataset
    name: str  # for messages
    split: str
    columns: Columns
    start: int  # the first example
    stop: int
    example_bytes: int  # about, of one

    @property
    def progress(self) -> int:
        """About the bytes of its examples."""
        return (self.stop - self.start) * self.example_bytes

    def __iter__(self) -> Iterator[Item]:
        examples = _examples(self.directory, self.split)
        for i in range(self.start, self.stop):
            location, example = f"tfds:{self.name}:{self.split}[{i}]", examples[i]
            values = {field: _json_value(example[field]) for field in (*self.columns.texts, *self.columns.others)}
            for field in self.columns.texts:
                if not isinstance(values[field], str | bytes):
                    raise UserError(
                        f"{location}: feature {field!r} is {type(values[field]).__name__}, not text; choose another "
                        "with --text_field"
                    )
            yield _tfds_item(location, values, self.example_bytes)


def _tfds_item(location: str, values: Mapping[str, Any], progress: int) -> Item:
    if len(values) == 1:
        (text,) = values.values()
        return Item(location, text.encode() if isinstance(text, str) else text, False, progress)
    try:
        decoded = {name: value.decode() if isinstance(value, bytes) else value for name, value in values.items()}
    except UnicodeDecodeError as error:
        return Item(location, b"", True, progress, f"invalid UTF-8 at byte {error.start}")
    return Item(location, json.dumps(decoded, default=str).encode(), True, progress)


def _json_value(value: Any) -> Any:
    """Return the value of a feature without NumPy."""
    return value.tolist() if type(value).__module__ == "numpy" else value


@functools.lru_cache(maxsize=4)
def _examples(directory: str, split: str) -> Any:
    import tensorflow_datasets as tfds  # here, because the workers of a file source do not need it

    builder: Any = tfds.builder_from_directory(directory)
    return builder.as_data_source(split)


class Tfds:
    """The text feature of a split of any TFDS dataset, which is downloaded and prepared as ArrayRecord if need be.

    Args:
      name: of the dataset, perhaps with a version.
      split: of it.
      columns: the features that are read.

    Raises:
      UserError: the split cannot be loaded, or has no such feature.
    """

    def __init__(self, name: str, split: str, columns: Columns):
        import tensorflow_datasets as tfds  # here, because the workers of a file source do not need it

        self._name, self._split, self._columns = name, split, columns
        try:
            builder: Any = tfds.builder(name, file_format="array_record")
            builder.download_and_prepare()
            self._count = len(builder.as_data_source(split))
        except Exception as error:  # builders of third parties raise anything
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"cannot load split {split!r} of tfds:{name}: {reason or type(error).__name__}") from error
        for field in (*columns.texts, *columns.others):
            if field not in builder.info.features:
                known = ", ".join(builder.info.features)
                fix = "choose one of {} with --text_field" if field in columns.texts else "it has {}"
                raise UserError(f"tfds:{name} has no feature {field!r}; {fix.format(known)}")
        self._version, self._directory = str(builder.version), str(builder.data_dir)
        self._bytes = builder.info.dataset_size // max(1, sum(s.num_examples for s in builder.info.splits.values()))
        self.total = self._bytes * self._count

    def describe(self, known: Mapping[str, str] | None = None) -> Any:
        """Return the dataset, its version and the split."""
        return {"tfds": self._name, "version": self._version, "split": self._split}

    def pieces(self) -> Sequence[TfdsPiece]:
        """Return ranges of examples."""
        step = max(1, PIECE_BYTES // max(1, self._bytes))
        return [self._piece(start, min(start + step, self._count)) for start in range(0, self._count, step)]

    def __iter__(self) -> Iterator[Item]:
        return iter(self._piece(0, self._count))

    def _piece(self, start: int, stop: int) -> TfdsPiece:
        return TfdsPiece(self._directory, self._name, self._split, self._columns, start, stop, self._bytes)


def resolve(spec: str | Sequence[str], text_field: str | None, columns: Columns | None = None) -> Mapping[str, Source]:
    """Return the sources of a specification by split; only corpora have a validation split of their own.

    Args:
      spec: a registered corpus, `tfds:NAME[:split]`, or one or several files, directories (their files, not those of
        directories below) or glob patterns.
      text_field: the field, or template, of the text; None: dialogues, of files of records.
      columns: the fields of records that are needed; None: all, and of TFDS those of the text.

    Raises:
      UserError: there is nothing, nothing of a known kind, or no field where one is needed.
    """
    named = isinstance(spec, str) and spec in corpora.CORPORA.names()
    tfds = TFDS_NAME.fullmatch(spec) if isinstance(spec, str) else None
    if text_field is None and (tfds or named):
        raise UserError(f"format=sft reads files that end in {allowed(True)}, not {spec}; give such files")
    if tfds and text_field is not None:
        return {"train": Tfds(tfds["name"], tfds["split"] or "train", columns or Columns(names(text_field)))}
    if isinstance(spec, str) and named:
        _require_no_fields(columns, f"the corpus {spec}")
        load = functools.cache(functools.partial(corpora.get, spec))
        return {split: _corpus_source(spec, split, load) for split in ("train", "validation")}
    specs, dialogues = [spec] if isinstance(spec, str) else spec, text_field is None
    files = [path for name in specs for path in expand(str(name), dialogues=dialogues, or_corpus=not dialogues)]
    for path in files:
        if formats.of(path) is formats.TEXT:
            _require_no_fields(columns, repr(str(path)))
    return {"train": Files(files, columns)}


def _require_no_fields(columns: Columns | None, what: str) -> None:
    """Raise `UserError` if conditions on fields are asked of texts without any."""
    if columns and columns.others:
        field = printable(columns.others[0])
        raise UserError(f"where compares the field {field!r}, and {what} is text without fields; drop one of them")


def resolve_splits(
    source: str | Sequence[str],
    validation: str | Sequence[str] | None,
    fraction: float | None,
    text_field: str | None,
    columns: Columns | None = None,
) -> tuple[Mapping[str, Source], float]:
    """Return the sources by split, and the fraction of the documents of "train" to hold out by their hash.

    A single text file is only one document: its last part is held out instead, from a line break on.

    Args:
      source: a specification (see `resolve`).
      validation: another for the validation split, or None.
      fraction: of the documents to hold out, or None.
      text_field: as in `resolve`.
      columns: as in `resolve`.

    Raises:
      UserError: the arguments contradict each other, or as in `resolve`.
    """
    if fraction is not None and not 0 <= (fraction := real("validation_fraction", fraction)) < 1:
        raise UserError(f"validation_fraction={fraction} must lie in [0, 1)")
    if fraction and validation is not None:
        raise UserError(f"validation={validation!r} and validation_fraction={fraction} exclude each other; drop one")
    sources = resolve(source, text_field, columns)
    train = sources["train"]
    if validation is not None:
        held_out = resolve(validation, text_field, columns)
        return {"train": train, "validation": held_out.get("validation", held_out["train"])}, 0.0
    if "validation" in sources:
        if fraction is not None:
            raise UserError(f"{source} has its own validation split; drop validation_fraction={fraction}")
        return sources, 0.0
    fraction = DEFAULT_FRACTION if fraction is None else fraction
    if fraction and isinstance(train, Files) and len(train.paths) == 1 and formats.of(train.paths[0]) is formats.TEXT:
        return _head_and_tail(train, fraction), 0.0
    return sources, float(fraction)


def _corpus_source(name: str, split: str, load: Callable[[], dict[str, list[corpora.Document]]]) -> Texts:
    def items() -> list[Item]:
        texts = [(document.name, document.text.encode()) for document in load()[split]]
        return [Item(f"{name}:{title}", text, False, len(text)) for title, text in texts]

    return Texts(lambda known: {"corpus": name, "split": split}, items)


def _head_and_tail(source: Files, fraction: float) -> Mapping[str, Source]:
    (item,) = source
    text = item.payload
    cut = text.rfind(b"\n", 0, int(len(text) * (1 - fraction))) + 1
    if not cut:
        raise UserError(f"{item.location} has no line break to hold out its end at; name a validation file instead")
    (file,) = source.pieces()

    def describe(known: Mapping[str, str] | None) -> Any:
        return {"files": source.describe(known), "tail": fraction}

    parts = {"train": TextPiece(file, 0, cut), "validation": TextPiece(file, cut, len(text))}
    return {split: TextPart(piece, describe) for split, piece in parts.items()}
