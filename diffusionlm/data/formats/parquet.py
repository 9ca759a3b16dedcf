"""Parquet files, of which only the columns that are asked for are read, a few pages at a time."""

import os
from collections.abc import Iterator
from typing import Any

from etils import epath

from diffusionlm.data.fields import Columns
from diffusionlm.data.formats import arrow_columns
from diffusionlm.data.formats.reading import WHOLE, Reading, Span, load_package, spans
from diffusionlm.data.items import Item
from diffusionlm.untrusted import require_content

BATCH_ROWS, BATCH_BYTES = 256, 1 << 24  # the most that is decoded at a time, by what the file says of its rows


def read(path: epath.Path, span: Span, columns: Columns | None) -> Iterator[Item]:
    """Yield the rows of a span of row groups as JSON objects.

    Raises:
      UserError: the file is no Parquet file, is damaged, or lacks a column.
    """
    with _reading(path) as reading, path.open("rb") as raw:
        require_content(raw, path)
        file = _open(path, raw)
        wanted = arrow_columns.choose(path, file.schema_arrow, columns)
        raw.seek(0, os.SEEK_END)
        sizes, number, name = _sizes(file.metadata, raw.tell()), 0, str(path)
        for group, size in enumerate(sizes):
            rows, unpacked = file.metadata.row_group(group).num_rows, file.metadata.row_group(group).total_byte_size
            if group < span.start or not rows:
                number += rows
                continue
            if span.stop is not None and group >= span.stop:
                return
            batch_rows = max(1, min(BATCH_ROWS, BATCH_BYTES * rows // max(1, unpacked)))
            used = 0
            batches = file.iter_batches(batch_rows, row_groups=[group], columns=wanted.leaves, use_threads=False)
            for batch in batches:
                for payload, problem in arrow_columns.payloads(batch, wanted.names):
                    reading.location, used = f"{name}[{number}]", used + 1
                    progress = size * used // rows - size * (used - 1) // rows
                    yield Item(reading.location, payload, True, progress, problem)
                    number += 1


def cut(path: epath.Path, size: int, piece_bytes: int) -> list[Span]:
    """Return spans of row groups that have at least `piece_bytes` in the file."""
    if size <= piece_bytes:
        return [WHOLE]
    with _reading(path), path.open("rb") as raw:
        require_content(raw, path)
        return spans(_sizes(_open(path, raw).metadata, size), piece_bytes)


def _reading(path: epath.Path) -> Reading:
    return Reading(path, "parquet", arrow_columns.arrow_errors(path))


def _open(path: epath.Path, raw: Any) -> Any:
    parquet = load_package("pyarrow.parquet", path, "pyarrow")
    file = raw if "://" in str(path) else str(path)
    # Without a buffer a column of a whole row group would be held.
    return parquet.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)


def _sizes(metadata: Any, size: int) -> list[int]:
    """Return about the bytes that each row group has in a file of `size` bytes, by what they unpack to.

    Those of its columns would be exact, but pyarrow ends the process where a damaged file contradicts itself there.
    """
    unpacked = [max(1, metadata.row_group(i).total_byte_size) for i in range(metadata.num_row_groups)]
    total = sum(unpacked)
    return [size * part // total for part in unpacked]
