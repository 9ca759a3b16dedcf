"""The end of a training run in the terminal: its bound beside baselines, and a sample being denoised."""

import json
import math

import msgspec
import numpy as np

from diffusionlm import schema
from diffusionlm.console import Console
from diffusionlm.data.pipeline import open_dataset
from diffusionlm.evaluation.baselines import fit_and_score
from diffusionlm.evaluation.comparisons import comparison
from diffusionlm.pretrained import terminal
from diffusionlm.pretrained.model import load
from diffusionlm.storage import write_atomically
from diffusionlm.training import dataset as run_dataset
from diffusionlm.training.batches import held_out_rows
from diffusionlm.training.loop import Run


class Scores(schema.Record, frozen=True):
    """The numbers of one baseline in baselines.json."""

    nats_per_token: schema.NonNegative
    bits_per_byte: schema.NonNegative


def show(run: Run, console: Console | None = None) -> None:
    """Print the baselines and a sample of a finished run; the baselines are kept in WORKDIR/baselines.json."""
    console = console or Console()
    assert run.result is not None  # the run is finished
    bound = run.result["eval"]
    console.print(
        comparison(
            f"{run.config.name} ({run.config.objective.upper()})",
            run.config.objective,
            bound["nelbo_nats_per_token"],
            bound["nelbo_stderr"],
            bound["bits_per_byte"],
            _baselines(run, console),
        )
    )
    if not math.isfinite(bound["nelbo_nats_per_token"]):
        return  # sampling refuses a model whose logits are NaN
    model = load(run.workdir)
    length = min(model.config.max_length, 128) - 1
    completion = model.generate(length=length, steps=length, trace=True)[0]
    console.print(f"\nA sample: {completion.nfe} denoising steps in {completion.seconds:.1f} s", highlight=False)
    assert completion.trace is not None  # as asked for
    terminal.show(completion.trace, model.reader, console=console)


def _baselines(run: Run, console: Console) -> dict[str, dict[str, float]]:
    path = run.workdir / "baselines.json"
    if path.exists():
        return msgspec.to_builtins(schema.read_json(path, dict[str, Scores]))
    dataset = open_dataset(run_dataset.directory(run.config, run.workdir))
    T = run.config.data.sequence_length
    heldout = np.concatenate(
        [np.where(r["segment_ids"] > 0, r["tokens"], -1) for r in held_out_rows(run.config, dataset)]
    )
    train = dataset.rows("train", np.arange(dataset.size("train")))["tokens"][:, :T]
    with console.status("fitting n-gram models and compressors to the training part"):
        scores = fit_and_score(train, heldout[:, :T], dataset.tokenizer.token_bytes(), dataset.tokenizer.decode)
    write_atomically(path, json.dumps(scores, indent=2) + "\n")
    return scores
