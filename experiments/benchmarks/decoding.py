"""Quality against time on trained models: caches and parallel decoding, a masked diffusion model and its twin.

Prompts are the beginnings of held-out texts. The bits per byte of what is generated are those of the autoregressive
twin given the prompt, and of a 5-gram model; both reward dull text, so the share of distinct 4-grams stands beside
them, and what people wrote after the same prompts is measured in the same way.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from measure import console, environment, in_turns, spread
from rich.table import Table

from diffusionlm.errors import UserError
from diffusionlm.evaluation.baselines import fit_ngram, ngram_nats
from diffusionlm.likelihood import estimate
from diffusionlm.sampling.config import SamplingConfig
from diffusionlm.sampling.generate import generate
from diffusionlm.sampling.load import LoadedModel, load

Judge = Callable[[Sequence[Sequence[int]]], dict[str, float]]


@dataclass(frozen=True)
class Run:
    """One way to generate; `like` is the name of the run whose tokens it should give."""

    name: str
    sampling: SamplingConfig
    like: str | None = None
    model: str = "mdm"


def frontier(
    model: str = "docs/results/models/tinystories",
    twin: str = "docs/results/models/tinystories_arm",
    texts: str = "",
    judge_texts: str = "",
    batch: int = 8,
    prompts: int = 32,
    prompt_length: int = 32,
    length: int = 128,
    block_length: int = 32,
    temperature: float = 0.0,
    repetitions: int = 3,
    output: Path | None = None,
) -> int:
    """Measure caches and parallel decoding against the uncached loop: agreement, quality, passes and tokens/s.

    Args:
      model: the masked diffusion model.
      twin: the autoregressive model that judges.
      texts: a .jsonl file of held-out texts.
      judge_texts: a .jsonl file of training texts, for the 5-gram model.
      batch: prompts at a time.
      prompts: how many prompts.
      prompt_length: tokens of each.
      length: new tokens of each.
      block_length: new tokens of each block.
      temperature: of the draws; 0 is greedy.
      repetitions: measurements of each contender.
      output: a JSON file for all numbers; the picture goes beside it.
    """
    base = SamplingConfig(length=length, block_length=block_length, temperature=temperature, stop_at_eos=False)
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
    return _compare(runs, model, twin, texts, judge_texts, batch, prompts, prompt_length, length, repetitions, output)


def twins(
    model: str = "docs/results/models/tinystories",
    twin: str = "docs/results/models/tinystories_arm",
    texts: str = "",
    judge_texts: str = "",
    batch: int = 8,
    prompts: int = 32,
    prompt_length: int = 32,
    length: int = 128,
    repetitions: int = 3,
    output: Path | None = None,
) -> int:
    """Measure a masked diffusion model against its autoregressive twin with a key/value cache: quality and time.

    Args:
      model: the masked diffusion model.
      twin: the autoregressive model, which also judges.
      texts: a .jsonl file of held-out texts.
      judge_texts: a .jsonl file of training texts, for the 5-gram model.
      batch: prompts at a time.
      prompts: how many prompts.
      prompt_length: tokens of each.
      length: new tokens of each.
      repetitions: measurements of each contender.
      output: a JSON file for all numbers; the picture goes beside it.
    """
    base = SamplingConfig(length=length, stop_at_eos=False)
    runs = [
        Run("ARM", base, model="arm"),
        Run("ARM, no cache", replace(base, cache="none"), like="ARM", model="arm"),
        Run("ARM, temperature 0.7", replace(base, temperature=0.7), model="arm"),
    ]
    for steps in (length, length // 4, length // 16):
        runs.append(Run(f"ancestral, {steps} steps", replace(base, steps=steps)))
        blocks = replace(base, steps=steps, strategy="low_confidence", block_length=length // 4)
        runs.append(Run(f"low confidence, {steps} steps", blocks))
        runs.append(Run(f"low confidence, {steps} steps, dual", replace(blocks, cache="dual")))
    sharper = replace(base, steps=length, temperature=0.7, strategy="low_confidence", block_length=length // 4)
    runs.append(Run(f"low confidence, temperature 0.7, {length} steps, dual", replace(sharper, cache="dual")))
    guided = replace(base, steps=length // 4, guidance=0.5)
    runs.append(Run(f"ancestral, {length // 4} steps, guidance 0.5", guided))
    return _compare(runs, model, twin, texts, judge_texts, batch, prompts, prompt_length, length, repetitions, output)


def _compare(
    runs: Sequence[Run],
    model: str,
    twin: str,
    texts: str,
    judge_texts: str,
    batch: int,
    prompts: int,
    prompt_length: int,
    length: int,
    repetitions: int,
    output: Path | None,
) -> int:
    models = {"mdm": load(model, dtype="float32"), "arm": load(twin, dtype="float32")}
    if output and not output.parent.is_dir():
        raise UserError(f"output={str(output)!r}: there is no directory {str(output.parent)!r}; make it first")
    given, written = _prompts(models["arm"], texts, prompts, prompt_length, length)
    judge = _judge(models["arm"], given, judge_texts)
    batches = [given[i : i + batch] for i in range(0, len(given), batch)]
    tokens: dict[str, np.ndarray] = {}
    passes: dict[str, float] = {}

    def contender(run: Run) -> Callable[[], float]:
        def once() -> float:
            loaded = models[run.model]
            parts = []
            for i, some in enumerate(batches):
                ids = range(i * batch, i * batch + len(some))
                parts.append(generate(loaded.params, loaded.config, some, run.sampling, row_ids=ids))
            tokens[run.name] = np.concatenate([part.tokens for part in parts])
            passes[run.name] = float(np.concatenate([part.nfe for part in parts]).mean())
            return sum(part.seconds for part in parts)

        return once

    seconds = in_turns({run.name: contender(run) for run in runs}, repetitions)
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
    console().print(_table(rows, batch))
    if output:
        found = {"environment": environment(), "model": model, "twin": twin, "batch": batch, "prompts": prompts}
        found |= {"prompt_length": prompt_length, "length": length, "rows": rows}
        output.write_text(json.dumps(found, indent=1) + "\n")
        _plot(rows, output.with_suffix(".png"))
    return 0


def _prompts(
    model: LoadedModel, texts: str, count: int, prompt_length: int, length: int
) -> tuple[list[list[int]], list[list[int]]]:
    """The beginnings of the first texts that are long enough, and what follows them."""
    found = [ids for ids in map(model.encode, _read(texts, "texts")) if len(ids) >= prompt_length + length][:count]
    if len(found) < count:
        raise UserError(
            f"texts={texts!r} has only {len(found)} texts of {prompt_length + length} tokens; ask for fewer"
        )
    return [ids[:prompt_length] for ids in found], [ids[prompt_length : prompt_length + length] for ids in found]


def _judge(model: LoadedModel, given: Sequence[Sequence[int]], judge_texts: str) -> Judge:
    """Bits per byte under the twin and under a 5-gram model, and the share of distinct 4-grams of each text."""
    train = [model.encode(text) for text in _read(judge_texts, "judge_texts")]
    width = model.config.max_length
    ids = np.concatenate([np.asarray(one, np.int64) for one in train])
    ngrams = fit_ngram(ids[: len(ids) // width * width].reshape(-1, width), model.config.model.vocab_size, 5)
    decode = model.tokenizer.decode

    def judge(tokens: Sequence[Sequence[int]]) -> dict[str, float]:
        pairs = list(zip(given, tokens, strict=True))
        n_bytes = sum(len(decode([*a, *b]).encode()) - len(decode(list(a)).encode()) for a, b in pairs)
        twin = -sum(one.log_likelihood for one in estimate(model.params, model.config, pairs))
        whole = np.array([[*a, *b] for a, b in pairs])
        grams = float(ngram_nats(ngrams, whole)[-1][:, len(given[0]) :].sum())
        distinct = [len(set(zip(*(b[i:] for i in range(4)), strict=False))) / (len(b) - 3) for b in tokens]
        return {
            "twin_bits_per_byte": twin / n_bytes / np.log(2),
            "ngram_bits_per_byte": grams / n_bytes / np.log(2),
            "distinct_4grams": float(np.mean(distinct)),
        }

    return judge


def _read(path: str, option: str) -> list[str]:
    if not path or not Path(path).is_file():
        raise UserError(f"{option}={path!r} is no file; name a .jsonl file with one {{'text': ...}} a line")
    with open(path) as lines:
        return [json.loads(line)["text"] for line in lines]


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


def _plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Quality against passes and against tokens/s, a colour for each cache."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained", sharey=True)
    measured = [row for row in rows if "seconds" in row]
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in measured:
        refresh = f", refresh {row['settings']['refresh']}" if row["settings"]["refresh"] else ""
        kind = "autoregressive" if row["name"].startswith("ARM") else "masked diffusion"
        groups.setdefault(f"{kind}, cache {row['settings']['cache'] or 'by default'}{refresh}", []).append(row)
    for panel, (key, label) in zip(axes, (("passes", "forward passes"), ("speed", "tokens/s")), strict=True):
        for group, members in groups.items():
            x = [row["passes"] if key == "passes" else float(np.median(row["tokens_per_second"])) for row in members]
            panel.scatter(x, [row["ngram_bits_per_byte"] for row in members], label=group)
            if key == "speed":
                for at, row in zip(x, members, strict=True):
                    panel.annotate(row["name"].split(", cache")[0], (at, row["ngram_bits_per_byte"]), fontsize=5)
        panel.axhline(rows[0]["ngram_bits_per_byte"], color="grey", linestyle=":", label="what people wrote")
        panel.set(xscale="log", xlabel=label)
        panel.grid(alpha=0.3)
    axes[0].set_ylabel("bits per byte of the text, 5-gram model")
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=130)
