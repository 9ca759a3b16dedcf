"""Mixtures of prepared datasets: their sources, and training batches that take exact shares of rows from each.

Each source has its own epochs and its own order. Which rows of batch k come from which source, and which rows of that
source they are, is a pure function of (mixture, seed, k), as `shares` says; so there is no iterator state here either,
and a change of the shares at some batch neither repeats nor skips a row.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from diffusionlm.config_mixture import MixtureSpec
from diffusionlm.data.metadata import Metadata
from diffusionlm.data.pipeline import Batch, Dataset, TrainingRows, check_order, open_dataset, read_ahead
from diffusionlm.data.shares import Shares
from diffusionlm.data.tokenizers import Tokenizer
from diffusionlm.errors import UserError
from diffusionlm.storage import run_path

_SEED_STEP = 0x9E3779B1  # between the seeds of the sources' orders, the first of which has the run's


class Mixture:
    """Several datasets of one tokenizer and shape, and their shares of the rows.

    Attributes:
      spec: names, places and shares.
      datasets: the sources, in the order of `spec`.
    """

    def __init__(self, spec: MixtureSpec, datasets: Sequence[Dataset]):
        self.spec, self.datasets = spec, tuple(datasets)
        for other in self.datasets[1:]:
            _require_alike(self.datasets[0], other)

    @property
    def path(self) -> str:
        """The places of the sources, for messages."""
        return ", ".join(str(dataset.path) for dataset in self.datasets)

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the sources."""
        return self.spec.labels

    @property
    def metadata(self) -> Metadata:
        """The metadata of the first source, whose tokenizer, lengths, packing and template all sources share."""
        return self.datasets[0].metadata

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of all sources."""
        return self.datasets[0].tokenizer

    @property
    def sha256(self) -> str:
        """The identity of the content of all sources, in their order."""
        return hashlib.sha256(json.dumps([dataset.sha256 for dataset in self.datasets]).encode()).hexdigest()

    def seen(self, batch_size: int, batches: int) -> dict[str, dict[str, Any]]:
        """Return what the first batches have of each source: "rows", "share" of all rows, and "epochs" of the source.

        Args:
          batch_size: rows of a batch.
          batches: their number.
        """
        counts = Shares(self.spec, batch_size).counts(batches).tolist()
        return {
            label: {
                "rows": rows,
                "share": round(rows / max(sum(counts), 1), 6),
                "epochs": round(rows / dataset.size("train"), 6),
            }
            for label, dataset, rows in zip(self.labels, self.datasets, counts, strict=True)
        }


def open_mixture(spec: MixtureSpec, folder: str | os.PathLike = "") -> Mixture:
    """Open the datasets of a mixture.

    Args:
      spec: the mixture.
      folder: where its relative paths start from; empty: the working directory.

    Raises:
      UserError: one of them is no whole dataset, or two of them do not go together.
    """
    return Mixture(spec, [open_dataset(place(path, folder)) for path in spec.paths])


def place(path: str, folder: str | os.PathLike = "") -> epath.Path:
    """Return where a dataset of a mixture is, whose path may be relative to a folder."""
    return run_path(folder) / path if folder and "://" not in path and not os.path.isabs(path) else run_path(path)


def train_batches(
    mixture: Mixture, *, batch_size: int, seed: int, start: int = 0, rows: Sequence[int] | np.ndarray | None = None
) -> Iterator[Batch]:
    """Yield batches start, start + 1, ... of the training splits, without end, read ahead in the background.

    They are as of `pipeline.train_batches`, with the number of each row's source under "source". A mixture in which
    the first source has all rows gives its batches.

    Args:
      mixture: from `open_mixture`.
      batch_size: rows of the global batch.
      seed: of the permutations.
      start: the first batch.
      rows: numbers in [0, batch_size) of the rows of each global batch that this host needs, in order; None: all.

    Raises:
      UserError: the seed is out of range, or a dataset has no training split.
    """
    batch_size, seed, start = check_order(batch_size, seed, start)
    shares = Shares(mixture.spec, batch_size)
    # Sources of one size would else be shuffled alike, and rows that belong together would meet.
    seeds = [(seed + number * _SEED_STEP) % (1 << 32) for number in range(len(mixture.datasets))]
    sources = [TrainingRows(dataset, own) for dataset, own in zip(mixture.datasets, seeds, strict=True)]
    needed = np.arange(batch_size) if rows is None else np.asarray(rows)

    def batch(k: int) -> Batch:
        source_B, position_B = (values[needed] for values in shares.batch(k, seed))
        found: Batch = {}
        for number, source in enumerate(sources):
            places = np.flatnonzero(source_B == number)
            if not len(places):
                continue
            for name, values in source.read(position_B[places]).items():
                found.setdefault(name, np.empty((len(needed), *values.shape[1:]), values.dtype))[places] = values
        return found | {"source": source_B}

    return read_ahead(batch, start, sys.maxsize)


def _require_alike(one: Dataset, other: Dataset) -> None:
    """Refuse two sources whose rows do not go together."""
    there, here = one.metadata, other.metadata
    for what, first, second in (
        ("tokenizers (sha256)", there.tokenizer["sha256"][:12], here.tokenizer["sha256"][:12]),
        ("sequence_length", there.sequence_length, here.sequence_length),
        ("packing", there.packing, here.packing),
        ("templates", there.template and there.template["name"], here.template and here.template["name"]),
        ("beginnings of documents (bos)", there.bos, here.bos),
    ):
        if first != second:
            raise UserError(
                f"datasets {str(one.path)!r} and {str(other.path)!r} cannot be mixed: their {what} differ, {first} and "
                f"{second}; prepare one of them again like the other"
            )
    if there.template != here.template:
        raise UserError(
            f"datasets {str(one.path)!r} and {str(other.path)!r} cannot be mixed: their templates differ under one "
            "name; prepare one of them again like the other"
        )
