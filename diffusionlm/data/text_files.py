"""Files of documents, on disks and in buckets: what a path stands for, and their items, whole or in pieces."""

import glob
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from etils import epath

from diffusionlm.data import corpora, formats, identity
from diffusionlm.data.fields import Columns
from diffusionlm.data.formats import arrow_files
from diffusionlm.data.formats.reading import WHOLE, Reading, Span
from diffusionlm.data.items import Item
from diffusionlm.data.jobs import Receipt
from diffusionlm.errors import UserError, require_package, suggest
from diffusionlm.hub import SCHEME as HUB
from diffusionlm.storage import run_path
from diffusionlm.untrusted import printable, require_regular

PIECE_BYTES = 1 << 26  # of a large file, that are read by themselves, or fewer: a source is cut into 64 if it is small
GROUP_BYTES = 1 << 20  # of small files, that are read together
LEAST_BYTES = 1 << 8  # that a file counts for, so that a group does not become long
THREADS = 32  # that ask a bucket about its files at a time

T = TypeVar("T")


class Part(NamedTuple):
    """A span of a file, which was in this state when it was cut."""

    path: str
    state: identity.State
    span: Span


@dataclass(frozen=True)
class FilesPiece:
    """Spans of files, which are read together."""

    parts: tuple[Part, ...]
    columns: Columns | None
    progress: int  # bytes of the files that it stands for

    @property
    def is_whole(self) -> bool:
        """True if it has files that cannot be cut, or need not be."""
        return all(part.span == WHOLE for part in self.parts)

    def __iter__(self) -> Iterator[Item]:
        for part in self.parts:
            path = epath.Path(part.path)
            yield from formats.read(path, part.span, self.columns)
            _require_unchanged(path, part.state)


@dataclass(frozen=True)
class DigestJob:
    """The hash of the content of a file."""

    path: str
    stamp: str  # of its state
    index: int
    directory: str

    @property
    def receipt(self) -> str:
        """The file with the hash."""
        return f"{self.directory}/parts/digest-{self.index:07d}.json"

    def work(self) -> Receipt:
        """Read the file."""
        with Reading(path := epath.Path(self.path)):
            return {"stamp": self.stamp, "digest": identity.digest(path), "progress": path.stat().length}


