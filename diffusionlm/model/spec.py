"""TODO: one sentence."""

from dataclasses import dataclass

from diffusionlm.config import Config, DiffusionConfig, ModelConfig


@dataclass(frozen=True)
class ModelSpec:
    """What the sampler must know of a model besides its parameters."""

    model: ModelConfig
    diffusion: DiffusionConfig  # for its schedule
    mask_id: int | None  # None: an autoregressive model
    suppressed_ids: tuple[int, ...]  # in-vocabulary ids that are never drawn
    shifted: bool  # the hidden state at position i predicts token i + 1, not token i
    max_length: int  # longest prompt and completion together
    eos_ids: tuple[int, ...] = ()  # ids that end a text

    @classmethod
    def of(cls, cfg: Config) -> "ModelSpec":
        """The spec of a model that is trained with `cfg`."""
        autoregressive = cfg.objective == "arm"
        mask_id = None if autoregressive else cfg.mask_id
        shifted = autoregressive or cfg.diffusion.alignment == "shifted"
        return cls(cfg.model, cfg.diffusion, mask_id, cfg.suppressed_ids, shifted, cfg.model.max_length)

    @property
    def autoregressive(self) -> bool:
        return self.mask_id is None
