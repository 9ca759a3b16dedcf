"""Mutations of arguments, JSON, bytes and files: each a function of a `random.Random`, so that a seed repeats it."""

import json
import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

BOUNDS = [2**31 - 1, 2**31, -(2**31), 2**32, 2**53 + 1, 2**63, 2**64, 10**400]
NUMBERS = [0, -1, 1, 2, 3, -0.0, 0.5, 1e-300, 1e300, *BOUNDS]
SPECIAL = [float("nan"), float("inf"), float("-inf")]
TEXTS = [
    "",
    " ",
    "-",
    "--",
    "..",
    "../../x",
    "/etc/passwd",
    "\x1b[2J\x1b]0;t\x07",
    "[/red]",
    "[b]x",
    ":warning:",
    "a\0b",
    "\ud800",
    "\u202eabc",
    "\ufeffx",
    "line\nbreak\r\n",
    "{mask:3}",
    "{0}%s%n",
    "٣",
    "1e5",
    "1_000",
    "0x10",
    "nan",
    "-inf",
    "true",
    "None",
    "null",
    "é" * 200,
    "x" * 5000,
    "gs://b/x",
    "foo://x",
    "tfds:../x",
]
VALUES: list[Any] = [*NUMBERS, *SPECIAL, *TEXTS, None, True, False, [], {}, [[]], {"": {}}, [None], ["a", 1]]


def argument(rng: random.Random, words: Sequence[str]) -> list[str]:
    """Return the words of a command with one of them changed, dropped, repeated or added."""
    words = list(words)
    i = rng.randrange(len(words))
    text = str(rng.choice(NUMBERS + SPECIAL)) if rng.random() < 0.5 else rng.choice(TEXTS)
    if len(text) > 400 and rng.random() < 0.5:
        text = text[:400]
    change = rng.randrange(6)
    if change == 0:
        del words[i]
    elif change == 1:
        words.insert(i, text)
    elif change == 2:
        words.insert(i, words[i])
    elif change == 3 and words[i].startswith("--"):
        words[i] = scrambled(rng, words[i])
    elif words[i].startswith("--") and i + 1 < len(words):
        words[i + 1] = text
    else:
        words[i] = text
    return words


def scrambled(rng: random.Random, text: str) -> str:
    """Return a text with one character dropped, repeated or replaced."""
    if not text:
        return rng.choice(TEXTS)
    i = rng.randrange(len(text))
    middle = rng.choice(["", text[i] * 2, rng.choice("\0\x1b[/-.é \n"), rng.choice(TEXTS)])
    return text[:i] + middle + text[i + 1 :]


def json_value(rng: random.Random, value: Any) -> Any:
    """Return a JSON value with one place in it changed, deleted, renamed, exchanged or nested."""
    places = list(_places(value))
    if not places:
        return rng.choice(VALUES)
    value = json.loads(json.dumps(value))
    path = rng.choice(places)
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    key, change = path[-1], rng.randrange(8)
    if change == 0:
        del parent[key]
    elif change == 1 and isinstance(parent, dict):
        parent[scrambled(rng, key)] = parent.pop(key)
    elif change == 2 and isinstance(parent, dict):
        parent[rng.choice(TEXTS)] = rng.choice(VALUES)
    elif change == 3:
        parent[key] = [parent[key]] if rng.random() < 0.5 else {"x": parent[key]}
    elif change == 4 and isinstance(parent[key], str):
        parent[key] = scrambled(rng, parent[key])
    elif change == 5 and isinstance(parent[key], int | float):
        parent[key] = rng.choice(
            [parent[key] + 1, -parent[key], parent[key] * 2**40, float(parent[key]), str(parent[key])]
        )
    else:
        parent[key] = rng.choice(VALUES)
    return value


def _places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, member in items:
        if path and len(path) < 6 and isinstance(key, int) and key > 20:
            break  # of a long list, its first members
        yield (*path, key)
        yield from _places(member, (*path, key))


def dumped(rng: random.Random, value: Any) -> bytes:
    """Return JSON of any kind that a file may hold: with NaN, with surrogates, with a byte order mark."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5)
    data = text.encode(errors=rng.choice(["surrogatepass", "replace"]))
    return b"\xef\xbb\xbf" + data if rng.random() < 0.03 else data


def content(rng: random.Random, data: bytes) -> bytes:
    """Return bytes with a part changed, cut off, repeated or put in."""
    if not data:
        return b"x"
    i = rng.randrange(len(data))
    j = min(len(data), i + rng.choice([1, 1, 2, 8, 64]))
    return [
        lambda: data[:i] + bytes([data[i] ^ (1 << rng.randrange(8))]) + data[i + 1 :],
        lambda: data[:i],
        lambda: data[:i] + data[j:],
        lambda: data[:i] + data[i:j] * 3 + data[j:],
        lambda: data[:i] + rng.choice(TEXTS).encode(errors="surrogatepass") + data[j:],
        lambda: data[:i] + b"[" * 100000 + data[i:],
        lambda: b"",
        lambda: data + data,
        lambda: data[:i] + rng.randbytes(8) + data[j:],
        lambda: b'{"a":' * 5000,
    ][rng.randrange(10)]()


def file(rng: random.Random, path: Path) -> None:
    """Put something else in the place of a file: other JSON, other bytes, or something that is no file."""
    kind = rng.random()
    data = path.read_bytes()
    if kind < 0.06:
        path.unlink()
        rng.choice(NOT_FILES)(path)
    elif path.suffix in (".json", ".jsonl", "") and kind < 0.8:
        path.write_bytes(_changed_json(rng, data))
    else:
        path.write_bytes(content(rng, data))


def _changed_json(rng: random.Random, data: bytes) -> bytes:
    try:
        return dumped(rng, json_value(rng, json.loads(data)))
    except (ValueError, RecursionError):
        lines = data.split(b"\n")
        i = rng.randrange(len(lines))
        try:
            lines[i] = dumped(rng, json_value(rng, json.loads(lines[i])))
        except (ValueError, RecursionError):
            lines[i] = content(rng, lines[i])
        return b"\n".join(lines)


NOT_FILES: list[Callable[[Path], None]] = [
    lambda path: None,
    os.mkfifo,
    lambda path: path.mkdir(),
    lambda path: path.symlink_to("/dev/zero"),
    lambda path: path.symlink_to(path.name),
    lambda path: path.symlink_to("gone"),
]


def safetensors_header(rng: random.Random, path: Path) -> None:
    """Change the header of a safetensors file, and perhaps its length."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = dumped(rng, json_value(rng, json.loads(data[8 : 8 + length])))
    stated = len(header) if rng.random() < 0.9 else rng.choice([0, 1, 2**31, 2**63, len(header) - 1, len(header) + 1])
    path.write_bytes(stated.to_bytes(8, "little") + header + data[8 + length :])
