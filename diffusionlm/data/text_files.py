"""Files of documents: texts, lines of JSON and JSON lists, on disks and in buckets, packed or not."""

import glob
import gzip
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

from etils import epath

from diffusionlm.data import corpora, identity
from diffusionlm.data.items import Item, parse_json
from diffusionlm.errors import UserError, suggest
from diffusionlm.storage import run_path
from diffusionlm.untrusted import printable, require_content, require_regular

TEXT_ENDINGS = (".txt", ".md", ".txt.gz", ".md.gz")  # one document a file
LINES_ENDINGS = (".jsonl", ".jsonl.gz")  # one document a line
JSON_ENDINGS = (".json", ".json.gz")  # a list of documents, or one document a line
TABLE_ENDINGS = (".csv", ".tsv", ".parquet", ".xlsx")  # not read; another name would not help
DIALOGUE_KINDS = ".jsonl and .json"

DOCUMENT_BYTES = 2 << 30  # the most that one document, or a list of them, may hold: it lies in memory whole
BLOCK_BYTES = 1 << 24  # read at a time
# gzip packs text 3 to 10 times, and repetition up to 1032 times. Beyond so many bytes, so much is no text.
UNPACKED_BYTES = 1 << 27
UNPACKED_RATIO = 200


class Files:
    """Text files (a document each), jsonl (a document a line) and json (a list of documents, or lines), in this order.

    Raises:
      UserError: one of them is no regular file, or cannot be read.
    """

    def __init__(self, paths: Sequence[epath.Path]):
        self.paths = paths
        self._states = [_state(path) for path in paths]
        self.total = sum(state.bytes for state in self._states)

    def describe(self, known: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
        """Return the identity of each file by its content; `known` digests, by stamp, save reading files again."""
        described = []
        for path, state in zip(self.paths, self._states, strict=True):
            with _Reading(path):
                described.append(identity.describe(path, state, known or {}))
            _require_unchanged(path, state)
        return described

    def __iter__(self) -> Iterator[Item]:
        for path, state in zip(self.paths, self._states, strict=True):
            yield from _items(path)
            _require_unchanged(path, state)


def expand(spec: str, *, dialogues: bool, or_corpus: bool = False) -> list[epath.Path]:
    """Return the files that a path, directory or pattern stands for, sorted.

    Args:
      spec: a file, a directory (its files, not those of directories below) or a glob pattern.
      dialogues: only kinds that may hold dialogues are allowed.
      or_corpus: the name of a corpus would be allowed too; the message for a missing file says so.

    Raises:
      UserError: there is no file, one is of an unknown kind, or a link leads nowhere.
    """
    path = run_path(spec)
    if path.is_dir():
        files = _directory(path, dialogues)
    elif path.exists():
        files = [path]
    else:
        files = [file for file in _matches(str(path)) if not file.is_dir()]
    if not files:
        if path.is_dir():
            raise UserError(f"{spec!r} is a directory without files that end in one of {_allowed(dialogues)}")
        if not or_corpus:
            raise UserError(f"no such file, directory or pattern: {spec!r}; check the path")
        corpus = suggest(spec, names := corpora.CORPORA.names())
        if "did you mean" not in corpus:
            corpus = f"; check the path, or name a corpus ({', '.join(names)})"
        raise UserError(f"no such file, directory, pattern or corpus: {spec!r}{corpus}")
    for file in files:
        if "://" not in str(file) and file.exists():
            require_regular(file)
        if dialogues and file.name.endswith(TEXT_ENDINGS):
            raise UserError(f"format=sft reads {DIALOGUE_KINDS} files, not {str(file)!r}; give such files")
        if not file.name.endswith(TEXT_ENDINGS + LINES_ENDINGS + JSON_ENDINGS):
            fix = "convert it to .jsonl, one object a line"
            if not file.name.endswith(TABLE_ENDINGS):
                fix = f"rename it to end in one of {_allowed(dialogues)}"
            raise UserError(f"{str(file)!r} is of an unknown kind; {fix}")
    return sorted(files)


def _allowed(dialogues: bool) -> str:
    return ", ".join((() if dialogues else TEXT_ENDINGS) + LINES_ENDINGS + JSON_ENDINGS)


def _directory(path: epath.Path, dialogues: bool) -> list[epath.Path]:
    files = list(path.iterdir())
    if dialogues:
        return [file for file in files if file.name.endswith(LINES_ENDINGS + JSON_ENDINGS)]
    # Beside texts, .json files describe them, as those of the Hugging Face hub do.
    texts = [file for file in files if file.name.endswith(TEXT_ENDINGS + LINES_ENDINGS)]
    return texts or [file for file in files if file.name.endswith(JSON_ENDINGS)]


def _matches(pattern: str) -> list[epath.Path]:
    """Return what a pattern matches, links that lead nowhere included."""
    if "://" in pattern:
        path = epath.Path(pattern)
        return list(path.parent.glob(path.name))
    return [epath.Path(match) for match in glob.glob(pattern, recursive=True, include_hidden=True)]


def _state(path: epath.Path) -> identity.State:
    if "://" not in str(path) and os.path.islink(path) and not os.path.exists(path):
        raise UserError(f"{str(path)!r} is a link to {os.readlink(path)!r}, which is not there; fix it or remove it")
    with _Reading(path):
        if "://" not in str(path):
            require_regular(path)
        return identity.State.of(path)


def _require_unchanged(path: epath.Path, state: identity.State) -> None:
    """Raise `UserError` if a file is no longer what it was when it was looked at first."""
    if _state(path) != state:
        raise UserError(f"{str(path)!r} changed while it was read; try again once nothing writes to it")


class _Reading:
    """A context that turns what fails while a file is read into one line; `location` says how far it was read."""

    def __init__(self, path: epath.Path):
        self.location = str(path)
        self._path = path

    def __enter__(self) -> "_Reading":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, EOFError | gzip.BadGzipFile | zlib.error):
            raise UserError(
                f"{self.location}: damaged gzip data after this point ({error}); fetch the file again"
            ) from error
        if isinstance(error, OSError):
            raise UserError(f"cannot read {str(self._path)!r}: {error.strerror or error}") from error