class Files:
    """Files of documents, of the kinds of `formats`, in this order.

    Args:
      paths: the files.
      columns: the fields of records that are needed; None: all.

    Raises:
      UserError: one of them is no regular file, or cannot be read.
    """

    def __init__(self, paths: Sequence[epath.Path], columns: Columns | None = None):
        self.paths, self._columns = paths, columns
        self._states = _map_files(_state, paths)
        self.total = sum(state.bytes for state in self._states)

    def states(self) -> list[tuple[epath.Path, identity.State]]:
        """Return the files and their states when they were looked at first."""
        return [*zip(self.paths, self._states, strict=True)]

    def describe(self, known: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
        """Return the identity of each file by its content; `known` digests, by stamp, save reading files again."""

        def describe(path: epath.Path, state: identity.State) -> dict[str, Any]:
            with Reading(path):
                described = identity.describe(path, state, {} if known is None else known)
            _require_unchanged(path, state)
            return described

        return _map_files(describe, self.paths, self._states)

    def __iter__(self) -> Iterator[Item]:
        for path, state in zip(self.paths, self._states, strict=True):
            yield from formats.read(path, WHOLE, self._columns)
            _require_unchanged(path, state)

    def pieces(self, piece_bytes: int | None = None, group_bytes: int = GROUP_BYTES) -> list[FilesPiece]:
        """Return pieces, which together give the items of all files, in order.

        Args:
          piece_bytes: about so many bytes of a large file are in a piece, where its format allows; None: a 64th of the
            source, but at least 1 MiB and at most `PIECE_BYTES`.
          group_bytes: smaller files are put together until they have so many.

        Raises:
          UserError: a file cannot be read as what its name says, or has changed.
        """
        if piece_bytes is None:
            piece_bytes = min(max(self.total // 64, GROUP_BYTES), PIECE_BYTES)
        pieces, group, size = [], [], 0
        sizes = [state.bytes for state in self._states]
        cuts = _map_files(lambda path, size: formats.cut(path, size, piece_bytes), self.paths, sizes)
        for path, state, spans in zip(self.paths, self._states, cuts, strict=True):
            if len(spans) == 1:
                group.append(Part(str(path), state, WHOLE))
                size += max(state.bytes, LEAST_BYTES)
            if group and (len(spans) > 1 or size >= group_bytes):
                pieces.append(self._piece(group, sum(part.state.bytes for part in group)))
                group, size = [], 0
            if len(spans) > 1:
                progress = _shares(state.bytes, [span.progress for span in spans])
                parts = [Part(str(path), state, span) for span in spans]
                pieces += [self._piece([part], share) for part, share in zip(parts, progress, strict=True)]
                _require_unchanged(path, state)
        return pieces + ([self._piece(group, sum(part.state.bytes for part in group))] if group else [])

    def _piece(self, parts: Sequence[Part], progress: int) -> FilesPiece:
        return FilesPiece(tuple(parts), self._columns, progress)


def _shares(total: int, weights: Sequence[int]) -> list[int]:
    """Return integers that sum to `total`, about in proportion to the weights."""
    shares, used, passed = [], 0, 0
    for weight in weights:
        passed += weight
        until = total * passed // max(1, sum(weights))
        shares.append(until - used)
        used = until
    return shares


def expand(spec: str, *, dialogues: bool, or_corpus: bool = False) -> list[epath.Path]:
    """Return the files that a path, directory or pattern stands for, sorted.

    Args:
      spec: a file, a directory (its files, not those of directories below; see `formats.GROUPS`) or a glob pattern.
      dialogues: only kinds that may hold dialogues are allowed.
      or_corpus: the name of a corpus would be allowed too; the message for a missing file says so.

    Raises:
      UserError: there is no file, one is of an unknown kind or needs a package, or a link leads nowhere.
    """
    path = _source_path(spec)
    with Reading(path):
        if path.is_dir():
            files = _directory(path, dialogues)
        elif path.exists():
            files = [path]
        else:
            files = [file for file in _matches(str(path)) if not file.is_dir()]
        if not files:
            raise _nothing(spec, path, dialogues, or_corpus)
    for file in files:
        _require_kind(file, dialogues)
    formats.require_packages(files)
    return sorted(files)


def allowed(dialogues: bool) -> str:
    """Return in words how the names of files of documents may end."""
    known = [format for format in formats.FORMATS if format.records or not dialogues]
    return ", ".join(ending for format in known for ending in format.endings) + ", perhaps with .gz or .zst"


def _source_path(spec: str) -> epath.Path:
    """Return a path on a disk, in a bucket or on the Hugging Face hub."""
    if not spec.startswith(HUB):
        return run_path(spec)
    require_package("huggingface_hub", repr(printable(spec)), "huggingface_hub", "hub")
    require_package("fsspec", repr(printable(spec)), "fsspec", "corpora")
    return epath.Path(spec)


def _nothing(spec: str, path: epath.Path, dialogues: bool, or_corpus: bool) -> UserError:
    """Return an error that says that nothing is there."""
    if path.is_dir():
        return UserError(f"{spec!r} is a directory without files that end in one of {allowed(dialogues)}")
    if not or_corpus:
        return UserError(f"no such file, directory or pattern: {spec!r}; check the path")
    corpus = suggest(spec, names := corpora.CORPORA.names())
    if "did you mean" not in corpus:
        corpus = f"; check the path, or name a corpus ({', '.join(names)})"
    return UserError(f"no such file, directory, pattern or corpus: {spec!r}{corpus}")


def _require_kind(file: epath.Path, dialogues: bool) -> None:
    """Raise `UserError` unless a file is a regular one of a known format."""
    if "://" not in str(file) and file.exists():
        require_regular(file)
    format = formats.of(file)
    if format is None:
        fix = "convert it to .jsonl, one object a line"
        if not file.name.endswith(formats.OTHER_ENDINGS):
            fix = f"rename it to end in one of {allowed(dialogues)}"
        raise UserError(f"{str(file)!r} is of an unknown kind; {fix}")
    if dialogues and not format.records:
        raise UserError(f"format=sft reads files of records, not {str(file)!r}; give files that end in {allowed(True)}")


def _directory(path: epath.Path, dialogues: bool) -> list[epath.Path]:
    if arrow_files.is_saved(path) and (saved := arrow_files.saved_files(path)):
        return saved
    files = list(path.iterdir())
    groups = formats.GROUPS_OF_RECORDS if dialogues else formats.GROUPS
    chosen = [[file for file in files if file.name.endswith(formats.endings(*group))] for group in groups]
    tables, lines = chosen[0], [file for file in files if formats.of(file) is formats.LINES]
    if tables and lines:
        table, line = min(tables), min(lines)
        raise UserError(
            f"{str(path)!r} holds {table.suffix} and {line.suffix} files; name those to read by a pattern, such as "
            f"'{path}/*{table.suffix}'"
        )
    return next((group for group in chosen if group), [])


def _matches(pattern: str) -> list[epath.Path]:
    """Return what a pattern matches, links that lead nowhere included."""
    if "://" in pattern:
        path = epath.Path(pattern)
        return list(path.parent.glob(path.name))
    return [epath.Path(match) for match in glob.glob(pattern, recursive=True, include_hidden=True)]


def _map_files(function: Callable[..., T], paths: Sequence[epath.Path], *others: Sequence[Any]) -> list[T]:
    """Return what a function gives for each file; for those in a bucket, which is far away, in threads."""
    if not any("://" in str(path) for path in paths):
        return list(map(function, paths, *others))
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(function, paths, *others))


def _state(path: epath.Path) -> identity.State:
    if "://" not in str(path) and os.path.islink(path) and not os.path.exists(path):
        raise UserError(f"{str(path)!r} is a link to {os.readlink(path)!r}, which is not there; fix it or remove it")
    with Reading(path):
        if "://" not in str(path):
            require_regular(path)
        return identity.State.of(path)


def _require_unchanged(path: epath.Path, state: identity.State) -> None:
    """Raise `UserError` if a file is no longer what it was when it was looked at first."""
    if _state(path) != state:
        raise UserError(f"{str(path)!r} changed while it was read; try again once nothing writes to it")
