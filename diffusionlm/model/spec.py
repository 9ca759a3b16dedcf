"""The facts about a model that sampling and likelihood need besides its parameters."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from diffusionlm.config import Config, DiffusionConfig, ModelConfig


@dataclass(frozen=True)
class ModelSpec:
    """The facts of a model that sampling and likelihoods need besides its parameters."""

    model: ModelConfig
    diffusion: DiffusionConfig  # for its schedule
    mask_id: int | None  # None: an autoregressive model
    suppressed_ids: tuple[int, ...]  # in-vocabulary ids that are never drawn
    shifted: bool  # the hidden state at position i predicts token i + 1, not token i
    max_length: int  # longest prompt and completion together
    eos_ids: tuple[int, ...] = ()  # ids that end a text

    @classmethod
    def of(cls, cfg: Config) -> "ModelSpec":
        """Return the spec of a model that is trained with `cfg`."""
        autoregressive = cfg.objective == "arm"
        mask_id = None if autoregressive else cfg.mask_id
        shifted = autoregressive or cfg.diffusion.alignment == "shifted"
        return cls(cfg.model, cfg.diffusion, mask_id, cfg.suppressed_ids, shifted, cfg.model.max_length)

    @property
    def autoregressive(self) -> bool:
        """True if this is a next-token model, which has no mask id."""
        return self.mask_id is None


def suppression_mask(cfg: ModelConfig, suppressed_ids: Sequence[int]) -> np.ndarray:
    """Return the ids that are never predicted: those beyond the vocabulary and those named. bool (padded_vocab_size,).

    Rows beyond the vocabulary pad the table for the hardware.
    """
    suppressed_V = np.arange(cfg.padded_vocab_size) >= cfg.vocab_size
    suppressed_V[list(suppressed_ids)] = True
    return suppressed_V
