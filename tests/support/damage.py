"""Damage to files as disks and copies do it, and what a reader makes of each."""

import collections
import contextlib

from diffusionlm.errors import UserError

PAGE = 4096


def damages(content, rng, count):
    """Yield names and contents: `count` times one bit is flipped, and `count` times a page becomes zeros."""
    for _ in range(count):
        damaged, bit = bytearray(content), rng.randrange(8 * len(content))
        damaged[bit // 8] ^= 1 << bit % 8
        yield f"bit {bit}", bytes(damaged)
    for _ in range(count):
        start = rng.randrange(0, len(content), PAGE)
        page = content[start : start + PAGE]
        if any(page):
            yield f"page at {start}", content[:start] + bytes(len(page)) + content[start + PAGE :]


@contextlib.contextmanager
def replaced(path, content):
    original = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(original)


def outcomes(directory, readers, rng, count):
    """Damage every file below `directory`, one at a time, and read.

    Args:
      directory: what is damaged; it is whole again afterwards.
      readers: name -> a call that returns what it read, to compare with what it read before.
      rng: a `random.Random`.
      count: of the damages of each kind to each file.

    Returns:
      Counts of (file, reader, outcome): "refused", or "unchanged" where the same was read.

    Raises:
      AssertionError: something else was read, or the refusal does not name the directory or the part with the file.
    """
    whole = {name: read() for name, read in readers.items()}
    counts = collections.Counter()
    for file in sorted(path for path in directory.rglob("*") if path.is_file() and path.stat().st_size):
        name = file.relative_to(directory)
        for damage, content in damages(file.read_bytes(), rng, count):
            with replaced(file, content):
                for reader, read in readers.items():
                    where = f"{name}, {damage}, {reader}"
                    try:
                        assert read() == whole[reader], f"{where}: read, and different"
                        counts[str(name), reader, "unchanged"] += 1
                    except UserError as error:
                        message = str(error)
                        assert str(directory) in message and name.parts[0] in message, f"{where}: {message}"
                        assert "\n" not in message, where
                        counts[str(name), reader, "refused"] += 1
    return counts
