"""Prepared datasets as batches: the rows of batch k are a pure function of (seed, k).

So there is no iterator state to save, any batch can be asked for, and each host reads only its own rows of it. Of a
dialogue, which of its answers a batch trains on is such a function too.
"""

import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from diffusionlm.data import dialogues, tokenizers
from diffusionlm.data import metadata as metadata_lib
from diffusionlm.data.metadata import Metadata
from diffusionlm.errors import UserError
from diffusionlm.scalars import whole
from diffusionlm.storage import run_path

PREFETCH = grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)  # batches read ahead, and by how many threads

# "tokens" and "segment_ids", int32 (rows, sequence_length + 1); segment 0 is padding. In training on a mixture also
# "source", int32 (rows,).
Batch = dict[str, np.ndarray]


class Dataset:
    """A prepared directory: its metadata, its tokenizer, and its rows by number, in which dialogues are whole."""

    def __init__(self, path: epath.Path, metadata: Metadata):
        self.path, self.metadata = path, metadata
        self._builder: Any = tfds.builder_from_directory(path)
        self._source: Callable[[str], Any] = functools.cache(self._builder.as_data_source)

    @property
    def sha256(self) -> str:
        """The identity of the content."""
        return self.metadata.sha256

    @functools.cached_property
    def tokenizer(self) -> tokenizers.Tokenizer:
        """The tokenizer that made the dataset.

        Raises:
          UserError: it is damaged, or is not the one whose tokens and bytes the metadata counts.
        """
        tokenizer, metadata = tokenizers.from_dict(self.metadata.tokenizer), self.metadata
        if tokenizer.vocab_size != metadata.vocab_size:
            raise UserError(
                f"dataset {str(self.path)!r} has vocab_size={metadata.vocab_size}, and its tokenizer "
                f"{tokenizer.vocab_size}; prepare it again"
            )
        for name, split in metadata.splits.items():
            if split.raw_bytes != split.token_bytes and getattr(tokenizer, "lossless", tokenizer.kind == "byte"):
                raise UserError(
                    f"dataset {str(self.path)!r} has raw_bytes={split.raw_bytes} and token_bytes={split.token_bytes} "
                    f"in split {name!r}, which are equal for this tokenizer; prepare it again"
                )
        return tokenizer

    def size(self, split: str) -> int:
        """Return the number of rows.

        Raises:
          UserError: there is no such split.
        """
        if split not in self.metadata.splits:
            raise UserError(
                f"dataset {str(self.path)!r} has no split {split!r}, only {', '.join(self.metadata.splits)}"
            )
        return self.metadata.splits[split].records

    def rows(self, split: str, indices: Iterable[int]) -> Batch:
        """Return the rows with these numbers, in this order.

        Raises:
          UserError: there is no such split, or a shard is damaged: ArrayRecord keeps hashes of what it holds.
        """
        self.size(split)
        indices = [int(i) for i in indices]
        try:
            rows = self._source(split).__getitems__(indices)
        except RuntimeError as error:
            raise self._damaged(split, indices, error) from error
        return {name: np.stack([row[name] for row in rows]).astype(np.int32) for name in ("tokens", "segment_ids")}

    def _damaged(self, split: str, indices: Sequence[int], error: RuntimeError) -> UserError:
        """Return an error that names the shard of the first of these rows that cannot be read alone."""
        shards, lengths = list(self.metadata.splits[split].shards), self._builder.info.splits[split].shard_lengths
        ends = np.cumsum(lengths)
        shard = f"a shard of {split}"
        for index in indices:
            try:
                self._source(split)[index]
            except RuntimeError:
                shard = shards[int(np.searchsorted(ends, index, side="right"))]
                break
        reason = " ".join(str(error).split(", chunk at")[0].split())
        return UserError(
            f"dataset {str(self.path)!r} is damaged: {shard} cannot be read ({reason}); copy or prepare it again"
        )

    def examples(self, split: str, indices: Sequence[int], addresses: Iterable[tuple[int | str, ...]]) -> Batch:
        """Return the same rows, but each dialogue only up to one answer, chosen by the row's address alone."""
        rows = self.rows(split, indices)
        if self.metadata.packing == "chunk":
            return rows
        if self.metadata.packing == "packed_examples":
            return dialogues.select_turns(rows, addresses, tokenizers.require_eos(self.tokenizer))
        draws = (dialogues.draw(*address) for address in addresses)
        return dialogues.select_turn(rows, draws, tokenizers.require_eos(self.tokenizer))


