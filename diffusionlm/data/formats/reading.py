"""What the readers of all formats share: spans of files, unpacked bytes within bounds, errors in one line."""

import functools
import gzip
import importlib
import io
import zlib
from collections.abc import Iterator, Sequence
from typing import IO, Any, NamedTuple

from etils import epath

from diffusionlm.errors import StorageError, UserError, require_package, suggest
from diffusionlm.untrusted import printable

DOCUMENT_BYTES = 2 << 30  # the most that one document, or a list of them, may hold: it lies in memory whole
BLOCK_BYTES = 1 << 24  # read at a time
# gzip packs text 3 to 10 times, and repetition up to 1032 times. Beyond so many bytes, so much is no text.
UNPACKED_BYTES = 1 << 27
UNPACKED_RATIO = 200
# A packed block of zstd of 4 bytes may hold 128 KiB, so that these unpack to 128 MiB at most.
ZSTD_BYTES = 1 << 12
ZSTD_WINDOW = 1 << 31  # the largest, which `zstd --long=31` makes
BUFFER_BYTES = 1 << 16
PACKINGS = {".gz": "gzip", ".zst": "zstd"}  # ending -> its name in messages


class Span(NamedTuple):
    """A part of a file that is read by itself: bytes, row groups or record batches, as the format says."""

    start: int = 0
    stop: int | None = None  # None: to the end of the file
    progress: int = 0  # bytes of the file that it stands for


WHOLE = Span()


def spans(sizes: list[int], piece_bytes: int) -> list[Span]:
    """Return spans of consecutive parts of these sizes, each of at least `piece_bytes` but for the last."""
    found, start, used = [], 0, 0
    for i, size in enumerate(sizes):
        used += size
        if used >= piece_bytes or i == len(sizes) - 1:
            found.append(Span(start, i + 1, used))
            start, used = i + 1, 0
    return found or [WHOLE]


class Line(NamedTuple):
    """The place of a line of a span, as file:line; the lines before the span are counted when it is asked for."""

    path: str
    start: int  # byte at which the first whole line of the span begins
    number: int  # of the line, from there, from 1

    def __str__(self) -> str:
        """Return file:line, or the number of bytes before the line's neighbours if the file cannot be read any more."""
        try:
            before = _count_lines(self.path, self.start, epath.Path(self.path).stat().mtime)
            return f"{self.path}:{self.number + before}"
        except OSError:
            return f"{self.path}, line {self.number} after byte {self.start}"


@functools.lru_cache(maxsize=64)
def _count_lines(path: str, stop: int, changed: float | None) -> int:
    lines, left = 0, stop
    with epath.Path(path).open("rb") as file:
        while left and (block := file.read(min(BLOCK_BYTES, left))):
            lines += block.count(b"\n")
            left -= len(block)
    return lines


def packing(path: epath.Path) -> str:
    """Return the ending of a packed file, ".gz" or ".zst", or "" for another file."""
    return path.suffix if path.suffix in PACKINGS else ""


def load_package(module: str, path: Any, package: str) -> Any:
    """Return a module of an optional package that a file needs.

    Raises:
      UserError: it is not installed.
    """
    require_package(module.partition(".")[0], repr(printable(path)), package, "corpora")
    return importlib.import_module(module)


class Reading:
    """A context that turns what fails while a file is read into one line; `location` says how far it was read.

    Args:
      path: the file.
      kind: of its data, such as "parquet", for the message.
      errors: exceptions that say that these are damaged; an `OSError` without a number says so too if there are any.
    """

    def __init__(self, path: epath.Path, kind: str = "", errors: tuple[type[Exception], ...] = ()):
        self.location: object = path
        self._path, self._kind, self._errors = path, kind, errors

    def __enter__(self) -> "Reading":
        return self

    def __exit__(self, type_: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, Exception) or isinstance(error, UserError):
            return
        if (kind := self._damaged(error)) is not None:
            raise UserError(
                f"{printable(self.location)}: damaged {kind} data after this point ({_first_line(error)}); fetch the "
                "file again"
            ) from error
        if isinstance(error, OSError):
            raise StorageError(f"cannot read {str(self._path)!r}: {error.strerror or error}") from error
        if "://" in str(self._path):  # clients of object stores raise anything
            raise StorageError(f"cannot read {str(self._path)!r}: {_first_line(error)}") from error

    def _damaged(self, error: Exception) -> str | None:
        """Return the kind of the data that an error calls damaged, None if it is another error."""
        if isinstance(error, EOFError | gzip.BadGzipFile | zlib.error) or type(error).__name__ == "ZstdError":
            return PACKINGS.get(packing(self._path), self._kind)
        if isinstance(error, self._errors) or (self._errors and isinstance(error, OSError) and error.errno is None):
            return self._kind
        return None


