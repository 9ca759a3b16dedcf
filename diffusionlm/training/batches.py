"""Batches of a run on its devices: each process reads the rows that its own devices hold, and no others."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from diffusionlm.config import Config
from diffusionlm.data import mixtures
from diffusionlm.data.mixtures import Mixture
from diffusionlm.data.pipeline import Dataset, eval_batches, train_batches
from diffusionlm.parallel.mesh import global_array, local_rows


class Batches:
    """The global batches of a run: "tokens" and "segment_ids", int32 (batch_size, sequence_length + 1).

    Training batches of a mixture also have "source", int32 (batch_size,), the number of each row's source.
    """

    def __init__(self, cfg: Config, dataset: Dataset | Mixture, mesh: Mesh):
        self._cfg, self._dataset, self._mesh = cfg, dataset, mesh
        self._ranges = local_rows(mesh, cfg.data.batch_size)
        self._rows = np.concatenate([np.arange(start, stop) for start, stop in self._ranges])

    def train(self, start: int) -> Iterator[dict[str, jax.Array]]:
        """Yield training batches start, start + 1, ... without end."""
        size, seed, dataset = self._cfg.data.batch_size, self._cfg.run.seed, self._dataset
        settings: dict[str, Any] = {"batch_size": size, "seed": seed, "start": start, "rows": self._rows}
        if isinstance(dataset, Mixture):
            batches = mixtures.train_batches(dataset, **settings)
        else:
            batches = train_batches(dataset, **settings)
        for rows in batches:
            yield self._placed(rows)

    def held_out(self, source: int = 0) -> Iterator[dict[str, jax.Array]]:
        """Yield the held-out batches that the run is evaluated on, in order; of a mixture, those of one source."""
        dataset = self._dataset.datasets[source] if isinstance(self._dataset, Mixture) else self._dataset
        for rows in held_out_rows(self._cfg, dataset, self._rows):
            yield self._placed(rows)

    def _placed(self, rows: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        size = self._cfg.data.batch_size
        return {name: global_array(self._mesh, size, self._ranges, values) for name, values in rows.items()}


def held_out_rows(cfg: Config, dataset: Dataset, rows: np.ndarray | None = None) -> Iterator[dict[str, np.ndarray]]:
    """Yield the held-out batches that a run is evaluated on, as NumPy arrays.

    Args:
      cfg: the run.
      dataset: its dataset.
      rows: numbers of the rows of each batch that are needed; None: all.
    """
    return eval_batches(dataset, batch_size=cfg.data.batch_size, records=cfg.run.eval_records, rows=rows)
