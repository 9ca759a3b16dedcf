"""The dataset of a sweep: the same for all its cells and workers, at all times."""

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
from etils import epath

from diffusionlm import config_io, config_mixture
from diffusionlm.config import Config
from diffusionlm.data.mixtures import Mixture, open_mixture
from diffusionlm.data.pipeline import Dataset, open_dataset
from diffusionlm.data.tokenizers import ByteTokenizer
from diffusionlm.errors import UserError
from diffusionlm.ownership import claims
from diffusionlm.parallel import processes
from diffusionlm.scaling.sweep.directory import Identity, require_identity
from diffusionlm.scaling.sweep.recipe import Cell, Sweep
from diffusionlm.storage import in_bucket
from diffusionlm.training import dataset as run_dataset

log = logging.getLogger(__name__)


def with_settings(cell: Cell, settings: Mapping[str, Any]) -> Cell:
    """Return a cell with other values for dotted operational fields of its config."""
    return dataclasses.replace(cell, config=config_io.with_fields(cell.config, settings))


def with_dataset(sweep: Sweep, cells: Sequence[Cell], workdir: epath.Path) -> list[Cell]:
    """Return the cells with the path of the sweep's dataset, which is prepared first where the sweep names a source.

    Every process of a worker calls this.

    Args:
      sweep: the sweep.
      cells: the cells that the worker will run.
      workdir: the sweep's directory, whose sweep.json is written, or compared with the dataset.

    Raises:
      UserError: the sweep has no data, the dataset does not fit the cells, or the directory belongs to another sweep or
        another dataset.
    """
    config = cells[0].config
    if len({cell.config.data.mixture for cell in cells}) > 1:
        raise UserError(
            f"sweep {sweep.name!r} has cells of several mixtures, and one directory; make two sweeps of them"
        )
    if config.data.path or config.data.mixture:
        processes.run_on_all_processes(lambda: _require_fit(config))
    elif sweep.source and not in_bucket(workdir):
        prepared = dataclasses.replace(config, data=dataclasses.replace(config.data, source=sweep.source))
        _prepare(prepared, workdir)
        cells = [with_settings(cell, {"data.path": str(workdir / "data")}) for cell in cells]
    else:
        reason = "cannot prepare its data in a bucket" if sweep.source else "names no data"
        raise UserError(
            f"sweep {sweep.name!r} {reason}: give --data.path, a directory made by {_how_to_prepare(config)}"
        )
    data = run_dataset.open_or_prepare(cells[0].config, workdir)
    datasets = data.datasets if isinstance(data, Mixture) else (data,)
    held_out, eval_records = min(each.size("validation") for each in datasets), cells[0].recipe.eval_records
    if held_out < eval_records and jax.process_index() == 0:
        log.warning("there are %d held-out records, and the recipe asks for %d", held_out, eval_records)
    identity = Identity(
        sweep=sweep.name,
        dataset=data.sha256,
        unique_tokens=_unique_rows(data) * config.data.sequence_length,
    )
    processes.run_on_all_processes(lambda: require_identity(workdir, identity) if jax.process_index() == 0 else None)
    return list(cells)


def _unique_rows(data: Dataset | Mixture) -> int:
    """Return the number of rows that a cell can train on before a source begins again."""
    if not isinstance(data, Mixture):
        return data.size("train")
    known = zip(data.datasets, data.spec.phases[0].weights, strict=True)
    return min(math.floor(dataset.size("train") / weight) for dataset, weight in known if weight)


def _prepare(config: Config, workdir: epath.Path) -> None:
    """Prepare the sweep's data, after other workers that do so already."""

    def turn() -> AbstractContextManager:
        workdir.mkdir(parents=True, exist_ok=True)
        return claims.owned(workdir / "data.owner.json", f"{workdir / 'data'}", "", wait=True)

    with processes.on_first_process(turn):
        run_dataset.open_or_prepare(config, workdir)


def _require_fit(config: Config) -> None:
    """Refuse a dataset that the cells cannot use, since cells are never changed to fit their data."""
    data = config.data
    if data.mixture:
        for dataset in open_mixture(config_mixture.parse(data.mixture), data.path).datasets:
            _require_shape(config, dataset)
    else:
        _require_shape(config, open_dataset(data.path))


def _require_shape(config: Config, dataset: Dataset) -> None:
    metadata, data = dataset.metadata, config.data
    if (metadata.vocab_size, metadata.sequence_length) != (config.model.vocab_size, data.sequence_length):
        raise UserError(
            f"dataset {dataset.path} has {metadata.vocab_size} tokens and sequences of {metadata.sequence_length}, and "
            f"the cells need {config.model.vocab_size} and {data.sequence_length}: make one by "
            f"{_how_to_prepare(config)}"
        )


def _how_to_prepare(config: Config) -> str:
    size = config.model.vocab_size
    tokens = "--tokenizer byte" if size == ByteTokenizer.vocab_size else f"--vocab_size {size}"
    return f"`diffusionlm data prepare TEXT {tokens} --sequence_length {config.data.sequence_length} --output DIR`"
