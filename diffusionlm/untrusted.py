"""Text, names and files that we did not write: what is shown, opened or read of them, and how much."""

import os
import re
import stat
from pathlib import PurePosixPath
from typing import IO, Any

from etils import epath

from diffusionlm.errors import UserError, naming

MAX_JSON_BYTES = 256 << 20  # the largest vocabulary of a released model takes 20 MB

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"

# Control characters (escape sequences begin with one), marks that change the direction of text, and lone surrogates.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: Any, keep: str = "") -> str:
    r"""Return text that a terminal shows as it is: each control character becomes its escape, such as \x1b.

    Args:
      text: anything; `str` is applied to it.
      keep: control characters that stay, such as "\n".
    """
    return _UNPRINTABLE.sub(lambda match: match[0] if match[0] in keep else _escape(match[0]), str(text))


def unencodable(text: str) -> str | None:
    """Return in words the first character of a text that UTF-8 cannot write; None if it can write them all.

    Python stands such characters in for bytes of the command line that are not UTF-8; JSON can name them too.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        what = (
            f"the byte {code - 0xDC00:#04x}, which is not UTF-8,"
            if 0xDC80 <= code < 0xDD00
            else "half a surrogate pair"
        )
        return f"{what} at character {error.start}"
    return None


def plain_name(name: Any, source: str) -> str:
    """Return the name of a file that another file mentions, if it is one name inside the directory of that file.

    Args:
      name: what the file says.
      source: where it says so; the message begins with it.

    Raises:
      UserError: it is no string, is empty, has parts, or has characters that no file of ours has.
    """
    if (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and not re.search(r"[/\\]", name)
        and name == printable(name)
        and len(os.fsencode(name)) <= 255
    ):
        return name
    raise UserError(f"{source} names the file {printable(repr(name))}; it must be a name inside its directory")


def relative_name(name: Any, source: str) -> str:
    """Return a path inside a directory, such as "a/b.json", each part of which is a `plain_name`.

    Raises:
      UserError: it is absolute, or a part of it is not a plain name.
    """
    if not isinstance(name, str) or not name or PurePosixPath(name).is_absolute():
        raise UserError(f"{source} names the file {printable(repr(name))}; it must be a path inside its directory")
    for part in name.split("/"):
        plain_name(part, source)
    return name


def read_bytes(path: epath.PathLike, limit: int = MAX_JSON_BYTES) -> bytes:
    """Return the bytes of a regular file, or of an object in a bucket, of at most `limit` bytes.

    Devices and pipes, which may have no end or no writer, are never opened.

    Raises:
      UserError: it is not a regular file, or is larger.
      OSError: it cannot be read.
    """
    path = epath.Path(path)
    if "://" not in str(path):
        require_regular(path)
    size = path.stat().length
    if size > limit:
        raise UserError(f"{printable(path)} has {size:,} bytes; at most {limit:,} are read from a file of this kind")
    with naming(path), path.open("rb") as file:
        require_content(file, path)
        data = file.read(limit + 1)
    if len(data) > limit:
        raise UserError(f"{printable(path)} has more than {limit:,} bytes, the most read from a file of this kind")
    return data


def read_text(path: epath.PathLike, limit: int = MAX_JSON_BYTES) -> str:
    """Return the text of a file of UTF-8 (see `read_bytes`).

    Raises:
      UserError: it is not UTF-8, or `read_bytes` refuses it.
    """
    return decoded(read_bytes(path, limit), path)


def decoded(data: bytes, source: Any) -> str:
    """Return UTF-8 as text.

    Raises:
      UserError: it is not UTF-8; the message begins with `source`.
    """
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{printable(source)} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}"
        ) from error


def require_content(file: IO[bytes], path: epath.PathLike) -> None:
    """Refuse the pointer that Git LFS leaves in the place of a file that was not fetched; `file` is at its start.

    Raises:
      UserError: it is such a pointer.
    """
    head = file.read(len(_LFS_POINTER))
    file.seek(0)
    if head == _LFS_POINTER:
        raise UserError(f"{printable(path)} is a Git LFS pointer, not the file; fetch it with `git lfs pull`")


def require_regular(path: epath.PathLike) -> None:
    """Refuse what is no regular file, before it is opened: opening a pipe waits for its writer.

    Raises:
      UserError: it is a directory, a device, a pipe or a socket.
      OSError: there is no such file.
    """
    if (kind := kind_of(path)) == "a directory":
        raise UserError(f"{printable(path)} is a directory; give a file")
    if kind != "a file":
        raise UserError(f"{printable(path)} is {kind}; only files are read here, so put its content in a file")


def kind_of(path: epath.PathLike) -> str:
    """Return in words what lies at a path: "a file", "a directory", "a device", "a pipe" or "a socket".

    Raises:
      OSError: there is nothing.
    """
    if "://" in str(path):  # an object in a bucket
        return "a file"
    kinds = {
        stat.S_IFREG: "a file",
        stat.S_IFDIR: "a directory",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
    }
    return kinds.get(stat.S_IFMT(os.stat(path).st_mode), "of an unknown kind")


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()
