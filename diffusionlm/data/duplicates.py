"""Documents that come again: the first of equal ones is kept, whatever its neighbours, workers and files are.

Two documents are equal if their texts are, once Unicode is composed (NFC) and every run of white space is one space. A
held-out document is kept in place of its copies in the training split. Near-duplicates are left to the tools that are
made for them (see docs/data.md).
"""

import functools
import hashlib
import math
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from etils import epath

from diffusionlm.data.items import Item
from diffusionlm.data.jobs import Receipt, Runner, read_array, write_array
from diffusionlm.data.selection import Selection, is_held_out
from diffusionlm.data.sources import Piece
from diffusionlm.storage import write_atomically

REASON = "drop_duplicates"
HASH = np.dtype([("high", "<u8"), ("low", "<u8")])  # of a document; 0: it has no text
TRAINING = np.uint64(1 << 63)  # set in `high` of a document that is not held out
BUCKET_DOCUMENTS = 1 << 25  # whose hashes a worker sorts at a time, which takes about 4 GB
_FOLDER, _DROPPED, _PIECES = "parts/duplicates", "dropped.numbers", "pieces.npy"
_NUMBER = np.dtype("<i8")


@dataclass(frozen=True)
class HashJob:
    """The hashes of the documents of a piece."""

    piece: Piece
    split: str
    index: int  # of the piece, in the order of the source
    selection: Selection
    held_out: float  # fraction of the documents of "train"
    directory: str

    @property
    def file(self) -> str:
        """The file of the hashes, `HASH` for each document."""
        return f"{self.directory}/{_FOLDER}/{self.index:07d}.hashes"

    @property
    def receipt(self) -> str:
        """The file with the number of documents."""
        return f"{self.directory}/{_FOLDER}/{self.index:07d}.json"

    def work(self) -> Receipt:
        """Write the hash of every document, 0 for one without text and one that cannot be read."""
        hashes = b"".join(map(self._hash, self.piece))
        write_atomically(self.file, hashes)
        return {"documents": len(hashes) // HASH.itemsize, "progress": self.piece.progress}

    def _hash(self, item: Item) -> bytes:
        try:
            text = self.selection.read(item).text
        except ValueError:
            text = ""  # whoever encodes it says why
        if not text:
            return bytes(HASH.itemsize)
        number = int.from_bytes(hashlib.blake2b(normalized(text).encode(), digest_size=HASH.itemsize).digest())
        number &= (1 << 127) - 1
        if self.split == "train" and not is_held_out(text, self.held_out):
            number |= 1 << 127
        return (number >> 64).to_bytes(8, "little") + (number & ((1 << 64) - 1)).to_bytes(8, "little")


@dataclass(frozen=True)
class FindJob:
    """The documents that come again among those whose hashes are in one of several buckets."""

    directory: str
    bucket: int
    buckets: int
    first: tuple[int, ...]  # the number of the first document of each piece

    @property
    def receipt(self) -> str:
        """The file with the number of documents that come again."""
        return f"{self.directory}/{_FOLDER}/bucket-{self.bucket:05d}.json"

    @property
    def file(self) -> str:
        """The file of their numbers, int64, sorted."""
        return f"{self.directory}/{_FOLDER}/bucket-{self.bucket:05d}.npy"

    def work(self) -> Receipt:
        """Write the numbers of the documents that come again."""
        hashes, numbers = [np.empty(0, HASH)], [np.empty(0, np.int64)]
        for index, first in enumerate(self.first):
            part = np.frombuffer(epath.Path(f"{self.directory}/{_FOLDER}/{index:07d}.hashes").read_bytes(), HASH)
            mine = np.flatnonzero((part["low"] % self.buckets == self.bucket) & ((part["high"] | part["low"]) != 0))
            hashes.append(part[mine])
            numbers.append(first + mine)
        hashes, numbers = np.concatenate(hashes), np.concatenate(numbers)
        high, is_training = hashes["high"] & ~TRAINING, (hashes["high"] & TRAINING) != 0
        order = np.lexsort((numbers, is_training, hashes["low"], high))  # of equal ones, the held-out ones come first
        again = np.zeros(len(order), bool)
        again[1:] = (np.diff(high[order]) == 0) & (np.diff(hashes["low"][order]) == 0)
        again = np.sort(numbers[order[again]])
        write_array(epath.Path(self.file), again)
        return {"duplicates": len(again)}


def find(
    run: Runner, pieces: Iterable[tuple[str, Piece]], selection: Selection, held_out: float, directory: epath.Path
) -> Iterator[int]:
    """Find the documents that come again; yield the progress of each piece that was looked at.

    Args:
      run: does jobs.
      pieces: of all sources, with their splits, in the order in which they will be encoded.
      selection: says what the text of a document is, and which are left out anyhow.
      held_out: the fraction of the documents of "train" that are held out.
      directory: of jobs; `dropped` reads there what this finds.
    """
    (directory / _FOLDER).mkdir(parents=True, exist_ok=True)
    jobs = (
        HashJob(piece, split, index, selection, held_out, str(directory)) for index, (split, piece) in enumerate(pieces)
    )
    counts = []
    for receipt in run(jobs):
        counts.append(receipt["documents"])
        yield receipt["progress"]
    first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    buckets = max(1, math.ceil(int(first[-1]) / BUCKET_DOCUMENTS))
    places = tuple(first[:-1].tolist())
    found = [FindJob(str(directory), bucket, buckets, places) for bucket in range(buckets)]
    for _ in run(found):
        pass
    again = [read_array(epath.Path(job.file)) for job in found]
    numbers = np.sort(np.concatenate([np.empty(0, np.int64), *again])).astype(_NUMBER)
    write_atomically(directory / _FOLDER / _DROPPED, numbers.tobytes())
    write_array(directory / _FOLDER / _PIECES, np.stack([first, np.searchsorted(numbers, first)]))


def dropped(directory: str, index: int) -> bytes:
    """Return 1 for each document of a piece that is dropped and 0 for the others; b"" if nobody has looked for them."""
    first, starts = read_pieces(directory)
    if not len(first):
        return b""
    start, stop = starts[index : index + 2].tolist()
    with (epath.Path(directory) / _FOLDER / _DROPPED).open("rb") as file:
        file.seek(start * _NUMBER.itemsize)
        numbers = np.frombuffer(file.read((stop - start) * _NUMBER.itemsize), _NUMBER)
    is_dropped = np.zeros(first[index + 1] - first[index], np.uint8)
    is_dropped[numbers - first[index]] = 1
    return is_dropped.tobytes()


@functools.lru_cache(maxsize=1)
def read_pieces(directory: str) -> np.ndarray:
    """Return, up to each piece, the documents and those of them that are dropped: (2, pieces + 1), or (2, 0)."""
    file = epath.Path(directory) / _FOLDER / _PIECES
    return read_array(file) if file.exists() else np.empty((2, 0), np.int64)


def normalized(text: str) -> str:
    """Return a text as it is compared: composed (NFC), with one space for every run of white space."""
    return " ".join(unicodedata.normalize("NFC", text).split())
