"""Arrow files, as `datasets.Dataset.save_to_disk` and the cache of Hugging Face `datasets` have them."""

import os
from collections.abc import Iterator
from typing import Any

from etils import epath

from diffusionlm import schema
from diffusionlm.data.fields import Columns
from diffusionlm.data.formats import arrow_columns
from diffusionlm.data.formats.reading import WHOLE, Reading, Span, load_package, spans
from diffusionlm.data.items import Item
from diffusionlm.errors import UserError
from diffusionlm.untrusted import plain_name, printable, read_bytes, require_content

STATE, SPLITS = "state.json", "dataset_dict.json"  # beside the files of a dataset, and of one of several splits
STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"
FILE_MAGIC = b"ARROW1"  # begins the other of the two layouts, which datasets does not write


def read(path: epath.Path, span: Span, columns: Columns | None) -> Iterator[Item]:
    """Yield the rows of a span of record batches as JSON objects.

    Raises:
      UserError: the file is no Arrow file, is damaged, or lacks a column.
    """
    with _reading(path) as reading, path.open("rb") as raw:
        batches = _batches(path, raw)
        wanted = arrow_columns.choose(path, next(batches), columns)
        number, name = 0, str(path)
        for index, batch in enumerate(batches):
            if index < span.start:
                number += batch.num_rows
                continue
            if span.stop is not None and index >= span.stop:
                return
            for column in wanted.names:
                arrow_columns.require_valid(batch.column(column))
            size, rows = batch.nbytes, batch.num_rows
            for i, (payload, problem) in enumerate(arrow_columns.payloads(batch, wanted.names)):
                reading.location = f"{name}[{number + i}]"
                yield Item(reading.location, payload, True, size * (i + 1) // rows - size * i // rows, problem)
            number += rows


def cut(path: epath.Path, size: int, piece_bytes: int) -> list[Span]:
    """Return spans of record batches of at least `piece_bytes`."""
    if size <= piece_bytes:
        return [WHOLE]
    with _reading(path), path.open("rb") as raw:
        batches = _batches(path, raw)
        next(batches)
        return spans([batch.nbytes for batch in batches], piece_bytes)


def _reading(path: epath.Path) -> Reading:
    return Reading(path, "arrow", arrow_columns.arrow_errors(path))


def _batches(path: epath.Path, raw: Any) -> Iterator[Any]:
    """Yield the schema, then the record batches; a file on a disk is mapped, so that what is skipped is not read."""
    require_content(raw, path)
    arrow = load_package("pyarrow", path, "pyarrow")
    ipc = load_package("pyarrow.ipc", path, "pyarrow")
    head = raw.read(len(FILE_MAGIC))
    raw.seek(0)
    source = raw if "://" in str(path) or not head else arrow.memory_map(str(path))
    if head == FILE_MAGIC:
        reader = ipc.open_file(source)
        yield reader.schema
        yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
        return
    reader = ipc.open_stream(source)
    raw.seek(-len(STREAM_END), os.SEEK_END)
    if raw.read() != STREAM_END:  # Arrow would take any place between two batches for the end
        raise EOFError("no mark of the end")
    raw.seek(0)
    yield reader.schema
    yield from reader


def is_saved(directory: epath.Path) -> bool:
    """Return True for a directory that `save_to_disk` made, of one split or of several."""
    return (directory / STATE).exists() or (directory / SPLITS).exists()


def saved_files(directory: epath.Path) -> list[epath.Path]:
    """Return the files of a directory that `save_to_disk` made, in their order.

    Raises:
      UserError: it holds several splits, lacks a file, or its rows are chosen from the files by a list of indices.
    """
    if not (directory / STATE).exists():
        names = [entry.name for entry in directory.iterdir() if (entry / STATE).exists()]
        shown = ", ".join(sorted(map(printable, names))) or "none"
        raise UserError(
            f"{str(directory)!r} is a dataset of several splits ({shown}); name one of these directories, and another "
            "with --validation"
        )
    file = directory / STATE
    state = schema.decode(read_bytes(file), object, file)
    entries = state.get("_data_files") if isinstance(state, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        return []  # a file of that name of something else
    if isinstance(state, dict) and (state.get("_indices_data_files") or state.get("_indices_files")):
        raise UserError(
            f"{str(directory)!r} was saved with a list of indices; save it again after dataset.flatten_indices()"
        )
    files = [directory / plain_name(entry.get("filename"), str(file)) for entry in entries]
    if missing := [other.name for other in files if not other.exists()]:
        raise UserError(f"{str(directory)!r} lacks {missing[0]}, which its {STATE} names; copy the dataset again")
    return files