class _Reader:
    """A file, unpacked if its name ends in .gz, of which only so much is held at a time as one document may have."""

    def __init__(self, path: epath.Path, raw: IO[bytes]):
        self._path, self._raw = path, raw
        self._stream: Any = gzip.open(raw) if path.suffix == ".gz" else raw
        self._unpacked = 0

    @property
    def position(self) -> int:
        """Bytes of the file that were used up."""
        return self._raw.tell()

    def line(self) -> bytes:
        """Return the next line with its end, b"" at the end of the file."""
        blocks = []
        for block in self._blocks(self._stream.readline):
            blocks.append(block)
            if block.endswith(b"\n"):
                break
        return blocks[0] if len(blocks) == 1 else b"".join(blocks)

    def rest(self) -> bytes:
        """Return all that follows."""
        return b"".join(self._blocks(self._stream.read))

    def _blocks(self, read: Any) -> Iterator[bytes]:
        """Yield what `read` gives until there is no more; raise `UserError` if it is too much."""
        size = 0
        while block := read(BLOCK_BYTES):
            size += len(block)
            self._unpacked += len(block)
            if self._unpacked > UNPACKED_BYTES and self._unpacked > UNPACKED_RATIO * self._raw.tell():
                raise UserError(
                    f"{printable(self._path)} unpacks to more than {UNPACKED_RATIO} times its size, which no text does;"
                    " unpack it yourself if that is right"
                )
            if size > DOCUMENT_BYTES:
                raise UserError(
                    f"{printable(self._path)} has a document or list of more than {DOCUMENT_BYTES >> 30} GiB; split "
                    "it, or write one document a line in .jsonl"
                )
            yield block


def _items(path: epath.Path) -> Iterator[Item]:
    with _Reading(path) as reading, path.open("rb") as raw:
        require_content(raw, path)
        reader = _Reader(path, raw)
        if path.name.endswith(TEXT_ENDINGS):
            content = reader.rest()
            yield Item(str(path), content, False, reader.position)
            return
        first, number, position = b"", 0, 0
        if path.name.endswith(JSON_ENDINGS):
            while (first := reader.line()) and not _bare(first):
                number += 1
            if _begins_list(first):
                yield from _list_items(str(path), first + reader.rest())
                return
        while line := first or reader.line():
            first, number = b"", number + 1
            reading.location = f"{path}:{number}"
            before, position = position, reader.position
            yield Item(reading.location, line, True, position - before)


def _bare(line: bytes) -> bytes:
    return line.removeprefix(b"\xef\xbb\xbf").strip()


def _begins_list(line: bytes) -> bool:
    """Return True unless a line holds an object of its own: it begins a list, or an object over several lines."""
    return bool(line) and not (_bare(line).startswith(b"{") and _bare(line).endswith(b"}"))


def _list_items(location: str, content: bytes) -> Iterator[Item]:
    """Yield the members of a JSON list, each as a line of jsonl."""
    try:
        members = parse_json(content.decode("utf-8-sig"))
    except ValueError as error:
        raise UserError(f"{location}: {error}") from error
    if not isinstance(members, list):
        kind = "one JSON object over several lines" if isinstance(members, dict) else "a JSON value"
        raise UserError(f"{location} holds {kind}; it must hold a list of objects, or one object a line")
    for i, member in enumerate(members):
        yield Item(f"{location}[{i}]", json.dumps(member).encode(), True, len(content) // len(members))
