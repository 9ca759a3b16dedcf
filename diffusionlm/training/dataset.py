"""The data of a run: opened where they were prepared, or prepared into the run directory first, and checked to fit."""

import math

import jax
import numpy as np
from etils import epath

from diffusionlm import config_mixture
from diffusionlm.config import Config
from diffusionlm.data import metadata as metadata_lib
from diffusionlm.data import tokenizers
from diffusionlm.data.mixtures import Mixture, place
from diffusionlm.data.pipeline import Dataset, open_dataset
from diffusionlm.data.request import changed_source
from diffusionlm.data.shares import Shares
from diffusionlm.errors import UserError
from diffusionlm.parallel import processes
from diffusionlm.registry import experiments
from diffusionlm.storage import run_path
from diffusionlm.training.prepare import begins_with_bos, named_tokenizer, prepare
from diffusionlm.training.run_directory import recorded_config
from diffusionlm.training.start import Start


def directory(cfg: Config, workdir: epath.Path) -> epath.Path:
    """Return where the dataset that `cfg.data` names is, or will be; of a mixture, its first source."""
    if cfg.data.mixture:
        return place(config_mixture.parse(cfg.data.mixture).paths[0], cfg.data.path)
    return run_path(cfg.data.path) if cfg.data.path else workdir / "data"


def open_or_prepare(cfg: Config, workdir: epath.Path, start: Start | None = None) -> Dataset | Mixture:
    """Open the data that `cfg.data` names, once `cfg.data.source` has been prepared into WORKDIR/data.

    Every process of a run calls this, the first one prepares, and all must find the same dataset.

    Args:
      cfg: the run.
      workdir: the run directory.
      start: the checkpoint that the run starts from, whose tokenizer prepares the data; None: fresh weights.

    Raises:
      UserError: neither a path nor a source is given, the data do not fit the model, the run would repeat them more
        often than it may, or processes see different ones; on all processes if on one.
    """
    if not cfg.data.path and not cfg.data.source and not cfg.data.mixture:
        raise UserError(
            f"experiment {cfg.name!r} names no data: give --data.path, a directory made by "
            "`diffusionlm data prepare`, or --data.source, a text or jsonl file"
            + (
                f"; `diffusionlm experiments {cfg.name}` has those of its paper"
                * bool(experiments.published_data(cfg.name))
            )
        )
    if not cfg.data.path and not cfg.data.mixture:
        _prepare(cfg, workdir, start)
    dataset = _open_all(cfg, workdir)
    processes.require_equal({"dataset": dataset.sha256}, "give every host the same data")
    return dataset


@processes.on_all_processes
def _prepare(cfg: Config, workdir: epath.Path, start: Start | None) -> None:
    if jax.process_index():
        return
    path = directory(cfg, workdir)
    if _begun_with(cfg, workdir) and (path / metadata_lib.FILE).exists():
        # The source, and the checkpoint with its tokenizer, may be gone.
        if change := changed_source(metadata_lib.read(path), cfg.data.source):
            raise UserError(
                f"data.source={cfg.data.source} changed after this run began: its data were made of {change}; to go on "
                f"with them give --data.path {path}, or choose another --workdir"
            )
        return
    tokenizer = _tokenizer(cfg, start)
    try:
        prepare(
            cfg.data.source,
            path,
            sequence_length=cfg.data.sequence_length,
            tokenizer=tokenizer,
            format="sft" if cfg.data.holds_examples else "text",
            pack=cfg.data.packing == "packed_examples",
            vocab_size=cfg.model.vocab_size if tokenizer == "sentencepiece" else None,
            bos=start is not None and not cfg.data.holds_examples and begins_with_bos(start.sidecar),
            progress=not path.exists(),  # there is nothing to say about a dataset that is only looked up again
        )
    except UserError as error:
        raise UserError(
            f"data.source={cfg.data.source}: {error}; for other settings make a dataset with `diffusionlm data "
            "prepare`, and give it as --data.path"
        ) from error


def _begun_with(cfg: Config, workdir: epath.Path) -> bool:
    """Return True if the run in `workdir` was last started with the same source, tokenizer path and start."""
    recorded = recorded_config(workdir) or Config()

    def origin(cfg: Config) -> tuple[str, str, str]:
        return cfg.data.source, cfg.data.tokenizer, cfg.run.init_from

    return origin(recorded) == origin(cfg)