def _first_line(error: Exception) -> str:
    return printable((str(error).strip() or type(error).__name__).splitlines()[0])[:200]


class _Zstd:
    """The unpacked bytes of a file of zstd frames."""

    def __init__(self, path: epath.Path, packed: IO[bytes]):
        zstandard = load_package("zstandard", path, "zstandard")
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW)
        self._file, self._packed, self._unpacked = packed, b"", memoryview(b"")
        self._frame: Any = None  # the one that has begun

    def read1(self, size: int) -> memoryview:
        """Return at most so many bytes, none at the end; `EOFError` if that is within a frame."""
        while not self._unpacked:
            packed = self._packed or self._file.read(ZSTD_BYTES)
            if not packed and self._frame is None:
                return self._unpacked
            if not packed:
                raise EOFError("the file ends within a frame")
            if self._frame is None:
                self._frame = self._decompressor.decompressobj(write_size=1 << 15)
            self._unpacked, self._packed = memoryview(self._frame.decompress(packed)), b""
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        part, self._unpacked = self._unpacked[:size], self._unpacked[size:]
        return part


class _Bounded(io.RawIOBase):
    """The unpacked bytes of a packed file, which is refused once they are more than text packs to."""

    def __init__(self, path: epath.Path, packed: IO[bytes]):
        self._path, self._packed, self._count = path, packed, 0
        self._stream: Any = gzip.open(packed) if packing(path) == ".gz" else _Zstd(path, packed)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read1(len(buffer))  # what can be read before the place of any damage
        buffer[: len(data)] = data
        self._count += len(data)
        if self._count > UNPACKED_BYTES and self._count > UNPACKED_RATIO * self._packed.tell():
            raise UserError(
                f"{printable(self._path)} unpacks to more than {UNPACKED_RATIO} times its size, which no text does;"
                " unpack it yourself if that is right"
            )
        return len(data)


class _Raw(io.RawIOBase):
    """The bytes of an object in a store, whose client may read no lines of bounded length."""

    def __init__(self, file: IO[bytes]):
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class Reader:
    """A file, unpacked if its name ends so, of which only so much is held at a time as one document may have.

    Args:
      path: its name.
      file: open at the start of what is to be read.
      start: bytes before that.
    """

    def __init__(self, path: epath.Path, file: IO[bytes], start: int = 0):
        self._path, self._file, self._read = path, file, start
        self._packed = bool(packing(path))
        if self._packed:
            file = io.BufferedReader(_Bounded(path, file), BUFFER_BYTES)
        elif not isinstance(file, io.BufferedReader):
            file = io.BufferedReader(_Raw(file), BUFFER_BYTES)
        self.stream: Any = file

    @property
    def position(self) -> int:
        """Bytes of the file that were used up."""
        return self._file.tell() if self._packed else self._read

    def line(self) -> bytes:
        """Return the next line with its end, b"" at the end of the file."""
        blocks = []
        for block in self._blocks(self.stream.readline):
            blocks.append(block)
            if block.endswith(b"\n"):
                break
        return blocks[0] if len(blocks) == 1 else b"".join(blocks)

    def skip_line(self, stop: int | None) -> None:
        """Go to the end of the line, or beyond `stop` within it, without holding it."""
        while stop is None or self._read < stop:
            block = self.stream.readline(BLOCK_BYTES)
            self._read += len(block)
            if not block or block.endswith(b"\n"):
                return

    def rest(self) -> bytes:
        """Return all that follows."""
        return b"".join(self._blocks(self.stream.read))

    def _blocks(self, read: Any) -> Iterator[bytes]:
        """Yield what `read` gives until there is no more; raise `UserError` if it is too much."""
        size = 0
        while block := read(BLOCK_BYTES):
            size += len(block)
            self._read += len(block)
            if size > DOCUMENT_BYTES:
                raise UserError(
                    f"{printable(self._path)} has a document or list of more than {DOCUMENT_BYTES >> 30} GiB; split "
                    "it, or write one document a line in .jsonl"
                )
            yield block


def lacks_column(path: Any, name: str, columns: Sequence[str]) -> UserError:
    """Return an error that says which columns a table has instead of one that is asked for."""
    shown = [printable(column) for column in columns]
    names = ", ".join(map(repr, shown[:20])) + ", ..." * (len(shown) > 20)
    close = suggest(name, shown) if shown else ""
    hint = close if "did you mean" in close else ""
    return UserError(
        f"{printable(path)} has no column {printable(name)!r} among {names or 'none'}{hint or ';'} choose the column "
        "of the text with --text_field NAME"
    )
