"""The dataset of a run: opened where it was prepared, or prepared into the run directory first, and checked to fit."""

import jax
from etils import epath
from jax.experimental import multihost_utils

from diffusionlm.config import Config
from diffusionlm.data.pipeline import Dataset, open_dataset
from diffusionlm.data.prepare import prepare
from diffusionlm.errors import UserError


def open_or_prepare(cfg: Config, workdir: epath.Path) -> Dataset:
    """The dataset that `cfg.data` names; `cfg.data.source` is prepared into WORKDIR/data unless it is there already.

    Raises:
      UserError: neither a path nor a source is given, or the dataset does not fit the model.
    """
    path = epath.Path(cfg.data.path)
    if not cfg.data.path:
        if not cfg.data.source:
            raise UserError(
                f"experiment {cfg.name!r} names no data: give --data.path, a directory made by "
                "`diffusionlm data prepare`, or --data.source, a text or jsonl file"
            )
        path = workdir / "data"
        if jax.process_index() == 0:
            prepare(
                cfg.data.source,
                path,
                sequence_length=cfg.data.sequence_length,
                tokenizer=cfg.data.tokenizer,
                vocab_size=cfg.model.vocab_size if cfg.data.tokenizer == "sentencepiece" else None,
                progress=not path.exists(),  # nothing to say about one that is only looked up again
            )
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("dataset prepared")
    dataset = open_dataset(path)
    check_fits(cfg, dataset)
    return dataset


def check_fits(cfg: Config, dataset: Dataset) -> None:
    """Raises `UserError` unless the records and the vocabulary are those that the model expects."""
    there = dataset.metadata
    wanted = {
        "model.vocab_size": (there.vocab_size, cfg.model.vocab_size),
        "data.sequence_length": (there.sequence_length, cfg.data.sequence_length),
    }
    if differ := {name: values for name, values in wanted.items() if values[0] != values[1]}:
        found = " and ".join(f"{name} {theirs} (the experiment: {ours})" for name, (theirs, ours) in differ.items())
        fix = " ".join(f"--{name} {theirs}" for name, (theirs, _) in differ.items())
        raise UserError(f"dataset {dataset.path} was prepared for {found}; set {fix}, or prepare the data anew")
    for split in ("train", "validation"):
        dataset.size(split)  # raises where there is none
