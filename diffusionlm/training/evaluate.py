"""The evaluation of a run on held-out records: nats of the bound per token, its standard error, bits per byte."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from diffusionlm.config import Config
from diffusionlm.data.metadata import SplitMetadata
from diffusionlm.data.pipeline import Dataset
from diffusionlm.diffusion.objectives import LEVELS
from diffusionlm.training import parts
from diffusionlm.training.batches import Batches
from diffusionlm.training.metrics import by_level
from diffusionlm.training.programs import make_eval_step


class Evaluator:
    """Evaluates the parameters of one run."""

    def __init__(self, cfg: Config, dataset: Dataset, batches: Batches):
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
        """
        if not self._cfg.diffusion.arm_steps:
            return self._score(self._cfg, params, on_batch)
        causal = self._score(parts.config_of(self._cfg, "autoregressive"), params, on_batch)
        ends_causal = parts.ends_as_autoregressive(self._cfg, next_batch)
        bound = causal if ends_causal else self._score(self._cfg, params, on_batch)
        return bound | {
            "autoregressive_nats_per_token": causal["nelbo_nats_per_token"],
            "autoregressive_bits_per_byte": causal["bits_per_byte"],
        }

    def _score(self, cfg: Config, params: Any, on_batch: Callable[[int], None]) -> dict[str, Any]:
        """Return the first group of numbers for `cfg`, compiling its evaluation step at the first call."""
        eval_step = make_eval_step(cfg)
        draws = cfg.run.eval_draws if cfg.objective == "mdm" else 1  # autoregressive cross-entropy is exact
        token_bytes_V = self._dataset.tokenizer.token_bytes()
        sums = np.zeros((draws, 3))  # nats, tokens and bytes of each draw
        levels = np.zeros((2, LEVELS))  # unweighted nats and predicted tokens, of all draws
        for k, batch in enumerate(self._batches.held_out()):
            on_batch(k)
            outputs = [eval_step(params, batch, token_bytes_V, np.int32(k), np.int32(draw)) for draw in range(draws)]
            jax.block_until_ready(outputs)  # raises where memory was refused; a read of them might wait for ever
            sums += np.array([[float(output[name]) for name in ("nats", "tokens", "bytes")] for output in outputs])
            levels += sum(np.asarray(output["levels"], np.float64) for output in outputs)
        summary = _summary(sums, self._dataset.metadata.splits["validation"])
        if cfg.objective == "mdm":
            nats, tokens = levels.sum(1)
            summary |= {"cross_entropy": float(nats / tokens) if tokens else math.nan, **by_level(levels)}
        return summary


def _summary(sums_Dx3: np.ndarray, split: SplitMetadata) -> dict[str, Any]:
    draws = len(sums_Dx3)
    # The tokens of a tokenizer that normalises text stand for fewer (or more) bytes than the documents had.
    bytes_scored = sums_Dx3[0, 2] * split.raw_bytes / split.token_bytes
    with np.errstate(invalid="ignore"):  # nothing was scored: 0 / 0 is NaN
        per_draw_D = sums_Dx3[:, 0] / sums_Dx3[:, 1]
        nelbo = per_draw_D.mean()
        stderr = per_draw_D.std(ddof=1) / math.sqrt(draws) if draws > 1 else 0.0
        bits_per_byte = nelbo / math.log(2) * sums_Dx3[0, 1] / bytes_scored
    return {
        "nelbo_nats_per_token": float(nelbo),
        "nelbo_stderr": float(stderr),
        "bits_per_byte": float(bits_per_byte),
        "nelbo_per_draw": per_draw_D.tolist(),
        "tokens": int(sums_Dx3[0, 1]),
        "bytes": int(round(bytes_scored)),
    }
