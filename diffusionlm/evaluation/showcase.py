"""What a finished run is worth: its held-out bound beside honest baselines, and a sample being denoised."""

import json

import numpy as np
from rich.console import Console

from diffusionlm.data.pipeline import open_dataset
from diffusionlm.evaluation import baselines
from diffusionlm.evaluation import comparisons as report
from diffusionlm.pretrained import terminal as display
from diffusionlm.pretrained.model import load
from diffusionlm.storage import write_atomically
from diffusionlm.training import dataset as datasets
from diffusionlm.training.loop import Run, evaluation_rows


def show(run: Run, console: Console | None = None) -> None:
    """Prints the baselines and a sample of a finished run; the baselines are kept in WORKDIR/baselines.json."""
    console = console or Console()
    console.print(
        report.comparison(
            f"{run.config.name} ({run.config.objective.upper()})",
            run.config.objective,
            run.result["eval"]["nelbo_nats_per_token"],
            run.result["eval"]["nelbo_stderr"],
            run.result["eval"]["bits_per_byte"],
            _baselines(run, console),
        )
    )
    model = load(run.workdir)
    length = min(model.config.max_length, 128) - 1
    completion = model.generate(length=length, steps=length, trace=True)[0]
    console.print(f"\nA sample: {completion.nfe} denoising steps in {completion.seconds:.1f} s", highlight=False)
    display.show(completion.trace, model.tokenizer, console=console)


def _baselines(run: Run, console: Console) -> dict[str, dict[str, float]]:
    path = run.workdir / "baselines.json"
    if path.exists():
        return json.loads(path.read_text())
    dataset = open_dataset(datasets.directory(run.config, run.workdir))
    T = run.config.data.sequence_length
    heldout = np.concatenate(
        [np.where(r["segment_ids"] > 0, r["tokens"], -1) for r in evaluation_rows(run.config, dataset)]
    )
    train = dataset.rows("train", np.arange(dataset.size("train")))["tokens"][:, :T]
    with console.status("fitting n-gram models and compressors to the training part"):
        scores = baselines.fit_and_score(
            train, heldout[:, :T], dataset.tokenizer.token_bytes(), dataset.tokenizer.decode
        )
    write_atomically(path, json.dumps(scores, indent=2) + "\n")
    return scores