def _tokenizer(cfg: Config, start: Start | None) -> str | tokenizers.Tokenizer:
    """Return the tokenizer to prepare `data.source` with: that of the start, if there is one.

    Raises:
      UserError: another is named, or the start carries none and none is named.
    """
    name = cfg.data.tokenizer
    if start is None:
        return name
    values = start.sidecar.tokenizer
    if name == "sentencepiece":
        if values is None:
            raise UserError(f"run.init_from={start.path} carries no tokenizer; give its file with --data.tokenizer")
        return tokenizers.from_dict(values)
    tokenizer = named_tokenizer(name)
    if values is not None and tokenizer.sha256 != values["sha256"]:
        raise UserError(
            f"run.init_from={start.path} has another tokenizer (sha256 {values['sha256'][:12]}) than data.tokenizer="
            f"{name} ({tokenizer.sha256[:12]}); leave --data.tokenizer out"
        )
    return tokenizer


@processes.on_all_processes
def _open_all(cfg: Config, workdir: epath.Path) -> Dataset | Mixture:
    """Open the data; raise `UserError` unless the run can use them. A mixture of one dataset is that dataset."""
    spec = config_mixture.parse(cfg.data.mixture or "data=1")
    if cfg.data.sources:
        data = Mixture(spec, [open_dataset(place(path, cfg.data.path)) for path in spec.paths])
        datasets = data.datasets
    else:
        data = open_dataset(directory(cfg, workdir))
        datasets = (data,)
    for dataset in datasets:
        _require_fit(cfg, dataset)
    if cfg.data.max_epochs:
        _require_few_epochs(cfg, spec, datasets)
    return data


def _require_few_epochs(cfg: Config, spec: config_mixture.MixtureSpec, datasets: tuple[Dataset, ...]) -> None:
    """Refuse a run that would go through a source more than `data.max_epochs` times."""
    steps, size = cfg.run.steps, cfg.data.batch_size
    shares = Shares(spec, size)
    rows_S = shares.counts(steps)
    limits_S = np.array([math.floor(cfg.data.max_epochs * dataset.size("train")) for dataset in datasets])
    if (rows_S <= limits_S).all():
        return
    epochs_S = rows_S / [dataset.size("train") for dataset in datasets]
    worst = int(np.argmax(epochs_S))
    fitting, weight = shares.most_batches(limits_S), limits_S[worst] / (steps * size)
    fixes = [f"--run.steps {fitting}"] if fitting else []
    if cfg.data.sources and len(spec.phases) == 1 and np.minimum(1, limits_S / (steps * size)).sum() >= 1:
        fixes.append(f"a weight of at most {math.floor(weight * config_mixture.UNITS) / config_mixture.UNITS:.6f}")
    raise UserError(
        f"run.steps={steps} would go through {datasets[worst].path} {epochs_S[worst]:.2f} times, and data.max_epochs="
        f"{cfg.data.max_epochs:g}; {' or '.join(fixes) or 'smaller batches'} would fit, or raise data.max_epochs"
    )


def _require_fit(cfg: Config, dataset: Dataset) -> None:
    """Raise `UserError` unless the records and the vocabulary of a dataset are those that the model expects."""
    metadata = dataset.metadata
    if metadata.packing != (cfg.data.packing if cfg.data.holds_examples else "chunk"):
        holds = {
            "chunk": "texts",
            "examples": "prompts with answers",
            "packed_examples": "several prompts with answers in each record",
        }[metadata.packing]
        fix = (
            "prepare instruction data, --format sft" + " --pack" * (cfg.data.packing == "packed_examples")
            if metadata.packing == "chunk"
            else f"set --data.packing {metadata.packing}"
        )
        raise UserError(
            f"dataset {dataset.path} holds {holds}, which does not suit data.packing={cfg.data.packing}; {fix}, or use "
            "another dataset"
        )
    compared = {
        "model.vocab_size": (metadata.vocab_size, cfg.model.vocab_size),
        "data.sequence_length": (metadata.sequence_length, cfg.data.sequence_length),
    }
    if (cfg.run.init_from or cfg.run.continue_from) and metadata.vocab_size < cfg.model.vocab_size:
        del compared["model.vocab_size"]  # released models have more rows than their tokenizers have pieces
    if differing := {name: values for name, values in compared.items() if values[0] != values[1]}:
        shown = " and ".join(f"{name} {there} (the experiment: {here})" for name, (there, here) in differing.items())
        fix = " ".join(f"--{name} {there}" for name, (there, _) in differing.items())
        raise UserError(f"dataset {dataset.path} was prepared for {shown}; set {fix}, or prepare the data again")
    for split in ("train", "validation"):
        dataset.size(split)  # raises where there is none
