"""The identity of a file: a hash of all its bytes, and a stamp by which a file that was not touched is recognised."""

import hashlib
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any, NamedTuple

from etils import epath

HASH = "blake2b"
DIGEST_BYTES = 32
BLOCK_BYTES = 1 << 20  # read at a time
SETTLED_SECONDS = 2.0  # after a change; file systems give two changes that follow closely the same time


class State(NamedTuple):
    """A file's size and times, as the file system reports them."""

    bytes: int
    changed: float  # seconds since 1970, the latest change of the content or of the entry; infinite: unknown
    stamp: str  # a hash of the path, the size, the times and the inode

    @classmethod
    def of(cls, path: epath.Path) -> "State":
        """Return the present state of a file on a disk or in a bucket.

        Raises:
          OSError: there is no such file, or it cannot be seen.
        """
        if "://" in str(path):
            status = path.stat()
            # Some stores tell no time; such a file never counts as settled.
            size, changed, marks = status.length, float(status.mtime) or math.inf, (status.mtime,)
        else:
            result = os.stat(path)
            size, changed = result.st_size, max(result.st_mtime, result.st_ctime)
            # A copy may keep the time of its content; it has another inode, and its own time of the last change.
            marks = (result.st_mtime_ns, result.st_ctime_ns, result.st_ino)
        content = repr((os.path.abspath(path) if "://" not in str(path) else str(path), size, *marks))
        return cls(size, changed, hashlib.sha256(content.encode(errors="surrogateescape")).hexdigest()[:32])


class Stamps(dict[str, str]):
    """In the place of known digests: files are described by their stamps, and not read."""

    def get(self, key: str, default: Any = None) -> Any:
        """Return the stamp itself."""
        return key


def describe(path: epath.Path, state: State, known: Mapping[str, str]) -> dict[str, Any]:
    """Return the identity of a file in JSON types: its name, size and hash, and its stamp.

    Args:
      path: the file.
      state: its state before it was read for the first time.
      known: stamp -> hash, of files that were described before (see `known_digests`).

    Raises:
      OSError: it cannot be read.
    """
    settled = time.time() - state.changed > SETTLED_SECONDS
    content = known.get(state.stamp) or digest(path)
    return {"name": path.name, "bytes": state.bytes, HASH: content, "stamp": state.stamp if settled else ""}


def known_digests(description: Any) -> dict[str, str]:
    """Return stamp -> hash of all files in a description, which `describe` made."""
    return {entry["stamp"]: entry[HASH] for entry in _files(description) if entry.get("stamp")}


def content_of(description: Any) -> Any:
    """Return a description without what may change while the content stays: stamps, and names but for their ends."""
    if isinstance(description, dict) and HASH in description:
        suffixes = PurePath(str(description.get("name"))).suffixes
        ending = suffixes[-2:] if suffixes[-1:] in ([".gz"], [".zst"]) else suffixes[-1:]
        return {"ending": ending, "bytes": description.get("bytes"), HASH: description[HASH]}
    if isinstance(description, dict):
        return {name: content_of(value) for name, value in description.items()}
    return [content_of(value) for value in description] if isinstance(description, list) else description


def names_and_sizes(description: Any) -> Any:
    """Return a description as it was before files were hashed: [name, size] for each file."""
    if isinstance(description, dict) and HASH in description:
        return [description["name"], description["bytes"]]
    if isinstance(description, dict):
        return {name: names_and_sizes(value) for name, value in description.items()}
    return [names_and_sizes(value) for value in description] if isinstance(description, list) else description


def summary(description: Any) -> str:
    """Return the files of a description in words, for messages."""
    files = list(_files(description))
    shown = [f"{file.get('name')} of {file.get('bytes')} bytes, {HASH} {str(file[HASH])[:12]}" for file in files[:3]]
    return "; ".join(shown + [f"{len(files) - 3:,} more"] * (len(files) > 3)) if files else repr(description)


def _files(description: Any) -> Iterator[dict[str, Any]]:
    if isinstance(description, dict) and HASH in description:
        yield description
    elif isinstance(description, dict | list):
        for value in description.values() if isinstance(description, dict) else description:
            yield from _files(value)


def digest(path: epath.Path) -> str:
    """Return the hash of a file."""
    content = hashlib.blake2b(digest_size=DIGEST_BYTES)
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            content.update(block)
    return content.hexdigest()
