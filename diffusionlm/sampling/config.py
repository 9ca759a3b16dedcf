"""The settings of a generation, and what the sampler must know of a model.

Imports no JAX, so that the command line can show its help at once.
"""

import dataclasses
from dataclasses import dataclass

from diffusionlm.config import Config, DiffusionConfig, ModelConfig
from diffusionlm.errors import UserError
from diffusionlm.registry import suggest


@dataclass(frozen=True)
class SamplingConfig:
    """How new tokens are generated after a prompt.

    `length` shapes the canvas; everything else is data to the compiled loop, so changing it does not recompile.
    """

    length: int = 64  # new tokens per prompt
    steps: int | None = None  # denoising steps, each one forward pass; None: one per new token
    # what a step reveals: ancestral, low_confidence, left_to_right; None: ancestral (autoregressive: left_to_right)
    strategy: str | None = None
    temperature: float = 1.0  # of the draw of each token; 0 takes the likeliest
    seed: int = 0  # the same seed gives the same tokens, whatever else is in the batch

    def validate(self) -> None:
        """Raises `UserError` for a value that has no meaning."""
        from diffusionlm.sampling.strategies import STRATEGIES  # here, because it imports JAX

        for name, lowest in (("length", 1), ("steps", 1), ("seed", 0)):
            value = getattr(self, name)
            if name == "steps" and value is None:
                continue
            if not isinstance(value, int) or not lowest <= value < 2**31:
                raise UserError(f"sampling.{name}={value!r} must be an integer from {lowest} to {2**31 - 1}")
        if not isinstance(self.temperature, int | float) or not 0 <= self.temperature <= 1e6:
            raise UserError(
                f"temperature={self.temperature!r} must be a number from 0 (take the likeliest token) to 1e6"
            )
        if self.strategy is not None and self.strategy not in STRATEGIES:
            raise UserError(f"unknown strategy {self.strategy!r}{suggest(str(self.strategy), STRATEGIES)}")

    def resolve(self, *, autoregressive: bool) -> "SamplingConfig":
        """A validated copy with the defaults of `steps` and `strategy` filled in for the kind of model.

        Raises:
          UserError: a value has no meaning, or asks an autoregressive model for another order than left to right, one
            token a step.
        """
        self.validate()
        strategy = self.strategy or ("left_to_right" if autoregressive else "ancestral")
        steps = self.steps or self.length
        if autoregressive and (strategy, steps) != ("left_to_right", self.length):
            raise UserError(
                f"strategy={strategy} with steps={steps} needs a masked diffusion model; this one is "
                f"autoregressive: leave both unset, or use left_to_right with steps={self.length}"
            )
        return dataclasses.replace(self, strategy=strategy, steps=steps)


@dataclass(frozen=True)
class ModelSpec:
    """What the sampler must know of a model besides its parameters."""

    model: ModelConfig
    diffusion: DiffusionConfig  # for its schedule
    mask_id: int | None  # None: an autoregressive model
    suppressed_ids: tuple[int, ...]  # in-vocabulary ids that are never drawn
    shifted: bool  # the hidden state at position i predicts token i + 1, not token i
    max_length: int  # longest prompt and completion together

    @classmethod
    def of(cls, cfg: Config) -> "ModelSpec":
        """The spec of a model that is trained with `cfg`."""
        autoregressive = cfg.objective == "arm"
        mask_id = None if autoregressive else cfg.mask_id
        return cls(cfg.model, cfg.diffusion, mask_id, cfg.suppressed_ids, autoregressive, cfg.model.max_length)

    @property
    def autoregressive(self) -> bool:
        return self.mask_id is None
