"""Measure likelihoods: speed, skewness of passes, coverage of intervals, standard errors, and the cost of decisions.

    python experiments/benchmarks/likelihood.py --model docs/results/models/tinystories --texts valid.jsonl \
        --questions 60 --output likelihood.json

A question is the beginning of a text; its answers are the sentence that follows, and those that follow elsewhere.
"""

import argparse
import dataclasses
import json
import re
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from measure import console, read_texts
from rich.console import Console
from rich.table import Table
from scipy import stats

from diffusionlm.allocator import keep_freed_memory
from diffusionlm.errors import UserError
from diffusionlm.likelihood.choose import choose
from diffusionlm.likelihood.config import LikelihoodConfig
from diffusionlm.likelihood.estimators import ESTIMATORS, Plan, PlanRequest
from diffusionlm.likelihood.monte_carlo import estimate
from diffusionlm.likelihood.pairs import LENGTH_MULTIPLE
from diffusionlm.model.spec import suppression_mask
from diffusionlm.model.transformer import Transformer
from diffusionlm.pretrained.loading import load
from diffusionlm.pretrained.model import LoadedModel
from diffusionlm.sampling.denoiser import predictor_positions

PASSES, DRAWS = 8, 16  # 128 forward passes, as LLaDA's evaluation takes for each answer
FIXED = LikelihoodConfig(draws=DRAWS, passes=PASSES)


@dataclasses.dataclass(frozen=True)
class Question:
    """The beginning of a text, and answers of which one follows it."""

    prefix: list[int]
    answers: list[list[int]]
    true: int


def questions(model: LoadedModel, texts: Sequence[str], count: int, rng: np.random.Generator) -> list[Question]:
    """Make questions with 2, 3 or 4 answers of 4 to 32 tokens, each after the first three sentences of a text."""
    beginnings = []
    for text in texts:
        sentences = re.split(r"(?<=[.!?])\s+", text)
        if len(sentences) > 4:
            beginnings.append((" ".join(sentences[:3]), sentences[3]))
    chosen = []
    for i in range(len(beginnings)):
        if len(chosen) == count:
            break
        others = [beginnings[(i + 1 + j) % len(beginnings)][1] for j in range(1 + len(chosen) % 3)]
        true = int(rng.integers(len(others) + 1))
        answers = [*others[:true], beginnings[i][1], *others[true:]]
        prefix = model.encode(beginnings[i][0])
        whole = [model.encode(f"{beginnings[i][0]} {answer}") for answer in answers]
        fits = all(ids[: len(prefix)] == prefix and 4 <= len(ids) - len(prefix) <= 32 for ids in whole)
        if fits and max(map(len, whole)) <= model.config.max_length:
            chosen.append(Question(prefix, [ids[len(prefix) :] for ids in whole], true))
    if len(chosen) == count:
        return chosen
    raise SystemExit(f"the texts give only {len(chosen)} questions; ask for fewer with --questions")


def fixed_decisions(model: LoadedModel, asked: Sequence[Question], settings: LikelihoodConfig) -> list[int]:
    """Choose the answer with the highest estimate, every answer having as many forward passes."""
    pairs = [(question.prefix, answer) for question in asked for answer in question.answers]
    estimates = iter(estimate(model.params, model.config, pairs, settings))
    return [int(np.argmax([next(estimates).log_likelihood for _ in question.answers])) for question in asked]


