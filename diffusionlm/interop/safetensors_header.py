"""The header of a safetensors file, checked as the format's specification and its own library do, and no less.

After 8 bytes with its length the header is a JSON object {name: {"dtype", "shape", "data_offsets"}}. The tensors follow
it in the order of their offsets, without a gap, an overlap or anything after the last.
Source: https://github.com/huggingface/safetensors#format
"""

import struct
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec

from diffusionlm import schema, untrusted
from diffusionlm.errors import UserError

MAX_BYTES = 100 * 10**6  # of a header; the format's limit
BITS = {  # of an element, for every dtype of the format
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
_METADATA = "__metadata__"  # the one name that is no tensor's
_HINT = "download it again"

_Size = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class Entry(schema.Record, frozen=True):
    """The place and the type of a tensor in a file."""

    dtype: str  # a key of `BITS`
    shape: tuple[_Size, ...]
    data_offsets: tuple[_Size, _Size]  # first byte and the one after the last, after the header


class Header(NamedTuple):
    """The tensors of a file by name, and the byte at which the first begins."""

    entries: dict[str, Entry]
    start: int


def read(path: Path) -> Header:
    """Read and check the header of a file.

    Raises:
      UserError: it is not a safetensors file, or a damaged one.
      OSError: it cannot be read.
    """
    untrusted.require_regular(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else size
        if length > min(MAX_BYTES, size - 8):
            raise UserError(f"{path} is not a safetensors file, or is cut short ({size:,} bytes); {_HINT}")
        data = file.read(length)
    return Header(parse(data, size - 8 - length, path), 8 + length)


def parse(data: bytes, body: int, source: Any) -> dict[str, Entry]:
    """Return the tensors of a header by name.

    Args:
      data: the header.
      body: bytes after it in the file.
      source: where it is from; messages begin with it.

    Raises:
      UserError: it is not a header of tensors that fill exactly `body` bytes.
    """
    if not data.startswith(b"{"):
        raise UserError(f"{source} has a damaged header: it does not begin with '{{'; {_HINT}")
    try:
        values = schema.decode(data, dict[str, Any], source)
        if (notes := values.pop(_METADATA, None)) is not None:
            schema.convert(notes, dict[str, str], f"{source}: {_METADATA}")
        entries = {name: schema.convert(entry, Entry, f"{source}: tensor {name!r}") for name, entry in values.items()}
    except UserError as error:
        raise UserError(f"{error}; the header is damaged: {_HINT}") from error
    for name, entry in entries.items():
        _require_size(name, entry, source)
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        begin = entry.data_offsets[0]
        if begin != end:
            kind = "overlaps the tensor before it" if begin < end else "leaves a gap before it"
            raise UserError(
                f"{source} has a damaged header: {untrusted.printable(repr(name))} begins at {begin:,} and not at "
                f"{end:,}, which {kind}; {_HINT}"
            )
        end = entry.data_offsets[1]
    if end > body:
        raise UserError(
            f"{source} is cut short: its tensors take {end:,} bytes, and {body:,} follow the header; {_HINT}"
        )
    if end < body:
        raise UserError(f"{source} has {body - end:,} bytes after its last tensor, which no header describes; {_HINT}")
    return entries


def _require_size(name: str, entry: Entry, source: Any) -> None:
    """Refuse a dtype that the format has not, and a shape that does not make the tensor's bytes."""
    shown = untrusted.printable(repr(name))
    if entry.dtype not in BITS:
        raise UserError(
            f"{source} has {shown} in {untrusted.printable(repr(entry.dtype))}, no dtype of the format; {_HINT}"
        )
    begin, end = entry.data_offsets
    bits = 1
    for factor in (*entry.shape, BITS[entry.dtype]):
        bits *= factor
        if bits >= 1 << 64:  # as in the library, also where a later dimension is 0
            raise UserError(f"{source} has {shown} of shape {list(entry.shape)}, which is too large; {_HINT}")
    if bits != 8 * (end - begin):
        raise UserError(
            f"{source} has a damaged header: {shown} of shape {list(entry.shape)} in {entry.dtype} takes "
            f"{bits / 8:,.15g} bytes, and its offsets {begin:,} to {end:,} span {end - begin:,}; {_HINT}"
        )
