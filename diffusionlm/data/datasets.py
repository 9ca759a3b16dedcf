"""The dataset of a run: opened where it was prepared, or prepared into the run directory first, and checked to fit."""

import jax
from etils import epath

from diffusionlm import runtime
from diffusionlm.config import Config
from diffusionlm.data.pipeline import Dataset, open_dataset
from diffusionlm.data.prepare import prepare
from diffusionlm.errors import UserError
from diffusionlm.files import run_path


def directory(cfg: Config, workdir: epath.Path) -> epath.Path:
    """Where the dataset that `cfg.data` names is, or will be."""
    return epath.Path(cfg.data.path) if cfg.data.path else workdir / "data"


def open_or_prepare(cfg: Config, workdir: epath.Path) -> Dataset:
    """The dataset that `cfg.data` names; `cfg.data.source` is prepared into WORKDIR/data unless it is there already.

    Every process of a run calls this, the first one prepares, and all must find the same dataset.

    Raises:
      UserError: neither a path nor a source is given, the dataset does not fit the model, or is another elsewhere; on
        all processes if on one.
    """
    path = runtime.everywhere(lambda: run_path(directory(cfg, workdir)))
    if not cfg.data.path:
        if not cfg.data.source:
            raise UserError(
                f"experiment {cfg.name!r} names no data: give --data.path, a directory made by "
                "`diffusionlm data prepare`, or --data.source, a text or jsonl file"
            )
        runtime.everywhere(lambda: _prepare(cfg, path) if jax.process_index() == 0 else None)
    dataset = runtime.everywhere(lambda: _open(cfg, path))
    runtime.require_equal({"dataset": dataset.metadata.sha256}, "give every host the same data")
    return dataset


def _prepare(cfg: Config, path: epath.Path) -> None:
    prepare(
        cfg.data.source,
        path,
        sequence_length=cfg.data.sequence_length,
        tokenizer=cfg.data.tokenizer,
        format="sft" if cfg.data.packing == "examples" else "text",
        vocab_size=cfg.model.vocab_size if cfg.data.tokenizer == "sentencepiece" else None,
        progress=not path.exists(),  # nothing to say about one that is only looked up again
    )


def _open(cfg: Config, path: epath.Path) -> Dataset:
    dataset = open_dataset(path)
    check_fits(cfg, dataset)
    return dataset


def check_fits(cfg: Config, dataset: Dataset) -> None:
    """Raises `UserError` unless the records and the vocabulary are those that the model expects."""
    there = dataset.metadata
    if (there.packing == "examples") != (cfg.data.packing == "examples"):
        holds = "prompts with answers" if there.packing == "examples" else "texts"
        fix = "set --data.packing examples" if there.packing == "examples" else "prepare instruction data, --format sft"
        raise UserError(
            f"dataset {dataset.path} holds {holds}, which does not suit data.packing={cfg.data.packing}; {fix}, or use "
            "another dataset"
        )
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