def decisions(model: LoadedModel, asked: Sequence[Question], reference_passes: int) -> list[dict[str, Any]]:
    """Compare `choose` with fixed numbers of draws: forward passes a decision, and how often it is the reference's.

    "draws" is of one pass, and "most" of an answer; "true" is how often the sentence that follows is chosen.
    """
    settings = dataclasses.replace(FIXED, passes=reference_passes, seed=1000)
    reference = fixed_decisions(model, asked, settings)

    def row(name: str, draws: int, most: int, best: list[int], nfe: float, decided: Sequence[bool] = ()) -> dict:
        agrees = np.array(best) == np.array(reference)
        values = {
            "method": name,
            "draws": draws,
            "most": most,
            "passes": nfe,
            "agrees": float(agrees.mean()),
            "true": float(np.mean([b == question.true for b, question in zip(best, asked, strict=True)])),
        }
        if decided:
            values["decided"] = float(np.mean(decided))
            values["decided, disagrees"] = float((np.array(decided) & ~agrees).mean())
        return values

    answers = float(np.mean([len(question.answers) for question in asked]))
    most = DRAWS * reference_passes
    rows = [row("reference", DRAWS, most, reference, most * answers)]
    rows.append(row("fixed", DRAWS, DRAWS * PASSES, fixed_decisions(model, asked, FIXED), DRAWS * PASSES * answers))
    for draws, most in ((16, 1024), (8, 128), (8, 1024), (4, 128), (4, 1024), (2, 128), (2, 1024)):
        settings = LikelihoodConfig(draws=draws, max_passes=most // draws)
        choices = [
            choose(model.params, model.config, question.prefix, question.answers, settings) for question in asked
        ]
        nfe = float(np.mean([sum(e.nfe for e in choice.estimates) for choice in choices]))
        rows.append(row("choose", draws, most, [c.best for c in choices], nfe, [c.decided for c in choices]))
    return rows


def standard_errors(model: LoadedModel, asked: Sequence[Question]) -> list[dict[str, Any]]:
    """Measure standard errors at 128 forward passes, by estimator and by how many draws of them share an offset."""
    pairs = [(question.prefix, question.answers[question.true]) for question in asked]
    rows = []
    for name in ("exact_count", "iid"):
        for draws in (16, 4, 1):
            settings = LikelihoodConfig(estimator=name, draws=draws, passes=DRAWS * PASSES // draws)
            estimates = estimate(model.params, model.config, pairs, settings)
            variance = float(np.mean([e.stderr**2 for e in estimates]))
            rows.append({"estimator": name, "draws of a pass": draws, "standard error, nats": variance**0.5})
    for row in rows:
        row["passes for equal error"] = (
            DRAWS * PASSES * (row["standard error, nats"] ** 2 / rows[0]["standard error, nats"] ** 2)
        )
    return rows


def cost_table(model: LoadedModel, prefix: list[int], target: list[int]) -> np.ndarray:
    """Compute the cross-entropy of every token under every set of masks, (2**n, n) in nats."""
    cfg, n = model.config, len(target)
    T = -(-(len(prefix) + n) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    row_T = np.zeros(T, np.int32)
    row_T[: len(prefix) + n] = prefix + target
    segment_ids_T = (np.arange(T) < len(prefix) + n).astype(np.int32)
    place_n = len(prefix) + np.arange(n)
    at_n = np.asarray(predictor_positions(place_n, cfg.shifted))
    suppressed_V = jnp.asarray(suppression_mask(cfg.model, cfg.suppressed_ids))

    @jax.jit
    def nll(params: Any, tokens_RxT: jax.Array) -> jax.Array:
        segments_RxT = jnp.broadcast_to(segment_ids_T[None], tokens_RxT.shape)
        hidden_RxTxD = Transformer(cfg.model).apply({"params": params}, tokens_RxT, segments_RxT)
        logits = Transformer(cfg.model).apply({"params": params}, hidden_RxTxD[:, at_n], method=Transformer.head)
        log_p_RxnxV = jax.nn.log_softmax(jnp.where(suppressed_V[None, None], -jnp.inf, logits))
        return -jnp.take_along_axis(log_p_RxnxV, jnp.asarray(target)[None, :, None], axis=-1)[..., 0]

    size, parts = min(256, 2**n), []
    for first in range(0, 2**n, size):
        masked = (first + np.arange(size))[:, None] >> np.arange(n)[None] & 1
        tokens_RxT = np.repeat(row_T[None], size, 0)
        tokens_RxT[:, place_n] = np.where(masked, cfg.mask_id, tokens_RxT[:, place_n])
        parts.append(np.asarray(nll(model.params, tokens_RxT), np.float64))
    return np.concatenate(parts)


@partial(jax.jit, static_argnames=("name", "n", "draws"))
def _plans(keys: jax.Array, *, name: str, n: int, draws: int) -> Plan:
    return jax.vmap(lambda key: ESTIMATORS[name].plan(PlanRequest(jnp.int32(n), n, draws, jnp.int32(0), key)))(keys)


def _passes(table: np.ndarray, keys: jax.Array, name: str, draws: int) -> np.ndarray:
    """Return the nats of a pass for each key, from a table of cross-entropies."""
    n = table.shape[1]
    plan = _plans(keys, name=name, n=n, draws=draws)
    which = np.asarray(plan.masked_DxK) @ (1 << np.arange(n))
    return (table[which] * np.asarray(plan.weight_DxK)).sum((1, 2))


def skewness(model: LoadedModel, asked: Sequence[Question], n: int = 8) -> list[dict[str, Any]]:
    """Measure the skewness of 10,000 passes of each answer's first n tokens, by the number of draws of a pass."""
    answers = [(q.prefix, answer[:n]) for q in asked for answer in q.answers if len(answer) >= n][:24]
    tables = [cost_table(model, prefix[-40:], answer) for prefix, answer in answers]
    rows = []
    for draws in (1, 2, 4, 8, 16):
        keys = jax.random.split(jax.random.key(draws), 10_000)
        values = [float(stats.skew(_passes(table, keys, "exact_count", draws))) for table in tables]
        rows.append({"draws of a pass": draws, "answers": len(answers), "least": min(values), "most": max(values)})
    return rows


def speed(model: LoadedModel, asked: Sequence[Question]) -> list[dict[str, Any]]:
    """Measure pairs a second, compilation left out: the best of three runs."""
    pairs = [(question.prefix, answer) for question in asked for answer in question.answers]
    rows = []
    for settings in (FIXED, LikelihoodConfig(draws=1, rows=8)):
        estimate(model.params, model.config, pairs, settings)
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            estimate(model.params, model.config, pairs, settings)
            seconds.append(time.perf_counter() - start)
        rows.append({"draws": settings.draws, "rows": settings.rows, "pairs/s": len(pairs) / min(seconds)})
    return rows


def coverage(model: LoadedModel, asked: Sequence[Question], lengths: Sequence[int]) -> list[dict[str, Any]]:
    """Count how many of 1,000 intervals of 95% hold the bound, which a sum over all sets of masks gives exactly."""
    rows = []
    for n in lengths:
        some = [question for question in asked if len(question.answers[question.true]) >= n]
        some = some[: 20 if n <= 8 else 1]
        held: dict[str, list[np.ndarray]] = {"exact_count": [], "iid": []}
        for i, question in enumerate(some):
            table = cost_table(model, question.prefix[-40:], question.answers[question.true][:n])
            masked = (np.arange(2**n)[:, None] >> np.arange(n)[None] & 1).astype(bool)
            count = np.maximum(masked.sum(-1), 1)
            order = np.array([1 / (c * stats.binom.pmf(c, n, 0.5) * 2**n) for c in range(1, n + 1)])
            bound = ((table * masked).sum(-1) * order[count - 1]).sum()
            repeats = 1000 // len(some)
            for name, values in held.items():
                nats = []
                for key in jax.random.split(jax.random.fold_in(jax.random.key(n), i), PASSES):
                    nats.append(_passes(table, jax.random.split(key, repeats), name, DRAWS))
                nats = np.stack(nats, axis=1)
                reach = stats.t.ppf(0.975, PASSES - 1) * nats.std(axis=1, ddof=1) / PASSES**0.5
                values.append(np.abs(nats.mean(axis=1) - bound) <= reach + 1e-6 * bound)  # one token: both are 0
        for name, values in held.items():
            rows.append({"target tokens": n, "estimator": name, "texts": len(some), "coverage": np.mean(values)})
    return rows


def show(terminal: Console, title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Print rows as a table."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    names = list(dict.fromkeys(name for row in rows for name in row))
    for name in names:
        table.add_column(name, justify="left" if isinstance(rows[0].get(name, 0.0), str) else "right", overflow="fold")
    for row in rows:
        cells = (row.get(name, "") for name in names)
        table.add_row(*(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in cells))
    terminal.print(table, "")


def main() -> None:
    """Run every section and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a checkpoint of a masked diffusion model")
    parser.add_argument("--texts", required=True, type=Path, help='JSON lines with a "text" each')
    parser.add_argument("--questions", type=int, default=60, help="how many")
    parser.add_argument("--reference-passes", type=int, default=32, help="passes of 16 draws, to agree with")
    parser.add_argument("--lengths", type=int, nargs="*", default=[1, 2, 3, 4, 8], help="targets of the coverage table")
    parser.add_argument("--seed", type=int, default=0, help="seed of the order of the answers")
    parser.add_argument("--output", type=Path, help="the numbers as JSON")
    args = parser.parse_args()
    terminal = console()
    model = load(args.model)
    texts = read_texts(args.texts, "texts")
    asked = questions(model, texts, args.questions, np.random.default_rng(args.seed))
    result: dict[str, Any] = {key: str(x) if isinstance(x, Path) else x for key, x in vars(args).items()}
    result["target tokens"] = float(np.mean([len(question.answers[question.true]) for question in asked]))
    sections = (
        ("speed", "Speed", lambda: speed(model, asked)),
        ("skewness", "Skewness of the nats of a pass", lambda: skewness(model, asked)),
        ("coverage", "Coverage of 95% intervals of 8 passes of 16 draws", lambda: coverage(model, asked, args.lengths)),
        ("standard_errors", "Standard errors at 128 forward passes", lambda: standard_errors(model, asked)),
        ("decisions", "Forward passes per decision", lambda: decisions(model, asked, args.reference_passes)),
    )
    for key, title, measure in sections:
        result[key] = measure()
        show(terminal, title, result[key])
        if args.output:
            args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    keep_freed_memory()  # as the command does; the other contenders run under it too
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
