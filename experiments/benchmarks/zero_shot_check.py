"""Recompute the log-likelihoods of the harness' tasks, slowly and independently, and compare them item by item.

    diffusionlm evaluate CHECKPOINT lm_eval --tasks piqa_local --data DIR --limit 50 --samples samples \
        --model_args dtype=float32,draws=4,passes=8
    python experiments/benchmarks/zero_shot_check.py CHECKPOINT samples

It reads the texts of the samples, and takes from the package the parameters' arrays, the tokenizer's file and what the
checkpoint says of itself. Everything else is its own: sentencepiece encodes the texts, the network is numpy in float64,
and masks come from another generator and another estimator (the number of masks is drawn, as in LLaDA, arXiv
2502.09992, Eq. 6). The exit code is 1 if a choice differs that both separate clearly, or an exact
score. It knows networks like those of `tinystories` only: RMSNorm, SwiGLU, rotary positions, as many key heads as
heads, predictions shifted by one.
"""

import json
import math
import sys
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import sentencepiece
import tyro
from rich.console import Console
from rich.table import Table
from scipy import special

from diffusionlm.pretrained.loading import load


class Network:
    """A Transformer in numpy."""

    def __init__(self, params, *, causal: bool, theta: float, eps: float):
        self.params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
        self.causal, self.theta, self.eps = causal, theta, eps

    def log_p(self, tokens_BxT: np.ndarray, vocab_size: int) -> np.ndarray:
        """Return log p of the next token at each position, without that of the mask, (B, T, V)."""
        p, blocks = self.params, self.params["blocks"]
        x = p["embed"][tokens_BxT]
        for layer in range(len(blocks["q"])):
            w = {name: blocks[name][layer] for name in ("q", "k", "v", "o", "gate", "up", "down")}
            y = self._norm(x, blocks["attention_norm"]["scale"][layer])
            q, k, v = (np.einsum("btd,dhk->bhtk", y, w[name], optimize=True) for name in ("q", "k", "v"))
            scores = self._rotate(q) @ self._rotate(k).swapaxes(-1, -2) / math.sqrt(q.shape[-1])
            if self.causal:
                scores = np.where(np.tri(scores.shape[-1], dtype=bool), scores, -np.inf)
            x = x + np.einsum("bhtk,hkd->btd", special.softmax(scores, axis=-1) @ v, w["o"], optimize=True)
            y = self._norm(x, blocks["mlp_norm"]["scale"][layer])
            gate = y @ w["gate"]
            x = x + (gate * special.expit(gate) * (y @ w["up"])) @ w["down"]
        return self._norm(x, p["final_norm"]["scale"]) @ p["head"][:, :vocab_size]

    def _norm(self, x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + self.eps) * scale

    def _rotate(self, x: np.ndarray) -> np.ndarray:
        half = x.shape[-1] // 2
        angles = np.arange(x.shape[-2])[:, None] * self.theta ** (-np.arange(half) / half)
        first, second = x[..., :half], x[..., half:]
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


class Model:
    """A network that scores continuations of texts."""

    def __init__(self, checkpoint: Path, guidance: float, draws: int, seed: int):
        loaded = load(str(checkpoint))
        spec = loaded.config
        self.network = Network(
            loaded.params, causal=spec.model.causal, theta=spec.model.rope_theta, eps=spec.model.norm_eps
        )
        (pieces,) = loaded.require_tokenizer().files().values()
        self.tokenizer = sentencepiece.SentencePieceProcessor(model_proto=pieces)
        self.vocab_size, self.mask, self.length = spec.model.vocab_size, spec.mask_id, spec.max_length
        self.guidance, self.draws, self.rng = guidance, draws, np.random.default_rng(seed)

    def score(self, context: str, continuation: str) -> tuple[float, float]:
        """Return the log-likelihood of a continuation and its standard error."""
        trailing = len(context) - len(context.rstrip())
        if trailing:
            context, continuation = context[:-trailing], context[-trailing:] + continuation
        whole = self.tokenizer.encode(context + continuation)
        n = len(whole) - len(self.tokenizer.encode(context))
        row = np.array([self.tokenizer.eos_id(), *whole])[-self.length :]
        if self.mask is None:
            return float(self._target_log_p(row[None], row, n).sum()), 0.0
        values = np.empty(self.draws)
        for i in range(self.draws):
            masks = int(self.rng.integers(1, n + 1))
            places = len(row) - n + self.rng.choice(n, masks, replace=False)
            hidden = row.copy()
            hidden[places] = self.mask
            values[i] = n / masks * self._target_log_p(hidden[None], row, n)[places - (len(row) - n)].sum()
        return float(values.mean()), float(values.std(ddof=1) / math.sqrt(self.draws))

    def _target_log_p(self, hidden_1xT: np.ndarray, row_T: np.ndarray, n: int) -> np.ndarray:
        """Return log p of each of the last n tokens of a row, from a row some of whose tokens are hidden."""
        logits = self.network.log_p(hidden_1xT, self.vocab_size)[0, -n - 1 : -1]
        if self.guidance:
            blank = hidden_1xT.copy()
            blank[:, :-n] = self.mask
            without = self.network.log_p(blank, self.vocab_size)[0, -n - 1 : -1]
            logits = without + (1 + self.guidance) * (logits - without)
        return special.log_softmax(logits, axis=-1)[np.arange(n), row_T[-n:]]


def main(
    checkpoint: Annotated[Path, tyro.conf.Positional],
    samples: Annotated[Path, tyro.conf.Positional],
    items: int = 50,
    draws: int = 32,
    guidance: float = 0.0,
    seed: int = 1,
) -> None:
    """Compare samples of the harness with this script's own figures.

    Args:
      checkpoint: the model.
      samples: the directory of `--samples`.
      items: documents of each task.
      draws: of masks, for each continuation.
      guidance: the scale of unsupervised guidance.
      seed: of the draws.
    """
    model = Model(checkpoint, guidance, draws, seed)
    columns = (
        "task",
        "items",
        "continuations",
        "largest |z| or difference",
        "equal choices",
        "clear choices that differ",
    )
    table = Table(*columns)
    failures = 0
    for path in sorted(samples.glob("*.jsonl")):
        documents = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()][:items]
        worst, equal, differ, count = 0.0, 0, 0, 0
        for document in documents:
            pairs = document["arguments"]
            given = np.array([float(response[0][0]) for response in document["resps"]])
            given_stderr = np.array(document["stderr_of_ll"], float)
            own, own_stderr = np.array([model.score(*pair) for pair in pairs]).T
            stderr = np.hypot(own_stderr, given_stderr)
            distance = np.abs(own - given) / np.where(stderr > 0, stderr, 1)
            worst, count = max(worst, distance.max()), count + len(pairs)
            a, b = own.argmax(), given.argmax()
            equal += a == b
            # Two choices that each side separates beyond its own noise, in opposite order.
            clear = [
                x > 4 * math.hypot(s[a], s[b])
                for x, s in ((own[a] - own[b], own_stderr), (given[b] - given[a], given_stderr))
            ]
            differ += a != b and all(clear)
        table.add_row(
            path.stem, str(len(documents)), str(count), f"{worst:.2g}", f"{equal}/{len(documents)}", str(differ)
        )
        failures += differ + (model.mask is None and worst > 0.01)
    Console().print(table)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    tyro.cli(main)
