"""Archives of texts, as WebDataset has them: members of one name but for its ending are one document."""

import itertools
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

from etils import epath

from diffusionlm.data.fields import Columns
from diffusionlm.data.formats import reading as reading_lib
from diffusionlm.data.formats.reading import Reader, Reading, Span
from diffusionlm.data.items import Item, parse_json
from diffusionlm.errors import UserError
from diffusionlm.untrusted import printable, require_content

TEXTS, RECORD = (".txt", ".md"), ".json"  # what is read; other members are not


class _Member(tarfile.TarInfo):
    """A member; unlike tarfile, this calls an archive damaged that ends in another way than with its mark."""

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> Any:
        return _read_header(super().fromtarfile, tarfile)


def _read_header(read_next: Callable[[tarfile.TarFile], Any], archive: tarfile.TarFile) -> Any:
    errors: Any = tarfile  # its classes of errors have no type hints
    try:
        return read_next(archive)
    except errors.EOFHeaderError:
        raise
    except tarfile.HeaderError as error:
        raise tarfile.ReadError(f"{error}, and no mark of the end") from error


def read(path: epath.Path, span: Span, columns: Columns | None) -> Iterator[Item]:
    """Yield the documents of an archive: a text, or the object of a .json, which gets the field `text` from a text.

    Raises:
      UserError: the archive is damaged, holds no such member, or one of more bytes than a document may have.
    """
    with Reading(path, "tar", (tarfile.TarError,)) as reading, path.open("rb") as file:
        require_content(file, path)
        reader = Reader(path, file)
        position, found = 0, False
        with tarfile.open(fileobj=reader.stream, mode="r|", tarinfo=_Member) as archive:
            for key, group in itertools.groupby(_contents(path, archive, reading), key=_key):
                before, position, found = position, file.tell(), True
                yield _item(f"{path}:{printable(key)}", list(group))._replace(progress=position - before)
            _require_end(path, archive)
        if not found:
            raise UserError(
                f"{printable(path)} has no member that ends in .txt, .md or .json; other kinds are not read"
            )


def _key(member: tuple[str, bytes]) -> str:
    """Return the name of a member without its ending."""
    return str(PurePosixPath(member[0]).with_suffix(""))


def _contents(path: epath.Path, archive: tarfile.TarFile, reading: Reading) -> Iterator[tuple[str, bytes]]:
    """Yield the name and the content of each text and JSON member."""
    kept: Any = archive  # it would keep all headers
    while (member := archive.next()) is not None:
        kept.members.clear()
        reading.location, name = f"{path}:{printable(member.name)}", PurePosixPath(member.name)
        if not member.isreg() or name.suffix not in (*TEXTS, RECORD) or name.name.startswith("."):
            continue
        if member.issparse() or member.size > reading_lib.DOCUMENT_BYTES:
            raise UserError(
                f"{reading.location} is sparse, or has more than {reading_lib.DOCUMENT_BYTES >> 30} GiB; split it"
            )
        content = archive.extractfile(member)
        yield member.name, content.read() if content else b""


def _item(location: str, members: Sequence[tuple[str, bytes]]) -> Item:
    """Return the document of the members of one name."""
    texts = [(name, content) for name, content in members if PurePosixPath(name).suffix in TEXTS]
    records = [(name, content) for name, content in members if PurePosixPath(name).suffix == RECORD]
    for same in (texts, records):
        if len(same) > 1:
            return Item(location, b"", True, 0, f"one name of {printable(same[0][0])} and {printable(same[1][0])}")
    if not records:
        return Item(f"{location}{PurePosixPath(texts[0][0]).suffix}", texts[0][1], False, 0)
    if not texts:
        return Item(f"{location}{RECORD}", records[0][1], True, 0)
    try:
        record = parse_json(records[0][1].decode("utf-8-sig"))
        if not isinstance(record, dict):
            raise ValueError(f"a JSON {type(record).__name__}, not an object")
        record["text"] = texts[0][1].decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return Item(location, b"", True, 0, f"invalid UTF-8 at byte {error.start}")
    except ValueError as error:
        return Item(location, b"", True, 0, str(error))
    return Item(location, json.dumps(record).encode(), True, 0)


def _require_end(path: epath.Path, archive: tarfile.TarFile) -> None:
    """Read what follows the mark of the end: padding, or a further archive, which would not be read."""
    stream: Any = archive.fileobj
    while block := stream.read(1 << 16):
        if block.strip(b"\0"):
            raise UserError(
                f"{printable(path)} goes on after its end; of archives written one after another only the first "
                "is read, so give them as files of their own"
            )
