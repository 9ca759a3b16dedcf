"""The evaluation of a run on held-out records: nats of the bound per token, its standard error, bits per byte."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from diffusionlm.config import Config
from diffusionlm.data.mixtures import Mixture
from diffusionlm.data.pipeline import Dataset
from diffusionlm.diffusion.objectives import LEVELS
from diffusionlm.training import parts
from diffusionlm.training.batches import Batches
from diffusionlm.training.metrics import by_level
from diffusionlm.training.programs import make_eval_step

BY_SOURCE = ("nelbo_nats_per_token", "nelbo_stderr", "bits_per_byte")  # the numbers that each source of a mixture has


class Evaluator:
    """Evaluates the parameters of one run."""

    def __init__(self, cfg: Config, dataset: Dataset | Mixture, batches: Batches):
        self._cfg, self._dataset, self._batches = cfg, dataset, batches

    def __call__(
        self, params: Any, next_batch: int, on_batch: Callable[[int], None] = lambda k: None
    ) -> dict[str, Any]:
        """Return the bound on the held-out records, as DONE.json has it under "eval".

        The network of a run with `diffusion.arm_steps` is scored twice, with full and with causal attention; until that
        part has ended, it is an autoregressive model, and the bound of no mask is its exact loss.

        Args:
          params: of the model, on its devices.
          next_batch: the number of training batches that the parameters have seen.
          on_batch: called with the number of each batch before it is evaluated.

        Returns:
          "nelbo_nats_per_token" and "nelbo_stderr": the mean over noise draws and its standard error, which covers the
          Monte Carlo noise of the masks and not the choice of held-out documents (0 for an autoregressive model);
          "bits_per_byte", "nelbo_per_draw", "tokens", "bytes". The numbers are NaN if nothing was scored. Of a
          diffusion model also "cross_entropy" and "cross_entropy/0.0-0.1" to "cross_entropy/0.9-1.0": nats per masked
          token without the weights of the bound, of all records and of those in which such a share of the scored
          tokens was masked. A share that no record had is left out.
          With `diffusion.arm_steps` also "autoregressive_nats_per_token" and "autoregressive_bits_per_byte": the exact
          loss of next-token prediction under causal attention.

          On a mixture these are the numbers of a text in which each source has its weight in tokens: the mean over the
          sources of nats per token, and the same mean of bits over that of bytes. The weights are those of the batch
          that was trained on last, or of the first. `run.eval_records` records of each source are scored, as if it were
          alone, and "nelbo_nats_per_token/NAME", "nelbo_stderr/NAME" and "bits_per_byte/NAME" are its own.
        """
        if not self._cfg.diffusion.arm_steps:
            return self._score(self._cfg, params, next_batch, on_batch)
        causal = self._score(parts.config_of(self._cfg, "autoregressive"), params, next_batch, on_batch)
        ends_causal = parts.ends_as_autoregressive(self._cfg, next_batch)
        bound = causal if ends_causal else self._score(self._cfg, params, next_batch, on_batch)
        return bound | {
            "autoregressive_nats_per_token": causal["nelbo_nats_per_token"],
            "autoregressive_bits_per_byte": causal["bits_per_byte"],
        }

    def _score(self, cfg: Config, params: Any, next_batch: int, on_batch: Callable[[int], None]) -> dict[str, Any]:
        """Return the first groups of numbers for `cfg`, compiling its evaluation step at the first call."""
        if not isinstance(self._dataset, Mixture):
            return _numbers(cfg, self._sums(cfg, params, 0, self._dataset, on_batch))
        sums = [
            self._sums(cfg, params, source, dataset, on_batch) for source, dataset in enumerate(self._dataset.datasets)
        ]
        # Of the batches that the parameters were trained on last.
        weights = self._dataset.spec.phase_of(max(next_batch - 1, 0)).weights
        summary = _numbers(cfg, _mixed(sums, weights)) | {
            "tokens": sum(int(each.sums_Dx3[0, 1]) for each in sums),
            "bytes": sum(int(round(each.sums_Dx3[0, 2])) for each in sums),
        }
        for label, each in zip(self._dataset.labels, sums, strict=True):
            alone = _numbers(cfg, each)
            summary |= {f"{name}/{label}": alone[name] for name in BY_SOURCE}
        return summary

    def _sums(
        self, cfg: Config, params: Any, source: int, dataset: Dataset, on_batch: Callable[[int], None]
    ) -> "_Sums":
        """Return what the held-out records of a dataset sum to."""
        eval_step = make_eval_step(cfg)
        draws = cfg.run.eval_draws if cfg.objective == "mdm" else 1  # autoregressive cross-entropy is exact
        token_bytes_V = dataset.tokenizer.token_bytes()
        sums = np.zeros((draws, 3))  # nats, tokens and bytes of each draw
        levels = np.zeros((2, LEVELS))  # unweighted nats and predicted tokens, of all draws
        for k, batch in enumerate(self._batches.held_out(source)):
            on_batch(k)
            outputs = [eval_step(params, batch, token_bytes_V, np.int32(k), np.int32(draw)) for draw in range(draws)]
            jax.block_until_ready(outputs)  # raises where memory was refused; a read of them might wait for ever
            sums += np.array([[float(output[name]) for name in ("nats", "tokens", "bytes")] for output in outputs])
            levels += sum(np.asarray(output["levels"], np.float64) for output in outputs)
        # The tokens of a tokenizer that normalises text stand for fewer (or more) bytes than the documents had.
        split = dataset.metadata.splits["validation"]
        sums[:, 2] = sums[:, 2] * split.raw_bytes / split.token_bytes
        return _Sums(sums, levels)


class _Sums(NamedTuple):
    """Sums over held-out records."""

    sums_Dx3: np.ndarray  # nats of the bound, scored tokens, and bytes that these stand for, of each draw
    levels_2xG: np.ndarray  # unweighted nats and counts of predicted tokens at each level of noise, of all draws


def _mixed(sums: Sequence[_Sums], weights: Sequence[float]) -> _Sums:
    """Return the sums over as many tokens of each source as it has in the mixture, a token in all."""
    parts = [(weight, each) for weight, each in zip(weights, sums, strict=True) if weight]
    with np.errstate(invalid="ignore"):  # nothing was scored: 0 / 0 is NaN
        scaled = [
            (weight * each.sums_Dx3 / each.sums_Dx3[:, 1:2], weight * each.levels_2xG / each.sums_Dx3[0, 1])
            for weight, each in parts
        ]
    return _Sums(*(np.add.reduce(values) for values in zip(*scaled, strict=True)))


def _numbers(cfg: Config, sums: _Sums) -> dict[str, Any]:
    summary = _summary(sums.sums_Dx3)
    if cfg.objective == "mdm":
        nats, tokens = sums.levels_2xG.sum(1)
        summary |= {"cross_entropy": float(nats / tokens) if tokens else math.nan, **by_level(sums.levels_2xG)}
    return summary


def _summary(sums_Dx3: np.ndarray) -> dict[str, Any]:
    draws = len(sums_Dx3)
    with np.errstate(invalid="ignore"):  # nothing was scored: 0 / 0 is NaN
        per_draw_D = sums_Dx3[:, 0] / sums_Dx3[:, 1]
        nelbo = per_draw_D.mean()
        stderr = per_draw_D.std(ddof=1) / math.sqrt(draws) if draws > 1 else 0.0
        bits_per_byte = nelbo / math.log(2) * sums_Dx3[0, 1] / sums_Dx3[0, 2]
    return {
        "nelbo_nats_per_token": float(nelbo),
        "nelbo_stderr": float(stderr),
        "bits_per_byte": float(bits_per_byte),
        "nelbo_per_draw": per_draw_D.tolist(),
        "tokens": _count(sums_Dx3[0, 1]),
        "bytes": _count(sums_Dx3[0, 2]),
    }


def _count(value: float) -> int:
    """Return a whole number; 0 where a source of a mixture has nothing that is scored."""
    return int(round(value)) if math.isfinite(value) else 0
