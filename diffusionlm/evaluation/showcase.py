"""The end of a training run in the terminal: its bound beside baselines, a sample being denoised, and an infilling."""

import json
import math
from collections.abc import Iterable

import msgspec
import numpy as np
from rich.text import Text

from diffusionlm import notebook, schema
from diffusionlm.console import KEPT, Console
from diffusionlm.data.pipeline import Dataset, open_dataset
from diffusionlm.data.tokenizers.base import Tokenizer
from diffusionlm.evaluation.baselines import fit_and_score
from diffusionlm.evaluation.comparisons import comparison
from diffusionlm.pretrained import terminal
from diffusionlm.pretrained.loading import load
from diffusionlm.pretrained.model import LoadedModel
from diffusionlm.storage import write_atomically
from diffusionlm.training import dataset as run_dataset
from diffusionlm.training import metrics, outcome, parts
from diffusionlm.training.batches import held_out_rows
from diffusionlm.training.loop import Run
from diffusionlm.untrusted import printable

GAP, GIVEN = 12, 40  # tokens of the infilling: generated, and given on each side
TEMPERATURE = 0.5  # small models seldom spell words at 1


class Scores(schema.Record, frozen=True):
    """The numbers of one baseline in baselines.json."""

    nats_per_token: schema.NonNegative
    bits_per_byte: schema.NonNegative


def show(run: Run, console: Console | None = None) -> None:
    """Print what a finished run can do: its bound among baselines, which are kept in a file, a sample, an infilling."""
    console = console or Console()
    assert run.result is not None  # the run is finished
    bound, objective = run.result["eval"], "arm" if parts.is_autoregressive(run.config) else "mdm"
    dataset = open_dataset(run_dataset.directory(run.config, run.workdir))
    console.print(
        comparison(
            f"{run.config.name} ({objective.upper()})",
            objective,
            bound["nelbo_nats_per_token"],
            bound["nelbo_stderr"],
            bound["bits_per_byte"],
            _first_part(run) | _baselines(run, dataset, console),
        )
    )
    if not math.isfinite(bound["nelbo_nats_per_token"]):
        return  # sampling refuses a model whose logits are NaN
    model = load(run.workdir)
    length = min(model.config.max_length, 128) - 1
    completion = model.generate(length=length, temperature=TEMPERATURE, trace=True)[0]
    took = f"{completion.nfe} denoising steps in {completion.seconds:.1f} s"
    console.print(f"\nA sample at temperature {TEMPERATURE}: {took}", highlight=False)
    assert completion.trace is not None  # as asked for
    if console.is_jupyter:
        notebook.show(completion)
    else:
        terminal.show(completion.trace, model.reader, ends=model.config.eos_ids, console=console)
    if not model.config.autoregressive:
        _show_infilling(model, held_out_rows(run.config, dataset), console)


def _first_part(run: Run) -> dict[str, dict[str, float]]:
    """Return the row of the table for the autoregressive part of the run, if it had one."""
    if parts.is_autoregressive(run.config):
        return {}
    part = outcome.autoregressive_part(metrics.read(run.workdir))
    if part is None:
        return {}
    name = f"{run.config.name} (ARM) at step {part['step']}"
    return {name: {"nats_per_token": part["nats_per_token"], "bits_per_byte": part["bits_per_byte"]}}


def _show_infilling(model: LoadedModel, batches: Iterable[dict[str, np.ndarray]], console: Console) -> None:
    """Print the first held-out text whose middle can be taken out, with what the model puts there."""
    rows = (row for batch in batches for row in zip(batch["tokens"], batch["segment_ids"], strict=True))
    for tokens_T, segment_ids_T in rows:
        before, middle, after = _thirds(model.require_tokenizer(), tokens_T[segment_ids_T == segment_ids_T[0]])
        text = f"{before}{{mask:{GAP}}}{after}"
        fits = len(model.encode(before + middle + after)) <= model.config.max_length
        if fits and middle.strip() and "{mask" not in before + after:
            break
    else:
        return
    completion = model.infill(text, strategy="low_confidence", temperature=0.0)[0]
    filled = completion.text[len(before) : len(completion.text) - len(after)]
    console.print(f"\nAn infilling: {GAP} tokens of a held-out text, in {completion.nfe} steps", highlight=False)
    text = Text(printable(before, KEPT))
    text.append(printable(filled, KEPT), style="black on green")
    text.append(printable(after, KEPT))
    console.print(text, soft_wrap=True)
    console.print(Text(f"the text itself had: {printable(middle, KEPT)!r}"), soft_wrap=True)


def _thirds(tokenizer: Tokenizer, tokens_T: np.ndarray) -> tuple[str, str, str]:
    """Return the text before, in and after a gap of `GAP` tokens; empty texts where the row is too short."""
    ids = tokens_T[: 2 * GIVEN + GAP].tolist()
    if len(ids) < 2 * GIVEN + GAP:
        return "", "", ""
    gap, rest = ids[GIVEN : GIVEN + GAP], ids[GIVEN + GAP :]
    return tokenizer.decode(ids[:GIVEN]), tokenizer.decode(gap, inside=True), tokenizer.decode(rest, inside=True)


def _baselines(run: Run, dataset: Dataset, console: Console) -> dict[str, dict[str, float]]:
    path = run.workdir / "baselines.json"
    if path.exists():
        return msgspec.to_builtins(schema.read_json(path, dict[str, Scores]))
    T = run.config.data.sequence_length
    heldout = np.concatenate(
        [np.where(r["segment_ids"] > 0, r["tokens"], -1) for r in held_out_rows(run.config, dataset)]
    )
    train = dataset.rows("train", np.arange(dataset.size("train")))["tokens"][:, :T]
    with console.busy("fitting n-gram models and compressors to the training part"):
        scores = fit_and_score(train, heldout[:, :T], dataset.tokenizer.token_bytes(), dataset.tokenizer.decode)
    write_atomically(path, json.dumps(scores, indent=2) + "\n")
    return scores
