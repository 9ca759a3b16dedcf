"""The settings of a generation as data for the device: changing them does not recompile."""

from typing import Any, NamedTuple

import numpy as np

from diffusionlm.sampling.config import SamplingConfig
from diffusionlm.sampling.strategies import STRATEGIES, Rules

_INTEGERS = ("steps", "top_k", "refresh")
_NUMBERS = ("temperature", "top_p", "guidance", "eos_penalty")
_SWITCHES = ("growing", "eos_last", "stop_at_eos")


class Settings(NamedTuple):
    """Fields of `SamplingConfig` of the same names, unless said otherwise."""

    steps: Any  # int32: over all blocks of a row
    top_k: Any  # int32
    refresh: Any  # int32
    temperature: Any  # float32
    top_p: Any  # float32
    guidance: Any  # float32
    eos_penalty: Any  # float32
    growing: Any  # bool
    eos_last: Any  # bool
    stop_at_eos: Any  # bool
    strategy: Any  # int32: an index into `STRATEGIES`
    standard_guidance: Any  # bool
    rules: Rules

    @classmethod
    def of(cls, sampling: SamplingConfig) -> "Settings":
        """Those of a resolved configuration."""
        return cls(
            *(np.int32(getattr(sampling, name)) for name in _INTEGERS),
            *(np.float32(getattr(sampling, name)) for name in _NUMBERS),
            *(np.bool_(getattr(sampling, name)) for name in _SWITCHES),
            strategy=np.int32(list(STRATEGIES).index(sampling.strategy)),
            standard_guidance=np.bool_(sampling.guidance_kind == "standard"),
            rules=Rules(*(np.float32(getattr(sampling, name)) for name in Rules._fields)),
        )
