"""Quality against time on trained models: caches and parallel decoding, a masked diffusion model and its twin.

Prompts are the beginnings of held-out texts. The bits per byte of what is generated are those of the autoregressive
twin given the prompt, and of a 5-gram model; both reward dull text, so the share of distinct 4-grams stands beside
them, and what people wrote after the same prompts is measured in the same way.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
from decoding_plot import plot
from measure import console, environment, in_turns, read_texts, spread
from rich.table import Table

from diffusionlm.errors import UserError
from diffusionlm.evaluation.baselines import fit_ngram, ngram_nats
from diffusionlm.likelihood.monte_carlo import estimate
from diffusionlm.options import SETTINGS
from diffusionlm.pretrained.loading import load
from diffusionlm.pretrained.model import LoadedModel
from diffusionlm.sampling.config import SamplingConfig
from diffusionlm.sampling.generate import generate

Judge = Callable[[Sequence[Sequence[int]]], dict[str, float]]


@dataclass(frozen=True)
class Run:
    """One way to generate; `like` names the run whose tokens it should give."""

    name: str
    sampling: SamplingConfig
    like: str | None = None
    model: str = "mdm"


@dataclass(frozen=True)
class Setup:
    """The models and the texts of a comparison."""

    model: str = "docs/results/models/tinystories"  # the masked diffusion model
    twin: str = "docs/results/models/tinystories_arm"  # the autoregressive model, which judges
    texts: str = ""  # a .jsonl file of held-out texts
    judge_texts: str = ""  # a .jsonl file of training texts, for the 5-gram model
    batch: int = 8  # prompts at a time
    prompts: int = 32  # how many prompts
    prompt_length: int = 32  # tokens of each
    length: int = 128  # new tokens of each
    block_length: int = 32  # new tokens of each block
    repetitions: int = 3  # measurements of each contender
    output: Path | None = None  # a JSON file for all numbers; the picture goes beside it


def frontier(setup: Annotated[Setup, *SETTINGS] = Setup(), temperature: float = 0.0) -> int:
    """Measure caches and parallel decoding against the uncached loop: agreement, quality, passes and tokens/s.

    Args:
      setup: the models and the texts.
      temperature: the temperature of the draws; 0 is greedy.
    """
    length = setup.length
    base = SamplingConfig(length, block_length=setup.block_length, temperature=temperature, stop_at_eos=False)
    runs = []
    rules: list[tuple[str, dict[str, Any]]] = [
        (f"{length // k} steps", {"strategy": "low_confidence", "steps": length // k}) for k in (1, 2, 4)
    ]
    rules += [(f"threshold {t}", {"strategy": "confidence_threshold", "threshold": t}) for t in (0.5, 0.3, 0.15)]
    for name, rule in rules:
        plain = replace(base, **rule)
        runs.append(Run(f"{name}, no cache", plain))
        for cache, refresh in (("prefix", 0), ("dual", 0), ("dual", 4)):
            label = f"{name}, {cache}" + (f", refresh {refresh}" if refresh else "")
            runs.append(Run(label, replace(plain, cache=cache, refresh=refresh), like=f"{name}, no cache"))
    return _compare(runs, setup, "twin_bits_per_byte")


def twins(setup: Annotated[Setup, *SETTINGS] = Setup()) -> int:
    """Measure a masked diffusion model against its autoregressive twin with a key/value cache: quality and time.

    Args:
      setup: the models and the texts.
    """
    length = setup.length
    base = SamplingConfig(length, stop_at_eos=False)
    runs = [
        Run("ARM", base, model="arm"),
        Run("ARM, no cache", replace(base, cache="none"), like="ARM", model="arm"),
        Run("ARM, temperature 0.7", replace(base, temperature=0.7), model="arm"),
    ]
    for steps in (length, length // 4, length // 16):
        runs.append(Run(f"ancestral, {steps} steps", replace(base, steps=steps)))
        blocks = replace(base, steps=steps, strategy="low_confidence", block_length=setup.block_length)
        runs.append(Run(f"low confidence, {steps} steps", blocks))
        runs.append(Run(f"low confidence, {steps} steps, dual", replace(blocks, cache="dual")))
    ordered = replace(base, steps=length, strategy="low_confidence", block_length=1)
    runs.append(Run(f"left to right, {length} steps", ordered))
    sharper = replace(base, temperature=0.7, strategy="low_confidence", block_length=setup.block_length, cache="dual")
    runs.append(Run(f"low confidence, temperature 0.7, {length} steps, dual", sharper))
    guided = replace(base, steps=length // 4, guidance=0.5)
    runs.append(Run(f"ancestral, {length // 4} steps, guidance 0.5", guided))
    return _compare(runs, setup, "ngram_bits_per_byte")  # its own twin would favour the autoregressive model


def _compare(runs: Sequence[Run], setup: Setup, judge_of_picture: str) -> int:
    models = {"mdm": load(setup.model, dtype="float32"), "arm": load(setup.twin, dtype="float32")}
    if setup.output and not setup.output.parent.is_dir():
        raise UserError(
            f"output={str(setup.output)!r}: there is no directory {str(setup.output.parent)!r}; make it first"
        )
    prompts, written = _prompts(models["arm"], setup)
    judge = _judge(models["arm"], prompts, setup.judge_texts)
    batches = [prompts[i : i + setup.batch] for i in range(0, len(prompts), setup.batch)]
    tokens: dict[str, np.ndarray] = {}
    passes: dict[str, float] = {}

    def contender(run: Run) -> Callable[[], float]:
        def once() -> float:
            loaded = models[run.model]
            parts = []
            for i, some in enumerate(batches):
                ids = range(i * setup.batch, i * setup.batch + len(some))
                parts.append(generate(loaded.params, loaded.config, some, run.sampling, row_ids=ids))
            tokens[run.name] = np.concatenate([part.tokens for part in parts])
            passes[run.name] = float(np.concatenate([part.nfe for part in parts]).mean())
            return sum(part.seconds for part in parts)

        return once

    seconds = in_turns({run.name: contender(run) for run in runs}, setup.repetitions)
    rows = [{"name": "what people wrote", **judge(written)}]
    for run in runs:
        row = {
            "name": run.name,
            "passes": passes[run.name],
            "seconds": seconds[run.name],
            "tokens_per_second": [tokens[run.name].size / s for s in seconds[run.name]],
            **judge(tokens[run.name].tolist()),
            "settings": asdict(run.sampling),
        }
        if run.like:
            row["agreement"] = float((tokens[run.name] == tokens[run.like]).mean())
            row["times"] = [a / b for a, b in zip(seconds[run.like], seconds[run.name], strict=True)]
            row["like"] = run.like
        rows.append(row)
    console().print(_table(rows, setup.batch))
    if setup.output:
        names = {"output": None, "texts": Path(setup.texts).name, "judge_texts": Path(setup.judge_texts).name}
        report = {"environment": environment(), "setup": asdict(setup) | names, "rows": rows}
        setup.output.write_text(json.dumps(report, indent=1) + "\n")
        plot(rows, judge_of_picture, setup.output.with_suffix(".png"))
    return 0


def _prompts(model: LoadedModel, setup: Setup) -> tuple[list[list[int]], list[list[int]]]:
    """Return the beginnings of the first texts that are long enough, and what follows them."""
    first, least = setup.prompt_length, setup.prompt_length + setup.length
    texts = [ids for ids in map(model.encode, read_texts(setup.texts, "texts")) if len(ids) >= least][: setup.prompts]
    if len(texts) < setup.prompts:
        raise UserError(f"texts={setup.texts!r} has only {len(texts)} texts of {least} tokens; ask for fewer prompts")
    return [ids[:first] for ids in texts], [ids[first:least] for ids in texts]


def _judge(model: LoadedModel, prompts: Sequence[Sequence[int]], judge_texts: str) -> Judge:
    """Return a judge: bits per byte under the twin and under a 5-gram model, and the share of distinct 4-grams."""
    train = [model.encode(text) for text in read_texts(judge_texts, "judge_texts")]
    width = model.config.max_length
    ids = np.concatenate([np.asarray(text, np.int64) for text in train])
    ngrams = fit_ngram(ids[: len(ids) // width * width].reshape(-1, width), model.config.model.vocab_size, 5)
    decode = model.tokenizer.decode

    def judge(tokens: Sequence[Sequence[int]]) -> dict[str, float]:
        pairs = list(zip(prompts, tokens, strict=True))
        n_bytes = sum(len(decode([*a, *b]).encode()) - len(decode(list(a)).encode()) for a, b in pairs)
        twin = -sum(score.log_likelihood for score in estimate(model.params, model.config, pairs))
        whole = np.array([[*a, *b] for a, b in pairs])
        grams = float(ngram_nats(ngrams, whole)[-1][:, len(prompts[0]) :].sum())
        distinct = [len(set(zip(*(b[i:] for i in range(4)), strict=False))) / (len(b) - 3) for b in tokens]
        return {
            "twin_bits_per_byte": twin / n_bytes / np.log(2),
            "ngram_bits_per_byte": grams / n_bytes / np.log(2),
            "distinct_4grams": float(np.mean(distinct)),
        }

    return judge


def _table(rows: Sequence[dict[str, Any]], batch: int) -> Table:
    table = Table(title=f"batches of {batch} on {jax.devices()[0].device_kind}")
    for name in ("way", "passes", "tokens/s", "times", "agreement", "bits/byte, twin", "5-gram", "distinct 4-grams"):
        table.add_column(name, justify="left" if name == "way" else "right")
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['passes']:.1f}" if "passes" in row else "",
            spread(row["tokens_per_second"], "{:.0f}") if "seconds" in row else "",
            spread(row["times"], "{:.2f}") if "times" in row else "",
            f"{row['agreement']:.3f}" if "agreement" in row else "",
            f"{row['twin_bits_per_byte']:.3f}",
            f"{row['ngram_bits_per_byte']:.3f}",
            f"{row['distinct_4grams']:.3f}",
        )
    table.caption = "times: as fast as the run without a cache; medians (least to most)"
    return table
