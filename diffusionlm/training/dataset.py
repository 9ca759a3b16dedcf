"""The dataset of a run: opened where it was prepared, or prepared into the run directory first, and checked to fit."""

import jax
from etils import epath

from diffusionlm.checkpoint import store as checkpoint
from diffusionlm.config import Config
from diffusionlm.data import metadata as metadata_lib
from diffusionlm.data.pipeline import Dataset, open_dataset
from diffusionlm.data.prepare import begins_with_bos, named_tokenizer, prepare
from diffusionlm.data.tokenizers import kinds as tokenizers
from diffusionlm.errors import UserError
from diffusionlm.parallel import processes as runtime
from diffusionlm.storage import run_path
from diffusionlm.training.run_directory import begun


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
        runtime.everywhere(lambda: _prepare(cfg, workdir, path) if jax.process_index() == 0 else None)
    dataset = runtime.everywhere(lambda: _open(cfg, path))
    runtime.require_equal({"dataset": dataset.metadata.sha256}, "give every host the same data")
    return dataset


def _prepare(cfg: Config, workdir: epath.Path, path: epath.Path) -> None:
    if _begun_with(cfg, workdir) and (path / metadata_lib.FILE).exists():
        return  # its source, and the checkpoint with its tokenizer, may be gone
    tokenizer = _tokenizer(cfg)
    bos = bool(cfg.run.init_from) and cfg.data.packing != "examples" and begins_with_bos(cfg.run.init_from)
    try:
        prepare(
            cfg.data.source,
            path,
            sequence_length=cfg.data.sequence_length,
            tokenizer=tokenizer,
            format="sft" if cfg.data.packing == "examples" else "text",
            vocab_size=cfg.model.vocab_size if tokenizer == "sentencepiece" else None,
            bos=bos,
            progress=not path.exists(),  # nothing to say about one that is only looked up again
        )
    except UserError as error:
        raise UserError(
            f"data.source={cfg.data.source}: {error}; for other settings make a dataset with `diffusionlm data "
            "prepare`, and give it as --data.path"
        ) from error


def _begun_with(cfg: Config, workdir: epath.Path) -> bool:
    """Whether the run in `workdir` was last started with the same source and the same places of its tokenizer."""
    known = begun(workdir)
    named = [(one.data.source, one.data.tokenizer, one.run.init_from) for one in (known or Config(), cfg)]
    return named[0] == named[1]


def _tokenizer(cfg: Config) -> str | tokenizers.Tokenizer:
    """The tokenizer to prepare `data.source` with: that of the checkpoint that the run starts from, if there is one.

    Raises:
      UserError: another is named, or it carries none and none is named.
    """
    named, start = cfg.data.tokenizer, cfg.run.init_from
    if not start:
        return named
    own = checkpoint.load_sidecar(start).tokenizer
    if named == "sentencepiece":
        if own is None:
            raise UserError(f"run.init_from={start} carries no tokenizer; give its file with --data.tokenizer")
        return tokenizers.from_dict(own)
    given = named_tokenizer(named)
    if own is not None and given.sha256 != own["sha256"]:
        raise UserError(
            f"run.init_from={start} has another tokenizer (sha256 {own['sha256'][:12]}) than data.tokenizer={named} "
            f"({given.sha256[:12]}); leave --data.tokenizer out"
        )
    return given


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
    if cfg.run.init_from and there.vocab_size < cfg.model.vocab_size:
        del wanted["model.vocab_size"]  # released models have more rows than their tokenizers have pieces
    if differ := {name: values for name, values in wanted.items() if values[0] != values[1]}:
        found = " and ".join(f"{name} {theirs} (the experiment: {ours})" for name, (theirs, ours) in differ.items())
        fix = " ".join(f"--{name} {theirs}" for name, (theirs, _) in differ.items())
        raise UserError(f"dataset {dataset.path} was prepared for {found}; set {fix}, or prepare the data anew")
    for split in ("train", "validation"):
        dataset.size(split)  # raises where there is none
