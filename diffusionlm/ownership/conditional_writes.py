"""Compare-and-swap writes of files, on disks and in buckets.

TensorStore's key-value stores offer such writes on file systems and on object stores alike.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import tensorstore as ts
from etils import epath

from diffusionlm.storage import in_bucket
from diffusionlm.untrusted import require_regular


def open_store(directory: epath.Path) -> ts.KvStore:
    """Open a directory as a key-value store with conditional writes; it is made by the first write.

    Raises:
      OSError: the directory cannot be opened.
    """
    if in_bucket(directory):
        spec: object = f"{str(directory).rstrip('/')}/"
    else:
        spec = {"driver": "file", "path": f"{os.path.abspath(directory)}/"}
    with store_errors():
        return ts.KvStore.open(spec).result()


def write_once(directory: epath.Path, name: str, text: str) -> str:
    """Write a file unless it exists, and return its content, whichever process wrote it.

    Raises:
      OSError: the directory cannot be read or written.
    """
    store = open_store(directory)
    require_file(store, name)
    with store_errors():
        content = store.read(name).result()
        if content.state == "missing":
            write(store, name, text.encode(), content.stamp.generation)
            content = store.read(name).result()
        return content.value.decode(errors="replace")


def write(store: ts.KvStore, name: str, content: bytes | None, generation: bytes) -> bytes | None:
    """Replace (None: delete) a file that still has this generation; return the new one, or None if it has not.

    Raises:
      OSError: the file cannot be written, or its lock is a symbolic link, which TensorStore would write through.
    """
    lock = store.path + f"{name}.__lock"
    if _on_disk(store) and os.path.islink(lock):
        raise OSError(f"{lock} is a symbolic link, which nothing here makes; remove it")
    with store_errors():
        return store.write(name, content, if_equal=generation).result().generation or None


def require_file(store: ts.KvStore, name: str) -> None:
    """Refuse to read what is no regular file; TensorStore would wait for the writer of a pipe.

    Raises:
      UserError: it is none.
    """
    if _on_disk(store) and os.path.exists(store.path + name):
        require_regular(store.path + name)


def _on_disk(store: ts.KvStore) -> bool:
    return os.path.isabs(store.path)


@contextmanager
def store_errors() -> Iterator[None]:
    """Raise TensorStore's errors about a failing disk or network as `OSError`, as the standard library does.

    The error has the operating system's number where there is one.
    """
    try:
        yield
    except (ValueError, NotImplementedError) as error:
        failure = OSError(f"cannot reach the leases: {' '.join(str(error).replace(chr(0), '/').split())}")
        if number := re.search(r"os_error_code='(\d+)'", str(error)):
            failure.errno = int(number[1])
        raise failure from error