class TrainingRows:
    """The training split of a dataset, again and again: every epoch is a new permutation of all rows.

    A dialogue comes once an epoch, with one of its answers, drawn again each time.

    Args:
      dataset: from `open_dataset`.
      seed: of the permutations.
    """

    def __init__(self, dataset: Dataset, seed: int):
        self._dataset, self._seed, self._size = dataset, seed, dataset.size("train")
        self._order: Any = grain.MapDataset.range(self._size).seed(seed).shuffle().repeat()

    def read(self, positions: Iterable[int]) -> Batch:
        """Return the rows at these positions; position p is in epoch p // size."""
        positions = [int(position) for position in positions]
        indices = [int(self._order[position]) for position in positions]
        epochs = [position // self._size for position in positions]
        addresses = [(self._seed, *address) for address in zip(epochs, indices, strict=True)]
        return self._dataset.examples("train", indices, addresses)


def check_order(batch_size: int, seed: int, start: int) -> tuple[int, int, int]:
    """Return (batch_size, seed, start) as integers.

    Raises:
      UserError: one of them is out of range.
    """
    batch_size, start, seed = whole("batch_size", batch_size, 1), whole("start", start, 0), whole("seed", seed, 0)
    if not 0 <= seed < 1 << 32:
        raise UserError(f"seed={seed} of the data order must lie in [0, 2**32)")
    return batch_size, seed, start


def open_dataset(path: str | os.PathLike) -> Dataset:
    """Open a directory that `prepare` made.

    Raises:
      UserError: it is not one, or not a whole one.
    """
    path = run_path(path)
    return Dataset(path, metadata_lib.read(path))


def train_batches(
    dataset: Dataset, *, batch_size: int, seed: int, start: int = 0, rows: Sequence[int] | np.ndarray | None = None
) -> Iterator[Batch]:
    """Yield batches start, start + 1, ... of the training split, without end, read ahead in the background.

    Every epoch is a new permutation of all rows; a batch may straddle two epochs. A dialogue comes once an epoch, with
    one of its answers, drawn again each time.

    Args:
      dataset: from `open_dataset`.
      batch_size: rows of the global batch.
      seed: of the permutations.
      start: the first batch.
      rows: numbers in [0, batch_size) of the rows of each global batch that this host needs, in order; None: all.

    Raises:
      UserError: the seed is out of range, or there is no training split.
    """
    batch_size, seed, start = check_order(batch_size, seed, start)
    stored = TrainingRows(dataset, seed)
    rows = np.arange(batch_size) if rows is None else np.asarray(rows)

    def batch(k: int) -> Batch:
        return stored.read(k * batch_size + int(row) for row in rows)

    return read_ahead(batch, start, sys.maxsize)


def eval_batches(
    dataset: Dataset,
    *,
    batch_size: int,
    records: int | None = None,
    split: str = "validation",
    rows: Sequence[int] | np.ndarray | None = None,
) -> Iterator[Batch]:
    """Yield the rows of a split in order, once; the last batch is filled up with rows of token 0 in segment 0, padding.

    A dialogue always comes with the same answer. Of `records` rows, the r-th is in batch r // batch_size.

    Args:
      dataset: from `open_dataset`.
      batch_size: rows of the global batch.
      records: the number of rows, evenly spread over the split, whose sources often follow one another; None: all.
      split: whose rows.
      rows: as in `train_batches`.

    Raises:
      UserError: there is no such split.
    """
    batch_size, total = whole("batch_size", batch_size, 1), dataset.size(split)
    size = total if records is None else min(total, whole("records", records, 1))
    spread = np.arange(size) * total // size
    rows = np.arange(batch_size) if rows is None else np.asarray(rows)

    def batch(k: int) -> Batch:
        positions = k * batch_size + rows
        indices = spread[np.minimum(positions, size - 1)].tolist()
        examples = dataset.examples(split, indices, [(split, index) for index in indices])
        return {name: np.where(positions[:, None] < size, values, 0) for name, values in examples.items()}

    return read_ahead(batch, 0, -(-size // batch_size))


def read_ahead(batch: Callable[[int], Batch], start: int, stop: int) -> Iterator[Batch]:
    """Yield batches `start` to `stop` - 1, read in the background."""
    return iter(grain.MapDataset.range(start, stop).map(batch).to_iter_dataset(PREFETCH))
